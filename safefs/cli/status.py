"""`safefs status`: what the kernel lists as safefs mounts, and what their daemons say about themselves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import click

from safefs.cli.tables import print_details, print_rows, problem_text
from safefs.control import LiveMount, find_mount, find_mounts, request
from safefs.errors import SafefsError

_HEAD_KEYS = ("mountpoint", "source", "live", "problem")


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
    click.echo(json.dumps(report, indent=2)) if as_json else _print_report(report)
    if not report["live"]:
        raise SafefsError(f"{mountpoint}: {report['problem']}", errno.ENOTCONN)


def describe(mount: LiveMount) -> dict[str, Any]:
    """One mount as a flat report; where `live` is false, the daemon does not answer, and `problem` says how."""
    report: dict[str, Any] = {"mountpoint": os.fspath(mount.mountpoint), "source": mount.source}
    try:
        answer = request(mount.socket_path, {"op": "status"})
    except SafefsError as error:
        return {**report, "live": False, "problem": error.message}
    return {**report, "live": True, **answer}


def _print_table(reports: list[dict[str, Any]]) -> None:
    if not reports:
        click.echo("no safefs mounts")
        return
    rows = []
    for report in reports:
        daemon = "live" if report["live"] else report["problem"]
        if report.get("lock_problem"):
            daemon += f"; {problem_text(report['lock_problem'])}"
        rows.append((report["mountpoint"], report["source"], daemon, report.get("pid", ""), report.get("drafts", "")))
    print_rows(("mountpoint", "source", "daemon", "pid", "drafts"), rows)


def _print_report(report: dict[str, Any]) -> None:
    keys = (*_HEAD_KEYS, *(key for key in report if key not in _HEAD_KEYS))
    problem = report.get("lock_problem")
    shown = {**report, "lock_problem": problem_text(problem) if problem else None}
    print_details((key, shown[key]) for key in keys if key in report and (key != "lock_problem" or problem))
