"""Links: made, set, deleted and listed by raw netlink messages."""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass

from crossedge.host.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    U32,
    Batch,
    Netlink,
    NetlinkError,
    Reply,
    attribute,
    attribute_text,
    attribute_u8,
    attribute_u32,
    nested,
    parse_attributes,
)

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
IFINFO = struct.Struct("=BxHiII")
"""Family, link type, index, flags, mask of the flags to change."""
IFF_UP = 1
IFF_RUNNING = 0x40
IFF_NOARP = 0x80

IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_LINK = 5
IFLA_MASTER = 10
IFLA_TXQLEN = 13
IFLA_LINKINFO = 18
IFLA_AF_SPEC = 26
IFLA_GROUP = 27
IFLA_NET_NS_FD = 28
IFLA_EXT_MASK = 29
IFLA_LINK_NETNSID = 37
IFLA_GSO_MAX_SIZE = 41
IFLA_CARRIER_DOWN_COUNT = 48
IFLA_GSO_IPV4_MAX_SIZE = 63
"""Since Linux 6.3; an older kernel takes no notice of it."""
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
IFLA_INET6_ADDR_GEN_MODE = 8
VETH_INFO_PEER = 1
RTEXT_FILTER_SKIP_STATS = 8
ADDR_GEN_MODE_NONE = 1
MADE = 0xFFFFFFFF
"""What the kernel tells for the flags that changed (`ifi_change`) when a link was made."""
VETH_QUEUE = 1000
"""Transmit queue length of a veth, in packets, as the kernel makes it."""
NAME_LIMIT = 15
"""Longest name of a link, in bytes."""

GONE = frozenset({errno.ENODEV})
BRIEF = attribute_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True)
class Link:
    """A link as the kernel shows it."""

    index: int
    name: str
    kind: str
    """"veth", "tun", "bridge"...; empty for hardware and loopback."""
    flags: int
    mtu: int
    gso_max_size: int
    mac: str
    master: int
    peer: int
    """Index of the lower link or, for a veth, of its other end (in that end's namespace); 0 if none."""
    group: int = 0
    """Number under which links are changed or deleted together; 0 is everybody's."""
    namespace: int = -1
    """Id that the namespace of the lower link or other end has here; -1 if that is this one."""
    gso_ipv4_max_size: int = 0
    """Longest IPv4 super-packet that leaves by it, in bytes; 0 where the kernel knows none of its own."""
    carrier_losses: int = 0
    """How often it has lost its carrier, as a veth does when either end is switched off."""

    @property
    def up(self) -> bool:
        """Whether it is switched on."""
        return bool(self.flags & IFF_UP)

    @property
    def running(self) -> bool:
        """Whether it takes packets: it is switched on and the kernel has taken note of its carrier."""
        return bool(self.flags & IFF_RUNNING)

    @property
    def arp(self) -> bool:
        """Whether the kernel asks who has an address; else all frames go to the link's own MAC."""
        return not self.flags & IFF_NOARP


@dataclass(frozen=True, slots=True)
class VethEnd:
    """One end of a veth pair that shall be made."""

    name: str
    namespace: int | None = None
    """Descriptor of the namespace for it; None: where the netlink socket is."""
    mac: bytes = b""
    """Six bytes; empty: random."""
    index: int = 0
    """The index it shall have; 0: the kernel picks one. That of the peer counts only if both are given."""
    mtu: int = 0
    group: int = 0
    gso_max_size: int = 0
    """Longest super-packet that leaves by it, in bytes; 0: the kernel's own bound."""
    gso_ipv4_max_size: int = 0
    """The same of IPv4, where it may be longer than others; 0: as `gso_max_size`."""


def check_name(name: str) -> str:
    """Return `name` if the kernel takes it for a link; raises `ValueError`."""
    bad = not name or name in (".", "..") or len(name.encode()) > NAME_LIMIT
    if bad or any(letter in "/:" or letter.isspace() for letter in name):
        raise ValueError(f"{name!r} cannot name a link (1 to {NAME_LIMIT} bytes, no slash, colon or space)")
    return name


