"""The commands and their options; what they do is in the modules beside this one.

Each command imports its own module: `safefs status` is not to wait for what only a scrub needs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import safefs
from safefs.config import known_options
from safefs.errors import SafefsError

# Whether a path can be used is checked later, where the answer can say what to do.
_PATH = click.Path(path_type=Path, readable=False)


class _Group(click.Group):
    """Turns a SafefsError of any command into one line on stderr and exit code 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except SafefsError as error:
            fail(error)


def fail(error: SafefsError) -> None:
    """End the program the way every command of safefs fails."""
    click.echo(f"safefs: {error.message}", err=True)
    sys.exit(1)


def versions() -> str:
    """The versions that decide what works, one a line."""
    return "\n".join(
        (
            f"safefs {safefs.__version__}",
            f"pyfuse3 {_pyfuse3_version()}",
            f"libfuse {_libfuse_version()}",
            f"kernel {os.uname().release}",
        )
    )


def _pyfuse3_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("pyfuse3")
    except metadata.PackageNotFoundError:
        return "is not installed"


def _libfuse_version() -> str:
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            version = ctypes.CDLL(name).fuse_pkgversion
        except (OSError, AttributeError):
            continue
        version.restype = ctypes.c_char_p
        return str(version().decode())
    return "is not installed"


def _print_versions(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(versions())
        context.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions)
def cli() -> None:
    """Make writes to a shared directory safe: a file shows up whole when its writer closes it, or not at all."""


def _mount_epilog() -> str:
    return "Options of -o: " + ", ".join(known_options())


@cli.command(epilog=_mount_epilog())
@click.argument("backing", type=_PATH)
@click.argument("mountpoint", type=_PATH)
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT…]", help="Mount options, separated by commas.")
@click.option("--config", type=_PATH, help="Configuration file (default: /etc/safefs/safefs.toml if present).")
@click.option("--foreground", "-f", is_flag=True, help="Serve in this process and log to stderr.")
@click.option("--log-file", type=_PATH, help="Log to this file.")
@click.option("--ready-fd", type=int, hidden=True, help="Report 'ready' or 'error: …' to this descriptor.")
def mount(
    backing: Path,
    mountpoint: Path,
    options: tuple[str, ...],
    config: Path | None,
    foreground: bool,
    log_file: Path | None,
    ready_fd: int | None,
) -> None:
    """Show the directory BACKING at MOUNTPOINT, with safe writes.

    Returns once the mount is live.  Write the -o options as for mount(8).
    """
    from safefs.cli.mounting import MountRequest, mount_background, mount_foreground

    request = MountRequest(backing, mountpoint, options, config, log_file)
    if foreground:
        mount_foreground(request, ready_fd)
    else:
        mount_background(request)


@cli.command()
@click.argument("mountpoint", type=_PATH)
def umount(mountpoint: Path) -> None:
    """Unmount MOUNTPOINT and wait until its daemon has ended."""
    from safefs.cli.unmounting import unmount

    unmount(mountpoint)


