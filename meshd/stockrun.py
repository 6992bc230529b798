"""Opening stretches of transport datagrams, and joining consecutive packets of one TCP stream from them.

A stretch is datagrams of equal length with consecutive counters, at equal distances in the receive buffer: a
train that the kernel joined, or what lies in slots one behind the other. They are opened where they lie, by
views that are made once for a place, since the next train will lie there too.

Transport data carries whole packets. The headers of those that may continue a super-packet are read as one
long number, in which each packet has a lane of its own, and compared with what must come, all at once; then
their payloads are put behind it, and one sum stands for all their checksums. Whatever is not exactly as
expected ends the run, and is dealt with as a packet by itself; the super-packet ends where it did until a
whole run is found right.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from itertools import repeat
from operator import length_hint
from struct import Struct
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag

from crossedge.meshd.checksum import folded, long_sum
from crossedge.meshd.coalesce import Coalescer
from crossedge.meshd.constants import TRANSPORT_HEADER, TRANSPORT_OVERHEAD
from crossedge.meshd.keypair import NONCE, Keypair

Datagrams = tuple[int, int, int, float, int, int]
"""Transport datagrams in the receive buffer: counter, start, end, when it arrived, all of the first; how
many there are, and from the start of one to that of the next (whatever for one). They sort by counter."""

MOST: Final = 128  # datagrams of a stretch
PLACES_KEPT: Final = 64


class Views:
    """The places of so many datagrams of one stretch, in one buffer."""

    __slots__ = ("_cuts", "_starts", "_view", "count", "plain", "sealed", "size")

    def __init__(self, view: memoryview, start: int, length: int, stride: int, count: int) -> None:
        """Take where the first begins, how long each is, and how far it is to the next, in bytes."""
        self._view = view
        self.count = count
        self.size = length - TRANSPORT_OVERHEAD
        """Bytes of each plaintext."""
        self._starts = [start + number * stride + TRANSPORT_HEADER for number in range(count)]
        self.sealed = [view[at : at + length - TRANSPORT_HEADER] for at in self._starts]
        self.plain = self.cut(0, self.size)
        """The plaintexts, once they are opened."""
        self._cuts: dict[tuple[int, int], list[memoryview]] = {}

    def cut(self, first: int, after: int) -> list[memoryview]:
        """Return the bytes from `first` until before `after` of each plaintext."""
        return [self._view[at + first : at + after] for at in self._starts]

    def parts(self, first: int, after: int) -> list[memoryview]:
        """Return the same as `cut`; it is kept, for what is asked for again and again."""
        found = self._cuts.get((first, after))
        if found is None:
            if len(self._cuts) >= PLACES_KEPT:
                self._cuts.clear()
            found = self._cuts[first, after] = self.cut(first, after)
        return found


class Places:
    """Views that were made, for one buffer at a time."""

    __slots__ = ("_buffer", "_made")

    def __init__(self) -> None:
        self._buffer: object = None
        self._made: dict[tuple[int, int, int], Views] = {}

    def views(self, received: memoryview, start: int, length: int, stride: int, count: int) -> Views:
        """Return views of at least `count` datagrams; see `Views`."""
        if received.obj is not self._buffer or len(self._made) > PLACES_KEPT:
            self._made.clear()
            self._buffer = received.obj
        key = start, length, stride
        found = self._made.get(key)
        if found is None or found.count < count:
            found = self._made[key] = Views(received, start, length, stride, count)
        return found


def train_from(buffer: bytearray, start: int, end: int, segment: int) -> int:
    """Return how many datagrams of a train, of `segment` bytes each from `start` on, are a stretch, or 1.

    The first is a transport datagram. A stretch is all of equal length, for one receiver, or none.
    """
    count = (end - start) // segment
    values = _train(segment, count).unpack_from(buffer, start)
    first, counter = values[:2]
    if values[::2] == (first,) * count and values[1::2] == tuple(range(counter, counter + count)):
        return count
    return 1


def stretch_from(datagrams: list[Datagrams], index: int) -> int:
    """Return how many single datagrams from `index` on are one stretch (1: it is alone)."""
    counter, start, end, _, count, _ = datagrams[index]
    if count > 1 or index + 1 == len(datagrams):
        return 1
    length, stride = end - start, datagrams[index + 1][1] - start
    many = 1
    for own, at, after, _, count, _ in datagrams[index + 1 : index + MOST]:
        if own != counter + many or count > 1 or at != start + many * stride or after - at != length:
            break
        many += 1
    return many


def open_stretch(keypair: Keypair, views: Views, first: int, counter: int, count: int) -> int:
    """Open `count` datagrams in place, from the one with index `first` on, which has `counter`.

    Returns how many opened: it ends before the first that is forged, whose bytes are spoilt. Counters are not
    consumed.
    """
    counters = iter(range(counter, counter + count))
    nonces, sealed, plain = map(NONCE.pack, counters), views.sealed, views.plain
    if first:
        sealed, plain = sealed[first:], plain[first:]
    try:
        deque(map(keypair.receive.decrypt_into, nonces, sealed, repeat(None), plain), 0)
    except InvalidTag:
        return count - length_hint(counters) - 1
    return count


class Run(NamedTuple):
    """How far a run came."""

    taken: int = 0
    """Packets that belong to the super-packet now."""
    tried: int = 0
    """Packets that were looked at, and none was taken: it should not be tried again at once."""


NOTHING: Final = Run()


def join_run(coalescer: Coalescer, owner: object, views: Views, index: int, count: int) -> Run:
    """Join `count` opened packets, from `index` on, as far as they continue what `owner` sent last."""
    awaited = coalescer.awaited(owner)
    if awaited is None:
        return NOTHING
    view, place, header, payload, transport, room, mask, expected, step = awaited
    length = header + payload
    if views.size < length:
        return NOTHING
    count = min(count, room)
    heads = views.parts(0, header)[index : index + count]
    found = int.from_bytes(b"".join(heads), "big")
    wanted = int.from_bytes(expected.to_bytes(header, "big") * count, "big") + _series(step, header, count)
    differ = found & _lanes(mask, header, count) ^ wanted
    if differ:
        lane = 8 * header
        right = (lane * count - differ.bit_length()) // lane
        if not right:
            return Run(tried=1)
        found >>= lane * (count - right)
        count = right
    # All is summed up from the TCP headers on; what of a packet is odd in length is padded (RFC 1071, 4.1).
    total = folded(found & _lanes((1 << 8 * (header - transport)) - 1, header, count))
    payloads = views.parts(header, length)[index : index + count]
    joined = b"".join(payloads)
    if payload & 1:
        total += sum(int.from_bytes(each, "big") for each in payloads) << 8
    else:
        total += long_sum(joined)
    if not coalescer.grow(count, total):
        return Run(tried=count)
    view[place : place + len(joined)] = joined
    return Run(count)


@lru_cache(maxsize=512)
def _train(segment: int, count: int) -> Struct:
    """Return a structure with the headers of a train: type and receiver, counter of each datagram."""
    return Struct("<" + f"QQ{segment - TRANSPORT_HEADER}x" * (count - 1) + "QQ")


@lru_cache(maxsize=512)
def _lanes(value: int, header: int, count: int) -> int:
    """Return a number with `value` in each of `count` lanes of `header` bytes."""
    return int.from_bytes(value.to_bytes(header, "big") * count, "big")


@lru_cache(maxsize=512)
def _series(step: int, header: int, count: int) -> int:
    """Return a number with 0, `step`, 2 * `step` ... in `count` lanes of `header` bytes."""
    return int.from_bytes(b"".join((n * step).to_bytes(header, "big") for n in range(count)), "big")
