"""The NAT model keeps what RFC 4787 says of each behaviour, and what Linux does where it differs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from crossedge.lab.chance import Chance
from crossedge.lab.nat import KINDS, Address, Nat, kind, make_nat
from crossedge.lab.natkinds import Allocation, Behaviour, Collision, Conntrack, Hairpin, NatKind

OUTER = "203.0.113.7"
ALICE: Address = ("192.168.1.2", 41820)
BOB: Address = ("192.168.1.3", 41820)
SERVER: Address = ("198.51.100.1", 3478)
SAME_HOST: Address = ("198.51.100.1", 3479)
STRANGER: Address = ("198.51.100.9", 3478)


def nat(name: str | NatKind, seed: int = 1, addresses: tuple[str, ...] = (OUTER,)) -> Nat:
    return make_nat(name if isinstance(name, NatKind) else kind(name), addresses, Chance(seed).below)


def out(box: Nat, src: Address, dst: Address, now: float = 0.0) -> Address:
    mapped = box.translate_out(src, dst, now)
    assert mapped is not None
    return mapped


TRANSLATING = [k for k in KINDS.values() if k.translates]
RFC = [k for k in TRANSLATING if k.conntrack is None]


def test_there_are_at_least_twelve_kinds() -> None:
    assert len(TRANSLATING) >= 12


@pytest.mark.parametrize("box", TRANSLATING, ids=lambda k: k.name)
def test_an_answer_comes_back_to_who_asked(box: NatKind) -> None:
    router = nat(box)
    mapped = out(router, ALICE, SERVER)
    assert mapped[0] == OUTER
    assert router.translate_in(SERVER, mapped, 0.1) == ALICE


@pytest.mark.parametrize("box", RFC, ids=lambda k: k.name)
def test_mapping_behaviour_is_what_the_kind_says(box: NatKind) -> None:
    router = nat(box)
    first, port, host = (out(router, ALICE, dst) for dst in (SERVER, SAME_HOST, STRANGER))
    if box.mapping is Behaviour.ENDPOINT_INDEPENDENT:
        assert first == port == host
    elif box.mapping is Behaviour.ADDRESS_DEPENDENT:
        assert first == port != host
    else:
        assert len({first, port, host}) == 3


@pytest.mark.parametrize("box", RFC, ids=lambda k: k.name)
def test_filtering_behaviour_is_what_the_kind_says(box: NatKind) -> None:
    router = nat(box)
    mapped = out(router, ALICE, SERVER)
    same_host = router.translate_in(SAME_HOST, mapped, 0.1)
    stranger = router.translate_in(STRANGER, mapped, 0.1)
    admitted = {
        Behaviour.ENDPOINT_INDEPENDENT: (ALICE, ALICE),
        Behaviour.ADDRESS_DEPENDENT: (ALICE, None),
        Behaviour.ADDRESS_AND_PORT_DEPENDENT: (None, None),
    }
    assert (same_host, stranger) == admitted[box.filtering]
    assert router.dropped["filtered"] == (same_host, stranger).count(None)


@pytest.mark.parametrize("box", RFC, ids=lambda k: k.name)
def test_port_allocation_is_what_the_kind_says(box: NatKind) -> None:
    router = nat(box)
    ports = [out(router, ("192.168.1.2", 6000 + n), SERVER)[1] for n in range(8)]
    steps = [b - a for a, b in itertools.pairwise(ports)]
    if box.allocation is Allocation.PRESERVING:
        assert ports == list(range(6000, 6008))
    elif box.allocation is Allocation.SEQUENTIAL:
        assert steps == [box.step] * 7
    else:
        assert len(set(steps)) > 4
        assert all(box.ports[0] <= port <= box.ports[1] for port in ports)


@pytest.mark.parametrize(
    ("collision", "expected"),
    [(Collision.NEXT, 41821), (Collision.STEAL, 41820), (Collision.REFUSE, None)],
)
def test_two_hosts_that_want_one_port(collision: Collision, expected: int | None) -> None:
    router = nat(NatKind(name="x", about="", collision=collision))
    out(router, ALICE, SERVER)
    second = router.translate_out(BOB, SERVER, 0.0)
    assert (second and second[1]) == expected
    answered = router.translate_in(SERVER, (OUTER, 41820), 0.1)
    assert answered == (BOB if collision is Collision.STEAL else ALICE)


def test_parity_is_kept_when_the_port_is_taken() -> None:
    router = nat(NatKind(name="x", about="", parity=True))
    out(router, ALICE, SERVER)
    assert out(router, BOB, SERVER)[1] == 41822


def test_mapping_dies_without_outbound_packets() -> None:
    router = nat("port-restricted")
    mapped = out(router, ALICE, SERVER)
    assert router.translate_in(SERVER, mapped, 100.0) == ALICE  # inbound does not refresh here
    assert router.translate_in(SERVER, mapped, 120.0) is None
    assert router.dropped["no-mapping"] == 1


def test_inbound_packets_refresh_where_the_kind_says_so() -> None:
    router = nat("hairpinning")
    mapped = out(router, ALICE, SERVER)
    assert router.translate_in(SERVER, mapped, 299.0) == ALICE
    assert router.translate_in(SERVER, mapped, 598.0) == ALICE


def test_outbound_packets_refresh_only_the_filter_of_their_destination() -> None:
    router = nat("port-restricted")
    mapped = out(router, ALICE, SERVER, 0.0)
    out(router, ALICE, STRANGER, 100.0)
    assert router.translate_in(SERVER, mapped, 130.0) is None
    assert router.translate_in(STRANGER, mapped, 130.0) == ALICE


def test_an_expired_port_is_given_out_again() -> None:
    router = nat("port-restricted")
    out(router, ALICE, SERVER, 0.0)
    assert out(router, BOB, SERVER, 121.0)[1] == 41820


@pytest.mark.parametrize(
    ("name", "source"), [("hairpinning", (OUTER, 41822)), ("hairpinning-internal", BOB), ("full-cone", None)]
)
def test_hairpin(name: str, source: Address | None) -> None:
    router = nat(name)
    mapped = out(router, ALICE, SERVER)
    theirs = out(router, BOB, SERVER)
    out(router, ALICE, theirs)  # opens Alice's filter
    expected = None if source is None else (source, ALICE)
    assert router.hairpin(BOB, mapped, 1.0) == expected


def test_session_table_is_bounded_per_host_and_recovers() -> None:
    router = nat("corporate")
    mapped = [router.translate_out(ALICE, ("198.51.100.1", 1000 + n), 0.0) for n in range(300)]
    assert sum(m is not None for m in mapped) == 256
    assert router.dropped["sessions"] == 44
    assert router.translate_out(BOB, SERVER, 0.0) is not None
    assert router.translate_out(ALICE, SERVER, 31.0) is not None
    assert router.sessions(31.0) == 1


def test_overloaded_ports_are_shared_only_between_different_peers() -> None:
    box = NatKind(
        name="x",
        about="",
        mapping=Behaviour.ADDRESS_AND_PORT_DEPENDENT,
        allocation=Allocation.RANDOM,
        overload=3,
        ports=(5000, 5001),
    )
    router = nat(box)
    peers: list[Address] = [("198.51.100.1", 1000 + n) for n in range(7)]
    mapped = [router.translate_out(ALICE, peer, 0.0) for peer in peers]
    assert mapped[6] is None
    assert router.dropped["no-port"] == 1
    for peer, outer in zip(peers[:6], mapped, strict=False):
        assert outer is not None
        assert router.translate_in(peer, outer, 0.1) == ALICE
    twins = nat(box)
    assert out(twins, ALICE, SERVER) != out(twins, BOB, SERVER)


def test_busy_neighbours_move_the_sequence() -> None:
    router = nat("symmetric-busy")
    first = out(router, ALICE, SERVER, 0.0)[1]
    later = out(router, ALICE, STRANGER, 10.0)[1]
    assert 180 <= later - first <= 222


def test_pooling_is_paired_unless_arbitrary() -> None:
    addresses = tuple(f"203.0.113.{n}" for n in range(1, 9))
    paired = nat("symmetric-random", addresses=addresses)
    arbitrary = nat(
        NatKind(name="x", about="", mapping=Behaviour.ADDRESS_AND_PORT_DEPENDENT, arbitrary_pooling=True),
        addresses=addresses,
    )
    peers: list[Address] = [("198.51.100.1", 1000 + n) for n in range(30)]
    assert len({out(paired, ALICE, peer)[0] for peer in peers}) == 1
    assert len({out(arbitrary, ALICE, peer)[0] for peer in peers}) > 3


@pytest.mark.parametrize("box", TRANSLATING, ids=lambda k: k.name)
def test_reboot_and_a_new_address_lose_every_mapping(box: NatKind) -> None:
    router = nat(box)
    mapped = out(router, ALICE, SERVER)
    router.reboot()
    assert router.translate_in(SERVER, mapped, 0.1) is None
    router.readdress(("203.0.113.99",))
    assert out(router, ALICE, SERVER, 0.2)[0] == "203.0.113.99"
    assert router.inner_of(("203.0.113.99", out(router, ALICE, SERVER, 0.3)[1]), SERVER, 0.4) == ALICE


@pytest.mark.parametrize("box", TRANSLATING, ids=lambda k: k.name)
def test_the_same_seed_gives_the_same_ports(box: NatKind) -> None:
    def ports(seed: int) -> list[Address | None]:
        router = nat(box, seed)
        return [router.translate_out(ALICE, ("198.51.100.1", 1000 + n), n * 0.1) for n in range(20)]

    assert ports(7) == ports(7)


# Linux


def test_linux_keeps_the_port_for_every_peer_until_tuples_conflict() -> None:
    router = nat("linux")
    assert [out(router, ALICE, peer)[1] for peer in (SERVER, SAME_HOST, STRANGER)] == [41820] * 3
    other = out(router, BOB, SERVER)
    assert other[1] != 41820
    assert out(router, BOB, STRANGER) == other  # the same place outside wherever that is free
    assert out(router, BOB, ("198.51.100.77", 1)) == other


def test_linux_dropping_wan_input_remembers_nothing() -> None:
    router = nat("linux")
    assert router.translate_in(STRANGER, (OUTER, 41820), 0.0) is None
    assert out(router, ALICE, STRANGER, 0.1)[1] == 41820
    assert router.translate_in(STRANGER, (OUTER, 41820), 0.2) == ALICE


def test_linux_accepting_wan_input_moves_the_mapping() -> None:
    router = nat("linux-accepting")
    for n in range(10):
        assert router.translate_in(STRANGER, (OUTER, 41820), n * 5.0) is None
    moved = out(router, ALICE, STRANGER, 50.0)
    assert moved[1] != 41820
    assert router.translate_in(STRANGER, (OUTER, 41820), 50.1) is None  # retries keep the wrong entry
    assert router.dropped["wrong-conntrack-entry"] == 10


def test_linux_wrong_entry_dies_30_seconds_after_the_last_retry() -> None:
    router = nat("linux-accepting")
    router.translate_in(STRANGER, (OUTER, 41820), 0.0)
    assert out(router, ALICE, STRANGER, 31.0)[1] == 41820


def test_linux_unreplied_mapping_lives_30_and_a_stream_120_seconds() -> None:
    router = nat("linux")
    mapped = out(router, ALICE, SERVER, 0.0)
    assert router.translate_in(SERVER, mapped, 30.0) is None
    mapped = out(router, ALICE, SERVER, 40.0)
    assert router.translate_in(SERVER, mapped, 41.0) == ALICE
    assert router.translate_in(SERVER, mapped, 70.0) == ALICE  # answered within 30 s, now a stream
    assert router.translate_in(SERVER, mapped, 189.0) == ALICE
    assert router.translate_in(SERVER, mapped, 310.0) is None


def test_linux_random_gives_each_peer_another_port() -> None:
    router = nat("linux-random")
    assert len({out(router, ALICE, ("198.51.100.1", 1000 + n)) for n in range(20)}) == 20


def test_linux_table_is_bounded() -> None:
    router = nat(NatKind(name="x", about="", conntrack=Conntrack.ACCEPT, sessions=10))
    for n in range(20):
        router.translate_in(("198.51.100.1", 1000 + n), (OUTER, 41820), 0.0)
    assert router.sessions(0.0) == 10
    assert router.translate_out(ALICE, SERVER, 0.0) is None
    assert router.dropped["sessions"] == 1


# Firewalls


def test_firewall_lets_in_only_answers_and_keeps_addresses() -> None:
    router = nat("firewall")
    assert out(router, ALICE, SERVER) == ALICE
    assert router.translate_in(STRANGER, ALICE, 0.1) is None
    assert router.translate_in(SERVER, ALICE, 0.1) == ALICE
    assert router.translate_in(SERVER, ALICE, 121.0) is None


def test_open_lets_everyone_in() -> None:
    assert nat("open").translate_in(STRANGER, ALICE, 0.0) == ALICE


# Bad kinds


@pytest.mark.parametrize(
    "wrong",
    [{"ports": (2000, 1000)}, {"step": 0}, {"overload": 2}, {"sessions": 0}],
)
def test_a_kind_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="NAT kind x"):
        NatKind(name="x", about="", **wrong)


def test_unknown_kind_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"cheese.*port-restricted"):
        kind("cheese")


def test_hairpin_kinds_exist() -> None:
    assert {k.hairpin for k in KINDS.values()} == set(Hairpin)
