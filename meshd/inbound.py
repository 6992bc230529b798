"""From the wire to the TUN: telling datagrams apart, finding their keypairs, opening them in batches.

One call takes all that one wake-up could read, trains and single datagrams. What belongs to one keypair and
came from one source is opened together, sorted by counter. Sessions are told once per batch, after everything
was opened; what peers said inside their sessions is handed on after that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from crossedge.meshd.constants import REJECT_AFTER_TIME
from crossedge.meshd.delivery import Delivery
from crossedge.meshd.growth import RECORD_DATAGRAMS
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.opener import Opener
from crossedge.meshd.reassembly import Reassembly
from crossedge.meshd.sidebyside import Datagram, chunks_from, one_record, put_back
from crossedge.meshd.stockrun import Datagrams, train_from
from crossedge.meshd.superframe import HEADER, HEADER_SIZE, MAGIC, OVERHEAD
from crossedge.meshd.transport import TransportOpener
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import DirectEndpoint, Endpoint, RelayEndpoint, remote_of
from crossedge.wire.relay import HEADER as RELAY_HEADER
from crossedge.wire.relay import unpack_header

TRANSPORT: Final = 4  # the first word of WireGuard's type and its three zeros
CHANNELS_KEPT: Final = 1024


class Arrival(NamedTuple):
    """What one receive call returned: one datagram, or a train of datagrams from one source."""

    start: int
    """Where it begins in the receive buffer."""
    end: int
    segment: int
    """Length of each datagram but the last, in bytes."""
    source: DirectEndpoint
    stamp: float
    """When the kernel received it, in seconds of CLOCK_BOOTTIME."""
    stride: int = 0
    """From the beginning of one datagram to that of the next, in bytes; 0: there is nothing between them."""
    heads: memoryview | None = None
    """The first `HEADER_SIZE` bytes of each datagram but the first, where these were put aside: all from the
    first's on is contiguous then, and behind `end` there is room for them."""


class _Batch:
    """The datagrams of one keypair from one source."""

    __slots__ = ("chunks", "heads", "keypair", "link", "packets", "source")

    def __init__(self, link: Link, keypair: Keypair, source: Endpoint) -> None:
        self.link = link
        self.keypair = keypair
        self.source = source
        self.chunks: list[Datagram] = []
        self.heads: dict[int, memoryview] = {}
        self.packets: list[Datagrams] = []


