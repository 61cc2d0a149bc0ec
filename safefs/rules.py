"""What names say: which protocol a file follows and what is checked of it, from ordered glob rules.

A rule gives a class, or something about publishing (`verify`, `content`, `retain`), or several of these.  Each comes
from the first matching rule that gives it; content from all of them, until one says off.

Guaranteed: a `RuleSet` never changes, `classify` does no I/O, works on bytes (names need not be UTF-8) and answers
the same for the same arguments.  An administrator's rules come before the shipped ones (`rules.toml`).
Not guaranteed: that a class suits what a program does with the file.  A name is all that is looked at.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from importlib import resources
from itertools import takewhile
from typing import Any, TypeVar

from safefs.errors import ConfigError

CACHED_NAMES = 16384
CACHED_POLICIES = 256  # one publish asks several times
GIVEN = ("class", "verify", "content", "retain", "stale")
_DURATION = re.compile(r"(\d{1,9})([smhd])")
_RULE_HEADING = re.compile(r"^[ \t]*\[\[\s*rule\s*\]\]", re.MULTILINE)
_SPECIAL = re.compile(rb"[*?\[]")

Choice = TypeVar("Choice", bound=StrEnum)


class NameClass(StrEnum):
    """How safefs treats a regular file of this name."""

    PRIVATE = "private"
    PARTIAL = "partial"
    LOCK = "lock"
    SHARED = "shared"

    @property
    def in_place(self) -> bool:
        """Written in the backing file itself, without a draft."""
        return self in (NameClass.LOCK, NameClass.SHARED)


class Verify(StrEnum):
    """What is read back before a file is published."""

    STORAGE = "storage"  # its bytes, after the kernel's copy of them was dropped
    CACHE = "cache"  # its bytes, wherever they come from
    OFF = "off"


class Content(StrEnum):
    """What a name says about the bytes of its file."""

    SHA256 = "sha256"  # where the name ends with 64 hexadecimal digits: that they are it
    GIT_BLOB = "git-blob"  # where it ends with 40: that they are the sha1 that git computes
    SAFETENSORS = "safetensors"  # a header that accounts for every byte
    ZIP = "zip"  # a central directory that fits the file
    OFF = "off"  # nothing


class Stale(StrEnum):
    """When a lock file goes whose creator is gone (safefs/softlocks.py)."""

    SIGNALLED = "signalled"  # its creator was killed by a signal, or its node is gone
    DEAD = "dead"  # its creator is gone, however it ended, or its node is
    OFF = "off"  # never


@dataclass(frozen=True)
class Rule:
    """One `[[rule]]` table: globs, and what they give; None is left to later rules."""

    name_class: NameClass | None
    globs: tuple[str, ...]
    source: str = "rule"
    reason: str = ""
    verify: Verify | None = None
    content: tuple[Content, ...] | None = None
    retain_seconds: float | None = None
    stale: Stale | None = None


@dataclass(frozen=True)
class Policy:
    """How a file of this name is published, and what becomes of a lock file; None: as the mount says."""

    verify: Verify | None = None
    content: tuple[Content, ...] = ()
    retain_seconds: float | None = None  # for how long what is replaced stays reachable
    stale: Stale = Stale.SIGNALLED


@dataclass(frozen=True)
class Match:
    """What `classify` found; `rule` and `glob` are None for a name that no rule matches."""

    name_class: NameClass
    rule: Rule | None = None
    glob: str | None = None

    @property
    def source(self) -> str:
        return self.rule.source if self.rule else "default"

    @property
    def reason(self) -> str:
        return self.rule.reason if self.rule else "no rule matches the name"


class _Matcher:
    """One rule, compiled: set lookup and endswith for the common globs, a regular expression for the others."""

    def __init__(self, rule: Rule) -> None:
        globs = [_encode(glob) for glob in rule.globs]
        names = [glob for glob in globs if b"/" not in glob]
        self.rule = rule
        self.literals = frozenset(glob for glob in names if not _SPECIAL.search(glob))
        self.suffixes = tuple(glob[1:] for glob in names if _is_suffix(glob))
        others = [glob for glob in names if glob not in self.literals and not _is_suffix(glob)]
        self.names = _any_of(map(_translate_component, others))
        self.paths = _any_of(_translate_path(glob) for glob in globs if b"/" in glob)

    @property
    def gives_policy(self) -> bool:
        given = (self.rule.verify, self.rule.content, self.rule.retain_seconds, self.rule.stale)
        return any(value is not None for value in given)

    def matches(self, name: bytes, directory: bytes) -> bool:
        return (
            name in self.literals
            or name.endswith(self.suffixes)
            or (self.names is not None and self.names.fullmatch(name) is not None)
            or (self.paths is not None and self.paths.fullmatch(_join(directory, name)) is not None)
        )


class RuleSet:
    """Ordered rules, ready to be asked; `uses_paths` says whether a name's class can depend on its directory."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules = tuple(rules)
        matchers = tuple(_Matcher(rule) for rule in self.rules)
        self._classes = tuple(matcher for matcher in matchers if matcher.rule.name_class is not None)
        self._policies = tuple(matcher for matcher in matchers if matcher.gives_policy)
        self.uses_paths = any("/" in glob for matcher in self._classes for glob in matcher.rule.globs)
        self._cached = lru_cache(maxsize=CACHED_NAMES)(self._find)
        self._cached_policy = lru_cache(maxsize=CACHED_POLICIES)(self._find_policy)

    def classify(self, name: bytes, directory: bytes = b"") -> Match:
        """The class of `name` in `directory`, which is relative to the mount's root and has no slash at its ends."""
        return self._cached(name, directory if self.uses_paths else b"")

    def policy(self, name: bytes, directory: bytes) -> Policy:
        """How a file of this name in this directory is published."""
        return self._cached_policy(name, directory)

    def _find_policy(self, name: bytes, directory: bytes) -> Policy:
        found = [matcher.rule for matcher in self._policies if matcher.matches(name, directory)]
        content = (kind for rule in found for kind in rule.content or ())
        checks = dict.fromkeys(takewhile(lambda kind: kind is not Content.OFF, content))
        return Policy(
            next((rule.verify for rule in found if rule.verify is not None), None),
            tuple(checks),
            next((rule.retain_seconds for rule in found if rule.retain_seconds is not None), None),
            next((rule.stale for rule in found if rule.stale is not None), Stale.SIGNALLED),
        )

    def explain(self, path: bytes) -> dict[str, str]:
        """Why the file at `path`, relative to the mount's root, has its class: plain texts, for people and JSON."""
        directory, _, name = path.strip(b"/").rpartition(b"/")
        match, policy = self.classify(name, directory), self.policy(name, directory)
        return {
            "class": str(match.name_class),
            "glob": match.glob or "",
            "source": match.source,
            "reason": match.reason,
            "verify": str(policy.verify or "default"),
            "content": ", ".join(policy.content) or "off",
            "retain": "default" if policy.retain_seconds is None else f"{policy.retain_seconds:g} s",
            "stale": str(policy.stale),
        }

    def _find(self, name: bytes, directory: bytes) -> Match:
        for matcher in self._classes:
            rule = matcher.rule
            if rule.name_class is not None and matcher.matches(name, directory):
                return Match(rule.name_class, rule, _matching_glob(rule, name, directory))
        return Match(NameClass.PRIVATE)


