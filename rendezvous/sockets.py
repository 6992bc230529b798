"""UDP sockets of the server: trains in and out, the local address of each datagram, no fragments."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import ConfigError

SOL_UDP = 17  # linux/socket.h
UDP_SEGMENT = 103  # linux/udp.h
UDP_GRO = 104  # linux/udp.h
IP_PKTINFO = 8  # linux/in.h
IP_MTU_DISCOVER = 10  # linux/in.h
IPV6_MTU_DISCOVER = 23  # linux/in6.h
PMTUDISC_PROBE = 3  # linux/in.h: set DF and let the ends measure the path
SO_SNDBUFFORCE = 32  # asm-generic/socket.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h

SOCKET_BUFFER = 8 << 20
"""Bytes of each socket's send and receive buffer, as far as the kernel lets us."""

NO_SEGMENTATION = frozenset({errno.EIO, errno.EINVAL, errno.ENOPROTOOPT, errno.EMSGSIZE})
"""What a train meets where kernel or interface lack the offload, or the path is too small for it."""

Ancillary = list[tuple[int, int, bytes]]


@dataclass(slots=True)
class ServerSocket:
    """An open socket, and what it can do."""

    socket: socket.socket
    bound: UdpEndpoint
    wildcard: bool
    gso: bool
    gro: bool


def has_ipv6() -> bool:
    """Tell whether the kernel has IPv6 at all."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT
    return True


def open_socket(endpoint: UdpEndpoint, disable: Collection[str] = ()) -> ServerSocket:
    """Open a non-blocking UDP socket at an address.

    Args:
        endpoint: address (a wildcard too) and port.
        disable: "gso" or "gro" not to use.

    Raises:
        ConfigError: the address cannot be used; it names it and why.
    """
    v6 = ":" in endpoint.host
    wildcard = endpoint.host in ("0.0.0.0", "::")
    try:
        sock = socket.socket(
            socket.AF_INET6 if v6 else socket.AF_INET,
            socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
        )
    except OSError as error:
        raise ConfigError(
            "listen", str(endpoint), f"an address this host can open ({error.strerror})"
        ) from error
    try:
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
            if wildcard:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
            if wildcard:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        for force, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            if not _try(sock, socket.SOL_SOCKET, force, SOCKET_BUFFER):
                sock.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
        gro = "gro" not in disable and _try(sock, SOL_UDP, UDP_GRO, 1)
        gso = "gso" not in disable and _try(sock, SOL_UDP, UDP_SEGMENT, 0)
        sock.bind((endpoint.host, endpoint.port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            "listen", str(endpoint), f"an address this host can open ({error.strerror})"
        ) from error
    bound = UdpEndpoint(endpoint.host, sock.getsockname()[1])
    return ServerSocket(sock, bound, wildcard, gso, gro)


def _try(sock: socket.socket, level: int, option: int, value: int) -> bool:
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


_IN_PKTINFO = struct.Struct("=i4s4s")
_IN6_PKTINFO = struct.Struct("=16si")

ANCILLARY_SIZE = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(_IN6_PKTINFO.size)
"""Room for the segment size and the local address of a received train."""


def local_address(ancillary: Ancillary) -> str:
    """Return the address that a datagram was sent to, "" where the kernel did not say."""
    for each in ancillary:
        if host := _destination(each):
            return host
    return ""


@lru_cache(maxsize=1024)
def _destination(message: tuple[int, int, bytes]) -> str:
    level, kind, data = message
    if level == socket.IPPROTO_IP and kind == IP_PKTINFO and len(data) >= _IN_PKTINFO.size:
        # ipi_addr is the header's destination, ipi_spec_dst ours: they differ for broadcasts only.
        return socket.inet_ntop(socket.AF_INET, _IN_PKTINFO.unpack_from(data)[1])
    if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and len(data) >= _IN6_PKTINFO.size:
        return socket.inet_ntop(socket.AF_INET6, _IN6_PKTINFO.unpack_from(data)[0])
    return ""


def segment_size(ancillary: Ancillary) -> int:
    """Return the segment size of a received train, 0 for a single datagram."""
    for level, kind, data in ancillary:
        if level == SOL_UDP and kind == UDP_GRO and len(data) >= 4:
            return int(struct.unpack_from("=i", data)[0])
    return 0


def source_ancillary(host: str) -> Ancillary:
    """Return the control message that makes a wildcard socket send from one of its addresses."""
    if ":" in host:
        packed = socket.inet_pton(socket.AF_INET6, host)
        if host.lower().startswith("fe80:"):
            return []
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IN6_PKTINFO.pack(packed, 0))]
    return [
        (socket.IPPROTO_IP, IP_PKTINFO, _IN_PKTINFO.pack(0, socket.inet_pton(socket.AF_INET, host), bytes(4)))
    ]


def segment_ancillary(segment: int) -> Ancillary:
    """Return the control message that cuts a send into datagrams of `segment` bytes."""
    return [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", segment))]
