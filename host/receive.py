"""Reading many datagrams by one system call: recvmmsg(2), which Python's `socket` does not have.

Every datagram, or train of datagrams, gets a slot of 64 KiB of its own. The structures that the kernel wants
are made once; what a call changes in them is put back before the next.

Trains of a known form can be taken apart on the way (`part`), without a copy: the first bytes of each
datagram but the first, its head, go aside, so that all behind the heads is contiguous.

    as it comes   head 0 | body 0 | head 1 | body 1 | head 2 | body 2
    slot          head 0 | body 0   body 1   body 2
    heads         head 1   head 2
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from struct import Struct
from typing import Final

from crossedge.host.messages import IoVector, MessageHeader
from crossedge.host.udp import GRO_SIZE, SCM_TIMESTAMPNS, SOL_UDP, STAMP, UDP_GRO

SLOT: Final = 65_536
"""Bytes of one slot: no datagram and no train is longer."""
SLOTS: Final = 64
SPARE: Final = SLOT * SLOTS
"""Where the slot begins that no call fills."""
TRAINS: Final = 8
"""Slots of one call while trains come: as many bytes as stay in a processor's cache."""
LONG: Final = 8_192  # bytes; what is longer is a train

NAME: Final = 28
"""Bytes that are kept for whom a datagram came from: a sockaddr_in6."""
CONTROL: Final = 64
"""Bytes that are kept for the control messages of a datagram."""
_STAMP_ALONE: Final = socket.CMSG_SPACE(STAMP.size)
SINGLE: Final = (0, _STAMP_ALONE)
"""Lengths of the control messages of what is no train: none, or a stamp."""
_CMSG = Struct("@Nii")  # struct cmsghdr
_TRAIN_BOTH: Final = socket.CMSG_SPACE(STAMP.size) + socket.CMSG_SPACE(GRO_SIZE.size)
_EXPECTED: Final = (socket.SOL_SOCKET, SCM_TIMESTAMPNS, SOL_UDP, UDP_GRO)
_ALIGN: Final = ctypes.sizeof(ctypes.c_size_t)
_BOTH = Struct(f"@{_ALIGN}xiiqq{_ALIGN}xiii")  # what comes with nearly every train: a stamp, then its segment
_PORT = Struct("!H")
_libc = ctypes.CDLL(None, use_errno=True)


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("header", MessageHeader), ("length", ctypes.c_uint))


_SIZE: Final = ctypes.sizeof(_Message)
_AT_NAME, _AT_CONTROL = MessageHeader.name_length.offset, MessageHeader.control_length.offset


def _fields(count: int) -> Struct:
    """Return a struct of (length of name, length of control, length) of so many messages."""
    between = _AT_CONTROL - _AT_NAME - 4
    behind = _Message.length.offset - _AT_CONTROL - ctypes.sizeof(ctypes.c_size_t)
    rest = _SIZE - _Message.length.offset - 4
    return Struct("=" + f"{_AT_NAME}xI{between}x{'Q' if _ALIGN == 8 else 'I'}{behind}xI{rest}x" * count)


_ONE: Final = _fields(1)


class _Messages:
    """The structures of one call, with what it changes in them."""

    def __init__(self, vectors: list[tuple[int, int]], names: int, control: int) -> None:
        """Take where each message's vectors are and how many, and where names and controls begin."""
        self.messages = (_Message * len(vectors))()
        for number, (address, count) in enumerate(vectors):
            self.messages[number].header = MessageHeader(
                names + number * NAME, NAME, address, count, control + number * CONTROL, CONTROL, 0
            )
        self.view = memoryview(self.messages).cast("B")
        self.pristine = bytes(self.view)
        self.pointer = ctypes.c_void_p(ctypes.addressof(self.messages))
        self.used = 0


