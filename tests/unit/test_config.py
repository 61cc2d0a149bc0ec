"""Settings: precedence, the options of mount(8), and one clear line for each that cannot be honoured."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safefs import config
from safefs.config import (
    MS_DIRSYNC,
    MS_NOATIME,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_RELATIME,
    MS_STRICTATIME,
    MS_SYNCHRONOUS,
    Settings,
    has_option,
    known_options,
    load_rules,
    load_settings,
    parse_options,
)
from safefs.errors import ConfigError
from safefs.model import Caller
from safefs.rules import NameClass


@pytest.fixture(autouse=True)
def no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The machine's own /etc/safefs must not decide a test."""
    path = tmp_path / "default.toml"
    monkeypatch.setattr(config, "DEFAULT_CONFIG", path)
    return path


def settings(*options: str, config: Path | None = None, privileged: bool = True) -> Settings:
    return load_settings(Path("/b"), Path("/m"), parse_options(options), config, privileged=privileged)


def refusal(*options: str, config: Path | None = None, privileged: bool = True) -> str:
    with pytest.raises(ConfigError) as raised:
        settings(*options, config=config, privileged=privileged)
    assert "\n" not in raised.value.message
    return raised.value.message


def test_defaults_of_root() -> None:
    root = settings()
    assert (root.allow_other, root.default_permissions, root.mount_flags) == (True, True, MS_NOSUID | MS_NODEV)
    assert (root.state, root.fsname, root.read_only) == (Path("/b/.safefs"), "/b", False)


def test_defaults_of_a_user() -> None:
    user = settings(privileged=False)
    assert (user.allow_other, user.default_permissions, user.mount_flags) == (False, True, MS_NOSUID | MS_NODEV)


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    loaded = load_settings(Path("link"), Path("m/../mount"), privileged=True)
    assert (loaded.backing, loaded.mountpoint) == (tmp_path / "real", tmp_path / "mount")


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("ro", MS_NOSUID | MS_NODEV | MS_RDONLY),
        ("ro,rw", MS_NOSUID | MS_NODEV),
        ("suid,dev", 0),
        ("noexec,noatime", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME),
        ("noatime,relatime", MS_NOSUID | MS_NODEV | MS_RELATIME),
        ("noatime,atime", MS_NOSUID | MS_NODEV),
        ("relatime,strictatime", MS_NOSUID | MS_NODEV | MS_STRICTATIME),
        ("sync,dirsync", MS_NOSUID | MS_NODEV | MS_SYNCHRONOUS | MS_DIRSYNC),
        ("sync,async", MS_NOSUID | MS_NODEV),
        ("defaults", MS_NOSUID | MS_NODEV),
        ("ro,noexec,defaults", MS_NOSUID | MS_NODEV),
    ],
)
def test_flags_of_mount(options: str, flags: int) -> None:
    assert settings(options).mount_flags == flags


def test_options_for_other_programs_change_nothing() -> None:
    words = "auto,noauto,user,nouser,users,owner,group,nofail,_netdev,x-systemd.automount,X-a=b,comment=c,nonempty"
    assert settings(words) == settings()


def test_values() -> None:
    loaded = settings(
        "entry_timeout=0,attr_timeout=2.5,drain_seconds=7",
        "max_threads=8,max_descriptors=1000,negative_refresh=off,temp=hidden,state=/s/../t,fsname=hf,log_level=debug",
        "log_file=/l,noallow_other,default_permissions=no,subtype=safefs",
    )
    assert (loaded.entry_timeout_seconds, loaded.attr_timeout_seconds, loaded.drain_seconds) == (0, 2.5, 7)
    assert (loaded.max_threads, loaded.max_descriptors) == (8, 1000)
    assert (loaded.negative_refresh, loaded.temp) == ("off", "hidden")
    assert (loaded.state, loaded.fsname, loaded.log_level, loaded.log_file) == (Path("/t"), "hf", "debug", Path("/l"))
    assert (loaded.allow_other, loaded.default_permissions) == (False, False)


def test_a_later_option_wins() -> None:
    assert settings("temp=hidden", "temp=tmpfile").temp == "tmpfile"


def test_a_comma_in_a_value_is_quoted() -> None:
    assert settings(r"fsname=a\,b\\c").fsname == r"a,b\c"
    assert r"fsname=a\,b\\c" in settings(r"fsname=a\,b\\c").fusermount_options()


