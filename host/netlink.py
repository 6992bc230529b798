"""Netlink sockets: many raw messages in one send, dumps, and errors that say what failed.

Messages are built by `links`, `addresses`, `routes`, `rules` and `neighbours` into a `Batch`. Objects of a
library cost milliseconds where a pod or a thousand routes are set up; packed bytes cost microseconds.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import NamedTuple

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence number, port id."""
ATTRIBUTE = struct.Struct("=HH")
U8 = struct.Struct("=B")
U16 = struct.Struct("=H")
U32 = struct.Struct("=I")
I32 = struct.Struct("=i")
_PAD = (b"", b"\0", b"\0\0", b"\0\0\0")

MESSAGES_PER_SEND = 384
"""So that even if each message fails, the errors fit the receive buffer that an ordinary user may have."""
BYTES_PER_SEND = 64 * 1024
DUMP_BUFFER = 128 * 1024
DUMP_TRIES = 8

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class NetlinkError(OSError):
    """The kernel refused a request: `errno`, and a text of what was asked for and why it was refused."""

    def __init__(self, number: int, what: str, message: str = "") -> None:
        reason = os.strerror(number)
        super().__init__(number, f"cannot {what}: {reason}" + (f" ({message})" if message else ""))
        self.what = what
        self.message = message


class Message(NamedTuple):
    """A request that waits to be sent."""

    kind: int
    flags: int
    body: bytes
    what: str
    """What it does, after "cannot"."""
    ignore: Collection[int]
    """Error numbers that are as good as success."""


class Batch:
    """Requests that are sent together, and take effect in order; a failed one does not stop the others."""

    __slots__ = ("messages",)

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def add(self, kind: int, flags: int, body: bytes, what: str, ignore: Collection[int] = ()) -> None:
        """Append a request; `what` completes "cannot ..."."""
        self.messages.append(Message(kind, flags, body, what, ignore))

    def __len__(self) -> int:
        return len(self.messages)


class Reply(NamedTuple):
    """A message from the kernel."""

    kind: int
    flags: int
    sequence: int
    port: int
    payload: bytes


