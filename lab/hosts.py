"""Hosts of the in-memory internet: they hand datagrams and the time to protocols, and send for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from crossedge.lab.links import Link
from crossedge.lab.nat import Address
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, SocketEndpoint, UdpEndpoint
from crossedge.wire.relay import HEADER, pack_header, unpack_header

if TYPE_CHECKING:
    from crossedge.lab.internet import Internet
    from crossedge.lab.routers import Router

DEFAULT_TTL = 64
MAX_TURNS = 10_000  # transmits, or timeouts at one instant, after which a protocol is called stuck


class Transmit(NamedTuple):
    """A datagram to send from socket number `local`."""

    destination: UdpEndpoint | RelayEndpoint
    datagram: bytes
    ttl: int | None = None
    local: int = 0


class Packet:
    """A UDP packet under way; its addresses change at every NAT."""

    __slots__ = ("datagram", "destination", "origin", "sent", "size", "source", "ttl")

    def __init__(
        self, source: Address, destination: Address, datagram: bytes, ttl: int, origin: Host, sent: float
    ) -> None:
        self.source = source
        self.destination = destination
        self.datagram = datagram
        self.ttl = ttl
        self.origin = origin
        self.sent = sent
        self.size = len(datagram) + (48 if ":" in destination[0] else 28)

    def __repr__(self) -> str:
        return (
            f"Packet({self.origin.name}: {self.source} > {self.destination}, "
            f"{len(self.datagram)} bytes, ttl {self.ttl})"
        )


class _Attachment:
    """A protocol on a host, with its sockets."""

    __slots__ = (
        "armed",
        "indexed",
        "numbers",
        "protocol",
        "relay",
        "sockets",
        "stalled_at",
        "turns",
        "unpack",
    )

    def __init__(
        self,
        protocol: Any,
        sockets: list[tuple[str | None, int]],
        indexed: bool,
        relay: bool,
        unpack: Callable[[Any], Transmit] | None,
    ) -> None:
        self.protocol = protocol
        self.sockets = sockets
        self.indexed = indexed
        self.relay = relay
        self.unpack = unpack
        self.numbers: dict[int, int] = {}
        self.armed: float | None = None
        self.stalled_at = -1.0
        self.turns = 0


class Host:
    """A machine with addresses, below a router or directly on the public internet."""

    def __init__(self, net: Internet, name: str, region: str, above: Router | None, link: Link) -> None:
        self.net = net
        self.name = name
        self.region = region
        self.above = above
        self.link = link
        self.addresses: list[str] = []
        self.running = True
        self.counters: Counter[str] = Counter()
        self.after_activity: Callable[[float], None] | None = None
        """Called after each receive and timeout, before what the protocol transmits is sent."""
        self._attached: list[_Attachment] = []
        self._ports: dict[int, list[tuple[str | None, _Attachment, int]]] = {}

    def endpoint(self, port: int | None = None, family: int = 4) -> UdpEndpoint:
        """Return the host's own (inner) endpoint; without `port`, that of its first socket."""
        if port is None:
            port = self._attached[0].sockets[0][1]
        return UdpEndpoint(self._address(family == 6), port)

    def attach(
        self,
        protocol: Any,
        port: int = 0,
        *,
        sockets: Iterable[tuple[str | None, int]] | None = None,
        indexed: bool = False,
        relay: bool = False,
        unpack: Callable[[Any], Transmit] | None = None,
    ) -> None:
        """Put a protocol on a port, or on several sockets (address or None, port).

        `indexed`: it is called as `receive(datagram, source, local, now)`. `relay`: what arrives in a relay
        envelope is handed over without it, with a `RelayEndpoint` as its source (transmits to one are always
        wrapped). `unpack`: makes a `Transmit` of what `poll_transmit()` returns.
        """
        attachment = _Attachment(
            protocol, list(sockets) if sockets is not None else [(None, port)], indexed, relay, unpack
        )
        self._attached.append(attachment)
        for local, (address, number) in enumerate(attachment.sockets):
            self._ports.setdefault(number, []).append((address, attachment, local))
        self._settle(attachment)

    def open(self, port: int, address: str | None = None, number: int | None = None) -> int:
        """Give the first protocol one more socket; return its index.

        With a `number`, what arrives there has a `SocketEndpoint` of that number as its source.
        """
        attachment = self._attached[0]
        attachment.sockets.append((address, port))
        local = len(attachment.sockets) - 1
        if number is not None:
            attachment.numbers[local] = number
        self._ports.setdefault(port, []).append((address, attachment, local))
        return local

    def close(self, local: int) -> None:
        """Close a socket of the first protocol that `open` opened; its index is not used again."""
        attachment = self._attached[0]
        port = attachment.sockets[local][1]
        kept = [each for each in self._ports[port] if each[1:] != (attachment, local)]
        if kept:
            self._ports[port] = kept
        else:
            del self._ports[port]

    def detach(self) -> None:
        """Kill what runs here, as by SIGKILL: its sockets are gone, the host stays."""
        self._attached.clear()
        self._ports.clear()

    def wake(self) -> None:
        """Send what the protocols have to send and arm their timers: to be called after calling into one."""
        for attachment in self._attached:
            self._settle(attachment)

    def send(
        self,
        datagram: bytes,
        destination: UdpEndpoint | RelayEndpoint,
        ttl: int | None = None,
        local: int = 0,
    ) -> None:
        """Send one datagram from a socket of the first protocol."""
        self._send(self._attached[0], Transmit(destination, datagram, ttl, local))

    def deliver(self, packet: Packet) -> None:
        """Hand a packet that arrived to the protocol on its port."""
        net = self.net
        if not self.running or (net.failures and any(broken(packet, self) for broken in net.failures)):
            net.drop("cut" if self.running else "host-down", packet)
            return
        found = None
        for address, attached, index in self._ports.get(packet.destination[1], ()):
            if address is None or address == packet.destination[0]:
                found = attached, index
                break
        if found is None:
            net.drop("no-socket", packet)
            return
        attachment, local = found
        net.delivered += 1
        self.counters["received"] += 1
        datagram = packet.datagram
        source: Endpoint = UdpEndpoint(*packet.source)
        if local in attachment.numbers:
            source = SocketEndpoint(UdpEndpoint(*packet.source), attachment.numbers[local])
        if attachment.relay and len(datagram) > HEADER and datagram[:2] == b"\xce\x02":
            source = RelayEndpoint(UdpEndpoint(*packet.source), unpack_header(datagram))
            datagram = datagram[HEADER:]
        if attachment.indexed:
            attachment.protocol.receive(datagram, source, local, net.now)
        else:
            attachment.protocol.receive(datagram, source, net.now)
        self._settle(attachment)

    def _address(self, six: bool) -> str:
        address = self._find(six)
        if address is None:
            raise ValueError(f"{self.name} has no IPv{6 if six else 4} address")
        return address

    def _find(self, six: bool) -> str | None:
        for address in self.addresses:
            if (":" in address) == six:
                return address
        return None

    def _settle(self, attachment: _Attachment) -> None:
        now = self.net.now
        if self.after_activity is not None:
            self.after_activity(now)
        for _ in range(MAX_TURNS):
            item = attachment.protocol.poll_transmit()
            if item is None:
                break
            if attachment.unpack is not None:
                item = attachment.unpack(item)
            self._send(attachment, item)
        else:
            raise RuntimeError(f"{self.name}: {MAX_TURNS} datagrams at once, at {now}")
        deadline = attachment.protocol.next_deadline()
        if deadline is not None:
            deadline = max(deadline, now)
        if deadline != attachment.armed:
            attachment.armed = deadline
            if deadline is not None:
                self.net.at(deadline, self._timeout, attachment, deadline)

    def _timeout(self, attachment: _Attachment, deadline: float) -> None:
        if attachment.armed != deadline or attachment not in self._attached or not self.running:
            return
        attachment.armed = None
        now = self.net.now
        attachment.turns = attachment.turns + 1 if attachment.stalled_at == now else 0
        attachment.stalled_at = now
        if attachment.turns > MAX_TURNS:
            raise RuntimeError(f"{self.name}: its deadline does not move on, at {now}")
        attachment.protocol.handle_timeout(now)
        self._settle(attachment)

    def _send(self, attachment: _Attachment, item: Any) -> None:
        net = self.net
        destination = item.destination
        datagram = bytes(item.datagram)
        if item.__class__ is Transmit:
            ttl, local = item.ttl, item.local
        else:
            ttl, local = getattr(item, "ttl", None), getattr(item, "local", 0) or 0
        address, port = attachment.sockets[local]
        if isinstance(destination, RelayEndpoint):
            datagram = pack_header(destination.channel) + datagram
            destination = destination.server
        host, number = destination
        self.counters["sent"] += 1
        net.sent += 1
        if address is None:
            address = self._find(":" in host)
            if address is None:
                self.counters["no-address"] += 1
                return
        packet = Packet((address, port), (host, number), datagram, ttl or DEFAULT_TTL, self, net.now)
        if host in self.addresses:
            net.at(net.now, self.deliver, packet)
        elif self.above is not None:
            net.carry(packet, self.link.up, self.above.from_inside)
        else:
            net.carry(packet, self.link.up, net.route, self.region)
