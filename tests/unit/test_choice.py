"""How etcd is reached, by the options: what cannot be used is named, with its option and what would do."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from safefs.cluster.choice import etcd_access
from safefs.config import Settings, load_settings
from safefs.errors import SafefsError
from tests.support.etcd import Certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("etcd") / "tls", "127.0.0.1")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "config.toml").touch()
    loaded = load_settings(tmp_path, tmp_path / "mnt", config=tmp_path / "config.toml", privileged=True)
    return replace(loaded, locks="etcd://a:1")


def refusal(settings: Settings) -> str:
    with pytest.raises(SafefsError) as caught:
        etcd_access(settings)
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a", "a:2379"),
        ("a:1", "a:1"),
        ("http://a:1/", "a:1"),
        ("https://a", "a:2379"),
        ("[::1]:7", "[::1]:7"),
    ],
)
def test_endpoints(settings: Settings, text: str, shown: str) -> None:
    (endpoint,) = etcd_access(replace(settings, locks=f"etcd://{text}")).endpoints
    assert str(endpoint) == shown
    assert endpoint.tls is text.startswith("https")


@pytest.mark.parametrize(
    "text",
    ["a:abc", "a:0", "a:65536", "a:-1", "ftp://a:1", "http://:1", "a:1/x", "[::1", "u:p@a:1", "a:1?x=y", "https://"],
)
def test_what_is_no_endpoint(settings: Settings, text: str) -> None:
    said = refusal(replace(settings, locks=f"etcd://b:1,{text}"))
    assert f"'{text}' is no endpoint" in said or f"{text}' is no endpoint" in said
    assert "write HOST:PORT or https://HOST:PORT" in said


def test_no_endpoint_at_all(settings: Settings) -> None:
    assert "names no endpoint: write etcd://HOST:PORT" in refusal(replace(settings, locks="etcd://"))


def test_certificates(settings: Settings, certificates: Certificates, tmp_path: Path) -> None:
    certificate, key = certificates.pair("client")
    reached = replace(settings, etcd_ca=certificates.ca, etcd_cert=certificate, etcd_key=key)
    assert etcd_access(reached).tls is not None
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    assert etcd_access(replace(reached, etcd_cert=both, etcd_key=None)).tls is not None


def test_certificates_that_cannot_be_used(settings: Settings, certificates: Certificates, tmp_path: Path) -> None:
    certificate, key = certificates.pair("client")
    good = replace(settings, etcd_ca=certificates.ca, etcd_cert=certificate, etcd_key=key)
    nonsense, locked = tmp_path / "nonsense", tmp_path / "locked.key"
    nonsense.write_bytes(b"\xff nothing")
    encrypt = ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", key, "-out", locked]
    subprocess.run(encrypt, check=True, capture_output=True, timeout=30)
    missing, other = Path("/no/such/file"), certificates.pair("server")[1]
    for field in ("etcd_ca", "etcd_cert", "etcd_key"):
        for path, why in ((missing, "No such file or directory"), (tmp_path, "Is a directory")):
            assert refusal(replace(good, **{field: path})) == f"-o {field}={path}: {why}"
        assert f"-o {field}={nonsense}: holds no " in refusal(replace(good, **{field: nonsense}))
    assert f"-o etcd_key={other}: holds the key of another certificate" in refusal(replace(good, etcd_key=other))
    assert f"-o etcd_key={locked}: holds no private key" in refusal(replace(good, etcd_key=locked))
    said = refusal(replace(good, etcd_key=None))
    assert said.startswith(f"-o etcd_cert={certificate}: holds no private key") and "etcd_key" in said


def test_certificates_that_nobody_would_look_at(settings: Settings, certificates: Certificates) -> None:
    plain = replace(settings, locks="etcd://http://a:1", etcd_ca=certificates.ca)
    assert "etcd_ca and etcd_cert need an endpoint that is not http://" in refusal(plain)


def test_passwords(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "password"
    reached = replace(settings, etcd_user="u", etcd_password_file=path)
    assert refusal(reached) == f"-o etcd_password_file={path}: No such file or directory"
    path.write_bytes(b"caf\xe9\n")
    assert refusal(reached) == f"-o etcd_password_file={path}: is not text (UTF-8)"
    path.write_text("a pass: word\n")
    assert etcd_access(reached).password == "a pass: word"
