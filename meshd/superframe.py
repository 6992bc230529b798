"""Superframes: how two meshds carry packets and super-packets. The format, and sealing.

A datagram, numbers little-endian like WireGuard's:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+---------------+---------------+---------------+
    |     0xCE      |     0x03      |     index     |     count     |
    +---------------+---------------+---------------+---------------+
    |                        receiver index                         |
    +---------------------------------------------------------------+
    |                            counter                            |
    |                           (64 bits)                           |
    +---------------------------------------------------------------+
    |              a record's ciphertext and tag, or a part of it   |

A record is sealed once and fills `count` datagrams of one size; its counter is that of its first datagram,
and the next record's is greater by `count`. With count 2 or more, `index` numbers the datagrams. A record of
one datagram may be a piece of a super-packet: `index` is then the piece's position in it, else 0.

The nonce is index (0 where count is 2 or more), count, two zero bytes, counter: so the whole header is
authenticated, the receiver index by the key. There is no associated data.

The plaintext is frames, one after the other, then zeros as padding:

     0        1        2                 4                                   8
    +--------+--------+-----------------+-----------------------------------+---- ...
    | flags  | type   | segment size    | length of the packet              | packet
    +--------+--------+-----------------+-----------------------------------+---- ...

Flags: 1 the transport checksum is partial, 2 this reaches the end of the super-packet. Types are virtio's: 0
a packet, 1 and 4 TCP over IPv4 and IPv6, 5 UDP super-packets. A length of 0 begins the padding.

A super-packet that does not fit one datagram is cut into pieces with equally long payload (the last may be
shorter), each alone in its record behind a copy of the whole's headers, unchanged. TCP is cut as the path
wants it, because its receiver sees a stream; UDP only between its datagrams. So a lost datagram costs what
was in it and no more, and consecutive pieces become one, possibly shorter, super-packet again.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from crossedge.meshd.constants import SUPERFRAME_OVERHEAD, TAG_SIZE
from crossedge.meshd.growth import RECORD_DATAGRAMS
from crossedge.meshd.keypair import Aead, Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.train import Parts, Train

MAGIC: Final = 0x03CE  # CE 03, read as a little-endian word
HEADER: Final = Struct("<HBBIQ")
HEADER_SIZE: Final = HEADER.size
OVERHEAD: Final = SUPERFRAME_OVERHEAD
COUNTER_AT: Final = 8  # in the header, to its end
BYTES: Final = bytes(range(256))
SMALLEST_FORM: Final = 1024  # bytes of datagrams of which trains are foreseen
FORMS_KEPT: Final = 64  # of records
FRAME: Final = Struct("<BBHI")
FRAME_SIZE: Final = FRAME.size

PARTIAL_CHECKSUM: Final = 1
LAST_PIECE: Final = 2
FRAME_FLAGS: Final = PARTIAL_CHECKSUM | LAST_PIECE

POSITIONS: Final = 256  # pieces of one super-packet
INDICES: Final = bytes(range(RECORD_DATAGRAMS))
PADDING_SHARE: Final = 8  # a record is padded by up to an eighth of its length to stay in its train
PADDING_MOST: Final = 65_536 // PADDING_SHARE  # bytes


def nonce(counter: int, count: int, position: int = 0) -> bytes:
    """Return the nonce of a record."""
    return (counter << 32 | count << 8 | position).to_bytes(12, "little")


WHOLE: Final = HEADER.pack(MAGIC, 0, 0, 0, 0)[:3]
"""How a train begins that is a record: behind it comes how many datagrams it has."""


class TrainForm:
    """Foresees how the next trains are made, so that they can be taken apart while they are read.

    Bulk comes as trains that are one record each, of datagrams of one size. After two such of one size more
    are expected, after two trains of another kind none.
    """

    __slots__ = ("_last", "misses", "segment")

    def __init__(self) -> None:
        self.segment = 0
        """How long the datagrams of the next trains may be, in bytes; 0: no such train is expected."""
        self.misses = 0
        """Trains of another kind since the last of that one."""
        self._last = 0

    def see(self, buffer: bytearray, start: int, size: int, segment: int) -> int:
        """Learn from a train of which at least the first datagram lies at `start`.

        Returns how many datagrams it has if it looks like one record, else 0.
        """
        count = buffer[start + 3]
        if (
            count * segment == size
            and segment >= SMALLEST_FORM
            and buffer[start] == 0xCE
            and buffer[start + 1] == 0x03
            and not buffer[start + 2]
        ):
            if segment == self._last:
                self.segment, self.misses = segment, 0
            self._last = segment
            return count
        self.misses += 1
        if self.misses > 1:
            self.segment = self._last = 0
        return 0


class _Headers:
    """The headers of the chunks of a record of `count` chunks, side by side.

    From one record to the next only the counter changes, so only its bytes are written, each in all headers
    at once.
    """

    __slots__ = ("_count", "_counter", "_data", "_remote", "views")

    def __init__(self, count: int) -> None:
        self._data = bytearray(HEADER_SIZE * count)
        self._count = count
        self._remote = -1
        self._counter = 0
        with memoryview(self._data) as view:
            self.views = [view[at : at + HEADER_SIZE] for at in range(0, len(view), HEADER_SIZE)]

    def set(self, remote: int, counter: int) -> None:
        """Write them."""
        data = self._data
        if self._remote != remote:
            for index in range(self._count):
                HEADER.pack_into(data, index * HEADER_SIZE, MAGIC, index, self._count, remote, counter)
            self._remote = remote
        else:
            changed = counter ^ self._counter
            for place in range(COUNTER_AT, HEADER_SIZE):
                if not changed:
                    break
                if changed & 0xFF:
                    byte = counter >> 8 * (place - COUNTER_AT) & 0xFF
                    data[place::HEADER_SIZE] = BYTES[byte : byte + 1] * self._count
                changed >>= 8
        self._counter = counter


@dataclass(slots=True)
class _Form:
    """How a record of one length is spread over datagrams."""

    count: int
    segment: int
    """Length of each datagram, in bytes."""
    padding: bytes
    """What goes behind the plaintext, so that they are equally long."""
    sealed: memoryview
    """Where ciphertext and tag go."""
    headers: _Headers
    parts: Parts
    """Headers and chunks by turns."""


class SuperframeSealer:
    """Seals frames and super-packets into the train."""

    __slots__ = ("_forms", "_scratch", "_train", "_view")

    def __init__(self, train: Train) -> None:
        self._train = train
        self._forms: dict[tuple[int, int], _Form] = {}
        self._scratch = bytearray(65_536)
        self._view = memoryview(self._scratch)

    def frames(self, link: Link, keypair: Keypair, frames: memoryview, ends: list[int]) -> int:
        """Seal whole frames that lie one after the other and end at `ends`.

        As many as fit share a record of one datagram; one that does not fit gets a record of several. Returns
        how many had no room even so.
        """
        aead = keypair.chunks_send
        if aead is None:
            return len(ends)
        limit = link.room
        if ends[-1] <= limit:
            self._seal(link, keypair, aead, frames)
            return 0
        records: list[tuple[int, int]] = []
        start = end = 0
        for after in ends:
            if after - start > limit and end > start:
                records.append((start, end))
                start = end
            end = after
        records.append((start, end))
        longest = max((end - start for start, end in records if end - start <= limit), default=0)
        refused = 0
        for start, end in records:
            size = end - start
            if size > limit:
                refused += not self._spread(link, keypair, aead, frames[start:end])
            elif size < longest and (longest - size) * PADDING_SHARE <= longest and end < ends[-1]:
                padded = self._view[:longest]
                padded[:size] = frames[start:end]
                padded[size:] = bytes(longest - size)
                self._seal(link, keypair, aead, padded)
            else:
                self._seal(link, keypair, aead, frames[start:end])
        return refused

    def pieces(
        self,
        link: Link,
        keypair: Keypair,
        buffer: bytearray | memoryview,
        start: int,
        end: int,
        head: int,
        stride: int,
    ) -> None:
        """Seal a super-packet's frame, `buffer[start:end]`, as pieces, overwriting it.

        `head` is the length of its frame header and packet headers, `stride` that of a piece's payload; the
        frame header is written except for the length. Sealed from first to last: the headers are copied over
        the end of the piece before, which is sealed already.
        """
        aead = keypair.chunks_send
        if aead is None:
            raise ValueError("superframes are not agreed under this keypair")
        train, view = self._train, memoryview(buffer)
        train.send()
        flags, gso_type, gso_size, _ = FRAME.unpack_from(buffer, start)
        pieces = -(-(end - start - head) // stride)
        full = head + stride
        FRAME.pack_into(buffer, start, flags, gso_type, gso_size, full - FRAME_SIZE)
        template = bytes(view[start : start + head])
        segment = full + OVERHEAD
        capacity = train.capacity(link, segment)
        counter = keypair.reserve_chunks(pieces)
        remote = keypair.remote_index
        out, target, seal = train.buffer, train.view, aead.encrypt_into
        used = 0
        count = 0
        for position in range(pieces):
            if position:
                buffer[start : start + head] = template
            stop = start + full
            if position == pieces - 1:
                stop = end
                FRAME.pack_into(
                    buffer, start, flags | LAST_PIECE, gso_type, gso_size, stop - start - FRAME_SIZE
                )
            HEADER.pack_into(out, used, MAGIC, position, 1, remote, counter)
            after = used + stop - start + OVERHEAD
            seal(
                (counter << 32 | 0x100 | position).to_bytes(12, "little"),
                view[start:stop],
                None,
                target[used + HEADER_SIZE : after],
            )
            counter += 1
            start += stride
            used = after
            count += 1
            if count == capacity or stop == end:
                train.load(link, segment, count, used)
                train.send()
                used = count = 0

    def record_room(self, link: Link) -> int:
        """Return how much plaintext, in bytes, the longest record for now has room for."""
        chunk = link.room + TAG_SIZE
        count = min(link.growth.datagrams, self._train.capacity(link, HEADER_SIZE + chunk))
        return count * chunk - TAG_SIZE

    def whole(self, link: Link, keypair: Keypair, view: memoryview, start: int, end: int) -> None:
        """Seal the frames `view[start:end]`, no more than `record_room`, as one record.

        Up to `PADDING_MOST` bytes behind them are overwritten. Datagrams are as long as they can be where
        that takes little padding: receivers foresee the length of the next.
        """
        aead = keypair.chunks_send
        if aead is None:
            raise ValueError("superframes are not agreed under this keypair")
        key = end - start, link.room
        form = self._forms.get(key) or self._form(*key)
        count = form.count
        if count == 1:
            self._seal(link, keypair, aead, view[start:end])
            return
        after = end + len(form.padding)
        view[end:after] = form.padding
        counter = keypair.reserve_chunks(count)
        aead.encrypt_into(
            (counter << 32 | count << 8).to_bytes(12, "little"), view[start:after], None, form.sealed
        )
        form.headers.set(keypair.remote_index, counter)
        self._train.send_parts(link, form.parts, form.segment, count)

    def row(
        self,
        link: Link,
        keypair: Keypair,
        view: memoryview,
        start: int,
        end: int,
        heads: tuple[int, int],
        head: int,
        stride: int,
        number: int,
    ) -> None:
        """Seal `number` records in a row, which begin `stride` bytes after one another, each with one frame.

        The first is `view[start:end]`; what is behind the last one's end is left as it is. `heads` are the
        first `head` bytes of it as a number and what to add to that for the next (`segment.progression`).
        """
        aead = keypair.chunks_send
        if aead is None:
            raise ValueError("superframes are not agreed under this keypair")
        train, endpoints = self._train, link.endpoints
        train.send()
        key = end - start, link.room
        form = self._forms.get(key) or self._form(*key)
        count, padding, sealed, headers = form.count, form.padding, form.sealed, form.headers
        parts, segment, remote = form.parts, form.segment, keypair.remote_index
        seal, transmit = aead.encrypt_into, train.transmit
        counter = keypair.reserve_chunks(number * count)
        link.sent.datagrams += number * count
        value, step = heads
        for _ in range(number):
            after = end + len(padding)
            behind = bytes(view[end:after])
            view[start : start + head] = value.to_bytes(head, "big")
            view[end:after] = padding
            seal((counter << 32 | count << 8).to_bytes(12, "little"), view[start:after], None, sealed)
            view[end:after] = behind
            headers.set(remote, counter)
            for endpoint in endpoints:
                transmit(endpoint, parts, segment)
            counter += count
            start += stride
            end += stride
            value += step

    def _form(self, length: int, room: int) -> _Form:
        """Work out how a record of `length` bytes is spread where a datagram has room for so many."""
        count = -(-(length + TAG_SIZE) // (room + TAG_SIZE))
        size = room + TAG_SIZE
        if (count * size - TAG_SIZE - length) * PADDING_SHARE > length:
            size = -(-(length + TAG_SIZE) // count)
        headers = _Headers(count)
        parts: Parts = []
        for index in range(count):
            parts += (headers.views[index], self._view[index * size : index * size + size])
        if len(self._forms) >= FORMS_KEPT:
            self._forms.clear()
        made = _Form(
            count,
            HEADER_SIZE + size,
            bytes(count * size - TAG_SIZE - length),
            self._view[: count * size],
            headers,
            parts,
        )
        self._forms[length, room] = made
        return made

    def _seal(self, link: Link, keypair: Keypair, aead: Aead, plaintext: memoryview) -> None:
        """Seal a record of one datagram."""
        size = len(plaintext) + OVERHEAD
        train = self._train
        counter = keypair.reserve_chunks(1)
        offset = train.place(link, size)
        HEADER.pack_into(train.buffer, offset, MAGIC, 0, 1, keypair.remote_index, counter)
        aead.encrypt_into(
            nonce(counter, 1), plaintext, None, train.view[offset + HEADER_SIZE : offset + size]
        )

    def _spread(self, link: Link, keypair: Keypair, aead: Aead, plaintext: memoryview) -> bool:
        """Seal a record of several datagrams of equal size; False where it would take too many."""
        most = link.room + TAG_SIZE
        count = -(-(len(plaintext) + TAG_SIZE) // most)
        if count > RECORD_DATAGRAMS:
            return False
        size = -(-(len(plaintext) + TAG_SIZE) // count)
        padding = count * size - TAG_SIZE - len(plaintext)
        counter = keypair.reserve_chunks(count)
        sealed = aead.encrypt(nonce(counter, count), bytes(plaintext) + bytes(padding), None)
        train = self._train
        for index in range(count):
            offset = train.place(link, HEADER_SIZE + size)
            HEADER.pack_into(train.buffer, offset, MAGIC, index, count, keypair.remote_index, counter)
            part = sealed[index * size : (index + 1) * size]
            train.view[offset + HEADER_SIZE : offset + HEADER_SIZE + size] = part
        return True
