"""UDP sockets as the data path wants them: trains in one call, a mark, receive stamps, no kernel path MTU."""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass

SOL_UDP = 17
UDP_SEGMENT = 103
"""Ancillary message of a send: the size of each datagram of the train, u16."""
UDP_GRO = 104
"""Socket option; ancillary message of a receive: the size of each datagram of the train, int."""

WIDE_LONG = struct.calcsize("l") == 8
SO_TIMESTAMPNS = 35 if WIDE_LONG else 64
"""Its ancillary message has the same number and is two signed 64-bit words on every machine."""
SCM_TIMESTAMPNS = SO_TIMESTAMPNS
STAMP = struct.Struct("=qq")
"""Seconds and nanoseconds of CLOCK_REALTIME: when the kernel received the datagram (the first of a train)."""
SEGMENT = struct.Struct("=H")
GRO_SIZE = struct.Struct("=i")

SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
IP_MTU_DISCOVER = 10
IPV6_MTU_DISCOVER = 23
IPV6_DONTFRAG = 62
PMTUDISC_PROBE = 3
"""Set DF, and ignore what the kernel believes of the path: paths are measured by us."""

BUFFER = 8 * 1024 * 1024
"""Socket buffer asked for, in bytes and each direction."""

OFFLOADS = frozenset({"gso", "gro", "stamps"})


@dataclass(frozen=True, slots=True)
class UdpSocket:
    """An open UDP socket and what the kernel does for it."""

    socket: socket.socket
    gso: bool
    """A send may carry `UDP_SEGMENT`: at most 64 datagrams and 65,400 bytes."""
    gro: bool
    """A receive may return a train; its segment size comes as `UDP_GRO`."""
    stamps: bool
    """Each receive carries `SCM_TIMESTAMPNS`."""
    receive_buffer: int
    """Bytes, as the kernel counts them (twice what was asked for, overhead included)."""
    send_buffer: int

    @property
    def port(self) -> int:
        """The local port."""
        return int(self.socket.getsockname()[1])

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def open_udp(
    family: int,
    port: int,
    mark: int | None = None,
    address: str = "",
    *,
    disable: frozenset[str] = frozenset(),
    descriptor: int | None = None,
) -> UdpSocket:
    """Open (or adopt `descriptor`, which is then ours) a non-blocking UDP socket.

    `family` is AF_INET or AF_INET6 (then IPv6 only); an empty `address` binds all, port 0 picks one. `mark`
    is the socket mark that routing rules see. `disable` names offloads to do without, of "gso", "gro",
    "stamps", as if the kernel lacked them. An adopted socket keeps its binding.

    Raises `OSError` where the socket, the binding or the mark cannot be had: without its mark a mesh prefix
    could swallow its own underlay. Missing offloads and small buffers are no error, they are told in the
    result.
    """
    if unknown := disable - OFFLOADS:
        raise ValueError(f"unknown offloads: {', '.join(sorted(unknown))}")
    opened = _open(family, descriptor)
    try:
        opened.setblocking(False)
        if mark is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
            opened.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
        else:
            opened.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
        if descriptor is None:
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind((address, port))
        return UdpSocket(
            socket=opened,
            gso="gso" not in disable and _has_gso(opened),
            gro=_switch(opened, SOL_UDP, UDP_GRO, "gro" not in disable),
            stamps=_switch(opened, socket.SOL_SOCKET, SO_TIMESTAMPNS, "stamps" not in disable),
            receive_buffer=_grow(opened, SO_RCVBUFFORCE, socket.SO_RCVBUF),
            send_buffer=_grow(opened, SO_SNDBUFFORCE, socket.SO_SNDBUF),
        )
    except BaseException:
        opened.close()
        raise


def _open(family: int, descriptor: int | None) -> socket.socket:
    if family not in (socket.AF_INET, socket.AF_INET6):
        raise ValueError(f"{family} is no address family of UDP")
    if descriptor is None:
        return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    adopted = socket.socket(fileno=descriptor)
    if adopted.family != family or adopted.type != socket.SOCK_DGRAM:
        adopted.close()
        raise OSError(
            f"descriptor {descriptor} is no UDP socket of family {socket.AddressFamily(family).name}"
        )
    adopted.set_inheritable(False)
    return adopted


def _has_gso(opened: socket.socket) -> bool:
    try:
        opened.getsockopt(SOL_UDP, UDP_SEGMENT)
    except OSError:
        return False
    return True


def _switch(opened: socket.socket, level: int, option: int, wanted: bool) -> bool:
    """Switch an option on or off; return whether it is on. An adopted socket may have it on already."""
    try:
        opened.setsockopt(level, option, int(wanted))
    except OSError:
        return False
    return wanted


def _grow(opened: socket.socket, force: int, plain: int) -> int:
    """Ask for a large buffer, beyond the limit of the machine if we may; never make it smaller."""
    before = opened.getsockopt(socket.SOL_SOCKET, plain)
    if before < 2 * BUFFER:
        try:
            opened.setsockopt(socket.SOL_SOCKET, force, BUFFER)
        except OSError:
            with contextlib.suppress(OSError):
                opened.setsockopt(socket.SOL_SOCKET, plain, BUFFER)
    return opened.getsockopt(socket.SOL_SOCKET, plain)
