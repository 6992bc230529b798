"""A simulated world of whole nodes: mesh core and data plane behind modelled NATs, rendezvous in the cloud.

    world = SimWorld(seed=1)
    alice, bob = world.node("alice", "port-restricted"), world.node("bob", "symmetric")
    world.settle()
    pings = world.ping(alice, bob, count=100, interval=0.01)
    assert not pings.lost

Everything is real but sockets, TUN and clock: a ping is an ICMP packet that goes in at one data plane and
comes out of another one.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network

from crossedge.lab.internet import Conditions, Host, Internet, Router, Transmit
from crossedge.lab.natkinds import NatKind
from crossedge.meshd import events as ev
from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.dataplane import DataPlane
from crossedge.meshd.inbound import Arrival
from crossedge.meshd.link import Link
from crossedge.meshd.mesh import Mesh
from crossedge.meshd.peer import MeshPeer
from crossedge.meshd.sequence import Sequence
from crossedge.meshd.settings import MeshSettings
from crossedge.meshd.staticpeer import StaticPeerSettings
from crossedge.meshd.train import Parts
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import (
    DirectEndpoint,
    Endpoint,
    RelayEndpoint,
    SocketEndpoint,
    UdpEndpoint,
    remote_of,
)
from crossedge.wire.envelope import ControlKey
from crossedge.wire.identity import SigningKey, key_id, network_id
from tests.simservers import TODAY, SimServer, StunHost

PORT = 41820
VIRTIO = 10
ECHO = struct.Struct("!BBHHH")
IP = struct.Struct("!BBHHHBBH4s4s")
POD_SUPERNETS = (ip_network("10.160.0.0/12"), ip_network("10.159.0.0/16"), ip_network("fd00:1::/48"))


@dataclass
class Pings:
    """What became of a series of pings."""

    interval: float
    sent: dict[int, float] = field(default_factory=dict)
    answered: dict[int, float] = field(default_factory=dict)
    copies: int = 0

    @property
    def lost(self) -> list[int]:
        return [number for number in self.sent if number not in self.answered]

    @property
    def rtts(self) -> list[float]:
        return [self.answered[number] - self.sent[number] for number in self.answered]

    @property
    def dark(self) -> float:
        """The longest run of lost pings in seconds."""
        longest = run = 0
        for number in sorted(self.sent):
            run = 0 if number in self.answered else run + 1
            longest = max(longest, run)
        return longest * self.interval


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data)) if len(data) % 2 == 0 else 0
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def echo(kind: int, source: IPv4Address, target: IPv4Address, series: int, number: int, size: int) -> bytes:
    payload = bytes(size)
    body = ECHO.pack(kind, 0, 0, series, number) + payload
    body = ECHO.pack(kind, 0, checksum(body), series, number) + payload
    head = IP.pack(0x45, 0, 20 + len(body), 0, 0, 64, 1, 0, source.packed, target.packed)
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    return head + body


class SimNode:
    """One daemon: a mesh and a data plane on a host of the in-memory internet."""

    def __init__(self, world: SimWorld, name: str, number: int, host: Host) -> None:
        self.world = world
        self.name = name
        self.host = host
        self.signing = SigningKey.generate(world.net.random)
        self.session_key = world.net.random(32)
        self.overlay = IPv4Address(0x0A9F0000 + number)
        self.pods = ip_network((0x0AA00000 + number * 256, 24))
        self.pod = self.pods[1]
        self.certificate = Certificate(
            network=network_id(world.ca.public),
            serial=number,
            name=name,
            x25519=ControlKey(self.session_key).public,
            ed25519=self.signing.public,
            overlay4=self.overlay,
            overlay6=IPv6Address(f"fd00:1::{number:x}"),
            prefixes4=(self.pods,),
            prefixes6=(IPv6Network(f"fd00:1:0:{number:x}::/64"),),
            groups=("edge",),
            not_before=int(TODAY) - 86_400,
            not_after=int(TODAY) + 365 * 86_400,
            issuer=key_id(world.ca.public),
        ).sign(world.ca)
        self.bounds = [0]
        self.saved: tuple[list[tuple[bytes, bytes]], list[tuple[bytes, UdpEndpoint | None]]] = ([], [])
        self.static_peers: tuple[StaticPeerSettings, ...] = ()
        self.stun: tuple[UdpEndpoint, ...] = world.observers
        self.clock_offset = TODAY - world.net.now
        self.synchronised = True
        self.series: dict[int, Pings] = {}
        self.received: list[bytes] = []
        self.running = False
        self.sent_to_peers = 0
        self._sockets: dict[int, int] = {}  # number of a further socket: index of the host's socket
        self._port = 50_000

    # --- Life -------------------------------------------------------------------------------------------

    def start(self, rendezvous: bool = True) -> None:
        net = self.world.net
        now = net.now
        self.running = True
        self.clock = Wallclock(self.certificate.not_before, now)
        self.clock.set(self.clock_offset, self.synchronised)
        numbers = Sequence(self.bounds[-1], self.clock.issuing, self.bounds.append)
        allowed: AllowedIPs[Link] = AllowedIPs()
        own: AllowedIPs[bool] = AllowedIPs()
        for network in self.certificate.allowed_ips:
            own.insert(network, True)
        settings = MeshSettings(
            certificate=self.certificate,
            ca_public=self.world.ca.public,
            blocklist=self.world.blocklist,
            session_key=self.session_key,
            signing_key=self.signing,
            port=PORT,
            mesh_prefixes=POD_SUPERNETS,
            static_peers=self.static_peers,
            stun=self.stun,
            gso=frozenset({1, 4, 5}),
            measure=self.world.measure,
            unreachable_after=self.world.unreachable_after,
        )
        self.mesh = Mesh(
            settings, allowed, self.clock, numbers, net.chance.fork(f"{self.name} {now}").token, now
        )
        self.events: list[tuple[float, ev.MeshEvent]] = []
        self._frames: deque[bytes] = deque()
        self._out: deque[Transmit] = deque()
        mesh = self.mesh
        self.plane = DataPlane(
            allowed=allowed,
            own=own,
            indices=mesh.device.indices,
            link_of=lambda session: session.owner.link,
            transmit=self._transmit,
            write=lambda frame: self._frames.append(bytes(frame)),
            control=lambda datagram, source, stamp: mesh.receive(datagram, source, net.now),
            inner=lambda link, plaintext, source, stamp: mesh.receive_inner(
                link, plaintext, source, net.now, stamp
            ),
            wanted=lambda link: mesh.want_session(link, net.now),
            moved=lambda link, source, size: mesh.roamed(link, source, size, net.now),
        )
        mesh.set_host_addresses(self.host.addresses, now)
        if rendezvous:
            for server in self.world.servers:
                mesh.set_rendezvous(server.key.public, server.endpoint_for(self), now)
        mesh.restore(*self.saved, now)
        self._sockets.clear()
        self.host.attach(self, port=PORT)

    def kill(self) -> None:
        """Die as by SIGKILL; what was persisted is what was known a moment ago."""
        self.saved = (self.mesh.control.directory.export(), self.mesh.export_active(self.world.net.now))
        self.host.detach()
        self.running = False

    def move(self, router: Router) -> None:
        """Change the network: other addresses, as a laptop that was carried away."""
        router.join(self.host)
        self.readdressed()

    def readdressed(self) -> None:
        self.mesh.set_host_addresses(self.host.addresses, self.world.net.now)
        self._settle()
        self.host.wake()

    # --- The protocol of a lab host ---------------------------------------------------------------------

    def receive(self, datagram: bytes, source: DirectEndpoint, now: float) -> None:
        buffer = bytearray(datagram)
        self.plane.inbound(buffer, [Arrival(0, len(buffer), len(buffer), source, now)], now)
        self._settle()

    def poll_transmit(self) -> Transmit | None:
        while True:
            item = self._out.popleft() if self._out else self.mesh.poll_transmit()
            if item is None:
                return None
            destination = item.destination
            if isinstance(destination, RelayEndpoint):
                return item
            self.sent_to_peers += remote_of(destination).host not in self.world.servants
            if not isinstance(destination, SocketEndpoint):
                return item
            local = self._socket(destination.local)
            if local is not None:
                return Transmit(destination.remote, item.datagram, item.ttl, local)

    def _socket(self, number: int) -> int | None:
        """Return the host's socket for a further one, which is opened when it is used first."""
        if number not in self._sockets and number in self.mesh.services.sockets:
            self._port += 1
            self._sockets[number] = self.host.open(self._port, number=number)
        return self._sockets.get(number)

    def next_deadline(self) -> float | None:
        return self.mesh.next_deadline()

    def handle_timeout(self, now: float) -> None:
        self.mesh.handle_timeout(now)
        self._settle()

    def _settle(self) -> None:
        """Do what a shell does after everything: events first, then the frames for the TUN."""
        now = self.world.net.now
        while True:
            while (event := self.mesh.poll_event()) is not None:
                self.events.append((now, event))
                if isinstance(event, ev.SocketsFreed):
                    for number in event.numbers:
                        if number in self._sockets:
                            self.host.close(self._sockets.pop(number))
                if isinstance(event, ev.LinkReady):
                    self.plane.flush_queue(event.link, now)
            if not self._frames:
                return
            self._take_frame(self._frames.popleft()[VIRTIO:])

    def _transmit(self, endpoint: Endpoint, parts: Parts, segment: int) -> None:
        train = b"".join(parts)
        for start in range(0, len(train), segment):
            self._out.append(Transmit(endpoint, train[start : start + segment]))

    # --- The TUN ----------------------------------------------------------------------------------------

    def send_packet(self, packet: bytes) -> None:
        """Let a pod send a packet."""
        self._push(packet)
        self._settle()
        self.host.wake()

    def _push(self, packet: bytes) -> None:
        frame = bytes(VIRTIO) + packet
        self.plane.buffer[: len(frame)] = frame
        self.plane.outbound(len(frame), self.world.net.now)
        self.plane.flush(self.world.net.now)

    def _take_frame(self, packet: bytes) -> None:
        self.received.append(packet)
        if packet[9] != 1 or len(packet) < 28:
            return
        kind, _, _, series, number = ECHO.unpack_from(packet, 20)
        if kind == 8:
            source, target = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
            self._push(echo(0, target, source, series, number, len(packet) - 28))
        elif kind == 0 and series in self.series:
            pings = self.series[series]
            if number in pings.answered:
                pings.copies += 1
            else:
                pings.answered[number] = self.world.net.now

    # --- What tests ask ---------------------------------------------------------------------------------

    def peer(self, other: SimNode) -> MeshPeer:
        return self.mesh.members[other.certificate.node_id]

    def knows(self, other: SimNode) -> bool:
        return other.certificate.node_id in self.mesh.members

    def is_direct(self, other: SimNode) -> bool:
        return self.knows(other) and self.peer(other).way.direct is not None

    def endpoints(self, other: SimNode) -> tuple[Endpoint, ...]:
        return self.peer(other).link.endpoints

    def of(self, kind: type[ev.MeshEvent]) -> list[ev.MeshEvent]:
        return [event for _, event in self.events if isinstance(event, kind)]

    @property
    def dropped(self) -> Counter[str]:
        mesh = self.mesh
        total = mesh.dropped + mesh.control.dropped + mesh.control.node.dropped + mesh.device.dropped
        return total + self.plane.dropped + mesh.control.directory.dropped


