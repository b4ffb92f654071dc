"""An OpenStack cloud: who logs in, and requests to its services. The only importer of openstack.

openstacksdk reads ``clouds.yaml`` and the OS_* environment, logs in, finds the services in the
catalogue and gets new tokens; the requests themselves are those of the services' REST APIs, which
change less than the library's classes do. Everything in it blocks, so that it runs in threads.

A change (POST, PUT, PATCH, DELETE) is waited for even when the task is cancelled: whoever cleans up
has to know how it ended. ``TIMEOUT_S`` bounds that. An upload ends at once.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio

from v2v_async.errors import DependencyError, TargetError, UsageError
from v2v_async.openstack_answers import LONGEST, hint_for, reason
from v2v_async.openstack_body import Body
from v2v_async.secret import Secret
from v2v_async.unwaited import run_unwaited

TIMEOUT_S = 60.0
"""For each answer; the services pass requests on to others and are slow on a busy day."""

_UPLOAD_TIMEOUT_S = 600.0  # a store may write for minutes before Glance says that it has the image
_PROGRESS_S = 0.5

_T = TypeVar("_T")
Service = Literal["image", "block-storage", "compute"]
_SERVICES: Mapping[Service, tuple[str, str]] = {
    "image": ("Glance", "2"),
    "block-storage": ("Cinder", "3"),
    "compute": ("Nova", "2"),
}
"""What each is called, and the version of its API."""


@dataclass(frozen=True, slots=True)
class Login:
    """Who logs in, where that is not left to the environment and ``clouds.yaml``.

    ``settings`` and ``secrets`` are by name, as ``os-username`` and ``os-password``.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    is_verified: bool = True

    def command(self, *words: str) -> str:
        """Return the ``openstack`` command of the same login, without its secrets, for people."""
        options = [f"--{name}={value}" for name, value in self.settings.items()]
        if not self.is_verified:
            options.append("--insecure")
        return shlex.join(["openstack", *options, *words])


