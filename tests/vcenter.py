"""A vCenter for tests: HTTPS, the part of its SOAP API that libvirt asks, and ``/folder``.

libvirt's esx driver logs in at it, finds the guest and reads its VMX file: the real libvirt makes
the domain XML. Disks are read as from the real one: user and password, or the cookie of a session,
which ends when it is told to; HEAD, and GET with ``Range``. Every request is checked and noted, and
the server fails on demand.
"""

from __future__ import annotations

import base64
import itertools
import re
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from lxml import etree

USER = "user@vsphere.local"
PASSWORD = 'h:u"n\\t€r2 &<'
DATACENTER = "Data center"
DATASTORE = "store 1"
HOST = "esxi.example.com"
_VIM = "{urn:vim25}"
_XSI = "{http://www.w3.org/2001/XMLSchema-instance}"


def make_certificate(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """Return a self-signed certificate for the loopback addresses, and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        + ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-out", str(certificate)]
        + ["-keyout", str(key), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    return certificate, key


@dataclass
class Guest:
    """A virtual machine: its files are in the folder of its name on the datastore."""

    name: str
    disks: list[Path]
    moref: str = "vm-16"
    power: str = "poweredOff"
    uuid: str = "564d1f0a-7b3c-4c5e-8a5b-0123456789ab"
    disk_names: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The stems of its disks' names."""
        rest = [f"{self.name}_{n}" for n in range(1, len(self.disks))]
        return self.disk_names or [self.name, *rest]

    def vmx(self) -> str:
        """Its configuration, as VMware writes it."""
        identity = self.uuid.replace("-", "")
        pairs = [identity[i : i + 2] for i in range(0, 32, 2)]
        lines = {
            "config.version": "8",
            "virtualHW.version": "13",
            "displayName": self.name.replace("%", "%25"),
            "memsize": "1024",
            "numvcpus": "2",
            "guestOS": "debian10-64",
            "uuid.bios": " ".join(pairs[:8]) + "-" + " ".join(pairs[8:]),
            "vmci0.present": "TRUE",
            "scsi0.present": "TRUE",
            "scsi0.virtualDev": "pvscsi",
            "ethernet0.present": "TRUE",
            "ethernet0.networkName": "VM Network",
            "ethernet0.addressType": "vpx",
            "ethernet0.generatedAddress": "00:50:56:aa:bb:cc",
            "ethernet0.virtualDev": "vmxnet3",
        }
        for n, name in enumerate(self.names()):
            lines |= {
                f"scsi0:{n}.present": "TRUE",
                f"scsi0:{n}.deviceType": "scsi-hardDisk",
                f"scsi0:{n}.fileName": f"{name}.vmdk",
            }
        text = '.encoding = "UTF-8"\n'
        return text + "".join(f'{key} = "{value}"\n' for key, value in lines.items())


@dataclass(frozen=True)
class Request:
    """What was asked of ``/folder``."""

    method: str
    path: str
    span: tuple[int, int] | None
    by: str
    """``password``, ``session``, or why it was let in by nothing."""
    status: int


class Machine(Protocol):
    """What more there is to ask about the virtual machine, or to have it do."""

    def inventory(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """Properties of objects: those of the virtual machine, and of others."""
        ...

    def call(self, name: str, call: etree._Element) -> str | Fault | None:
        """Return the XML of what a call returns, or its fault; None: there is no such call."""
        ...


@dataclass(frozen=True)
class Fault:
    """A fault of the SOAP API: its type (``FileFault``) and what it says."""

    type: str
    text: str


class VCenter:
    """A running server; ``with VCenter(folder, guest) as vcenter``."""

    def __init__(self, folder: Path, guest: Guest, *, user: str = USER) -> None:
        self.guest = guest
        self.user = user
        self.password = PASSWORD
        self.certificate, self._key = make_certificate(folder)
        self.files: dict[str, Path | bytes] = {
            f"{guest.name}/{name}-flat.vmdk": disk
            for name, disk in zip(guest.names(), guest.disks, strict=True)
        }
        self.files[f"{guest.name}/{guest.name}.vmx"] = guest.vmx().encode()
        self.requests: list[Request] = []
        self.soap: list[str] = []
        self.sessions: dict[str, int] = {}
        """Cookie to how many more requests it serves."""
        self.session_lasts = 1 << 60
        self.before: Callable[[str, str], str | None] = lambda method, path: None
        """What goes wrong with a request for a file: ``503``, ``drop``, ``half``, or nothing."""
        self.machine: Machine | None = None
        """What answers for the virtual machine beyond what libvirt asks."""
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        """Listen: on the same port as before, if there was one."""
        server = _Server(("127.0.0.1", self.port), _Handler)
        server.vcenter = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self._key)
        server.context = context
        self.port = server.server_address[1]
        self.server = server
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Be gone at once, with all connections; sessions are forgotten."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.cut()  # type: ignore[attr-defined]
        self.sessions.clear()

    def __enter__(self) -> VCenter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def uri(self) -> str:
        """What -ic takes."""
        user = self.user.replace("@", "%40").replace("\\", "%5c")
        place = f"{DATACENTER}/{HOST}".replace(" ", "%20")
        return f"vpx://{user}@127.0.0.1:{self.port}/{place}?no_verify=1"

    def new_session(self) -> str:
        """Begin a session and return its cookie."""
        with self._lock:
            cookie = f'vmware_soap_session="{next(self._numbers):08x}-5e55-10f0"'
            self.sessions[cookie] = self.session_lasts
            return cookie

    def admits(self, headers: Any) -> str:
        """Return how a request was let in (``password``, ``session``), or ``refused``."""
        cookie = headers.get("Cookie")
        if cookie is not None:
            with self._lock:
                cookie = cookie.partition(";")[0].strip()  # pyvmomi sends its attributes, too
                left = self.sessions.get(cookie, 0)
                if left > 0:
                    self.sessions[cookie] = left - 1
                    return "session"
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme == "Basic" and base64.b64decode(token).decode() == f"{self.user}:{self.password}":
            return "password"
        return "refused"

    def reads(self, method: str = "GET") -> list[Request]:
        """The requests for content that were answered."""
        return [r for r in self.requests if r.method == method and r.status == 206]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False
    vcenter: VCenter
    context: ssl.SSLContext

    def __init__(self, *given: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*given)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The handshake belongs to the connection's thread: it must not hold up the others.
        try:
            secured = self.context.wrap_socket(request, server_side=True)
        except OSError:
            request.close()
            return
        self._open.add(secured)
        try:
            super().process_request_thread(secured, client_address)
        finally:
            self._open.discard(secured)

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        import socket

        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60
    # Headers and body are two writes: without this, each answer waits 40 ms for an ACK.
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """A file's headers."""
        self._file()

    def do_GET(self) -> None:
        """A file, or a part of it."""
        self._file()

    def _file(self) -> None:
        vcenter = self.server.vcenter
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        path = unquote(parts.path).removeprefix("/folder/")
        fault = vcenter.before(self.command, path)
        # A connection that was being made when the server stopped has not been cut.
        if fault == "drop" or self.server is not vcenter.server:
            self.close_connection = True
            return
        by = vcenter.admits(self.headers)
        place = {"dcPath": [DATACENTER], "dsName": [DATASTORE]}
        found = vcenter.files.get(path) if query == place else None
        size = found.stat().st_size if isinstance(found, Path) else len(found or b"")
        span = None
        if (given := self.headers.get("Range")) is not None and found is not None:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", given)
            assert match is not None, given
            span = (int(match[1]), min(int(match[2]), size - 1) + 1)
        headers: list[tuple[str, str]] = []
        start, end = span or (0, size)
        body = b""
        if fault is not None and fault.isdecimal():
            status = int(fault)
        elif by == "refused":
            status = 401
            headers.append(("WWW-Authenticate", 'Basic realm="VMware HTTP server"'))
        elif found is None or not parts.path.startswith("/folder/"):
            status = 404
        else:
            status = 200 if span is None else 206
            if self.command == "GET":
                body = _part(found, start, end)
            headers.append(("Accept-Ranges", "bytes"))
            if by == "password":
                cookie = vcenter.new_session()
                headers.append(("Set-Cookie", f"{cookie}; Path=/; HttpOnly; Secure; "))
        vcenter.requests.append(Request(self.command, path, span, by, status))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        length = end - start if status in (200, 206) else 0
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "GET":
            if fault == "half":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)

    # The SOAP API.

    def do_POST(self) -> None:
        """One call."""
        length = int(self.headers["Content-Length"])
        envelope = etree.fromstring(self.rfile.read(length))
        call = envelope[0][0]
        name = etree.QName(call).localname
        self.server.vcenter.soap.append(name)
        status, text = self._call(name, call)
        if status == 0:
            self.close_connection = True
            return
        body = (
            '<?xml version="1.0"?><soapenv:Envelope '
            'xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" '
            'xmlns:xsd="http://www.w3.org/2001/XMLSchema" '
            'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>'
            f"{text}</soapenv:Body></soapenv:Envelope>"
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        if name == "Login" and status == 200:
            cookie = self.server.vcenter.new_session()
            self.send_header("Set-Cookie", f"{cookie}; Path=/; HttpOnly; Secure; ")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _call(self, name: str, call: etree._Element) -> tuple[int, str]:
        vcenter = self.server.vcenter

        def argument(of: str) -> str:
            return call.findtext(f"{_VIM}{of}") or ""

        def fault(text: str, kind: str = "") -> tuple[int, str]:
            detail = ""
            if kind:
                of_type = f'xmlns="urn:vim25" xsi:type="{kind}"'
                detail = f"<detail><{kind}Fault {of_type}/></detail>"
            return 500, (
                "<soapenv:Fault><faultcode>ServerFaultCode</faultcode>"
                f"<faultstring>{escape(text)}</faultstring>{detail}</soapenv:Fault>"
            )

        def answer(*values: str, of: str = "") -> tuple[int, str]:
            kind = f' xsi:type="{of}"' if of else ""
            values_ = "".join(f"<returnval{kind}>{value}</returnval>" for value in values)
            return 200, f'<{name}Response xmlns="urn:vim25">{values_}</{name}Response>'

        if name not in ("RetrieveServiceContent", "Login") and vcenter.admits(self.headers) != (
            "session"
        ):
            return fault("The session is not authenticated.")
        match name:
            case "RetrieveServiceContent":
                return answer(_SERVICE)
            case "Login":
                given = (argument("userName"), argument("password"))
                if given != (vcenter.user, vcenter.password):
                    return fault(
                        "Cannot complete login due to an incorrect user name or password.",
                        "InvalidLogin",
                    )
                return answer(_SESSION.format(user=escape(vcenter.user)))
            case "Logout":
                return answer()
            case "SessionIsActive":
                return answer("true")
            case "FindByUuid":
                moref = vcenter.guest.moref
                return 200, (
                    f'<{name}Response xmlns="urn:vim25"><returnval type="VirtualMachine">{moref}'
                    f"</returnval></{name}Response>"
                )
            case "RetrieveProperties":
                inventory = _inventory(vcenter.guest)
                if vcenter.machine is not None:
                    for ref, properties in vcenter.machine.inventory().items():
                        there = inventory.get(ref)
                        inventory[ref] = properties if there is None else {**there, **properties}
                try:
                    return answer(*_retrieve(inventory, call))
                except KeyError:
                    return fault("The object has been deleted.", "ManagedObjectNotFound")
        told = None if vcenter.machine is None else vcenter.machine.call(name, call)
        if isinstance(told, Fault):
            return fault(told.text, told.type)
        if told == "drop":
            return 0, ""
        if told is not None:
            return 200, f'<{name}Response xmlns="urn:vim25">{told}</{name}Response>'
        return fault(f"{name} is not known here")


def _part(file: Path | bytes, start: int, end: int) -> bytes:
    if isinstance(file, bytes):
        return file[start:end]
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(end - start)


_SERVICE = """
<rootFolder type="Folder">group-d1</rootFolder>
<propertyCollector type="PropertyCollector">propertyCollector</propertyCollector>
<about><name>VMware vCenter Server</name><fullName>VMware vCenter Server 6.7.0</fullName>
<vendor>VMware, Inc.</vendor><version>6.7.0</version><build>1</build><osType>linux-x64</osType>
<productLineId>vpx</productLineId><apiType>VirtualCenter</apiType><apiVersion>6.7</apiVersion>
</about>
<sessionManager type="SessionManager">SessionManager</sessionManager>
<searchIndex type="SearchIndex">SearchIndex</searchIndex>
""".replace("\n", "")
_NOW = "2024-01-01T00:00:00Z"
_SESSION = (
    "<key>52a01262</key><userName>{user}</userName><fullName>{user}</fullName>"
    f"<loginTime>{_NOW}</loginTime><lastActiveTime>{_NOW}</lastActiveTime>"
    "<locale>en</locale><messageLocale>en</messageLocale>"
)
_Inventory = dict[tuple[str, str], Mapping[str, Any]]


@dataclass(frozen=True)
class _Ref:
    type: str
    id: str


def _inventory(guest: Guest) -> _Inventory:
    """Every object with its properties; a list of references is what a traversal follows."""
    datacenter, compute = _Ref("Datacenter", "datacenter-2"), _Ref("ComputeResource", "domain-s7")
    host, vm = _Ref("HostSystem", "host-9"), _Ref("VirtualMachine", guest.moref)
    store = _Ref("Datastore", "datastore-10")
    hosts, vms = _Ref("Folder", "group-h4"), _Ref("Folder", "group-v3")
    made: dict[_Ref, dict[str, Any]] = {
        _Ref("Folder", "group-d1"): {"name": "Datacenters", "childEntity": [datacenter]},
        datacenter: {"name": DATACENTER, "hostFolder": hosts, "vmFolder": vms},
        hosts: {"name": "host", "childEntity": [compute]},
        vms: {"name": "vm", "childEntity": [vm]},
        compute: {
            "name": HOST,
            "host": [host],
            "resourcePool": _Ref("ResourcePool", "resgroup-8"),
            "parent": hosts,
        },
        host: {
            "name": HOST,
            "parent": compute,
            "vm": [vm],
            "datastore": [store],
            "hardware.systemInfo.uuid": "00000000-0000-0000-0000-0000000000aa",
            "hardware.cpuFeature": _LONG_MODE,
            "capability.maxSupportedVcpus": 8,
        },
        store: {"summary.name": DATASTORE},
        _Ref("SessionManager", "SessionManager"): {
            "currentSession": ("UserSession", _SESSION.format(user="user")),
        },
        vm: {
            "name": guest.name.replace("%", "%25").replace("/", "%2f"),
            "configStatus": ("ManagedEntityStatus", "green"),
            "config.uuid": guest.uuid,
            "runtime.powerState": ("VirtualMachinePowerState", guest.power),
            "config.files.vmPathName": f"[{DATASTORE}] {guest.name}/{guest.name}.vmx",
        },
    }
    return {(ref.type, ref.id): properties for ref, properties in made.items()}


# CPUID leaf 0x80000001; bit 29 of edx is long mode.
_LONG_MODE = (
    "ArrayOfHostCpuIdInfo",
    '<HostCpuIdInfo xsi:type="HostCpuIdInfo"><level>-2147483647</level>'
    + "".join(f"<{r}>{':'.join(['0000'] * 8)}</{r}>" for r in ("eax", "ebx", "ecx"))
    + "<edx>0010:0000:0000:0000:0000:0000:0000:0000</edx></HostCpuIdInfo>",
)


def _retrieve(inventory: _Inventory, call: etree._Element) -> Iterator[str]:
    """What a property collector finds: the object, or those that a traversal leads to."""
    for spec in call.iter(f"{_VIM}specSet"):
        kind = spec.findtext(f"{_VIM}propSet/{_VIM}type") or ""
        wanted = [node.text or "" for node in spec.iterfind(f"{_VIM}propSet/{_VIM}pathSet")]
        for node in spec.iterfind(f"{_VIM}objectSet"):
            obj = node.find(f"{_VIM}obj")
            assert obj is not None
            start = _Ref(obj.get("type") or "", obj.text or "")
            path = node.findtext(f"{_VIM}selectSet/{_VIM}path")
            found = [start]
            if path is not None:
                there = inventory[start.type, start.id].get(path, [])
                found = there if isinstance(there, list) else [there]
            for ref in found:
                if ref.type == kind:
                    yield _object(ref, inventory[ref.type, ref.id], wanted)


def _object(ref: _Ref, properties: Mapping[str, Any], wanted: list[str]) -> str:
    told = "".join(
        f"<propSet><name>{name}</name>{_value(properties[name])}</propSet>"
        for name in wanted
        if name in properties
    )
    return f'<obj type="{ref.type}">{ref.id}</obj>{told}'


def _value(value: Any) -> str:
    match value:
        case _Ref():
            return f'<val xsi:type="ManagedObjectReference" type="{value.type}">{value.id}</val>'
        case list():
            inner = "".join(
                f'<ManagedObjectReference type="{ref.type}" xsi:type="ManagedObjectReference">'
                f"{ref.id}</ManagedObjectReference>"
                for ref in value
            )
            return f'<val xsi:type="ArrayOfManagedObjectReference">{inner}</val>'
        case int():
            return f'<val xsi:type="xsd:int">{value}</val>'
        case (kind, text):
            return f'<val xsi:type="{kind}">{text}</val>'
    return f'<val xsi:type="xsd:string">{escape(value)}</val>'


@contextmanager
def running(folder: Path, guest: Guest) -> Iterator[VCenter]:
    """Have a vCenter for a block."""
    with VCenter(folder, guest) as vcenter:
        yield vcenter
