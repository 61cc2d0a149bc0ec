"""`safefs rules PATH`: the class of a name and the rule that gives it.

A live mount that PATH lies on is asked, since it follows the rules it was started with; without one, or with
--config, the rules are read as a new mount would read them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from safefs.config import load_rules
from safefs.control import LiveMount, mount_above, request
from safefs.errors import SafefsError


def show_rules(path: Path, config: Path | None, *, as_json: bool) -> None:
    """Print which class and rule apply to `path`."""
    absolute = Path(os.path.abspath(path))
    mount = mount_above(absolute.parent)  # a mountpoint itself is no name on its mount
    relative = _relative(path, absolute, mount)
    answer = _ask(mount, relative) if mount and config is None else None
    if answer is None:
        answer = load_rules(config).explain(os.fsencode(relative))
    click.echo(json.dumps(answer, indent=2) if as_json else _sentence(relative, answer))


def _relative(path: Path, absolute: Path, mount: LiveMount | None) -> Path:
    """Off every mount, a relative path is taken as one below the mount's root."""
    if mount is not None:
        return absolute.relative_to(mount.mountpoint)
    return Path(os.path.normpath(path)) if not path.is_absolute() else absolute.relative_to("/")


def _ask(mount: LiveMount, relative: Path) -> dict[str, str] | None:
    try:
        answer = request(mount.socket_path, {"op": "rules", "path": os.fspath(relative)})
    except SafefsError as error:
        click.echo(f"safefs: {mount.mountpoint}: {error.message}; reading the rules instead", err=True)
        return None
    return {key: str(value) for key, value in answer.items()}


def _sentence(relative: Path, answer: dict[str, str]) -> str:
    name = os.fsencode(relative).decode("utf-8", "backslashreplace")
    glob = f", glob {answer['glob']}" if answer["glob"] else ""
    unusual = {"verify": "default", "content": "off", "retain": "default"}
    checks = [f"{key} {answer[key]}" for key, usual in unusual.items() if answer.get(key, usual) != usual]
    published = f"; when it is published: {', '.join(checks)}" if checks else ""
    return f"{name}: {answer['class']} ({answer['source']}{glob}): {answer['reason']}{published}"