class CloudError(TargetError):
    """A request failed. ``status`` is HTTP's; None where there was no answer at all."""

    def __init__(self, message: str, *, status: int | None = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.status = status


class Cloud:
    """A login, made by :func:`connected`."""

    def __init__(self, region: Any, login: Login) -> None:
        self._region = region
        self._login = login
        self._clients: dict[Service, Any] = {}
        self._is_closed = False

    def close(self) -> None:
        """Close the connections that are idle; a call that was given up closes its own."""
        self._is_closed = True
        session = self._region.get_session().session
        for adapter in session.adapters.values():
            # urllib3 2 forgets its pools without closing them; an error may hold one for long.
            pools = adapter.poolmanager.pools
            for pool in [pools.get(key) for key in pools.keys()]:  # noqa: SIM118 - no mapping
                if pool is not None:
                    pool.close()
        session.close()

    @property
    def region(self) -> str:
        """The region's name; empty where the cloud has only one."""
        return str(self._region.get_region_name() or "")

    async def log_in(self) -> None:
        """Get a token.

        Raises:
            CloudError, UsageError: there is none for us.
        """
        await run_unwaited(self._log_in, "openstack")

    async def call(
        self,
        service: Service,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        parameters: Mapping[str, str] | None = None,
        is_given_up: bool = False,
    ) -> dict[str, Any]:
        """Send a request and return the JSON of its answer (empty where there is none).

        ``is_given_up``: a change is not waited for when the task is cancelled.

        Raises:
            CloudError: it failed; ``status`` says how.
        """
        job = partial(self._call, service, method, path, body, parameters)
        if method == "GET" or is_given_up:
            return await run_unwaited(job, "openstack")
        with anyio.CancelScope(shield=True):
            answer = await run_unwaited(job, "openstack")
        return answer  # noqa: RET504 - mypy takes a scope for something that may swallow errors

    async def pages(
        self, service: Service, path: str, key: str, parameters: Mapping[str, str]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the entries of a list, page by page, by their ``id`` as marker.

        Raises:
            CloudError
        """
        marker: dict[str, str] = {}
        while True:
            answer = await self.call(service, "GET", path, parameters={**parameters, **marker})
            entries = answer.get(key, [])
            for entry in entries:
                yield entry
            has_more = answer.get("next") or answer.get(f"{key}_links")
            if not entries or not has_more:
                return
            marker = {"marker": entries[-1]["id"]}

    async def upload(
        self, service: Service, path: str, file: Path, on_progress: Callable[[int], None]
    ) -> str:
        """PUT the content of ``file``; return its SHA-512 in hexadecimal.

        ``on_progress`` gets the bytes sent so far, now and then, in this task. When the task is
        cancelled, no more is sent and the connection is closed, without waiting for it.

        Raises:
            CloudError: it failed.
            OSError: the file can't be read.
        """
        body = Body(file)

        async def tell() -> None:
            while True:
                await anyio.sleep(_PROGRESS_S)
                on_progress(body.sent)

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(tell)
                await run_unwaited(partial(self._upload, service, path, body), "openstack")
                tasks.cancel_scope.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            body.is_stopped.set()
        on_progress(body.sent)
        return body.digest.hexdigest()

    # In threads.

    def _log_in(self) -> None:
        with self._explained("Keystone"):
            self._region.get_session().get_token()

    def _call(
        self,
        service: Service,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        parameters: Mapping[str, str] | None,
    ) -> dict[str, Any]:
        name = _SERVICES[service][0]
        given: dict[str, Any] = {"timeout": TIMEOUT_S}
        if body is not None:
            given["json"] = body
        if parameters:
            given["params"] = parameters
        # Only what changes nothing may be sent again by itself.
        given["connect_retries"] = 2 if method == "GET" else 0
        with self._explained(name):
            response = self._client(service).request(path, method, raise_exc=False, **given)
            self._raise_refusal(name, method, response)
            try:
                answer = response.json() if response.content else {}
            except ValueError:
                answer = {}
        return answer if isinstance(answer, dict) else {}

    def _upload(self, service: Service, path: str, body: Body) -> None:
        name = _SERVICES[service][0]
        with self._explained(name):
            response = self._client(service).request(
                path,
                "PUT",
                raise_exc=False,
                connect_retries=0,
                timeout=_UPLOAD_TIMEOUT_S,
                data=body,
                headers={"Content-Type": "application/octet-stream"},
            )
            self._raise_refusal(name, "PUT", response)

    def _client(self, service: Service) -> Any:
        from keystoneauth1.adapter import Adapter

        if service not in self._clients:
            version, region = _SERVICES[service][1], self._region
            self._clients[service] = Adapter(
                session=region.get_session(),
                service_type=region.get_service_type(service),
                service_name=region.get_service_name(service),
                interface=region.get_interface(service),
                region_name=region.get_region_name(service),
                endpoint_override=region.get_endpoint(service),
                min_version=version,
                max_version=f"{version}.latest",
            )
        return self._clients[service]

    def _raise_refusal(self, name: str, method: str, response: Any) -> None:
        if response.status_code < 400:
            return
        what = f"{name} refuses a request" if response.status_code < 500 else f"{name} failed"
        why = self._without_secrets(reason(response))
        request_id = response.headers.get("x-openstack-request-id")
        raise CloudError(
            f"{what} ({method}: {response.status_code} {response.reason}){why}",
            status=response.status_code,
            hint=hint_for(name, response.status_code, request_id),
        )

    def _without_secrets(self, text: str) -> str:
        for secret in self._login.secrets.values():
            text = text.replace(secret.reveal(), "***")
        return text

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Say what keystoneauth and openstacksdk raise as a person would."""
        import openstack.exceptions as sdk
        from keystoneauth1 import exceptions as ks

        try:
            yield
        except ks.Unauthorized as error:
            raise CloudError(
                f"Keystone does not accept the login: {self._text(error)}",
                status=401,
                hint="check the user, the password, the project and their domains: "
                f"{self._login.command('token', 'issue')}",
            ) from error
        except (ks.MissingRequiredOptions, ks.MissingAuthPlugin, ks.NoMatchingPlugin) as error:
            raise _no_login(self._text(error)) from error
        except ks.SSLError as error:
            raise CloudError(
                f"the certificate of {name} is not trusted: {self._text(error)}",
                hint="name the authority's certificate with -oo os-cacert=FILE, or trust any with "
                "-oo verify-server-certificate=false",
            ) from error
        except (ks.EndpointNotFound, ks.EmptyCatalog) as error:
            where = f" in the region ‘{self.region}’" if self.region else ""
            raise CloudError(
                f"the cloud has no {name}{where}: {self._text(error)}",
                hint=f"see what it has: {self._login.command('catalog', 'list')}",
            ) from error
        except ks.ConnectionError as error:
            raise CloudError(
                f"{name} does not answer: {self._text(error)}",
                hint="is it up, and the way to it open?",
            ) from error
        except ks.HttpError as error:
            raise CloudError(
                f"Keystone failed: {self._text(error)}",
                status=error.http_status,
                hint=hint_for("Keystone", error.http_status, error.request_id),
            ) from error
        except (ks.ClientException, sdk.SDKException) as error:
            raise CloudError(f"{name} can't be asked: {self._text(error)}") from error
        finally:
            if self._is_closed:
                self.close()

    def _text(self, error: Exception) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        return self._without_secrets(text[:LONGEST])


@asynccontextmanager
async def connected(login: Login) -> AsyncIterator[Cloud]:
    """Have a connection; nothing has been asked yet, not even for a token.

    Raises:
        DependencyError: openstacksdk is not installed.
        UsageError: there is no way to log in.
    """
    region = await run_unwaited(partial(_connect, login), "openstack")
    cloud = Cloud(region, login)
    try:
        yield cloud
    finally:
        cloud.close()


def _connect(login: Login) -> Any:
    try:
        import openstack.exceptions as sdk
        from keystoneauth1 import exceptions as ks
        from openstack.config import get_cloud_region
    except ImportError as error:
        raise DependencyError(
            f"openstacksdk is not installed: {error}",
            hint="install it: pip install 'v2v-async[openstack]', or apt-get install "
            "python3-openstacksdk",
        ) from error
    given: dict[str, Any] = {name.replace("-", "_"): v for name, v in login.settings.items()}
    given |= {name.replace("-", "_"): v.reveal() for name, v in login.secrets.items()}
    if "os_cloud" in given:
        given["cloud"] = given.pop("os_cloud")
    if not login.is_verified:
        given["verify"] = False
    try:
        region = get_cloud_region(app_name="v2v-async", **given)
        session = region.get_session()
    except (sdk.SDKException, ks.ClientException, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        for secret in login.secrets.values():
            text = text.replace(secret.reveal(), "***")
        raise _no_login(text) from error
    if session.timeout is None:
        session.timeout = TIMEOUT_S
    return region


def _no_login(why: str) -> UsageError:
    return UsageError(
        f"there is no way to log in to OpenStack: {why.rstrip('.')}",
        hint="source the cloud's rc file (OS_AUTH_URL, OS_USERNAME …), name an entry of "
        "clouds.yaml with -oo os-cloud=NAME, or give -oo os-auth-url=URL -oo os-username=USER "
        "-op FILE …",
    )