@pytest.mark.parametrize(
    ("written", "endpoints"),
    [
        ("locks=etcd://a:2379,b:2379", "a:2379,b:2379"),
        (r"locks=etcd://a:2379\,b:2379", "a:2379,b:2379"),
        (r"locks=etcd://a:1\,b:2,c:3", "a:1,b:2,c:3"),
        ("locks=etcd://http://a:1,https://b:2,https://c", "http://a:1,https://b:2,https://c"),
        ("locks=etcd://[::1]:1,[fe80::2]:2", "[::1]:1,[fe80::2]:2"),
        ("locks=etcd://a:2379,b:abc", "a:2379,b:abc"),  # which is refused as an endpoint, not as an option
    ],
)
def test_endpoints_of_etcd_have_commas_between_them(written: str, endpoints: str) -> None:
    """As the README writes them; in fstab as well, with other options before and behind."""
    loaded = settings(f"noatime,{written},lease_seconds=9,ro")
    assert (loaded.locks, loaded.lease_seconds, loaded.read_only) == (f"etcd://{endpoints}", 9, True)


def test_no_endpoint_of_etcd() -> None:
    assert "unknown option 'b'" in refusal("locks=etcd://a:1,b")
    assert "unknown option 'b:1'" in refusal("locks=memory,b:1")
    assert "unknown option 'b:1'" in refusal("locks=etcd://a:1,ro,b:1")


ETCD = "locks=etcd://a:1"


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ("etcd_ca=/ca", "-o: option 'etcd_ca' needs locks=etcd://HOST:PORT"),
        ("locks=leasefile,etcd_prefix=/x", "-o: option 'etcd_prefix' needs locks=etcd://"),
        (f"{ETCD},etcd_key=/k", "option 'etcd_key' needs etcd_cert as well"),
        (f"{ETCD},etcd_user=u", "option 'etcd_user' needs etcd_password_file as well"),
        (f"{ETCD},etcd_password_file=/p", "option 'etcd_password_file' needs etcd_user as well"),
    ],
)
def test_how_etcd_is_reached_where_nobody_would_look_at_it(options: str, fragment: str) -> None:
    assert fragment in refusal(options)
    assert fragment in refusal(options, privileged=False)


def test_how_etcd_is_reached() -> None:
    loaded = settings(f"{ETCD},etcd_cert=/c,etcd_user=u", "etcd_key=/k,etcd_password_file=/p,etcd_prefix=/x")
    assert (loaded.etcd_cert, loaded.etcd_key, loaded.etcd_user) == (Path("/c"), Path("/k"), "u")
    assert settings(f"{ETCD},etcd_cert=/c").etcd_key is None  # one file can hold both


def test_who_overrides_etcd_overrides_how_it_is_reached(no_default_config: Path) -> None:
    no_default_config.write_text('[mount]\nlocks = "etcd://a:1"\netcd_ca = "/ca"\n')
    assert settings("locks=memory").locks == "memory"
    assert "needs locks=etcd://" in refusal("locks=memory,etcd_prefix=/x")
    no_default_config.write_text('[mount]\netcd_ca = "/ca"\n')
    assert refusal().startswith(f"{no_default_config}: option 'etcd_ca' needs")
    assert settings(ETCD).etcd_ca == Path("/ca")


def test_fusermount_options() -> None:
    user = settings("noexec,noatime,allow_other", privileged=False)
    words = "nosuid,nodev,noexec,noatime,allow_other,default_permissions,fsname=/b,subtype=safefs"
    assert user.fusermount_options() == words


@pytest.mark.parametrize(
    ("option", "fragments"),
    [
        ("noatim", ["'noatim'", "did you mean 'noatime'?"]),
        ("zzz=1", ["unknown option 'zzz'", "--help"]),
        ("allow_root", ["'allow_root'", "allow_other"]),
        ("remount", ["'remount'"]),
        ("ro=1", ["'ro' takes no value"]),
        ("noallow_other=1", ["takes no value"]),
        ("allow_other=maybe", ["'maybe'", "yes or no"]),
        ("entry_timeout", ["needs a value"]),
        ("entry_timeout=abc", ["'abc' is not a number"]),
        ("entry_timeout=nan", ["between"]),
        ("entry_timeout=-1", ["between"]),
        ("max_threads=1", ["between 4 and"]),
        ("max_threads=four", ["whole number"]),
        ("temp=disk", ["auto, tmpfile, hidden"]),
        ("state=here", ["absolute"]),
        ("service_user=no-such-user", ["'no-such-user' is no user of this host"]),
        ("service_user=4294967294", ["is no user"]),
        ("service_user=99999999999", ["is no user"]),
        ("service_user=root", ["is root", "leave it out"]),
        ("service_user=0", ["is root"]),
        ("fsname=", ["empty"]),
        ("subtype=ext4", ["safefs"]),
    ],
)
def test_refused_options(option: str, fragments: list[str]) -> None:
    message = refusal(option)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("option", ["suid", "dev", "dirsync", "strictatime", "lazytime"])
