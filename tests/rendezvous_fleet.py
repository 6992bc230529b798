"""A thousand nodes at one rendezvous: the daemon's real client cores with real keys and certificates.

A `Fleet` is driven by an in-memory rendezvous core on a virtual clock (`CoreRun`), or by real sockets to a
real process (`SocketRun`). Nodes keep what the rendezvous says (id and sequence number of each record) and do
not verify it: that is their cost, not the server's, and other tests are about it.
"""

from __future__ import annotations

import heapq
import select
import socket
import time
from collections import Counter
from ipaddress import IPv4Network
from random import Random

from crossedge.meshd.client import RendezvousClient
from crossedge.meshd.client_events import (
    CallAnswered,
    Called,
    ClientState,
    Found,
    RecordsArrived,
    RequestFailed,
    StateChanged,
    Synced,
)
from crossedge.meshd.ownrecord import OwnRecord
from crossedge.meshd.sequence import Sequence
from crossedge.meshd.wallclock import Wallclock
from crossedge.rendezvous.service import Service
from crossedge.rendezvous.stunserver import address_group
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey
from crossedge.wire.identity import SigningKey, key_id, network_id
from crossedge.wire.record import Candidate, CandidateKind, Record

UNIX = 1_760_000_000
DELAY = 0.01
"""Seconds of each way in memory."""


