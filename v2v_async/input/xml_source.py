"""XML from strangers: read without entities, DTDs and the network, and asked by XPath."""

from __future__ import annotations

from collections.abc import Iterable

from lxml import etree

from v2v_async.errors import SourceError

MAX_SIZE = 4 * 1024 * 1024
"""libvirt's own messages hold no longer string (REMOTE_STRING_MAX in remote_protocol.x)."""


def parse_xml(content: bytes, what: str, root: str) -> etree._Element:
    """Return the root element, which must be ``root``; ``what`` names the document in messages.

    Raises:
        SourceError: it is no XML, too large, declares a document type, or has another root.
    """
    if len(content) > MAX_SIZE:
        raise SourceError(
            f"{what} is larger than {MAX_SIZE // (1024 * 1024)} MiB, so it is no libvirt XML",
            hint="was a disk named in its place?",
        )
    # Before parsing, since entities in attributes are expanded by the parser itself; without the
    # zero bytes UTF-16 and UTF-32 read like ASCII. Encodings this misses are caught afterwards.
    if b"<!DOCTYPE" in content.replace(b"\0", b""):
        raise _doctype(what)
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    try:
        element = etree.fromstring(content, parser)
    except (etree.LxmlError, ValueError, LookupError) as error:
        raise SourceError(
            f"{what} is not XML: {error}", hint="‘virsh dumpxml GUEST’ writes what is wanted here"
        ) from error
    if element.getroottree().docinfo.doctype:  # type: ignore[union-attr]
        raise _doctype(what)
    if element.tag != root:
        raise SourceError(
            f"{what} is not a libvirt {root}: its root element is <{element.tag}>",
            hint="‘virsh dumpxml GUEST’ writes what is wanted here" if root == "domain" else None,
        )
    return element


def _doctype(what: str) -> SourceError:
    return SourceError(
        f"{what} declares a document type (<!DOCTYPE …>), which is refused: it can pull in other "
        "files and grow without end",
        hint="libvirt writes none: take the declaration out",
    )


def texts(node: etree._Element, path: str) -> list[str]:
    """Return what an XPath expression for attributes or ``text()`` selects, in document order."""
    found = node.xpath(path)
    return [str(each) for each in found] if isinstance(found, list) else []


def text(node: etree._Element, path: str) -> str | None:
    """Return the first of :func:`texts`; None where there is none. It may be empty."""
    return next(iter(texts(node, path)), None)


def elements(node: etree._Element, path: str) -> list[etree._Element]:
    """Return the elements that an XPath expression selects, in document order."""
    found = node.xpath(path)
    return [each for each in _list(found) if isinstance(each, etree._Element)]


def _list(found: object) -> Iterable[object]:
    return found if isinstance(found, list) else []


def number(node: etree._Element, path: str, what: str, *, least: int = 0, most: int) -> int | None:
    """Return the decimal number that ``path`` selects; None where there is none.

    ``what`` names its place in messages: ``guest.xml: <vcpu>``.

    Raises:
        SourceError: it is no number, or not from ``least`` to ``most``.
    """
    found = text(node, path)
    if found is None:
        return None
    digits = found.strip()
    # The length bounds int(), which is slow (and refuses) beyond thousands of digits.
    if not (digits.lstrip("-").isascii() and digits.lstrip("-").isdigit() and len(digits) <= 30):
        raise SourceError(f"{what} is ‘{digits[:60]}’, which is not a number")
    try:
        value = int(digits)
    except ValueError as error:  # "--5"
        raise SourceError(f"{what} is ‘{digits}’, which is not a number") from error
    if not least <= value <= most:
        raise SourceError(f"{what} is {value}, which is not from {least} to {most}")
    return value
