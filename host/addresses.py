"""Addresses of links, by raw netlink messages."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass

from crossedge.host.netlink import (
    FAMILY,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    U32,
    Batch,
    Interface,
    Netlink,
    Reply,
    attribute,
    attribute_u32,
    parse_attributes,
)

RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
IFADDR = struct.Struct("=BBBBI")
"""Family, prefix length, low flags, scope, link index."""
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_NODAD = 0x02
IFA_F_DADFAILED = 0x08
IFA_F_DEPRECATED = 0x20
IFA_F_TENTATIVE = 0x40
IFA_F_NOPREFIXROUTE = 0x200
SCOPE_UNIVERSE = 0
SCOPE_LINK = 253


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An address of a link."""

    index: int
    interface: Interface
    """The address with its prefix length; of a point-to-point address our own side, /32 or /128."""
    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    """What is connected by it: the prefix, or the far side of a point-to-point address."""
    flags: int
    scope: int

    @property
    def usable(self) -> bool:
        """Whether it may be used as a source: neither tentative nor failed nor deprecated."""
        return not self.flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED | IFA_F_DEPRECATED)


def _body(index: int, interface: Interface, flags: int, scope: int) -> bytes:
    packed = interface.packed
    length = interface.network.prefixlen
    head = IFADDR.pack(FAMILY[interface.version], length, flags & 0xFF, scope, index)
    return head + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)


def add_address(
    batch: Batch,
    index: int,
    interface: Interface,
    *,
    nodad: bool = True,
    prefix_route: bool = False,
    scope: int = SCOPE_UNIVERSE,
) -> None:
    """Give a link an address, or set the flags of one that it has.

    `nodad` skips duplicate address detection, so that an IPv6 address is usable at once; `prefix_route` lets
    the kernel add the route of the prefix.
    """
    flags = 0 if prefix_route else IFA_F_NOPREFIXROUTE
    if nodad and interface.version == 6:
        flags |= IFA_F_NODAD
    body = _body(index, interface, flags, scope) + attribute_u32(IFA_FLAGS, flags)
    batch.add(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body, f"give link {index} the address {interface}")


def delete_address(batch: Batch, index: int, interface: Interface) -> None:
    """Take an address from a link; one that it does not have is no error."""
    body = _body(index, interface, 0, 0)
    what = f"take the address {interface} from link {index}"
    batch.add(RTM_DELADDR, 0, body, what, (errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO))


def list_addresses(netlink: Netlink, index: int = 0) -> list[LinkAddress]:
    """Return the addresses of all links, or of one."""
    replies = netlink.dump(RTM_GETADDR, IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0), "list addresses")
    found = [parsed for reply in replies if reply.kind == RTM_NEWADDR and (parsed := parse_address(reply))]
    return [address for address in found if not index or address.index == index]


def parse_address(reply: Reply) -> LinkAddress | None:
    """Parse RTM_NEWADDR or RTM_DELADDR; None for a family that is not IP."""
    family, length, flags, scope, index = IFADDR.unpack_from(reply.payload)
    found = parse_attributes(reply.payload, IFADDR.size)
    far = found.get(IFA_ADDRESS, b"")
    own = found.get(IFA_LOCAL, far)
    if len(found.get(IFA_FLAGS, b"")) == U32.size:
        (flags,) = U32.unpack(found[IFA_FLAGS])
    if family == socket.AF_INET and len(own) == 4:
        interface4 = ipaddress.IPv4Interface((own, 32 if far and far != own else length))
        network4 = ipaddress.IPv4Network((far or own, length), strict=False)
        return LinkAddress(index, interface4, network4, flags, scope)
    if family == socket.AF_INET6 and len(own) == 16:
        interface6 = ipaddress.IPv6Interface((own, 128 if far != own else length))
        network6 = ipaddress.IPv6Network((far, length), strict=False)
        return LinkAddress(index, interface6, network6, flags, scope)
    return None
