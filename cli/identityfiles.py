"""Files of the identity commands: read and written with one clear line for what is wrong."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from crossedge.host.files import PrivateFileError, read_private, write_atomic
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.keyfiles import KeyKind, load_key

READ_LIMIT: Final = 1024 * 1024
"""Bytes of the largest file that is read: a bundle with a full blocklist is half of it."""

DAY: Final = 86400


def under_root(path: Path | None, default: Path) -> Path:
    """Return a path of the command line; where none is given the default, below `--root`."""
    root: Path = click.get_current_context().find_object(Path) or Path("/")
    return path or root / default


def read_file(path: Path, what: str) -> bytes:
    """Return a file's content, or of standard input for "-"; `what` says what it should be."""
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read(READ_LIMIT)
        with path.open("rb") as file:
            return file.read(READ_LIMIT)
    except OSError as error:
        raise ConfigError(path, "", f"{what}; {error.strerror or error}") from error


def write_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all, or to standard output for "-"."""
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    try:
        write_atomic(path, text.encode(), mode)
    except OSError as error:
        raise ConfigError(path, "", f"to be able to write it; {error.strerror or error}") from error


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Make a directory and those above it, where they are missing."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            path, "", f"to be able to make this directory; {error.strerror or error}"
        ) from error


def read_key(path: Path, kind: KeyKind) -> bytes:
    """Return the 32 private bytes of a key file that only its owner may read."""
    try:
        text = read_private(path)
    except PrivateFileError as error:
        raise ConfigError(path, "", f"a CROSSEDGE {kind.value} file; it {error.why}") from error
    return load_key(path, kind, text)


def unusable(path: Path, what: str, error: WireError) -> ConfigError:
    """Return the error for a file that should be `what` and is not."""
    return ConfigError(path, "", f"{what}; {error.detail or error.reason} ({error.reason})")


def day(unix: float) -> str:
    """Return the date and time of a Unix time, in UTC."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")
