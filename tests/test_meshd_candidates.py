"""What a node offers its peers to try, and what it never offers."""

from __future__ import annotations

from ipaddress import ip_network

from crossedge.meshd.candidates import MAX_OBSERVERS, MAX_REPORTED, Candidates, stun_observer
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.limits import MAX_CANDIDATES
from crossedge.wire.record import Candidate, CandidateKind

PORT = 41820
OUTSIDE = UdpEndpoint("8.8.4.4", 50_000)
ONE, TWO, THREE = b"server-1", b"server-2", b"server-3"


def endpoints(candidates: Candidates) -> list[str]:
    return [str(candidate.endpoint) for candidate in candidates.current]


def test_host_addresses_come_with_our_port() -> None:
    candidates = Candidates(PORT)
    assert candidates.set_host_addresses(["192.168.1.2", "2a00:1450::5"])
    assert endpoints(candidates) == ["[2a00:1450::5]:41820", "192.168.1.2:41820"]
    assert {candidate.kind for candidate in candidates.current} == {CandidateKind.HOST}


def test_the_same_addresses_again_change_nothing() -> None:
    candidates = Candidates(PORT)
    candidates.set_host_addresses(["192.168.1.2"])
    assert not candidates.set_host_addresses(["192.168.1.2", "192.168.1.2"])
    assert candidates.observe(ONE, "1.1.1.1", OUTSIDE)
    assert not candidates.observe(TWO, "1.0.0.1", OUTSIDE)


def test_reachable_kinds_come_before_private_addresses() -> None:
    candidates = Candidates(PORT)
    candidates.set_host_addresses(["192.168.1.2"])
    candidates.observe(ONE, "1.1.1.1", OUTSIDE)
    candidates.set_mapped([UdpEndpoint("8.8.4.4", 41820)])
    candidates.set_static([UdpEndpoint("9.9.9.9", 7)])
    assert [candidate.kind for candidate in candidates.current] == [
        CandidateKind.STATIC,
        CandidateKind.MAPPED,
        CandidateKind.REFLEXIVE,
        CandidateKind.HOST,
    ]


def test_what_nobody_may_be_aimed_at_is_refused_with_its_reason() -> None:
    candidates = Candidates(PORT, [ip_network("10.160.0.0/12"), ip_network("fd00:1::/48")])
    changed = candidates.set_host_addresses(
        ["127.0.0.1", "169.254.3.4", "224.0.0.1", "0.0.0.0", "10.160.7.1", "fd00:1::9", "fe80::1", "nonsense"]
    )
    assert not changed
    assert candidates.current == ()
    assert candidates.refused == {
        "127.0.0.1:41820": "loopback",
        "169.254.3.4:41820": "link-local",
        "224.0.0.1:41820": "multicast",
        "0.0.0.0:41820": "unspecified",
        "10.160.7.1:41820": "mesh-prefix",
        "[fd00:1::9]:41820": "mesh-prefix",
        "[fe80::1]:41820": "link-local",
        "nonsense:41820": "not-an-address",
    }


def test_an_observer_cannot_make_us_offer_a_refused_address() -> None:
    candidates = Candidates(PORT, [ip_network("10.160.0.0/12")])
    assert not candidates.observe(ONE, "1.1.1.1", UdpEndpoint("10.160.0.1", 1))
    assert candidates.refused == {"10.160.0.1:1": "mesh-prefix"}


def test_reflexive_address_needs_two_independent_observers() -> None:
    candidates = Candidates(PORT)
    candidates.observe(ONE, "1.1.1.1", OUTSIDE)
    assert not candidates.confirmed(OUTSIDE)
    candidates.observe(TWO, "1.1.1.1", OUTSIDE)  # another name on the same host
    assert not candidates.confirmed(OUTSIDE)
    candidates.observe(THREE, "1.0.0.1", OUTSIDE._replace(port=1))  # a hard NAT: another port
    assert candidates.confirmed(OUTSIDE)
    candidates.forget(THREE)
    assert not candidates.confirmed(OUTSIDE)


def test_own_and_configured_addresses_need_no_observer() -> None:
    candidates = Candidates(PORT)
    candidates.set_host_addresses(["8.8.8.8"])
    candidates.set_static([UdpEndpoint("9.9.9.9", 7)])
    assert candidates.confirmed(UdpEndpoint("8.8.8.8", 1))
    assert candidates.confirmed(UdpEndpoint("9.9.9.9", 7))


def test_without_a_nat_the_observed_address_is_the_hosts_own() -> None:
    candidates = Candidates(PORT)
    candidates.set_host_addresses(["8.8.8.8"])
    assert not candidates.observe(ONE, "1.1.1.1", UdpEndpoint("8.8.8.8", PORT))
    assert candidates.current == (Candidate(CandidateKind.HOST, UdpEndpoint("8.8.8.8", PORT)),)


def test_a_moved_mapping_replaces_the_old_one() -> None:
    candidates = Candidates(PORT)
    candidates.observe(ONE, "1.1.1.1", OUTSIDE)
    assert candidates.observe(ONE, "1.1.1.1", OUTSIDE._replace(port=2))
    assert endpoints(candidates) == ["8.8.4.4:2"]
    assert candidates.forget(ONE)
    assert candidates.current == ()


def test_everything_is_bounded() -> None:
    candidates = Candidates(PORT)
    candidates.set_host_addresses(f"10.0.{n}.1" for n in range(200))
    candidates.set_static(UdpEndpoint("9.9.9.9", n) for n in range(1, 100))
    for n in range(1, 50):
        candidates.observe(b"%8d" % n, f"1.1.1.{n}", UdpEndpoint("8.8.4.4", n))
    assert len(candidates.current) == MAX_CANDIDATES
    assert len(candidates.observed_by()) == MAX_REPORTED <= MAX_OBSERVERS
    assert candidates.observed_by()[0] == (b"%8d" % 49, UdpEndpoint("8.8.4.4", 49))
    assert any(candidate.kind is CandidateKind.HOST for candidate in candidates.current)


def test_stun_servers_are_observers_of_their_own() -> None:
    first, second = UdpEndpoint("1.1.1.1", 3478), UdpEndpoint("1.1.1.1", 3479)
    assert len(stun_observer(first)) == 8
    assert stun_observer(first) != stun_observer(second)
