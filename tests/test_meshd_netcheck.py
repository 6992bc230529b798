"""netcheck tells every NAT of the model from every other, with one address to ask or two, and under loss."""

from __future__ import annotations

from itertools import product

import pytest

from crossedge.lab.internet import Conditions, Host, Internet, Transmit
from crossedge.lab.natkinds import KINDS, NatKind
from crossedge.lab.natkinds import Allocation as LabAllocation
from crossedge.lab.natkinds import Behaviour as LabBehaviour
from crossedge.lab.natkinds import Hairpin as LabHairpin
from crossedge.meshd.natverdict import Evidence, judge, port_step
from crossedge.meshd.netcheck import BUDGET, EXTRA_SOCKETS, Netcheck, NetcheckReport
from crossedge.rendezvous.settings import SourceLimits
from crossedge.rendezvous.stunserver import StunServer, address_group
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.record import Allocation, Behaviour

PORT = 41820
STUN = 3478


class StunHost:
    """The rendezvous' STUN server, on one address or two."""

    def __init__(
        self, net: Internet, host: Host, lies: dict[str, str] | None = None, family: int = 4
    ) -> None:
        self.core = StunServer(SourceLimits(), net.random)
        addresses = tuple(address for address in host.addresses if (":" in address) == (family == 6))
        self.core.locals.extend(address_group(addresses, (STUN, STUN + 1), 0, lies))
        self.out: list[Transmit] = []
        host.attach(self, sockets=[local.bound for local in self.core.locals], indexed=True)

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> None:
        answer = self.core.answer(datagram, source, local, now)
        if answer is not None:
            self.out.append(Transmit(answer.destination, answer.datagram, None, answer.local))

    def poll_transmit(self) -> Transmit | None:
        return self.out.pop(0) if self.out else None

    def next_deadline(self) -> None:
        return None

    def handle_timeout(self, now: float) -> None:
        raise AssertionError("has no timers")


class World:
    """A node behind a router of some kind, and STUN servers with so many addresses each."""

    def __init__(
        self, kind: str | NatKind, servers: tuple[int, ...] = (2,), seed: int = 1, loss: float = 0.0
    ) -> None:
        self.net = Internet(seed)
        hosts = [self.net.host(f"server{n}", addresses=count) for n, count in enumerate(servers)]
        for host in hosts:
            StunHost(self.net, host)
        self.servers = [UdpEndpoint(host.addresses[0], STUN) for host in hosts]
        link = Conditions(delay=0.02, loss=loss)
        self.router = self.net.router("router", kind, link=link)
        self.node = self.router.host("node")

    def check(self, extra: int = EXTRA_SOCKETS) -> NetcheckReport:
        ports = [PORT, *range(50_100, 50_100 + 7 * extra, 7)]
        check = Netcheck(self.servers, ports, self.node.addresses, self.net.random, self.net.now)
        self.node.attach(check, sockets=[(None, port) for port in ports], indexed=True)
        self.net.run_while(lambda: check.report is None, BUDGET + 1)
        assert check.report is not None
        assert check.next_deadline() is None
        assert check.report.seconds <= 5.0
        return check.report


NAMES = {behaviour: Behaviour[behaviour.name] for behaviour in LabBehaviour}
COMBINATIONS = [
    NatKind(
        name=f"{mapping}, {filtering}, {allocation}",
        about="",
        mapping=mapping,
        filtering=filtering,
        allocation=allocation,
    )
    for mapping, filtering, allocation in product(LabBehaviour, LabBehaviour, LabAllocation)
]


@pytest.mark.parametrize("kind", COMBINATIONS, ids=lambda kind: kind.name)
def test_every_combination_is_told(kind: NatKind) -> None:
    verdict = World(kind).check().verdict
    assert verdict.mapping is NAMES[kind.mapping]
    assert verdict.filtering is NAMES[kind.filtering]
    assert verdict.allocation is Allocation[kind.allocation.name]
    assert verdict.hairpin is False
    assert verdict.lifetime is None


