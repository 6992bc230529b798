"""From an opened frame to the TUN: the last checks before the kernel sees what a peer sent.

Every packet is parsed, its addresses are judged, its virtio header is made anew. What fails is dropped and
counted under the reason; nothing here raises for a peer's fault.
"""

from __future__ import annotations

from collections import Counter

from crossedge.meshd.bigtcp import Joiner, Key
from crossedge.meshd.coalesce import Coalescer
from crossedge.meshd.flow import FLOWS_KEPT, InFlow, in_flow, inbound_key, may_recall
from crossedge.meshd.link import Link
from crossedge.meshd.packet import (
    PLAIN_IPV4,
    Layout,
    addresses,
    claimed_length,
    dissect,
    source_routed,
)
from crossedge.meshd.policy import Policy
from crossedge.meshd.segment import mend
from crossedge.meshd.sink import Sink
from crossedge.meshd.virtio import GSO_NONE, GSO_TCPV4, SIZE, Header
from crossedge.wire.errors import WireError


class Delivery:
    """Takes packets of a link, with room for a virtio header in front, and hands good ones to the sink."""

    __slots__ = (
        "_dropped",
        "_flows",
        "_last",
        "_last_flow",
        "_mtu",
        "_policy",
        "_sink",
        "coalescer",
        "joiner",
    )

    def __init__(self, sink: Sink, policy: Policy, mtu: int, dropped: Counter[str]) -> None:
        """`mtu` bounds a segment of a super-packet with its headers, in bytes."""
        self._sink = sink
        self.coalescer = Coalescer(sink)
        """What joins plain packets; runs of transport data grow what was begun here."""
        self.joiner = Joiner(sink)
        """What joins super-packets of bulk. While something waits in it nothing does in the coalescer."""
        self._policy = policy
        self._mtu = mtu
        self._dropped = dropped
        self._flows: dict[Key, InFlow] = {}
        self._last: Key | None = None  # of the packet that `bulk` saw last, and what is known of its flow
        self._last_flow: InFlow | None = None
        policy.watch(self.forget)

    def forget(self) -> None:
        """Judge every flow afresh: the policy, or the device, is another one."""
        self._flows.clear()
        self._last = None

    @property
    def joined(self) -> int:
        """How many packets were written inside of super-packets that were made here."""
        return self.coalescer.joined + self.joiner.joined

    def follows(self, link: Link, packet: memoryview) -> bool:
        """Take a packet with a whole checksum if it plainly continues the last one (`Coalescer.extend`)."""
        return self.coalescer.extend(link, packet)

    def frame(
        self, link: Link, frame: memoryview, gso_type: int, gso_size: int, needs_checksum: bool
    ) -> None:
        """Take a whole packet or super-packet at `frame[SIZE:]`, which others may follow."""
        if self.joiner.frames:
            self.joiner.flush()
        flow = self._judge(link, frame, gso_type, gso_size, needs_checksum)
        if flow is None:
            return
        if flow.virtio.gso_type != GSO_NONE:
            self.coalescer.flush()
        elif self.coalescer.growing or len(frame) > flow.shortest:
            self.coalescer.add(frame, flow.layout, flow.virtio, link)
            return
        if flow.packed:
            self._sink.put(frame, flow.packed)
        else:
            self._sink.write(frame, flow.virtio, flow.layout)

    def lone(self, link: Link, frame: memoryview, needs_checksum: bool) -> None:
        """Take a whole packet, no super-packet, at `frame[SIZE:]` that nothing came before or follows."""
        flow = self._judge(link, frame, GSO_NONE, 0, needs_checksum)
        if flow is None:
            return
        if flow.packed:
            self._sink.put(frame, flow.packed)
        else:
            self._sink.write(frame, flow.virtio, flow.layout)

    def bulk(self, link: Link, frame: memoryview, gso_type: int, gso_size: int, needs_checksum: bool) -> bool:
        """Write a packet that the coalescer has no use for, if its flow is the one before's or another known.

        Others may be joined to it: its memory must not change as long as `joiner.frames` has it. False where
        it is for `frame`: nothing is done.
        """
        found = inbound_key(frame)
        if found is None:
            return False
        (read, claimed), size = found, len(frame)
        key, flow = (link, gso_type, gso_size, needs_checksum, read), self._last_flow
        if flow is None or key != self._last:
            flow, self._last = self._flows.get(key), key
            self._last_flow = flow
            if flow is None:
                return False
        if claimed != size or not flow.shortest <= size <= flow.longest or not flow.packed:
            return False
        if self.coalescer.growing:
            self.coalescer.flush()
        if gso_type == GSO_TCPV4 and self._sink.offloads.big_tcp:
            self.joiner.take(frame, flow.packed, gso_size, key)
            return True
        if self.joiner.frames:
            self.joiner.flush()
        self._sink.put(frame, flow.packed)
        return True

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
        self.flush()
        self._sink.write(frame, virtio, layout)

    def flush(self) -> None:
        """Write what was kept to be joined."""
        if self.joiner.frames:
            self.joiner.flush()
        if self.coalescer.growing:
            self.coalescer.flush()

    def _judge(
        self, link: Link, frame: memoryview, gso_type: int, gso_size: int, needs_checksum: bool
    ) -> InFlow | None:
        """Return what is known of a good packet; None where it was dropped."""
        found = inbound_key(frame)
        if found is None:
            return self._judge_afresh(None, link, frame, gso_type, gso_size, needs_checksum)
        (read, claimed), size = found, len(frame)
        key = link, gso_type, gso_size, needs_checksum, read
        flow = self._flows.get(key)
        if flow is not None and claimed == size and flow.shortest <= size <= flow.longest:
            return flow
        return self._judge_afresh(key, link, frame, gso_type, gso_size, needs_checksum)

    def _judge_afresh(
        self,
        key: Key | None,
        link: Link,
        frame: memoryview,
        gso_type: int,
        gso_size: int,
        needs_checksum: bool,
    ) -> InFlow | None:
        packet = frame[SIZE:]
        try:
            layout = dissect(packet)
            self._admit(link, packet)
            virtio = Header.for_packet(packet, layout, gso_type, gso_size, needs_checksum, self._mtu)
        except WireError as error:
            self._dropped[error.reason] += 1
            return None
        flow = in_flow(frame, layout, virtio, self._sink.offloads)
        if (
            key is not None
            and virtio.gso_type == gso_type
            and len(frame) <= flow.longest
            and may_recall(packet, layout)
        ):
            if len(self._flows) >= FLOWS_KEPT:
                self._flows.clear()
            self._flows[key] = flow
        return flow

    def _admit(self, link: Link, packet: memoryview) -> None:
        verdict = self._policy.inbound(addresses(packet))
        if verdict is not link:
            raise WireError(verdict if isinstance(verdict, str) else "inner-source")
        if packet[0] != PLAIN_IPV4 and source_routed(packet):
            raise WireError("inner-source-route")