def test_options_that_need_root(option: str) -> None:
    assert f"'{option}' needs root" in refusal(option, privileged=False)
    settings(option, privileged=True)


@pytest.mark.parametrize("text", ["nobody", "65534"])
def test_a_service_user(text: str) -> None:
    groups = tuple(os.getgrouplist("nobody", 65534))
    assert settings(f"service_user={text}").service == Caller(65534, 65534, groups=groups)
    assert "'service_user' needs root" in refusal(f"service_user={text}", privileged=False)
    assert settings().service is None


def test_a_state_directory_is_looked_up_once(tmp_path: Path) -> None:
    """Where a link in its path leads to later is somebody else's affair."""
    (tmp_path / "link").symlink_to("target")
    assert settings(f"state={tmp_path}/link/state").state == tmp_path / "target" / "state"


def test_precedence(tmp_path: Path, no_default_config: Path) -> None:
    no_default_config.write_text("[mount]\ndrain_seconds = 5\nmax_threads = 9\n")
    assert (settings().drain_seconds, settings("drain_seconds=6").drain_seconds) == (5, 6)
    named = tmp_path / "named.toml"
    named.write_text("[mount]\ndrain_seconds = 8\n")
    loaded = settings(config=named)
    assert (loaded.drain_seconds, loaded.max_threads) == (8, Settings.max_threads)


def test_booleans_and_flags_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[mount]\nallow_other = false\nnoatime = true\nexec = false\nrw = false\nfsname = "x"\n')
    loaded = settings(config=path)
    assert (loaded.allow_other, loaded.fsname) == (False, "x")
    assert loaded.mount_flags == MS_NOSUID | MS_NODEV | MS_NOATIME | MS_NOEXEC | MS_RDONLY


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[mount", "not valid TOML"),
        ("[mounts]\n", "unknown table 'mounts'"),
        ("mount = 1\n", "must be a table"),
        ("[mount]\nnoatim = true\n", "did you mean 'noatime'?"),
        ("[mount]\nstate = ['a']\n", "the value of state"),
        ("[mount]\ndefaults = false\n", "defaults = false means nothing"),
        ('[[rule]]\nclass = "x"\nmatch = "a"\n', "c.toml:1: unknown class 'x'"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    message = refusal(config=path)
    assert message.startswith(str(path)) and fragment in message, message


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    assert "no such configuration file" in refusal(config=tmp_path / "missing")
    assert "cannot read" in refusal(config=tmp_path)


def test_rules_of_a_file_come_before_the_shipped_ones(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[[rule]]\nclass = "private"\nmatch = "*.log"\n')
    assert load_rules().classify(b"x.log").name_class is NameClass.SHARED
    for rules in (load_rules(path), settings(config=path).rules):
        match = rules.classify(b"x.log")
        assert (match.name_class, match.source) == (NameClass.PRIVATE, f"{path}:1")
        assert rules.classify(b"x.db").name_class is NameClass.SHARED


def test_has_option() -> None:
    options = parse_options(["ro,nonempty"])
    assert has_option(options, "nonempty") and not has_option(options, "rw")


ETCD_WHOLE = f"{ETCD},etcd_cert=/c,etcd_user=u,etcd_password_file=/p"


def test_every_known_option_can_be_named() -> None:
    values = {"temp": "auto", "negative_refresh": "on", "log_level": "info", "subtype": "safefs"}
    values |= {
        "max_descriptors": "999",
        "passthrough": "auto",
        "flush_readers": "auto",
        "verify": "storage",
        "retain": "auto",
        "quarantine_age": "1d",
        "locks": "etcd://one:2379",
    }
    for name in known_options():
        written = [name, f"{name}={values.get(name, '9')}", f"{name}=/x", f"{ETCD_WHOLE},{name}=/x"]
        assert any(accepted(option) for option in written), name


def accepted(option: str) -> bool:
    try:
        settings(option)
    except ConfigError:
        return False
    return True


@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1).filter(str.strip), min_size=1))
def test_quoting_is_undone(values: list[str]) -> None:
    quoted = ",".join("x-k=" + value.replace("\\", "\\\\").replace(",", "\\,") for value in values)
    assert [option.value for option in parse_options([quoted])] == values


@given(st.text())
def test_any_text_is_taken_or_refused(text: str) -> None:
    """Nothing but a ConfigError, and never a change without a name."""
    loaded = load_settings(Path("/b"), Path("/m"), privileged=True)
    try:
        changed = load_settings(Path("/b"), Path("/m"), parse_options([text]), privileged=True)
    except ConfigError as error:
        assert error.message
    else:
        assert replace(changed, mount_flags=loaded.mount_flags).backing == loaded.backing
