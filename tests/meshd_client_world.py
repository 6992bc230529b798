"""Nodes and rendezvous in the in-memory internet, for the tests of the client: real cores on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from ipaddress import IPv4Address, IPv4Network

from crossedge.lab.internet import Conditions, Host, Internet, Transmit
from crossedge.lab.natkinds import NatKind
from crossedge.meshd.client import RendezvousClient
from crossedge.meshd.client_events import ClientEvent, ClientState, Found, RecordsArrived, Registered
from crossedge.meshd.directory import CertificateWanted, Directory
from crossedge.meshd.ownrecord import OwnRecord
from crossedge.meshd.sequence import Sequence
from crossedge.meshd.wallclock import Wallclock
from crossedge.rendezvous.service import Service
from crossedge.rendezvous.settings import SourceLimits
from crossedge.rendezvous.stunserver import address_group
from crossedge.wire import messages as m
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey, PairKeys, Sealed, seal
from crossedge.wire.identity import SigningKey, key_id, network_id

PORT = 41820
STUN = 3478
TODAY = 1_760_000_000.0


Tamper = Callable[[m.Message], m.Message | None]


class Server:
    """A rendezvous that can be killed and started."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.host = world.net.host(name, region="cloud")
        self.key = ControlKey.generate(world.net.random)
        self.service: Service | None = None
        self.checkpoint = b""
        self.tamper: Tamper | None = None
        """Answers a message in the place of the service, or returns None."""
        self.seen: Counter[str] = Counter()
        """What nodes asked, by name of the message."""
        self._lies: list[Transmit] = []
        self.start()

    @property
    def endpoint(self) -> UdpEndpoint:
        return UdpEndpoint(self.host.addresses[0], STUN)

    @property
    def running(self) -> Service:
        assert self.service is not None
        return self.service

    def start(self, hints: bool = False) -> Service:
        net = self.world.net
        ports = (STUN, STUN + 1)
        locals_ = address_group((self.host.addresses[0],), ports, 0)
        service = Service(
            self.key,
            [self.world.ca.public],
            locals_,
            net.random,
            net.now,
            TODAY - net.now + self.world.server_clock,
            self.world.limits,
        )
        if hints:
            service.restore(self.checkpoint, net.now)
        self.service = service
        self.host.attach(self, sockets=[local.bound for local in locals_], indexed=True)
        return service

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> None:
        if classify(datagram) is Kind.CONTROL:
            sealed = Sealed.parse(datagram)
            pair = PairKeys.derive(self.key, sealed.sender)
            message = m.decode(sealed.open(pair))
            self.seen[type(message).__name__] += 1
            lie = self.tamper(message) if self.tamper is not None else None
            if lie is not None:
                answer = seal(m.encode(lie), pair, self.world.net.random(24))
                self._lies.append(Transmit(source, answer, None, local))
                return
        self.running.receive(datagram, source, local, now)

    def poll_transmit(self) -> Transmit | None:
        if self._lies:
            return self._lies.pop(0)
        item = self.running.poll_transmit()
        return None if item is None else Transmit(item.destination, item.datagram, None, item.local)

    def next_deadline(self) -> float | None:
        return self.running.next_deadline()

    def handle_timeout(self, now: float) -> None:
        self.running.handle_timeout(now)

    def kill(self) -> None:
        self.checkpoint = self.running.checkpoint()
        self.host.detach()
        self.service = None

    def names(self) -> list[str]:
        """Return the names of the nodes that hold a lease."""
        return sorted(lease.node.name for lease in self.running.registry.leases.values())


