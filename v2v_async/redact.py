"""Take secrets out of what people and logs get to see."""

from __future__ import annotations

import re
from collections.abc import Sequence

MASK = "***"
# The scheme is looked for only where a word begins, so that a long line takes no longer than its
# length; the password may have a ‘@’ in it that nobody quoted.
_URI_PASSWORD = re.compile(
    r"(?P<head>(?<![a-z0-9+.-])[a-z0-9+.-]+://[^/\s:@]*:)[^/\s]+(?=@)", re.IGNORECASE
)
# Parameters of nbdkit plugins and of virt-v2v whose value is a secret.
_SECRET_PARAMETER = re.compile(
    r"(?P<head>\b(?:password|passwd|cookie|proxy-password|tls-psk|token|secret)=)[^\s,]+",
    re.IGNORECASE,
)
# virt-customize's selectors: "password:SECRET", "USER:password:SECRET".
_PASSWORD_SELECTOR = re.compile(r"(?P<head>\bpassword:)\S+")
_KEY_SELECTOR = re.compile(r"(?P<head>\S:key:).+")


def redact(text: str) -> str:
    """Return ``text`` with passwords, secret parameters and LUKS keys masked."""
    text = _URI_PASSWORD.sub(rf"\g<head>{MASK}", text)
    text = _SECRET_PARAMETER.sub(rf"\g<head>{MASK}", text)
    text = _PASSWORD_SELECTOR.sub(rf"\g<head>{MASK}", text)
    return _KEY_SELECTOR.sub(rf"\g<head>{MASK}", text)


def redact_argv(argv: Sequence[str]) -> list[str]:
    """Return ``argv`` with every secret masked, for messages and logs."""
    return [redact(argument) for argument in argv]
