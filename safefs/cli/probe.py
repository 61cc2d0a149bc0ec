"""`safefs probe`: what the filesystem of a directory does with locks and names, alone or between two nodes."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import click

from safefs.cli.tables import print_rows
from safefs.errors import SafefsError
from safefs.probe import Finding, filesystem_type, probe_alone, probe_with_peer


def show_probe(directory: Path, *, peer: bool, as_json: bool) -> None:
    """Print the findings; exit code 1 when lease files would not be safe there."""
    path = Path(os.path.realpath(directory))
    if not path.is_dir():
        raise SafefsError(f"{directory}: no such directory", errno.ENOENT)
    findings = probe_alone(path, filesystem_type(path))
    if peer and not any(finding.good is False for finding in findings):
        click.echo("waiting for the other node to run `safefs probe --peer` on this directory", err=True)
        findings += probe_with_peer(path)
    if as_json:
        click.echo(json.dumps([vars_of(finding) for finding in findings], indent=2))
    else:
        print_rows(("", "result", ""), [(f.what, f.result, _word(f)) for f in findings])
    if any(finding.good is False and "excludes" not in finding.what for finding in findings):
        sys.exit(1)


def vars_of(finding: Finding) -> dict[str, object]:
    """For JSON."""
    return {"what": finding.what, "result": finding.result, "good": finding.good}


def _word(finding: Finding) -> str:
    return "" if finding.good is None else "good" if finding.good else "bad"