def shipped_rules() -> tuple[Rule, ...]:
    """The rules that come with safefs."""
    text = resources.files("safefs").joinpath("rules.toml").read_text(encoding="utf-8")
    return parse_rules(tomllib.loads(text)["rule"], "shipped rules.toml", rule_lines(text))


def rule_lines(text: str) -> list[int]:
    """The line numbers of the `[[rule]]` headings of a TOML text, which its parser does not tell."""
    return [text.count("\n", 0, heading.start(0)) + 1 for heading in _RULE_HEADING.finditer(text)]


def parse_rules(tables: object, source: str, lines: list[int] | None = None) -> tuple[Rule, ...]:
    """Rules from the `[[rule]]` tables of a TOML file; `source` names the file in errors and in `Match.source`."""
    if not isinstance(tables, list):
        raise ConfigError(f"{source}: rules are written as [[rule]] tables")
    # A heading inside a multi-line string would shift the numbers: then say the rule's position instead.
    known = lines if lines is not None and len(lines) == len(tables) else None
    return tuple(
        _parse_rule(table, f"{source}:{known[index]}" if known else f"{source}, rule {index + 1}")
        for index, table in enumerate(tables)
    )


def _parse_rule(table: object, source: str) -> Rule:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: a rule is a table with match and what it gives")
    for key in table:
        if key not in ("match", "reason", *GIVEN):
            raise ConfigError(f"{source}: unknown key {key!r} (a rule has match, reason and {', '.join(GIVEN)})")
    if not any(key in table for key in GIVEN):
        raise ConfigError(f"{source}: the rule gives nothing (one of {', '.join(GIVEN)})")
    return Rule(
        _parse_choice(table, "class", NameClass, source),
        _parse_globs(table, source),
        source,
        _parse_reason(table, source),
        _parse_choice(table, "verify", Verify, source),
        _parse_content(table, source),
        _parse_retain(table, source),
        _parse_choice(table, "stale", Stale, source),
    )


def _parse_choice(table: Mapping[str, Any], key: str, choices: type[Choice], source: str) -> Choice | None:
    if key not in table:
        return None
    try:
        return choices(table[key])
    except ValueError:
        raise ConfigError(f"{source}: unknown {key} {table[key]!r} (one of {', '.join(choices)})") from None


def _parse_content(table: Mapping[str, Any], source: str) -> tuple[Content, ...] | None:
    if "content" not in table:
        return None
    kinds = table["content"] if isinstance(table["content"], list) else [table["content"]]
    try:
        return tuple(Content(kind) for kind in kinds)
    except ValueError as error:
        raise ConfigError(f"{source}: content: {error} (some of {', '.join(Content)})") from None


