"""Routers of the in-memory internet: a LAN, a NAT for IPv4, a firewall for IPv6."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crossedge.lab.hosts import Host, Packet
from crossedge.lab.links import Conditions, Link
from crossedge.lab.nat import Nat, NatKind, make_nat

if TYPE_CHECKING:
    from crossedge.lab.internet import Internet

HOST_LINK = Conditions(delay=0.0002)


class Router:
    """A router with a LAN behind it and a NAT between; its WAN is the internet or another router's LAN."""

    def __init__(
        self,
        net: Internet,
        name: str,
        region: str,
        above: Router | None,
        link: Link,
        lan: str,
        four: NatKind,
        six: NatKind,
    ) -> None:
        self.net = net
        self.name = name
        self.region = region
        self.above = above
        self.link = link
        self.lan = lan
        self.addresses: list[str] = []
        self.hosts = 0
        chance = net.chance.fork(f"router {name}")
        self._below = chance.below
        self.kind = four
        self.nat: Nat | None = None
        self.firewall = make_nat(six, (), chance.below)
        self.neighbours: dict[str, Host | Router] = {}

    def host(self, name: str, *, link: Conditions = HOST_LINK, six: bool = False) -> Host:
        """Put a host on the LAN; `six`: with a global IPv6 address too."""
        host = Host(self.net, name, self.region, self, Link(link))
        self.net.hosts[name] = host
        self.join(host, six=six)
        return host

    def router(
        self,
        name: str,
        kind: str | NatKind = "port-restricted",
        *,
        lan: str | None = None,
        link: Conditions = HOST_LINK,
        six: str = "firewall",
    ) -> Router:
        """Put a router on the LAN: what is behind it is behind two NATs."""
        inner = self.net.make_router(name, self.region, self, kind, lan, link, six)
        inner.connect((self._next_address(),))
        self.neighbours[inner.addresses[0]] = inner
        return inner

    def join(self, host: Host, *, six: bool = False) -> None:
        """Give a host addresses of this LAN, instead of those it had, and carry its packets from now on."""
        for address in host.addresses:
            if host.above is not None:
                host.above.leave(address)
            self.net.public.pop(address, None)
        host.above = self
        host.region = self.region
        host.addresses = [self._next_address()]
        self.neighbours[host.addresses[0]] = host
        if six:
            self.hosts += 1
            address = f"{self.net.prefix6(self)}::{self.hosts:x}"
            host.addresses.append(address)
            below: Host | Router = host
            above: Router | None = self
            while above is not None:
                above.neighbours[address] = below
                below, above = above, above.above
            self.net.public[address] = below

    def leave(self, address: str) -> None:
        """Forget a neighbour."""
        self.neighbours.pop(address, None)
        if self.above is not None and ":" in address:
            self.above.leave(address)

    def connect(self, addresses: tuple[str, ...]) -> None:
        """Take outer addresses; mappings of the old ones are lost."""
        self.addresses = list(addresses)
        if self.nat is None:
            self.nat = make_nat(self.kind, addresses, self._below)
        else:
            self.nat.readdress(addresses)

    def readdress(self) -> str:
        """Get a new outer address from above, as after a DSL reconnect; return it."""
        if self.above is None:
            for address in self.addresses:
                self.net.public.pop(address, None)
            self.connect((self.net.next_address(self.region),))
            self.net.public[self.addresses[0]] = self
        else:
            for address in self.addresses:
                self.above.leave(address)
            self.connect((self.above._next_address(),))
            self.above.neighbours[self.addresses[0]] = self
        return self.addresses[0]

    def reboot(self) -> None:
        """Forget every mapping."""
        if self.nat is not None:
            self.nat.reboot()
        self.firewall.reboot()

    def from_inside(self, packet: Packet) -> None:
        """Switch, hairpin or translate a packet from the LAN."""
        net, host = self.net, packet.destination[0]
        neighbour = self.neighbours.get(host)
        if neighbour is not None:
            self._hand_down(neighbour, packet)
            return
        if packet.ttl <= 1:
            net.drop("ttl", packet)
            return
        packet.ttl -= 1
        nat = self.firewall if ":" in host else self.nat
        if nat is None:
            net.drop("unroutable", packet)
        elif host in nat.addresses:
            turned = nat.hairpin(packet.source, packet.destination, net.now)
            if turned is None:
                net.drop("nat", packet)
                return
            packet.source, packet.destination = turned
            self._to_inside(packet)
        else:
            outer = nat.translate_out(packet.source, packet.destination, net.now)
            if outer is None:
                net.drop("nat", packet)
                return
            packet.source = outer
            if self.above is not None:
                net.carry(packet, self.link.up, self.above.from_inside)
            else:
                net.carry(packet, self.link.up, net.route, self.region)

    def from_outside(self, packet: Packet) -> None:
        """Translate a packet from the WAN and hand it to whom it belongs."""
        if packet.ttl <= 1:
            self.net.drop("ttl", packet)
            return
        packet.ttl -= 1
        nat = self.firewall if ":" in packet.destination[0] else self.nat
        inner = None if nat is None else nat.translate_in(packet.source, packet.destination, self.net.now)
        if inner is None:
            self.net.drop("nat", packet)
            return
        packet.destination = inner
        self._to_inside(packet)

    def _to_inside(self, packet: Packet) -> None:
        neighbour = self.neighbours.get(packet.destination[0])
        if neighbour is None:
            self.net.drop("no-host", packet)
        else:
            self._hand_down(neighbour, packet)

    def _hand_down(self, neighbour: Host | Router, packet: Packet) -> None:
        arrive = neighbour.from_outside if isinstance(neighbour, Router) else neighbour.deliver
        self.net.carry(packet, neighbour.link.down, arrive)

    def _next_address(self) -> str:
        self.hosts += 1
        if self.hosts > 250:
            raise ValueError(f"router {self.name}: its LAN {self.lan} is full")
        return f"{self.lan}.{self.hosts + 1}"
