"""Domain XML from anywhere: a guest comes out of it, or a SourceError, and nothing else."""

from __future__ import annotations

import contextlib
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.e2e.test_print_source_libvirt import BETTER, DOCUMENTS
from v2v_async.cli.source_info import describe
from v2v_async.errors import SourceError
from v2v_async.input.libvirt.domain_xml import Domain, parse_domain
from v2v_async.model import SourceGuest

SEEDS = [text.encode() for text in DOCUMENTS.values()]
SEEDS += [text.encode() for text, _ in BETTER.values()]
WORDS = sorted(set(re.findall(rb"[\w-]+|<[^>]+>|='[^']*'", b" ".join(SEEDS))))
AWKWARD = [b"-1", b"0", b"1e400", b"\xff", b"\0", b"&x;", b"&#0;", b"<![CDATA[", b"]]>", b"''"]
AWKWARD += [
    b"<!DOCTYPE d [<!ENTITY x 'y'>]>",
    b"xmlns='u'",
    b"9" * 400,
    b"\xe2\x80\xae",
    b"%",
    b":",
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A document of the comparison, with a few pieces cut out, put in, doubled or replaced."""
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, len(text)))
        last = min(len(text), first + draw(st.integers(0, 60)))
        piece = draw(st.sampled_from([*WORDS, *AWKWARD, text[first:last], b""]))
        text = text[:first] + piece + text[last:]
    return text


@st.composite
def replaced(draw: st.DrawFn) -> bytes:
    """A document that stays XML: values of attributes and texts are exchanged."""
    text = draw(st.sampled_from(SEEDS)).decode()
    value = st.text(
        st.characters(codec="utf-8", exclude_characters="<>&'\"", min_codepoint=32), max_size=12
    )
    number = st.integers(-(10**30), 10**30).map(str)

    def other(match: re.Match[str]) -> str:
        if draw(st.integers(0, 3)):
            return match[0]
        return match[1] + draw(value | number) + match[3]

    return re.sub(r"(='|>)([^<>']*)('|<)", other, text).encode()


def check(document: bytes) -> None:
    domain: Domain | None = None
    with contextlib.suppress(SourceError):
        domain = parse_domain(document, "x.xml")
    if domain is None:
        return
    guest = domain.guest
    assert guest.name.strip()
    assert 0 < guest.memory <= 1 << 52
    assert 1 <= guest.vcpus <= 65535
    assert domain.disks
    assert all(disk.location and "\n" not in disk.location for disk in domain.disks)
    # It can be written, read again and shown.
    assert SourceGuest.model_validate_json(guest.model_dump_json()) == guest
    assert describe(guest).startswith("Source guest information")


@settings(max_examples=600, deadline=None)
@given(mutated())
def test_mutated_documents(document: bytes) -> None:
    check(document)


@settings(max_examples=400, deadline=None)
@given(replaced())
def test_other_values(document: bytes) -> None:
    check(document)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(document: bytes) -> None:
    check(document)
