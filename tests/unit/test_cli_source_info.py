"""--print-source, letter by letter: recorded from virt-v2v 2.2 for the same guest."""

from __future__ import annotations

from v2v_async.cli.source_info import describe
from v2v_async.model import CpuTopology, Nic, SourceDisk, SourceGuest, SourceRemovable

RECORDED = """\
Source guest information (--print-source option):

    source name: x
hypervisor type: kvm
       VM genid:\x20
         memory: 1073741824 (bytes)
       nr vCPUs: 2
     CPU vendor: Intel
      CPU model: Haswell
   CPU topology: sockets: 1 cores/socket: 2 threads/core: 1
   CPU features: acpi
       firmware: unknown
        display: vnc
          sound: ich6
disks:
\t0 [scsi]
removable media:
\tCD-ROM [ide] in slot 2
\tFloppy in slot 0
NICs:
\tBridge "br0" mac: 52:54:00:01:02:03 [e1000]
\tNetwork "lan"

"""


def test_print_source_as_virt_v2v_prints_it() -> None:
    source = SourceGuest(
        name="x",
        hypervisor="kvm",
        memory=1 << 30,
        vcpus=2,
        cpu_vendor="Intel",
        cpu_model="Haswell",
        cpu_topology=CpuTopology(sockets=1, cores=2, threads=1),
        features=["acpi"],
        display="vnc",
        sound="ich6",
        disks=[SourceDisk(index=1, source="/x", format="raw", size=1, controller="scsi")],
        removables=[
            SourceRemovable(type="cdrom", controller="ide", slot=2),
            SourceRemovable(type="floppy", slot=0),
        ],
        nics=[
            Nic(mac="52:54:00:01:02:03", model="e1000", vnet="br0", vnet_type="bridge"),
            Nic(vnet="lan"),
        ],
    )
    assert describe(source) == RECORDED
