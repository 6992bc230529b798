"""A network of nodes to try a rendezvous with: real keys and signatures, a virtual clock, no sockets."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address
from random import Random
from typing import TypeVar

from crossedge.rendezvous.service import Service
from crossedge.rendezvous.settings import RelayLimits, SourceLimits
from crossedge.rendezvous.stunserver import address_group
from crossedge.wire import messages as m
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey, CookieReply, PairKeys, Sealed, is_cookie_reply, seal
from crossedge.wire.identity import SigningKey, key_id, network_id, node_id
from crossedge.wire.record import Candidate, CandidateKind, Record

UNIX = 1_800_000_000.0
"""Unix time at now = 0."""
NOW = 1000.0
SERVER = UdpEndpoint("192.0.2.1", 3478)
ALICE = UdpEndpoint("198.51.100.1", 1000)
BOB = UdpEndpoint("203.0.113.2", 2000)
ELSEWHERE = UdpEndpoint("192.0.2.99", 3000)

AnyMessage = TypeVar("AnyMessage", bound=m.Message)


class World:
    """One rendezvous, the authority of its network, and a clock."""

    def __init__(
        self,
        seed: int = 1,
        limits: SourceLimits | None = None,
        relay: RelayLimits | None = None,
        hosts: tuple[str, ...] = (SERVER.host,),
    ) -> None:
        self.random = Random(seed)
        self.now = NOW
        self.limits = limits
        self.relay = relay
        self.hosts = hosts
        self.ca = SigningKey.generate(self.random.randbytes)
        self.key = ControlKey.generate(self.random.randbytes)
        self.serial = 0
        self.received: list[tuple[bytes, UdpEndpoint, int]] = []
        self.service = self.start()

    def start(self) -> Service:
        """Begin a life of the server, with the same key and nothing else."""
        self.service = Service(
            self.key,
            [self.ca.public],
            address_group(self.hosts, (3478, 3479), 0),
            self.random.randbytes,
            self.now,
            UNIX,
            self.limits,
            self.relay,
        )
        return self.service

    def certificate(
        self,
        name: str,
        signing: SigningKey,
        ca: SigningKey | None = None,
        serial: int | None = None,
        not_before: float | None = None,
        not_after: float | None = None,
        prefix: str | None = None,
    ) -> Certificate:
        """Return a signed certificate."""
        authority = ca or self.ca
        self.serial += 1
        unix = UNIX + self.now
        number = self.serial if serial is None else serial
        return Certificate(
            network=network_id(authority.public),
            serial=number,
            name=name,
            x25519=self.random.randbytes(32),
            ed25519=signing.public,
            prefixes4=(IPv4Network(prefix or f"10.{160 + number // 256}.{number % 256}.0/24"),),
            not_before=int(unix - 3600 if not_before is None else not_before),
            not_after=int(unix + 365 * 86400 if not_after is None else not_after),
            issuer=key_id(authority.public),
        ).sign(authority)

    def blocklist(self, serial: int, revoked: dict[str, int], ca: SigningKey | None = None) -> bytes:
        """Return a signed blocklist."""
        authority = ca or self.ca
        network = network_id(authority.public)
        made = Blocklist(network=network, serial=serial, issued=int(UNIX + self.now), revoked=revoked)
        return made.sign(authority).encode()

    def send(self, datagram: bytes, source: UdpEndpoint, local: int = 0) -> list[bytes]:
        """Hand a datagram to the server; return what comes back, keep what goes elsewhere."""
        self.service.receive(datagram, source, local, self.now)
        return self.collect(source)

    def collect(self, source: UdpEndpoint) -> list[bytes]:
        """Drain the server; return what goes to one endpoint, keep the rest in `received`."""
        back: list[bytes] = []
        while (transmit := self.service.poll_transmit()) is not None:
            if transmit.destination == source:
                back.append(transmit.datagram)
            else:
                self.received.append((transmit.datagram, transmit.destination, transmit.local))
        return back

    def advance(self, seconds: float) -> None:
        """Let time pass, each deadline of the server's on its own."""
        end = self.now + seconds
        while (due := self.service.next_deadline()) is not None and due <= end:
            self.now = max(self.now, due)
            self.service.handle_timeout(self.now)
            while (transmit := self.service.poll_transmit()) is not None:
                self.received.append((transmit.datagram, transmit.destination, transmit.local))
        self.now = end


