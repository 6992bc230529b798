"""The chunks of one record that came side by side, as a train or in slots, before anybody has opened them.

    as they came    header 0 | chunk 0 | header 1 | chunk 1 | header 2 | chunk 2
    apart           header 0 | chunk 0   chunk 1   chunk 2         and   header 1   header 2

Where the headers but the first were put aside while they were read, what was sealed is contiguous already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from struct import Struct
from typing import Final

from crossedge.meshd.growth import RECORD_DATAGRAMS
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.superframe import HEADER, HEADER_SIZE, INDICES, MAGIC

RECEIVER_AT: Final = 4  # in the header; the counter is behind it
SHAPES_KEPT: Final = 32  # of records side by side

Datagram = tuple[int, int, int, int, int, int, int]
"""A superframe datagram in the receive buffer: counter, index, start, end, count, 0, 0. They sort by counter.

Or what looks like consecutive chunks of a record, the first of which has this index. The last two numbers are
then the length of each datagram and the distance from one to the next; that is 0 where it looks like a whole
record whose headers but the first were put aside.
"""


def one_record(buffer: bytearray, start: int, heads: memoryview) -> bool:
    """Tell whether the train at `start` with these heads looks like one record."""
    word, index, count, receiver, counter = HEADER.unpack_from(buffer, start)
    last = len(heads) - HEADER_SIZE
    return (
        word == MAGIC
        and not index
        and len(heads) == (count - 1) * HEADER_SIZE
        and bytes(heads[2::HEADER_SIZE]) == INDICES[1:count]
        and HEADER.unpack_from(heads, last) == (word, count - 1, count, receiver, counter)
    )


def chunks_from(
    buffer: bytearray, begin: int, stop: int, left: int, stride: int, index: int, count: int
) -> int:
    """Return how many chunks of a record seem to lie side by side from `buffer[begin:stop]`, its `index`, on.

    `left` is how many bytes follow that datagram; what it returns is 0 or more than 1.
    """
    many = min(count - index, left // stride + 1 if stride else 1)
    if many < 2:
        return 0
    past = stop + (many - 1) * stride
    word, _, _, receiver, counter = HEADER.unpack_from(buffer, begin)
    last = HEADER.unpack_from(buffer, past - stop + begin)
    if last != (word, index + many - 1, count, receiver, counter):
        return 0
    if buffer[begin + 2 : past : stride] != INDICES[index : index + many]:
        return 0
    if many < count:  # opening will not tell at once whether they belong together
        for place in range(begin + RECEIVER_AT, begin + HEADER_SIZE):
            if buffer[place:past:stride].count(buffer[place]) != many:
                return 0
    return many


def put_back(buffer: bytearray, start: int, end: int, segment: int, heads: memoryview) -> int:
    """Put heads between the datagrams again; returns by how many bytes the train is longer now."""
    with memoryview(buffer) as view:
        parts, at, size = [view[start : start + segment]], start + segment, segment - HEADER_SIZE
        for head in range(0, len(heads), HEADER_SIZE):
            parts += (heads[head : head + HEADER_SIZE], view[at : min(at + size, end)])
            at += size
        buffer[start : end + len(heads)] = b"".join(parts)
    return len(heads)


def number_of(datagram: Datagram) -> int:
    """Return how many chunks lie side by side."""
    _, _, start, end, count, segment, stride = datagram
    return (end - start - segment) // stride + 1 if stride else count


def chunks_in(received: memoryview, datagram: Datagram) -> tuple[bytes, ...]:
    """Return the chunks that lie side by side, without their headers."""
    _, _, start, _, _, segment, stride = datagram
    chunks: tuple[bytes, ...] = _chunks(number_of(datagram), segment, stride).unpack_from(received, start)
    return chunks


def sealed_in(received: memoryview, datagram: Datagram) -> bytes | memoryview:
    """Return what was sealed, of all chunks of what looks like a whole record."""
    _, _, start, end, _, _, stride = datagram
    return b"".join(chunks_in(received, datagram)) if stride else received[start + HEADER_SIZE : end]


@lru_cache(SHAPES_KEPT)
def _chunks(count: int, segment: int, stride: int) -> Struct:
    """Return what takes the chunks, without their headers, in one step."""
    between = f"{HEADER_SIZE + stride - segment}x{segment - HEADER_SIZE}s"
    return Struct(f"{HEADER_SIZE}x{segment - HEADER_SIZE}s" + between * (count - 1))


def singly(
    received: memoryview,
    keypair: Keypair,
    datagram: Datagram,
    heads: dict[int, memoryview],
    dropped: Counter[str],
) -> Iterator[Datagram]:
    """Yield the chunks of what looked like a record and is none, as ones that came singly.

    Of each only `received[start + HEADER_SIZE : end]` is there where headers were put aside.
    """
    _, _, start, _, _, segment, stride = datagram
    for place in range(number_of(datagram)):
        at = start + place * (stride or segment - HEADER_SIZE)
        if stride or not place:
            header = HEADER.unpack_from(received, at)
        else:
            header = HEADER.unpack_from(heads[start], (place - 1) * HEADER_SIZE)
        word, index, count, receiver, counter = header
        if word == MAGIC and receiver == keypair.local_index and 1 < count <= RECORD_DATAGRAMS:
            yield counter, index, at, at + segment, count, 0, 0
        else:
            dropped["chunk-malformed"] += 1