@pytest.mark.parametrize("kind", COMBINATIONS, ids=lambda kind: kind.name)
def test_every_combination_is_told_with_five_per_cent_lost_each_way(kind: NatKind) -> None:
    verdict = World(kind, seed=7, loss=0.05).check().verdict
    assert (verdict.mapping, verdict.filtering) == (NAMES[kind.mapping], NAMES[kind.filtering])
    assert verdict.allocation is Allocation[kind.allocation.name]


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if k.translates], ids=lambda kind: kind.name)
def test_the_kinds_of_the_field_are_told(kind: NatKind) -> None:
    verdict = World(kind).check().verdict
    if kind.conntrack is None:
        assert (verdict.mapping, verdict.filtering) == (NAMES[kind.mapping], NAMES[kind.filtering])
    else:
        # What netfilter shows: a port that is kept looks independent, a random one depends on everything.
        hard = kind.allocation is LabAllocation.RANDOM
        mapping = Behaviour.ADDRESS_AND_PORT_DEPENDENT if hard else Behaviour.ENDPOINT_INDEPENDENT
        assert verdict.mapping is mapping
        assert verdict.filtering is Behaviour.ADDRESS_AND_PORT_DEPENDENT
    assert verdict.allocation is Allocation[kind.allocation.name]


@pytest.mark.parametrize("hairpin", [LabHairpin.EXTERNAL, LabHairpin.INTERNAL])
@pytest.mark.parametrize("filtering", LabBehaviour)
def test_hairpin_is_seen_whatever_the_filter(hairpin: LabHairpin, filtering: LabBehaviour) -> None:
    kind = NatKind(name="x", about="", filtering=filtering, hairpin=hairpin)
    assert World(kind, loss=0.05).check().verdict.hairpin is True


def test_without_nat_there_is_none() -> None:
    world = World("full-cone")
    world.node = world.net.host("public")
    report = world.check()
    assert report.verdict.mapping is Behaviour.NONE
    assert report.verdict.filtering is Behaviour.NONE
    assert report.verdict.hairpin is None
    assert report.verdict.allocation is Allocation.PRESERVING


def test_an_ipv6_firewall_is_no_nat() -> None:
    world = World("full-cone", servers=())
    host = world.net.host("server6", six=True)
    second = host.addresses[-1][:-1] + "2"
    host.addresses.append(second)
    world.net.public[second] = host
    StunHost(world.net, host, family=6)
    world.servers = [UdpEndpoint(host.addresses[-2], STUN)]
    world.node = world.router.host("node6", six=True)
    verdict = world.check().verdict
    assert verdict.mapping is Behaviour.NONE
    assert verdict.filtering is Behaviour.ADDRESS_AND_PORT_DEPENDENT


def test_two_nats_in_a_row_are_as_hard_as_the_harder() -> None:
    world = World("full-cone")
    inner = world.router.router("inner", "symmetric-random")
    world.node = inner.host("deep")
    verdict = world.check().verdict
    assert verdict.mapping is Behaviour.ADDRESS_AND_PORT_DEPENDENT
    assert verdict.filtering is Behaviour.ADDRESS_AND_PORT_DEPENDENT


# --- Fewer addresses to ask ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full-cone", "restricted-cone", "port-restricted", "symmetric-random"])
def test_two_rendezvous_with_one_address_each_tell_the_mapping(name: str) -> None:
    verdict = World(name, servers=(1, 1)).check().verdict
    assert verdict.mapping is NAMES[KINDS[name].mapping]
    # Nobody can answer from another address: "endpoint-independent" cannot be told, the tighter is taken.
    by_port = KINDS[name].filtering is LabBehaviour.ADDRESS_AND_PORT_DEPENDENT
    expected = Behaviour.ADDRESS_AND_PORT_DEPENDENT if by_port else Behaviour.ADDRESS_DEPENDENT
    assert verdict.filtering is expected


def test_one_rendezvous_with_one_address_says_what_it_could_not_tell() -> None:
    report = World("address-symmetric", servers=(1,)).check()
    assert report.verdict.mapping is Behaviour.ENDPOINT_INDEPENDENT
    assert "no second address" in report.findings[0].why


def test_the_server_with_two_addresses_is_found_among_others() -> None:
    report = World("full-cone", servers=(1, 2)).check()
    assert report.verdict.filtering is Behaviour.ENDPOINT_INDEPENDENT
    assert len(report.observations) == 2


