"""XML from strangers: read without entities, DTDs and the network, and asked by XPath."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lxml import etree

from v2v_async.errors import SourceError

MAX_SIZE = 4 * 1024 * 1024
"""libvirt's own messages hold no longer string (REMOTE_STRING_MAX in remote_protocol.x)."""

_DECLARATION = re.compile(rb"<!\s*(DOCTYPE|ENTITY)", re.IGNORECASE)


def parse_untrusted(content: bytes, what: str, max_size: int) -> etree._Element:
    """Return the root element of a document from a stranger; ``what`` names it in messages.

    No document type, no entities, no network, no depth without end; at most ``max_size`` bytes.

    Raises:
        SourceError: it is no XML, or has what such a document has no use for.
    """
    if len(content) > max_size:
        raise SourceError(
            f"{what} is too large for what it should be: {len(content)} bytes or more; at most "
            f"{max_size} are read",
            hint="was a disk named in its place?",
        )
    # Before parsing, since entities in attributes are expanded by the parser itself; without the
    # zero bytes UTF-16 and UTF-32 read like ASCII. Encodings this misses are caught afterwards.
    if _DECLARATION.search(content.replace(b"\0", b"")):
        raise _doctype(what)
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    try:
        root = etree.fromstring(content, parser)
    except (etree.LxmlError, ValueError, LookupError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise SourceError(f"{what} is not well-formed XML: {reason}") from error
    if root.getroottree().docinfo.internalDTD is not None:
        raise _doctype(what)
    return root


def parse_xml(content: bytes, what: str, root: str) -> etree._Element:
    """Return the root element of a document of libvirt's, which must be ``root``.

    Raises:
        SourceError: as :func:`parse_untrusted`; or it has another root.
    """
    hint = "‘virsh dumpxml GUEST’ writes what is wanted here" if root == "domain" else None
    try:
        element = parse_untrusted(content, what, MAX_SIZE)
    except SourceError as error:
        error.hint = error.hint or hint
        raise
    if element.tag != root:
        raise SourceError(
            f"{what} is not a libvirt {root}: its root element is <{element.tag}>", hint=hint
        )
    return element


def _doctype(what: str) -> SourceError:
    return SourceError(
        f"{what} declares a document type (<!DOCTYPE …>), which is refused: it can pull in other "
        "files and grow without end",
        hint="neither libvirt nor an honest OVF has one: take the declaration out",
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
