"""`safefs probe`: what the filesystem of a directory does with locks and names, alone or between two nodes."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import click

from safefs.cli.places import identities_of
from safefs.cli.tables import print_rows
from safefs.errors import SafefsError
from safefs.family import mounted_at
from safefs.identity import SERVICE, Identities
from safefs.model import STATE_NAME
from safefs.probe import Finding, probe_alone, probe_with_peer, record


def show_probe(directory: Path, *, state: Path | None, peer: bool, as_json: bool) -> None:
    """Print the findings; exit code 1 when lease files would not be safe there.

    What two nodes find out is put on record in the state directory, where `-o locks=native` looks for it.
    """
    path = Path(os.path.realpath(state or directory))
    if not path.is_dir():
        raise SafefsError(f"{state or directory}: no such directory", errno.ENOENT)
    kept = path if state else path / STATE_NAME
    identities = identities_of(kept) if kept.exists() else Identities(impersonate=os.geteuid() == 0)
    if identities.service_uid != os.geteuid():
        path = kept  # a service user's, who has no rights elsewhere: nor has root then
    try:
        with identities.acting(SERVICE):
            findings = _findings(path, kept, peer=peer)
    except KeyboardInterrupt:
        raise SafefsError("the probe was interrupted", errno.EINTR) from None
    if as_json:
        click.echo(json.dumps([vars_of(finding) for finding in findings], indent=2))
    else:
        print_rows(("", "result", ""), [(f.what, f.result, _word(f)) for f in findings])
    if any(finding.good is False and "excludes" not in finding.what for finding in findings):
        sys.exit(1)


def _findings(path: Path, kept: Path, *, peer: bool) -> list[Finding]:
    mounted = mounted_at(path)
    reach, by = mounted.reach()
    findings = probe_alone(path, mounted)
    findings.insert(1, Finding("its fcntl locks, by its options, keep out", f"{reach.value} ({by})"))
    if peer:
        click.echo("waiting for the other node to run `safefs probe --peer` on this directory", err=True)
        found, verdict = probe_with_peer(path, mounted)
        findings += found
        click.echo(f"recorded in {record(kept, verdict)}", err=True)
    return findings


def vars_of(finding: Finding) -> dict[str, object]:
    """For JSON."""
    return {"what": finding.what, "result": finding.result, "good": finding.good}


def _word(finding: Finding) -> str:
    return "" if finding.good is None else "good" if finding.good else "bad"
