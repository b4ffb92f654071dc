"""What OpenStack's services say when they refuse: the reason out of JSON or HTML, and a hint."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

LONGEST = 500
"""Of a reason, in characters: some services send whole pages."""


class _Text(HTMLParser):
    """The words of a page, but for its title, which only repeats the status."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._is_shown = True

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._is_shown = tag not in ("title", "h1")

    def handle_endtag(self, tag: str) -> None:
        self._is_shown = True

    def handle_data(self, data: str) -> None:
        if self._is_shown:
            self.words += data.split()


def reason(response: Any) -> str:
    """Return what the service said of it, as ``: …``; empty where it said nothing.

    Cinder and Nova send ``{"badRequest": {"message": …}}``, Keystone ``{"error": …}``, Glance HTML.
    """
    try:
        said = response.json()
    except ValueError:
        page = _Text()
        page.feed(response.text[: 8 * LONGEST])
        text = " ".join(page.words)
    else:
        inner = next(iter(said.values()), None) if isinstance(said, dict) else None
        message = inner.get("message") if isinstance(inner, dict) else inner
        text = " ".join(message.split()) if isinstance(message, str) else ""
    return f": {text[:LONGEST]}" if text else ""


def hint_for(name: str, status: int, request_id: str | None) -> str:
    match status:
        case 401:
            return "the token was refused: has the session ended, or the password changed?"
        case 403:
            return "the user may not do this, or a quota is used up: openstack quota show"
        case 404:
            return "it is not there, or belongs to another project"
        case 409:
            return "something else is being done with it: try again later"
        case 413:
            return "a quota or a limit of the cloud is used up: openstack quota show"
        case _:
            return f"{name}'s log tells more" + (f" about {request_id}" if request_id else "")
