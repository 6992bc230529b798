"""The server: sockets, timers and files around a `Service`. It holds no rules."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from crossedge.rendezvous.config import RendezvousConfig, rooted
from crossedge.rendezvous.control import ControlSocket
from crossedge.rendezvous.files import write_atomic
from crossedge.rendezvous.gathering import TRAIN_BYTES, Gathering
from crossedge.rendezvous.service import Service
from crossedge.rendezvous.sockets import (
    ANCILLARY_SIZE,
    NO_SEGMENTATION,
    Ancillary,
    ServerSocket,
    has_ipv6,
    local_address,
    open_socket,
    segment_ancillary,
    segment_size,
    source_ancillary,
)
from crossedge.rendezvous.stunserver import address_group
from crossedge.wire.armour import dearmour
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.limits import MAX_BLOCKLIST

log = logging.getLogger(__name__)

BATCH = 64
"""Receives per wake-up of one socket."""
DATAGRAM = 1 << 16
BUFFER = TRAIN_BYTES + DATAGRAM
CHECKPOINT_INTERVAL = 5.0
"""Seconds between looks whether a lease came, moved or ended since the checkpoint was written."""
BLOCKLIST_INTERVAL = 10.0
"""Seconds between looks whether a blocklist file has changed."""
MAX_CHECKPOINT = 128 << 20
MAX_LOCALS = 256
"""Own addresses that wildcard sockets may learn."""


def boottime() -> float:
    """Return seconds of CLOCK_BOOTTIME, which counts suspended time too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def resident_memory() -> int:
    """Return the bytes of memory that this process has now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Server:
    """A running rendezvous."""

    def __init__(
        self,
        config: RendezvousConfig,
        key: ControlKey,
        root: Path = Path("/"),
        clock: Callable[[], float] = boottime,
    ) -> None:
        """Open the sockets.

        Raises:
            ConfigError: an address cannot be opened; it names it.
        """
        self._config = config
        self._root = root
        self._clock = clock
        self._sockets: list[ServerSocket] = []
        self._routes: list[tuple[ServerSocket, Ancillary]] = []
        """For each local of the service: its socket, and what makes it send from that address."""
        self._learned: dict[tuple[int, str], int] = {}
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._gathering = Gathering(self._view)
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._stop = asyncio.Event()
        self._blocklist_seen: dict[Path, tuple[int, int, int]] = {}
        self.failed: Counter[str] = Counter()
        """Sends that the kernel refused, by reason."""
        now = clock()
        self.service = Service(
            key,
            config.networks,
            (),
            os.urandom,
            now,
            time.time() - now,
            config.limits,
            config.relay,
        )
        try:
            self._open_all()
        except BaseException:
            self._close_all()
            raise

    @property
    def endpoints(self) -> list[UdpEndpoint]:
        """Where the server listens."""
        return [opened.bound for opened in self._sockets]

    async def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until `stop` or a signal; leave a checkpoint for the next life.

        Raises:
            ConfigError: the control socket cannot be made.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_blocklists)
        control = ControlSocket({"status": self.status})
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._start_control(control)
            self._load_blocklists()
            self._restore()
            for index, opened in enumerate(self._sockets):
                loop.add_reader(opened.socket.fileno(), partial(self._readable, index))
            self._flush()
            tasks = [
                asyncio.create_task(self._keep_checkpoint()),
                asyncio.create_task(self._watch_blocklists()),
            ]
            if ready is not None:
                ready()
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for opened in self._sockets:
                loop.remove_reader(opened.socket.fileno())
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            if self._timer is not None:
                self._timer.cancel()
            await control.stop()
            self._write_checkpoint(self.service.checkpoint())
            self._close_all()

    async def _start_control(self, control: ControlSocket) -> None:
        path = self._path(self._config.control_socket)
        try:
            await control.start(path)
        except OSError as error:
            raise ConfigError(path, "", f"to be able to listen there ({error.strerror})") from error

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def status(self) -> Mapping[str, Any]:
        """Return what `crossedge-rendezvous status` shows."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            **self.service.status(self._clock()),
            "listen": [
                {"endpoint": str(opened.bound), "gso": opened.gso, "gro": opened.gro}
                for opened in self._sockets
            ],
            "failed_sends": dict(self.failed),
            "memory_bytes": resident_memory(),
            "memory_peak_bytes": usage.ru_maxrss * 1024,
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        }

    # Sockets

    def _open_all(self) -> None:
        config = self._config
        for listen in config.listen:
            v6 = ":" in listen.host
            if listen.host == "::" and len(config.listen) > 1 and not has_ipv6():
                log.warning("not listening on %s: the kernel has no IPv6", listen)
                continue
            hosts = [listen.host, *(host for host in config.alternate if (":" in host) == v6)]
            ports = (listen.port, listen.port + 1)
            base = len(self._routes)
            group = address_group(tuple(hosts), ports, base, config.public)
            for host in hosts:
                for port in ports:
                    self._sockets.append(open_socket(UdpEndpoint(host, port), config.disable_offloads))
            for local, opened in zip(group, self._sockets[base:], strict=True):
                self.service.add_local(local)
                self._routes.append((opened, []))

    def _close_all(self) -> None:
        for opened in self._sockets:
            opened.socket.close()

    def _local(self, index: int, ancillary: Ancillary) -> int:
        """Return the number of the local that a datagram came to, learning wildcard sockets' addresses."""
        opened = self._sockets[index]
        if not opened.wildcard:
            return index
        host = local_address(ancillary)
        if not host:
            return index
        known = self._learned.get((index, host))
        if known is not None:
            return known
        if len(self._routes) >= MAX_LOCALS:
            self.failed["too-many-addresses"] += 1
            return index
        first = index - index % 2
        pair = self._sockets[first : first + 2]
        base = len(self._routes)
        ports = (pair[0].bound.port, pair[1].bound.port)
        for turn, local in enumerate(address_group((host,), ports, base, self._config.public)):
            self.service.add_local(local)
            self._routes.append((pair[turn], source_ancillary(host)))
            self._learned[first + turn, host] = base + turn
        return self._learned[index, host]

    def _readable(self, index: int) -> None:
        sock = self._sockets[index].socket
        receive, view, gathering = sock.recvmsg_into, self._view, self._gathering
        now = self._clock()
        for _ in range(BATCH):
            start = gathering.used
            try:
                size, ancillary, _, address = receive([view[start : start + DATAGRAM]], ANCILLARY_SIZE)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:  # What an earlier send met, told late.
                self.failed[errno.errorcode.get(error.errno or 0, "unknown")] += 1
                continue
            source = UdpEndpoint(address[0], address[1])
            local = self._local(index, ancillary) if ancillary else index
            segment = segment_size(ancillary) if ancillary else 0
            if not segment and gathering.add(size, source, local):
                continue
            self._forward_gathered(now)
            if start:
                view[:size] = view[start : start + size]
            if segment or not gathering.add(size, source, local):
                self._take(size, segment, source, local, now)
        self._forward_gathered(now)
        self._flush()

    def _forward_gathered(self, now: float) -> None:
        gathered = self._gathering.take()
        if gathered is not None:
            self._take(gathered.size, gathered.segment, gathered.source, gathered.local, now)

    def _take(self, size: int, segment: int, source: UdpEndpoint, local: int, now: float) -> None:
        """Take the train, or the one datagram, that begins the buffer."""
        train = self._view[:size]
        for run in self.service.receive_train(train, segment, source, local, now):
            self._send(train[run.start : run.end], segment, run.destination, run.local)

    def _flush(self) -> None:
        poll = self.service.poll_transmit
        while (transmit := poll()) is not None:
            self._send(transmit.datagram, 0, transmit.destination, transmit.local)
        self._arm()

    def _send(self, data: bytes | memoryview, segment: int, destination: UdpEndpoint, local: int) -> None:
        opened, source = self._routes[local]
        try:
            if segment and len(data) > segment:
                if not opened.gso:
                    self._send_segments(data, segment, destination, local)
                    return
                opened.socket.sendmsg([data], [*source, *segment_ancillary(segment)], 0, destination)
            elif source:
                opened.socket.sendmsg([data], source, 0, destination)
            else:
                opened.socket.sendto(data, destination)
        except OSError as error:
            if segment and len(data) > segment and error.errno in NO_SEGMENTATION:
                self._send_segments(data, segment, destination, local)
                return
            self.failed[errno.errorcode.get(error.errno or 0, "unknown")] += 1

    def _send_segments(
        self, data: bytes | memoryview, segment: int, destination: UdpEndpoint, local: int
    ) -> None:
        for start in range(0, len(data), segment):
            self._send(data[start : start + segment], 0, destination, local)

    # Time

    def _arm(self) -> None:
        due = self.service.next_deadline()
        if self._timer is not None:
            if due == self._due:
                return
            self._timer.cancel()
        self._due = due
        delay = max(0.0, due - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._clock()
        self.service.set_clock(time.time() - now)
        self.service.handle_timeout(now)
        self._flush()

    # Files

    def _path(self, path: Path) -> Path:
        return rooted(self._root, path)

    async def _keep_checkpoint(self) -> None:
        written = self.service.registry.moves
        while True:
            await asyncio.sleep(CHECKPOINT_INTERVAL)
            moves = self.service.registry.moves
            if moves != written and await asyncio.to_thread(
                self._write_checkpoint, self.service.checkpoint()
            ):
                written = moves

    def _write_checkpoint(self, content: bytes) -> bool:
        try:
            write_atomic(self._path(self._config.state_dir) / "leases", content)
        except OSError as error:
            self.failed["checkpoint"] += 1
            log.warning("cannot write the lease checkpoint: %s", error)
            return False
        return True

    async def _watch_blocklists(self) -> None:
        while True:
            await asyncio.sleep(BLOCKLIST_INTERVAL)
            self._load_blocklists()
            self._flush()

    def _restore(self) -> None:
        path = self._path(self._config.state_dir) / "leases"
        try:
            with path.open("rb") as file:
                count = self.service.restore(file.read(MAX_CHECKPOINT), self._clock())
        except FileNotFoundError:
            return
        except (OSError, WireError) as error:
            log.warning("cannot use the lease checkpoint %s: %s", path, error)
            return
        log.info("telling %d nodes of an earlier life that the server restarted", count)

    def _reload_blocklists(self) -> None:
        self._blocklist_seen.clear()
        self._load_blocklists()
        self._flush()

    def _load_blocklists(self) -> None:
        for configured in self._config.blocklists:
            path = self._path(configured)
            try:
                stat = path.stat()
                seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if self._blocklist_seen.get(path) == seen:
                    continue
                self._blocklist_seen[path] = seen
                blocklist = self.service.set_blocklist(read_blocklist(path), self._clock())
            except (OSError, WireError) as error:
                if getattr(error, "reason", "") != "blocklist-stale":
                    log.warning("cannot use the blocklist %s: %s", path, error)
                continue
            log.info("blocklist %d of network %s: %s", blocklist.serial, blocklist.network.hex(), path)


def read_blocklist(path: Path) -> bytes:
    """Return the encoded blocklist in a file; `WireError` or `OSError` where there is none."""
    with path.open("rb") as file:
        text = file.read(2 * MAX_BLOCKLIST + 4096)
    return dearmour("BLOCKLIST", text, MAX_BLOCKLIST)


def notify_ready() -> None:
    """Tell the service manager that the server listens, where one started us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
