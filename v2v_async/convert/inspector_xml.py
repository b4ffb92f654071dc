"""The document of virt-v2v-inspector(1): what is inside a guest, and how large its disks are.

virt-v2v-in-place writes it to ``-O FILE`` (2.8 and newer), and so do ``v2v-async in-place`` and
``v2v-async inspect``, whatever is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lxml import etree

from v2v_async import __version__
from v2v_async.convert.properties import to_firmware, to_inspection
from v2v_async.model import Firmware, Inspection, SourceGuest
from v2v_async.xml_text import xml_text

_SYSTEM = (
    "distro",
    "osinfo",
    "arch",
    "major_version",
    "minor_version",
    "package_format",
    "package_management",
    "product_name",
    "product_variant",
)


def inspector_xml(
    source: SourceGuest,
    inspection: Inspection,
    firmware: Firmware,
    *,
    allocated: Mapping[int, int],
    program: str,
) -> str:
    """Return the document. ``allocated``: index of a disk to the bytes that its data will take."""
    root = etree.Element("v2v-inspection")
    _add(root, "program", program)
    _add(root, "package", "v2v-async")
    _add(root, "version", __version__)
    disks = etree.SubElement(root, "disks")
    for disk in source.disks:
        element = etree.SubElement(disks, "disk", index=str(disk.index - 1))
        _add(element, "virtual-size", str(disk.size))
        if disk.index in allocated:
            _add(element, "allocated", str(allocated[disk.index]), estimated="true")
    if firmware != "unknown":
        etree.SubElement(root, "firmware", type=firmware)
    system = etree.SubElement(root, "operatingsystem")
    _add(system, "name", inspection.type)
    for name in _SYSTEM:
        value = getattr(inspection, name)
        _add(system, name, "unknown" if value is None else str(value))
    return etree.tostring(root, encoding="utf-8", pretty_print=True, xml_declaration=True).decode()


def parse_inspector_xml(document: bytes) -> tuple[Inspection, Firmware]:
    """Read such a document.

    Raises:
        ValueError: it is not one.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        root = etree.fromstring(document, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"its inspection data is not XML: {error}") from error
    system = root.find("operatingsystem")
    if root.tag != "v2v-inspection" or system is None:
        raise ValueError("its inspection data has no operating system")
    values = {str(child.tag): (child.text or "").strip() for child in system}
    # Only this document calls the type a name.
    values["type"] = values.get("name", "unknown")
    firmware = root.find("firmware")
    return to_inspection(values), to_firmware(None if firmware is None else firmware.get("type"))


def _add(parent: Any, tag: str, text: str, **attributes: str) -> None:
    etree.SubElement(parent, tag, attributes).text = xml_text(text)
