"""Which lock backend a mount has, by its options."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safefs.cluster.backend import Act, HasDied, LockBackend, ProcessIdentity, plainly
from safefs.cluster.leasefile import LeasefileBackend, Site
from safefs.cluster.ofd import NativeBackend
from safefs.config import ETCD_SCHEME, Settings
from safefs.errors import SafefsError
from safefs.family import mounted_at
from safefs.lease import Terms
from safefs.verdict import Client

if TYPE_CHECKING:
    from safefs.cluster.etcd_client import Access


def lock_backend(
    settings: Settings,
    directory: Path,
    cluster: str,
    identity: ProcessIdentity,
    has_died: HasDied,
    uses: Callable[[], int],
    act: Act = plainly,
) -> LockBackend | None:
    """What is shared with other nodes; None for a mount that shares nothing.

    `directory` is where lease files go, in a state directory that is there, and `cluster` what all nodes on the backing
    directory call themselves together; `uses` and `act` are for lease files (leasefile.Site).
    """
    terms = Terms(settings.lease_seconds)
    if settings.locks == "memory" or settings.read_only:
        return None
    if settings.locks.startswith(ETCD_SCHEME):
        from safefs.cluster.etcd import EtcdBackend

        prefix = etcd_prefix(settings, cluster)
        return EtcdBackend(etcd_access(settings), prefix, terms, identity, has_died)
    mounted = act(mounted_at, directory.parent)
    site = Site(os.fspath(directory), terms, identity, has_died, uses, act, mounted.caches_listings)
    return NativeBackend(site, Client.here(mounted).id) if settings.locks == "native" else LeasefileBackend(site)


def shared_settings(settings: Settings, cluster: str) -> dict[str, object]:
    """What all nodes of a backing directory have to have the same, or they would not exclude each other."""
    if settings.locks == "memory" or settings.read_only:
        return {"locks": "memory"}
    if settings.locks.startswith(ETCD_SCHEME):
        locks = {"locks": "etcd", "etcd_prefix": etcd_prefix(settings, cluster)}
    else:
        locks = {"locks": "native" if settings.locks == "native" else "leasefile"}
    return {**locks, "lease_seconds": settings.lease_seconds}


def etcd_prefix(settings: Settings, cluster: str) -> str:
    return settings.etcd_prefix or f"/safefs/{cluster}"


def etcd_access(settings: Settings) -> Access:
    """How the settings say that etcd is reached.  SafefsError where a file that they name cannot be used."""
    from safefs.cluster.etcd_client import Access, Endpoint

    scheme = "https://" if settings.etcd_ca or settings.etcd_cert else "http://"
    texts = settings.locks.removeprefix(ETCD_SCHEME).split(",")
    try:
        endpoints = tuple(Endpoint.parse(text if "//" in text else scheme + text) for text in texts if text)
    except ValueError as error:
        raise SafefsError(f"-o locks: {error}", errno.EINVAL) from None
    if not endpoints:
        raise SafefsError("-o locks=etcd:// names no endpoint: write etcd://HOST:PORT", errno.EINVAL)
    tls = None
    if any(endpoint.tls for endpoint in endpoints):
        try:
            tls = ssl.create_default_context(cafile=settings.etcd_ca)
            if settings.etcd_cert is not None:
                tls.load_cert_chain(settings.etcd_cert, settings.etcd_key)
        except (OSError, ssl.SSLError) as error:
            raise SafefsError(f"the certificates for etcd cannot be used: {error}", errno.EINVAL) from None
    return Access(endpoints, tls, settings.etcd_user, _password(settings.etcd_password_file))


def _password(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SafefsError(f"{path}: {error.strerror}", error.errno or errno.EACCES) from None
