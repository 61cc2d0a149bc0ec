"""Settings of one mount: from `-o` options, the configuration file and defaults, in that order of precedence.

Guaranteed: a `Settings` that was built here is validated, never changes, and every option that was written down
either took effect or was refused by name.  Options that speak to other programs (`auto`, `_netdev`, `x-*` …) are
accepted and do nothing, as in mount(8).  Not guaranteed: that the directories exist or that the kernel agrees; the
command line checks the former before it mounts, the mount itself the latter.
"""

from __future__ import annotations

import difflib
import os
import pwd
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safefs.errors import ConfigError
from safefs.lease import LEASE_SECONDS, LONGEST_LEASE_SECONDS
from safefs.model import STATE_NAME, Caller
from safefs.rules import Rule, RuleSet, Verify, parse_duration, parse_rules, rule_lines, shipped_rules

__all__ = ["ConfigError", "Option", "Settings", "has_option", "load_rules", "load_settings", "parse_options"]

DEFAULT_CONFIG = Path("/etc/safefs/safefs.toml")
FILESYSTEM_TYPE = "safefs"

# From linux/mount.h.
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_DIRSYNC = 0x80
MS_NOSYMFOLLOW = 0x100
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_RELATIME = 0x200000
MS_STRICTATIME = 0x1000000
MS_LAZYTIME = 0x2000000

# Option -> (flags it sets, flags it clears).
_FLAG_OPTIONS: dict[str, tuple[int, int]] = {
    "ro": (MS_RDONLY, 0),
    "rw": (0, MS_RDONLY),
    "nosuid": (MS_NOSUID, 0),
    "suid": (0, MS_NOSUID),
    "nodev": (MS_NODEV, 0),
    "dev": (0, MS_NODEV),
    "noexec": (MS_NOEXEC, 0),
    "exec": (0, MS_NOEXEC),
    "sync": (MS_SYNCHRONOUS, 0),
    "async": (0, MS_SYNCHRONOUS),
    "dirsync": (MS_DIRSYNC, 0),
    "nosymfollow": (MS_NOSYMFOLLOW, 0),
    "symfollow": (0, MS_NOSYMFOLLOW),
    "noatime": (MS_NOATIME, MS_RELATIME | MS_STRICTATIME),
    "atime": (0, MS_NOATIME),
    "nodiratime": (MS_NODIRATIME, 0),
    "diratime": (0, MS_NODIRATIME),
    "relatime": (MS_RELATIME, MS_NOATIME | MS_STRICTATIME),
    "norelatime": (0, MS_RELATIME),
    "strictatime": (MS_STRICTATIME, MS_NOATIME | MS_RELATIME),
    "nostrictatime": (0, MS_STRICTATIME),
    "lazytime": (MS_LAZYTIME, 0),
    "nolazytime": (0, MS_LAZYTIME),
    "defaults": (0, MS_RDONLY | MS_NOEXEC | MS_SYNCHRONOUS),
}

# What fusermount3 takes from an unprivileged user; the kernel's default covers relatime.
_FUSERMOUNT_FLAGS = {
    MS_RDONLY: "ro",
    MS_NOSUID: "nosuid",
    MS_NODEV: "nodev",
    MS_NOEXEC: "noexec",
    MS_SYNCHRONOUS: "sync",
    MS_NOATIME: "noatime",
    MS_NODIRATIME: "nodiratime",
    MS_NOSYMFOLLOW: "nosymfollow",
}

