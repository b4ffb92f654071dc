"""XML of OVF from strangers: parsed without entities and DTDs, and asked by local names."""

from __future__ import annotations

import re

from lxml import etree

from v2v_async.errors import SourceError


def parse_xml(xml: bytes, what: str, max_size: int) -> etree._Element:
    """Parse XML from a stranger: no DTD, no entities, no network, no depth without end.

    Raises:
        SourceError: it is not XML, or has what such a document has no use for.
    """
    if len(xml) > max_size:
        raise SourceError(f"{what} is too long ({len(xml)} bytes; at most {max_size} are read)")
    # Before anything is parsed; without the zero bytes of UTF-16 and UTF-32.
    if re.search(rb"<!\s*(DOCTYPE|ENTITY)", xml.replace(b"\0", b""), re.IGNORECASE):
        raise _doctype(what)
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    try:
        root = etree.fromstring(xml, parser)
    except (etree.LxmlError, ValueError, LookupError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise SourceError(f"{what} is not well-formed XML: {reason}") from error
    # In an encoding in which the search above saw nothing.
    if root.getroottree().docinfo.internalDTD is not None:
        raise _doctype(what)
    return root


def _doctype(what: str) -> SourceError:
    return SourceError(
        f"{what} has a document type declaration (<!DOCTYPE …>), which is refused",
        hint="it can make a small file fill the memory or read files of this machine; an honest "
        "one has none",
    )


def local(element: etree._Element) -> str:
    """Return an element's name without its namespace."""
    return etree.QName(element).localname


def children(parent: etree._Element, name: str) -> list[etree._Element]:
    """Return the children of that local name."""
    return [child for child in parent.iterchildren(etree.Element) if local(child) == name]


def first_text(element: etree._Element) -> str:
    """Return the first piece of text, up to a comment if there is one (XPath's ``text()``)."""
    pieces = [element.text, *(child.tail for child in element)]
    return next((piece.strip() for piece in pieces if piece and piece.strip()), "")


def value_of(item: etree._Element, name: str) -> str | None:
    """Return the text of the first such element that has any."""
    for child in children(item, name):
        if text := first_text(child):
            return text
    return None


def attribute(element: etree._Element, name: str) -> str | None:
    """Return an attribute, in a namespace (as the standard wants it) or in none."""
    found = {etree.QName(str(key)): str(value) for key, value in element.attrib.items()}
    mine = {key.namespace or "": value for key, value in found.items() if key.localname == name}
    return next((value for namespace, value in mine.items() if namespace), mine.get(""))
