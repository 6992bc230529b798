"""Network namespaces, entered by the calling thread.

A namespace is a property of a thread. A socket or TUN opened inside stays in the namespace that it was opened
in, and threads and processes started inside begin there. So what is needed is mostly: enter, open, leave.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

NAMESPACES = Path("/run/netns")
"""Where named namespaces are kept, as ip-netns(8) does."""

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SHARED = 1 << 20
MNT_DETACH = 2
NS_GET_NSTYPE = 0xB703
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_entered = threading.local()

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def setns(descriptor: int) -> None:
    """Move the calling thread into the network namespace that `descriptor` refers to."""
    _check(_libc.setns(descriptor, CLONE_NEWNET), "cannot enter the network namespace")


def unshare_network() -> None:
    """Move the calling thread into a new, empty network namespace."""
    _check(_libc.unshare(CLONE_NEWNET), "cannot make a network namespace")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Call mount(2); raises `OSError`."""
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode())
    _check(result, f"cannot mount {target}")


def unmount(target: str) -> None:
    """Detach what is mounted at `target`; raises `OSError`."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"cannot unmount {target}")


def _open_current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _move(now: int, target: int) -> None:
    """Move this thread from the namespace that `now` refers to, unless `target` is the same one.

    Moving wants CAP_SYS_ADMIN, which a service that stays in its namespace need not have.
    """
    if not os.path.sameopenfile(now, target):
        setns(target)


def _make_directory() -> None:
    """Make the directory of named namespaces a shared mount, so that other mount namespaces see our names."""
    NAMESPACES.mkdir(mode=0o755, parents=True, exist_ok=True)
    directory = str(NAMESPACES)
    try:
        mount("", directory, "none", MS_SHARED | MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        mount(directory, directory, "none", MS_BIND | MS_REC)
        mount("", directory, "none", MS_SHARED | MS_REC)


class Namespace:
    """A network namespace, held by an open descriptor.

    `with namespace:` moves this thread inside and back; it nests, and other threads are not touched. Do not
    `await` inside: whatever else runs on the loop would run in the namespace too. Use `call` to open things.
    """

    __slots__ = ("_descriptor", "name", "path")

    def __init__(self, descriptor: int, path: Path | None = None, name: str = "") -> None:
        """Take over `descriptor`; `path` is where the namespace is mounted, if `delete` shall unmount it."""
        self._descriptor = descriptor
        self.path = path
        self.name = name

    @classmethod
    def create(cls, name: str, loopback: bool = True) -> Namespace:
        """Make a namespace that has a name in /run/netns, with `lo` up if `loopback`.

        `ip netns exec NAME` finds it. Raises `FileExistsError` if the name is taken.
        """
        if not name or "/" in name or name in (".", ".."):
            raise ValueError(f"{name!r} cannot name a network namespace")
        _make_directory()
        path = NAMESPACES / name
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        try:
            namespace = cls.anonymous(loopback)
            try:
                with namespace:
                    mount("/proc/thread-self/ns/net", str(path), "none", MS_BIND)
            except BaseException:
                namespace.close()
                raise
        except BaseException:
            path.unlink()
            raise
        namespace.path, namespace.name = path, name
        return namespace

    @classmethod
    def anonymous(cls, loopback: bool = True) -> Namespace:
        """Make a namespace without a name: it ends with the last descriptor, socket and process in it."""
        before = _open_current()
        try:
            unshare_network()
            try:
                namespace = cls(_open_current())
                if loopback:
                    set_loopback_up()
            finally:
                setns(before)
        finally:
            os.close(before)
        return namespace

    @classmethod
    def open(cls, target: str | os.PathLike[str] | int) -> Namespace:
        """Open a namespace by its path, by the id of a process in it, or by its name in /run/netns.

        Raises `OSError`: `ENOENT` for what is not there, `EINVAL` for a path that is no network namespace.
        """
        if isinstance(target, int):
            path = Path(f"/proc/{target}/ns/net")
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        text = os.fspath(target)
        path = Path(text) if "/" in text else NAMESPACES / text
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not is_namespace(descriptor):
            os.close(descriptor)
            raise OSError(errno.EINVAL, f"{path} is not a network namespace")
        named = path.parent == NAMESPACES
        return cls(descriptor, path if named else None, path.name if named else "")

    @classmethod
    def current(cls) -> Namespace:
        """Return the namespace that this thread is in."""
        return cls(_open_current())

    def fileno(self) -> int:
        """Return the descriptor, e.g. for `IFLA_NET_NS_FD`; it stays ours."""
        return self._descriptor

    @property
    def inode(self) -> int:
        """The number that tells namespaces apart as long as they live."""
        return os.fstat(self._descriptor).st_ino

    def call(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Return what `function` returns when it is called inside, on this thread."""
        with self:
            return function(*args, **kwargs)

    def __enter__(self) -> Namespace:
        before = _open_current()
        try:
            _move(before, self._descriptor)
        except BaseException:
            os.close(before)
            raise
        stack: list[int] = _entered.__dict__.setdefault("stack", [])
        stack.append(before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = _entered.stack.pop()
        try:
            now = _open_current()
            try:
                _move(now, before)
            finally:
                os.close(now)
        finally:
            os.close(before)

    def enter(self) -> None:
        """Move this thread inside for good: for worker threads and child processes."""
        now = _open_current()
        try:
            _move(now, self._descriptor)
        finally:
            os.close(now)

    def close(self) -> None:
        """Close the descriptor; a named namespace stays. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def delete(self) -> None:
        """Remove the name, if there is one, and close; the namespace ends with the last thing in it."""
        self.close()
        if self.path is None:
            return
        try:
            unmount(str(self.path))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
        self.path.unlink(missing_ok=True)


def is_namespace(descriptor: int) -> bool:
    """Tell whether a descriptor refers to a network namespace."""
    try:
        return fcntl.ioctl(descriptor, NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


def set_loopback_up() -> None:
    """Bring `lo` up in the namespace of the calling thread."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sH14x", b"lo", IFF_UP)
        fcntl.ioctl(control, SIOCSIFFLAGS, request)
