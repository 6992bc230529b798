"""Opening superframes: from datagrams in a buffer to packets and super-packets.

The usual case costs no copy: consecutive pieces of one super-packet are opened into one buffer, the last one
first, each where its payload belongs, so that the headers in front of it fall on the end of the piece before,
which is opened next and overwrites them. Only the first piece is opened before the others, because it tells
how long headers and payloads are; the end of it is put back afterwards.

Where that fails (a forged datagram, a copy among the originals) the same datagrams are opened one by one, and
what opened is joined by copying. A counter is checked before and committed after its datagram was opened.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

from cryptography.exceptions import InvalidTag

from crossedge.meshd.bigtcp import JOINED
from crossedge.meshd.constants import TAG_SIZE
from crossedge.meshd.delivery import Delivery
from crossedge.meshd.keypair import Aead, Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.pieceruns import Opened, Shape, length_of, opened_end, run_end, shape_of
from crossedge.meshd.reassembly import Reassembly
from crossedge.meshd.sidebyside import Datagram, chunks_in, number_of, sealed_in, singly
from crossedge.meshd.sink import LARGEST_PACKET
from crossedge.meshd.superframe import (
    FRAME,
    FRAME_FLAGS,
    FRAME_SIZE,
    HEADER_SIZE,
    LAST_PIECE,
    OVERHEAD,
    PARTIAL_CHECKSUM,
    nonce,
)
from crossedge.meshd.virtio import GSO_TYPES, SIZE
from crossedge.wire.endpoint import Endpoint
from crossedge.wire.errors import WireError

BASE: Final = SIZE - FRAME_SIZE  # where a frame begins, so that its packet has a virtio header's room


class Opener:
    """Opens what belongs to one keypair at a time, and hands it on."""

    __slots__ = ("_delivery", "_dropped", "_plain", "_reassembly", "_spare", "_view")

    def __init__(self, delivery: Delivery, reassembly: Reassembly, dropped: Counter[str]) -> None:
        self._delivery = delivery
        self._reassembly = reassembly
        self._dropped = dropped
        self._plain = bytearray(BASE + 2 * LARGEST_PACKET)
        self._view = memoryview(self._plain)
        self._spare = deque(bytearray(len(self._plain)) for _ in range(JOINED - 1))

    def open(
        self,
        link: Link,
        keypair: Keypair,
        received: memoryview,
        datagrams: list[Datagram],
        source: Endpoint,
        now: float,
        heads: dict[int, memoryview],
    ) -> tuple[int, int]:
        """Open the datagrams of one source, sorted, and deliver what is in them.

        `heads`: the headers that were put aside, by where the first of their record begins. Returns how many
        datagrams were opened and how many bytes of plaintext they had.
        """
        aead = keypair.chunks_receive
        if aead is None:
            self._dropped["superframe-not-agreed"] += len(datagrams)
            return 0, 0
        opened = size = first = 0
        while first < len(datagrams):
            if datagrams[first][4] == 1:
                after = run_end(datagrams, first)
                one = self._run(link, keypair, aead, received, datagrams[first:after])
            else:
                after, one = self._record(link, keypair, aead, received, datagrams, first, source, now, heads)
            first = after
            opened += one[0]
            size += one[1]
        return opened, size

    def whole(self, link: Link, keypair: Keypair, sealed: memoryview, counter: int, count: int) -> bool:
        """Open and deliver a record of `count` datagrams, all there and contiguous, as bulk comes.

        False where it does not open: `open` deals with it, nothing is done. Afterwards `Delivery.flush`.
        """
        joiner = self._delivery.joiner
        if joiner.frames:  # the last of them is in this buffer
            self._spare.append(self._plain)
            self._plain = self._spare.popleft()
            self._view = memoryview(self._plain)
        aead, replay, view = keypair.chunks_receive, keypair.chunk_replay, self._view
        stop = BASE + len(sealed) - TAG_SIZE
        if aead is None or stop > len(view) or (counter <= replay.newest and not replay.check(counter)):
            return False
        try:
            aead.decrypt_into(
                (counter << 32 | count << 8).to_bytes(12, "little"), sealed, None, view[BASE:stop]
            )
        except InvalidTag:
            return False
        replay.mark(counter)
        tally = keypair.tally
        tally.opened += count
        counter += count
        if counter > tally.end:
            tally.end = counter
        if self._reassembly.records:
            self._reassembly.discard((keypair.local_index, counter - count))
        if stop < BASE + FRAME_SIZE:
            return True
        if joiner.expected and joiner.link is link and self._plain.startswith(joiner.expected, BASE):
            end = BASE + FRAME_SIZE + joiner.length
            if end <= stop and (end + FRAME_SIZE > stop or not FRAME.unpack_from(self._plain, end)[3]):
                joiner.follow(view[BASE + FRAME_SIZE - SIZE : end])
                return True
        flags, gso_type, gso_size, length = FRAME.unpack_from(self._plain, BASE)
        end = BASE + FRAME_SIZE + length
        if (
            gso_type
            and not flags & ~FRAME_FLAGS
            and end <= stop
            and (end + FRAME_SIZE > stop or not FRAME.unpack_from(self._plain, end)[3])  # but for padding
        ):
            frame = view[BASE + FRAME_SIZE - SIZE : end]
            partial = flags & PARTIAL_CHECKSUM != 0
            if not self._delivery.bulk(link, frame, gso_type, gso_size, partial):
                self._delivery.frame(link, frame, gso_type, gso_size, partial)
        else:
            self.frames(link, self._view, stop)
        return True

    # --- Records of one datagram ---------------------------------------------------------------------------

    def _run(
        self, link: Link, keypair: Keypair, aead: Aead, received: memoryview, run: list[Datagram]
    ) -> tuple[int, int]:
        count = len(run)
        counter = run[0][0]
        if run[-1][0] - counter != count - 1:  # there are copies among them
            return self._one_by_one(link, keypair, aead, received, run)
        replay = keypair.chunk_replay
        if count == 1:
            fresh = replay.check(counter)
        else:
            fresh = replay.check_range(counter, count) == (1 << count) - 1
        if not fresh:
            return self._one_by_one(link, keypair, aead, received, run)
        try:
            end, shape, last = self._open_run(aead, received, run)
        except InvalidTag:
            return self._one_by_one(link, keypair, aead, received, run)
        except WireError as error:
            replay.commit(counter)
            keypair.tally.add(counter, 1)
            self._dropped[error.reason] += count
            return 1, length_of(run[0])
        if count == 1:
            replay.commit(counter)
        else:
            replay.commit_range(counter, count)
        keypair.tally.add(counter, count)
        if shape is None:
            self.frames(link, self._view, end)
        else:
            self._deliver(link, shape, end, run[0][1], count, last)
        return count, (count - 1) * length_of(run[0]) + length_of(run[-1])

    def _open_run(
        self, aead: Aead, received: memoryview, run: list[Datagram]
    ) -> tuple[int, Shape | None, bool]:
        """Open a run into one frame; returns its end in the buffer, its shape, whether it has the last piece.

        A single datagram of whole frames has no shape. Raises InvalidTag, WireError.
        """
        view, open_into = self._view, aead.decrypt_into
        counter, index, start, end, _, _, _ = run[0]
        size = end - start - OVERHEAD
        stop = BASE + size
        open_into(nonce(counter, 1, index), received[start + HEADER_SIZE : end], None, view[BASE:stop])
        count = len(run)
        if count == 1 and not index and not self._is_piece(size):
            return stop, None, True
        shape = shape_of(self._view[BASE : BASE + size])
        if count == 1:
            return stop, shape, bool(shape.flags & LAST_PIECE)
        stride = shape.stride
        _, _, start, end, _, _, _ = run[-1]
        last_size = end - start - OVERHEAD
        stop = BASE + (count - 1) * stride + last_size
        if stop > len(view) or last_size <= shape.head:
            raise WireError("frame-length")
        seam = slice(BASE + stride, BASE + size)
        first_end = bytes(view[seam])
        last = 0
        at = BASE + count * stride
        for counter, index, start, end, _, _, _ in reversed(run[1:]):
            at -= stride
            open_into(
                (counter << 32 | 0x100 | index).to_bytes(12, "little"),
                received[start + HEADER_SIZE : end],
                None,
                view[at : at + end - start - OVERHEAD],
            )
            if not last:
                last = self._plain[at] | 0x100
        view[seam] = first_end
        return stop, shape, bool(last & LAST_PIECE)

    def _is_piece(self, size: int) -> bool:
        """Tell whether the record in the buffer is a piece with more of its super-packet to come."""
        if size < FRAME_SIZE:
            return False
        flags, gso_type, _, _ = FRAME.unpack_from(self._plain, BASE)
        return gso_type in GSO_TYPES and not flags & LAST_PIECE

    def _deliver(self, link: Link, shape: Shape, end: int, position: int, count: int, last: bool) -> None:
        """Hand on the run in the buffer, `count` pieces from `position` on.

        A last piece alone may be shorter than the others, so it does not tell their length.
        """
        self._delivery.run(
            link,
            self._view[:end],
            shape.layout,
            shape.gso_type,
            shape.gso_size,
            bool(shape.flags & PARTIAL_CHECKSUM),
            position * shape.stride if count > 1 or not last else None,
            last,
        )

    def _one_by_one(
        self, link: Link, keypair: Keypair, aead: Aead, received: memoryview, run: list[Datagram]
    ) -> tuple[int, int]:
        """Open each datagram by itself, join those that opened, and deliver."""
        replay = keypair.chunk_replay
        opened: list[Opened] = []
        size = 0
        for counter, index, start, end, _, _, _ in run:
            if not replay.check(counter):
                self._dropped["replay"] += 1
                continue
            try:
                plaintext = aead.decrypt(
                    nonce(counter, 1, index), bytes(received[start + HEADER_SIZE : end]), None
                )
            except InvalidTag:
                self._dropped["bad-tag"] += 1
                continue
            replay.commit(counter)
            keypair.tally.add(counter, 1)
            opened.append(Opened(counter, index, plaintext))
            size += len(plaintext)
        first = 0
        while first < len(opened):
            after = opened_end(opened, first)
            self._join(link, opened[first:after])
            first = after
        return len(opened), size

    def _join(self, link: Link, run: list[Opened]) -> None:
        """Put opened pieces together in the buffer and deliver them."""
        first = run[0]
        stop = BASE + len(first.plaintext)
        self._view[BASE:stop] = first.plaintext
        if len(run) == 1 and not first.position and not self._is_piece(len(first.plaintext)):
            self.frames(link, self._view, stop)
            return
        try:
            shape = shape_of(self._view[BASE:stop])
            for piece in run[1:]:
                payload = piece.plaintext[shape.head :]
                if not payload or stop + len(payload) > len(self._view):
                    raise WireError("frame-length")
                self._view[stop : stop + len(payload)] = payload
                stop += len(payload)
        except WireError as error:
            self._dropped[error.reason] += len(run)
            return
        last = bool(run[-1].plaintext[0] & LAST_PIECE)
        self._deliver(link, shape, stop, first.position, len(run), last)

    # --- Records of several datagrams ---------------------------------------------------------------------

    def _record(
        self,
        link: Link,
        keypair: Keypair,
        aead: Aead,
        received: memoryview,
        datagrams: list[Datagram],
        first: int,
        source: Endpoint,
        now: float,
        heads: dict[int, memoryview],
    ) -> tuple[int, tuple[int, int]]:
        """Open the record that begins at `first`; returns where the next begins, and what `open` returns.

        The usual case, all its chunks in one batch, needs no reassembly. What does not open like that goes
        chunk by chunk.
        """
        counter, index, _, _, count, segment, _ = datagrams[first]
        after = first + 1
        sealed: bytes | memoryview = b""
        if segment:
            if number_of(datagrams[first]) < count:
                return after, self._chunks(link, keypair, aead, received, datagrams[first], source, now)
            sealed = sealed_in(received, datagrams[first])
        elif not index and len(datagrams) - first >= count:
            after = first + count
            group = datagrams[first:after]
            parts = [received[each[2] + HEADER_SIZE : each[3]] for each in group]
            if [each[:2] for each in group] == [(counter, place) for place in range(count)] and len(
                set(map(len, parts))
            ) == 1:
                sealed = b"".join(parts)
            else:
                after = first + 1
        stop = BASE + len(sealed) - TAG_SIZE
        if (
            sealed
            and source in link.sources
            and keypair.chunk_replay.check(counter)
            and stop <= len(self._view)
        ):
            try:
                aead.decrypt_into(nonce(counter, count), sealed, None, self._view[BASE:stop])
            except InvalidTag:
                pass
            else:
                keypair.chunk_replay.commit(counter)
                keypair.tally.add(counter, count)
                self._reassembly.discard((keypair.local_index, counter))
                self.frames(link, self._view, stop)
                return after, (count, stop - BASE)
        opened = size = 0
        for datagram in (
            singly(received, keypair, datagrams[first], heads, self._dropped)
            if segment
            else datagrams[first:after]
        ):
            one = self._chunks(link, keypair, aead, received, datagram, source, now)
            opened += one[0]
            size += one[1]
        return after, (opened, size)

    def _chunks(
        self,
        link: Link,
        keypair: Keypair,
        aead: Aead,
        received: memoryview,
        datagram: Datagram,
        source: Endpoint,
        now: float,
    ) -> tuple[int, int]:
        """Take one chunk, or consecutive ones that lie side by side but are not a whole record."""
        counter, index, start, end, count, segment, _ = datagram
        record = (keypair.local_index, counter)
        number = number_of(datagram) if segment else 1
        if source not in link.sources:
            self._dropped["chunk-source"] += number
            return 0, 0
        if not keypair.chunk_replay.check(counter):
            self._dropped["replay"] += number
            self._reassembly.discard(record)
            return 0, 0
        if segment:
            parts = chunks_in(received, datagram)
            complete = self._reassembly.add_run(record, index, count, parts, source, now)
        else:
            part = bytes(received[start + HEADER_SIZE : end])
            complete = self._reassembly.add(record, index, count, part, source, now)
        return self._complete(link, keypair, aead, record, count, complete)

    def _complete(
        self,
        link: Link,
        keypair: Keypair,
        aead: Aead,
        record: tuple[int, int],
        count: int,
        complete: list[bytes],
    ) -> tuple[int, int]:
        """Open what may be a whole record, and deliver what is in it."""
        counter = record[1]
        for sealed in complete:
            try:
                plaintext = aead.decrypt(nonce(counter, count), sealed, None)
            except InvalidTag:
                self._dropped["bad-tag"] += 1
                continue
            keypair.chunk_replay.commit(counter)
            keypair.tally.add(counter, count)
            self._reassembly.discard(record)
            stop = BASE + len(plaintext)
            if stop > len(self._view):
                self._dropped["frame-length"] += 1
            else:
                self._view[BASE:stop] = plaintext
                self.frames(link, self._view, stop)
            return count, len(plaintext)
        return 0, 0

    # --- Frames -------------------------------------------------------------------------------------------

    def frames(self, link: Link, opened: memoryview, stop: int) -> None:
        """Deliver the whole frames that lie in a buffer from BASE to `stop`; `Delivery.flush` follows.

        Each virtio header is written over the frame header and, from the second frame on, over the end of the
        frame before, which has been delivered by then.
        """
        at = BASE
        while at + FRAME_SIZE <= stop:
            flags, gso_type, gso_size, length = FRAME.unpack_from(opened, at)
            at += FRAME_SIZE
            if not length:
                return  # padding
            if flags & ~FRAME_FLAGS:
                self._dropped["frame-flags"] += 1
                return
            if length > stop - at:
                self._dropped["frame-length"] += 1
                return
            frame = opened[at - SIZE : at + length]
            at += length
            self._delivery.frame(link, frame, gso_type, gso_size, bool(flags & PARTIAL_CHECKSUM))
