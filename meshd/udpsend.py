"""The sending half of the shell around the UDP sockets: trains, single datagrams, and what waits for room.

A train goes out by one call with UDP_SEGMENT; where kernel or device refuse that, as single datagrams. What
the kernel has no room for waits here, bounded, until the socket is writable, and `blocked` is told, so that
the TUN is not read meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final

from crossedge.host.gather import Gather, SocketName, argument
from crossedge.host.udp import SEGMENT, SOL_UDP, UDP_SEGMENT, UdpSocket
from crossedge.meshd.train import Parts, Send
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, SocketEndpoint, UdpEndpoint
from crossedge.wire.relay import HEADER as RELAY_HEADER
from crossedge.wire.relay import pack_header

BACKLOG_BYTES: Final = 1024 * 1024  # that wait for a socket to become writable
ENDPOINTS_KEPT: Final = 8192
GATHERS_KEPT: Final = 64
NO_GSO: Final = frozenset({errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})  # it never will
_TTL = Struct("=i")

Ancillary = tuple[int, int, bytes]


class Entry:
    """One socket and what it can do now."""

    __slots__ = (
        "backlog",
        "controls",
        "descriptor",
        "gso",
        "kernel",
        "number",
        "receive",
        "socket",
        "to_kernel",
        "v6",
        "waiting",
    )

    def __init__(self, opened: UdpSocket, number: int = 0) -> None:
        self.number = number  # of a further socket, 0 for the daemon's own
        self.kernel = opened
        self.socket = opened.socket
        self.descriptor = opened.socket.fileno()
        self.to_kernel = argument(self.descriptor)
        self.receive = opened.socket.recvmsg_into
        self.controls = int(opened.stamps)  # control messages of a datagram
        self.gso = opened.gso
        self.v6 = opened.socket.family == socket.AF_INET6
        self.backlog: deque[tuple[bytes, int, Endpoint]] = deque()
        self.waiting = 0  # bytes in the backlog


class UdpSender:
    """What leaves by the sockets of one shell."""

    def __init__(
        self,
        entries: Iterable[Entry],
        dropped: Counter[str],
        *,
        too_big: Callable[[Endpoint, int], None],
        blocked: Callable[[bool], None],
        further: Callable[[int], Entry | None],
    ) -> None:
        """Take at most one IPv4 and one IPv6 socket, and what the shell takes.

        `further(number)` returns the further socket of that number, None where there is to be none.
        """
        self.dropped = dropped
        entries = tuple(entries)
        self._v4 = next((entry for entry in entries if not entry.v6), None)
        self._v6 = next((entry for entry in entries if entry.v6), None)
        self._too_big = too_big
        self._blocked = blocked
        self._further = further
        self._gathers: dict[int, Gather] = {}  # by the identity of the lists of parts, which they keep
        self._ways: dict[Endpoint, tuple[Entry, SocketName, UdpEndpoint]] = {}
        self._full: set[Entry] = set()  # those where something waits
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let wait what finds no room from now on."""
        self._loop = loop

    def stop(self) -> None:
        """Drop from now on what finds no room."""
        self._loop = None

    def forget(self, entry: Entry) -> None:
        """Drop what waits for a socket."""
        if self._loop is not None:
            self._loop.remove_writer(entry.socket.fileno())
        entry.backlog.clear()
        entry.waiting = 0
        if entry in self._full:
            self._full.discard(entry)
            if not self._full:
                self._blocked(False)

    def transmit(self, endpoint: Endpoint, parts: Parts, segment: int) -> None:
        """Send a train: datagrams of `segment` bytes, the last maybe shorter; the memory is free again.

        Parts are one for all, or two for each datagram; those stay in their places.
        """
        way = self._ways.get(endpoint)
        entry = way[0] if way is not None else self._entry(endpoint)
        if entry is None:
            return
        sent: int | None = 0
        try:
            if entry.backlog:
                pass
            elif way is None:
                sent = self._push(entry, parts, segment, endpoint)
            elif len(parts) > 1 and entry.gso and not parts[0].readonly:  # of what is, there is no address
                gather = self._gathers.get(id(parts))
                if gather is None or gather.segment != segment:
                    gather = self._gathered(parts, segment)
                gather.send(entry.to_kernel, way[1])
                return
            elif len(parts) == 1 and len(parts[0]) == segment:  # a datagram alone goes the shortest way
                entry.socket.sendto(parts[0], way[2])
                return
            else:
                sent = self._push(entry, parts, segment, endpoint)
        except BlockingIOError:
            pass
        except OSError as error:
            if len(parts) == 1 or (error.errno not in NO_GSO and error.errno != errno.EINVAL):
                self._refused(error, endpoint, segment)
                return
            sent = self._push(entry, parts, segment, endpoint)
        if sent is not None:
            self._wait(entry, b"".join(parts)[sent:], segment, endpoint)

    def way(self, endpoint: Endpoint) -> Send:
        """Return what sends one datagram there by the fewest steps; it may be kept."""
        entry = self._entry(endpoint) if type(endpoint) is UdpEndpoint else None

        def usual(datagram: memoryview) -> None:
            self.transmit(endpoint, [datagram], len(datagram))

        if entry is None:
            return usual
        backlog, sendto, address = entry.backlog, entry.socket.sendto, tuple(endpoint)

        def send(datagram: memoryview) -> None:
            if backlog:
                usual(datagram)
                return
            try:
                sendto(datagram, address)
            except OSError:
                usual(datagram)  # which says what is wrong

        return send

    def _gathered(self, parts: Parts, segment: int) -> Gather:
        """Return the kernel's list of these parts, made anew."""
        if len(self._gathers) >= GATHERS_KEPT:
            self._gathers.clear()
        made = self._gathers[id(parts)] = Gather(parts, segment)
        return made

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
            self._put(entry, [memoryview(datagram)], len(datagram), endpoint, ancillary)
        except OSError as error:
            self._refused(error, endpoint, len(datagram))

    def _entry(self, endpoint: Endpoint) -> Entry | None:
        if type(endpoint) is UdpEndpoint:
            entry = self._v6 if ":" in endpoint.host else self._v4
            if entry is not None:
                if len(self._ways) >= ENDPOINTS_KEPT:
                    self._ways.clear()
                self._ways[endpoint] = entry, SocketName(*endpoint), endpoint
        elif isinstance(endpoint, SocketEndpoint):
            entry = self._further(endpoint.local)
        else:
            server = endpoint.server if isinstance(endpoint, RelayEndpoint) else endpoint
            entry = self._v6 if ":" in server.host else self._v4
        if entry is None:
            self.dropped["send-no-socket"] += 1
        return entry

    def _push(self, entry: Entry, parts: Parts, segment: int, endpoint: Endpoint) -> int | None:
        """Give the kernel as much of a train as it takes; returns how many bytes that was, None: all."""
        if entry.gso and (len(parts) > 1 or len(parts[0]) > segment):
            try:
                relayed = RELAY_HEADER if isinstance(endpoint, RelayEndpoint) else 0
                cut = (SOL_UDP, UDP_SEGMENT, SEGMENT.pack(segment + relayed))
                self._put(entry, parts, segment, endpoint, [cut])
            except BlockingIOError:
                return 0
            except OSError as error:
                if error.errno in NO_GSO:
                    entry.gso = False
                elif error.errno != errno.EINVAL:
                    self._refused(error, endpoint, segment)
                    return None
                self.dropped[f"gso-{name_of(error)}"] += 1  # the train goes on, one by one
            else:
                return None
        train = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        for start in range(0, len(train), segment):
            datagram = train[start : start + segment]
            try:
                self._put(entry, [datagram], segment, endpoint, [])
            except BlockingIOError:
                return start
            except OSError as error:
                self._refused(error, endpoint, len(datagram))
        return None

    @staticmethod
    def _put(
        entry: Entry, parts: Parts, segment: int, endpoint: Endpoint, ancillary: list[Ancillary]
    ) -> None:
        """Hand datagrams to the kernel, each behind a relay's header where they go to one; raises OSError."""
        server = endpoint
        if isinstance(endpoint, RelayEndpoint):
            header = memoryview(pack_header(endpoint.channel))
            behind: Parts = []
            if len(parts) == 1:
                for start in range(0, len(parts[0]), segment):
                    behind += (header, parts[0][start : start + segment])
            else:
                for at in range(0, len(parts), 2):
                    behind += (header, parts[at], parts[at + 1])
            parts, server = behind, endpoint.server
        elif isinstance(endpoint, SocketEndpoint):
            server = endpoint.remote
        entry.socket.sendmsg(parts, ancillary, 0, server)

    def _refused(self, error: OSError, endpoint: Endpoint, size: int) -> None:
        self.dropped[f"send-{name_of(error)}"] += 1
        if error.errno == errno.EMSGSIZE:
            self._too_big(endpoint, size)

    # --- Waiting for room ------------------------------------------------------------------------------

    def _wait(self, entry: Entry, train: bytes, segment: int, endpoint: Endpoint) -> None:
        """Keep a train until the socket is writable."""
        if self._loop is None or entry.waiting + len(train) > BACKLOG_BYTES:
            self.dropped["send-queue-full"] += -(-len(train) // segment)
            return
        if not entry.backlog:
            self._loop.add_writer(entry.socket.fileno(), self._writable, entry)
            self._full.add(entry)
            self._blocked(True)
        entry.backlog.append((train, segment, endpoint))
        entry.waiting += len(train)

    def _writable(self, entry: Entry) -> None:
        """Send what waited, oldest first, until the kernel has no room again."""
        while entry.backlog:
            train, segment, endpoint = entry.backlog[0]
            sent = self._push(entry, [memoryview(train)], segment, endpoint)
            if sent is not None:
                entry.waiting -= sent
                entry.backlog[0] = train[sent:], segment, endpoint
                return
            entry.waiting -= len(train)
            entry.backlog.popleft()
        self.forget(entry)


def name_of(error: OSError) -> str:
    """Return an error's name as counters have it."""
    return errno.errorcode.get(error.errno or 0, "error").lower()
