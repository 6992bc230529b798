"""The shell around the UDP sockets: gathers what a wake-up can read, sends trains, copes with refusals.

Holds no rules of the protocol. A train goes out by one call with UDP_SEGMENT; where kernel or device refuse
that, as single datagrams. What the kernel has no room for waits here, bounded, until the socket is writable,
and `blocked` is told, so that the TUN is not read meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final

from crossedge.host.clock import realtime_offset
from crossedge.host.udp import (
    GRO_SIZE,
    SCM_TIMESTAMPNS,
    SEGMENT,
    SOL_UDP,
    STAMP,
    UDP_GRO,
    UDP_SEGMENT,
    UdpSocket,
)
from crossedge.meshd.inbound import Arrival
from crossedge.wire.endpoint import (
    DirectEndpoint,
    Endpoint,
    RelayEndpoint,
    SocketEndpoint,
    UdpEndpoint,
    remote_of,
)
from crossedge.wire.relay import HEADER as RELAY_HEADER
from crossedge.wire.relay import pack_header

GATHER_BYTES: Final = 512 * 1024  # read before anything is opened
LONGEST_READ: Final = 65_536
GATHER_DATAGRAMS: Final = 256  # receive calls of one gathering
ROUNDS: Final = 4  # gatherings of one wake-up
BACKLOG_BYTES: Final = 1024 * 1024  # that wait for a socket to become writable
ENDPOINTS_KEPT: Final = 8192
OLDEST_STAMP: Final = 5.0  # seconds; an older kernel stamp means that the clock was set
ANCILLARY: Final = socket.CMSG_SPACE(GRO_SIZE.size) + socket.CMSG_SPACE(STAMP.size)
NO_GSO: Final = frozenset({errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})  # it never will
_TTL = Struct("=i")

Address = tuple[str, int]
Ancillary = tuple[int, int, bytes]


class _Socket:
    """One socket and what it can do now."""

    __slots__ = ("backlog", "gso", "kernel", "number", "socket", "v6", "waiting")

    def __init__(self, opened: UdpSocket, number: int = 0) -> None:
        self.number = number  # of a further socket, 0 for the daemon's own
        self.kernel = opened
        self.socket = opened.socket
        self.gso = opened.gso
        self.v6 = opened.socket.family == socket.AF_INET6
        self.backlog: deque[tuple[bytes, int, Endpoint]] = deque()
        self.waiting = 0  # bytes in the backlog


class UdpShell:
    """At most one IPv4 and one IPv6 socket on one event loop, and further ones while NATs are punched."""

    def __init__(
        self,
        sockets: Iterable[UdpSocket],
        *,
        receive: Callable[[bytearray, list[Arrival], float], None],
        clock: Callable[[], float],
        too_big: Callable[[Endpoint, int], None],
        blocked: Callable[[bool], None],
        offset: Callable[[], float] = realtime_offset,
        further: Callable[[int], UdpSocket | None] = lambda _: None,
    ) -> None:
        """Take open sockets; they stay the caller's to close, after `stop`.

        - `receive(buffer, arrivals, now)`: everything that a gathering read;
        - `clock`: `now`; `offset`: what to add to it to get Unix time, for the kernel's stamps;
        - `too_big(endpoint, size)`: a datagram with so much UDP payload does not leave this host;
        - `blocked(yes)`: whether datagrams wait for a socket;
        - `further(number)`: opens a further IPv4 socket, which is ours then; None where there is to be none.
        """
        self.dropped: Counter[str] = Counter()
        self._sockets = [_Socket(opened) for opened in sockets]
        self._v4 = next((entry for entry in self._sockets if not entry.v6), None)
        self._v6 = next((entry for entry in self._sockets if entry.v6), None)
        self._receive = receive
        self._clock = clock
        self._offset = offset
        self._too_big = too_big
        self._blocked = blocked
        self._open_further = further
        self._further: dict[int, _Socket] = {}
        self._buffer = bytearray(GATHER_BYTES)
        self._view = memoryview(self._buffer)
        self._endpoints: dict[Address, UdpEndpoint] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read from now on."""
        self._loop = loop
        for entry in self._sockets:
            loop.add_reader(entry.socket.fileno(), self._readable, entry)

    def stop(self) -> None:
        """Neither read nor write any more; what waited is dropped."""
        if self._loop is None:
            return
        self.close_further(tuple(self._further))
        for entry in self._sockets:
            self._forget(entry)
        self._loop = None

    def close_further(self, numbers: Iterable[int]) -> None:
        """Close further sockets; what waited for them is dropped."""
        for number in numbers:
            entry = self._further.pop(number, None)
            if entry is not None:
                self._forget(entry)
                entry.kernel.close()

    def _forget(self, entry: _Socket) -> None:
        if self._loop is not None:
            self._loop.remove_reader(entry.socket.fileno())
            self._loop.remove_writer(entry.socket.fileno())
        blocked = bool(entry.backlog)
        entry.backlog.clear()
        entry.waiting = 0
        if blocked:
            self._unblock()

    def offloads(self) -> dict[str, dict[str, bool]]:
        """Return what the kernel does for each socket now: trains out (gso), trains in (gro), stamps."""
        return {
            "ipv6" if entry.v6 else "ipv4": {
                "gso": entry.gso,
                "gro": entry.kernel.gro,
                "stamps": entry.kernel.stamps,
            }
            for entry in self._sockets
        }

    # --- Receiving --------------------------------------------------------------------------------------

    def _readable(self, entry: _Socket) -> None:
        for _ in range(ROUNDS):
            arrivals: list[Arrival] = []
            more = self._gather(entry, arrivals)
            if arrivals:
                self._receive(self._buffer, arrivals, self._clock())
            if not more:
                return

    def _gather(self, entry: _Socket, arrivals: list[Arrival]) -> bool:
        """Fill the buffer; returns whether there may be more to read."""
        at = 0
        view, receive = self._view, entry.socket.recvmsg_into
        now = shift = 0.0
        for _ in range(GATHER_DATAGRAMS):
            if at + LONGEST_READ > GATHER_BYTES:
                return True
            try:
                size, ancillary, flags, address = receive([view[at : at + LONGEST_READ]], ANCILLARY)
            except BlockingIOError:
                return False
            except OSError as error:  # an error of an earlier send, kept by the socket
                self._count("receive", error)
                continue
            if not size or flags & socket.MSG_TRUNC:
                self.dropped["receive-length"] += 1
                continue
            segment = size
            stamp = 0.0
            for level, kind, data in ancillary:
                if level == SOL_UDP and kind == UDP_GRO:
                    segment = GRO_SIZE.unpack(data)[0] or size
                elif kind == SCM_TIMESTAMPNS and level == socket.SOL_SOCKET:
                    seconds, nanoseconds = STAMP.unpack(data)
                    stamp = seconds + nanoseconds * 1e-9
            if not now:
                now = self._clock()
                shift = self._offset() if stamp else 0.0
            stamp -= shift
            if stamp > now:  # it came since the first one was read, or the clock was set
                now = self._clock()
            if not now - OLDEST_STAMP < stamp <= now:
                stamp = now
            source: DirectEndpoint = self._endpoint(address[:2])
            if entry.number:
                source = SocketEndpoint(remote_of(source), entry.number)
            arrivals.append(Arrival(at, at + size, segment, source, stamp))
            at += size
        return True

    def _endpoint(self, address: Address) -> UdpEndpoint:
        endpoint = self._endpoints.get(address)
        if endpoint is None:
            if len(self._endpoints) >= ENDPOINTS_KEPT:
                self._endpoints.clear()
            endpoint = self._endpoints[address] = UdpEndpoint(*address)
        return endpoint

    # --- Sending ----------------------------------------------------------------------------------------

    def transmit(self, endpoint: Endpoint, train: memoryview, segment: int) -> None:
        """Send a train: datagrams of `segment` bytes, the last maybe shorter; the memory is free again."""
        entry = self._entry(endpoint)
        if entry is None:
            return
        sent = 0 if entry.backlog else self._push(entry, train, segment, endpoint)
        if sent < len(train):
            self._wait(entry, train[sent:], segment, endpoint)

    def send(self, datagram: bytes, endpoint: Endpoint, ttl: int | None = None) -> None:
        """Send one datagram of the control side, past what waits. `ttl` holds for this datagram only."""
        entry = self._entry(endpoint)
        if entry is None:
            return
        ancillary: list[Ancillary] = []
        if ttl is not None and entry.v6:
            ancillary.append((socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, _TTL.pack(ttl)))
        elif ttl is not None:
            ancillary.append((socket.IPPROTO_IP, socket.IP_TTL, _TTL.pack(ttl)))
        try:
            self._put(entry, memoryview(datagram), len(datagram), endpoint, ancillary)
        except OSError as error:
            self._refused(error, endpoint, len(datagram))

    def _entry(self, endpoint: Endpoint) -> _Socket | None:
        if isinstance(endpoint, SocketEndpoint):
            entry = self._further.get(endpoint.local) or self._new_further(endpoint.local)
        else:
            server = endpoint.server if isinstance(endpoint, RelayEndpoint) else endpoint
            entry = self._v6 if ":" in server.host else self._v4
        if entry is None:
            self.dropped["send-no-socket"] += 1
        return entry

    def _new_further(self, number: int) -> _Socket | None:
        try:
            opened = self._open_further(number)
        except OSError as error:
            self._count("open", error)
            return None
        if opened is None or self._loop is None:
            return None
        entry = self._further[number] = _Socket(opened, number)
        self._loop.add_reader(entry.socket.fileno(), self._readable, entry)
        return entry

    def _push(self, entry: _Socket, train: memoryview, segment: int, endpoint: Endpoint) -> int:
        """Give the kernel as much of a train as it takes; returns how many bytes are dealt with."""
        if len(train) > segment and entry.gso:
            try:
                relayed = RELAY_HEADER if isinstance(endpoint, RelayEndpoint) else 0
                cut = (SOL_UDP, UDP_SEGMENT, SEGMENT.pack(segment + relayed))
                self._put(entry, train, segment, endpoint, [cut])
            except BlockingIOError:
                return 0
            except OSError as error:
                if error.errno in NO_GSO:
                    entry.gso = False
                elif error.errno != errno.EINVAL:
                    self._refused(error, endpoint, segment)
                    return len(train)
                self.dropped[f"gso-{_name(error)}"] += 1  # the train goes on, one by one
            else:
                return len(train)
        for start in range(0, len(train), segment):
            datagram = train[start : start + segment]
            try:
                self._put(entry, datagram, segment, endpoint, [])
            except BlockingIOError:
                return start
            except OSError as error:
                self._refused(error, endpoint, len(datagram))
        return len(train)

    @staticmethod
    def _put(
        entry: _Socket, train: memoryview, segment: int, endpoint: Endpoint, ancillary: list[Ancillary]
    ) -> None:
        """Hand datagrams to the kernel, each behind a relay's header where they go to one; raises OSError."""
        parts: list[bytes | memoryview] = [train]
        server = endpoint
        if isinstance(endpoint, RelayEndpoint):
            header = pack_header(endpoint.channel)
            parts = []
            for start in range(0, len(train), segment):
                parts += (header, train[start : start + segment])
            server = endpoint.server
        elif isinstance(endpoint, SocketEndpoint):
            server = endpoint.remote
        entry.socket.sendmsg(parts, ancillary, 0, server)

    def _refused(self, error: OSError, endpoint: Endpoint, size: int) -> None:
        self._count("send", error)
        if error.errno == errno.EMSGSIZE:
            self._too_big(endpoint, size)

    def _count(self, what: str, error: OSError) -> None:
        self.dropped[f"{what}-{_name(error)}"] += 1

    # --- Waiting for room ------------------------------------------------------------------------------

    def _wait(self, entry: _Socket, train: memoryview, segment: int, endpoint: Endpoint) -> None:
        """Keep a train until the socket is writable."""
        if self._loop is None or entry.waiting + len(train) > BACKLOG_BYTES:
            self.dropped["send-queue-full"] += -(-len(train) // segment)
            return
        if not entry.backlog:
            self._loop.add_writer(entry.socket.fileno(), self._writable, entry)
            self._blocked(True)
        entry.backlog.append((bytes(train), segment, endpoint))
        entry.waiting += len(train)

    def _writable(self, entry: _Socket) -> None:
        """Send what waited, oldest first, until the kernel has no room again."""
        while entry.backlog:
            train, segment, endpoint = entry.backlog[0]
            sent = self._push(entry, memoryview(train), segment, endpoint)
            entry.waiting -= sent
            if sent < len(train):
                entry.backlog[0] = train[sent:], segment, endpoint
                return
            entry.backlog.popleft()
        if self._loop is not None:
            self._loop.remove_writer(entry.socket.fileno())
        self._unblock()

    def _unblock(self) -> None:
        if not any(other.backlog for other in (*self._sockets, *self._further.values())):
            self._blocked(False)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "error").lower()
