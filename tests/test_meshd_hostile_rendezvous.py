"""A rendezvous that does all the harm it can, with its own true key; what nodes lose by it is calls, no more.

It tells every node that it is seen at a victim's address, keeps what it sent and sends it again, out of order
and to others, withholds a part, shows records as they were at first and a blocklist that was replaced.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from crossedge.lab.chance import Chance
from crossedge.lab.internet import Host, Packet, Transmit
from crossedge.meshd.budget import ADDRESS_BURST, ADDRESS_RATE, SINGLE_OBSERVER_PACKETS
from crossedge.rendezvous.door import Door
from crossedge.wire import messages as m
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.identity import network_id
from crossedge.wire.record import Record
from tests.simservers import SimServer
from tests.simworld import PORT, TODAY, SimNode, SimWorld

REVOKED = {"long-gone": 9}
KEPT = 400
"""Datagrams that it remembers."""


class Hostile:
    """What stands between a rendezvous and its nodes: its own second thoughts."""

    def __init__(self, server: SimServer, victim: str, chance: Chance) -> None:
        assert server.service is not None
        self.service = server.service
        self.victim = victim
        self.chance = chance
        self.lies: Counter[str] = Counter()
        self.withheld = False
        """Whether it sends nothing more of its own accord."""
        self._kept: list[Any] = []
        self._held: list[Any] = []
        self._out: list[Any] = []
        self._records: dict[bytes, bytes] = {}
        door: Door = self.service._door
        self._answer, self._push = door.answer, door.push
        door.answer = lambda asker, message, now: self._answer(asker, self._lie(message), now)  # type: ignore[method-assign]  # it is hostile
        door.push = lambda lease, message: self._push(lease, self._lie(message))  # type: ignore[method-assign]  # likewise
        server.host.detach()
        server.host.attach(
            self, sockets=[local.bound for local in self.service.stun.locals], indexed=True, unpack=_unpacked
        )

    # What a host wants of a protocol

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> None:
        self.service.receive(datagram, source, local, now)
        self._gather()

    def handle_timeout(self, now: float) -> None:
        self.service.handle_timeout(now)
        self._gather()

    def next_deadline(self) -> float:
        return self.service.next_deadline()

    def poll_transmit(self) -> Any:
        return self._out.pop(0) if self._out else None

    # What it does

    def _gather(self) -> None:
        fresh = []
        while (item := self.service.poll_transmit()) is not None:
            fresh.append(item)
        for item in fresh:
            if self.withheld or self.chance.uniform() < 0.1:
                self.lies["withheld"] += 1
                continue
            if self.chance.uniform() < 0.1:  # told later, behind what follows
                self.lies["reordered"] += 1
                self._held.append(item)
            else:
                self._out.append(item)
            self._kept.append(item)
            del self._kept[:-KEPT]
            old = self._kept[self.chance.below(len(self._kept))]
            self.lies["replayed"] += 1
            self._out.append(old)  # to whom it was for, and to somebody else
            self._out.append(old._replace(destination=item.destination))
        if len(self._held) > 3:
            self._out += self._held[::-1]
            self._held.clear()

    def _lie(self, message: m.Message) -> m.Message:
        if hasattr(message, "observed"):
            self.lies["reflexive"] += 1
            return message.model_copy(update={"observed": UdpEndpoint(self.victim, PORT)})
        if isinstance(message, m.Page):
            return message.model_copy(update={"items": tuple(self._first(*item) for item in message.items)})
        if isinstance(message, m.Found) and message.record:
            record, certificate = self._first(message.record, message.certificate)
            return message.model_copy(update={"record": record, "certificate": certificate})
        if isinstance(message, m.BlocklistPart):
            self.lies["old blocklist"] += 1  # it was never given the newest one
        return message

    def _first(self, record: bytes, certificate: bytes) -> tuple[bytes, bytes]:
        first = self._records.setdefault(Record.decode(record).node_id, record)
        if len(first) > len(record):
            return record, certificate  # it would not fit in its place
        self.lies["old record"] += first != record
        return first, certificate


def _unpacked(item: Any) -> Transmit:
    return Transmit(item.destination, item.datagram, None, item.local)


class Silent:
    """A host that has nothing to do with all this."""

    def __init__(self, world: SimWorld) -> None:
        self.host: Host = world.net.host("victim", region="home")
        self.senders: Counter[str] = Counter()
        world.net.watchers.append(self._watch)

    def _watch(self, packet: Packet, _: float) -> None:
        if packet.destination[0] in self.host.addresses:
            self.senders[packet.origin.name] += 1


def revoking(world: SimWorld, serial: int) -> Blocklist:
    network = network_id(world.ca.public)
    return Blocklist(network=network, serial=serial, issued=int(TODAY), revoked=REVOKED).sign(world.ca)


def seqs(node: SimNode) -> dict[bytes, int]:
    return {peer: row.member.record.seq for peer, row in node.mesh.members.items()}


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_rendezvous_moves_nothing_and_aims_at_nobody(seed: int) -> None:
    world = SimWorld(seed)
    victim = Silent(world)
    hostile = Hostile(world.servers[0], victim.host.addresses[0], Chance(f"hostile {seed}"))
    alice, bob, carol = (world.node(name, None) for name in ("alice", "bob", "carol"))
    began = world.net.now
    world.settle(60.0)
    world.run(2.0)
    first = world.ping(alice, bob, count=200, wait=2.0)
    assert first.answered, "what has a public address is met in spite of it"
    assert world.wait(lambda: alice.is_direct(bob) and bob.is_direct(alice), 60.0)
    used, known = alice.endpoints(bob), seqs(alice)
    addresses = set(alice.mesh.control.directory.peers())

    # The blocklist gets ahead, by a member, while the rendezvous goes on with the one before.
    assert hostile.service.set_blocklist(revoking(world, 2).encode(), world.net.now).serial == 2
    world.run(5.0)
    alice.mesh.control.offer_blocklist(revoking(world, 3).encode(), world.net.now)
    alice.host.wake()
    for node in (alice, bob, carol):  # records change, and the server shows the old ones
        node.mesh.control._say(world.net.now)
        node.host.wake()
    pings = world.ping(alice, bob, count=600, interval=0.1)
    assert pings.lost == []
    assert alice.endpoints(bob) == used, "no path is moved"
    for peer, seq in seqs(alice).items():
        assert seq >= known.get(peer, 0), "no record goes back"
    assert len(set(alice.mesh.control.directory.peers())) == len(addresses)
    for node in (alice, bob):
        assert node.mesh.control.directory.blocklist.serial == 3
        lists = node.mesh.status(world.net.now)["blocklist"]
        assert lists["serial"] == 3

    # Then it says nothing any more: the pair does not mind, and the list's age shows.
    hostile.withheld = True
    ages = []
    for _ in range(2):
        pings = world.ping(bob, alice, count=100, interval=1.0)
        assert pings.lost == []
        ages.append(alice.mesh.status(world.net.now)["blocklist"]["age_s"])
    assert ages[1] - ages[0] >= 95

    spent = world.net.now - began
    for name, count in victim.senders.items():
        assert count <= SINGLE_OBSERVER_PACKETS * (1 + spent // 600), (name, count)
    assert sum(victim.senders.values()) <= 3 * (ADDRESS_BURST + ADDRESS_RATE * spent)
    assert {"withheld", "reordered", "replayed", "reflexive"} <= set(hostile.lies)
    print(hostile.lies, victim.senders, alice.dropped)
    assert sum(alice.dropped.values()) > 0, "what it said was refused under names"