class Inbound:
    """Takes what was received; `receive` is one batch."""

    __slots__ = (
        "_bulk_count",
        "_bulk_index",
        "_bulk_keypair",
        "_bulk_link",
        "_bulk_size",
        "_bulk_source",
        "_channels",
        "_control",
        "_delivery",
        "_dropped",
        "_indices",
        "_inner",
        "_link_of",
        "_moved",
        "_opener",
        "_packets",
        "_reassembly",
        "_report",
        "frames",
    )

    def __init__(
        self,
        delivery: Delivery,
        indices: Mapping[int, tuple[object, Keypair]],
        link_of: Callable[[Any], Link | None],
        control: Callable[[bytes, Endpoint, float], None],
        inner: Callable[[Link, bytes, Endpoint, float], None],
        moved: Callable[[Link, Endpoint, int], None],
        report: Callable[[Link, Keypair], None],
        dropped: Counter[str],
    ) -> None:
        self._delivery = delivery
        self._indices = indices
        self._link_of = link_of
        self._control = control
        self._inner = inner
        self._moved = moved
        self._report = report
        self._dropped = dropped
        self._reassembly = Reassembly(dropped)
        self._opener = Opener(delivery, self._reassembly, dropped)
        self.frames = self._opener.frames
        self._packets = TransportOpener(delivery, dropped)
        self._channels: dict[tuple[DirectEndpoint, int], RelayEndpoint] = {}
        self._bulk_index = -1  # whose records `whole` takes at the moment, by the receiver index,
        self._bulk_source: DirectEndpoint | None = None  # from where,
        self._bulk_link: Link | None = None
        self._bulk_keypair: Keypair | None = None
        self._bulk_count = 0  # and how much: datagrams,
        self._bulk_size = 0  # bytes of plaintext

    def receive(self, buffer: bytearray, arrivals: list[Arrival], now: float) -> None:
        """Take all arrivals in `buffer`; everything in it has been dealt with on return."""
        received = memoryview(buffer)
        taken = 0
        for start, end, _, sender, _, _, heads in arrivals:
            if heads is None or not self.whole(buffer, start, end, sender, now):
                break
            taken += 1
        if taken:
            self.end_wholes(now)
            arrivals = arrivals[taken:]
        batches = self._gather(buffer, arrivals, now)
        spoken: list[tuple[Link, bytes, Endpoint, float]] = []
        heard: list[tuple[_Batch, int, int]] = []
        for batch in batches:
            opened, size = self._open(batch, received, spoken, now)
            if opened:
                heard.append((batch, opened, size))
        self._delivery.flush()
        for batch, opened, size in heard:
            link = batch.link
            link.received.datagrams += opened
            link.received.size += size
            link.received.at = now
            link.session.data_received(now, size, batch.keypair)
            if batch.source not in link.endpoints:
                self._moved(link, batch.source, opened * OVERHEAD + size)
            if batch.chunks and batch.keypair.tally.due(now):
                self._report(link, batch.keypair)
        for link, plaintext, source, stamp in spoken:
            self._inner(link, plaintext, source, stamp)

    def whole(self, buffer: bytearray, start: int, end: int, source: DirectEndpoint, now: float) -> bool:
        """Take a train that looks like one record and was taken apart: it is `buffer[start:end]`.

        What the headers say that were put aside does not matter: where the record opens, all of it is there.
        False: nothing has been done, it is for `receive`, and whatever comes behind it. `end_wholes` follows.
        """
        _, _, count, receiver, counter = HEADER.unpack_from(buffer, start)
        expected = receiver == self._bulk_index and source is self._bulk_source
        if not expected and not self._bulk_from(receiver, source, now):
            return False
        link, keypair = self._bulk_link, self._bulk_keypair
        if (
            link is None
            or keypair is None
            or not self._opener.whole(
                link, keypair, memoryview(buffer)[start + HEADER_SIZE : end], counter, count
            )
        ):
            return False
        self._bulk_count += count
        self._bulk_size += end - start - OVERHEAD
        return True

    def _bulk_from(self, receiver: int, source: DirectEndpoint, now: float) -> bool:
        """Expect bulk for this receiver index from there; False where it has to be looked at more closely."""
        self.end_wholes(now)
        found = self._indices.get(receiver)
        if found is None:
            return False
        session, keypair = found
        link = self._link_of(session)
        if link is None or source not in link.endpoints or now - keypair.created >= REJECT_AFTER_TIME:
            return False
        self._bulk_index, self._bulk_source, self._bulk_link, self._bulk_keypair = (
            receiver,
            source,
            link,
            keypair,
        )
        return True

    def end_wholes(self, now: float) -> None:
        """Tell the session of the records that `whole` took."""
        self._bulk_index = -1
        count, size, link, keypair = (
            self._bulk_count,
            self._bulk_size,
            self._bulk_link,
            self._bulk_keypair,
        )
        if not count or link is None or keypair is None:
            return
        self._bulk_count = self._bulk_size = 0
        self._bulk_link = self._bulk_keypair = None
        self._delivery.flush()
        received = link.received
        received.datagrams += count
        received.size += size
        received.at = now
        link.session.data_received(now, size, keypair)
        if now >= keypair.tally.quiet and keypair.tally.due(now):
            self._report(link, keypair)

    def expire(self, now: float) -> None:
        """Drop chunks that have waited too long."""
        self._reassembly.expire(now)

    def _gather(self, buffer: bytearray, arrivals: list[Arrival], now: float) -> list[_Batch]:
        """Sort datagrams into batches; what is neither superframe nor transport data is handed on."""
        batches: dict[tuple[int, Endpoint], _Batch | None] = {}
        unpack = HEADER.unpack_from
        batch: _Batch | None = None
        known: tuple[int, Endpoint | None] = (-1, None)
        for start, end, segment, sender, stamp, apart, heads in arrivals:
            stride, at, aside = apart or segment, start, heads
            if aside is not None and not one_record(buffer, start, aside):
                end += put_back(buffer, start, end, segment, aside)
                aside = None
            while at < end:
                begin, stop = at, min(at + segment, end)
                at += stride
                source: Endpoint = sender
                if stop - begin > RELAY_HEADER and buffer[begin] == 0xCE and buffer[begin + 1] == 2:
                    source = self._channel(sender, unpack_header(buffer, begin))
                    begin += RELAY_HEADER
                if stop - begin < OVERHEAD:
                    self._other(buffer, begin, stop, source, stamp)
                    continue
                word, index, count, receiver, counter = unpack(buffer, begin)
                if word != MAGIC and (word != TRANSPORT or index or count):
                    self._other(buffer, begin, stop, source, stamp)
                    continue
                if receiver != known[0] or source is not known[1]:
                    known = receiver, source
                    if known not in batches:
                        batches[receiver, source] = self._batch(receiver, source, now)
                    batch = batches[receiver, source]
                if batch is None:
                    self._dropped["unknown-receiver"] += 1 if aside is None else count
                    if aside is not None:
                        break
                elif word != MAGIC:
                    many = 1
                    if begin == start and not apart and end - start >= 2 * segment:
                        many = train_from(buffer, begin, end, segment)
                        at += (many - 1) * stride
                    batch.packets.append((counter, begin, stop, stamp, many, segment))
                elif not 0 < count <= RECORD_DATAGRAMS:
                    self._dropped["chunk-malformed"] += 1
                elif aside is not None:
                    batch.chunks.append((counter, 0, begin, end, count, segment, 0))
                    batch.heads[begin] = aside
                    break
                elif index + 1 < count and (
                    many := chunks_from(buffer, begin, stop, end - stop, stride, index, count)
                ):  # as far as one sees before they are opened
                    past = stop + (many - 1) * stride
                    batch.chunks.append((counter, index, begin, past, count, stop - begin, stride))
                    at += (many - 1) * stride
                else:
                    batch.chunks.append((counter, index, begin, stop, count, 0, 0))
        return [batch for batch in batches.values() if batch is not None]

    def _batch(self, receiver: int, source: Endpoint, now: float) -> _Batch | None:
        """Return a batch for a receiver index, or None where no living keypair of a link has it."""
        found = self._indices.get(receiver)
        if found is None:
            return None
        session, keypair = found
        link = self._link_of(session)
        if link is None or not keypair.alive(now):
            return None
        return _Batch(link, keypair, source)

    def _open(
        self,
        batch: _Batch,
        received: memoryview,
        spoken: list[tuple[Link, bytes, Endpoint, float]],
        now: float,
    ) -> tuple[int, int]:
        """Open a batch; returns how many datagrams were genuine and new, and their plaintext in bytes."""
        link, keypair, source = batch.link, batch.keypair, batch.source
        opened = size = 0
        if batch.packets:
            batch.packets.sort()
            said: list[tuple[bytes, float]] = []
            opened, size = self._packets.open(link, keypair, received, batch.packets, said)
            spoken += [(link, plaintext, source, arrived) for plaintext, arrived in said]
        if batch.chunks:
            batch.chunks.sort()
            more, longer = self._opener.open(link, keypair, received, batch.chunks, source, now, batch.heads)
            opened += more
            size += longer
        return opened, size

    def _channel(self, server: DirectEndpoint, channel: int) -> RelayEndpoint:
        """Return the one object for a relay channel."""
        endpoint = self._channels.get((server, channel))
        if endpoint is None:
            if len(self._channels) >= CHANNELS_KEPT:
                self._channels.clear()
            endpoint = self._channels[server, channel] = RelayEndpoint(remote_of(server), channel)
        return endpoint

    def _other(self, buffer: bytearray, start: int, end: int, source: Endpoint, stamp: float) -> None:
        """Hand on what is for the control side, and count what is for nobody."""
        kind = classify(buffer, start, end)
        if kind in (Kind.TRANSPORT, Kind.CHUNK):
            self._dropped["truncated"] += 1
        elif kind is Kind.UNKNOWN:
            self._dropped["unknown-datagram"] += 1
        elif kind is Kind.RELAY:
            self._dropped["relay-malformed"] += 1
        else:
            self._control(bytes(buffer[start:end]), source, stamp)