class Receiver:
    """The slots, and what the last call put into them."""

    def __init__(self, head: int = 0) -> None:
        """Take how many bytes of each datagram go aside where trains are taken apart."""
        self.parted = 0
        """How long the datagrams are, in bytes, by which the last call took trains apart; 0: it did not."""
        self.parting = 0
        """The same for the next calls that may expect trains."""
        self._head = head
        self._heads = memoryview(bytearray())
        self._parts: _Messages | None = None
        self.buffer = bytearray(SPARE + SLOT)
        """Slot `number` begins at `number * SLOT`. A spare one follows them, for what was read otherwise."""
        self.names = bytearray(NAME * SLOTS)
        """Whom each slot's datagram came from, as the kernel writes it, from `number * NAME` on."""
        self._control = bytearray(CONTROL * SLOTS)
        self._vectors = (IoVector * SLOTS)()
        data, names, control = (_address(each) for each in (self.buffer, self.names, self._control))
        for number in range(SLOTS):
            self._vectors[number] = IoVector(data + number * SLOT, SLOT)
        at, size = ctypes.addressof(self._vectors), ctypes.sizeof(IoVector)
        self._addresses = names, control
        self._whole = _Messages([(at + number * size, 1) for number in range(SLOTS)], names, control)
        self._structs = [_fields(count) for count in range(SLOTS + 1)]
        self._counts = [ctypes.c_uint(count) for count in range(SLOTS + 1)]
        self._flags = ctypes.c_int(int(socket.MSG_DONTWAIT))
        self._used = 0
        self._limit = SLOTS

    def read(self, descriptor: int) -> list[tuple[int, int, int]]:
        """Read what waits, as far as there are slots.

        Returns for each slot, from 0 on, how long the datagram or train in it is, and the lengths of its name
        and of its control messages, for `name` and `control`; nothing where nothing waits. The next call may
        overwrite everything. Raises `OSError`, such as an error of an earlier send that the socket kept.
        """
        limit, messages = self._limit, self._whole
        self.parted = 0
        if limit == TRAINS and self._parts is not None:
            messages, self.parted = self._parts, self.parting
        if messages.used:
            end = messages.used * _SIZE
            messages.view[:end] = messages.pristine[:end]
        count = _libc.recvmmsg(descriptor, messages.pointer, self._counts[limit], self._flags, None)
        if count < 0:
            messages.used = self._used = 0
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return []
            raise OSError(number, os.strerror(number))
        messages.used = self._used = count
        if count == 1:
            named, controlled, length = _ONE.unpack_from(messages.view)
            self._limit = TRAINS if length > LONG else SLOTS
            return [(length, named, controlled)]
        values = self._structs[count].unpack_from(messages.view)
        lengths = values[2::3]
        self._limit = TRAINS if max(lengths) > LONG else SLOTS
        return list(zip(lengths, values[::3], values[1::3], strict=True))

    def expect(self, length: int) -> None:
        """Learn how long a datagram or train was that was read otherwise: more like it may follow."""
        self._limit = TRAINS if length > LONG else SLOTS

    def part(self, segment: int) -> None:
        """From the next call on take trains of datagrams of `segment` bytes apart; 0: leave them whole.

        Only what is longer than one such datagram is changed by it, and only in calls that may expect trains.
        """
        if segment == self.parting:
            return
        self.parting, self._parts = segment, None
        if not segment:
            return
        bodies = -(-(SLOT - segment) // (segment - self._head))
        heads_put = bytearray(TRAINS * bodies * self._head)
        self._heads = memoryview(heads_put)
        self._vectors_parted = (IoVector * (TRAINS * (1 + 2 * bodies)))()
        data, heads, at = _address(self.buffer), _address(heads_put), 0
        size = ctypes.sizeof(IoVector)
        first = ctypes.addressof(self._vectors_parted)
        vectors: list[tuple[int, int]] = []
        flat: list[int] = []
        for slot in range(TRAINS):
            vectors.append((first + slot * (1 + 2 * bodies) * size, 1 + 2 * bodies))
            at, end = slot * SLOT + segment, (slot + 1) * SLOT
            flat += (data + slot * SLOT, segment)
            for _ in range(bodies):
                length = min(segment - self._head, end - at)
                flat += (heads, self._head, data + at, length)
                heads += self._head
                at += length
        Struct(f"@{'PN' * (len(flat) // 2)}").pack_into(self._vectors_parted, 0, *flat)
        self._parts = _Messages(vectors, *self._addresses)

    def heads(self, slot: int, count: int) -> memoryview:
        """Return the heads of a train of `count` datagrams that was taken apart, from its second on."""
        start = slot * (len(self._heads) // TRAINS)
        return self._heads[start : start + (count - 1) * self._head]

    def join(self, slot: int, length: int) -> None:
        """Put a train that was taken apart together again, as it came; `length` is that of all of it."""
        start, segment, head = slot * SLOT, self.parted, self._head
        view, heads = memoryview(self.buffer), self.heads(slot, SLOT)
        parts = [view[start : start + segment]]
        at, aside, left = start + segment, 0, length - segment
        while left > 0:
            body = max(0, min(segment - head, left - head))
            parts += (heads[aside : aside + min(head, left)], view[at : at + body])
            aside += head
            at += body
            left -= segment
        self.buffer[start : start + length] = b"".join(parts)

    @property
    def full(self) -> bool:
        """Whether the last call filled all slots that it was given, so that more may wait."""
        return self._used in (SLOTS, TRAINS)

    def name(self, slot: int, length: int) -> bytes:
        """Return whom a slot's datagram came from, as the kernel writes it: for `address_of`, or as a key."""
        return bytes(self.names[slot * NAME : slot * NAME + length])

    def one_name(self, slot: int, count: int) -> bool:
        """Tell whether `count` slots from `slot` on hold datagrams of one source."""
        start = slot * NAME
        return self.names[start : start + count * NAME] == self.names[start : start + NAME] * count

    @staticmethod
    def is_train(length: int) -> bool:
        """Tell by the length of its control messages whether a slot may hold a train: more than a stamp."""
        return length not in SINGLE

    def control(self, slot: int, length: int) -> tuple[int, float]:
        """Return the size of a train's datagrams and the kernel's stamp in Unix time, each 0 if not there."""
        at = slot * CONTROL
        if length == _TRAIN_BOTH:
            level, kind, seconds, nanoseconds, level2, kind2, segment = _BOTH.unpack_from(self._control, at)
            if (level, kind, level2, kind2) == _EXPECTED:
                return segment, seconds + nanoseconds * 1e-9
        segment, stamp = 0, 0.0
        end = at + min(length, CONTROL)
        while at + _CMSG.size <= end:
            size, level, kind = _CMSG.unpack_from(self._control, at)
            data = at + _CMSG.size
            if level == SOL_UDP and kind == UDP_GRO:
                segment = GRO_SIZE.unpack_from(self._control, data)[0]
            elif level == socket.SOL_SOCKET and kind == SCM_TIMESTAMPNS:
                seconds, nanoseconds = STAMP.unpack_from(self._control, data)
                stamp = seconds + nanoseconds * 1e-9
            at += max(_CMSG.size, size + -size % _ALIGN)
        return segment, stamp


def address_of(name: bytes) -> tuple[str, int]:
    """Return address and port of a socket name."""
    family = int.from_bytes(name[:2], sys.byteorder)
    port: int = _PORT.unpack_from(name, 2)[0]
    if family == socket.AF_INET6:
        return socket.inet_ntop(socket.AF_INET6, name[8:24]), port
    return socket.inet_ntop(socket.AF_INET, name[4:8]), port


def _address(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
