"""Two sessions under a virtual clock, for the tests of sessions.

    alice  ---- delay, loss ---->  bob
           <---- delay, loss ----

alice has the lower static key.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

from crossedge.meshd.constants import MessageType
from crossedge.meshd.device import Device
from crossedge.meshd.handshakes import Handshakes
from crossedge.meshd.keypair import seal_transport
from crossedge.meshd.noise import PrivateKey
from crossedge.meshd.session import Event, KeypairRotated, Session, SessionUp
from crossedge.wire.endpoint import UdpEndpoint

INITIATION, RESPONSE, TRANSPORT = MessageType.INITIATION, MessageType.RESPONSE, MessageType.TRANSPORT
KEYS = sorted((PrivateKey(bytes([n]) * 32) for n in (1, 2)), key=lambda key: key.public)


class Node:
    """One side: a device with one session, and what it has seen."""

    def __init__(self, name: str, own: PrivateKey, other: PrivateKey, mesh: bool, now: float) -> None:
        self.name = name
        self.endpoint = UdpEndpoint(f"192.0.2.{len(name)}", 41820)
        stamps = count(1)
        rng = random.Random(name)
        self.device = Device(own, rng.randbytes, lambda _: next(stamps).to_bytes(12, "big"))
        self.session = Session(self.device, other.public, now=now, mesh=mesh, psk=b"k" * 32)
        self.handshakes = Handshakes(self.device, lambda key: self.session if key == other.public else None)
        self.queue: list[bytes] = []
        self.sent: list[tuple[float, bytes]] = []
        self.got: list[bytes] = []
        self.events: list[Event] = []

    def times(self, kind: MessageType) -> list[float]:
        """When messages of a kind were sent."""
        return [when for when, datagram in self.sent if datagram[0] == kind]

    def event_types(self) -> list[type]:
        return [type(event) for event in self.events]

    @property
    def keepalives(self) -> list[float]:
        return [when for when, datagram in self.sent if datagram[0] == TRANSPORT and len(datagram) == 32]


Lose = Callable[[Node, bytes], bool]


class Pair:
    """Two nodes and the link between them, on a clock that jumps to the next thing that happens."""

    def __init__(self, *, mesh: bool = False, delay: float = 0.01, start: float = 1000.0) -> None:
        self.now = start
        self.delay = delay
        self.alice = Node("alice", KEYS[0], KEYS[1], mesh, start)
        self.bob = Node("bob", KEYS[1], KEYS[0], mesh, start)
        self.lose: Lose = lambda _sender, _datagram: False
        self.ways: Callable[[], tuple[float, ...]] = lambda: (self.delay,)
        """How long a datagram takes on each way that it goes."""
        self._air: list[tuple[float, int, Node, bytes]] = []
        self._order = count()

    def other(self, node: Node) -> Node:
        return self.bob if node is self.alice else self.alice

    def send(self, node: Node, payload: bytes) -> None:
        """Send data as the data plane does: with the current keypair, or after a handshake."""
        session = node.session
        if not session.usable(self.now):
            node.queue.append(payload)
            session.initiate(self.now)
        else:
            assert session.current is not None
            self._transmit(node, seal_transport(session.current, payload))
            session.data_sent(self.now, len(payload))
        self.drain(node)

    def drain(self, node: Node) -> None:
        """Handle events first, then send: what waits in the queue serves as the confirmation."""
        while (event := node.session.poll_event()) is not None:
            node.events.append(event)
            if isinstance(event, SessionUp | KeypairRotated):
                queued, node.queue = node.queue, []
                for payload in queued:
                    self.send(node, payload)
        while (reply := node.handshakes.poll_transmit()) is not None:
            assert reply[1] == self.other(node).endpoint
            self._transmit(node, reply[0])
        while (datagram := node.session.poll_transmit()) is not None:
            self._transmit(node, datagram)

    def initiate(self, node: Node) -> None:
        node.session.initiate(self.now)
        self.drain(node)

    def deliver(self, node: Node, datagram: bytes) -> None:
        """Hand a datagram to a node now."""
        if datagram[0] == TRANSPORT:
            opened = node.handshakes.open_transport(datagram, self.now)
            if opened is not None and opened[2]:
                node.got.append(opened[2])
        else:
            node.handshakes.receive(datagram, self.other(node).endpoint, self.now)
        self.drain(node)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while True:
            wakes = [self._air[0][0]] if self._air else []
            for node in (self.alice, self.bob):
                deadline = node.session.next_deadline()
                if deadline is not None:
                    wakes.append(deadline)
            when = min(wakes, default=end + 1)
            if when > end:
                break
            self.now = max(self.now, when)
            while self._air and self._air[0][0] <= self.now:
                _, _, node, datagram = heappop(self._air)
                self.deliver(node, datagram)
            for node in (self.alice, self.bob):
                node.session.handle_timeout(self.now)
                self.drain(node)
        self.now = end

    def connect(self, patience: float = 1.0) -> None:
        """Bring a session up that alice started, and forget how."""
        self.initiate(self.alice)
        self.run(patience)
        assert self.alice.session.usable(self.now)
        assert self.bob.session.usable(self.now)
        self.forget()

    def forget(self) -> None:
        for node in (self.alice, self.bob):
            node.sent.clear()
            node.events.clear()

    def _transmit(self, node: Node, datagram: bytes) -> None:
        node.sent.append((self.now, datagram))
        for delay in () if self.lose(node, datagram) else self.ways():
            heappush(self._air, (self.now + delay, next(self._order), self.other(node), datagram))


def data(number: int) -> bytes:
    """A payload that padding leaves alone."""
    return b"data" + number.to_bytes(12, "big")


def lose_everything(_sender: Node, _datagram: bytes) -> bool:
    return True
