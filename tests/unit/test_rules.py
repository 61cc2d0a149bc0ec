"""Which class a name has: the shipped lists, globs over bytes, the order of rules, and what is refused."""

from __future__ import annotations

import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safefs.errors import ConfigError
from safefs.rules import Content, NameClass, Policy, Rule, RuleSet, Verify, parse_rules, rule_lines, shipped_rules

SHIPPED = RuleSet(shipped_rules())

SHIPPED_CLASSES = {
    NameClass.PRIVATE: """
        model.safetensors config.json main STABLE .complete a.out uv.lock Cargo.lock poetry.lock Pipfile.lock yarn.lock
        flake.lock Gemfile.lock composer.lock pdm.lock pixi.lock mix.lock deno.lock bun.lock conda-linux-64.lock
        requirements-dev.lock pnpm-lock.yaml package-lock.json .model.bin.Xa3bQz tmpabc123 x.tmp app.log.1.gz
        old.sqlite.zst dump.db.xz gradle.lockfile block padlock partial incomplete part x.parts log catalog dialog
        x.logs out err walk journal db MANIFEST MANIFEST-000001.bak lib.so libx.so.1.2 x.o12345 .gitignore
    """,
    NameClass.PARTIAL: """
        b10a.incomplete x.part x.partial x.iso.aria2 x.crdownload x.gguf.!qB x.!ut x.bc! x.filepart x.mp4.part-Frag12
        x.mp4.part-Frag12.part x.ytdl sha256-0af3-partial sha256-0af3-partial-15 x_.gstmp .azDownload-1-x
        x.abc.part.minio uv.lock.part x.db.part x.log.incomplete
    """,
    NameClass.LOCK: """
        a1b2.lock .lock lock x.lck LOCK Lock index.lock HEAD.lock main.lock packed-refs.lock config.lock shallow.lock
        .package-cache lock-frontend .~lock.sheet.ods# wlock sqlite.db.lock app.log.lock uv.lock.lock daemon.pid
    """,
    NameClass.SHARED: """
        x.sqlite x.sqlite3 x.sqlite-wal x.sqlite3-shm x.db x.db-wal x.db-shm x.db-journal x.db3 x-wal x-shm x-journal
        x.db-mj00A1B29FF x.gpkg x.duckdb x.duckdb.wal data.mdb lock.mdb appendonly.aof.1.incr.aof MANIFEST-000004
        x.log x.log.1 x.log.2026-11-21 app.host.user.log.INFO.20261121-100000.42 LOG LOG.old x.jsonl x.ndjson
        slurm-1.out nohup.out x.err x.stdout events.out.tfevents.1700000000.host.1.0 run-a1b2.wandb .ninja_log
        .ninja_deps .notes.txt.swp .swp
    """,
}


@pytest.mark.parametrize(
    ("name", "name_class"),
    [(name, name_class) for name_class, names in SHIPPED_CLASSES.items() for name in names.split()],
)
def test_shipped_class(name: str, name_class: NameClass) -> None:
    assert SHIPPED.classify(name.encode()).name_class is name_class


def test_shipped_rules_need_no_paths() -> None:
    """Else every look at a name would have to find the path of its directory."""
    assert not SHIPPED.uses_paths


def test_every_shipped_glob_matches_something_of_its_own() -> None:
    """A glob that an earlier rule covers whole is dead text."""
    for rule in SHIPPED.rules:
        for glob in rule.globs:
            path = re.sub(r"\[!?(.)[^]]*\]", r"\1", glob).replace("*", "x").encode()
            directory, _, name = path.rpartition(b"/")
            if rule.name_class is not None:
                assert SHIPPED.classify(name).rule is rule, glob
            if rule.content is not None:
                assert set(rule.content) <= set(SHIPPED.policy(name, directory).content), glob


PATHS = {
    b"hub/models--a/blobs/abc": ("sha256", "git-blob"),
    b"blobs/abc": ("sha256", "git-blob"),
    b"oci/blobs/sha256/abc": ("sha256", "git-blob"),
    b"models/blobs/sha256-abc": ("sha256", "git-blob"),
    b"a/model.safetensors": ("safetensors",),
    b"blobs/x.whl": ("sha256", "git-blob", "zip"),
    b"other/abc": (),
}


