"""An oVirt engine that speaks the REST API of the real one, with a real imageio daemon behind it.

HTTPS, tokens of its single sign-on, XML, and the life of disks, image transfers, guests and jobs as
the API's documentation has it: things are made in the background and go through states that have to
be polled. A transfer has a qemu-nbd over the disk's file and a ticket in the daemon, as VDSM does
it. Every request is checked and noted; ``faults`` make one fail.
"""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from lxml import etree

from tests.services.imageio import Imageio
from tests.vcenter import make_certificate
from tests.waiting import listens, wait_until

USER, PASSWORD = "admin@internal", "s3cr€t &%+\"'"
ROOT = "/ovirt-engine"
_OVF = "{http://schemas.dmtf.org/ovf/envelope/1/}"
_NAME = re.compile(r"[\w.+-]+")


_T = TypeVar("_T")


class Fault(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass
class Disk:
    """``status`` is what is told; ``asked`` counts, since states change behind the scenes."""

    id: str
    name: str
    description: str
    format: str
    size: int
    sparse: bool
    path: Path
    status: str = "locked"
    vm: str | None = None


@dataclass
class Transfer:
    """An image transfer: the qemu-nbd and the ticket behind it."""

    id: str
    disk: str
    phase: str = "initializing"
    ticket: str = field(default_factory=lambda: str(uuid.uuid4()))
    settings: dict[str, str] = field(default_factory=dict)
    server: subprocess.Popen[bytes] | None = None


@dataclass
class Vm:
    """A guest: its name, and the OVF that it was made from."""

    id: str
    name: str
    cluster: str
    ovf: str
    disks: list[str]
    status: str = "image_locked"


class Engine:
    """A running engine; ``with Engine(folder, daemon) as engine``."""

    domain = "4e6a7b1c-0d2f-4a61-9b4e-1f0a6f7b2c11"
    center, cluster, host = "dc-1", "11aa0000-0000-0000-0000-000000000001", "host-1"

    def __init__(self, folder: Path, imageio: Imageio) -> None:
        self.folder = folder
        self.imageio = imageio
        # What it does by itself, for tests to change.
        self.serve: Callable[[Transfer], None] = self._serve
        self.advance: Callable[[], None] = self._advance
        self.certificate, self._key = make_certificate(folder, "engine")
        self.lock = threading.RLock()
        self.disks: dict[str, Disk] = {}
        self.transfers: dict[str, Transfer] = {}
        self.vms: dict[str, Vm] = {}
        self.jobs: list[dict[str, str]] = []
        self.tokens: set[str] = set()
        self.every_token: list[str] = []
        self.every_ticket: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.storage_type = "nfs"
        self.storage_status = "active"
        self.available = 100 << 30
        self.architecture = "x86_64"
        self.version = (4, 5)
        self.hw_id = ""
        self.has_forgotten_transfers = False  # as engines before 4.4.7
        self.transfer_port: int | None = None
        self.loses_answer = False
        self.listen = ("127.0.0.1", 0)
        self.faults: dict[str, Callable[[], None]] = {}
        """``METHOD path`` (ids as ``*``) to what happens instead, or before."""
        self._server: _Server | None = None

    def __enter__(self) -> Engine:
        self._server = _Server(self.listen, _Handler)
        self._server.engine = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self._key)
        self._server.context = context
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for transfer in self.transfers.values():
            self.stop(transfer)
        assert not self.problems, self.problems[0]

    @property
    def url(self) -> str:
        """Of its API."""
        assert self._server is not None
        host, port = self._server.server_address[:2]
        return f"https://{host!s}:{port}{ROOT}/api"

    def shape(self) -> dict[str, list[str]]:
        """Everything in it that a conversion could leave."""
        running = [each.id for each in self.transfers.values() if each.server is not None]
        return {
            "disks": sorted(self.disks),
            "files": sorted(path.name for path in self.folder.glob("disk-*")),
            "running": sorted(running),
            "vms": sorted(self.vms),
            "locked": sorted(each.id for each in self.disks.values() if each.status != "ok"),
        }

    # What happens in the background.

    def prepare(self, disk: Disk) -> None:
        """Make the disk's file."""
        if disk.format == "cow":
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(disk.path), str(disk.size)]
            subprocess.run(argv, check=True)
        elif disk.sparse:
            with disk.path.open("wb") as file:
                file.truncate(disk.size)
        else:
            subprocess.run(["fallocate", "-l", str(disk.size), str(disk.path)], check=True)

    def _serve(self, transfer: Transfer) -> None:
        """Serve the disk to imageio, and give it the ticket."""
        disk = self.disks[transfer.disk]
        path = self.folder / f"nbd-{transfer.id[:8]}"
        kind = "qcow2" if disk.format == "cow" else "raw"
        argv = ["qemu-nbd", "--persistent", "--shared=16", f"--socket={path}", f"--format={kind}"]
        transfer.server = subprocess.Popen(
            [*argv, "--discard=unmap", "--cache=writeback", str(disk.path)]
        )
        wait_until(lambda: listens(path), "qemu-nbd listens", of=transfer.server)
        self.every_ticket.append(transfer.ticket)
        self.imageio.add_ticket(
            {
                "uuid": transfer.ticket,
                "size": disk.size,
                "ops": ["read", "write"],
                "timeout": 300,
                "inactivity_timeout": int(transfer.settings.get("inactivity_timeout", "60")),
                "sparse": disk.sparse,
                "transfer_id": transfer.id,
                "url": f"nbd:unix:{path}",
            }
        )

    def stop(self, transfer: Transfer) -> None:
        """Take the ticket away, and end the server behind it."""
        if transfer.server is None:
            return
        self.imageio.remove_ticket(transfer.ticket)
        transfer.server.terminate()
        transfer.server.wait(20)
        transfer.server = None

    def _advance(self) -> None:
        """Let everything that is under way go one step on; each question is such a moment."""
        for disk in self.disks.values():
            busy = any(
                each.disk == disk.id and not each.phase.startswith("finished")
                for each in self.transfers.values()
            )
            if disk.status == "locked" and not busy:
                disk.status = "ok"
        for transfer in list(self.transfers.values()):
            target = self.disks.get(transfer.disk)
            if transfer.phase == "initializing":
                self.serve(transfer)
                transfer.phase = "transferring"
            elif transfer.phase == "finalizing_success":
                assert target is not None
                self.stop(transfer)
                kind = "qcow2" if target.format == "cow" else "raw"
                check = ["qemu-img", "info", "-f", kind, str(target.path)]
                subprocess.run(check, check=True, capture_output=True)
                target.status = "ok"
                transfer.phase = "finished_success"
                if self.has_forgotten_transfers:
                    del self.transfers[transfer.id]
            elif transfer.phase == "finalizing_cleanup":
                self.stop(transfer)
                if target is not None:
                    self.remove(target)
                transfer.phase = "finished_cleanup"
        for vm in self.vms.values():
            vm.status = "down"
        for job in self.jobs:
            if job["status"] == "started":
                job["status"] = "finished"

    def remove(self, disk: Disk) -> None:
        """Remove a disk and its file."""
        disk.path.unlink(missing_ok=True)
        self.disks.pop(disk.id, None)

    def image(self, disk: str, to: Path) -> bytes:
        """What a guest would read from a disk."""
        kind = "qcow2" if self.disks[disk].format == "cow" else "raw"
        argv = ["qemu-img", "convert", "-f", kind, "-O", "raw", str(self.disks[disk].path), str(to)]
        subprocess.run(argv, check=True)
        return to.read_bytes()

    def fail(self, what: str, status: int, detail: str) -> None:
        """Have one kind of request refused."""

        def refuse() -> None:
            raise Fault(status, detail)

        self.faults[what] = refuse


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    engine: Engine
    context: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the thread of the request: a handshake that never comes must not hold others up.
        request.settimeout(20)
        try:
            secured = self.context.wrap_socket(request, server_side=True)
        except OSError:
            return
        try:
            super().finish_request(secured, client_address)
        finally:
            with suppress(OSError):
                secured.shutdown(2)
            secured.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what is wrong with a request; not that a client went away."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self.engine.problems.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    @property
    def engine(self) -> Engine:
        return self.server.engine

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if path == f"{ROOT}/sso/oauth/token":
            return self._log_in(body)
        if path == f"{ROOT}/services/sso-logout":
            self.engine.tokens.discard(parse_qs(body.decode())["token"][-1])
            return self._send(200, b"{}", "application/json")
        if not path.startswith(f"{ROOT}/api"):
            return self._send(404, b"<html>no</html>", "text/html")
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.engine.tokens:
            return self._send(401, b"<html>Unauthorized</html>", "text/html")
        words = path.removeprefix(f"{ROOT}/api").strip("/").split("/")
        shown = [word if number % 2 == 0 or not word else "*" for number, word in enumerate(words)]
        what = f"{self.command} {'/'.join(shown)}"
        with self.engine.lock:
            self.engine.requests.append((self.command, path + (f"?{parts.query}" * bool(query))))
            try:
                fault = self.engine.faults.get(what)
                if fault is not None:
                    fault()
                if self.command != "GET":
                    assert self.headers["Content-Type"] == "application/xml"
                status, answer = self._route(words, query, body)
            except Fault as error:
                answer = _element("fault", {"reason": "Operation Failed"})
                answer.append(_element("detail", text=f"[{error.detail}]"))
                status = error.status
            except ConnectionAbortedError:
                self.close_connection = True
                return None
            if self.command == "GET":
                self.engine.advance()
            if self.engine.loses_answer:
                self.engine.loses_answer = False
                self.close_connection = True
                return None
        return self._send(status, etree.tostring(answer), "application/xml")

    def _log_in(self, body: bytes) -> None:
        form = {name: values[-1] for name, values in parse_qs(body.decode()).items()}
        assert form["grant_type"] == "password"
        assert form["scope"] == "ovirt-app-api"
        if (form["username"], form["password"]) != (USER, PASSWORD):
            said = (
                '{"error_code":"access_denied","error":"Cannot authenticate user: The user name or '
                'password is incorrect."}'
            )
            return self._send(401, said.encode(), "application/json")
        token = f"token-{uuid.uuid4()}"
        self.engine.tokens.add(token)
        self.engine.every_token.append(token)
        said = f'{{"access_token":"{token}","token_type":"bearer","exp":"9"}}'
        return self._send(200, said.encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _route(
        self, words: list[str], query: dict[str, str], body: bytes
    ) -> tuple[int, etree._Element]:
        search = query.get("search", "")
        document = etree.fromstring(body) if body else None
        match (self.command, *words):
            case ("GET", ""):
                return 200, self._root()
            case ("GET", "datacenters"):
                name = search.removeprefix("storage.name=")
                return 200, _list("data_centers", [self._center()] if name == "data-1" else [])
            case ("GET", "datacenters", self.engine.center, "storagedomains"):
                return 200, _list("storage_domains", [self._domain("data-1", "data")])
            case ("GET", "storagedomains"):
                found = [
                    self._domain("data-1", "data"),
                    self._domain("lonely", "data"),
                    self._domain("iso", "iso"),
                ]
                name = search.removeprefix("name=")
                found = [each for each in found if name in ("", each.findtext("name"))]
                return 200, _list("storage_domains", found)
            case ("GET", "datacenters", self.engine.center, "clusters"):
                return 200, _list("clusters", [self._cluster()])
            case ("GET", "clusters", self.engine.cluster):
                return 200, self._cluster()
            case ("GET", "hosts"):
                wanted = f'hw_id={self.engine.hw_id} and datacenter="dc 1" and status=Up'
                found = [_element("host", id=self.engine.host)] if search == wanted else []
                return 200, _list("hosts", found)
            case ("GET", "disks", id_):
                return 200, self._disk(_known(self.engine.disks, id_))
            case ("POST", "disks"):
                assert document is not None
                return 202, self._add_disk(document)
            case ("DELETE", "disks", id_):
                return 200, self._remove_disk(_known(self.engine.disks, id_))
            case ("GET", "imagetransfers"):
                found = [self._transfer(each) for each in self.engine.transfers.values()]
                return 200, _list("image_transfers", found)
            case ("POST", "imagetransfers"):
                assert document is not None
                return 201, self._add_transfer(document)
            case ("GET", "imagetransfers", id_):
                return 200, self._transfer(_known(self.engine.transfers, id_))
            case ("POST", "imagetransfers", id_, "finalize" | "cancel" as action):
                return 200, self._end(_known(self.engine.transfers, id_), action)
            case ("GET", "vms"):
                name = search.removeprefix("name=")
                found = [self._vm(each) for each in self.engine.vms.values() if each.name == name]
                return 200, _list("vms", found)
            case ("POST", "vms"):
                assert document is not None
                return 202, self._add_vm(document, query)
            case ("GET", "vms", id_):
                return 200, self._vm(_known(self.engine.vms, id_))
            case ("DELETE", "vms", id_):
                vm = _known(self.engine.vms, id_)
                assert query == {"detach_only": "true"}
                if vm.status != "down":
                    raise Fault(409, "Cannot remove VM. VM is locked.")
                for disk in vm.disks:
                    self.engine.disks[disk].vm = None
                del self.engine.vms[id_]
                return 200, _element("action", {"status": "complete"})
            case ("GET", "jobs"):
                wanted = search.removeprefix("correlation_id=")
                found = [
                    _element("job", {key: job[key] for key in ("description", "status")})
                    for job in self.engine.jobs
                    if job["correlation"] == wanted
                ]
                return 200, _list("jobs", found)
        raise Fault(404, "Entity not found")

    # What there is.

    def _root(self) -> etree._Element:
        root = _element("api")
        version = etree.SubElement(etree.SubElement(root, "product_info"), "version")
        version.append(_element("major", text=str(self.engine.version[0])))
        version.append(_element("minor", text=str(self.engine.version[1])))
        return root

    def _center(self) -> etree._Element:
        made = _element("data_center", {"name": "dc 1", "status": "up"}, id=self.engine.center)
        for rel in ("storagedomains", "clusters"):
            href = f"{ROOT}/api/datacenters/{self.engine.center}/{rel}"
            made.append(_element("link", href=href, rel=rel))
        return made

    def _domain(self, name: str, kind: str) -> etree._Element:
        made = _element(
            "storage_domain",
            {
                "name": name,
                "type": kind,
                "status": self.engine.storage_status,
                "available": str(self.engine.available),
            },
            id=self.engine.domain if name == "data-1" else str(uuid.uuid4()),
        )
        made.append(_element("storage", {"type": self.engine.storage_type}))
        return made

    def _cluster(self) -> etree._Element:
        made = _element("cluster", {"name": "Default"}, id=self.engine.cluster)
        made.append(_element("cpu", {"architecture": self.engine.architecture}))
        return made

    def _disk(self, disk: Disk) -> etree._Element:
        return _element(
            "disk",
            {
                "name": disk.name,
                "description": disk.description,
                "format": disk.format,
                "provisioned_size": str(disk.size),
                "sparse": str(disk.sparse).lower(),
                "status": disk.status,
            },
            id=disk.id,
        )

    def _transfer(self, transfer: Transfer) -> etree._Element:
        fields = {"phase": transfer.phase, "direction": "upload"}
        if transfer.phase == "transferring":
            port = self.engine.transfer_port or self.engine.imageio.port
            fields["transfer_url"] = f"https://127.0.0.1:{port}/images/{transfer.ticket}"
            fields["proxy_url"] = f"https://localhost:{port}/images/{transfer.ticket}"
        made = _element("image_transfer", fields, id=transfer.id)
        made.append(_element("disk", id=transfer.disk))
        return made

    def _vm(self, vm: Vm) -> etree._Element:
        return _element("vm", {"name": vm.name, "status": vm.status}, id=vm.id)

    # What is made.

    def _add_disk(self, document: etree._Element) -> etree._Element:
        engine = self.engine
        id_ = str(uuid.UUID(document.get("id")))
        size = int(document.findtext("provisioned_size") or "")
        sparse = document.findtext("sparse") == "true"
        format_ = document.findtext("format") or ""
        domain = document.find("storage_domains/storage_domain")
        assert domain is not None
        if engine.domain != domain.get("id") and domain.findtext("name") != "data-1":
            raise Fault(404, "Entity not found: storage domain")
        if id_ in engine.disks:
            raise Fault(409, "Cannot add Virtual Disk. A disk with this ID exists already.")
        if engine.storage_type == "iscsi" and format_ == "raw" and sparse:
            raise Fault(409, "Cannot add Virtual Disk. Disk configuration (RAW Sparse) is "
                        "incompatible with the storage domain type.")  # fmt: skip
        if size > engine.available:
            raise Fault(409, "Cannot add Virtual Disk. Low disk space on Storage Domain data-1.")
        disk = Disk(
            id_,
            document.findtext("name") or "",
            document.findtext("description") or "",
            format_,
            size,
            sparse,
            engine.folder / f"disk-{id_}",
        )
        engine.prepare(disk)
        engine.disks[id_] = disk
        return self._disk(disk)

    def _remove_disk(self, disk: Disk) -> etree._Element:
        if disk.status == "locked":
            raise Fault(409, "Cannot remove Virtual Disk. Related operation is in progress.")
        if disk.vm is not None:
            raise Fault(409, "Cannot remove Virtual Disk. It is attached to a VM.")
        self.engine.remove(disk)
        return _element("action", {"status": "complete"})

    def _add_transfer(self, document: etree._Element) -> etree._Element:
        target = document.find("disk")
        assert target is not None
        disk = _known(self.engine.disks, target.get("id") or "")
        if disk.status != "ok":
            raise Fault(409, "Cannot transfer Virtual Disk. The disk is locked.")
        settings = {each.tag: each.text or "" for each in document if each.text}
        host = document.find("host")
        if host is not None:
            settings["host"] = host.get("id") or ""
        if settings.get("direction", "upload") != "upload":
            raise Fault(400, "Only uploads are known here.")
        made = Transfer(str(uuid.uuid4()), disk.id, settings=settings)
        disk.status = "locked"
        self.engine.transfers[made.id] = made
        return self._transfer(made)

    def _end(self, transfer: Transfer, action: str) -> etree._Element:
        if transfer.phase.startswith("fin"):
            raise Fault(409, "Cannot end the transfer: it has ended.")
        transfer.phase = "finalizing_success" if action == "finalize" else "finalizing_cleanup"
        return _element("action", {"status": "complete"})

    def _add_vm(self, document: etree._Element, query: dict[str, str]) -> etree._Element:
        engine = self.engine
        cluster = document.find("cluster")
        assert cluster is not None
        if cluster.get("id") != engine.cluster:
            raise Fault(404, "Entity not found: cluster")
        assert document.findtext("initialization/configuration/type") == "ova"
        content = document.findtext("initialization/configuration/data") or ""
        ovf = etree.fromstring(content.encode())
        system = ovf.find("VirtualSystem")
        assert system is not None
        name = system.findtext("Name") or ""
        if not _NAME.fullmatch(name) or len(name) > 255:
            raise Fault(400, "Cannot import VM. Invalid VM name.")
        if any(each.name == name for each in engine.vms.values()):
            raise Fault(409, "Cannot import VM. VM name is already in use.")
        disks = [each.get(f"{_OVF}diskId") or "" for each in ovf.iterfind("DiskSection/Disk")]
        for disk in disks:
            if disk not in engine.disks or engine.disks[disk].status != "ok":
                raise Fault(409, f"Cannot import VM. Disk {disk} does not exist or is locked.")
        made = Vm(system.get(f"{_OVF}id") or "", name, engine.cluster, content, disks)
        for disk in disks:
            engine.disks[disk].vm = made.id
        engine.vms[made.id] = made
        engine.jobs.append(
            {
                "description": f"Importing VM {name}",
                "status": "started",
                "correlation": query["correlation_id"],
            }
        )
        return self._vm(made)


def _known(things: dict[str, _T], id_: str) -> _T:
    if id_ not in things:
        raise Fault(404, "Entity not found")
    return things[id_]


def _element(
    tag: str, fields: dict[str, str] | None = None, *, text: str | None = None, **attributes: str
) -> etree._Element:
    made = etree.Element(tag, attributes)
    made.text = text
    for name, value in (fields or {}).items():
        etree.SubElement(made, name).text = value
    return made


def _list(tag: str, found: list[etree._Element]) -> etree._Element:
    made = etree.Element(tag)
    made.extend(found)
    return made


def make_folder(parent: Path, name: str) -> Path:
    """A new folder of a service."""
    folder = parent / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
