"""The in-memory internet: behaviour discovery sees every NAT kind as it is, and time and chance are ours."""

from __future__ import annotations

import itertools
import time
from collections import deque

import pytest

from crossedge.lab.internet import Conditions, Host, Internet, Packet, Transmit
from crossedge.lab.nat import KINDS
from crossedge.lab.natkinds import Allocation, Behaviour, Hairpin, NatKind
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint
from crossedge.wire.relay import pack_header


class Box:
    """Keeps what it receives; sends what it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, UdpEndpoint | RelayEndpoint, float]] = []
        self.out: deque[Transmit] = deque()
        self.deadline: float | None = None
        self.fired: list[float] = []

    def receive(self, datagram: bytes, source: UdpEndpoint | RelayEndpoint, now: float) -> None:
        self.got.append((datagram, source, now))

    def poll_transmit(self) -> Transmit | None:
        return self.out.popleft() if self.out else None

    def next_deadline(self) -> float | None:
        return self.deadline

    def handle_timeout(self, now: float) -> None:
        self.fired.append(now)
        self.deadline = None


class Observer:
    """Tells who asks what it looks like; the request names the socket (0-3) that is to answer."""

    def __init__(self) -> None:
        self.out: deque[tuple[bytes, UdpEndpoint, int]] = deque()

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> None:
        answerer = datagram[0] if datagram[0] < 4 else local
        self.out.append((f"{source.host} {source.port}".encode(), source, answerer))

    def poll_transmit(self) -> Transmit | None:
        if not self.out:
            return None
        datagram, destination, local = self.out.popleft()
        return Transmit(destination, datagram, None, local)

    def next_deadline(self) -> float | None:
        return None

    def handle_timeout(self, now: float) -> None:
        raise AssertionError


ASK_SAME = b"\xff"


class Discovery:
    """A STUN-like client on a host, and an observer with two addresses and two ports."""

    def __init__(self, kind: str | NatKind, seed: int = 1) -> None:
        self.net = Internet(seed)
        observer = self.net.host("observer", addresses=2)
        self.servers = [UdpEndpoint(a, p) for a in observer.addresses for p in (3478, 3479)]
        observer.attach(Observer(), sockets=[tuple(s) for s in self.servers], indexed=True)
        self.router = self.net.router("home", kind, region="b")
        self.alice = self.router.host("alice")
        self.box = Box()
        self.alice.attach(self.box, 41820)

    def ask(self, server: int, request: bytes = ASK_SAME, host: Host | None = None) -> UdpEndpoint | None:
        host, box = host or self.alice, self.box
        box.got.clear()
        host.send(request, self.servers[server])
        self.net.run_for(0.2)
        if not box.got:
            return None
        address, port = box.got[0][0].decode().split()
        return UdpEndpoint(address, int(port))


TRANSLATING = [k for k in KINDS.values() if k.translates]


@pytest.mark.parametrize("kind", TRANSLATING, ids=lambda k: k.name)
def test_discovery_sees_the_mapping_behaviour(kind: NatKind) -> None:
    lab = Discovery(kind)
    first, port, host = (lab.ask(server) for server in (0, 1, 2))
    assert first is not None
    if kind.conntrack is not None:
        assert (first == port == host) == (kind.allocation is not Allocation.RANDOM)
    elif kind.mapping is Behaviour.ENDPOINT_INDEPENDENT:
        assert first == port == host
    elif kind.mapping is Behaviour.ADDRESS_DEPENDENT:
        assert first == port != host
    else:
        assert len({first, port, host}) == 3


@pytest.mark.parametrize("kind", TRANSLATING, ids=lambda k: k.name)
def test_discovery_sees_the_filtering_behaviour(kind: NatKind) -> None:
    lab = Discovery(kind)
    assert lab.ask(0) is not None
    from_other_port = lab.ask(0, b"\x01") is not None
    from_other_host = lab.ask(0, b"\x02") is not None
    filtering = kind.filtering if kind.conntrack is None else Behaviour.ADDRESS_AND_PORT_DEPENDENT
    assert (from_other_port, from_other_host) == (
        filtering is not Behaviour.ADDRESS_AND_PORT_DEPENDENT,
        filtering is Behaviour.ENDPOINT_INDEPENDENT,
    )


@pytest.mark.parametrize("kind", TRANSLATING, ids=lambda k: k.name)
def test_discovery_sees_the_hairpin(kind: NatKind) -> None:
    lab = Discovery(kind)
    seen = lab.ask(0)
    assert seen is not None
    lab.box.got.clear()
    lab.alice.send(b"turn", seen)
    lab.net.run_for(0.2)
    got = [(datagram, source) for datagram, source, _ in lab.box.got]
    # an address-and-port filter is opened by the first packet itself, as its mapping is its own peer
    independent = kind.mapping is Behaviour.ENDPOINT_INDEPENDENT and kind.conntrack is None
    if kind.hairpin is Hairpin.NONE or not independent:
        assert got == []
    else:
        assert got == [(b"turn", seen if kind.hairpin is Hairpin.EXTERNAL else lab.alice.endpoint())]


@pytest.mark.parametrize("kind", TRANSLATING, ids=lambda k: k.name)
def test_discovery_sees_the_lifetime(kind: NatKind) -> None:
    lab = Discovery(kind)
    lifetime = kind.lifetime_unreplied or kind.lifetime

    def alive_after(idle: float) -> bool:
        seen = lab.ask(0)
        assert seen is not None
        lab.net.run_for(idle)
        lab.box.got.clear()
        lab.net.hosts["observer"].send(b"late", seen)
        lab.net.run_for(0.2)
        return bool(lab.box.got)

    assert alive_after(lifetime - 1.0)
    lab.net.run_for(2 * kind.lifetime)
    assert not alive_after(lifetime + 1.0)


# Topologies


def punch(net: Internet, a: Host, b: Host) -> tuple[Box, Box]:
    """Both ask an observer, then send to each other's reflexive endpoint at once, three times."""
    observer = net.host("observer")
    observer.attach(Observer(), 3478, indexed=True)
    boxes, seen = (Box(), Box()), []
    for host, box in zip((a, b), boxes, strict=True):
        host.attach(box, 41820)
        host.send(ASK_SAME, observer.endpoint())
        net.run_for(0.2)
        address, port = box.got.pop()[0].decode().split()
        seen.append(UdpEndpoint(address, int(port)))
    for _ in range(3):
        a.send(b"from a", seen[1])
        b.send(b"from b", seen[0])
        net.run_for(0.2)
    return boxes


