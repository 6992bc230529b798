"""From an opened frame to the TUN: the last checks before the kernel sees what a peer sent.

Every packet is parsed, its addresses are judged, its virtio header is made anew. What fails is dropped and
counted under the reason; nothing here raises for a peer's fault.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from crossedge.meshd.coalesce import Coalescer
from crossedge.meshd.link import Link
from crossedge.meshd.packet import Layout, addresses, claimed_length, dissect, source_routed
from crossedge.meshd.policy import Policy
from crossedge.meshd.segment import mend
from crossedge.meshd.sink import Sink
from crossedge.meshd.virtio import GSO_NONE, SIZE, Header
from crossedge.wire.errors import WireError

PLAIN_IPV4: Final = 0x45  # first byte of a packet without options


class Delivery:
    """Takes packets of a link, with room for a virtio header in front, and hands good ones to the sink."""

    __slots__ = ("_coalescer", "_dropped", "_mtu", "_policy", "_sink")

    def __init__(self, sink: Sink, policy: Policy, mtu: int, dropped: Counter[str]) -> None:
        """`mtu` bounds a segment of a super-packet with its headers, in bytes."""
        self._sink = sink
        self._coalescer = Coalescer(sink)
        self._policy = policy
        self._mtu = mtu
        self._dropped = dropped

    @property
    def joined(self) -> int:
        """How many packets were written inside of super-packets that were made here."""
        return self._coalescer.joined

    def follows(self, link: Link, packet: memoryview) -> bool:
        """Take a packet with a whole checksum if it plainly continues the last one (`Coalescer.extend`)."""
        return self._coalescer.extend(link, packet)

    def frame(
        self, link: Link, frame: memoryview, gso_type: int, gso_size: int, needs_checksum: bool
    ) -> None:
        """Take a whole packet or super-packet at `frame[SIZE:]`, which others may follow."""
        judged = self._judge(link, frame[SIZE:], gso_type, gso_size, needs_checksum)
        if judged is None:
            return
        layout, virtio = judged
        if virtio.gso_type == GSO_NONE:
            self._coalescer.add(frame, layout, virtio, link)
        else:
            self._coalescer.flush()
            self._sink.write(frame, virtio, layout)

    def lone(self, link: Link, frame: memoryview, gso_type: int, gso_size: int, needs_checksum: bool) -> None:
        """Take a whole packet or super-packet at `frame[SIZE:]` that nothing came before or follows."""
        judged = self._judge(link, frame[SIZE:], gso_type, gso_size, needs_checksum)
        if judged is not None:
            self._sink.write(frame, judged[1], judged[0])

    def run(
        self,
        link: Link,
        frame: memoryview,
        layout: Layout,
        gso_type: int,
        gso_size: int,
        needs_checksum: bool,
        before: int | None,
        last: bool,
    ) -> None:
        """Take a run of pieces: at `frame[SIZE:]` the whole's headers and a part of its payload.

        `before` is how much payload comes before it; None (then it must be the last part) is worked out.
        """
        packet = frame[SIZE:]
        try:
            self._admit(link, packet)
            missing = claimed_length(packet) - len(packet)
            if before is None:
                before = missing
            if not 0 <= before <= missing or last != (before == missing):
                raise WireError("inner-length")
            if before or not last:
                mend(packet, layout, before, gso_size, last)
            virtio = Header.for_packet(packet, layout, gso_type, gso_size, needs_checksum, self._mtu)
        except WireError as error:
            self._dropped[error.reason] += 1
            return
        self._coalescer.flush()
        self._sink.write(frame, virtio, layout)

    def flush(self) -> None:
        """Write what was kept to be joined."""
        self._coalescer.flush()

    def _judge(
        self, link: Link, packet: memoryview, gso_type: int, gso_size: int, needs_checksum: bool
    ) -> tuple[Layout, Header] | None:
        try:
            layout = dissect(packet)
            self._admit(link, packet)
            return layout, Header.for_packet(packet, layout, gso_type, gso_size, needs_checksum, self._mtu)
        except WireError as error:
            self._dropped[error.reason] += 1
            return None

    def _admit(self, link: Link, packet: memoryview) -> None:
        verdict = self._policy.inbound(addresses(packet))
        if verdict is not link:
            raise WireError(verdict if isinstance(verdict, str) else "inner-source")
        if packet[0] != PLAIN_IPV4 and source_routed(packet):
            raise WireError("inner-source-route")
