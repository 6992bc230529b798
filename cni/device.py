"""The devices of a pod: a routed veth pair, without a bridge.

    host                                    pod
    ce<hash> <----------------------------> eth0
      route  10.160.1.5/32 dev ce<hash>       address 10.160.1.5/32
      neighbour 10.160.1.5 -> pod's MAC       default via 169.254.1.1, neighbour -> host's MAC

and the same for IPv6 with fe80::1. Nobody ever asks for a link-layer address: both sides know them for good,
so there is neither proxy ARP nor neighbour discovery to wait for. Names and MACs follow from the attachment.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
from collections.abc import Collection, Iterable
from typing import Final

from crossedge.cni.ipam import Entry
from crossedge.cni.node import Node
from crossedge.cni.spec import EXISTS, KERNEL, CniError
from crossedge.host import sysctl
from crossedge.host.addresses import add_address, list_addresses
from crossedge.host.links import (
    Link,
    VethEnd,
    add_veth,
    delete_group,
    delete_link,
    get_link,
    list_links,
    rouse_veth,
    set_link,
)
from crossedge.host.namespaces import Namespace
from crossedge.host.neighbours import Neighbour, list_neighbours, set_neighbour
from crossedge.host.netlink import Address, Batch, Netlink, NetlinkError, Network
from crossedge.host.routes import Route, list_routes, set_route
from crossedge.host.tun import GSO_MAX_SIZE
from crossedge.host.vethpair import BIG_TCP_SIZE, INWARD_SIZE

GROUP: Final = 0xCE5E
"""Group of our links at the host's side: by it they are known for ours."""
LEAVING: Final = 0xCE5F
"""Group of those that wait to be deleted together."""
PROTOCOL: Final = 206
"""Our rtproto."""
METRIC: Final = 1024
GATEWAYS: Final[dict[int, Address]] = {
    4: ipaddress.ip_address("169.254.1.1"),
    6: ipaddress.ip_address("fe80::1"),
}
DEFAULTS: Final[dict[int, Network]] = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}
FORWARDING: Final = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}
LOOPBACK: Final = 1
"""Index of `lo` in every namespace."""


def host_name(network: str, container: str, interface: str) -> str:
    """Return the name of the link at the host's side."""
    return "ce" + _digest("link", network, container, interface).hex()[:13]


def mac_address(side: str, network: str, container: str, interface: str) -> str:
    """Return the MAC of a side ("pod" or "host"): the same for the same attachment, locally administered."""
    packed = bytearray(_digest(side, network, container, interface)[:6])
    packed[0] = packed[0] & 0xFC | 0x02
    return packed.hex(":")


def _digest(*parts: str) -> bytes:
    return hashlib.blake2s("\0".join(parts).encode(), person=b"cni").digest()


def _full(address: Address) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    return ipaddress.ip_interface((address.packed, address.max_prefixlen))


def _single(address: Address) -> Network:
    return ipaddress.ip_network(address)


def require_ipv6(prefixes: Iterable[Network]) -> None:
    """Raise `CniError` code 101 where a prefix is IPv6 and this kernel has none."""
    for prefix in prefixes:
        if prefix.version == 6 and sysctl.read(FORWARDING[6]) is None:
            raise CniError(
                KERNEL,
                f"IPv6 is off in this kernel, and the node has the IPv6 prefix {prefix}",
                "boot without ipv6.disable=1",
            )


def set_up(netlink: Netlink, entry: Entry, netns: Namespace, node: Node) -> None:
    """Make the pair and all that belongs to it.

    Raises:
        CniError: code 100 (an interface of that name exists), or 101; nothing of ours is left then.
    """
    with netns:
        pod = Netlink()
    with pod:
        if not _vacant(netlink, pod, entry.interface):
            raise CniError(EXISTS, f"interface {entry.interface} exists already in {entry.netns}")
        found = get_link(netlink, entry.host)
        if found is not None:
            if found.group not in (GROUP, LEAVING):
                raise CniError(EXISTS, f"a foreign link {entry.host} exists already on the host")
            remove(netlink, [entry.host])  # of an earlier life: no live attachment has this name
        try:
            _make(netlink, pod, entry, netns, node)
        except BaseException:
            remove(netlink, [entry.host])
            raise


def _vacant(netlink: Netlink, pod: Netlink, interface: str) -> bool:
    """Tell whether a name is free in the sandbox; one of ours that was taken down already goes now.

    The other end says whether it is. It may go with its pair between two looks, as what was taken down is
    deleted meanwhile: so the last look is at the name itself.
    """
    inside = get_link(pod, interface)
    if inside is None:
        return True
    outside = get_link(netlink, inside.peer) if inside.kind == "veth" and inside.peer else None
    if outside is not None and outside.group == LEAVING and outside.peer == inside.index:
        remove(netlink, [outside.name])
    return get_link(pod, interface) is None


