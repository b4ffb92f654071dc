"""Text for XML documents that others read."""

from __future__ import annotations

import re

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 can't hold, not even escaped."""


def xml_text(text: str) -> str:
    """Return ``text`` with an underscore for each character that XML can't hold."""
    return NOT_XML.sub("_", text)
