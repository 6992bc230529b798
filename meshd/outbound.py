"""From the TUN to the wire: whose packet it is, in what form it leaves, and in which train.

Packets of one drain are staged per link and sealed together; a super-packet is sealed at once, behind what
was staged for its link before. Where there is no session yet, packets wait in the link's queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from crossedge.meshd.ackfilter import (
    LONGEST,
    LONGEST_SELECTIVE,
    Repeats,
    Staged,
    form_of,
    replaces,
    selective,
    supersedes,
)
from crossedge.meshd.checksum import complete
from crossedge.meshd.flow import (
    FLOWS_KEPT,
    OUT4,
    OUT4_TCP,
    OUT6,
    OUT6_TCP,
    OutFlow,
    SuperKind,
    as_claimed,
    out_flow,
    usual_place,
)
from crossedge.meshd.joining import UdpRun
from crossedge.meshd.keypair import CounterExhaustedError
from crossedge.meshd.link import Link
from crossedge.meshd.packet import (
    CLAIMED,
    IPV4_HEADER,
    IPV6_HEADER,
    PLAIN_IPV4,
    TCP,
    TCP_CHECKSUM,
    UDP_CHECKSUM,
    may_fragment,
)
from crossedge.meshd.parts import START, Parts
from crossedge.meshd.policy import NO_PEER, Policy
from crossedge.meshd.segment import fragments, split
from crossedge.meshd.sink import LARGEST_PACKET, Sink
from crossedge.meshd.staging import Stage, Staging
from crossedge.meshd.stockseal import room as transport_room
from crossedge.meshd.superframe import (
    FRAME,
    FRAME_SIZE,
    LAST_PIECE,
    PADDING_MOST,
    PARTIAL_CHECKSUM,
    POSITIONS,
)
from crossedge.meshd.toobig import IPV6_LEAST, TooBigAnswers
from crossedge.meshd.train import Transmit
from crossedge.meshd.unclaimed import Unclaimed
from crossedge.meshd.virtio import (
    GSO_ECN,
    GSO_NONE,
    GSO_UDP_L4,
    HEADER,
    NEEDS_CHECKSUM,
    SIZE,
    SMALLEST_SEGMENT,
)
from crossedge.wire.errors import WireError

LARGEST_FRAME: Final = 393_216  # bytes: what a device gives out that has super-packets beyond 64 KiB


class Outbound:
    """Takes frames from the TUN one by one; `flush` ends the drain."""

    __slots__ = (
        "_ack",
        "_dropped",
        "_frames",
        "_packets",
        "_parts",
        "_policy",
        "_repeats",
        "_run",
        "_run_of",
        "_split",
        "_staging",
        "_too_big",
        "_unclaimed",
        "_unknown",
        "_wanted",
        "_wants",
        "buffer",
        "flows",
        "stages",
        "view",
    )

    def __init__(
        self,
        policy: Policy,
        sink: Sink,
        transmit: Transmit,
        wanted: Callable[[Link], None],
        unknown: Callable[[bytes], None],
        dropped: Counter[str],
    ) -> None:
        self._policy = policy
        self._wanted = wanted
        self._unknown = unknown
        self._dropped = dropped
        self.flows: dict[tuple[Any, ...], OutFlow] = {}
        """What is known of frames, by their keys; it stays the same dictionary."""
        policy.watch(self.flows.clear)
        self._too_big = TooBigAnswers(sink, dropped)
        self._unclaimed = Unclaimed()
        self._staging = staging = Staging(transmit, dropped)
        self._frames, self._packets = staging.frames, staging.packets
        self.stages = staging.stages
        """What has not left yet of this drain; it stays the same dictionary."""
        self._wants: set[Link] = set()
        self.buffer = bytearray(SIZE + LARGEST_FRAME + PADDING_MOST)
        """The TUN is read into this; `take` overwrites it."""
        self.view = memoryview(self.buffer)
        self._split = memoryview(bytearray(LARGEST_PACKET))
        self._run = UdpRun()
        self._run_of: tuple[Link, Stage] | None = None
        self._ack: Staged | None = None
        self._repeats = Repeats()
        self._parts = Parts(staging, self._super_packet)

    def take(self, length: int, now: float) -> None:
        """Take the frame (virtio header and packet) in the first `length` bytes of the buffer."""
        buffer, ack = self.buffer, self._ack
        if ack is not None:
            if length == SIZE + len(ack.source) and buffer.startswith(ack.header):
                later = int.from_bytes(ack.source, "big")
                if supersedes(ack.form, later, ack.earlier):
                    ack.target[:] = ack.source
                    ack.earlier = later
                    self._dropped["outbound-ack-superseded"] += 1
                    return
            self._ack = None
        if self._run_of is not None:
            if self._run.append(buffer, length, self.view):
                return
            self._close_run()
        if buffer[SIZE] == PLAIN_IPV4:
            key = (OUT4_TCP if buffer[SIZE + 9] == TCP else OUT4)(buffer)
        else:
            key = (OUT6_TCP if buffer[SIZE + 6] == TCP else OUT6)(buffer)
        flow = self.flows.get(key)
        if flow is None or length < flow.least or (flow.kind is not None and not as_claimed(buffer, length)):
            self._take_afresh(key, length, now)
            return
        link = flow.link
        stage = self.stages.get(link) or self._staging.open(link, now)
        try:
            if stage is None:
                self._wait(link, length)
            elif flow.kind is not None:
                self._super_packet(link, stage, buffer, self.view, length, flow.kind, now)
            elif not stage.superframes or flow.joinable:
                self._plain(link, stage, length, flow.partial, flow.start, flow.offset, now)
            else:
                header = b"" if length > SIZE + LONGEST else bytes(self.view[:SIZE])
                FRAME.pack_into(buffer, START, flow.partial, GSO_NONE, 0, length - SIZE)
                self._stage_packet(link, stage, length)
                source = self.view[SIZE:length]
                if header and (form := form_of(source)) is not None:
                    target = stage.view[stage.used - (length - SIZE) : stage.used]
                    self._ack = Staged(form, header, source, target)
        except WireError:
            self._dropped["outbound-malformed"] += 1
        except CounterExhaustedError:
            self._dropped["counter-exhausted"] += 1

    def _take_afresh(self, key: tuple[Any, ...], length: int, now: float) -> None:
        """Take a frame of which nothing is remembered; what its key says about it then is."""
        link = self._judge(length, now)
        if link is None:
            return
        stage = self.stages.get(link) or self._staging.open(link, now)
        if stage is None:
            self._wait(link, length)
            return
        frame = self.view[:length]
        flags, gso_type, _, _, start, offset = HEADER.unpack_from(frame)
        try:
            kind = SuperKind.of(frame) if gso_type & ~GSO_ECN != GSO_NONE else None
            flow = out_flow(frame, link, kind)
            if flow is not None:
                if len(self.flows) >= FLOWS_KEPT:
                    self.flows.clear()
                self.flows[key] = flow
            if kind is not None:
                self._super_packet(link, stage, self.buffer, self.view, length, kind, now)
            else:
                self._plain(link, stage, length, bool(flags & NEEDS_CHECKSUM), start, offset, now)
        except WireError:
            self._dropped["outbound-malformed"] += 1
        except CounterExhaustedError:
            self._dropped["counter-exhausted"] += 1

    def _judge(self, length: int, now: float) -> Link | None:
        """Return to whom the frame in the buffer may go; None where it was dropped or waits to be claimed."""
        version = self.buffer[SIZE] >> 4
        if version == 4 and length >= SIZE + IPV4_HEADER:
            verdict = self._policy.outbound(bytes(self.view[SIZE + 12 : SIZE + 20]))
        elif version == 6 and length >= SIZE + IPV6_HEADER:
            verdict = self._policy.outbound(bytes(self.view[SIZE + 8 : SIZE + 40]))
        else:
            verdict = "outbound-version"
        if not isinstance(verdict, str):
            return verdict
        self._dropped[verdict] += 1
        if verdict == NO_PEER:
            first, last = (16, 20) if version == 4 else (24, 40)
            self._unclaimed.hold(bytes(self.view[:length]), now)
            self._unknown(bytes(self.view[SIZE + first : SIZE + last]))
        return None

    def flush(self, now: float) -> None:
        """Seal and send what was staged, and tell the sessions."""
        self._ack = None
        if self._run_of is not None:
            self._close_run()
        self._staging.flush(now)
        self._wants.clear()

    def claim(self, now: float) -> None:
        """Send what was counted as dropped because nobody known had its address, where somebody has now."""
        for at, frame in self._unclaimed.take(now):
            first, last = (12, 20) if frame[SIZE] >> 4 == 4 else (8, 40)
            if self._policy.outbound(frame[SIZE + first : SIZE + last]) == NO_PEER:
                self._unclaimed.hold(frame, at)
                continue
            self._dropped[NO_PEER] -= 1
            self.view[: len(frame)] = frame
            self.take(len(frame), now)
        self.flush(now)

    def flush_queue(self, link: Link, now: float) -> None:
        """Send what waits in a link's queue, in order; what cannot leave yet goes on waiting."""
        for frame in link.take_queue():
            self.view[: len(frame)] = frame
            self.take(len(frame), now)
        self.flush(now)

    # --- Staging -------------------------------------------------------------------------------------------

    def _wait(self, link: Link, length: int) -> None:
        """Let the frame in the buffer wait for what its link needs to send."""
        self._hold(link, self.view[:length])
        if link not in self._wants:
            self._wants.add(link)
            self._wanted(link)

    def _hold(self, link: Link, frame: memoryview) -> None:
        dropped = link.hold(bytes(frame))
        if dropped:
            self._dropped["queue-full"] += dropped

    # --- Plain packets -------------------------------------------------------------------------------------

    def _plain(
        self, link: Link, stage: Stage, length: int, partial: bool, start: int, offset: int, now: float
    ) -> None:
        if not (partial and self._begin_run(link, stage, length)):
            self._packet(link, stage, length, partial, start, offset, now)

    def _packet(
        self, link: Link, stage: Stage, length: int, partial: bool, start: int, offset: int, now: float
    ) -> None:
        packet = self.view[SIZE:length]
        if partial and not (stage.superframes and usual_place(packet, start, offset)):
            if start + offset + 2 > len(packet):
                raise WireError("checksum-place")
            complete(packet, start, start + offset, udp=offset == UDP_CHECKSUM)
            partial = False
        if not stage.superframes and length - SIZE > transport_room(link):
            self._too_long(link, stage, length, now)
            return
        FRAME.pack_into(self.buffer, START, PARTIAL_CHECKSUM if partial else 0, GSO_NONE, 0, length - SIZE)
        self._stage_packet(link, stage, length)

    def _stage_packet(self, link: Link, stage: Stage, length: int) -> None:
        """Take the packet in the buffer, whose frame header is written, or put it in the last one's place."""
        frame = self.view[START:length]
        if length <= SIZE + LONGEST and stage.ends:
            last = stage.view[stage.ends[-2] if len(stage.ends) > 1 else 0 : stage.used]
            if len(last) == len(frame) and replaces(frame[FRAME_SIZE:], last[FRAME_SIZE:]):
                last[:] = frame
                self._dropped["outbound-ack-superseded"] += 1
                return
        if length <= SIZE + LONGEST_SELECTIVE and selective(frame[FRAME_SIZE:]):
            if stage.ends:
                self._staging.seal(link, stage)
            if stage.superframes and (before := self._repeats.before(frame[FRAME_SIZE:], frame)):
                self._staging.add(link, stage, memoryview(before))
            self._staging.add(link, stage, frame)
            self._staging.seal(link, stage)  # in a datagram of its own: its loss is that of no other
            return
        self._staging.add(link, stage, frame)

    def _too_long(self, link: Link, stage: Stage, length: int, now: float) -> None:
        """Do with a packet what can be done where transport data has no room for it.

        A meshd will take it as a superframe soon. For a stock peer it is fragmented or answered; an IPv6
        packet of 1,280 bytes or less is sent all the same, since its sender could not make it shorter.
        """
        packet = self.view[SIZE:length]
        room = transport_room(link)
        if not link.stock:
            HEADER.pack_into(self.buffer, 0, 0, GSO_NONE, 0, 0, 0, 0)  # its checksum is whole by now
            self._hold(link, self.view[:length])
        elif may_fragment(packet):
            pieces = fragments(packet, room)
            for piece in pieces:
                self._staging.add(link, stage, memoryview(FRAME.pack(0, GSO_NONE, 0, len(piece)) + piece))
            if not pieces:
                self._dropped["outbound-too-big"] += 1
        elif packet[0] >> 4 == 6 and len(packet) <= IPV6_LEAST:
            FRAME.pack_into(self.buffer, START, 0, GSO_NONE, 0, len(packet))
            self._staging.add(link, stage, self.view[START:length])
        else:
            self._too_big.answer(packet, room, now)

    # --- Runs of UDP packets -------------------------------------------------------------------------------

    def _begin_run(self, link: Link, stage: Stage, length: int) -> bool:
        """Keep a UDP packet back to join others to it; False where it is none that could be joined."""
        if (
            not stage.superframes
            or GSO_UDP_L4 not in link.gso
            or length - START > link.room
            or not self._run.begin(self.view[:length])
        ):
            return False
        self._run_of = link, stage
        return True

    def _close_run(self) -> None:
        """Send what was kept back, which `_super_packet` need not cut: each packet fits a datagram."""
        if self._run_of is None:
            return
        (link, stage), run = self._run_of, self._run
        self._run_of = None
        joined, length = run.count, run.finish()
        try:
            if joined == 1:
                FRAME.pack_into(run.buffer, START, PARTIAL_CHECKSUM, GSO_NONE, 0, length - SIZE)
                self._staging.add(link, stage, run.view[START:length])
            else:
                kind = SuperKind.of(run.view[:length])
                self._super_packet(link, stage, run.buffer, run.view, length, kind, 0.0)
        except CounterExhaustedError:
            self._dropped["counter-exhausted"] += 1

    # --- Super-packets -------------------------------------------------------------------------------------

    def _super_packet(
        self,
        link: Link,
        stage: Stage,
        buffer: bytearray | memoryview,
        view: memoryview,
        length: int,
        kind: SuperKind,
        now: float,
    ) -> None:
        """Send the super-packet in the first `length` bytes of a buffer, of which `view` is the view."""
        if kind.measures is not link.growth.measures:
            self._measure(link, kind)
        if length > SIZE + CLAIMED:
            self._parts.send(link, stage, view, length, kind, now)
            return
        if not stage.superframes:
            self._as_transport(link, stage, view[SIZE:length], kind, now)
            return
        payload = length - SIZE - kind.header
        stride = kind.stride
        if not stride or payload > POSITIONS * stride:
            self._cut(link, stage, view[SIZE:length], kind, now)
            return
        gso_type, gso_size = kind.gso_type, kind.gso_size
        if payload <= stride:
            FRAME.pack_into(buffer, START, PARTIAL_CHECKSUM | LAST_PIECE, gso_type, gso_size, length - SIZE)
            self._staging.add(link, stage, view[START:length])
            return
        if stage.ends:
            self._staging.seal(link, stage)
        stage.sealed += length - SIZE
        if not kind.most:
            FRAME.pack_into(buffer, START, PARTIAL_CHECKSUM, gso_type, gso_size, 0)
            head = FRAME_SIZE + kind.header
            self._frames.pieces(link, stage.keypair, buffer, START, length, head, stride)
        elif payload > kind.most:
            self._parts.send(link, stage, view, length, kind, now)
        else:
            FRAME.pack_into(buffer, START, PARTIAL_CHECKSUM | LAST_PIECE, gso_type, gso_size, length - SIZE)
            self._frames.whole(link, stage.keypair, view, START, length)

    def _measure(self, link: Link, kind: SuperKind) -> None:
        """Work out how super-packets of a kind are cut on a link's path as it is now."""
        kind.measures = link.growth.measures
        gso_size, head = kind.gso_size, FRAME_SIZE + kind.header
        stride = link.room - head
        if kind.layout.protocol != TCP or gso_size <= stride:
            stride -= stride % gso_size
        kind.stride = stride if kind.gso_type in link.gso and stride >= SMALLEST_SEGMENT else 0
        room = self._frames.record_room(link) if link.growth.datagrams > 1 else 0
        kind.most = max(0, (room - head) // gso_size * gso_size)

    def _as_transport(
        self, link: Link, stage: Stage, packet: memoryview, kind: SuperKind, now: float
    ) -> None:
        """Send a super-packet to a peer that takes no superframes, or not yet."""
        if stage.ends:
            self._staging.seal(link, stage)
        header, gso_size = kind.header, kind.gso_size
        stride = transport_room(link) - header
        if gso_size <= stride or kind.layout.protocol == TCP:
            stride = min(stride, gso_size)
            self._packets.super_packet(link, stage.keypair, packet, kind.layout, header, stride)
            stage.sealed += len(packet)
        elif link.stock and not may_fragment(packet):
            self._too_big.answer(packet[: header + gso_size], transport_room(link), now)
        else:
            self._cut(link, stage, packet, kind, now)

    def _cut(self, link: Link, stage: Stage, packet: memoryview, kind: SuperKind, now: float) -> None:
        """Send a super-packet as plain packets, each as one that was read from the TUN alone."""
        whole, layout = bytearray(packet), kind.layout
        offset = TCP_CHECKSUM if layout.protocol == TCP else UDP_CHECKSUM
        with memoryview(whole) as view:
            for size in split(view, layout, kind.header, kind.gso_size, self._split, full=False):
                self.view[SIZE : SIZE + size] = self._split[:size]
                HEADER.pack_into(self.buffer, 0, NEEDS_CHECKSUM, GSO_NONE, 0, 0, layout.transport, offset)
                self._packet(link, stage, SIZE + size, True, layout.transport, offset, now)
