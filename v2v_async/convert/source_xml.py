"""The libvirt XML that tells virt-v2v-in-place which disks to convert.

One disk element for each ``inN``, in order. 2.2 and newer take an NBD URI as the name of a file
whose format is ``nbd``. Everything else is there for the few decisions that depend on it: the name
(messages), the interfaces (``--mac …:ip:…`` looks for theirs), memory and processors (required).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from lxml import etree

from v2v_async.model import SourceGuest
from v2v_async.units import drive_letters
from v2v_async.xml_text import xml_text


def source_xml(source: SourceGuest, socket: Callable[[int], Path]) -> bytes:
    """Return the document; ``socket`` gives the path of ``inINDEX``."""
    domain = etree.Element("domain", type="kvm")
    _add(domain, "name", xml_text(source.name) or "guest")
    _add(domain, "memory", str(max(1, source.memory // 1024)), unit="KiB")
    _add(domain, "vcpu", str(source.vcpus))
    system = etree.SubElement(domain, "os")
    _add(system, "type", "hvm")
    features = etree.SubElement(domain, "features")
    for name in source.features:
        if re.fullmatch(r"[a-z][a-z0-9-]*", name):
            etree.SubElement(features, name)
    devices = etree.SubElement(domain, "devices")
    for position, disk in enumerate(source.disks):
        element = etree.SubElement(devices, "disk", type="file", device="disk")
        etree.SubElement(element, "driver", name="qemu", type="nbd")
        path = quote(str(socket(disk.index)), safe="/")
        etree.SubElement(element, "source", file=f"nbd+unix:///?socket={path}")
        etree.SubElement(element, "target", dev=f"sd{drive_letters(position)}", bus="scsi")
    for nic in source.nics:
        interface = etree.SubElement(devices, "interface", type=nic.vnet_type)
        if nic.mac:
            etree.SubElement(interface, "mac", address=nic.mac)
        vnet = etree.SubElement(interface, "source")
        vnet.set(nic.vnet_type, xml_text(nic.vnet) or "default")
    return etree.tostring(domain, pretty_print=True, xml_declaration=True, encoding="utf-8")


def _add(parent: etree._Element, tag: str, text: str, **attributes: str) -> None:
    etree.SubElement(parent, tag, attributes).text = text
