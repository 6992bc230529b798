"""Neighbour entries, by raw netlink messages."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import NamedTuple

from crossedge.host.netlink import (
    FAMILY,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    Address,
    Batch,
    Netlink,
    Reply,
    attribute,
    parse_attributes,
)

RTM_NEWNEIGH = 28
RTM_DELNEIGH = 29
RTM_GETNEIGH = 30
NDMSG = struct.Struct("=BxxxiHBB")
"""Family, link index, state, flags, type."""
NDA_DST = 1
NDA_LLADDR = 2
NUD_PERMANENT = 0x80


class Neighbour(NamedTuple):
    """Which link-layer address an address of a link has."""

    device: int
    """Index of the link."""
    address: Address
    mac: bytes = b""
    state: int = NUD_PERMANENT


def set_neighbour(batch: Batch, neighbour: Neighbour) -> None:
    """Set an entry, permanent unless its state says otherwise."""
    body = NDMSG.pack(FAMILY[neighbour.address.version], neighbour.device, neighbour.state, 0, 0)
    body += attribute(NDA_DST, neighbour.address.packed) + attribute(NDA_LLADDR, neighbour.mac)
    what = f"set the neighbour {neighbour.address} of link {neighbour.device}"
    batch.add(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, what)


def delete_neighbour(batch: Batch, neighbour: Neighbour) -> None:
    """Delete an entry; one that is gone already is no error."""
    body = NDMSG.pack(FAMILY[neighbour.address.version], neighbour.device, 0, 0, 0)
    body += attribute(NDA_DST, neighbour.address.packed)
    what = f"delete the neighbour {neighbour.address} of link {neighbour.device}"
    batch.add(RTM_DELNEIGH, 0, body, what, (errno.ENOENT, errno.ENODEV))


def list_neighbours(netlink: Netlink, index: int = 0) -> list[Neighbour]:
    """Return the entries of all links, or of one."""
    replies = netlink.dump(RTM_GETNEIGH, NDMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0), "list neighbours")
    found = [parsed for reply in replies if reply.kind == RTM_NEWNEIGH and (parsed := parse_neighbour(reply))]
    return [neighbour for neighbour in found if not index or neighbour.device == index]


def parse_neighbour(reply: Reply) -> Neighbour | None:
    """Parse RTM_NEWNEIGH or RTM_DELNEIGH; None for what is not IP."""
    family, index, state, _, _ = NDMSG.unpack_from(reply.payload)
    found = parse_attributes(reply.payload, NDMSG.size)
    packed = found.get(NDA_DST, b"")
    if (family, len(packed)) not in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        return None
    return Neighbour(index, ipaddress.ip_address(packed), found.get(NDA_LLADDR, b""), state)