def _make(netlink: Netlink, pod: Netlink, entry: Entry, netns: Namespace, node: Node) -> None:
    mac, host_mac = (bytes.fromhex(text.replace(":", "")) for text in (entry.mac, entry.host_mac))
    mtu, outward = node.mtu, _outward_size(node)
    inward = INWARD_SIZE if node.big_tcp else 0
    batch = Batch()
    add_veth(
        batch,
        VethEnd(entry.host, mac=host_mac, mtu=mtu, group=GROUP, gso_ipv4_max_size=inward),
        VethEnd(
            entry.interface,
            netns.fileno(),
            mac=mac,
            mtu=mtu,
            gso_max_size=GSO_MAX_SIZE,
            gso_ipv4_max_size=outward,
        ),
    )
    _run(netlink, batch)
    inside, outside = get_link(pod, entry.interface), get_link(netlink, entry.host)
    if inside is None or outside is None:
        raise CniError(KERNEL, f"link {entry.host} was deleted while it was set up")
    if any(address.version == 6 for address in entry.addresses):
        with netns:
            scope = f"net/ipv6/conf/{entry.interface}"
            for name, value in (("disable_ipv6", "0"), ("accept_dad", "0"), ("accept_ra", "0")):
                sysctl.write(f"{scope}/{name}", value)
    _run(pod, _pod_side(entry, inside.index, host_mac))
    _run(netlink, _host_side(entry, outside.index))
    _rouse(pod, inside.index)


def _outward_size(node: Node) -> int:
    """Return the longest super-packet of IPv4 that a pod sends."""
    return BIG_TCP_SIZE if node.big_tcp else GSO_MAX_SIZE


def _rouse(pod: Netlink, index: int) -> None:
    """See that the pod's first packet is not lost: its end came up before it had a carrier."""
    link = get_link(pod, index)  # since Linux 6.8 to ask is enough
    if link is not None and not link.running:
        batch = Batch()
        rouse_veth(batch, index)
        _run(pod, batch)


def _pod_side(entry: Entry, index: int, host_mac: bytes, skip: Collection[int] = ()) -> Batch:
    """Return what sets the pod's side up, but for the default route of the families in `skip`."""
    batch = Batch()
    set_link(batch, LOOPBACK, up=True)
    set_link(batch, index, up=True)
    for address in entry.addresses:
        gateway = GATEWAYS[address.version]
        add_address(batch, index, _full(address))
        set_neighbour(batch, Neighbour(index, gateway, host_mac))
        metric = METRIC if address.version == 6 else 0
        set_route(batch, Route(_single(gateway), index, metric=metric))
        if address.version not in skip:
            set_route(batch, Route(DEFAULTS[address.version], index, gateway, metric=metric))
    return batch


def _host_side(entry: Entry, index: int) -> Batch:
    batch = Batch()
    set_link(batch, index, up=True, link_local=False)
    mac = bytes.fromhex(entry.mac.replace(":", ""))
    for address in entry.addresses:
        set_route(batch, host_route(address, index))
        set_neighbour(batch, Neighbour(index, address, mac))
    return batch


def host_route(address: Address, index: int) -> Route:
    """Return the host's route to a pod's address."""
    metric = METRIC if address.version == 6 else 0
    return Route(_single(address), index, protocol=PROTOCOL, metric=metric)


def forward(versions: Iterable[int]) -> None:
    """Let the host forward, where it does not yet; raises `OSError`."""
    for version in versions:
        if sysctl.read(FORWARDING[version]) == "0":
            sysctl.write(FORWARDING[version], "1")


def take_down(netlink: Netlink, names: Iterable[str]) -> None:
    """Cut links of ours off at once: down, so that their routes go, and marked to be deleted by `reap`."""
    batch = Batch()
    for link in _ours(netlink, names):
        set_link(batch, link.index, up=False, group=LEAVING)
    for error in netlink.execute(batch):
        if error.errno != errno.ENODEV:
            raise CniError(KERNEL, error.strerror or str(error))


def _ours(netlink: Netlink, names: Iterable[str]) -> list[Link]:
    """Return the links of these names that are of our making: a name alone proves nothing."""
    found = [get_link(netlink, name) for name in names]
    return [link for link in found if link is not None and link.group in (GROUP, LEAVING)]


def reap(netlink: Netlink) -> None:
    """Delete all links that were taken down, which costs the kernel little more than one."""
    batch = Batch()
    delete_group(batch, LEAVING)
    _run(netlink, batch)


def remove(netlink: Netlink, names: Iterable[str]) -> None:
    """Delete links of ours and wait for it; those that are gone are no error."""
    batch = Batch()
    for link in _ours(netlink, names):
        delete_link(batch, link.index)
    _run(netlink, batch)


def host_links(netlink: Netlink) -> dict[str, Link]:
    """Return our links at the host's side, by name."""
    return {link.name: link for link in list_links(netlink) if link.group == GROUP and link.kind == "veth"}


