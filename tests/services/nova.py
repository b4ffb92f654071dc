"""A stand-in for Nova that speaks its API, version 2.1: servers, and volumes attached to them.

An attached volume appears as ``virtio-`` and the first 20 characters of its id in a folder, as udev
has it appear in /dev/disk/by-id: a link to the volume's file, or to a loop device of it.

Source: OpenStack's Compute API reference.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.services.cinder import Cinder
from tests.services.front import Answer, Request

APPLIANCE = "bbb0147a-44b9-4d19-9a9d-10ca9a984744"
SERVERS = {
    APPLIANCE: ("appliance", "ACTIVE"),
    "bbb0147a-44b9-4d19-9a9d-10ca9a984745": ("asleep", "SHUTOFF"),
    "bbb0147a-44b9-4d19-9a9d-10ca9a984746": ("twin", "ACTIVE"),
    "bbb0147a-44b9-4d19-9a9d-10ca9a984747": ("twin", "ACTIVE"),
    "bbb0147a-44b9-4d19-9a9d-10ca9a984748": ("appliance-2", "ACTIVE"),
}


class Nova:
    """Its servers and what is attached to them."""

    def __init__(
        self, cinder: Cinder, devices: Path, check_token: Callable[[str | None], bool]
    ) -> None:
        self.cinder = cinder
        self.devices = devices
        self.check_token = check_token
        self.use_loop = False
        self.hides_devices = False
        self._loops: dict[str, str] = {}
        devices.mkdir(parents=True)

    def device(self, volume: str) -> Path:
        """Where an attached volume appears."""
        return self.devices / f"virtio-{volume[:20]}"

    def __call__(self, request: Request) -> Answer:
        """Answer a request."""
        if request.path in ("/", "/v2.1", "/v2.1/"):
            return _versions(request)
        if not self.check_token(request.headers.get("X-Auth-Token")):
            return 401, {"error": {"code": 401, "title": "Unauthorized", "message": "No token."}}
        words = request.path.removeprefix("/v2.1/").split("/")
        if words[0] != "servers":
            return _refusal(404, "itemNotFound", "The resource could not be found.")
        if words[1:] in ([], ["detail"]):
            pattern = request.query.get("name", "")
            found = [_server(each) for each in SERVERS if re.search(pattern, SERVERS[each][0])]
            return 200, {"servers": found}
        if words[1] not in SERVERS:
            return _refusal(404, "itemNotFound", f"Instance {words[1]} could not be found.")
        with self.cinder.lock:
            return self._answer(request, words[1], words[2:])

    def _answer(self, request: Request, server: str, words: list[str]) -> Answer:
        match request.method, words:
            case "GET", []:
                return 200, {"server": _server(server)}
            case "GET", ["os-volume_attachments"]:
                return 200, {"volumeAttachments": self._attachments(server)}
            case "POST", ["os-volume_attachments"]:
                return self._attach(server, request.body["volumeAttachment"]["volumeId"])
            case "GET", ["os-volume_attachments", volume]:
                for found in self._attachments(server):
                    if found["volumeId"] == volume:
                        return 200, {"volumeAttachment": found}
                return _refusal(404, "itemNotFound", f"{volume} is not attached.")
            case "DELETE", ["os-volume_attachments", volume]:
                return self._detach(server, volume)
        return _refusal(404, "itemNotFound", "The resource could not be found.")

    def _attachments(self, server: str) -> list[dict[str, Any]]:
        return [
            {"id": volume["id"], "volumeId": volume["id"], "serverId": server, "device": "/dev/vdb"}
            for volume in self.cinder.volumes.values()
            for each in volume["attachments"]
            if each["server_id"] == server
        ]

    def _attach(self, server: str, identifier: str) -> Answer:
        volume = self.cinder.volumes.get(identifier)
        if volume is None:
            return _refusal(404, "itemNotFound", f"Volume {identifier} could not be found.")
        if volume["status"] != "available":
            return _refusal(
                400,
                "badRequest",
                f"Invalid input received: Invalid volume: status is {volume['status']}",
            )
        volume["status"] = "attaching"

        def finish() -> None:
            volume["status"] = "in-use"
            volume["attachments"] = [
                {"server_id": server, "volume_id": identifier, "device": "/dev/vdb"}
            ]
            if not self.hides_devices:
                self.device(identifier).symlink_to(self._target(identifier))

        self.cinder.later(finish)
        answer = {
            "id": identifier,
            "volumeId": identifier,
            "serverId": server,
            "device": "/dev/vdb",
        }
        return 200, {"volumeAttachment": answer}

    def _detach(self, server: str, identifier: str) -> Answer:
        volume = self.cinder.volumes.get(identifier)
        if volume is None or not any(each["server_id"] == server for each in volume["attachments"]):
            return _refusal(404, "itemNotFound", f"{identifier} is not attached.")
        if volume["status"] != "in-use":
            return _refusal(400, "badRequest", f"Invalid volume: status is {volume['status']}")
        volume["status"] = "detaching"

        def finish() -> None:
            volume["status"] = "available"
            volume["attachments"] = []
            self.device(identifier).unlink(missing_ok=True)
            loop = self._loops.pop(identifier, None)
            if loop is not None:
                subprocess.run(["losetup", "--detach", loop], check=True)

        self.cinder.later(finish)
        return 202, None

    def _target(self, identifier: str) -> str:
        path = self.cinder.path(identifier)
        if not self.use_loop:
            return str(path)
        made = subprocess.run(
            ["losetup", "--find", "--show", str(path)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self._loops[identifier] = made.stdout.strip()
        return self._loops[identifier]

    def release(self) -> None:
        """Detach every loop device."""
        for loop in self._loops.values():
            subprocess.run(["losetup", "--detach", loop], check=False)
        self._loops.clear()
        for link in self.devices.iterdir():
            link.unlink()


def _server(identifier: str) -> dict[str, Any]:
    name, status = SERVERS[identifier]
    return {"id": identifier, "name": name, "status": status}


def _refusal(status: int, kind: str, message: str) -> Answer:
    return status, {kind: {"code": status, "message": message}}


def _versions(request: Request) -> Answer:
    version = {
        "id": "v2.1",
        "status": "CURRENT",
        "version": "2.95",
        "min_version": "2.1",
        "updated": "2013-07-23T11:33:21Z",
        "links": [{"rel": "self", "href": f"http://{request.headers['Host']}/v2.1/"}],
    }
    if request.path == "/":
        return 200, {"versions": [version]}
    return 200, {"version": version}
