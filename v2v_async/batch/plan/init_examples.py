"""Guests of several kinds for the plan that ``v2v-async batch init`` writes."""

from __future__ import annotations

from typing import Any

from v2v_async.batch.plan.init_text import Setting, Table

Settings = tuple[Setting | Table, ...]

LIMITED = {
    "hosts": "esx1.example.com",
    "datastores": "san1",
    "targets": "/var/lib/libvirt/images",
    "groups": "web",
}
"""A name for each kind of limits by name; the guests below are of them."""

_VALUES_THAT_ARE_TABLES = ("options",)


def _settings(told: dict[str, Any], comments: dict[str, str], path: str = "") -> Settings:
    """Return settings from a dict; ``comments`` is by dotted key."""
    return tuple(
        Table(key, _settings(value, comments, f"{path}{key}."))
        if isinstance(value, dict) and key not in _VALUES_THAT_ARE_TABLES
        else Setting(key, value, comments.get(f"{path}{key}", ""), is_active=False)
        for key, value in told.items()
    )


FIRST = _settings(
    {
        "name": "web1",
        "input": {"type": "disk", "source": ["/vms/web1.img"]},
        "output": {"type": "local", "storage": "/var/lib/libvirt/images"},
    },
    {
        "name": "<-- what it is called in this batch",
        "input.type": "<-- disk, libvirt, libvirtxml, ova or vmx",
        "input.source": "<-- its disks; of other types a name or a file",
        "output.type": "<-- local: files and a libvirt XML",
        "output.storage": "<-- a directory that is there",
    },
)

GUESTS: tuple[tuple[str, Settings], ...] = (
    (
        "A guest for each file that a pattern finds, seen from this file's folder (** goes\n"
        "through folders). {path}, {name} (without suffix), {file} and {folder} may stand in\n"
        "its texts. The name is {name} and the source {path}, where nothing else is said.",
        _settings(
            {
                "glob": "vms/*/*.vmx",
                "name": "{folder}",
                "input": {"type": "vmx"},
                "output": {"type": "local", "storage": "/var/lib/libvirt/images"},
            },
            {},
        ),
    ),
    (
        "The same for OVA files, here to qemu scripts.",
        _settings(
            {
                "glob": "*.ova",
                "input": {"type": "ova"},
                "output": {"type": "qemu", "storage": "/var/lib/libvirt/images"},
            },
            {},
        ),
    ),
    (
        "A guest for each row of a CSV file, whose first row names the {columns}:\n"
        "    name,host,datastore,group,priority\n"
        "    db1,esx1.example.com,san1,web,10\n"
        "Here from vCenter by VMware's library; without transport and options over HTTPS, which\n"
        "is slower. The password is the only line of a file that only you can read.",
        _settings(
            {
                "csv": "guests.csv",
                "group": "{group}",
                "priority": "{priority}",
                "datastore": "{datastore}",
                "input": {
                    "type": "libvirt",
                    "source": "{name}",
                    "connection": "vpx://root@vcenter.example.com/Datacenter/{host}?no_verify=1",
                    "transport": "vddk",
                    "options": {"vddk-libdir": "/opt/vmware-vix-disklib-distrib"},
                    "password_file": "/root/vcenter.password",
                },
                "output": {"type": "libvirt", "storage": "default", "name": "{name}-new"},
                "network": {"networks": ["VM Network:lan", "default"]},
            },
            {"output.storage": "a pool of libvirt's"},
        ),
    ),
    (
        "A VMX file on an ESXi host, over ssh, to oVirt.",
        _settings(
            {
                "name": "mail",
                "datastore": "san1",
                "input": {
                    "type": "vmx",
                    "source": "ssh://root@esx1.example.com/vmfs/volumes/san1/mail/mail.vmx",
                    "transport": "ssh",
                },
                "output": {
                    "type": "rhv-upload",
                    "connection": "https://engine.example.com/ovirt-engine/api",
                    "storage": "data1",
                    "password_file": "/root/ovirt.password",
                    "options": {"rhv-cafile": "/root/ovirt-ca.pem", "rhv-cluster": "Default"},
                },
            },
            {"output.storage": "a storage domain"},
        ),
    ),
    (
        "A guest of Xen, to OpenStack; from inside an instance of it, whose id server-id is.",
        _settings(
            {
                "name": "intranet",
                "input": {
                    "type": "libvirt",
                    "source": "intranet",
                    "connection": "xen+ssh://root@xen.example.com",
                },
                "output": {
                    "type": "openstack",
                    "storage": "ssd",
                    "options": {"server-id": "8d3c9d7f-4f0a-4c8e-a6a1-2b5fd1c7a001"},
                },
            },
            {"output.storage": "a type of volumes"},
        ),
    ),
    (
        "Two disks, one read from an NBD server; encrypted, with the passphrase in a file; its\n"
        "NIC gets a fixed address. To KubeVirt, and compared with the source at the end.",
        _settings(
            {
                "name": "ledger",
                "memory": "4G",
                "input": {
                    "type": "disk",
                    "source": ["/vms/ledger.qcow2", "nbd://nas.example.com/ledger-data"],
                },
                "convert": {"keys": ["all:file:/root/luks.key"], "root": "first"},
                "network": {"macs": ["52:54:00:01:02:03:ip:192.0.2.7,192.0.2.1,24"]},
                "output": {"type": "kubevirt", "storage": "/var/lib/kubevirt-disks"},
                "copy": {"verify": True},
            },
            {},
        ),
    ),
    (
        "A guest whose libvirt XML is a file; -o null throws the copy away: for a rehearsal.",
        _settings(
            {
                "name": "rehearsal",
                "input": {"type": "libvirtxml", "source": "/vms/rehearsal.xml"},
                "output": {"type": "null"},
            },
            {},
        ),
    ),
)
