"""Which lock backend a mount has, by its options."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safefs.cluster.backend import Act, Admit, HasDied, LockBackend, ProcessIdentity, plainly
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
    admit: Admit | None = None,
) -> LockBackend | None:
    """What is shared with other nodes; None for a mount that shares nothing.

    `directory` is where lease files go, in a state directory that is there, and `cluster` what all nodes on the backing
    directory call themselves together; `uses` and `act` are for lease files (leasefile.Site), `admit` is
    for etcd.
    """
    terms = Terms(settings.lease_seconds)
    if settings.locks == "memory" or settings.read_only:
        return None
    if settings.locks.startswith(ETCD_SCHEME):
        from safefs.cluster.etcd import EtcdBackend

        prefix = etcd_prefix(settings, cluster)
        return EtcdBackend(etcd_access(settings), prefix, terms, identity, has_died, admit)
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
    has_tls = any(endpoint.tls for endpoint in endpoints)
    if scheme == "https://" and not has_tls:
        raise SafefsError("-o locks: etcd_ca and etcd_cert need an endpoint that is not http://", errno.EINVAL)
    tls = _tls(settings.etcd_ca, settings.etcd_cert, settings.etcd_key) if has_tls else None
    return Access(endpoints, tls, settings.etcd_user, _password(settings.etcd_password_file))


def _password(path: Path | None) -> str:
    try:
        return _read("etcd_password_file", path).decode("utf-8").strip() if path else ""
    except UnicodeDecodeError:
        raise _unusable("etcd_password_file", path, "is not text (UTF-8)") from None


def _tls(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """What is wrong is found out file by file: OpenSSL names none."""
    context = _trusting("etcd_ca", ca) if ca else ssl.create_default_context()
    if certificate is None:
        return context
    _trusting("etcd_cert", certificate)
    holder = "etcd_key" if key else "etcd_cert"
    _read(holder, key or certificate)
    try:
        context.load_cert_chain(certificate, key, password="")  # nobody is asked for one
    except ssl.SSLError as error:
        why = "holds no private key (PEM, without a password)"
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"holds the key of another certificate than {certificate}"
        elif key is None:
            why += ": name the file that does with etcd_key"
        raise _unusable(holder, key or certificate, why) from None
    return context


def _unusable(option: str, path: Path | None, why: str) -> SafefsError:
    return SafefsError(f"-o {option}={path}: {why}", errno.EINVAL)


def _trusting(option: str, path: Path) -> ssl.SSLContext:
    """With the certificates of a file."""
    _read(option, path)
    try:
        return ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise _unusable(option, path, "holds no certificate (PEM)") from None


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SafefsError(f"-o {option}={path}: {error.strerror}", error.errno or errno.EACCES) from None
