"""Files that survive a crash, and files that only their owner may read."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

PRIVATE_LIMIT = 64 * 1024
"""Largest private file that is read, in bytes: keys are small, and a wrong path may be anything."""


class PrivateFileError(ValueError):
    """A private file that cannot be used: `path` and `why`, in words for the one who runs the program."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why


def write_atomic(path: str | os.PathLike[str], data: bytes, mode: int = 0o600) -> None:
    """Write a file so that a reader or a crash sees either all of the old or all of the new content.

    The content goes to a temporary file in the same directory, which is flushed to disk and renamed over
    `path`; then the directory is flushed, so that the new name is durable when this returns. `mode` is set
    exactly, whatever the umask. A failure leaves no temporary file and raises `OSError`.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(target.parent)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory, so that names made, renamed or removed in it are durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: str | os.PathLike[str], limit: int = PRIVATE_LIMIT) -> bytes:
    """Return the content of a file that only its owner may read or write.

    Raises `PrivateFileError` where the file is missing, unreadable, no regular file, owned by another user
    than root or us, open to group or others, or larger than `limit` bytes. What is checked is what is read:
    the checks are made on the open file.
    """
    target = Path(path)
    try:
        # Not blocking, because opening a FIFO would otherwise wait for a writer.
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PrivateFileError(target, f"cannot be read: {os.strerror(error.errno or 0)}") from error
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise PrivateFileError(target, "is not a regular file")
        if status.st_uid not in (0, os.geteuid()):
            raise PrivateFileError(target, f"belongs to user {status.st_uid}, not to us or root")
        if mode & 0o077:
            raise PrivateFileError(target, f"can be used by others (mode {mode:04o}): chmod 600 it")
        data = b""
        while len(data) <= limit and (part := os.read(descriptor, limit + 1 - len(data))):
            data += part
    except OSError as error:
        raise PrivateFileError(target, f"cannot be read: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise PrivateFileError(target, f"is larger than {limit} bytes")
    return data
