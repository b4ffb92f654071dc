"""The ``-oo os-*`` that ``-o glance`` and ``-o openstack`` take: those of the openstack command.

Pure data: the command line reads it before it knows which output it is.
"""

from __future__ import annotations

from v2v_async.secret import VARIABLES

SECRETS = frozenset(name.lower().replace("_", "-") for name in VARIABLES)
"""Those whose value nobody may see."""

VERIFY = "verify-server-certificate"

LOGIN_HELP = {
    VERIFY: "false: trust any certificate of the cloud's services (default: true)",
    "os-cloud": "the entry of clouds.yaml to use (OS_CLOUD)",
    "os-auth-url": "Keystone's address (OS_AUTH_URL); -oc is the same",
    "os-auth-type": "how to log in: password, token, v3applicationcredential … (OS_AUTH_TYPE)",
    "os-username": "the user's name (OS_USERNAME)",
    "os-user-id": "the user's id, in place of name and domain (OS_USER_ID)",
    "os-user-domain-name": "the domain of the user (OS_USER_DOMAIN_NAME)",
    "os-user-domain-id": "the id of the user's domain (OS_USER_DOMAIN_ID)",
    "os-password": "the password, for all users of this machine to see: better -op FILE, or "
    "OS_PASSWORD",
    "os-passcode": "a one-time password (OS_PASSCODE)",
    "os-project-name": "the project that gets the guest (OS_PROJECT_NAME)",
    "os-project-id": "the id of the project (OS_PROJECT_ID)",
    "os-project-domain-name": "the domain of the project (OS_PROJECT_DOMAIN_NAME)",
    "os-project-domain-id": "the id of the project's domain (OS_PROJECT_DOMAIN_ID)",
    "os-tenant-name": "the project, as old clouds call it (OS_TENANT_NAME)",
    "os-tenant-id": "the id of the project, as old clouds call it (OS_TENANT_ID)",
    "os-domain-name": "the domain to log in to, in place of a project (OS_DOMAIN_NAME)",
    "os-domain-id": "the id of that domain (OS_DOMAIN_ID)",
    "os-default-domain": "the domain of user and project (OS_DEFAULT_DOMAIN)",
    "os-system-scope": "all: log in to the whole cloud (OS_SYSTEM_SCOPE)",
    "os-trust-id": "the id of a trust (OS_TRUST_ID)",
    "os-token": "a token to log in with (OS_TOKEN)",
    "os-application-credential-id": "an application credential (OS_APPLICATION_CREDENTIAL_ID)",
    "os-application-credential-name": "its name, with a user (OS_APPLICATION_CREDENTIAL_NAME)",
    "os-application-credential-secret": "its secret (OS_APPLICATION_CREDENTIAL_SECRET)",
    "os-region-name": "the region (OS_REGION_NAME)",
    "os-interface": "which addresses of the catalogue: public, internal, admin (OS_INTERFACE)",
    "os-cacert": "a file with the certificates of authorities to trust (OS_CACERT)",
    "os-cert": "a file with our own certificate (OS_CERT)",
    "os-key": "a file with its key (OS_KEY)",
    "os-identity-api-version": "the version of Keystone's API (OS_IDENTITY_API_VERSION)",
}
"""Option to explanation."""

VOLUME_HELP = {
    "server-id": "the name or UUID of the server that this runs in: volumes are attached to it",
    "guest-id": "kept with each volume as its property virt_v2v_guest_id",
    "availability-zone": "where the volumes are made",
    "dev-disk-by-id": "the folder in which attached volumes appear (default: /dev/disk/by-id)",
}
"""What ``-o openstack`` takes besides."""