class Node:
    """A node that speaks the contract, one message at a time."""

    def __init__(self, world: World, name: str, endpoint: UdpEndpoint | None = None) -> None:
        self.world = world
        self.name = name
        self.signing = SigningKey.generate(world.random.randbytes)
        self.endpoint = endpoint or UdpEndpoint(f"198.51.{world.serial % 256}.7", 41820)
        self.certificate = world.certificate(name, self.signing)
        self.id = node_id(network_id(world.ca.public), name)
        self.seq = int((UNIX + world.now) * 1_000_000)
        self.cookie: bytes | None = None
        self.request_id = 0
        self.new_key()
        self.record = self.sign()

    def new_key(self) -> None:
        """Take a new control key, as a restarted node does."""
        self.control = ControlKey.generate(self.world.random.randbytes)
        self.pair = PairKeys.derive(self.control, self.world.key.public)
        self.cookie = None

    def next_seq(self) -> int:
        """Return the next sequence number."""
        self.seq += 1
        return self.seq

    def sign(
        self, seq: int | None = None, certificate: Certificate | None = None, life: int = 86400
    ) -> Record:
        """Return a new record."""
        certificate = certificate or self.certificate
        issued = int(UNIX + self.world.now)
        return Record(
            node_id=certificate.node_id,
            certificate=certificate.fingerprint,
            control_key=self.control.public,
            seq=self.next_seq() if seq is None else seq,
            issued=issued,
            expires=issued + life,
            candidates=(Candidate(CandidateKind.HOST, self.endpoint),),
        ).sign(self.signing)

    def seal(self, message: m.Message, cookie: bool = True) -> bytes:
        """Return the datagram of a message."""
        held = self.cookie if cookie else None
        return seal(m.encode(message), self.pair, self.world.random.randbytes(24), held)

    def take(self, datagram: bytes, request: bytes | None = None) -> m.Message | None:
        """Open what the server sent; a cookie is kept and None returned."""
        if is_cookie_reply(datagram):
            self.cookie = CookieReply.parse(datagram).open(self.world.key.public)
            return None
        return m.decode(Sealed.parse(datagram).open(self.pair))

    def ask(
        self, message: m.Message, source: UdpEndpoint | None = None, local: int = 0, retry: bool = True
    ) -> list[m.Message]:
        """Send a request and return the answers; after a cookie reply it is sent once more."""
        source = source or self.endpoint
        answers = [self.take(back) for back in self.world.send(self.seal(message), source, local)]
        if answers == [None] and retry:
            answers = [self.take(back) for back in self.world.send(self.seal(message), source, local)]
        return [answer for answer in answers if answer is not None]

    def id_(self) -> int:
        """Return the next request id."""
        self.request_id += 1
        return self.request_id

    def registration(self) -> m.Register:
        """Return a Register of the current record."""
        return m.Register(
            id=self.id_(),
            seq=self.next_seq(),
            record=self.record.encode(),
            certificate=self.certificate.encode(),
        )

    def register(self, source: UdpEndpoint | None = None) -> m.Registered:
        """Register and return the lease."""
        return only(self.ask(self.registration(), source), m.Registered)

    def keepalive(self, source: UdpEndpoint | None = None) -> list[m.Message]:
        """Send a keepalive."""
        return self.ask(m.Keepalive(id=self.id_(), seq=self.next_seq(), epoch=0, version=0), source)

    def find(self, address: str) -> m.Found:
        """Look an address up."""
        return only(self.ask(m.Find(id=self.id_(), address=ip_address(address).packed)), m.Found)

    def call(self, target: Node, sealed: bytes = b"sealed for the target") -> m.CallReply:
        """Call another node."""
        request = m.Call(id=self.id_(), seq=self.next_seq(), target=target.id, sealed=sealed)
        return only(self.ask(request), m.CallReply)

    def bind(self, channel: int, source: UdpEndpoint | None = None) -> list[m.Message]:
        """Bind the own side of a channel."""
        return self.ask(m.Bind(id=self.id_(), seq=self.next_seq(), channel=channel), source)

    def pushed(self, kind: type[AnyMessage]) -> list[AnyMessage]:
        """Return what the server sent to this node unasked."""
        mine = [self.take(data) for data, to, _ in self.world.received if to == self.endpoint]
        return [message for message in mine if isinstance(message, kind)]


def couple(world: World) -> tuple[Node, Node]:
    """Return two nodes that are registered, at ALICE and BOB."""
    alice, bob = Node(world, "alice", ALICE), Node(world, "bob", BOB)
    alice.register()
    bob.register()
    world.advance(1.0)
    world.received.clear()
    return alice, bob


def only(answers: list[m.Message], kind: type[AnyMessage]) -> AnyMessage:
    """Return the one answer, which must be of a kind."""
    assert len(answers) == 1, answers
    answer = answers[0]
    assert isinstance(answer, kind), answer
    return answer


def code(answers: list[m.Message]) -> str:
    """Return the code of the one answer, which must be an error."""
    return only(answers, m.Error).code