class Netlink:
    """A blocking netlink socket of the namespace in which it was opened; for one thread at a time."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            except OSError:  # each is missing in some old kernel
                continue
        self._socket.bind((0, 0))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def execute(self, batch: Batch) -> list[NetlinkError]:
        """Send all requests and return the errors, in order; an empty list is success.

        Only the last message of a send asks for an acknowledgement, the kernel reports failures anyway.
        """
        errors: list[NetlinkError] = []
        messages = batch.messages
        start = 0
        while start < len(messages):
            first = self._sequence + 1
            data = bytearray()
            stop = start
            while stop < len(messages) and stop - start < MESSAGES_PER_SEND and len(data) < BYTES_PER_SEND:
                message = messages[stop]
                self._sequence += 1
                length = HEADER.size + len(message.body)
                flags = message.flags | NLM_F_REQUEST
                data += HEADER.pack(length, message.kind, flags, self._sequence, 0) + message.body
                data += _PAD[-length & 3]
                stop += 1
                last = len(data) - length - (-length & 3)
            U16.pack_into(data, last + 6, flags | NLM_F_ACK)
            self._socket.send(data)
            for sequence, number, text in self._acknowledgements(first, self._sequence):
                message = messages[start + sequence - first]
                if number and number not in message.ignore:
                    errors.append(NetlinkError(number, message.what, text))
            start = stop
        return errors

    def run(self, batch: Batch) -> None:
        """Send all requests; raise the first error, if any."""
        for error in self.execute(batch):
            raise error

    def _acknowledgements(self, first: int, last: int) -> Iterator[tuple[int, int, str]]:
        while True:
            for reply in parse_messages(self._socket.recv(DUMP_BUFFER)):
                if reply.kind == NLMSG_ERROR and first <= reply.sequence <= last:
                    number, text = parse_error(reply)
                    yield reply.sequence, number, text
                    if reply.sequence == last:
                        return

    def get(self, kind: int, body: bytes, what: str, flags: int = 0) -> list[Reply]:
        """Send one request; return the messages that precede its acknowledgement; raises `NetlinkError`."""
        self._sequence += 1
        length = HEADER.size + len(body)
        header = HEADER.pack(length, kind, flags | NLM_F_REQUEST | NLM_F_ACK, self._sequence, 0)
        self._socket.send(header + body)
        replies: list[Reply] = []
        while True:
            for reply in parse_messages(self._socket.recv(DUMP_BUFFER)):
                if reply.sequence != self._sequence:
                    continue
                if reply.kind != NLMSG_ERROR:
                    replies.append(reply)
                    continue
                number, text = parse_error(reply)
                if number:
                    raise NetlinkError(number, what, text)
                return replies

    def dump(self, kind: int, body: bytes, what: str) -> list[Reply]:
        """Return all objects of a kind, asked for again if they changed meanwhile; raises `NetlinkError`."""
        for _ in range(DUMP_TRIES):
            replies, interrupted = self._dump_once(kind, body, what)
            if not interrupted:
                return replies
        return replies

    def _dump_once(self, kind: int, body: bytes, what: str) -> tuple[list[Reply], bool]:
        self._sequence += 1
        header = HEADER.pack(
            HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP | NLM_F_ACK, self._sequence, 0
        )
        self._socket.send(header + body)
        replies: list[Reply] = []
        interrupted = False
        while True:
            for reply in parse_messages(self._socket.recv(DUMP_BUFFER)):
                if reply.sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(reply.flags & NLM_F_DUMP_INTR)
                if reply.kind == NLMSG_ERROR:
                    number, text = parse_error(reply)
                    raise NetlinkError(number, what, text)
                if reply.kind == NLMSG_DONE:
                    number = -I32.unpack_from(reply.payload)[0] if len(reply.payload) >= I32.size else 0
                    if number == errno.EINTR:
                        interrupted = True
                    elif number:
                        raise NetlinkError(number, what)
                    return replies, interrupted
                replies.append(reply)


def parse_messages(data: bytes) -> Iterator[Reply]:
    """Yield the messages of one receive."""
    offset = 0
    end = len(data)
    while offset + HEADER.size <= end:
        length, kind, flags, sequence, port = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > end:
            return
        yield Reply(kind, flags, sequence, port, data[offset + HEADER.size : offset + length])
        offset += (length + 3) & ~3


def parse_error(reply: Reply) -> tuple[int, str]:
    """Return the error number (0 is success) and the kernel's words of an NLMSG_ERROR."""
    number = -I32.unpack_from(reply.payload)[0]
    if not reply.flags & NLM_F_ACK_TLVS:
        return number, ""
    offset = I32.size + HEADER.size
    if not reply.flags & NLM_F_CAPPED:
        offset = I32.size + ((U32.unpack_from(reply.payload, I32.size)[0] + 3) & ~3)
    text = parse_attributes(reply.payload, offset).get(NLMSGERR_ATTR_MSG, b"")
    return number, text.rstrip(b"\0").decode(errors="replace")


def parse_attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Return the attributes from `offset` on, by type without its flags; of a repeated one the last."""
    found: dict[int, bytes] = {}
    end = len(data)
    unpack = ATTRIBUTE.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def attribute(kind: int, data: bytes) -> bytes:
    """Return a packed attribute, padded."""
    length = len(data)
    return ATTRIBUTE.pack(length + 4, kind) + data + _PAD[-length & 3]


def attribute_u8(kind: int, value: int) -> bytes:
    """Return a packed attribute of one byte."""
    return attribute(kind, U8.pack(value))


def attribute_u32(kind: int, value: int) -> bytes:
    """Return a packed attribute of four bytes, native order."""
    return attribute(kind, U32.pack(value))


def attribute_text(kind: int, value: str) -> bytes:
    """Return a packed attribute that is a zero-terminated text."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *parts: bytes) -> bytes:
    """Return a packed attribute that holds packed attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(parts))