def _parse_retain(table: Mapping[str, Any], source: str) -> float | None:
    if "retain" not in table:
        return None
    try:
        return parse_duration(str(table["retain"]))
    except ValueError as error:
        raise ConfigError(f"{source}: retain: {table['retain']!r} {error}") from None


def parse_duration(text: str) -> float:
    """Seconds of a text such as 90s, 15m, 12h, 30d; 0 for off.  ValueError says what is wrong with it."""
    found = _DURATION.fullmatch(text)
    if text == "off":
        return 0.0
    if found is None:
        raise ValueError("is no time (write 90s, 15m, 12h, 30d or off)")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _parse_globs(table: Mapping[str, Any], source: str) -> tuple[str, ...]:
    globs = table.get("match")
    if isinstance(globs, str):
        globs = [globs]
    if not isinstance(globs, list) or not globs or not all(isinstance(glob, str) for glob in globs):
        raise ConfigError(f"{source}: match must be a glob or a list of globs")
    for glob in globs:
        check_glob(glob, source)
    return tuple(globs)


def _parse_reason(table: Mapping[str, Any], source: str) -> str:
    reason = table.get("reason", "")
    if not isinstance(reason, str):
        raise ConfigError(f"{source}: reason must be a string")
    return reason


def check_glob(glob: str, source: str) -> None:
    """Refuse a glob that could never match, or would match something else than its author meant."""
    if not glob.strip("/"):
        raise ConfigError(f"{source}: an empty glob matches nothing")
    if glob.endswith("/"):
        raise ConfigError(f"{source}: {glob!r} ends with a slash: write {glob + '**'!r} for everything below")
    if "\0" in glob or any(part in ("", ".", "..") for part in glob.lstrip("/").split("/")):
        raise ConfigError(f"{source}: no path looks like {glob!r}")
    if any("**" in part and part != "**" for part in glob.split("/")) or glob == "**":
        raise ConfigError(f"{source}: in {glob!r} a ** must be a path component of its own")
    try:
        _translate(_encode(glob))
    except ValueError as error:
        raise ConfigError(f"{source}: {glob!r}: {error}") from None


def _encode(glob: str) -> bytes:
    return glob.encode("utf-8", "surrogateescape")


def _translate(glob: bytes) -> bytes:
    return _translate_path(glob) if b"/" in glob else _translate_component(glob)


def _is_suffix(glob: bytes) -> bool:
    return glob.startswith(b"*") and len(glob) > 1 and not _SPECIAL.search(glob, 1)


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _any_of(patterns: Iterable[bytes]) -> re.Pattern[bytes] | None:
    alternatives = b"|".join(b"(?:" + pattern + b")" for pattern in patterns)
    return re.compile(alternatives, re.DOTALL) if alternatives else None


def _matching_glob(rule: Rule, name: bytes, directory: bytes) -> str:
    """Which of the rule's globs it was; asked once per cached name, so it need not be fast."""
    for glob in rule.globs:
        encoded = _encode(glob)
        subject = _join(directory, name) if b"/" in encoded else name
        if re.fullmatch(_translate(encoded), subject, re.DOTALL):
            return glob
    raise AssertionError(f"{rule.source} matched {name!r} by none of its globs")


def _translate_path(glob: bytes) -> bytes:
    parts = glob.lstrip(b"/").split(b"/")
    pattern = b""
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == b"**":
            pattern += b".*" if last else b"(?:.*/)?"
        else:
            pattern += _translate_component(part) + (b"" if last else b"/")
    return pattern


def _translate_component(glob: bytes) -> bytes:
    """A regular expression for one path component; ValueError for a bad character class."""
    pattern, position = b"", 0
    while position < len(glob):
        char = glob[position : position + 1]
        if char == b"[":
            translated, position = _translate_set(glob, position)
            pattern += translated
            continue
        pattern += {b"*": b"[^/]*", b"?": b"[^/]"}.get(char) or re.escape(char)
        position += 1
    return pattern


def _translate_set(glob: bytes, start: int) -> tuple[bytes, int]:
    """Translate `[a-z]` or `[!a-z]`; returns the pattern and the position behind it."""
    inside = start + (2 if glob[start + 1 : start + 2] == b"!" else 1)
    # As in the shell, a ] that comes first stands for itself.
    end = glob.find(b"]", inside + 1)
    if end < 0:
        raise ValueError("a [ is not closed")
    members = glob[inside:end]
    if not members.isascii():
        raise ValueError("a [ ] set matches single bytes, so it holds ASCII only")
    body = re.sub(rb"([\\\[\]^&~|])", rb"\\\1", members)
    pattern = b"(?!/)[" + (b"^" if inside == start + 2 else b"") + body + b"]"
    try:
        re.compile(pattern)
    except re.error:
        raise ValueError(f"[{members.decode()}] is not a set of characters") from None
    return pattern, end + 1