EASY = ["full-cone", "restricted-cone", "port-restricted", "port-restricted-random", "linux", "carrier-grade"]


@pytest.mark.parametrize("left", EASY)
@pytest.mark.parametrize("right", EASY)
def test_two_easy_nats_are_punched(left: str, right: str) -> None:
    net = Internet(seed=3)
    a = net.router("left", left, region="a").host("a")
    b = net.router("right", right, region="b").host("b")
    first, second = punch(net, a, b)
    assert first.got
    assert second.got


def test_two_hard_nats_are_not_punched_by_luck() -> None:
    net = Internet(seed=3)
    a = net.router("left", "symmetric-random").host("a")
    b = net.router("right", "symmetric-random").host("b")
    first, second = punch(net, a, b)
    assert not first.got
    assert not second.got


def test_double_nat_is_punched_too() -> None:
    net = Internet(seed=3)
    outer = net.router("carrier", "carrier-grade")
    a = outer.router("home", "port-restricted").host("a")
    b = net.router("right", "linux", region="b").host("b")
    first, second = punch(net, a, b)
    assert first.got
    assert second.got
    assert first.got[0][1].host == net.routers["right"].addresses[0]


def test_hosts_on_one_lan_reach_each_other_directly_and_fast() -> None:
    net = Internet(seed=1)
    home = net.router("home")
    a, b = home.host("a"), home.host("b")
    box = Box()
    a.attach(Box(), 41820)
    b.attach(box, 41820)
    a.send(b"hello", b.endpoint())
    net.run_for(0.01)
    assert [(d, s) for d, s, _ in box.got] == [(b"hello", a.endpoint())]


def test_private_addresses_do_not_leave_their_lan() -> None:
    net = Internet(seed=1)
    a = net.router("left", lan="192.168.1").host("a")
    b = net.router("right", lan="192.168.2").host("b")
    a.attach(Box(), 1)
    b.attach(Box(), 1)
    a.send(b"x", b.endpoint())
    net.run_for(1.0)
    assert net.dropped == {"unroutable": 1}