@pytest.mark.parametrize("path", PATHS)
def test_shipped_checks(path: bytes) -> None:
    directory, _, name = path.rpartition(b"/")
    policy = SHIPPED.policy(name, directory)
    assert (policy.content, policy.verify) == (PATHS[path], None)


def test_checks_add_up_until_one_says_off() -> None:
    tables = [
        {"match": "*.a", "verify": "storage"},
        {"match": "*.a", "content": "zip", "verify": "off"},
        {"match": "x.*", "content": "off"},
        {"match": "*.a", "content": ["zip", "sha256"], "retain": "2h"},
    ]
    rules = RuleSet(parse_rules(tables, "file"))
    assert rules.policy(b"y.a", b"") == Policy(Verify.STORAGE, (Content.ZIP, Content.SHA256), 7200.0)
    assert rules.policy(b"x.a", b"") == Policy(Verify.STORAGE, (Content.ZIP,), 7200.0)
    assert rules.policy(b"x.b", b"") == Policy()
    assert rules.classify(b"y.a").rule is None


def test_in_place_classes() -> None:
    assert [name_class for name_class in NameClass if name_class.in_place] == [NameClass.LOCK, NameClass.SHARED]


def rule(name_class: str, *globs: str) -> Rule:
    return Rule(NameClass(name_class), globs)


def test_first_match_wins_and_is_named() -> None:
    first, second = rule("shared", "*.x", "a*"), rule("lock", "a.x", "b.y")
    rules = RuleSet([first, second])
    assert rules.classify(b"a.x").rule is first
    assert rules.classify(b"a.x").glob == "*.x"
    assert rules.classify(b"aa").glob == "a*"
    assert rules.classify(b"b.y").name_class is NameClass.LOCK
    default = rules.classify(b"b.z")
    assert (default.name_class, default.rule, default.source) == (NameClass.PRIVATE, None, "default")


def test_names_are_bytes() -> None:
    rules = RuleSet([rule("partial", "*.part", "?x", "é*")])
    assert rules.classify(b"\xff\xfe.part").name_class is NameClass.PARTIAL
    assert rules.classify(b"\xffx").name_class is NameClass.PARTIAL
    assert rules.classify("é1".encode()).name_class is NameClass.PARTIAL
    assert rules.classify(b"line\nbreak.part").name_class is NameClass.PARTIAL


@pytest.mark.parametrize(
    ("glob", "directory", "name", "matches"),
    [
        ("/top", "", "top", True),
        ("/top", "a", "top", False),
        ("a/b", "a", "b", True),
        ("a/b", "x/a", "b", False),
        ("**/a/b", "a", "b", True),
        ("**/a/b", "x/y/a", "b", True),
        ("**/a/b", "xa", "b", False),
        ("a/**", "a", "b", True),
        ("a/**", "a/b/c", "d", True),
        ("a/**", "", "a", False),
        ("a/**", "ab", "c", False),
        ("a/**/z", "a", "z", True),
        ("a/**/z", "a/b/c", "z", True),
        ("a/*/z", "a/b", "z", True),
        ("a/*/z", "a/b/c", "z", False),
        ("a/?", "a", "b", True),
        ("a/[!x]", "a", "b", True),
        ("a/[!x]", "a", "x", False),
        ("**/runs/*.csv", "exp/7/runs", "loss.csv", True),
    ],
)
def test_globs_with_a_slash(glob: str, directory: str, name: str, matches: bool) -> None:
    found = RuleSet([rule("shared", glob)]).classify(name.encode(), directory.encode())
    assert (found.name_class is NameClass.SHARED) is matches


def test_paths_matter_only_where_a_rule_has_one() -> None:
    assert not RuleSet([rule("shared", "*.x")]).uses_paths
    assert RuleSet([rule("shared", "*.x", "a/b")]).uses_paths


