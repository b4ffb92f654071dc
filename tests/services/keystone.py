"""A real Keystone under uwsgi: sqlite, Fernet tokens, an administrator."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

# Of this process only: tests look for it in the command lines of all.
PASSWORD = f"s3cret-{secrets.token_hex(6)}"
USER = PROJECT = "admin"
REGION = "test"


def configure(folder: Path, services: Path) -> dict[str, str]:
    """Make the database and the configuration below ``folder``; return uwsgi's environment."""
    keys = folder / "fernet"
    keys.mkdir(parents=True, mode=0o700)
    for name in ("0", "1"):
        (keys / name).write_bytes(base64.urlsafe_b64encode(os.urandom(32)))
    configuration = folder / "keystone.conf"
    configuration.write_text(
        f"[DEFAULT]\nlog_file = {folder}/keystone.log\n"
        f"[database]\nconnection = sqlite:///{folder}/keystone.db\n"
        f"[fernet_tokens]\nkey_repository = {keys}\n"
        f"[fernet_receipts]\nkey_repository = {keys}\n"
        f"[credential]\nkey_repository = {keys}\n"
        "[identity]\npassword_hash_rounds = 4\n"
    )
    once(
        services / "empty" / "keystone.db",
        folder / "keystone.db",
        lambda: _manage(folder, services, "db_sync"),
    )
    return {"OS_KEYSTONE_CONFIG_FILES": str(configuration)}


def once(kept: Path, database: Path, make: Callable[[], None]) -> None:
    """Copy an empty database that was made once; making it takes seconds."""
    if not kept.exists():
        make()
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
        shutil.copyfile(database, temporary)
        temporary.replace(kept)
        return
    shutil.copyfile(kept, database)


def bootstrap(folder: Path, services: Path, url: str, internal_url: str) -> None:
    """Make the administrator, and the catalogue's entry of Keystone itself."""
    _manage(
        folder,
        services,
        "bootstrap",
        *("--bootstrap-password", PASSWORD),
        *("--bootstrap-public-url", f"{url}/v3"),
        # What Glance asks.
        *("--bootstrap-internal-url", f"{internal_url}/v3"),
        *("--bootstrap-region-id", REGION),
    )


def environment(url: str) -> Mapping[str, str]:
    """Return what an rc file of this cloud would set, but for the password."""
    return {
        "OS_AUTH_URL": f"{url}/v3",
        "OS_USERNAME": USER,
        "OS_PROJECT_NAME": PROJECT,
        "OS_USER_DOMAIN_NAME": "Default",
        "OS_PROJECT_DOMAIN_NAME": "Default",
        "OS_REGION_NAME": REGION,
        "OS_IDENTITY_API_VERSION": "3",
    }


def _manage(folder: Path, services: Path, *words: str) -> None:
    program = [str(services / "bin" / "python"), str(services / "bin" / "keystone-manage")]
    subprocess.run(
        [*program, "--config-file", str(folder / "keystone.conf"), *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "manage.log").open("ab"),
    )
