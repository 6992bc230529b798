"""Super-packets that no one record, or no IP header, has room for: sent as several, which are made in place.

All parts but the last are equally long, so their datagrams are too. The headers of each are written over the
end of the one before, which has left already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from crossedge.meshd.flow import SuperKind
from crossedge.meshd.link import Link
from crossedge.meshd.packet import CLAIMED, IPV4_HEADER, TCP, TCP_CHECKSUM
from crossedge.meshd.segment import Heads, mend, progression
from crossedge.meshd.staging import Stage, Staging
from crossedge.meshd.superframe import FRAME, FRAME_SIZE, LAST_PIECE, PADDING_MOST, PARTIAL_CHECKSUM
from crossedge.meshd.virtio import SIZE

START: Final = SIZE - FRAME_SIZE  # where the frame header goes, over the virtio header

SuperPacket: TypeAlias = Callable[[Link, Stage, memoryview, memoryview, int, SuperKind, float], None]
"""Send one super-packet: its link and stage, the buffer, its view, the length of the frame, kind, now."""


class Parts:
    """Cuts them. What is no record of several datagrams goes the way of any super-packet."""

    __slots__ = ("_staging", "_super_packet")

    def __init__(self, staging: Staging, super_packet: SuperPacket) -> None:
        self._staging = staging
        self._super_packet = super_packet

    def send(
        self, link: Link, stage: Stage, view: memoryview, length: int, kind: SuperKind, now: float
    ) -> None:
        """Send the super-packet in the first `length` bytes of a buffer, of which this is the view."""
        header, gso_size, layout = kind.header, kind.gso_size, kind.layout
        payload = length - SIZE - header
        most = kind.most or (CLAIMED - header) // gso_size * gso_size
        number = -(-payload // most)
        step = -(-payload // number // gso_size) * gso_size
        template = bytearray(view[SIZE : SIZE + header])
        claimed = length - SIZE
        heads = None
        if layout.transport == IPV4_HEADER and layout.protocol == TCP:
            heads = Heads(bytes(template), gso_size, claimed)
        elif claimed > CLAIMED:  # its header says 0, which is not what is in the partial checksum
            place = layout.transport + TCP_CHECKSUM
            partial = int.from_bytes(template[place : place + 2], "big") - claimed
            template[place : place + 2] = (partial % 65535).to_bytes(2, "big")
        if stage.ends:
            self._staging.seal(link, stage)
        done = 0
        if heads is not None and stage.superframes and kind.most:
            done = self._row(link, stage, view, kind, heads, step, number - 1)
        for before in range(done, payload, step):
            after = min(before + step, payload)
            at, end = SIZE + before, SIZE + header + after
            if heads is not None:
                heads.write(view, at, end, before, last=after == payload)
            else:
                view[at : at + header] = template
                mend(view[at:end], layout, before, gso_size, after == payload)
            behind = b"" if after == payload else bytes(view[end : end + PADDING_MOST])
            part = view[before : end + PADDING_MOST]
            self._super_packet(link, stage, part, part, end - before, kind, now)
            view[end : end + len(behind)] = behind

    def _row(
        self,
        link: Link,
        stage: Stage,
        view: memoryview,
        kind: SuperKind,
        heads: Heads,
        step: int,
        number: int,
    ) -> int:
        """Send so many equal parts as records; returns how much payload that was, 0 where it cannot be."""
        header = kind.header
        head, end = FRAME_SIZE + header, SIZE + header + step
        heads.write(view, SIZE, end, 0, last=False)
        FRAME.pack_into(
            view, START, PARTIAL_CHECKSUM | LAST_PIECE, kind.gso_type, kind.gso_size, header + step
        )
        foreseen = progression(view[START : START + head], FRAME_SIZE, step, kind.gso_size, number)
        if foreseen is None:
            return 0
        self._staging.frames.row(link, stage.keypair, view, START, end, foreseen, head, step, number)
        stage.sealed += number * (header + step)
        return number * step
