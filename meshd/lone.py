"""Packets that come alone: from the TUN to the wire and back by the fewest steps, for latency counts there.

A daemon that slept finds its memory cold, and what it touches costs more than what it computes. So nothing
but what decides about the packet comes before it leaves; what does not change between two packets of a link
is kept as a lane; and sessions are told afterwards, of an arrival even after its answer left, which often
waits in the TUN as soon as the packet was written to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import Struct
from typing import Any, Final, NamedTuple

from cryptography.exceptions import InvalidTag

from crossedge.meshd.ackfilter import LONGEST_SELECTIVE, selective
from crossedge.meshd.constants import REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME
from crossedge.meshd.delivery import Delivery
from crossedge.meshd.flow import OUT4, OUT4_TCP, OUT6, OUT6_TCP, Lane
from crossedge.meshd.growth import REPORT_SIZE
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.opener import BASE
from crossedge.meshd.outbound import Outbound
from crossedge.meshd.packet import PLAIN_IPV4, TCP
from crossedge.meshd.parts import START
from crossedge.meshd.superframe import (
    COUNTER_AT,
    FRAME,
    FRAME_SIZE,
    HEADER,
    HEADER_SIZE,
    MAGIC,
    OVERHEAD,
    PARTIAL_CHECKSUM,
)
from crossedge.meshd.train import Send
from crossedge.meshd.virtio import GSO_NONE, SIZE
from crossedge.wire.endpoint import DirectEndpoint, Endpoint

LARGEST: Final = 65_536  # bytes of one datagram, and more than of one packet
LONG: Final = 9_216  # bytes; frames beyond that are bulk, and not looked at here
LEAST: Final = OVERHEAD + FRAME_SIZE + 1
_FLAGS: Final = (0, PARTIAL_CHECKSUM)
_COUNTER = Struct("<Q")
_HEAD = Struct(HEADER.format[:-1])  # a header without its counter
_ALONE: Final = 1 << 8  # one datagram, index 0: the nonce below the counter


class _Source(NamedTuple):
    """What does not change from one datagram that comes alone to the next."""

    head: bytes
    """Their header without the counter."""
    link: Link
    keypair: Keypair
    source: DirectEndpoint
    endpoints: tuple[Endpoint, ...]
    """Those of the link when `source` was found to be one of them."""
    until: float
    """When the keypair is too old, in seconds of `now`."""


class _Arrival(NamedTuple):
    """What a session has yet to be told of."""

    link: Link
    keypair: Keypair
    counter: int
    size: int
    """Plaintext, in bytes."""
    now: float


class Lone:
    """Both directions; nothing is kept here from one packet to the next but what was found about it."""

    __slots__ = (
        "_arrival",
        "_buffer",
        "_delivery",
        "_flows",
        "_frames",
        "_indices",
        "_link_of",
        "_opened",
        "_report",
        "_sealed",
        "_source",
        "_stages",
        "_view",
        "_way",
        "_written",
    )

    def __init__(
        self,
        outbound: Outbound,
        delivery: Delivery,
        frames: Callable[[Link, memoryview, int], None],
        indices: Mapping[int, tuple[object, Keypair]],
        link_of: Callable[[Any], Link | None],
        way: Callable[[Endpoint], Send],
        report: Callable[[Link, Keypair], None],
        written: Callable[[], None],
    ) -> None:
        self._buffer, self._view = outbound.buffer, outbound.view
        self._flows, self._stages = outbound.flows, outbound.stages
        self._delivery = delivery
        self._frames = frames
        self._indices = indices
        self._link_of = link_of
        self._way = way
        self._report = report
        self._written = written
        self._sealed = memoryview(bytearray(LARGEST))
        self._opened = memoryview(bytearray(LARGEST))
        self._source: _Source | None = None
        self._arrival: _Arrival | None = None

    # --- From the TUN -----------------------------------------------------------------------------------

    def leave(self, length: int, now: float) -> bool:
        """Take the frame in the TUN's buffer and send it at once, if it is a packet that needs no thought.

        False: nothing has been done, it is for `Outbound`.
        """
        if length > LONG:
            return self._refuse()
        buffer = self._buffer
        if buffer[SIZE] == PLAIN_IPV4:
            tcp = buffer[SIZE + 9] == TCP
            key = (OUT4_TCP if tcp else OUT4)(buffer)
        else:
            tcp = buffer[SIZE + 6] == TCP
            key = (OUT6_TCP if tcp else OUT6)(buffer)
        flow = self._flows.get(key)
        if flow is None or flow.kind is not None or length < flow.least or self._stages:
            return self._refuse()
        if tcp and length <= SIZE + LONGEST_SELECTIVE and selective(self._view[SIZE:length]):
            return self._refuse()  # it carries another one along
        link, lane = flow.link, flow.lane
        if lane is None or lane.keypair is not link.agreed or lane.endpoints is not link.endpoints:
            lane = flow.lane = self._lane(link)
            if lane is None:
                return self._refuse()
        keypair, size = lane.keypair, length - START
        counter, aead = keypair.chunk_counter, keypair.chunks_send
        if (
            aead is None
            or size > link.room
            or now >= lane.until
            or counter >= REJECT_AFTER_MESSAGES
            or keypair is not link.session.current
        ):
            return self._refuse()
        keypair.chunk_counter = counter + 1
        FRAME.pack_into(buffer, START, flow.partial, GSO_NONE, 0, length - SIZE)
        datagram = self._sealed[: size + OVERHEAD]
        datagram[:COUNTER_AT] = lane.head
        _COUNTER.pack_into(datagram, COUNTER_AT, counter)
        nonce = (counter << 32 | _ALONE).to_bytes(12, "little")
        aead.encrypt_into(nonce, self._view[START:length], None, datagram[HEADER_SIZE:])
        for send in lane.sends:
            send(datagram)
        self._account()  # what this answers came before it
        sent = link.sent
        sent.datagrams += 1
        sent.size += size
        sent.at = now
        link.session.data_sent(now, size)
        return True

    def _refuse(self) -> bool:
        """Whatever leaves now leaves after what arrived."""
        self._account()
        return False

    def _lane(self, link: Link) -> Lane | None:
        """Return the lane of a link as it is now; None where there is no way or no agreement."""
        keypair, endpoints = link.agreed, link.endpoints
        if keypair is None or not endpoints:
            return None
        head = _HEAD.pack(MAGIC, 0, 1, keypair.remote_index)
        sends = tuple(self._way(endpoint) for endpoint in endpoints)
        return Lane(keypair, endpoints, keypair.created + REJECT_AFTER_TIME, head, sends)

    # --- From the wire ----------------------------------------------------------------------------------

    def arrive(self, buffer: bytearray, length: int, source: DirectEndpoint, now: float) -> bool:
        """Take one datagram that came alone, in the first `length` bytes: a record of whole packets.

        False: it is something else, or something is wrong; nothing has been done, it is for `Inbound`.
        """
        known = self._source
        if (
            known is None
            or buffer[:COUNTER_AT] != known.head
            or source != known.source
            or known.endpoints is not known.link.endpoints
        ):
            known = self._find(buffer, length, source)
            if known is None:
                return False
            self._source = known
        _, link, keypair, _, _, until = known
        aead, replay, opened = keypair.chunks_receive, keypair.chunk_replay, self._opened
        if aead is None or length < LEAST or now >= until:
            return False
        (counter,) = _COUNTER.unpack_from(buffer, COUNTER_AT)
        if counter <= replay.newest and not replay.check(counter):
            return False
        size = length - OVERHEAD
        stop = BASE + size
        try:
            aead.decrypt_into(
                (counter << 32 | _ALONE).to_bytes(12, "little"),
                memoryview(buffer)[HEADER_SIZE:length],
                None,
                opened[BASE:stop],
            )
        except InvalidTag:
            return False
        flags, gso_type, gso_size, claimed = FRAME.unpack_from(opened, BASE)
        if gso_type != GSO_NONE:
            return False
        if claimed == size - FRAME_SIZE and not gso_size and flags in _FLAGS:
            self._delivery.lone(link, opened[:stop], flags == PARTIAL_CHECKSUM)
        else:
            self._frames(link, opened, stop)
            self._delivery.flush()
        self._arrival = _Arrival(link, keypair, counter, size, now)
        try:
            if keypair is link.session.current:  # else the arrival may make it that, for the answer
                self._written()
        finally:
            self._account()
        return True

    def _find(self, buffer: bytearray, length: int, source: DirectEndpoint) -> _Source | None:
        """Return what a datagram's head and source say; None where it is not for `arrive`."""
        if length < LEAST or buffer[0] != MAGIC & 0xFF:
            return None
        word, index, count, receiver, _ = HEADER.unpack_from(buffer)
        found = self._indices.get(receiver)
        if word != MAGIC or index or count != 1 or found is None:
            return None
        session, keypair = found
        link = self._link_of(session)
        if link is None or source not in link.endpoints:
            return None
        until = keypair.created + REJECT_AFTER_TIME
        return _Source(bytes(buffer[:COUNTER_AT]), link, keypair, source, link.endpoints, until)

    def _account(self) -> None:
        """Tell of what arrived, if that was not done yet."""
        if self._arrival is None:
            return
        link, keypair, counter, size, now = self._arrival
        self._arrival = None
        keypair.chunk_replay.mark(counter)
        tally = keypair.tally
        tally.add(counter, 1)
        received = link.received
        received.datagrams += 1
        received.size += size
        received.at = now
        link.session.data_received(now, size, keypair)
        if size >= REPORT_SIZE and now >= tally.quiet and tally.due(now):
            self._report(link, keypair)
