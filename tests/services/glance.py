"""A real Glance under uwsgi: sqlite, images as files, tokens checked by Keystone."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.services import keystone


def configure(folder: Path, services: Path) -> None:
    """Make the database; the configuration comes with :func:`environment`."""
    folder.mkdir(parents=True)
    (folder / "images").mkdir()
    _write(folder, services, "http://127.0.0.1:1")

    def make() -> None:
        program = [str(services / "bin" / "python"), str(services / "bin" / "glance-manage")]
        subprocess.run(
            [*program, "--config-file", str(folder / "glance-api.conf"), "db_sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "manage.log").open("ab"),
        )

    keystone.once(services / "empty" / "glance.db", folder / "glance.db", make)


def environment(folder: Path, services: Path, keystone_url: str) -> dict[str, str]:
    """Write the configuration, now that Keystone has an address; return uwsgi's environment."""
    _write(folder, services, keystone_url)
    return {
        "OS_GLANCE_CONFIG_FILES": str(folder / "glance-api.conf"),
        "OS_GLANCE_CONFIG_DIR": str(folder),
    }


def _write(folder: Path, services: Path, keystone_url: str) -> None:
    (folder / "glance-api.conf").write_text(
        f"[DEFAULT]\nlog_file = {folder}/glance.log\nenabled_backends = fs:file\n"
        f"[database]\nconnection = sqlite:///{folder}/glance.db\n"
        f"[glance_store]\ndefault_backend = fs\n"
        f"[fs]\nfilesystem_store_datadir = {folder}/images\n"
        f"[paste_deploy]\nflavor = keystone\n"
        f"config_file = {services}/etc/glance/glance-api-paste.ini\n"
        f"[keystone_authtoken]\nwww_authenticate_uri = {keystone_url}\n"
        f"auth_url = {keystone_url}/v3\nauth_type = password\n"
        f"username = {keystone.USER}\npassword = {keystone.PASSWORD}\n"
        f"project_name = {keystone.PROJECT}\n"
        "user_domain_name = Default\nproject_domain_name = Default\n"
    )
