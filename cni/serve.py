"""The daemon's side of the shim: requests are served by threads, the event loop only accepts.

What the daemon gives to it: `CniServer(paths, node, health)`, `start(loop)`, `stop()`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import threading
from array import array
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Final

from crossedge.cni import device, spec
from crossedge.cni.commands import Host, answer, settle, sweep
from crossedge.cni.ipam import SUSPICION
from crossedge.cni.keeper import Keeper
from crossedge.cni.node import Node, Paths, boot_id, write_node
from crossedge.cni.recovery import recover
from crossedge.cni.spec import CniError
from crossedge.cni.store import Store
from crossedge.host.clock import boottime, process_start
from crossedge.host.namespaces import Namespace, is_namespace
from crossedge.host.netlink import Netlink

MAGIC: Final = b"CECNI1"
HEAD: Final = struct.Struct(">6s16sII")
"""Magic, token, length of the variables, length of stdin."""
ANSWER: Final = struct.Struct(">BI")
"""Exit status, length of the output."""
VARIABLES_LIMIT: Final = 256 * 1024
WORKERS: Final = 16
WAITING: Final = 1024
"""Most requests that are served or wait for a thread; a further one is turned away, and done locally."""
GATHER: Final = 0.05
"""Seconds in which links that go are gathered, to be deleted together: each deletion holds up the kernel."""
TIMEOUT: Final = 20.0
"""Seconds for a shim to say what it wants."""

log = logging.getLogger(__name__)


class CniServer:
    """Serves the plugin's binary, keeps what it made, and recovers what crashes left."""

    def __init__(
        self,
        paths: Paths,
        node: Node,
        health: Callable[[], CniError | None] = lambda: None,
        *,
        workers: int = WORKERS,
    ) -> None:
        """Nothing is done before `start`.

        Args:
            paths: where socket, store and the rest are.
            node: what pods get.
            health: called by threads for STATUS: a `CniError` of code 50 or 51, or None.
            workers: threads that serve requests.
        """
        self._paths = paths
        self._node = node
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: socket.socket | None = None
        self._local = threading.local()
        self._opened: list[Netlink] = []
        self._own = Namespace.current()
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._counting = threading.Lock()
        self._doomed = threading.Event()
        self._stopping = threading.Event()
        self._reaper: threading.Thread | None = None
        self._timer: asyncio.TimerHandle | None = None
        boot = boot_id()
        self.store = Store(paths.state, boot, boottime)
        self.host = Host(
            store=self.store,
            node=lambda: self._node,
            boot=boot,
            netlink=self._netlink,
            own=self._own.inode,
            reap=self._doomed.set,
            health=health,
            kernel=threading.Lock(),
        )
        self._keeper = Keeper(self.host, self._in_background)
        self.served: Counter[str] = Counter()
        """Requests by operation, and those turned away."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Recover what is left of an earlier life, then listen; raises `OSError` or `CniError`."""
        write_node(self._paths, self._node)
        self._stopping.clear()
        self._pool = ThreadPoolExecutor(self._workers, "cni", initializer=self._enter)
        with ExitStack() as undo:
            undo.callback(self.stop)
            self._loop = loop
            recover(self.store, self._netlink())
            sweep(self.host)
            self._reaper = threading.Thread(target=self._reap, name="cni-reaper", daemon=True)
            self._reaper.start()
            self._keeper.start(loop, self._own)
            self._listen(loop)
            self._timer = loop.call_later(SUSPICION, self._look)
            undo.pop_all()

    def change(self, node: Node) -> None:
        """Give pods something else from now on, also those that are there; raises `OSError`."""
        self._node = node
        self._keeper.look_again()
        write_node(self._paths, node)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        path = self._paths.socket
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._listener = listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        listener.bind(str(fresh))
        fresh.chmod(0o600)
        listener.listen(WAITING)
        listener.setblocking(False)
        fresh.rename(path)
        loop.add_reader(listener, self._accept)

    def stop(self) -> None:
        """Stop serving, after what is being served; pods stay as they are. May be called twice."""
        if self._listener is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._listener)
            with suppress(OSError):
                self._paths.socket.unlink()
            self._listener.close()
            self._listener = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._keeper.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._stopping.set()
        self._doomed.set()
        if self._reaper is not None:
            self._reaper.join()
            self._reaper = None
        for netlink in self._opened:
            netlink.close()
        self._opened.clear()
        self._local = threading.local()
        self.store.close()
        self._loop = None

    # Threads

    def _enter(self) -> None:
        """Begin a thread in the daemon's namespace, whatever the thread was in that made it."""
        self._own.enter()

    def _netlink(self) -> Netlink:
        found: Netlink | None = getattr(self._local, "netlink", None)
        if found is None:
            found = self._own.call(Netlink)
            self._local.netlink = found
            self._opened.append(found)
        return found

    def _reap(self) -> None:
        with self._own.call(Netlink) as netlink:
            while True:
                self._doomed.wait()
                self._stopping.wait(GATHER)
                self._doomed.clear()
                try:
                    device.reap(netlink)
                except (CniError, OSError) as error:
                    log.error("links that were taken down stay for now: %s", error)
                if self._stopping.is_set():
                    return

    def _in_background(self, job: Callable[[], None]) -> None:
        if self._pool is not None:
            self._pool.submit(self._guarded, job)

    @staticmethod
    def _guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except (CniError, OSError) as error:
            log.error("%s", error)
        except Exception:  # a fault must not end the keeping of pods unseen
            log.exception("a task of the CNI server failed")

    def _look(self) -> None:
        """Look for leaks, now and then."""
        if self._loop is None:
            return
        self._timer = self._loop.call_later(SUSPICION, self._look)
        self._in_background(self._recover)

    def _recover(self) -> None:
        settle(self.host)
        for entry in recover(self.store, self._netlink()):
            log.warning(
                "freed %s of %s/%s, which is gone",
                ", ".join(map(str, entry.addresses)),
                entry.container,
                entry.interface,
            )

    # Requests

    def _accept(self) -> None:
        listener, pool = self._listener, self._pool
        if listener is None or pool is None:
            return
        for _ in range(self._workers):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept a request: %s", error)
                return
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            process, user, _ = struct.unpack("3i", credentials)
            if self._waiting >= WAITING:
                self.served["turned away"] += 1
                sock.close()
                continue
            with self._counting:
                self._waiting += 1
            pool.submit(self._serve, sock, process, user)

    def _serve(self, sock: socket.socket, process: int, user: int) -> None:
        try:
            with sock:
                sock.settimeout(TIMEOUT)
                self._converse(sock, process, user)
        except OSError as error:
            log.info("a request ended early: %s", error)
        except Exception:  # a fault in one request must not end the daemon; the shim does it locally
            log.exception("a request failed")
        finally:
            with self._counting:
                self._waiting -= 1

    def _converse(self, sock: socket.socket, process: int, user: int) -> None:
        head, ancillary, _, _ = sock.recvmsg(HEAD.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        with ExitStack() as stack:
            netns = _received(ancillary)
            if netns is not None:
                stack.callback(netns.close)
                if not is_namespace(netns.fileno()):
                    netns = None
            head += _exactly(sock, HEAD.size - len(head))
            magic, token, variables_length, stdin_length = HEAD.unpack(head)
            if magic != MAGIC or variables_length > VARIABLES_LIMIT or stdin_length > spec.CONFIG_LIMIT:
                raise OSError("not a request of this version's shim")
            variables = _variables(_exactly(sock, variables_length))
            stdin = _exactly(sock, stdin_length)
            if user not in (0, os.geteuid()):  # whatever the mode of the socket became
                self._refuse(sock, user)
                return
            since = None
            if variables.get("CNI_COMMAND") == "GC":
                with suppress(OSError):
                    since = process_start(process)
            text = token.decode("ascii", "replace")
            status, output = answer(self.host, variables, stdin, netns, text, since)
            command = variables.get("CNI_COMMAND", "")
            with self._counting:
                self.served[command if command in spec.COMMANDS else "unknown"] += 1
        sock.sendall(ANSWER.pack(status, len(output)) + output)

    def _refuse(self, sock: socket.socket, user: int) -> None:
        with self._counting:
            self.served["refused"] += 1
        output = CniError(spec.REFUSED, f"meshd refuses user {user}: the plugin must be run by root").encode()
        sock.sendall(ANSWER.pack(1, len(output)) + output)


def _received(ancillary: list[tuple[int, int, bytes]]) -> Namespace | None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array("i")
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            for further in descriptors[1:]:
                os.close(further)
            if descriptors:
                return Namespace(descriptors[0])
    return None


def _exactly(sock: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = sock.recv(min(length, 1 << 16))
        if not part:
            raise OSError("the shim went away")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _variables(data: bytes) -> dict[str, str]:
    found = {}
    for pair in data.split(b"\0"):
        key, separator, value = pair.partition(b"=")
        if separator:
            found[key.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
    return found
