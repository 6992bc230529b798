"""WireGuard transport data, in trains: for stock peers, and between meshds until superframes are agreed.

The format stands in `keypair`. The plaintext is one IP packet, padded by zeros to a multiple of 16 as far as
the datagram has room (paper, 5.4.6). Outbound a super-packet is cut into packets with whole checksums;
inbound the packets of one flow are joined again by `coalesce`. The outer header's ECN is Not-ECT and its DSCP
0, as with superframes (RFC 6040, 4.1, compatibility mode): a copy would cut trains at every change of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from cryptography.exceptions import InvalidTag

from crossedge.meshd.ackfilter import LONGEST, last_of
from crossedge.meshd.constants import (
    PADDING,
    REJECT_AFTER_MESSAGES,
    TRANSPORT_HEADER,
    TRANSPORT_OVERHEAD,
    MessageType,
)
from crossedge.meshd.delivery import Delivery
from crossedge.meshd.keypair import HEADER, NONCE, Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.packet import (
    IPV4_HEADER,
    IPV6_HEADER,
    TCP,
    Layout,
    claimed_length,
)
from crossedge.meshd.segment import split
from crossedge.meshd.stockrun import Datagrams, Places, Views, join_run, open_stretch, stretch_from
from crossedge.meshd.stockseal import StreamSealer, padded
from crossedge.meshd.train import Train
from crossedge.meshd.virtio import GSO_NONE, SIZE

SCRATCH: Final = 66_000  # bytes: the longest packet, padded

SHORT: Final = LONGEST + PADDING  # bytes of a plaintext that may be an acknowledgement
PATIENCE: Final = 16  # packets that are delivered one by one where runs are of no use


class TransportSealer:
    """Seals packets into the train."""

    __slots__ = ("_streams", "_train", "_view")

    def __init__(self, train: Train) -> None:
        self._train = train
        self._streams = StreamSealer(train)
        self._view = memoryview(bytearray(SCRATCH))

    def packet(self, link: Link, keypair: Keypair, packet: memoryview) -> None:
        """Seal one packet with a whole checksum, no longer than `room`, or longer if it must be."""
        size = len(packet)
        self._view[:size] = packet
        self._seal(link, keypair, size)

    def super_packet(
        self, link: Link, keypair: Keypair, packet: memoryview, layout: Layout, header: int, stride: int
    ) -> None:
        """Cut a super-packet, whose checksum is partial, into packets with `stride` bytes of payload each."""
        count = -(-(len(packet) - header) // stride)
        if count > 1 and layout.protocol == TCP and keypair.send_counter + count <= REJECT_AFTER_MESSAGES:
            self._streams.seal(link, keypair, packet, layout, header, stride)
            return
        for size in split(packet, layout, header, stride, self._view, full=True):
            self._seal(link, keypair, size)

    def _seal(self, link: Link, keypair: Keypair, size: int) -> None:
        """Seal what is in the scratch buffer."""
        view = self._view
        length = padded(size, link)
        if length > size:
            view[size:length] = bytes(length - size)
        counter = keypair.reserve()
        train = self._train
        offset = train.place(link, length + TRANSPORT_OVERHEAD)
        body = offset + TRANSPORT_HEADER
        HEADER.pack_into(train.buffer, offset, MessageType.TRANSPORT, keypair.remote_index, counter)
        keypair.send.encrypt_into(
            NONCE.pack(counter), view[:length], None, train.view[body : offset + length + TRANSPORT_OVERHEAD]
        )


class TransportOpener:
    """Opens what belongs to one keypair at a time, and hands it on."""

    __slots__ = ("_coalescer", "_delivery", "_dropped", "_patience", "_places", "_skip", "_view")

    def __init__(self, delivery: Delivery, dropped: Counter[str]) -> None:
        self._delivery = delivery
        self._coalescer = delivery.coalescer
        self._dropped = dropped
        self._view = memoryview(bytearray(SIZE + SCRATCH))
        self._places = Places()
        self._skip = 0  # packets until a run is tried again,
        self._patience = 1  # at least as many where one fails

    def open(
        self,
        link: Link,
        keypair: Keypair,
        received: memoryview,
        datagrams: list[Datagrams],
        inner: list[tuple[bytes, float]],
    ) -> tuple[int, int]:
        """Open datagrams and deliver their packets; in-session messages go to `inner`, with their arrival.

        What they hold is decrypted in place. Returns how many datagrams were opened, and how many bytes of
        plaintext the packets had.
        """
        opened = total = index = self._skip = 0
        self._patience = 1
        while index < len(datagrams):
            counter, start, end, arrived, count, stride = datagrams[index]
            if count == 1 and link.stock:  # nobody asks when each of its datagrams arrived
                count = stretch_from(datagrams, index)
                stride = datagrams[index + 1][1] - start if count > 1 else 0
                index += count
            else:
                index += 1
            size = end - start - TRANSPORT_OVERHEAD
            if count == 1:
                if self._alone(keypair, received[start + TRANSPORT_HEADER : end], size, counter):
                    opened += 1
                    total += self._packet(link, size, arrived, inner)
                continue
            views = self._places.views(received, start, end - start, stride, count)
            first = 0
            while first < count:
                good = self._open(keypair, views, first, counter + first, count - first)
                opened += good
                if size and good:
                    total += self._take(link, views, first, first + good, arrived, inner)
                first += good + 1
        return opened, total

    def _alone(self, keypair: Keypair, sealed: memoryview, size: int, counter: int) -> bool:
        """Open one datagram; its plaintext is in the buffer then. False where it is forged or replayed."""
        if not keypair.replay.check(counter):
            self._dropped["replay"] += 1
            return False
        try:
            keypair.receive.decrypt_into(NONCE.pack(counter), sealed, None, self._view[SIZE : SIZE + size])
        except InvalidTag:
            self._dropped["bad-tag"] += 1
            return False
        keypair.replay.mark(counter)
        return True

    def _open(self, keypair: Keypair, views: Views, first: int, counter: int, count: int) -> int:
        """Open datagrams of a stretch from the one on that has `counter`; returns how many there were.

        The next one behind them, if it is one of the `count`, is forged or replayed, and counted so.
        """
        fresh = keypair.replay.check_range(counter, count)
        many = (fresh ^ (fresh + 1)).bit_length() - 1  # up to the first that is not
        good = open_stretch(keypair, views, first, counter, many) if many else 0
        if good:
            keypair.replay.commit_range(counter, good)
        if good < count:
            self._dropped["replay" if good == many else "bad-tag"] += 1
        return good

    def _take(
        self,
        link: Link,
        views: Views,
        index: int,
        after: int,
        arrived: float,
        inner: list[tuple[bytes, float]],
    ) -> int:
        """Deliver plaintexts of a stretch; returns how many bytes those of packets have."""
        view, size, total = self._view, views.size, 0
        while index < after:
            if self._skip:
                self._skip -= 1
            else:
                run = join_run(self._coalescer, link, views, index, after - index)
                if run.taken:
                    self._patience = 1
                    total += run.taken * size
                    index += run.taken
                    if index == after:
                        break
                elif run.tried:
                    self._skip = max(run.tried, self._patience)
                    self._patience = min(2 * self._patience, PATIENCE)
            if size <= SHORT:
                last = last_of(views.plain, index, after)
                if last > index:
                    self._dropped["inbound-ack-superseded"] += last - index
                    total += (last - index) * size
                    index = last
            view[SIZE : SIZE + size] = views.plain[index]
            index += 1
            total += self._packet(link, size, arrived, inner)
        return total

    def _packet(self, link: Link, size: int, arrived: float, inner: list[tuple[bytes, float]]) -> int:
        """Deliver the plaintext in the buffer; returns its length in bytes if it is a packet."""
        if not size:
            return 0  # a keepalive
        version = self._view[SIZE] >> 4
        if not version and not link.stock:
            inner.append((bytes(self._view[SIZE : SIZE + size]), arrived))
            return 0
        self._deliver(link, size, version)
        return size

    def _deliver(self, link: Link, size: int, version: int) -> None:
        """Cut the padding off and deliver the packet in the buffer."""
        if version not in (4, 6):
            self._dropped["inner-version"] += 1
            return
        if size < (IPV4_HEADER if version == 4 else IPV6_HEADER):
            self._dropped["inner-truncated"] += 1
            return
        length = claimed_length(self._view[SIZE : SIZE + size])
        if length > size:
            self._dropped["inner-length"] += 1
            return
        if self._delivery.follows(link, self._view[SIZE : SIZE + length]):
            return
        self._delivery.frame(link, self._view[: SIZE + length], GSO_NONE, 0, needs_checksum=False)