def _end(end: VethEnd, flags: int = 0, extra: bytes = b"") -> bytes:
    body = [IFINFO.pack(0, 0, end.index, flags, flags)]
    body.append(attribute_text(IFLA_IFNAME, check_name(end.name)))
    if end.namespace is not None:
        body.append(attribute_u32(IFLA_NET_NS_FD, end.namespace))
    if end.mac:
        body.append(attribute(IFLA_ADDRESS, end.mac))
    if end.mtu:
        body.append(attribute_u32(IFLA_MTU, end.mtu))
    if end.group:
        body.append(attribute_u32(IFLA_GROUP, end.group))
    body += _gso_sizes(end.gso_max_size, end.gso_ipv4_max_size)
    return b"".join(body) + extra


def _gso_sizes(every: int, ipv4: int) -> list[bytes]:
    """Return the attributes, IPv4's last: the kernel takes a size of up to 64 KiB for all for IPv4's too."""
    sizes = ((IFLA_GSO_MAX_SIZE, every), (IFLA_GSO_IPV4_MAX_SIZE, ipv4))
    return [attribute_u32(kind, size) for kind, size in sizes if size]


def add_veth(batch: Batch, end: VethEnd, peer: VethEnd, *, up: bool = False) -> None:
    """Make a veth pair, each end in its namespace with its name, address and MTU.

    `up` switches `end` on; the kernel can not do so with `peer` while it makes the pair.
    """
    info = nested(
        IFLA_LINKINFO,
        attribute_text(IFLA_INFO_KIND, "veth"),
        nested(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, _end(peer))),
    )
    batch.add(
        RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        _end(end, IFF_UP if up else 0, info),
        f"make veth pair {end.name}, {peer.name}",
    )


