"""The real etcd-server for the time of a test: one member or three, each of which can be killed, paused and restarted.

With `tls` clients need a certificate of the test's own CA, with `user` a password too, and may touch nothing but the
keys below `PREFIX`.  `prefix` is the beginning of every command, so that members run, and are asked, in another network
namespace (tests/cluster/hosts.py).
"""

from __future__ import annotations

import base64
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
PREFIX = "/safefs/"  # what the user of an etcd with passwords may read and write
USER, PASSWORD, ROOT_PASSWORD = "node", "a pass: word", "root's"
TOKEN_SECONDS = 1  # how long a signing-in lasts when it is not used


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Certificates:
    """A CA, and keys with certificates of it, for members (`server`) and for their clients (`client`)."""

    directory: Path

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    def pair(self, who: str) -> tuple[Path, Path]:
        return self.directory / f"{who}.crt", self.directory / f"{who}.key"

    @classmethod
    def make(cls, directory: Path, address: str) -> Certificates:
        directory.mkdir()
        made = cls(directory)
        certificate, key = made.pair("ca")
        new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        new += ["-days", "2"]
        _run([*new, "-subj", "/CN=test CA", "-keyout", key, "-out", certificate])
        # etcd's gateway is a client of its own member, by the member's certificate.
        uses = {"server": "serverAuth,clientAuth", "client": "clientAuth"}
        for who, use in uses.items():
            mine, my_key = made.pair(who)
            more = ["-addext", f"subjectAltName=IP:{address}", "-addext", f"extendedKeyUsage={use}"]
            more += ["-addext", "basicConstraints=critical,CA:FALSE"]
            signer = ["-CA", certificate, "-CAkey", key]
            _run([*new, *signer, *more, "-subj", "/O=test", "-keyout", my_key, "-out", mine])
        return made


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, check=False, timeout=START_SECONDS)
    assert done.returncode == 0, done.stderr.decode()


@dataclass
class Member:
    """One member of a cluster; `command` starts it, again after a kill with all that it knew."""

    url: str
    command: list[str]
    curl: list[str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(START_SECONDS)

    def pause(self) -> None:
        """It takes connections and does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def ask(self, path: str, body: dict[str, Any] | None = None, token: str = "") -> dict[str, Any]:
        """An answer of the gateway; OSError while there is none, or where it is a refusal."""
        header = ["-H", f"Authorization: {token}"] if token else []
        question = ["--data", json.dumps(body or {}), self.url + path]
        done = subprocess.run([*self.curl, *header, *question], capture_output=True, check=False, timeout=10)
        if done.returncode:
            raise OSError(done.stderr.decode() or f"curl: {done.returncode}")
        return dict(json.loads(done.stdout))

    def leads(self) -> bool:
        try:
            status = self.ask("/v3/maintenance/status")
        except OSError:
            return False
        return status.get("leader") == status["header"]["member_id"]


@dataclass
class Etcd:
    """A cluster of members."""

    members: list[Member]
    certificates: Certificates | None = None
    password_file: Path | None = None

    @property
    def endpoints(self) -> str:
        return ",".join(member.url for member in self.members)

    @property
    def options(self) -> str:
        """For mount -o."""
        options = [f"locks=etcd://{self.endpoints}"]
        if self.certificates is not None:
            certificate, key = self.certificates.pair("client")
            options += [f"etcd_ca={self.certificates.ca}", f"etcd_cert={certificate}", f"etcd_key={key}"]
        if self.password_file is not None:
            options += [f"etcd_user={USER}", f"etcd_password_file={self.password_file}"]
        return ",".join(options)

    def leader(self) -> Member:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for member in self.members:
                if member.process.poll() is None and member.leads():
                    return member
            time.sleep(0.05)
        raise AssertionError("no member of etcd leads")

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def forget(self) -> None:
        """A single member starts again, without what it knew."""
        (member,) = self.members
        member.kill()
        shutil.rmtree(member.command[member.command.index("--data-dir") + 1])
        member.start()
        self.leader()

    def restart(self) -> None:
        """Members that were killed start again, with what they knew."""
        for member in self.members:
            if member.process.poll() is not None:
                member.start()

    def require_passwords(self, directory: Path) -> None:
        """From now on nobody is answered without; the user may touch what is below PREFIX."""
        self.password_file = directory / "password"
        self.password_file.write_text(PASSWORD + "\n")
        ask = self.members[0].ask
        key, end = (base64.b64encode(text.encode()).decode() for text in (PREFIX, PREFIX[:-1] + "0"))
        ask("/v3/auth/role/add", {"name": USER})
        ask("/v3/auth/role/grant", {"name": USER, "perm": {"permType": "READWRITE", "key": key, "range_end": end}})
        for user, role, password in (("root", "root", ROOT_PASSWORD), (USER, USER, PASSWORD)):
            ask("/v3/auth/user/add", {"name": user, "password": password})
            ask("/v3/auth/user/grant", {"user": user, "role": role})
        ask("/v3/auth/enable")


@contextmanager
def etcd(
    directory: Path,
    count: int = 1,
    *,
    tls: bool = False,
    user: bool = False,
    address: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    more: Sequence[str] = (),
) -> Iterator[Etcd]:
    """A cluster that answers, its members with `more` options; it is gone at the end."""
    certificates = Certificates.make(directory / "tls", address) if tls else None
    scheme = "https" if tls else "http"
    curl = [*prefix, "curl", "--silent", "--show-error", "--fail", "--max-time", "5"]
    if certificates is not None:
        certificate, key = map(str, certificates.pair("client"))
        curl += ["--cacert", str(certificates.ca), "--cert", certificate, "--key", key]
    peers = {f"m{number}": f"http://127.0.0.1:{free_port()}" for number in range(count)}
    members: list[Member] = []
    try:
        for name in peers:
            url = f"{scheme}://{address}:{free_port()}"
            command = [*prefix, *_command(directory, name, url, peers, certificates), *more]
            members.append(Member(url, command, curl))
        cluster = Etcd(members, certificates)
        cluster.leader()
        if user:
            cluster.require_passwords(directory)
        yield cluster
    finally:
        for member in members:
            member.kill()


def _command(
    directory: Path, name: str, url: str, peers: dict[str, str], certificates: Certificates | None
) -> list[str]:
    command = ["etcd", "--name", name, "--data-dir", str(directory / name), "--logger", "zap"]
    command += ["--listen-client-urls", url, "--advertise-client-urls", url]
    command += ["--listen-peer-urls", peers[name], "--initial-advertise-peer-urls", peers[name]]
    command += ["--initial-cluster", ",".join(f"{member}={where}" for member, where in peers.items())]
    command += ["--initial-cluster-state", "new", "--log-outputs", str(directory / f"{name}.log")]
    command += ["--auth-token-ttl", str(TOKEN_SECONDS)]
    if certificates is not None:
        certificate, key = map(str, certificates.pair("server"))
        command += ["--cert-file", certificate, "--key-file", key]
        command += ["--client-cert-auth", "--trusted-ca-file", str(certificates.ca)]
    return command
