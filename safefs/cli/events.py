"""`safefs events`: what happened on a backing directory, on all of its nodes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from safefs.cli.places import find_place
from safefs.cli.tables import printable, time_text
from safefs.events import Event, EventReader

FOLLOW_SECONDS = 0.5
_HEAD = ("time", "node", "event", "path")


def show_events(path: Path | None, *, follow: bool, as_json: bool) -> None:
    """Print all events that there are, and with `follow` those that come, until interrupted."""
    state = find_place(path).state()
    reader = EventReader(state.events)
    while True:
        with state.acting():
            events = reader.read()
        for event in events:
            click.echo(json.dumps(event) if as_json else _line(event))
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)


def _line(event: Event) -> str:
    details = " ".join(f"{key}={printable(value)}" for key, value in event.items() if key not in _HEAD)
    when, *head = (event.get(key, "") for key in _HEAD)
    return " ".join(printable(part) for part in (time_text(float(when or 0)), *head, details) if part)
