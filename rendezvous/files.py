"""The few files that the rendezvous keeps: private ones are 0600 or refused, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from crossedge.wire.errors import ConfigError


def read_private(path: Path, what: str) -> bytes:
    """Return the content of a private file.

    A credential that the service manager hands over is readable by its group through an access list, and by
    nobody else; only there that bit is no fault.

    Raises:
        ConfigError: it cannot be read, or others than its owner can.
    """
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    handed_over = credentials is not None and path.parent == Path(credentials)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (0o037 if handed_over else 0o077):
                raise ConfigError(path, "", f"mode 0600 of {what} (it is {mode & 0o7777:04o}: chmod 600)")
            return file.read(1 << 16)
    except OSError as error:
        raise ConfigError(path, "", f"{what} ({error.strerror})") from error


def create_private(path: Path, content: bytes) -> None:
    """Write a new private file, mode 0600.

    Raises:
        FileExistsError: it is there already; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_all(descriptor, content)
    finally:
        os.close(descriptor)
    _sync_directory(path.parent)


def write_atomic(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file so that after a crash either the old content is there or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        _write_all(descriptor, content)
    finally:
        os.close(descriptor)
    fresh.rename(path)
    _sync_directory(path.parent)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
