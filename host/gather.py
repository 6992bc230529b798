"""Sending what lies in many places by one system call whose structures are made once: sendmsg(2).

Python's `socket.sendmsg` looks at every part anew, each time. Where the same places are sent from again and
again, as the headers and chunks of a train are, the kernel's own list of them can be kept instead.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from struct import Struct
from typing import Final

from crossedge.host.messages import IoVector, MessageHeader
from crossedge.host.udp import SEGMENT, SOL_UDP, UDP_SEGMENT

_V4: Final = Struct("=H2s4s8x")  # struct sockaddr_in; the port is big-endian
_V6: Final = Struct("=H2s4x16s4x")  # struct sockaddr_in6
_FLAGS: Final = ctypes.c_int(int(socket.MSG_DONTWAIT))
_libc = ctypes.CDLL(None, use_errno=True)
_sendmsg = _libc.sendmsg


class _Control(ctypes.Structure):
    """struct cmsghdr, and behind it a train's segment size."""

    _fields_ = (
        ("length", ctypes.c_size_t),
        ("level", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("segment", ctypes.c_uint16),
    )


def argument(descriptor: int) -> ctypes.c_int:
    """Return a descriptor as `Gather.send` takes it, made once."""
    return ctypes.c_int(descriptor)


class SocketName:
    """A numeric address and a port as the kernel takes them."""

    __slots__ = ("_bytes", "address", "size")

    def __init__(self, host: str, port: int) -> None:
        """Raises `OSError` where the host is no numeric address."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        shape = _V6 if family == socket.AF_INET6 else _V4
        packed = shape.pack(int(family), port.to_bytes(2, "big"), socket.inet_pton(family, host))
        self._bytes = ctypes.create_string_buffer(packed, len(packed))
        self.address = ctypes.addressof(self._bytes)
        self.size = len(packed)


class Gather:
    """The parts of a train, each in its place from one sending to the next."""

    __slots__ = ("_control", "_header", "_pointer", "_to", "_vectors", "parts", "segment")

    def __init__(self, parts: Sequence[memoryview], segment: int) -> None:
        """Take the parts and the length of each datagram, in bytes.

        The parts must be writable (which gives them an address); as long as there are views, they stay put.
        """
        self.parts = parts
        self.segment = segment
        self._vectors = (IoVector * len(parts))()
        for number, part in enumerate(parts):
            place = (ctypes.c_char * len(part)).from_buffer(part)
            self._vectors[number] = IoVector(ctypes.addressof(place), len(part))
        length = _Control.segment.offset + SEGMENT.size
        self._control = _Control(length, SOL_UDP, UDP_SEGMENT, segment)
        self._header = MessageHeader(
            None,
            0,
            ctypes.addressof(self._vectors),
            len(parts),
            ctypes.addressof(self._control),
            ctypes.sizeof(self._control),
            0,
        )
        self._pointer = ctypes.c_void_p(ctypes.addressof(self._header))
        self._to: SocketName | None = None

    def send(self, descriptor: ctypes.c_int, to: SocketName) -> None:
        """Send what the parts hold now; raises `OSError` as `socket.sendmsg` does."""
        if to is not self._to:
            self._header.name, self._header.name_length, self._to = to.address, to.size, to
        if _sendmsg(descriptor, self._pointer, _FLAGS) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