def owner(netlink: Netlink, netns: Namespace, interface: str) -> Link | None:
    """Return our link at the host's side whose other end is an interface of a namespace."""
    with netns:
        pod = Netlink()
    with pod:
        inside = get_link(pod, interface)
        if inside is None or inside.kind != "veth" or not inside.peer:
            return None
    outside = get_link(netlink, inside.peer)
    if outside is None or outside.group != GROUP or outside.peer != inside.index:
        return None
    return outside


def repair(netlink: Netlink, entry: Entry, netns: Namespace, node: Node, outside_lacks: bool) -> list[str]:
    """Set right what is missing of an attachment whose namespace lives; return in words what was.

    `outside_lacks` says whether the host's side is to be set up again: who looks at many attachments finds
    that out for all at once.
    Only what is ours is looked at: further addresses and routes, another MTU or MAC, are another's business,
    and so is a default route that leads elsewhere.
    """
    with netns:
        pod = Netlink()
    with pod:
        inside, outside = get_link(pod, entry.interface), get_link(netlink, entry.host)
        if inside is None or outside is None:
            if inside is not None:
                return []  # a foreign interface by that name
            if outside is not None:
                remove(netlink, [entry.host])
            _make(netlink, pod, entry, netns, node)
            return [f"the link {entry.host} was gone"]
        _resize(pod, inside, node)
        found = pod_differences(pod, inside, entry, outside.mac)
        if found:
            skip = {each.destination.version for each in _defaults(pod)}
            _run(pod, _pod_side(entry, inside.index, bytes.fromhex(outside.mac.replace(":", "")), skip))
        if outside_lacks:
            _run(netlink, _host_side(entry, outside.index))
            found.append(f"{entry.host} was down, or lacked a route or neighbour")
        return found


def _resize(pod: Netlink, inside: Link, node: Node) -> None:
    """Have a pod send super-packets that the daemon's device takes, if it was made for another device.

    Connections that are open keep to what they began with.
    """
    wanted = _outward_size(node)
    ours = {GSO_MAX_SIZE, BIG_TCP_SIZE}  # any other is somebody else's
    if inside.gso_ipv4_max_size in ours - {wanted}:
        batch = Batch()
        set_link(batch, inside.index, gso_max_size=GSO_MAX_SIZE, gso_ipv4_max_size=wanted)
        _run(pod, batch)


def widen(netlink: Netlink, links: Iterable[Link]) -> None:
    """Let long super-packets pass to pods, also to those that an earlier version made; else they are cut."""
    batch = Batch()
    for link in links:
        if link.gso_ipv4_max_size < INWARD_SIZE:
            set_link(batch, link.index, gso_ipv4_max_size=INWARD_SIZE)
    for error in netlink.execute(batch):
        if error.errno != errno.ENODEV:
            raise CniError(KERNEL, error.strerror or str(error))


def _defaults(pod: Netlink) -> list[Route]:
    return [route for route in list_routes(pod) if not route.destination.prefixlen]


def pod_differences(pod: Netlink, inside: Link, entry: Entry, host_mac: str) -> list[str]:
    """Return in words what the pod's side lacks."""
    found = [] if inside.up else [f"interface {entry.interface} is down"]
    have = {each.interface.ip for each in list_addresses(pod, inside.index)}
    routes = list_routes(pod)
    known = {each.address: each.mac.hex(":") for each in list_neighbours(pod, inside.index)}
    for address in entry.addresses:
        gateway = GATEWAYS[address.version]
        if address not in have:
            found.append(f"interface {entry.interface} lacks the address {address}")
        defaults = [r for r in routes if r.destination == DEFAULTS[address.version]]
        if not defaults:
            found.append(f"the sandbox has no IPv{address.version} default route")
        elif not any(r.gateway == gateway and r.device == inside.index for r in defaults):
            continue  # somebody leads the pod's traffic elsewhere
        if not any(r.destination == _single(gateway) and r.device == inside.index for r in routes):
            found.append(f"the sandbox has no route to its gateway {gateway}")
        if known.get(gateway) != host_mac:
            found.append(f"the sandbox does not know the link-layer address of its gateway {gateway}")
    return found


def host_differences(netlink: Netlink, outside: Link, entry: Entry) -> list[str]:
    """Return in words what the host's side lacks."""
    found = [] if outside.up else [f"host link {entry.host} is down"]
    routes = list_routes(netlink, table=254, protocol=PROTOCOL)
    known = {each.address for each in list_neighbours(netlink, outside.index)}
    for address in entry.addresses:
        if not any(each.destination == _single(address) and each.device == outside.index for each in routes):
            found.append(f"the host has no route to {address}")
        if address not in known:
            found.append(f"the host does not know the link-layer address of {address}")
    return found


def _run(netlink: Netlink, batch: Batch) -> None:
    try:
        netlink.run(batch)
    except NetlinkError as error:
        raise CniError(KERNEL, error.strerror or str(error)) from error