def add_link(batch: Batch, name: str, kind: str) -> None:
    """Make a link of a kind that needs no data of its own, such as "bridge"."""
    info = nested(IFLA_LINKINFO, attribute_text(IFLA_INFO_KIND, kind))
    body = IFINFO.pack(0, 0, 0, 0, 0) + attribute_text(IFLA_IFNAME, check_name(name)) + info
    batch.add(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make {kind} {name}")


def set_link(
    batch: Batch,
    link: int | str,
    *,
    up: bool | None = None,
    arp: bool | None = None,
    mtu: int = 0,
    gso_max_size: int = 0,
    gso_ipv4_max_size: int = 0,
    mac: bytes = b"",
    rename: str = "",
    master: int | None = None,
    namespace: int | None = None,
    group: int | None = None,
    link_local: bool = True,
) -> None:
    """Change a link, given by index or name; what is not said stays as it is.

    `link_local=False` keeps the kernel from giving it an IPv6 link-local address (and so from soliciting
    routers on it) when it comes up. `master=0` takes it out of its bridge. `arp` is as in `Link`. A
    `gso_max_size` of up to 64 KiB alone bounds IPv4 too, whatever that had before.
    """
    index = link if isinstance(link, int) else 0
    name = b"" if isinstance(link, int) else attribute_text(IFLA_IFNAME, check_name(link))
    if not link_local:  # a message of its own, for within one the kernel switches on first
        mode = attribute_u8(IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE)
        body = IFINFO.pack(0, 0, index, 0, 0) + name
        body += nested(IFLA_AF_SPEC, nested(socket.AF_INET6, mode))
        batch.add(RTM_NEWLINK, 0, body, f"keep link {link} from an IPv6 link-local address", NO_IPV6)
    mask = (0 if up is None else IFF_UP) | (0 if arp is None else IFF_NOARP)
    flags = (IFF_UP if up else 0) | (IFF_NOARP if arp is False else 0)
    parts = [IFINFO.pack(0, 0, index, flags, mask), name]
    if rename:
        parts.append(attribute_text(IFLA_IFNAME, check_name(rename)))
    if mtu:
        parts.append(attribute_u32(IFLA_MTU, mtu))
    parts += _gso_sizes(gso_max_size, gso_ipv4_max_size)
    if mac:
        parts.append(attribute(IFLA_ADDRESS, mac))
    if master is not None:
        parts.append(attribute_u32(IFLA_MASTER, master))
    if namespace is not None:
        parts.append(attribute_u32(IFLA_NET_NS_FD, namespace))
    if group is not None:
        parts.append(attribute_u32(IFLA_GROUP, group))
    if mask or len(parts) > 2:
        batch.add(RTM_NEWLINK, 0, b"".join(parts), f"change link {link}")


def rouse_veth(batch: Batch, link: int) -> None:
    """Let a veth take packets whose carrier has come: a change of its queue does at once what else waits.

    The end that was switched on first drops all packets until a work queue has noted its carrier, which
    takes as long as others hold the kernel's lock for links: seconds, on a busy host.
    """
    for length in (VETH_QUEUE + 1, VETH_QUEUE):
        body = IFINFO.pack(0, 0, link, 0, 0) + attribute_u32(IFLA_TXQLEN, length)
        batch.add(RTM_NEWLINK, 0, body, f"rouse link {link}")


def delete_link(batch: Batch, link: int | str) -> None:
    """Delete a link, given by index or name; one that is gone already is no error."""
    if isinstance(link, int):
        body = IFINFO.pack(0, 0, link, 0, 0)
    else:
        body = IFINFO.pack(0, 0, 0, 0, 0) + attribute_text(IFLA_IFNAME, check_name(link))
    batch.add(RTM_DELLINK, 0, body, f"delete link {link}", GONE)


def delete_group(batch: Batch, group: int) -> None:
    """Delete all links of a group at once, which costs the kernel little more than one; none is no error."""
    body = IFINFO.pack(0, 0, 0, 0, 0) + attribute_u32(IFLA_GROUP, group)
    batch.add(RTM_DELLINK, 0, body, f"delete the links of group {group}", GONE)


def get_link(netlink: Netlink, link: int | str) -> Link | None:
    """Return a link by index or name; None if there is none."""
    if isinstance(link, int):
        body = IFINFO.pack(0, 0, link, 0, 0)
    else:
        body = IFINFO.pack(0, 0, 0, 0, 0) + attribute_text(IFLA_IFNAME, check_name(link))
    try:
        replies = netlink.get(RTM_GETLINK, body + BRIEF, f"look up link {link}")
    except NetlinkError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    return next((parse_link(reply) for reply in replies if reply.kind == RTM_NEWLINK), None)


def list_links(netlink: Netlink) -> list[Link]:
    """Return all links of the namespace."""
    replies = netlink.dump(RTM_GETLINK, IFINFO.pack(0, 0, 0, 0, 0) + BRIEF, "list links")
    return [parse_link(reply) for reply in replies if reply.kind == RTM_NEWLINK]


def parse_link(reply: Reply) -> Link:
    """Parse RTM_NEWLINK or RTM_DELLINK."""
    _, _, index, flags, _ = IFINFO.unpack_from(reply.payload)
    found = parse_attributes(reply.payload, IFINFO.size)

    def number(kind: int) -> int:
        data = found.get(kind, b"")
        return int(U32.unpack_from(data)[0]) if len(data) >= U32.size else 0

    info = parse_attributes(found.get(IFLA_LINKINFO, b""))
    return Link(
        index=index,
        name=found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        kind=info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
        flags=flags,
        mtu=number(IFLA_MTU),
        gso_max_size=number(IFLA_GSO_MAX_SIZE),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        master=number(IFLA_MASTER),
        peer=number(IFLA_LINK),
        group=number(IFLA_GROUP),
        namespace=number(IFLA_LINK_NETNSID) if IFLA_LINK_NETNSID in found else -1,
        gso_ipv4_max_size=number(IFLA_GSO_IPV4_MAX_SIZE),
        carrier_losses=number(IFLA_CARRIER_DOWN_COUNT),
    )