def test_ipv6_is_not_translated_and_filtered_by_a_firewall() -> None:
    net = Internet(seed=1)
    a = net.router("left").router("deeper").host("a", six=True)
    b = net.router("right", region="b").host("b", six=True)
    boxes = Box(), Box()
    a.attach(boxes[0], 1)
    b.attach(boxes[1], 1)
    a.send(b"x", b.endpoint(family=6))
    net.run_for(1.0)
    assert boxes[1].got == []
    b.send(b"y", a.endpoint(family=6))
    net.run_for(1.0)
    assert [(d, s) for d, s, _ in boxes[0].got] == [(b"y", b.endpoint(family=6))]


def test_rtt_between_regions_is_what_the_backbone_says() -> None:
    net = Internet(seed=1)
    net.backbone("a", "b", Conditions(delay=0.015))
    a, b = net.host("a", region="a"), net.host("b", region="b")
    box = Box()
    a.attach(Box(), 1)
    b.attach(box, 1)
    a.send(b"x", b.endpoint())
    net.run_for(1.0)
    assert box.got[0][2] - 1000.0 == pytest.approx(0.015 + 2 * 0.002)


def test_low_ttl_opens_the_own_nat_and_dies_before_the_other() -> None:
    net = Internet(seed=1)
    a = net.router("left").host("a")
    right = net.router("right", "linux-accepting", region="b")
    b = right.host("b")
    box = Box()
    a.attach(box, 1)
    b.attach(Box(), 1)
    a.send(b"open", UdpEndpoint(right.addresses[0], 1), ttl=3)
    net.run_for(0.5)
    assert net.dropped == {"ttl": 1}
    assert right.nat is not None
    assert right.nat.sessions(net.now) == 0
    b.send(b"in", UdpEndpoint(net.routers["left"].addresses[0], 1))
    net.run_for(0.5)
    assert [d for d, _, _ in box.got] == [b"in"]


# Faults


def one_way(conditions: Conditions, count: int, size: int = 100) -> tuple[Internet, list[float]]:
    net = Internet(seed=5)
    net.backbone("a", "b", conditions)
    a, b = net.host("a", region="a"), net.host("b", region="b")
    box = Box()
    a.attach(Box(), 1)
    b.attach(box, 1)
    for _ in range(count):
        a.send(bytes(size), b.endpoint())
        net.run_for(0.001)
    net.run_for(1.0)
    return net, [when for _, _, when in box.got]


def test_loss_is_the_share_that_was_asked_for() -> None:
    _, arrivals = one_way(Conditions(loss=0.1), 2000)
    assert 1740 <= len(arrivals) <= 1860


def test_too_large_packets_vanish() -> None:
    net, arrivals = one_way(Conditions(mtu=1280), 1, size=1252)
    assert len(arrivals) == 1
    net, arrivals = one_way(Conditions(mtu=1280), 1, size=1253)
    assert arrivals == []
    assert net.dropped == {"mtu": 1}


def test_a_slow_link_queues_and_then_drops() -> None:
    net, arrivals = one_way(Conditions(rate=80_000, queue=1000), 20, size=72)  # 100 B = 10 ms
    assert net.dropped["queue"] == 20 - len(arrivals)
    assert len(arrivals) == 11
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    assert gaps == pytest.approx([0.01] * 10)


def test_jitter_keeps_order_and_reordering_does_not() -> None:
    def order(conditions: Conditions) -> list[bytes]:
        net = Internet(seed=5)
        net.backbone("a", "a", conditions)
        a, b, box = net.host("a"), net.host("b"), Box()
        a.attach(Box(), 1)
        b.attach(box, 1)
        for n in range(200):
            a.send(bytes([n]), b.endpoint())
            net.run_for(0.001)
        net.run_for(1.0)
        return [d for d, _, _ in box.got]

    straight = [bytes([n]) for n in range(200)]
    assert order(Conditions(jitter=0.02)) == straight
    mixed = order(Conditions(reorder=0.05))
    assert mixed != straight
    assert sorted(mixed) == straight


