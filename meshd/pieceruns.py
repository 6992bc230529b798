"""Which records of one datagram are opened, or joined, at a time: runs of pieces of one super-packet."""

from __future__ import annotations

from typing import NamedTuple

from crossedge.meshd.packet import TCP, Layout, outline, transport_header
from crossedge.meshd.sidebyside import Datagram
from crossedge.meshd.superframe import FRAME, FRAME_FLAGS, FRAME_SIZE, LAST_PIECE, OVERHEAD
from crossedge.meshd.virtio import GSO_NONE, GSO_TYPES
from crossedge.wire.errors import WireError


class Opened(NamedTuple):
    """A record of one datagram."""

    counter: int
    position: int
    plaintext: bytes


class Shape(NamedTuple):
    """What the first piece of a run says about all of them."""

    layout: Layout
    head: int
    """Length of frame header and packet headers."""
    stride: int
    """Length of a whole piece's payload."""
    flags: int
    gso_type: int
    gso_size: int


def shape_of(plaintext: memoryview) -> Shape:
    """Read the headers of a piece, frame header first; raises `WireError`."""
    size = len(plaintext)
    if size < FRAME_SIZE:
        raise WireError("frame-truncated")
    flags, gso_type, gso_size, length = FRAME.unpack_from(plaintext)
    if flags & ~FRAME_FLAGS:
        raise WireError("frame-flags")
    if gso_type not in GSO_TYPES:
        raise WireError("frame-position" if gso_type == GSO_NONE else "gso-type")
    if length != size - FRAME_SIZE:
        raise WireError("frame-length")
    packet = plaintext[FRAME_SIZE:]
    layout = outline(packet)
    header = transport_header(packet, layout)
    if not header:
        raise WireError("gso-header")
    stride = length - header
    if not stride or not gso_size:
        raise WireError("gso-size")
    if layout.protocol != TCP and stride % gso_size and not flags & LAST_PIECE:
        raise WireError("gso-size")
    return Shape(layout, FRAME_SIZE + header, stride, flags, gso_type, gso_size)


def length_of(datagram: Datagram) -> int:
    """Return the plaintext's length."""
    return datagram[3] - datagram[2] - OVERHEAD


def run_end(datagrams: list[Datagram], first: int) -> int:
    """Return the end of what is opened together: consecutive pieces of one super-packet, or one datagram.

    Where a counter comes twice, only opening tells which is genuine, and a forged one must not part its
    neighbours: then it is the end of all consecutive counters.
    """
    counter, index, start, end, _, _, _ = datagrams[first]
    size = end - start
    same = True
    total = len(datagrams)
    for after in range(first + 1, total):
        next_counter, next_index, start, end, count, _, _ = datagrams[after]
        if next_counter != counter + 1 or count != 1:
            if next_counter == counter and count == 1:
                return _consecutive_end(datagrams, after)
            return after
        if after + 1 < total and datagrams[after + 1][0] == next_counter:
            return _consecutive_end(datagrams, after)
        if not same or next_index != index + 1 or end - start > size:
            return after
        same = end - start == size
        counter, index = next_counter, next_index
    return total


def _consecutive_end(datagrams: list[Datagram], first: int) -> int:
    """Return the end of the records of one datagram whose counters follow one another, copies among them."""
    after = first + 1
    while (
        after < len(datagrams)
        and datagrams[after][4] == 1
        and datagrams[after][0] - datagrams[after - 1][0] <= 1
    ):
        after += 1
    return after


def opened_end(opened: list[Opened], first: int) -> int:
    """Return the end of the run of consecutive pieces that begins at `first`."""
    after = first + 1
    size = len(opened[first].plaintext)
    while after < len(opened):
        before, piece = opened[after - 1], opened[after]
        if (
            piece.counter != before.counter + 1
            or piece.position != before.position + 1
            or len(piece.plaintext) > size
            or len(before.plaintext) != size
        ):
            break
        after += 1
    return after