class FleetNode:
    """A node with its keys, and what it was told."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet = fleet
        self.number = number
        random = fleet.random.randbytes
        self.signing = SigningKey.generate(random)
        self.certificate = Certificate(
            network=network_id(fleet.ca.public),
            serial=number + 1,
            name=f"node-{number}",
            x25519=random(32),
            ed25519=self.signing.public,
            prefixes4=(IPv4Network((0x0AA00000 + number * 256, 24)),),
            not_before=fleet.unix - 86_400,
            not_after=fleet.unix + 365 * 86_400,
            issuer=key_id(fleet.ca.public),
        ).sign(fleet.ca)
        self.id = self.certificate.node_id
        self.endpoint = UdpEndpoint(f"127.{1 + number // 250}.{number % 250}.1", 41820)
        self.known: dict[bytes, int] = {}
        self.bound = 0
        self.synced = 0
        self.answered: Counter[str] = Counter()
        self.called: Counter[bytes] = Counter()
        self.states: Counter[str] = Counter()
        self.bytes_in = self.bytes_out = 0

    def start(self, now: float, forget: bool = False) -> None:
        """Begin a life, with what an earlier one knew unless it is to be forgotten."""
        fleet = self.fleet
        clock = Wallclock(self.certificate.not_before, now)
        clock.set(fleet.unix - fleet.began, True)
        sequence = Sequence(self.bound, clock.issuing, self._reserve)
        control = ControlKey.generate(fleet.random.randbytes)
        own = OwnRecord(self.certificate, self.signing, control.public, sequence, clock)
        own.update(
            candidates=(
                Candidate(CandidateKind.HOST, UdpEndpoint("192.168.1.7", 41820)),
                Candidate(CandidateKind.REFLEXIVE, self.endpoint),
            )
        )
        if forget:
            self.known.clear()
        self.synced = 0
        self.bytes_in = self.bytes_out = 0
        self.client = RendezvousClient(
            fleet.server_key,
            fleet.server,
            control,
            sequence,
            own.make,
            lambda: sorted(self.known.items()),
            fleet.random.randbytes,
            now,
        )

    def take(self) -> None:
        """Note what the client reports."""
        while (event := self.client.poll_event()) is not None:
            if isinstance(event, RecordsArrived):
                for record, _ in event.items:
                    node, seq = self.fleet.identify(record)
                    if seq > self.known.get(node, -1):
                        self.known[node] = seq
                for node in event.gone:
                    self.known.pop(node, None)
            elif isinstance(event, Synced):
                self.synced += 1
            elif isinstance(event, CallAnswered):
                self.answered[event.status] += 1
            elif isinstance(event, Called):
                self.called[event.caller] += 1
            elif isinstance(event, StateChanged):
                self.states[event.new.value] += 1
            elif isinstance(event, RequestFailed | Found):
                self.answered[type(event).__name__] += 1

    def _reserve(self, bound: int) -> None:
        self.bound = bound


class Fleet:
    """The nodes, their authority, and what of their records was read before."""

    def __init__(self, count: int, seed: int, began: float, unix: int = UNIX) -> None:
        self.random = Random(seed)
        self.ca = SigningKey.generate(self.random.randbytes)
        self.began = began
        self.unix = unix
        """Unix time then."""
        self.server_key = b""
        self.server = UdpEndpoint("127.0.0.1", 3478)
        self._records: dict[bytes, tuple[bytes, int]] = {}
        self.nodes = [FleetNode(self, number) for number in range(count)]

    def identify(self, record: bytes) -> tuple[bytes, int]:
        """Return node id and sequence number of a record; each is decoded once for all nodes."""
        found = self._records.get(record)
        if found is None:
            read = Record.decode(record)
            found = self._records[record] = read.node_id, read.seq
        return found

    @property
    def complete(self) -> bool:
        """Whether every node is registered, and knows the newest record of every node."""
        return all(node.client.state is ClientState.REGISTERED for node in self.nodes) and self.missing == 0

    @property
    def missing(self) -> int:
        """How many records the nodes lack in all."""
        return sum(len(self.nodes) - len(node.known) for node in self.nodes)

    def calls_lost(self, made: list[tuple[FleetNode, FleetNode]]) -> int:
        """Return how many of those calls were not answered with a channel, or did not reach their target."""
        unanswered = len(made) - sum(node.answered["ok"] for node in self.nodes)
        return max(unanswered, sum(not target.called[caller.id] for caller, target in made))


class Run:
    """Lets a fleet run against something that answers."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._due: list[tuple[float, int, FleetNode]] = []
        self._armed: dict[int, float] = {}

    @property
    def now(self) -> float:
        """Seconds."""
        raise NotImplementedError

    def send(self, node: FleetNode, datagram: bytes) -> None:
        """Send a node's datagram to the server."""
        raise NotImplementedError

    def step(self, until: float) -> None:
        """Let something happen, at most until then."""
        raise NotImplementedError

    def drain(self, node: FleetNode) -> None:
        """Send what a node has to send, note what it has to say, and when it is due."""
        while (item := node.client.poll_transmit()) is not None:
            node.bytes_out += len(item.datagram)
            self.send(node, item.datagram)
        node.take()
        due = node.client.next_deadline()
        if due is not None and due != self._armed.get(node.number):
            self._armed[node.number] = due
            heapq.heappush(self._due, (due, node.number, node))

    def deliver(self, node: FleetNode, datagram: bytes) -> None:
        """Hand a datagram of the server's to a node."""
        node.bytes_in += len(datagram)
        node.client.receive(datagram, self.fleet.server, self.now)
        self.drain(node)

    def next_due(self) -> float:
        """Return when a node is due."""
        while self._due and self._armed.get(self._due[0][1]) != self._due[0][0]:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else float("inf")

    def fire(self) -> None:
        """Handle the timeouts that are due."""
        while self.next_due() <= self.now:
            node = heapq.heappop(self._due)[2]
            self._armed.pop(node.number, None)
            node.client.handle_timeout(self.now)
            self.drain(node)

    def start_all(self, over: float) -> None:
        """Start every node, spread over so many seconds."""
        began = self.now
        for node in self.fleet.nodes:
            self.run_until(began + over * node.number / len(self.fleet.nodes))
            node.start(self.now)
            self.drain(node)

    def start(self, node: FleetNode, forget: bool = False) -> None:
        """Start one node (again)."""
        node.start(self.now, forget)
        self.drain(node)

    def run_until(self, when: float) -> None:
        """Run until a time."""
        while self.now < when:
            self.step(when)

    def settle(self, timeout: float) -> float:
        """Run until every node knows all of them; return how many seconds that took."""
        began = self.now
        while not self.fleet.complete:
            if self.now > began + timeout:
                raise RuntimeError(f"{self.fleet.missing} records are missing after {timeout} s")
            self.run_until(self.now + 0.1)
        return self.now - began

    def call_some(self, each: int, timeout: float = 30.0) -> list[tuple[FleetNode, FleetNode]]:
        """Let every node call others, until all calls are answered and arrived; returns who called whom."""
        made = []
        nodes = self.fleet.nodes
        for node in nodes:
            for other in self.fleet.random.sample(range(len(nodes) - 1), each):
                target = nodes[other + (other >= node.number)]
                if node.client.call(target.id, b"sealed for the target " * 10, self.now) is None:
                    raise RuntimeError(f"{node.certificate.name} cannot call")
                made.append((node, target))
            self.drain(node)
            self.step(self.now)
        limit = self.now + timeout
        while self.fleet.calls_lost(made) and self.now < limit:
            self.run_until(self.now + 0.1)
        return made

    def settle_one(self, node: FleetNode, timeout: float = 30.0) -> int:
        """Run until a node that was just started has pulled; return the bytes it sent and got until then."""
        limit = self.now + timeout
        while not node.synced:
            if self.now > limit:
                raise RuntimeError(f"{node.certificate.name} has not pulled within {timeout} s")
            self.step(limit + 1)
        return node.bytes_in + node.bytes_out