def test_a_cut_path_loses_one_or_both_ways_until_it_is_mended() -> None:
    net = Internet(seed=1)
    a, b = net.host("a"), net.host("b")
    boxes = Box(), Box()
    a.attach(boxes[0], 1)
    b.attach(boxes[1], 1)

    def both() -> tuple[int, int]:
        for box in boxes:
            box.got.clear()
        a.send(b"x", b.endpoint())
        b.send(b"y", a.endpoint())
        net.run_for(1.0)
        return len(boxes[0].got), len(boxes[1].got)

    mend = net.cut("a", "b", one_way=True)
    assert both() == (1, 0)
    mend()
    mend = net.cut("a", "b")
    assert both() == (0, 0)
    mend()
    assert both() == (1, 1)


def test_roaming_and_router_changes_move_the_mapping() -> None:
    lab = Discovery("port-restricted")
    at_home = lab.ask(0)
    moved = lab.router.readdress()
    assert lab.ask(0) == (moved, 41820) != at_home
    cafe = lab.net.router("cafe", "linux")
    cafe.join(lab.alice)
    assert lab.ask(0) == (cafe.addresses[0], 41820)
    lab.router.reboot()


def test_relay_envelopes_are_wrapped_and_opened() -> None:
    net = Internet(seed=1)
    server, a = net.host("server"), net.host("a")
    relay, box = Box(), Box()
    server.attach(relay, 3478)
    a.attach(box, 41820, relay=True)
    a.send(b"payload", RelayEndpoint(server.endpoint(), 77))
    net.run_for(1.0)
    assert relay.got[0][0] == pack_header(77) + b"payload"
    server.send(pack_header(78) + b"back", a.endpoint())
    net.run_for(1.0)
    assert [(d, s) for d, s, _ in box.got] == [(b"back", RelayEndpoint(server.endpoint(), 78))]


# The clock


def test_timeouts_fire_at_their_deadline_and_moved_ones_do_not() -> None:
    net = Internet(seed=1)
    box, host = Box(), net.host("a")
    box.deadline = 1005.0
    host.attach(box, 1)
    box.deadline = 1003.5
    host.wake()
    net.run_until(1010.0)
    assert box.fired == [1003.5]


def test_a_killed_protocol_hears_nothing_more() -> None:
    net = Internet(seed=1)
    a, b, box = net.host("a"), net.host("b"), Box()
    a.attach(Box(), 1)
    box.deadline = 1001.0
    b.attach(box, 1)
    a.send(b"x", b.endpoint(1))
    b.detach()
    net.run_for(5.0)
    assert (box.got, box.fired) == ([], [])
    assert net.dropped == {"no-socket": 1}


def test_a_deadline_that_stands_still_is_an_error_not_a_hang() -> None:
    class Stuck(Box):
        def handle_timeout(self, now: float) -> None:
            pass

    net = Internet(seed=1)
    box = Stuck()
    box.deadline = 1001.0
    net.host("a").attach(box, 1)
    with pytest.raises(RuntimeError, match="a: its deadline does not move on"):
        net.run_for(2.0)


def test_run_while_stops_as_soon_as_the_condition_ends() -> None:
    net = Internet(seed=1)
    box, host = Box(), net.host("a")
    box.deadline = 1003.0
    host.attach(box, 1)
    assert net.run_while(lambda: not box.fired, timeout=10.0)
    assert net.now == 1003.0
    assert not net.run_while(lambda: True, timeout=1.0)
    assert net.now == 1004.0


def history(seed: int) -> list[tuple[str, float]]:
    net = Internet(seed)
    net.backbone("a", "b", Conditions(delay=0.015, jitter=0.01, loss=0.05, reorder=0.05))
    seen: list[tuple[str, float]] = []
    net.watchers.append(lambda packet, now: seen.append((repr(packet), now)))
    a = net.router("left", "symmetric-random", region="a").host("a")
    b = net.router("right", "symmetric-busy", region="b").host("b")
    punch(net, a, b)
    return seen


def test_one_seed_is_one_history() -> None:
    assert history(1) == history(1) != history(2)


def test_hundreds_of_punches_a_second() -> None:
    packets: list[Packet] = []
    started = time.process_time()
    for seed in range(200):
        net = Internet(seed)
        net.watchers.append(lambda packet, now: packets.append(packet))
        a = net.router("left", "port-restricted", region="a").host("a")
        b = net.router("right", "linux", region="b").host("b")
        first, second = punch(net, a, b)
        assert first.got
        assert second.got
    assert time.process_time() - started < 2.0
    assert len(packets) > 200 * 8
