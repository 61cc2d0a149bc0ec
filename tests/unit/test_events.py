"""Events: written by many, read by one, bounded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from safefs import events
from safefs.events import EventKind, EventLog, EventReader, append_events


def test_writers_are_put_together_by_time(tmp_path: Path) -> None:
    append_events(tmp_path, "one", [{"time": 3, "path": "c"}, {"time": 1, "path": "a"}])
    append_events(tmp_path, "two", [{"time": 2, "path": "b"}])
    assert [event["path"] for event in EventReader(tmp_path).read()] == ["a", "b", "c"]


def test_a_reader_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the file it reads becomes the old one meanwhile, and when its last line is not whole yet."""
    monkeypatch.setattr(events, "FILE_BYTES", 100)
    reader, seen = EventReader(tmp_path), []
    for number in range(20):
        append_events(tmp_path, "one", [{"time": number, "path": str(number)}])
        seen += [event["path"] for event in reader.read()]
    assert seen == [str(number) for number in range(20)]
    with open(tmp_path / "one.jsonl", "a", encoding="ascii") as file:
        file.write('{"time": 99, "pa')
        file.flush()
        assert reader.read() == []
        file.write('th": "x"}\n')
    assert [event["path"] for event in reader.read()] == ["x"]


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "FILE_BYTES", 1000)
    for number in range(500):
        append_events(tmp_path, "one", [{"time": number, "path": "x"}])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2500


def test_lines_that_a_crash_has_cut_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"time": 1, "pa\n[]\n{"time": 2, "path": "b"}\n')
    assert [event["path"] for event in EventReader(tmp_path).read()] == ["b"]


def test_noting_is_bounded_and_says_what_it_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_WAITING", 3)
    log = EventLog(tmp_path, "node")
    for number in range(5):
        log.note(EventKind.PUBLISHED, f"file{number}", size=number)
    log.write()
    found = EventReader(tmp_path).read()
    assert [(event["event"], event["path"]) for event in found if event["event"] != "dropped"] == [
        ("published", f"file{number}") for number in (2, 3, 4)
    ]
    assert [event["count"] for event in found if event["event"] == "dropped"] == [2]


def test_a_directory_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "missing", "node")
    log.note(EventKind.PUBLISHED, "file")
    log.write()
    assert log.taken() == []


def test_what_a_full_disk_has_cut_is_said_and_continued_by_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, write = EventLog(tmp_path, "node"), os.write
    for cut in (True, False):
        with monkeypatch.context() as full:
            if cut:
                full.setattr(os, "write", lambda fd, data: write(fd, data[:-9]))
            for number in range(2):
                log.note(EventKind.PUBLISHED, f"{number} {cut}")
            log.write()
    assert [event["path"] for event in EventReader(tmp_path).read()] == ["0 True", "0 False", "1 False"]
    assert ["2 events" in record.message for record in caplog.records] == [True]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "node")
    log.note(EventKind.PUBLISHED, b"\xff".decode("utf-8", "surrogateescape"))
    log.write()
    (line,) = (tmp_path / "node.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "\udcff"
