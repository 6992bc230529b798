"""The shell around the UDP sockets: gathers what a wake-up can read, sends trains, copes with refusals.

Holds no rules of the protocol. `UdpSender` has the sending half.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

from crossedge.host.clock import realtime_offset
from crossedge.host.receive import CONTROL, LONG, NAME, SINGLE, SLOT, SPARE, Receiver, address_of
from crossedge.host.udp import (
    GRO_SIZE,
    SCM_TIMESTAMPNS,
    SOL_UDP,
    STAMP,
    UDP_GRO,
    UdpSocket,
)
from crossedge.meshd.inbound import Arrival
from crossedge.meshd.superframe import HEADER_SIZE, WHOLE, TrainForm
from crossedge.meshd.udpsend import ENDPOINTS_KEPT, Ancillary, Entry, UdpSender, name_of
from crossedge.wire.endpoint import (
    DirectEndpoint,
    Endpoint,
    SocketEndpoint,
    UdpEndpoint,
    remote_of,
)
from crossedge.wire.relay import HEADER as RELAY_HEADER

ROUNDS: Final = 4  # gatherings of one wake-up
ALONE: Final = 0.001  # seconds without datagrams after which the next is expected to come alone,
ALONE_IN_BULK: Final = 0.05  # and where trains are foreseen
OLDEST_STAMP: Final = 5.0  # seconds; an older kernel stamp means that the clock was set


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
        self._sockets = [Entry(opened) for opened in sockets]
        self._sender = UdpSender(
            self._sockets, self.dropped, too_big=too_big, blocked=blocked, further=self._further_entry
        )
        self.transmit = self._sender.transmit
        """Send a train: `transmit(endpoint, parts, segment)`."""
        self.send = self._sender.send
        """Send one datagram of the control side: `send(datagram, endpoint, ttl)`."""
        self.way = self._sender.way
        """Return what sends one datagram there by the fewest steps: `way(endpoint)`."""
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
        self._open_further = further
        self._further: dict[int, Entry] = {}
        self._receiver = Receiver(HEADER_SIZE)
        self._form = TrainForm()
        self._alone = bytearray(SLOT)
        self._alone_parts = [memoryview(self._alone)]
        self._read_at = float("-inf")
        self._endpoints: dict[bytes, UdpEndpoint] = {}
        self._sources: dict[tuple[Any, ...], UdpEndpoint] = {}  # the same, by the names that Python gives
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read from now on."""
        self._loop = loop
        self._sender.start(loop)
        for entry in self._sockets:
            loop.add_reader(entry.socket.fileno(), self._readable, entry)

    def stop(self) -> None:
        """Neither read nor write any more; what waited is dropped."""
        if self._loop is None:
            return
        self.close_further(tuple(self._further))
        for entry in self._sockets:
            self._forget(entry)
        self._sender.stop()
        self._loop = None

    def close_further(self, numbers: Iterable[int]) -> None:
        """Close further sockets; what waited for them is dropped."""
        for number in numbers:
            entry = self._further.pop(number, None)
            if entry is not None:
                self._forget(entry)
                entry.kernel.close()

    def _forget(self, entry: Entry) -> None:
        if self._loop is not None:
            self._loop.remove_reader(entry.socket.fileno())
        self._sender.forget(entry)

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

    def _readable(self, entry: Entry) -> None:
        receiver, now = self._receiver, self._clock()
        quiet = ALONE_IN_BULK if self._form.segment else ALONE
        alone, self._read_at = now - self._read_at > quiet, now
        arrivals: list[Arrival] = []
        if alone and not entry.number:  # one receive without much around it, before one for all there is
            try:
                size, controls, _, name = entry.receive(self._alone_parts, CONTROL)
            except BlockingIOError:
                return
            except OSError as error:  # an error of an earlier send, kept by the socket
                self.dropped[f"receive-{name_of(error)}"] += 1
            else:
                source = self._sources.get(name) or self._source(name)
                if len(controls) == entry.controls and self.lone(self._alone, size, source, now):
                    self._after()
                    if self._loop is None:
                        return
                else:
                    self._single(size, controls, source, arrivals)
        for _ in range(ROUNDS):
            if self._form.segment != receiver.parting:
                receiver.part(self._form.segment)
            try:
                found = receiver.read(entry.descriptor)
            except OSError as error:
                self.dropped[f"receive-{name_of(error)}"] += 1
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
                break
        self._read_at = self._clock()  # what took long to deal with was no silence
        if arrivals:  # errors were all that followed
            self._receive(receiver.buffer, arrivals, now)

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
        entry: Entry,
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

    def _further_entry(self, number: int) -> Entry | None:
        if number in self._further:
            return self._further[number]
        try:
            opened = self._open_further(number)
        except OSError as error:
            self.dropped[f"open-{name_of(error)}"] += 1
            return None
        if opened is None or self._loop is None:
            return None
        entry = self._further[number] = Entry(opened, number)
        self._loop.add_reader(entry.socket.fileno(), self._readable, entry)
        return entry


def is_bulk(buffer: bytearray, at: int) -> bool:
    """Tell whether a superframe's datagram lies there, from a relay or not."""
    if buffer[at] != 0xCE:
        return False
    kind = buffer[at + 1]
    return kind == 0x03 or (
        kind == 0x02 and buffer[at + RELAY_HEADER] == 0xCE and buffer[at + RELAY_HEADER + 1] == 0x03
    )