@pytest.mark.parametrize(
    ("glob", "complaint"),
    [
        ("", "empty"),
        ("/", "empty"),
        ("a/", "'a/**'"),
        ("a//b", "no path"),
        ("a/../b", "no path"),
        ("a**b", "component of its own"),
        ("**", "component of its own"),
        ("[ab", "not closed"),
        ("[z-a]", "not a set"),
        ("[é]", "ASCII"),
        ("a[/]b", "not closed"),
    ],
)
def test_refused_globs(glob: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        parse_rules([{"class": "shared", "match": [glob]}], "file")


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"class": "shared", "match": ["a"], "state": "off"}, "unknown key 'state'"),
        ({"stale": "soon", "match": ["a"]}, "unknown stale 'soon'"),
        ({"match": ["a"]}, "gives nothing"),
        ({"verify": "maybe", "match": ["a"]}, "unknown verify 'maybe'"),
        ({"content": "md5", "match": ["a"]}, "content: 'md5'"),
        ({"retain": "long", "match": ["a"]}, "retain: 'long' is no time"),
        ({"content": ["zip", 1], "match": ["a"]}, "content: 1"),
        ({"class": "secret", "match": ["a"]}, "unknown class 'secret'"),
        ({"class": "shared"}, "match"),
        ({"class": "shared", "match": []}, "match"),
        ({"class": "shared", "match": [1]}, "match"),
        ({"class": "shared", "match": ["a"], "reason": 1}, "reason"),
        ("shared", "a rule is a table"),
    ],
)
def test_refused_tables(table: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_rules([table], "file")


def test_rules_that_are_no_tables() -> None:
    with pytest.raises(ConfigError, match=r"\[\[rule\]\]"):
        parse_rules({"class": "shared"}, "file")


def test_source_is_the_line_of_the_rule() -> None:
    text = '# comment\n[[rule]]\nclass = "shared"\nmatch = "a"\n\n  [[ rule ]]\nclass = "lock"\nmatch = "b"\n'
    tables = tomllib.loads(text)["rule"]
    assert [rule.source for rule in parse_rules(tables, "file", rule_lines(text))] == ["file:2", "file:6"]


def test_source_is_the_position_where_lines_are_in_doubt() -> None:
    text = '[[rule]]\nclass = "shared"\nmatch = "a"\nreason = """\n[[rule]]\n"""\n'
    tables = tomllib.loads(text)["rule"]
    assert [rule.source for rule in parse_rules(tables, "file", rule_lines(text))] == ["file, rule 1"]


def test_explain_splits_the_path() -> None:
    explained = RuleSet([Rule(NameClass.SHARED, ("a/*.x",), "file:1", "because")]).explain(b"a/b.x")
    found = {"class": "shared", "glob": "a/*.x", "source": "file:1", "reason": "because"}
    assert explained == {**found, "verify": "default", "content": "off", "retain": "default", "stale": "signalled"}


PLAIN = st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name)


def as_glob(name: bytes) -> str:
    """A glob that matches exactly this name."""
    return re.sub(r"([*?\[])", r"[\1]", name.decode("utf-8", "surrogateescape"))


@given(PLAIN, PLAIN)
def test_a_quoted_name_matches_itself_only(name: bytes, other: bytes) -> None:
    rules = RuleSet([rule("shared", as_glob(name))])
    assert rules.classify(name).name_class is NameClass.SHARED
    assert (rules.classify(other).name_class is NameClass.SHARED) is (name == other)


@given(PLAIN, PLAIN, PLAIN)
def test_star_spans_any_bytes(start: bytes, middle: bytes, end: bytes) -> None:
    rules = RuleSet([rule("shared", f"{as_glob(start)}*{as_glob(end)}")])
    assert rules.classify(start + middle + end).name_class is NameClass.SHARED
    assert rules.classify(start + end).name_class is NameClass.SHARED


@given(PLAIN, st.lists(PLAIN, max_size=4))
def test_a_name_rule_holds_in_every_directory(name: bytes, directories: list[bytes]) -> None:
    rules = RuleSet([rule("shared", as_glob(name)), rule("lock", "never/*")])
    assert rules.classify(name, b"/".join(directories)).name_class is NameClass.SHARED


@given(PLAIN)
def test_shipped_rules_answer_for_every_name(name: bytes) -> None:
    match = SHIPPED.classify(name)
    assert (match.rule is None) == (match.glob is None)