@pytest.mark.parametrize("filtering", LabBehaviour)
def test_two_names_of_one_server_do_not_open_the_filter_for_each_other(filtering: LabBehaviour) -> None:
    world = World(NatKind(name="x", about="", filtering=filtering))
    server = world.net.hosts["server0"]
    world.servers = [UdpEndpoint(address, STUN) for address in server.addresses]
    assert world.check().verdict.filtering is NAMES[filtering]


def test_without_extra_sockets_only_the_mapping_is_told() -> None:
    verdict = World("symmetric-random").check(extra=0).verdict
    assert verdict.mapping is Behaviour.ADDRESS_AND_PORT_DEPENDENT
    assert verdict.filtering is Behaviour.UNKNOWN


def test_dead_servers_are_left_out() -> None:
    world = World("port-restricted", servers=(2, 2))
    world.net.hosts["server0"].detach()
    report = world.check()
    assert report.verdict.mapping is Behaviour.ENDPOINT_INDEPENDENT
    assert [server for server, _ in report.observations] == world.servers[1:]


def test_without_any_answer_it_says_so_in_time() -> None:
    world = World("port-restricted")
    world.net.hosts["server0"].detach()
    report = world.check()
    assert report.verdict.mapping is Behaviour.UNKNOWN
    assert report.findings == (("mapping", "unknown", "no STUN server answered: UDP may be blocked"),)
    assert World("full-cone", servers=()).check().seconds == 0


def test_a_lying_other_address_is_not_taken_for_a_filter() -> None:
    world = World("full-cone", servers=())
    host = world.net.host("liar", addresses=2)
    StunHost(world.net, host, {host.addresses[1]: "192.0.2.99"})
    world.servers = [UdpEndpoint(host.addresses[0], STUN)]
    verdict = world.check().verdict
    assert verdict.filtering is Behaviour.ENDPOINT_INDEPENDENT
    assert verdict.mapping is Behaviour.ENDPOINT_INDEPENDENT


# --- The report ---------------------------------------------------------------------------------------


def test_report_is_readable_and_goes_into_json() -> None:
    report = World("symmetric-sequential").check()
    assert [finding.topic for finding in report.findings] == [
        "mapping",
        "filtering",
        "allocation",
        "hairpin",
        "lifetime",
    ]
    assert all(finding.value and finding.why for finding in report.findings)
    shown = report.as_dict()
    assert shown["findings"]["mapping"]["value"] == "address-and-port-dependent"
    assert shown["findings"]["allocation"]["value"] == "sequential"
    assert report.step == 1 or len(report.ports) == EXTRA_SOCKETS
    [(_, rtt)] = report.rtts
    assert 0.04 < rtt < 0.08


def test_reflexive_address_is_that_of_the_daemons_socket() -> None:
    world = World("port-restricted-random")
    report = world.check()
    [(server, endpoint)] = report.observations
    assert (server, endpoint.host) == (world.servers[0], world.router.addresses[0])
    assert endpoint.port not in report.ports


def test_a_hostile_neighbour_cannot_forge_answers() -> None:
    world = World("full-cone")
    check = Netcheck(world.servers, [PORT], world.node.addresses, world.net.random, world.net.now)
    sent = check.poll_transmit()
    assert sent is not None
    forged = sent.datagram[:8] + bytes(12) + sent.datagram[20:]
    assert not check.receive(forged, world.servers[0], 0, world.net.now)
    assert check.receive(
        sent.datagram, world.servers[0], 0, world.net.now
    )  # reflected: counted, not believed
    assert check.report is None


def test_port_step() -> None:
    assert port_step([]) == port_step([5]) == 0
    assert port_step([10, 12, 14, 18]) == 2
    assert port_step([14, 12, 10]) == -2


def test_hosts_of_two_servers_that_differ_are_the_worst_if_no_second_port_answers() -> None:
    one, two = UdpEndpoint("192.0.2.1", 1), UdpEndpoint("192.0.2.2", 1)
    evidence = Evidence(
        ports=(PORT,), mapped={one: UdpEndpoint("192.0.2.9", 5), two: UdpEndpoint("192.0.2.9", 6)}
    )
    assert judge(evidence)[0].mapping is Behaviour.ADDRESS_AND_PORT_DEPENDENT