class SimWorld:
    """Rendezvous in the cloud, nodes at home."""

    def __init__(
        self,
        seed: int = 1,
        *,
        servers: int = 1,
        loss: float = 0.0,
        delay: float = 0.006,
        observers: int = 0,
        six: bool = False,
        measure: bool = False,
        unreachable_after: float = 60.0,
    ) -> None:
        """`delay` is that of each access link, one way, in seconds; `loss` the share lost on each.

        `observers` is how many plain STUN servers there are, which every node asks. `six`: the rendezvous
        have IPv6 too. `measure`: nodes measure pairs without traffic. `unreachable_after`: seconds without a
        proof after which a node counts as cut off; it looks for one twice as often.
        """
        self.measure = measure
        self.unreachable_after = unreachable_after
        self.net = Internet(seed)
        self.six = six
        self.link = Conditions(delay=delay, loss=loss, hops=1)
        self.ca = SigningKey.generate(self.net.random)
        self.blocklist = Blocklist(
            network=network_id(self.ca.public), serial=1, issued=int(TODAY), revoked={}
        ).sign(self.ca)
        self.servers = [SimServer(self, f"server{n}", "cloud") for n in range(servers)]
        hosts = [self.net.host(f"stun{n}", region="cloud") for n in range(observers)]
        self.observers = tuple(StunHost(self.net, host).endpoint for host in hosts)
        self.nodes: list[SimNode] = []
        self._series = 0
        self.servants = {address for server in self.servers for address in server.host.addresses}
        self.servants |= {observer.host for observer in self.observers}

    def router(self, kind: str | NatKind = "port-restricted", **options: str) -> Router:
        options.setdefault("region", "home")
        return self.net.router(f"router{len(self.net.routers)}", kind, link=self.link, **options)

    def node(
        self,
        name: str,
        kind: str | NatKind | None = "port-restricted",
        *,
        router: Router | None = None,
        six: bool = False,
    ) -> SimNode:
        """Put a node behind a new router of this kind, or a given one; kind None: on the public internet.

        `six`: with nothing but IPv6, on the public internet.
        """
        if six:
            host = self.net.host(name, region="home", six=True)
            host.addresses = host.addresses[1:]
        elif router is None and kind is None:
            host = self.net.host(name, region="home")
        else:
            router = router or self.router(kind or "port-restricted")
            host = router.host(name)
        node = SimNode(self, name, len(self.nodes) + 1, host)
        self.nodes.append(node)
        node.start()
        return node

    def run(self, seconds: float) -> None:
        self.net.run_for(seconds)

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Run until the condition holds; False where it still does not after `timeout` seconds."""
        return self.net.run_while(lambda: not condition(), timeout)

    def settle(self, timeout: float = 15.0) -> None:
        """Run until every running node knows every other one."""
        running = [node for node in self.nodes if node.running]
        assert self.wait(lambda: all(a is b or a.knows(b) for a in running for b in running), timeout), (
            "nodes do not find each other"
        )

    def ping(
        self, source: SimNode, target: SimNode, *, count: int = 100, interval: float = 0.01, wait: float = 2.0
    ) -> Pings:
        """Ping a pod from a pod and run until a while after the last ping."""
        pings = self.start_pings(source, target, count=count, interval=interval)
        self.run(count * interval + wait)
        return pings

    def start_pings(
        self, source: SimNode, target: SimNode, *, count: int, interval: float = 0.01, size: int = 56
    ) -> Pings:
        """Begin to ping; the caller runs the world."""
        self._series += 1
        series, pings = self._series, Pings(interval)
        source.series[series] = pings

        def send(number: int) -> None:
            if source.running:
                pings.sent[number] = self.net.now
                source.send_packet(echo(8, source.pod, target.pod, series, number, size))
            if number + 1 < count:
                self.net.at(self.net.now + interval, send, number + 1)

        send(0)
        return pings

    def direct(self, *nodes: SimNode) -> bool:
        """Tell whether every pair is direct, at both ends."""
        return all(a.is_direct(b) for a in nodes for b in nodes if a is not b)


def relayed(endpoints: tuple[Endpoint, ...]) -> bool:
    return bool(endpoints) and all(isinstance(endpoint, RelayEndpoint) for endpoint in endpoints)