class CoreRun(Run):
    """An in-memory rendezvous core, 10 ms away, on a virtual clock."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._now = fleet.began
        key = ControlKey.generate(fleet.random.randbytes)
        fleet.server_key = key.public
        locals_ = address_group((fleet.server.host,), (3478, 3479), 0)
        self.service = Service(
            key, [fleet.ca.public], locals_, fleet.random.randbytes, self._now, UNIX - self._now
        )
        self.cpu = 0.0
        """Seconds of processor time spent in the core."""
        self._by_endpoint = {node.endpoint: node for node in fleet.nodes}
        self._wire: list[tuple[float, int, FleetNode, bytes, bool]] = []
        self._count = 0

    @property
    def now(self) -> float:
        """The virtual time."""
        return self._now

    def send(self, node: FleetNode, datagram: bytes) -> None:
        """Put a datagram on its way to the server."""
        self._push(node, datagram, True)

    def _push(self, node: FleetNode, datagram: bytes, up: bool) -> None:
        self._count += 1
        heapq.heappush(self._wire, (self._now + DELAY, self._count, node, datagram, up))

    def step(self, until: float) -> None:
        """Go to the next thing that happens."""
        service = self.service
        arrival = self._wire[0][0] if self._wire else float("inf")
        self._now = max(self._now, min(until, arrival, self.next_due(), service.next_deadline()))
        while self._wire and self._wire[0][0] <= self._now:
            _, _, node, datagram, up = heapq.heappop(self._wire)
            if up:
                began = time.process_time()
                service.receive(datagram, node.endpoint, 0, self._now)
                self.cpu += time.process_time() - began
            else:
                self.deliver(node, datagram)
        if service.next_deadline() <= self._now:
            began = time.process_time()
            service.handle_timeout(self._now)
            self.cpu += time.process_time() - began
        while (transmit := service.poll_transmit()) is not None:
            self._push(self._by_endpoint[transmit.destination], transmit.datagram, False)
        self.fire()


class SocketRun(Run):
    """A real rendezvous on loopback; each node has a socket of its own in a /24 of its own."""

    BUFFER = 1 << 20

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._nodes: dict[int, FleetNode] = {}
        for node in fleet.nodes:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.BUFFER)
            sock.bind(node.endpoint)
            sock.connect(fleet.server)
            self._poll.register(sock.fileno(), select.EPOLLIN)
            self._sockets[node.number] = sock
            self._nodes[sock.fileno()] = node

    @property
    def now(self) -> float:
        """The time of day of the kernel since it started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def close(self) -> None:
        """Close the sockets."""
        for sock in self._sockets.values():
            sock.close()
        self._poll.close()

    def send(self, node: FleetNode, datagram: bytes) -> None:
        """Send; what the kernel does not take is lost, and would be seen as such."""
        self._sockets[node.number].send(datagram)

    def step(self, until: float) -> None:
        """Wait for the next thing that happens."""
        wait = min(until, self.next_due()) - self.now
        for descriptor, _ in self._poll.poll(max(0.0, min(wait, 1.0))):
            node = self._nodes[descriptor]
            sock = self._sockets[node.number]
            for _ in range(64):
                try:
                    datagram = sock.recv(2048)
                except (BlockingIOError, ConnectionRefusedError):
                    break
                self.deliver(node, datagram)
        self.fire()


def check_fleet(run: Run, calls: int = 4) -> None:
    """Register all, let all pull and call; then restart one with and without what it knew."""
    fleet = run.fleet
    run.start_all(5.0)
    run.settle(120.0)
    made = run.call_some(calls)
    assert fleet.calls_lost(made) == 0
    assert [node.client.state.value for node in fleet.nodes] == ["registered"] * len(fleet.nodes)
    assert sum(node.states["lost"] + node.states["refused"] for node in fleet.nodes) == 0
    node = fleet.nodes[len(fleet.nodes) // 2]
    run.start(node)
    digests = run.settle_one(node)
    assert len(node.known) == len(fleet.nodes)
    run.settle(30.0)
    run.start(node, forget=True)
    whole = run.settle_one(node)
    run.settle(30.0)
    # 24 bytes of id and number and their share of the messages, against a record and a certificate.
    assert digests < 1000 + 40 * len(fleet.nodes)
    assert digests * 8 < whole
