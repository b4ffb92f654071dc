"""A stand-in for Cinder that speaks its API, version 3: volumes, types, limits. Disks are files.

What takes time in Cinder takes a moment here too: a new volume is ``creating``, one that goes is
``deleting``, and whoever does not wait fails.

Source: OpenStack's Block Storage API v3 reference.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.services.front import Answer, Request

GIB = 1 << 30
MOMENT_S = 0.1
TYPES = ("fast", "slow")
MOST_VOLUMES, MOST_GIB = 20, 500


class Cinder:
    """Its volumes; ``check_token`` says whether Keystone knows a token."""

    def __init__(self, folder: Path, check_token: Callable[[str | None], bool]) -> None:
        self.folder = folder
        self.check_token = check_token
        self.volumes: dict[str, dict[str, Any]] = {}
        self.lock = threading.RLock()
        folder.mkdir(parents=True)

    def path(self, volume: str) -> Path:
        """Where a volume's content is."""
        return self.folder / volume

    def later(self, act: Callable[[], None]) -> None:
        """Do something in a moment, as the service's workers do."""

        def locked() -> None:
            with self.lock:
                act()

        timer = threading.Timer(MOMENT_S, locked)
        timer.daemon = True
        timer.start()

    def __call__(self, request: Request) -> Answer:
        """Answer a request."""
        if request.path in ("/", "/v3", "/v3/"):
            return _versions(request)
        if not self.check_token(request.headers.get("X-Auth-Token")):
            return 401, {"error": {"code": 401, "title": "Unauthorized", "message": "No token."}}
        match = re.fullmatch(r"/v3/[0-9a-f]+/(.+)", request.path)
        if match is None:
            return _refusal(404, "itemNotFound", "The resource could not be found.")
        with self.lock:
            return self._answer(request, match[1])

    def _answer(self, request: Request, path: str) -> Answer:
        words = path.split("/")
        match request.method, words:
            case "GET", ["types"]:
                return 200, {"volume_types": [{"id": str(uuid.uuid5(uuid.NAMESPACE_OID, name)),
                                               "name": name} for name in TYPES]}  # fmt: skip
            case "GET", ["limits"]:
                return 200, {"limits": {"rate": [], "absolute": self._limits()}}
            case "POST", ["volumes"]:
                return self._create(request.body["volume"])
            case "GET", ["volumes" | "volumes", "detail"] | ["volumes"]:
                return 200, {"volumes": self._found(request.query)}
        if words[0] != "volumes" or words[1] not in self.volumes:
            return _refusal(404, "itemNotFound", f"Volume {words[1:2]} could not be found.")
        volume = self.volumes[words[1]]
        match request.method, words[2:]:
            case "GET", []:
                return 200, {"volume": volume}
            case "PUT", []:
                given = request.body["volume"]
                assert set(given) <= {"name", "description", "metadata"}
                volume.update(given)
                return 200, {"volume": volume}
            case "DELETE", []:
                return self._delete(volume)
            case "POST", ["action"]:
                return self._act(volume, request.body)
            case "PUT", ["metadata"]:
                return self._set_metadata(volume, request.body["metadata"], replace=True)
            case "POST", ["metadata"]:
                return self._set_metadata(volume, request.body["metadata"], replace=False)
            case "GET", ["metadata"]:
                return 200, {"metadata": volume["metadata"]}
        return _refusal(404, "itemNotFound", "The resource could not be found.")

    def _limits(self) -> dict[str, int]:
        return {
            "maxTotalVolumes": MOST_VOLUMES,
            "totalVolumesUsed": len(self.volumes),
            "maxTotalVolumeGigabytes": MOST_GIB,
            "totalGigabytesUsed": sum(volume["size"] for volume in self.volumes.values()),
        }

    def _found(self, query: dict[str, str]) -> list[dict[str, Any]]:
        found = list(self.volumes.values())
        if "name" in query:
            found = [each for each in found if each["name"] == query["name"]]
        if "metadata" in query:
            # The API wants a Python dictionary: {'key':'value'}.
            wanted = json.loads(query["metadata"].replace("'", '"')).items()
            found = [each for each in found if wanted <= each["metadata"].items()]
        return found

    def _create(self, given: dict[str, Any]) -> Answer:
        limits = self._limits()
        if limits["totalGigabytesUsed"] + given["size"] > MOST_GIB:
            return _refusal(413, "overLimit", "VolumeSizeExceedsAvailableQuota")
        if limits["totalVolumesUsed"] >= MOST_VOLUMES:
            return _refusal(413, "overLimit", "VolumeLimitExceeded")
        if given.get("volume_type") not in (None, *TYPES):
            return _refusal(404, "itemNotFound", f"Volume type {given['volume_type']}")
        identifier = str(uuid.uuid4())
        volume = {
            "id": identifier,
            "name": given.get("name"),
            "description": given.get("description"),
            "size": given["size"],
            "status": "creating",
            "bootable": "false",
            "metadata": dict(given.get("metadata") or {}),
            "volume_type": given.get("volume_type"),
            "availability_zone": given.get("availability_zone") or "nova",
            "attachments": [],
        }
        problem = _too_long(volume)
        if problem is not None:
            return problem
        self.volumes[identifier] = volume

        def finish() -> None:
            with self.path(identifier).open("wb") as file:
                # What an earlier volume left there: a new one need not read as zeroes.
                file.write(b"\xa5" * (1 << 20))
                file.truncate(volume["size"] * GIB)
            is_broken = volume["metadata"].get("break") or "break-volume" in (volume["name"] or "")
            volume["status"] = "error" if is_broken else "available"

        self.later(finish)
        return 202, {"volume": volume}

    def _delete(self, volume: dict[str, Any]) -> Answer:
        if volume["status"] not in ("available", "error", "error_deleting"):
            return _refusal(
                400,
                "badRequest",
                "Invalid volume: Volume status must be available or error or error_restoring or "
                "error_extending or error_managing and must not be migrating, attached, belong to "
                "a group, have snapshots or be disassociated from snapshots after volume transfer.",
            )
        volume["status"] = "deleting"

        def finish() -> None:
            self.path(volume["id"]).unlink(missing_ok=True)
            del self.volumes[volume["id"]]

        self.later(finish)
        return 202, None

    def _act(self, volume: dict[str, Any], body: dict[str, Any]) -> Answer:
        if volume["status"] not in ("available", "in-use"):
            return _refusal(400, "badRequest", f"Invalid volume: it is {volume['status']}")
        [(action, given)] = body.items()
        if action == "os-set_bootable":
            volume["bootable"] = "true" if given["bootable"] else "false"
            return 200, None
        if action == "os-set_image_metadata":
            found = volume.setdefault("volume_image_metadata", {})
            found.update(given["metadata"])
            return _too_long({"metadata": found}) or (200, {"metadata": found})
        return _refusal(400, "badRequest", f"There is no such action: {action}")

    def _set_metadata(
        self, volume: dict[str, Any], given: dict[str, str], *, replace: bool
    ) -> Answer:
        new = dict(given) if replace else {**volume["metadata"], **given}
        problem = _too_long({"metadata": new})
        if problem is not None:
            return problem
        volume["metadata"] = new
        return 200, {"metadata": new}


def _too_long(volume: dict[str, Any]) -> Answer | None:
    texts = [volume.get("name"), volume.get("description")]
    for key, value in volume["metadata"].items():
        assert isinstance(value, str), f"metadata {key} is {value!r}"
        texts += [key, value]
    for text in texts:
        if text is not None and len(text) > 255:
            return _refusal(400, "badRequest", f"Invalid input: {text!r} is too long.")
    return None


def _refusal(status: int, kind: str, message: str) -> Answer:
    return status, {kind: {"code": status, "message": message}}


def _versions(request: Request) -> Answer:
    base = f"http://{request.headers['Host']}/v3/"
    version = {
        "id": "v3.0",
        "status": "CURRENT",
        "version": "3.71",
        "min_version": "3.0",
        "updated": "2023-08-31T00:00:00Z",
        "links": [{"rel": "self", "href": base}],
        "media-types": [],
    }
    return (300 if request.path == "/" else 200), {"versions": [version]}