class Node:
    """A daemon's client side: a directory, and a client for each rendezvous."""

    def __init__(self, world: World, number: int, host: Host, servers: Items[Server], floor: int = 0) -> None:
        self.world = world
        self.name = f"node-{number}"
        self.host = host
        self.servers = list(servers)
        self.signing = SigningKey.generate(world.net.random)
        self.certificate = Certificate(
            network=network_id(world.ca.public),
            serial=number,
            name=self.name,
            x25519=world.net.random(32),
            ed25519=self.signing.public,
            overlay4=IPv4Address(0x0A9F0000 + number),
            prefixes4=(IPv4Network((0x0AA00000 + number * 256, 24)),),
            not_before=int(TODAY) - 86_400,
            not_after=int(TODAY) + 365 * 86_400,
            issuer=key_id(world.ca.public),
        ).sign(world.ca)
        self.clock_offset = TODAY - world.net.now
        self.synchronised = True
        self.bounds = [floor]
        self.saved: list[tuple[bytes, bytes]] = []
        self.start()

    @property
    def node_id(self) -> bytes:
        return self.certificate.node_id

    @property
    def client(self) -> RendezvousClient:
        return self.clients[0]

    def start(self) -> None:
        """Start a life: everything but keys, numbers and saved records is new."""
        net = self.world.net
        self.clock = Wallclock(self.certificate.not_before, net.now)
        self.clock.set(self.clock_offset, self.synchronised)
        self.sequence = Sequence(self.bounds[-1], self.clock.issuing, self.bounds.append)
        self.control_key = ControlKey.generate(net.random)
        self.own = OwnRecord(
            self.certificate, self.signing, self.control_key.public, self.sequence, self.clock
        )
        self.directory = Directory(
            self.world.ca.public, self.certificate, self.world.blocklist, self.clock, net.now
        )
        self.directory.restore(self.saved, net.now)
        self.clients = [
            RendezvousClient(
                server.key.public,
                server.endpoint,
                self.control_key,
                self.sequence,
                self.own.make,
                self.directory.known,
                net.random,
                net.now,
            )
            for server in self.servers
        ]
        self.directory.set_servers(client.server for client in self.clients)
        self.events: list[ClientEvent] = []
        self.times: list[float] = []
        self.host.attach(self, port=PORT)

    def kill(self) -> None:
        self.saved = self.directory.export()
        self.host.detach()

    def of(self, kind: type[ClientEvent]) -> list[ClientEvent]:
        return [event for event in self.events if type(event) is kind]

    @property
    def registered(self) -> bool:
        return all(client.state is ClientState.REGISTERED for client in self.clients)

    def knows(self) -> list[str]:
        return sorted(peer.name for peer in self.directory.peers())

    def receive(self, datagram: bytes, source: UdpEndpoint, now: float) -> None:
        for client in self.clients:
            if client.receive(datagram, source, now):
                break
        self._take(now)

    def handle_timeout(self, now: float) -> None:
        for client in self.clients:
            client.handle_timeout(now)
        self._take(now)

    def _take(self, now: float) -> None:
        for client in self.clients:
            while (event := client.poll_event()) is not None:
                self.events.append(event)
                self.times.append(now)
                if isinstance(event, RecordsArrived):
                    for record, certificate in event.items:
                        self.directory.offer(record, certificate, event.server, now)
                    self.directory.gone(event.gone, event.server, now)
                elif isinstance(event, Found):
                    self.directory.offer(event.record, event.certificate, event.server, now)
                elif isinstance(event, Registered):
                    self.clock.hint(event.server, event.unix_time, now)
                    if self.own.is_off(now):
                        client.record_changed(now)
            while (news := self.directory.poll_event()) is not None:
                if isinstance(news, CertificateWanted):
                    client.find_node(news.node_id, now)

    def poll_transmit(self) -> Transmit | None:
        for client in self.clients:
            item = client.poll_transmit()
            if item is not None:
                return Transmit(item.destination, item.datagram)
        return None

    def next_deadline(self) -> float | None:
        return min(
            (d for d in (client.next_deadline() for client in self.clients) if d is not None), default=None
        )


class World:
    """Servers in the cloud, nodes at home, delay and loss between."""

    def __init__(
        self,
        servers: int = 1,
        *,
        seed: int = 1,
        loss: float = 0.0,
        delay: float = 0.01,
        limits: SourceLimits | None = None,
    ) -> None:
        self.net = Internet(seed)
        self.limits = limits
        self.server_clock = 0.0
        self.link = Conditions(delay=delay, loss=loss)
        self.ca = SigningKey.generate(self.net.random)
        self.blocklist = self.make_blocklist(1)
        self.servers = [Server(self, f"server{n}") for n in range(servers)]
        self.nodes: list[Node] = []

    @property
    def server(self) -> Server:
        return self.servers[0]

    def make_blocklist(self, serial: int, revoked: dict[str, int] | None = None) -> Blocklist:
        return Blocklist(
            network=network_id(self.ca.public), serial=serial, issued=int(TODAY), revoked=revoked or {}
        ).sign(self.ca)

    def node(self, kind: str | NatKind = "port-restricted", floor: int = 0) -> Node:
        number = len(self.nodes) + 1
        router = self.net.router(f"router{number}", kind, region="home", link=self.link)
        node = Node(self, number, router.host(f"node{number}"), self.servers, floor)
        self.nodes.append(node)
        return node

    def run(self, seconds: float) -> None:
        self.net.run_for(seconds)

    def settle(self, timeout: float = 10.0) -> float:
        """Run until every node is registered everywhere; return how long it took."""
        began = self.net.now
        assert self.net.run_while(lambda: not all(node.registered for node in self.nodes), timeout)
        return self.net.now - began
