"""Take secrets out of what is given to other people: rather a word too many than one too few."""

from __future__ import annotations

import json
import re
import shlex
from base64 import b64encode
from collections.abc import Iterable, Iterator
from urllib.parse import quote
from xml.sax.saxutils import escape

from v2v_async.redact import MASK, redact

# Repetitions are bounded everywhere: a log may have lines of a megabyte.
_NAME = (
    r"(?:password|passwd|passphrase|passcode|secret|token|credentials?|cookie|psk|ticket"
    r"|api[-_]?key|private[-_]?key)"
)
_HEADER = re.compile(
    r"(?P<head>\b(?:(?:proxy-)?authorization|(?:set-)?cookie|x-[a-z-]{0,30}(?:token|auth|key)|"
    r"vmware-[a-z-]{0,30}(?:ticket|session-id))[\"']?\s{0,5}[:=]\s{0,5}).+",
    re.IGNORECASE,
)
# NAME=VALUE, NAME: VALUE, "NAME": "VALUE" and --NAME VALUE, but not NAME-file, which names one.
_NAMED = re.compile(
    rf"(?P<head>{_NAME}(?![_-]?file)[\w.-]{{0,20}}[\"']?\s{{0,5}}[:=]\s{{0,5}}"
    r"|(?<![\w-])--?[\w-]{0,40}?(?:password|passphrase|passcode|secret|token)\s)"
    r"(?:\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^\s,;&}<>\"']+)",
    re.IGNORECASE,
)
_ELEMENT = re.compile(
    rf"(?P<head><[\w:.-]{{0,60}}?{_NAME}[\w.-]{{0,20}}(?:\s[^<>]{{0,200}})?>)[^<>]+",
    re.IGNORECASE,
)
_WEB_TOKEN = re.compile(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)*")  # RFC 7519
_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_END_OF_KEY = re.compile(  # where its beginning was cut off
    r"(?:^[A-Za-z0-9+/=]{4,80}\r?\n)*-----END [A-Z ]{0,30}PRIVATE KEY-----", re.MULTILINE
)
_SECRET_KEY = re.compile(rf"{_NAME}(?![_-]?file)", re.IGNORECASE)

_SHORTEST = 4
"""Known secrets of fewer characters are masked only as words: ‘a’ is in every line."""


class Redaction:
    """Masks known secrets wherever they stand, and what looks like one.

    A known secret is found as it is, and as URIs, XML, JSON, a shell's words and base64 have it.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets for form in _forms(secret) if form}
        # The longest first: one may be part of another.
        ordered = sorted(forms, key=lambda form: (-len(form), form))
        self._long = [form for form in ordered if len(form) >= _SHORTEST]
        self._short = [
            re.compile(rf"(?<!\w){re.escape(form)}(?!\w)")
            for form in ordered
            if len(form) < _SHORTEST
        ]

    def text(self, text: str) -> str:
        """Return ``text`` without secrets."""
        for form in self._long:
            text = text.replace(form, MASK)
        for pattern in (*self._short, _KEY, _END_OF_KEY, _WEB_TOKEN):
            text = pattern.sub(MASK, text)
        text = redact(text)
        for pattern in (_HEADER, _NAMED, _ELEMENT):
            text = pattern.sub(rf"\g<head>{MASK}", text)
        return text

    def value(self, value: object) -> object:
        """Return a value of JSON without secrets: in texts, in names, and where a name says so."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        if isinstance(value, dict):
            return {
                self.text(str(name)): MASK
                if isinstance(each, str) and is_secret_name(str(name))
                else self.value(each)
                for name, each in value.items()
            }
        return value


def is_secret_name(name: str) -> bool:
    """Whether an option or key of this name holds a secret (not: names a file with one)."""
    return _SECRET_KEY.search(name) is not None


def _forms(secret: str) -> Iterator[str]:
    """Yield how a secret may be written."""
    yield secret
    yield quote(secret, safe="")
    yield quote(secret)
    yield escape(secret)
    yield escape(secret, {'"': "&quot;", "'": "&apos;"})
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield shlex.quote(secret)
    yield b64encode(secret.encode(errors="replace")).decode().rstrip("=")
