"""-oc, -op and the ``-oo`` options that say who logs in to OpenStack."""

from __future__ import annotations

from collections.abc import Mapping

from v2v_async.errors import UsageError
from v2v_async.openstack_cloud import Login
from v2v_async.options import OutputOptions
from v2v_async.output.file_disks import parse_bool
from v2v_async.output.openstack.login_options import LOGIN_HELP, SECRETS, VERIFY
from v2v_async.secret import Secret

_URL = "os-auth-url"
_PASSWORD = "os-password"
VISIBLE = (
    "a secret is in the command line, for all users of this machine to see: put the password into "
    "a file and name that with -op"
)
"""The warning where :func:`is_on_the_command_line`."""


def parse_login(options: OutputOptions, known: Mapping[str, str]) -> Login:
    """Return who logs in; ``known``: every option of the output.

    Raises:
        UsageError: an option is unknown, empty, or given twice in different ways.
    """
    settings: dict[str, str] = {}
    secrets: dict[str, Secret] = {}
    is_verified = True
    for option, value in options.options:
        if option not in known:
            names = ", ".join(f"-oo {each}" for each in known if each not in LOGIN_HELP)
            raise UsageError(
                f"-o {options.mode} has no option ‘-oo {option}’",
                hint=f"it has {names}{', ' if names else ''}and the openstack command's login "
                f"options as -oo os-…: -o {options.mode} -oo '?' lists them",
            )
        if option not in LOGIN_HELP:
            continue
        if option == VERIFY:
            is_verified = parse_bool(option, value)
        elif not value:
            raise UsageError(f"-oo {option} needs a value", hint=f"-oo {option}=VALUE")
        elif option in SECRETS:
            secrets[option] = Secret(value)
        else:
            settings[option] = value
    if options.connection is not None:
        if _URL in settings:
            raise UsageError("-oc and -oo os-auth-url say the same", hint="leave one of them out")
        if not options.connection:
            raise UsageError("-oc is empty", hint="give Keystone's address: -oc URL")
        settings[_URL] = options.connection
    if options.password is not None:
        if _PASSWORD in secrets:
            raise UsageError("-op and -oo os-password say the same", hint="leave one of them out")
        secrets[_PASSWORD] = options.password
    return Login(settings, secrets, is_verified)


def is_on_the_command_line(options: OutputOptions) -> bool:
    """Return whether a secret can be seen by all users of this machine."""
    return any(option in SECRETS for option, _ in options.options)
