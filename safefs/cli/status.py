"""`safefs status`: what the kernel lists as safefs mounts, and what their daemons say about themselves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from safefs.control import LiveMount, find_mount, find_mounts, request
from safefs.errors import SafefsError

_HEAD_KEYS = ("mountpoint", "source", "state", "problem")


def show_status(mountpoint: Path | None, *, as_json: bool) -> None:
    """Print every mount, or one; a single mount that is not there or does not answer is an error."""
    if mountpoint is None:
        reports = [describe(mount) for mount in find_mounts()]
        click.echo(json.dumps(reports, indent=2)) if as_json else _print_table(reports)
        return
    mount = find_mount(Path(os.path.abspath(mountpoint))) or find_mount(Path(os.path.realpath(mountpoint)))
    if mount is None:
        raise SafefsError(f"{mountpoint}: no safefs mount here", errno.EINVAL)
    report = describe(mount)
    click.echo(json.dumps(report, indent=2)) if as_json else _print_details(report)
    if report["state"] != "live":
        raise SafefsError(f"{mountpoint}: {report['problem']}", errno.ENOTCONN)


def describe(mount: LiveMount) -> dict[str, Any]:
    """One mount as a flat report; `state` is live, or unknown with the `problem`."""
    report: dict[str, Any] = {"mountpoint": os.fspath(mount.mountpoint), "source": mount.source}
    try:
        answer = request(mount.socket_path, {"op": "status"})
    except SafefsError as error:
        return {**report, "state": "unknown", "problem": error.message}
    return {**report, "state": "live", **answer}


def _print_table(reports: list[dict[str, Any]]) -> None:
    if not reports:
        click.echo("no safefs mounts")
        return
    table = Table("mountpoint", "source", "state", "pid", "drafts", box=None, pad_edge=False)
    for report in reports:
        state = report.get("problem", report["state"])
        cells = (report["mountpoint"], report["source"], state, report.get("pid", ""), report.get("drafts", ""))
        table.add_row(*(_printable(cell) for cell in cells))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def _print_details(report: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key in (*_HEAD_KEYS, *(key for key in report if key not in _HEAD_KEYS)):
        if key in report:
            table.add_row(key, _printable(report[key]))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def _printable(value: object) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()
