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
from typing import Any, Final

from crossedge.host.clock import realtime_offset
from crossedge.host.gather import Gather, SocketName, argument
from crossedge.host.receive import CONTROL, LONG, NAME, SINGLE, SLOT, SPARE, Receiver, address_of
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
from crossedge.meshd.flow import Send
from crossedge.meshd.inbound import Arrival
from crossedge.meshd.superframe import HEADER_SIZE, WHOLE, TrainForm
from crossedge.meshd.train import Parts
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

ROUNDS: Final = 4  # gatherings of one wake-up
BACKLOG_BYTES: Final = 1024 * 1024  # that wait for a socket to become writable
ENDPOINTS_KEPT: Final = 8192
GATHERS_KEPT: Final = 64
ALONE: Final = 0.001  # seconds without datagrams after which the next is expected to come alone,
ALONE_IN_BULK: Final = 0.05  # and where trains are foreseen
OLDEST_STAMP: Final = 5.0  # seconds; an older kernel stamp means that the clock was set
NO_GSO: Final = frozenset({errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})  # it never will
_TTL = Struct("=i")

Ancillary = tuple[int, int, bytes]


class _Socket:
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


class UdpShell:
    """At most one IPv4 and one IPv6 socket on one event loop, and further ones while NATs are punched."""

    def __init__(
        self,
        sockets: Iterable[UdpSocket],
        *,
        receive: Callable[[bytearray, list[Arrival], float], None],
        lone: Callable[[bytearray, int, DirectEndpoint, float], bool] = lambda *_: False,
        after: Callable[[], None] = lambda: None,
        clock: Callable[[], float],
        too_big: Callable[[Endpoint, int], None],
        blocked: Callable[[bool], None],
        offset: Callable[[], float] = realtime_offset,
        further: Callable[[int], UdpSocket | None] = lambda _: None,
    ) -> None:
        """Take open sockets; they stay the caller's to close, after `stop`.

        - `receive(buffer, arrivals, now)`: everything that a gathering read;
        - `lone(buffer, length, source, now)`: a datagram that came alone, if it is one that can be dealt with
          at once; False: it is for `receive`;
        - `after()`: `lone` took one, or there were some for `whole`;
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
        self.lone = lone
        """What was given as that; it may be set until `start`."""
        self.whole: Callable[[bytearray, int, int, DirectEndpoint, float], bool] = lambda *_: False
        """`whole(buffer, start, end, source, now)`: takes a train that looks like one record and was taken
        apart while it was read, where nothing waits for `receive` before it; False: it is for that, too."""
        self.end_wholes: Callable[[float], None] = lambda _: None
        """`end_wholes(now)`: there are no more for `whole` for now."""
        self._after = after
        self._clock = clock
        self._offset = offset
        self._too_big = too_big
        self._blocked = blocked
        self._open_further = further
        self._further: dict[int, _Socket] = {}
        self._receiver = Receiver(HEADER_SIZE)
        self._form = TrainForm()
        self._alone = bytearray(SLOT)
        self._alone_parts = [memoryview(self._alone)]
        self._read_at = float("-inf")
        self._endpoints: dict[bytes, UdpEndpoint] = {}
        self._sources: dict[tuple[Any, ...], UdpEndpoint] = {}  # the same, by the names that Python gives
        self._gathers: dict[int, Gather] = {}  # by the identity of the lists of parts, which they keep
        self._ways: dict[Endpoint, tuple[_Socket, SocketName, UdpEndpoint]] = {}
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
        receiver, now = self._receiver, self._clock()
        quiet = ALONE_IN_BULK if self._form.segment else ALONE
        alone, self._read_at = now - self._read_at > quiet, now
        arrivals: list[Arrival] = []
        if alone and not entry.number:  # one receive without much around it, and most often that is all
            try:
                size, controls, _, name = entry.receive(self._alone_parts, CONTROL)
            except BlockingIOError:
                return
            except OSError as error:  # an error of an earlier send, kept by the socket
                self._count("receive", error)
            else:
                source = self._sources.get(name) or self._source(name)
                if len(controls) == entry.controls and self.lone(self._alone, size, source, now):
                    self._after()
                    return
                self._single(size, controls, source, arrivals)
        for _ in range(ROUNDS):
            if self._form.segment != receiver.parting:
                receiver.part(self._form.segment)
            try:
                found = receiver.read(entry.descriptor)
            except OSError as error:
                self._count("receive", error)
                continue
            now = self._clock()
            if len(found) == 1 and not entry.number and not arrivals:
                size, named, controlled = found[0]
                if size <= (receiver.parted or LONG) and controlled in SINGLE:
                    key = receiver.name(0, named)
                    if self.lone(receiver.buffer, size, self._endpoints.get(key) or self._endpoint(key), now):
                        self._after()
                        return
            bulk = receiver.parted and not entry.number and not arrivals
            taken = self._take_wholes(found, now) if bulk else 0
            if taken < len(found):
                self._gather(entry, found, taken, arrivals, now)
            if arrivals:
                if arrivals[0].start == SPARE:
                    receiver.expect(arrivals[0].end - SPARE)
                self._receive(receiver.buffer, arrivals, self._clock())
                arrivals = []
            if not receiver.full:
                return

    def _single(
        self, size: int, controls: list[Ancillary], source: UdpEndpoint, arrivals: list[Arrival]
    ) -> None:
        """Put a datagram or train that was read alone, but is not for `lone`, in front of what follows it."""
        if not size:
            self.dropped["receive-length"] += 1
            return
        buffer, now, at = self._receiver.buffer, self._clock(), SPARE
        buffer[at : at + size] = self._alone_parts[0][:size]
        segment, stamp = size, now
        for level, kind, data in controls:
            if level == SOL_UDP and kind == UDP_GRO:
                (segment,) = GRO_SIZE.unpack(data)
            elif level == socket.SOL_SOCKET and kind == SCM_TIMESTAMPNS:
                seconds, nanoseconds = STAMP.unpack(data)
                unix = seconds + nanoseconds * 1e-9 - self._offset()
                if now - OLDEST_STAMP < unix <= now:
                    stamp = unix
        if size > segment:
            self._form.see(buffer, at, size, segment)
        arrivals.append(Arrival(at, at + size, segment, source, stamp))

    def _source(self, name: tuple[Any, ...]) -> UdpEndpoint:
        if len(self._sources) >= ENDPOINTS_KEPT:
            self._sources.clear()
        source = self._sources[name] = UdpEndpoint(*name[:2])
        return source

    def _take_wholes(self, found: list[tuple[int, int, int]], now: float) -> int:
        """Hand on trains that look like records, up to the first that is none; returns how many those were.

        How the kernel cut them need not be read: only what was taken apart where it is joined opens.
        """
        receiver, whole = self._receiver, self.whole
        buffer, names, parted = receiver.buffer, receiver.names, receiver.parted
        name, source = b"", None
        taken = at = 0
        for size, named, _ in found:
            count = buffer[at + 3]
            if count < 2 or count * parted != size or buffer[at : at + 3] != WHOLE:
                break
            if source is None or names[taken * NAME : taken * NAME + named] != name:
                name = receiver.name(taken, named)
                source = self._endpoints.get(name) or self._endpoint(name)
            if not whole(buffer, at, at + size - (count - 1) * HEADER_SIZE, source, now):
                break
            taken += 1
            at += SLOT
        if taken:
            self._form.misses = 0
            self.end_wholes(now)
            self._after()
        return taken

    def _gather(
        self,
        entry: _Socket,
        found: list[tuple[int, int, int]],
        slot: int,
        arrivals: list[Arrival],
        now: float,
    ) -> None:
        """Tell apart what was read, from a slot on.

        Nobody asks when a superframe arrived, so its stamp is not read.
        """
        receiver, form = self._receiver, self._form
        buffer = receiver.buffer
        shift: float | None = None
        source: DirectEndpoint
        total, parted = len(found), receiver.parted
        while slot < total:
            size, named, controlled = found[slot]
            first, at = slot, slot * SLOT
            slot += 1
            seen = False
            if size > parted and parted:
                segment, _ = receiver.control(first, controlled)
                seen = segment == parted
                if seen and (count := form.see(buffer, at, size, segment)):
                    name = receiver.name(first, named)
                    source = self._endpoints.get(name) or self._endpoint(name)
                    if entry.number:
                        source = SocketEndpoint(remote_of(source), entry.number)
                    after = at + size - (count - 1) * HEADER_SIZE
                    heads = receiver.heads(first, count)
                    arrivals.append(Arrival(at, after, segment, source, now, 0, heads))
                    continue
                receiver.join(first, size)
            if not size:
                self.dropped["receive-length"] += 1
                continue
            segment, stamp = size, now
            superframe = is_bulk(buffer, at)
            if superframe and not receiver.is_train(controlled):
                slot = self._alike(found, first)
                if size > parted and parted:
                    for other in range(first + 1, slot):
                        receiver.join(other, size)
            elif controlled:
                cut, unix = receiver.control(first, controlled)
                segment = cut or size
                if unix and not superframe:
                    shift = self._offset() if shift is None else shift
                    if now - OLDEST_STAMP < unix - shift <= now:
                        stamp = unix - shift
            if size > segment and not seen:
                form.see(buffer, at, size, segment)
            name = receiver.name(first, named)
            source = self._endpoints.get(name) or self._endpoint(name)
            if entry.number:
                source = SocketEndpoint(remote_of(source), entry.number)
            end = (slot - 1) * SLOT + size
            arrivals.append(Arrival(at, end, segment, source, stamp, SLOT if slot - first > 1 else 0))

    def _alike(self, found: list[tuple[int, int, int]], first: int) -> int:
        """Return the slot behind those with superframes as long as the first one's, from one source."""
        after = first + 1
        while after < len(found) and found[after] == found[first]:
            after += 1
        count, buffer = after - first, self._receiver.buffer
        start, end = first * SLOT, after * SLOT
        places = (0, 1) if buffer[start + 1] == 0x03 else (0, 1, RELAY_HEADER, RELAY_HEADER + 1)
        same = self._receiver.one_name(first, count) and all(
            buffer[start + place : end : SLOT] == buffer[start + place : start + place + 1] * count
            for place in places
        )
        return after if same else first + 1

    def _endpoint(self, name: bytes) -> UdpEndpoint:
        if len(self._endpoints) >= ENDPOINTS_KEPT:
            self._endpoints.clear()
        endpoint = self._endpoints[name] = UdpEndpoint(*address_of(name))
        return endpoint

    # --- Sending ----------------------------------------------------------------------------------------

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

    def _entry(self, endpoint: Endpoint) -> _Socket | None:
        if type(endpoint) is UdpEndpoint:
            entry = self._v6 if ":" in endpoint.host else self._v4
            if entry is not None:
                if len(self._ways) >= ENDPOINTS_KEPT:
                    self._ways.clear()
                self._ways[endpoint] = entry, SocketName(*endpoint), endpoint
        elif isinstance(endpoint, SocketEndpoint):
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

    def _push(self, entry: _Socket, parts: Parts, segment: int, endpoint: Endpoint) -> int | None:
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
                self.dropped[f"gso-{_name(error)}"] += 1  # the train goes on, one by one
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
        entry: _Socket, parts: Parts, segment: int, endpoint: Endpoint, ancillary: list[Ancillary]
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
        self._count("send", error)
        if error.errno == errno.EMSGSIZE:
            self._too_big(endpoint, size)

    def _count(self, what: str, error: OSError) -> None:
        self.dropped[f"{what}-{_name(error)}"] += 1

    # --- Waiting for room ------------------------------------------------------------------------------

    def _wait(self, entry: _Socket, train: bytes, segment: int, endpoint: Endpoint) -> None:
        """Keep a train until the socket is writable."""
        if self._loop is None or entry.waiting + len(train) > BACKLOG_BYTES:
            self.dropped["send-queue-full"] += -(-len(train) // segment)
            return
        if not entry.backlog:
            self._loop.add_writer(entry.socket.fileno(), self._writable, entry)
            self._blocked(True)
        entry.backlog.append((train, segment, endpoint))
        entry.waiting += len(train)

    def _writable(self, entry: _Socket) -> None:
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
        if self._loop is not None:
            self._loop.remove_writer(entry.socket.fileno())
        self._unblock()

    def _unblock(self) -> None:
        if not any(other.backlog for other in (*self._sockets, *self._further.values())):
            self._blocked(False)


def is_bulk(buffer: bytearray, at: int) -> bool:
    """Tell whether a superframe's datagram lies there, from a relay or not."""
    if buffer[at] != 0xCE:
        return False
    kind = buffer[at + 1]
    return kind == 0x03 or (
        kind == 0x02 and buffer[at + RELAY_HEADER] == 0xCE and buffer[at + RELAY_HEADER + 1] == 0x03
    )


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "error").lower()
