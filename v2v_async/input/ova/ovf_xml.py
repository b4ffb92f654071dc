"""OVF asked by local names: its writers do not agree on namespaces."""

from __future__ import annotations

from lxml import etree


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
