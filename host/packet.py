"""Packet sockets at one end of a veth pair, which stand in for a TUN: what the other end sends is read from
one, and what is written to the other arrives there. Each frame has a virtio header in front (packet(7)).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

from crossedge.host.namespaces import Namespace
from crossedge.host.tun import HELD, DeviceTakenError

SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_VNET_HDR = 15
PACKET_FANOUT = 18
PACKET_IGNORE_OUTGOING = 23
PACKET_FANOUT_CPU = 2
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SIOCGSKNS = 0x894C
ETH_P_ALL = 0x0003
ETH_P_NOBODY = 0x88B5
"""IEEE's first EtherType for local experiments: nothing of it comes by this link."""
STATISTICS = struct.Struct("=II")
"""Frames and, of them, those that did not fit the buffer, since they were asked for last."""
FANOUT = struct.Struct("=HHI")
"""Number of the group, how it shares frames, and how many sockets it may have."""
GROUPS = 0xCE5E
"""Number of the first group, out of the way of those that programs have by default, which are small."""
BUFFER = 16 * 1024 * 1024
"""Bytes that wait in a socket at most; the kernel doubles it, and counts its own structures in."""


def open_reader(link: str) -> int:
    """Return a non-blocking socket that reads all that arrives at a link, and nothing that leaves there.

    Raises `OSError`.
    """
    with _socket() as opened:
        _set_reading(opened)
        opened.bind((link, ETH_P_ALL))
        return opened.detach()


def take_reader(descriptor: int) -> None:
    """Set an inherited socket, for which `reads` holds, as `open_reader` does; raises `OSError`.

    That its link was down meanwhile is not told any more.
    """
    os.set_blocking(descriptor, False)
    os.set_inheritable(descriptor, False)
    with _borrowed(descriptor) as opened:
        _set_reading(opened)
        opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _set_reading(opened: socket.socket) -> None:
    opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    opened.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    _set_buffer(opened, SO_RCVBUFFORCE, socket.SO_RCVBUF)


def _set_buffer(opened: socket.socket, force: int, option: int) -> None:
    """Have room for `BUFFER`; raises `OSError` where neither we may have it nor everybody may.

    Root of a user namespace may have what everybody may (net.core.rmem_max, wmem_max), by default not even
    two long super-packets.
    """
    try:
        opened.setsockopt(socket.SOL_SOCKET, force, BUFFER)
    except PermissionError:
        opened.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        if opened.getsockopt(socket.SOL_SOCKET, option) < 2 * BUFFER:
            raise OSError(errno.EPERM, "a packet socket may not have the buffer that it needs") from None


def open_writer(link: str) -> int:
    """Return a non-blocking socket whose frames leave by a link, and which reads none; raises `OSError`."""
    with _socket() as opened:
        opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        _set_buffer(opened, SO_SNDBUFFORCE, socket.SO_SNDBUF)
        opened.bind((link, 0))
        return opened.detach()


def hold(link: str, index: int, what: str) -> int:
    """Return a descriptor that no other process can have for the same link while this one is open.

    It is a group of packet sockets (PACKET_FANOUT) that has room for one. The kernel numbers groups in each
    network namespace, wants CAP_NET_RAW for them, and ends them with their last socket, also where a process
    was killed: no file is left, and nobody without rights can be in the way. Its number, of 16 bits, follows
    from the link's index. The reading socket is none of the group, so it may be handed on alone.

    Raises `DeviceTakenError` where another process has it, naming `what`; else `OSError`.
    """
    with _socket() as opened:
        opened.bind((link, ETH_P_NOBODY))
        try:
            opened.setsockopt(
                SOL_PACKET, PACKET_FANOUT, FANOUT.pack(GROUPS + index & 0xFFFF, PACKET_FANOUT_CPU, 1)
            )
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DeviceTakenError(errno.EBUSY, f"cannot open {what}: {HELD}") from error
        return opened.detach()


def reads(descriptor: int) -> str | None:
    """Return the link that a socket of `open_reader` reads from, by its name now; None where there is none.

    The link was deleted, or is in another namespace, or it is another descriptor.
    """
    try:
        with _borrowed(descriptor) as opened:
            name, protocol, *_ = opened.getsockname()
            kind = opened.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    except OSError:
        return None
    return str(name) if name and protocol == ETH_P_ALL and kind == socket.SOCK_RAW else None


def namespace_of(descriptor: int) -> Namespace:
    """Return the network namespace of a socket; raises `OSError`."""
    return Namespace(fcntl.ioctl(descriptor, SIOCGSKNS))


def overflowed(descriptor: int) -> int:
    """Return how many frames did not fit a packet socket's buffer since the last call; 0 for a TUN."""
    try:
        with _borrowed(descriptor) as opened:
            found = opened.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size)
    except OSError:
        return 0
    return int(STATISTICS.unpack(found)[1])


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Lend a socket object for a descriptor; raises `OSError` where that is no packet socket."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0, fileno=descriptor)
    try:
        if opened.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) != socket.AF_PACKET:
            raise OSError(errno.EAFNOSUPPORT, "not a packet socket")
        yield opened
    finally:
        opened.detach()


def _socket() -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    return socket.socket(socket.AF_PACKET, kind, 0)