@cli.command()
@click.argument("mountpoint", type=_PATH, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show the live mounts, or the one at MOUNTPOINT."""
    from safefs.cli.status import show_status

    show_status(mountpoint, as_json=as_json)


@cli.command()
@click.argument("path", type=_PATH)
@click.option("--config", type=_PATH, help="Ask this configuration file, not the mount.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def rules(path: Path, config: Path | None, as_json: bool) -> None:
    """Say which class PATH has, and which rule says so.  PATH need not exist."""
    from safefs.cli.rules import show_rules

    show_rules(path, config, as_json=as_json)


_PLACE = click.argument("path", type=_PATH, required=False)
_AT = click.option("--at", "path", type=_PATH, help="A mountpoint or backing directory (default: the only mount).")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cli.command()
@_PLACE
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on.")
@_JSON
def events(path: Path | None, follow: bool, as_json: bool) -> None:
    """Show what happened on the backing directory of PATH, on all nodes."""
    from safefs.cli.events import show_events

    show_events(path, follow=follow, as_json=as_json)


@cli.command()
@click.argument("directory", type=_PATH)
@click.option("--state", type=_PATH, help="The directory that mounts are given with -o state=DIR.")
@click.option("--peer", is_flag=True, help="Find out what two nodes see: run it on both at once.")
@_JSON
def probe(directory: Path, state: Path | None, peer: bool, as_json: bool) -> None:
    """Try what the filesystem of DIRECTORY does with locks and names.  Exit code 1: it is not safe for lease files."""
    from safefs.cli.probe import show_probe

    show_probe(directory, state=state, peer=peer, as_json=as_json)


class _LocksGroup(click.Group):
    """Takes no path where a command stands: says where it goes."""

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(context, args[0]) is None:
            text = f"no command {args[0]!r}: write `safefs locks --at PATH` or `safefs locks break PATH`"
            raise SafefsError(text, errno.EINVAL)
        return super().resolve_command(context, args)


@cli.group(cls=_LocksGroup, invoke_without_command=True)
@click.option(
    "--at", "path", type=_PATH, help="A path on the mount (default: that of the working directory, or the only one)."
)
@_JSON
@click.pass_context
def locks(context: click.Context, path: Path | None, as_json: bool) -> None:
    """Show who holds and who waits for which lock, on all nodes."""
    if context.invoked_subcommand is None:
        from safefs.cli.locks import show_locks

        show_locks(path, as_json=as_json)


@locks.command("break")
@click.argument("path", type=click.Path(readable=False))  # a Path would lose the slash at its end
def locks_break(path: str) -> None:
    """Take all locks on PATH from their holders.

    What these go on writing through the files fails with EIO, and is not published.  PATH with a slash at its end is
    what a directory has of names that are being made in it.
    """
    from safefs.cli.locks import break_locks

    break_locks(path)


@cli.command()
@click.argument("path", type=_PATH)
@_JSON
def show(path: Path, as_json: bool) -> None:
    """Show what was written down when the file PATH was published: digest, node, uid, pid, command, time."""
    from safefs.cli.scrub import show_version

    show_version(path, as_json=as_json)


@cli.command()
@click.argument("path", type=_PATH)
@_JSON
def history(path: Path, as_json: bool) -> None:
    """List the versions that PATH showed before, as far as they are retained (-o retain=TIME, or by rule)."""
    from safefs.cli.history import show_history

    show_history(path, as_json=as_json)


@cli.command()
@click.argument("version", metavar="PATH@N")
@click.option("--to", "target", type=_PATH, help="Another name on the mount.")
def restore(version: str, target: Path | None) -> None:
    """Publish version N of `safefs history PATH` again."""
    from safefs.cli.history import restore_version

    restore_version(version, target)


@cli.command()
@click.argument("path", type=_PATH)
@click.option("--repair", type=click.Choice(["quarantine"]), help="What becomes of damaged files.")
@click.option("--resume", is_flag=True, help="Go on where the last scrub of PATH was interrupted.")
@click.option("--jobs", type=click.IntRange(1, 256), default=min(8, os.cpu_count() or 1), help="Files side by side.")
@click.option("--config", type=_PATH, help="Take the rules from this configuration file.")
@_JSON
def scrub(path: Path, repair: str | None, resume: bool, jobs: int, config: Path | None, as_json: bool) -> None:
    """Read all files below PATH and compare them with their digests and with what their names promise.

    Also a tree that safefs never wrote.  Exit code: 0 all is well, 1 something is damaged, 2 something cannot be read.
    """
    from safefs.cli.scrub import scrub_tree

    scrub_tree(path, config, threads=jobs, repair=repair is not None, resume=resume, as_json=as_json)


@cli.group()
def quarantine() -> None:
    """What was written and not published: look at it, publish it after all, or remove it."""


@quarantine.command("list")
@_PLACE
@_JSON
def quarantine_list(path: Path | None, as_json: bool) -> None:
    """List what is in quarantine on the backing directory of PATH."""
    from safefs.cli.quarantine import list_quarantine

    list_quarantine(path, as_json=as_json)


@quarantine.command("show")
@click.argument("write_id", metavar="ID")
@_AT
@_JSON
def quarantine_show(write_id: str, path: Path | None, as_json: bool) -> None:
    """Show all that is known of one file."""
    from safefs.cli.quarantine import show_quarantined

    show_quarantined(write_id, path, as_json=as_json)


@quarantine.command("restore")
@click.argument("write_id", metavar="ID")
@_AT
@click.option("--to", "target", type=_PATH, help="Another name on the mount than the one it was meant for.")
def quarantine_restore(write_id: str, path: Path | None, target: Path | None) -> None:
    """Publish a file under the name that it was meant for, with the checks of any close."""
    from safefs.cli.quarantine import restore_quarantined

    restore_quarantined(write_id, path, target)


@quarantine.command("purge")
@click.argument("write_ids", metavar="[ID]…", nargs=-1)
@_AT
@click.option("--older", metavar="TIME", help="What is older than 90s, 15m, 12h or 30d.")
@click.option("--over", metavar="SIZE", help="The oldest, until all of it takes no more than 500M, 20G or 1T.")
@click.option("--all", "everything", is_flag=True, help="Everything.")
def quarantine_purge(
    write_ids: tuple[str, ...], path: Path | None, older: str | None, over: str | None, everything: bool
) -> None:
    """Remove files from quarantine for good."""
    from safefs.cli.quarantine import purge

    purge(write_ids, path, older=older, over=over, everything=everything)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=_PATH)
@click.argument("mountpoint", type=_PATH)
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT…]")
@click.option("-s", "_sloppy", is_flag=True, help="Accepted for mount(8).")
@click.option("-f", "fake", is_flag=True, help="Check everything, mount nothing.")
@click.option("-n", "_no_mtab", is_flag=True, help="Accepted for mount(8).")
@click.option("-v", "_verbose", is_flag=True, help="Accepted for mount(8).")
@click.option("-t", "_type", help="Accepted for mount(8).")
def mount_helper(source: Path, mountpoint: Path, options: tuple[str, ...], fake: bool, **_ignored: object) -> None:
    """What mount(8) calls for `mount -t fuse.safefs SOURCE MOUNTPOINT` as /sbin/mount.fuse.safefs."""
    from safefs.cli.mounting import MountRequest, mount_background

    request = MountRequest(source, mountpoint, options)
    if fake:
        request.settings()
    else:
        mount_background(request)


def main() -> None:
    """The program `safefs`."""
    _run(cli, "safefs")


def mount_main() -> None:
    """The program `mount.fuse.safefs`."""
    _run(mount_helper, "mount.fuse.safefs")


def _run(command: Callable[..., Any], name: str) -> None:
    try:
        command(prog_name=name)
    except SafefsError as error:
        fail(error)
