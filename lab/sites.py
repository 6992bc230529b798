"""Network namespaces of the lab, with short words for what is done in them. All through `host/`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

from crossedge.host import sysctl
from crossedge.host.addresses import SCOPE_LINK, SCOPE_UNIVERSE, add_address
from crossedge.host.links import VethEnd, add_link, add_veth, get_link, set_link
from crossedge.host.namespaces import Namespace
from crossedge.host.neighbours import Neighbour, set_neighbour
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.routes import Route, set_route

FIRST_INDEX = 10
QUIET = {
    "net/ipv4/conf/{}/rp_filter": "0",
    "net/ipv4/conf/{}/send_redirects": "0",
    "net/ipv4/conf/{}/accept_redirects": "0",
    "net/ipv6/conf/{}/accept_ra": "0",
    "net/ipv6/conf/{}/accept_dad": "0",
    "net/ipv6/conf/{}/accept_redirects": "0",
}
"""So that nothing but what the topology says decides how packets go."""
FORWARDING = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
}


@dataclass(frozen=True, slots=True)
class Port:
    """An interface of a site."""

    site: Site
    name: str
    index: int
    mac: bytes


class Site:
    """A network namespace and a netlink socket inside."""

    def __init__(self, name: str, namespace: Namespace, macs: Iterator[bytes]) -> None:
        self.name = name
        self.namespace = namespace
        self.netlink = namespace.call(Netlink)
        self.ports: dict[str, Port] = {}
        self._indices = count(FIRST_INDEX)
        self._macs = macs

    def close(self) -> None:
        """Delete the namespace's name; it ends with the last process in it."""
        self.netlink.close()
        self.namespace.delete()

    def tune(self, values: dict[str, str]) -> None:
        """Set sysctls that the kernel has."""
        with self.namespace:
            for name, value in values.items():
                if sysctl.read(name) not in (None, value):
                    sysctl.write(name, value)

    def quieten(self) -> None:
        """Set what all namespaces of the lab have in common."""
        self.tune({name.format(scope): v for name, v in QUIET.items() for scope in ("all", "default")})

    def port(self, name: str) -> Port:
        """Reserve a name, an index and a MAC for an interface to be made."""
        port = Port(self, name, next(self._indices), next(self._macs))
        self.ports[name] = port
        return port

    def bridge(self, name: str) -> Port:
        """Make a bridge and bring it up."""
        mac = next(self._macs)
        batch = Batch()
        add_link(batch, name, "bridge")
        set_link(batch, name, mac=mac)
        set_link(batch, name, up=True, link_local=False)
        self.netlink.run(batch)
        port = Port(self, name, self.index_of(name), mac)
        self.ports[name] = port
        return port

    def enslave(self, port: Port, bridge: Port) -> None:
        """Put an interface into a bridge."""
        batch = Batch()
        set_link(batch, port.index, master=bridge.index)
        self.netlink.run(batch)

    def index_of(self, name: str) -> int:
        """Return the index of an interface that somebody else made."""
        link = get_link(self.netlink, name)
        if link is None:
            raise LookupError(f"{self.name} has no interface {name}")
        return link.index

    def address(self, port: Port, text: str, *, connected: bool = False, local: bool = False) -> None:
        """Give an interface an address with prefix length; `connected`: the prefix is on the link."""
        batch = Batch()
        add_address(
            batch,
            port.index,
            ipaddress.ip_interface(text),
            prefix_route=connected,
            scope=SCOPE_LINK if local else SCOPE_UNIVERSE,
        )
        self.netlink.run(batch)

    def link_local(self, port: Port) -> None:
        """Give an interface the IPv6 link-local address of its MAC: neighbours are asked for from there."""
        mac = port.mac
        middle = bytes((mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE, mac[3], mac[4], mac[5]))
        address = ipaddress.IPv6Address(bytes.fromhex("fe80000000000000") + middle)
        self.address(port, f"{address}/64", local=True)

    def route(self, destination: str, index: int, gateway: str | None = None, *, table: int = 254) -> None:
        """Route a prefix into an interface, through an on-link gateway or not."""
        network = ipaddress.ip_network(destination)
        batch = Batch()
        set_route(
            batch,
            Route(
                network,
                device=index,
                gateway=None if gateway is None else ipaddress.ip_address(gateway),
                table=table,
                metric=1024 if network.version == 6 else 0,
                onlink=gateway is not None,
            ),
        )
        self.netlink.run(batch)

    def neighbour(self, port: Port, address: str, mac: bytes) -> None:
        """Say for good which MAC an address has, so that nobody need ask."""
        batch = Batch()
        set_neighbour(batch, Neighbour(port.index, ipaddress.ip_address(address), mac))
        self.netlink.run(batch)


def make_site(stack: ExitStack, name: str, macs: Iterator[bytes], *, named: bool = True) -> Site:
    """Make a namespace, under its name in /run/netns if `named`; it goes when the stack is unwound."""
    namespace = Namespace.create(name) if named else Namespace.anonymous()
    try:
        site = Site(name, namespace, macs)
    except BaseException:
        namespace.delete()
        raise
    stack.callback(site.close)
    site.quieten()
    return site


def join(
    a: Port,
    b: Port,
    *,
    mtu: int = 1500,
    gso_max_size: int = 0,
    gso_ipv4_max_sizes: tuple[int, int] = (0, 0),
) -> None:
    """Make a veth pair of two reserved ports, both up, without IPv6 link-local addresses.

    `gso_max_size` bounds what `a` sends as one super-packet, in bytes; `gso_ipv4_max_sizes` what `a` and `b`
    do, of IPv4; 0 leaves it to the kernel.
    """
    own, other = gso_ipv4_max_sizes
    batch = Batch()
    add_veth(
        batch,
        VethEnd(a.name, mac=a.mac, index=a.index, mtu=mtu, gso_max_size=gso_max_size, gso_ipv4_max_size=own),
        VethEnd(
            b.name,
            b.site.namespace.fileno(),
            mac=b.mac,
            index=b.index,
            mtu=mtu,
            gso_ipv4_max_size=other,
        ),
    )
    set_link(batch, a.index, up=True, link_local=False)
    a.site.netlink.run(batch)
    batch = Batch()
    set_link(batch, b.index, up=True, link_local=False)
    b.site.netlink.run(batch)


def macs() -> Iterator[bytes]:
    """Yield locally administered MAC addresses, in order."""
    for number in count(1):
        yield b"\x02\x1a\xb0" + number.to_bytes(3, "big")