# They tell mount(8), systemd and fstab's readers something; a filesystem does nothing with them.
_FOREIGN_OPTIONS = frozenset(
    ("auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "silent", "loud", "nonempty")
)
_FOREIGN_PREFIXES = ("x-", "X-", "comment=", "user=")

# Known elsewhere, refused here with the reason instead of "unknown option".
_REFUSED_OPTIONS = {
    "allow_root": "safefs cannot tell root from other users at the kernel's side: use allow_other or leave it out",
    "remount": "unmount and mount again to change options",
    "bind": "safefs mounts a filesystem, not a directory: use mount --bind",
    "mand": "mandatory locks are gone from the kernel",
}

_SWITCH = ("auto", "on", "off")
_TEMP_KINDS = ("auto", "tmpfile", "hidden")
_LOCKS = ("auto", "memory", "leasefile", "native")
ETCD_SCHEME = "etcd://"
_LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Option:
    """One option as it was written, and where (for errors)."""

    name: str
    value: str | None
    source: str

    @property
    def text(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


@dataclass(frozen=True)
class Settings:
    """Everything one mount needs to know.  `state` is absolute; `privileged` says that root mounts for others."""

    backing: Path
    mountpoint: Path
    state: Path
    fsname: str
    privileged: bool
    rules: RuleSet = field(compare=False)
    allow_other: bool
    default_permissions: bool = True
    mount_flags: int = MS_NOSUID | MS_NODEV
    entry_timeout_seconds: float = 1.0
    attr_timeout_seconds: float = 1.0
    drain_seconds: float = 30.0
    max_threads: int = 256
    max_descriptors: int | None = None
    negative_refresh: str = "auto"
    temp: str = "auto"
    hot: bool = True
    passthrough: str = "auto"
    flush_readers: str = "auto"
    verify: Verify = Verify.CACHE
    quarantine_age_seconds: float = 30 * 86400.0
    quarantine_bytes: int = 0
    locks: str = "auto"
    lease_seconds: float = LEASE_SECONDS
    etcd_prefix: str = ""  # empty: made of the backing directory's own id
    etcd_ca: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    etcd_user: str = ""
    etcd_password_file: Path | None = None
    retain_seconds: float | None = None  # None: as the backing needs it
    service: Caller | None = None  # whom the state directory belongs to; None: whoever mounts
    log_file: Path | None = None
    log_level: str = "info"

    @property
    def read_only(self) -> bool:
        return bool(self.mount_flags & MS_RDONLY)

    def fusermount_options(self) -> str:
        """The `-o` text for fusermount3."""
        words = [name for flag, name in _FUSERMOUNT_FLAGS.items() if self.mount_flags & flag]
        words += ["allow_other"] if self.allow_other else []
        words += ["default_permissions"] if self.default_permissions else []
        words += [f"fsname={_escape(self.fsname)}", f"subtype={FILESYSTEM_TYPE}"]
        return ",".join(words)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _boolean(text: str) -> bool:
    known = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
    try:
        return known[text.lower()]
    except KeyError:
        raise ValueError("is not yes or no") from None


def _number(minimum: float, maximum: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not minimum <= value <= maximum:
            raise ValueError(f"is not between {minimum:g} and {maximum:g}")
        return value

    return parse


def _integer(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text):
            raise ValueError("is not a whole number")
        if not minimum <= int(text) <= maximum:
            raise ValueError(f"is not between {minimum} and {maximum}")
        return int(text)

    return parse


def _choice(words: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"is not one of {', '.join(words)}")
        return text

    return parse


def _verify(text: str) -> Verify:
    return Verify(_choice(tuple(Verify))(text))


def parse_size(text: str) -> int:
    """Bytes of a text such as 500M, 20G, 1T; 0 for off.  ValueError says what is wrong with it."""
    found = re.fullmatch(r"(\d{1,9})([KMGT]?)", text)
    if text == "off":
        return 0
    if found is None:
        raise ValueError("is no size (write 500M, 20G, 1T or off)")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[found[2]]


def _retain(text: str) -> float | None:
    return None if text == "auto" else parse_duration(text)


def _locks(text: str) -> str:
    if text.startswith(ETCD_SCHEME):
        return text
    if text not in _LOCKS:
        raise ValueError(f"is not one of {', '.join(_LOCKS)} or {ETCD_SCHEME}HOST:PORT,…")
    return text


def _absolute_path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError("is not an absolute path")
    return Path(os.path.normpath(text))


def _real_path(text: str) -> Path:
    """Looked up once: what a link in it leads to later is somebody else's affair."""
    return Path(os.path.realpath(_absolute_path(text)))


def service_user(text: str) -> Caller:
    """The user of this name or number, with his groups.  ValueError says what is wrong with it."""
    try:
        user = pwd.getpwuid(int(text)) if re.fullmatch(r"\d{1,10}", text) else pwd.getpwnam(text)
    except (KeyError, OverflowError):
        raise ValueError("is no user of this host") from None
    if user.pw_uid == 0:
        raise ValueError("is root, as whom the daemon acts without it: leave it out")
    return Caller(user.pw_uid, user.pw_gid, groups=tuple(os.getgrouplist(user.pw_name, user.pw_gid)))


def _word(text: str) -> str:
    if not text or any(ord(char) < 32 for char in text):
        raise ValueError("is empty or holds control characters")
    return text


# Option -> (field of Settings, parser of its value).
_VALUE_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "fsname": ("fsname", _word),
    "state": ("state", _real_path),
    "service_user": ("service", service_user),
    "entry_timeout": ("entry_timeout_seconds", _number(0, 86400)),
    "attr_timeout": ("attr_timeout_seconds", _number(0, 86400)),
    "drain_seconds": ("drain_seconds", _number(0, 86400)),
    "max_threads": ("max_threads", _integer(4, 4096)),
    "max_descriptors": ("max_descriptors", _integer(256, 1 << 30)),
    "negative_refresh": ("negative_refresh", _choice(_SWITCH)),
    "temp": ("temp", _choice(_TEMP_KINDS)),
    "passthrough": ("passthrough", _choice(_SWITCH)),
    "flush_readers": ("flush_readers", _choice(_SWITCH)),
    "verify": ("verify", _verify),
    "locks": ("locks", _locks),
    "etcd_prefix": ("etcd_prefix", _word),
    "etcd_ca": ("etcd_ca", _absolute_path),
    "etcd_cert": ("etcd_cert", _absolute_path),
    "etcd_key": ("etcd_key", _absolute_path),
    "etcd_user": ("etcd_user", _word),
    "etcd_password_file": ("etcd_password_file", _absolute_path),
    "lease_seconds": ("lease_seconds", _number(1, LONGEST_LEASE_SECONDS)),
    "retain": ("retain_seconds", _retain),
    "quarantine_age": ("quarantine_age_seconds", parse_duration),
    "quarantine_size": ("quarantine_bytes", parse_size),
    "log_file": ("log_file", _absolute_path),
    "log_level": ("log_level", _choice(_LOG_LEVELS)),
}

# What says how etcd is reached -> what it means nothing without.
_ETCD_PAIRS = {"etcd_key": "etcd_cert", "etcd_user": "etcd_password_file", "etcd_password_file": "etcd_user"}

# Option -> field; each may be written NAME, noNAME or NAME=yes|no.
_BOOLEAN_OPTIONS = {"allow_other": "allow_other", "default_permissions": "default_permissions", "hot": "hot"}


def known_options() -> list[str]:
    """Every option name that safefs itself acts on."""
    negated = [f"no{name}" for name in _BOOLEAN_OPTIONS]
    return sorted([*_FLAG_OPTIONS, *_VALUE_OPTIONS, *_BOOLEAN_OPTIONS, *negated, "subtype"])


def parse_options(texts: Iterable[str], source: str = "-o") -> list[Option]:
    """Split `a,b=c` texts; a comma inside a value is written `\\,`, between the endpoints of etcd plainly."""
    words = [word for text in texts for word in _split_commas(text) if word]
    return [_parse_word(word, source) for word in words]


def _split_commas(text: str) -> list[str]:
    words: list[str] = []
    for piece in re.findall(r"(?:\\.|[^,\\]|\\$)+", text, re.DOTALL):
        word = re.sub(r"\\([,\\])", r"\1", piece)
        # No option has a colon in its name, so what looks like an endpoint is one more of those before it.
        if words and words[-1].lstrip().startswith(f"locks={ETCD_SCHEME}") and re.fullmatch("[^=]+:[^=]*", word):
            words[-1] += f",{word}"
        else:
            words.append(word)
    return words


def _parse_word(word: str, source: str) -> Option:
    name, equals, value = word.partition("=")
    return Option(name.strip(), value if equals else None, source)


def has_option(options: Iterable[Option], name: str) -> bool:
    """Whether an option that changes no setting (nonempty) was given."""
    return any(option.name == name for option in options)


def load_settings(
    backing: Path,
    mountpoint: Path,
    options: Iterable[Option] = (),
    config: Path | None = None,
    *,
    privileged: bool | None = None,
) -> Settings:
    """Settings of a mount.  `config` is a file that must exist; without it the default file is read if present."""
    document, source = _read_document(config)
    if privileged is None:
        privileged = os.geteuid() == 0
    real_backing = Path(os.path.realpath(backing))
    settings = Settings(
        backing=real_backing,
        mountpoint=Path(os.path.realpath(mountpoint)),
        state=real_backing / STATE_NAME,
        fsname=os.fspath(real_backing),
        privileged=privileged,
        rules=RuleSet([*_admin_rules(document, source), *shipped_rules()]),
        allow_other=privileged,
    )
    written = [*_document_options(document.data, source), *options]
    for option in written:
        settings = _apply(settings, option)
    _check_etcd(settings, written)
    return _validated(settings)


def load_rules(config: Path | None = None) -> RuleSet:
    """The rules that a mount with this configuration file would follow."""
    document, source = _read_document(config)
    return RuleSet([*_admin_rules(document, source), *shipped_rules()])


@dataclass(frozen=True)
class _Document:
    data: Mapping[str, Any]
    text: str


def _read_document(config: Path | None) -> tuple[_Document, str]:
    path = config or DEFAULT_CONFIG
    source = os.fspath(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        if config is not None:
            raise ConfigError(f"{source}: no such configuration file") from None
        return _Document({}, ""), source
    except OSError as error:
        raise ConfigError(f"{source}: cannot read the configuration: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    for key in data:
        if key not in ("mount", "rule"):
            raise ConfigError(f"{source}: unknown table {key!r} (there are [mount] and [[rule]])")
    return _Document(data, text), source


def _admin_rules(document: _Document, source: str) -> tuple[Rule, ...]:
    return parse_rules(document.data.get("rule", []), source, rule_lines(document.text))


def _document_options(data: Mapping[str, Any], source: str) -> list[Option]:
    table = data.get("mount", {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: mount must be a table: [mount]")
    return [_document_option(name, value, source) for name, value in table.items()]


def _document_option(name: str, value: object, source: str) -> Option:
    """`noexec = true` reads as the option noexec, `exec = false` likewise; other values are texts."""
    if isinstance(value, bool):
        if name in _FLAG_OPTIONS:
            return Option(name if value else _opposite(name, source), None, source)
        return Option(name, "yes" if value else "no", source)
    if isinstance(value, (str, int, float)):
        return Option(name, str(value), source)
    raise ConfigError(f"{source}: the value of {name} must be a string, a number, true or false")


def _opposite(name: str, source: str) -> str:
    opposites = {"ro": "rw", "rw": "ro", "sync": "async", "async": "sync"}
    opposite = opposites.get(name) or (name[2:] if name.startswith("no") else f"no{name}")
    if opposite not in _FLAG_OPTIONS:
        raise ConfigError(f"{source}: {name} = false means nothing: leave it out")
    return opposite


def _apply(settings: Settings, option: Option) -> Settings:
    name = option.name
    if name in _FOREIGN_OPTIONS or option.text.startswith(_FOREIGN_PREFIXES):
        return settings
    if name in _REFUSED_OPTIONS:
        raise ConfigError(f"{option.source}: option {name!r} is not supported: {_REFUSED_OPTIONS[name]}")
    if name in _FLAG_OPTIONS:
        return _apply_flag(settings, option)
    if name in _VALUE_OPTIONS:
        return _apply_value(settings, option)
    if name == "subtype":
        return _apply_subtype(settings, option)
    if name.removeprefix("no") in _BOOLEAN_OPTIONS:
        return _apply_boolean(settings, option)
    raise ConfigError(f"{option.source}: unknown option {name!r}{_suggestion(name)}")


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*known_options(), *_FOREIGN_OPTIONS], n=1)
    return f" (did you mean {close[0]!r}?)" if close else " (safefs mount --help lists the options)"


def _apply_flag(settings: Settings, option: Option) -> Settings:
    if option.value is not None:
        raise ConfigError(f"{option.source}: option {option.name!r} takes no value")
    sets, clears = _FLAG_OPTIONS[option.name]
    return replace(settings, mount_flags=(settings.mount_flags | sets) & ~clears)


def _apply_value(settings: Settings, option: Option) -> Settings:
    field_name, parse = _VALUE_OPTIONS[option.name]
    if option.value is None:
        raise ConfigError(f"{option.source}: option {option.name!r} needs a value: {option.name}=…")
    try:
        return replace(settings, **{field_name: parse(option.value)})
    except ValueError as error:
        raise ConfigError(f"{option.source}: {option.text!r}: {option.value!r} {error}") from None


def _apply_boolean(settings: Settings, option: Option) -> Settings:
    negated = option.name not in _BOOLEAN_OPTIONS
    if negated and option.value is not None:
        raise ConfigError(f"{option.source}: option {option.name!r} takes no value")
    try:
        value = _boolean(option.value) if option.value is not None else not negated
    except ValueError as error:
        raise ConfigError(f"{option.source}: {option.text!r}: {option.value!r} {error}") from None
    changes: dict[str, Any] = {_BOOLEAN_OPTIONS[option.name.removeprefix("no")]: value}
    return replace(settings, **changes)


def _apply_subtype(settings: Settings, option: Option) -> Settings:
    if option.value != FILESYSTEM_TYPE:
        raise ConfigError(f"{option.source}: {option.text!r}: the subtype of a safefs mount is {FILESYSTEM_TYPE}")
    return settings


def _check_etcd(settings: Settings, written: list[Option]) -> None:
    """Refuse what says how etcd is reached where nobody would look at it, or where half of it is missing.

    Who overrides `locks=etcd://…` overrides what was written with it in the same place.
    """
    served = {option.source for option in written if option.text.startswith(f"locks={ETCD_SCHEME}")}
    etcd = [option for option in written if option.name.startswith("etcd_")]
    for option in etcd:
        if not settings.locks.startswith(ETCD_SCHEME) and option.source not in served:
            raise ConfigError(f"{option.source}: option {option.name!r} needs locks={ETCD_SCHEME}HOST:PORT")
        needed = _ETCD_PAIRS.get(option.name)
        if needed and not any(other.name == needed for other in etcd):
            raise ConfigError(f"{option.source}: option {option.name!r} needs {needed} as well: {needed}=…")


def _validated(settings: Settings) -> Settings:
    if settings.privileged:
        return settings
    if settings.service is not None:
        raise ConfigError("option 'service_user' needs root: a user's daemon acts as nobody but him")
    for flag, name in ((MS_DIRSYNC, "dirsync"), (MS_STRICTATIME, "strictatime"), (MS_LAZYTIME, "lazytime")):
        if settings.mount_flags & flag:
            raise ConfigError(f"option {name!r} needs root: fusermount3 does not take it")
    # fusermount3 adds both whatever is asked, so a wish for the opposite would be lost in silence.
    for flag, name in ((MS_NOSUID, "suid"), (MS_NODEV, "dev")):
        if not settings.mount_flags & flag:
            raise ConfigError(f"option {name!r} needs root")
    return settings
