"""The parts of a peer, each by itself: hello, offers, paths, pings for people, control keys, deadlines."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from crossedge.meshd.blocklistpeer import TRIES, PeerFetch, part_of
from crossedge.meshd.callbody import BODY_MAX, call_body
from crossedge.meshd.callers import FINDS_MAX, WAITING_MAX, WAITING_TIME, Finds, WaitingCalls
from crossedge.meshd.challenges import ANSWER_TIME, CHALLENGES_MAX, Challenges
from crossedge.meshd.client_events import Called
from crossedge.meshd.deadlines import Deadlines
from crossedge.meshd.hello import HelloExchange, agree, gso_bits, gso_types
from crossedge.meshd.inner import Aeads, BlocklistAsk, Gso, ProbeReply
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.nodecontrol import OLD_KEY_LIFE, NodeControl
from crossedge.meshd.offers import OFFERED_MAX, Offers
from crossedge.meshd.path import Path, State
from crossedge.meshd.paths import MAX_DIRECT, MAX_RELAYS, Paths
from crossedge.meshd.userping import ANSWER_TIMEOUT, OPENING_TIMEOUT, PINGS_MAX, UserPings
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint
from crossedge.wire.envelope import ControlKey
from crossedge.wire.identity import SigningKey, network_id
from crossedge.wire.messages import Ping, encode
from crossedge.wire.record import Candidate, CandidateKind, Record

CHANCE = random.Random(11)
PUBLIC = UdpEndpoint("198.51.100.7", 41820)
OTHER = UdpEndpoint("198.51.100.8", 41820)
SERVERS = [UdpEndpoint(f"203.0.113.{number}", 3478) for number in range(1, 9)]


# --- Hello ------------------------------------------------------------------------------------------------


def keypairs() -> tuple[Keypair, Keypair]:
    one, two = CHANCE.randbytes(32), CHANCE.randbytes(32)
    a = Keypair(local_index=1, remote_index=2, created=0.0, initiator=True, send_key=one, receive_key=two)
    b = Keypair(local_index=2, remote_index=1, created=0.0, initiator=False, send_key=two, receive_key=one)
    return a, b


def exchange(lost: set[int], seconds: float = 30.0) -> tuple[HelloExchange, HelloExchange, int]:
    """Run two exchanges with 10 ms between them; the hellos numbered in `lost` never arrive."""
    ends = [HelloExchange(pair, Aeads(3), Gso(7), 65_000, 0.0) for pair in keypairs()]
    sent, now = 0, 0.0
    while now < seconds:
        for end, other in ((ends[0], ends[1]), (ends[1], ends[0])):
            if end.due is not None and now >= end.due:
                hello = end.message(now)
                if sent not in lost:
                    assert hello.receiver == other.keypair.local_index
                    other.receive(hello, now)
                sent += 1
        now += 0.01
    return ends[0], ends[1], sent


def test_hello_ends_when_both_are_heard() -> None:
    a, b, sent = exchange(set())
    assert a.heard
    assert b.heard
    assert a.due is None
    assert b.due is None
    assert sent <= 4


@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1}, {1, 2}, {2, 3}, {0, 1, 2, 3, 4}])
def test_hello_survives_loss_and_still_ends(lost: set[int]) -> None:
    a, b, sent = exchange(lost)
    assert a.heard
    assert b.heard
    assert a.due is None
    assert b.due is None
    assert sent < 20


def test_aead_is_aes_only_where_both_want_it() -> None:
    both, chacha = Aeads.AES_256_GCM | Aeads.CHACHA20_POLY1305, Aeads.CHACHA20_POLY1305
    assert agree(both, both) == "aes-256-gcm"
    assert agree(both, chacha) == agree(chacha, both) == "chacha20-poly1305"
    assert agree(both, Aeads(0)) is None
    assert agree(Aeads.AES_256_GCM, chacha) is None


def test_gso_types_survive_the_hello() -> None:
    for types in (frozenset[int](), frozenset({1}), frozenset({1, 4, 5})):
        assert gso_types(gso_bits(types)) == types


# --- Offers -----------------------------------------------------------------------------------------------


def record(*candidates: Candidate) -> Record:
    return Record(
        node_id=bytes(16),
        certificate=bytes(16),
        control_key=bytes(32),
        seq=1,
        issued=1,
        expires=2,
        candidates=candidates,
    )


def test_reflexive_candidate_has_a_single_observer_until_two_are_named() -> None:
    offers = Offers(record(Candidate(CandidateKind.REFLEXIVE, PUBLIC)), lambda _: True)
    assert offers.single_observer(PUBLIC)
    offers.add([], [(b"server-1", PUBLIC)])
    assert offers.single_observer(PUBLIC)
    offers.add([], [(b"server-1", PUBLIC), (b"server-2", UdpEndpoint(PUBLIC.host, 99))])
    assert not offers.single_observer(PUBLIC)


def test_same_observer_twice_is_one_observer() -> None:
    offers = Offers(record(Candidate(CandidateKind.REFLEXIVE, PUBLIC)), lambda _: True)
    offers.add([], [(b"server-1", PUBLIC), (b"server-1", PUBLIC)])
    assert offers.single_observer(PUBLIC)


@pytest.mark.parametrize("kind", [CandidateKind.HOST, CandidateKind.STATIC, CandidateKind.MAPPED])
def test_candidate_that_its_owner_knows_itself_needs_no_observer(kind: CandidateKind) -> None:
    assert not Offers(record(Candidate(kind, PUBLIC)), lambda _: True).single_observer(PUBLIC)


def test_what_nobody_named_has_a_single_observer_and_is_no_offer() -> None:
    offers = Offers(record(), lambda _: True)
    assert offers.single_observer(OTHER)
    assert OTHER not in offers


def test_calls_add_a_bounded_number_of_usable_endpoints() -> None:
    offers = Offers(record(Candidate(CandidateKind.HOST, PUBLIC)), lambda endpoint: endpoint != OTHER)
    offers.add([OTHER, *(UdpEndpoint("198.51.100.9", port) for port in range(1, 100))], [])
    assert len(offers.candidates()) == OFFERED_MAX + 1
    assert offers.candidates()[0] == PUBLIC
    assert OTHER not in offers


def test_newer_record_says_what_is_new() -> None:
    offers = Offers(record(Candidate(CandidateKind.HOST, PUBLIC)), lambda _: True)
    assert offers.replace(
        record(Candidate(CandidateKind.HOST, PUBLIC), Candidate(CandidateKind.HOST, OTHER))
    ) == [OTHER]


# --- Paths ------------------------------------------------------------------------------------------------


def prove(paths: Paths, endpoint: UdpEndpoint | RelayEndpoint, rtt: float, now: float) -> Path:
    path = paths.add(endpoint, now - rtt)
    assert path is not None
    path.prove(now - rtt)
    for due, probe in paths.probes(now - rtt):
        if due is path:
            assert paths.replied(ProbeReply(probe.id, 0.0, 9.0, 9.0, 1232, 1232), endpoint, now, now) is path
    assert path.state is State.PROVEN
    return path


def relay(number: int, channel: int = 1) -> RelayEndpoint:
    return RelayEndpoint(SERVERS[number], channel)


def test_data_takes_an_unproven_relay_and_nothing_else_unproven() -> None:
    paths = Paths(CHANCE.randbytes, 0.0)
    assert paths.select(0.0, lively=True)[0] == ()
    paths.add(PUBLIC, 0.0)
    assert paths.select(0.0, lively=True)[0] == ()
    paths.add(relay(0), 0.0)
    assert paths.select(0.0, lively=True)[0] == (relay(0),)
    paths.add(relay(1), 0.0)
    assert paths.select(0.0, lively=True)[0] == (relay(0), relay(1))  # either may be dead


def test_doubtful_direct_path_goes_together_with_a_relay() -> None:
    paths = Paths(CHANCE.randbytes, 0.0)
    paths.add(relay(0), 0.0)
    direct = prove(paths, PUBLIC, 0.02, 1.0)
    assert paths.select(1.0, lively=True)[0] == (PUBLIC,)
    direct.doubt(1.5)
    endpoints, size = paths.select(1.5, lively=True)
    assert endpoints == (PUBLIC, relay(0))
    assert size == 1232


def test_idle_pair_is_ready_to_start_over_both() -> None:
    paths = Paths(CHANCE.randbytes, 0.0)
    paths.add(relay(0), 0.0)
    prove(paths, PUBLIC, 0.02, 1.0)
    assert paths.select(1.0, lively=False)[0] == (PUBLIC, relay(0))


def test_relay_in_doubt_goes_together_with_another_one() -> None:
    paths = Paths(CHANCE.randbytes, 0.0)
    first = prove(paths, relay(0), 0.02, 1.0)
    paths.add(relay(1), 1.0)
    assert paths.select(1.0, lively=True)[0] == (relay(0),)
    first.doubt(1.5)
    assert paths.select(1.5, lively=True)[0] == (relay(0), relay(1))


def test_answer_through_a_relay_proves_no_direct_path() -> None:
    paths = Paths(CHANCE.randbytes, 0.0)
    path = paths.add(PUBLIC, 0.0)
    assert path is not None
    path.prove(0.0)
    ((_, probe),) = paths.probes(0.0)
    assert paths.replied(ProbeReply(probe.id, 0.0, 9.0, 9.0, 1232, 1232), relay(0), 0.1, 0.1) is None
    assert path.state is State.PROBING


def test_new_channel_at_a_server_takes_the_place_of_the_old_one() -> None:
    paths = Paths(CHANCE.randbytes, 0.0)
    paths.add(relay(0, 1), 0.0)
    paths.add(relay(0, 2), 1.0)
    assert [path.endpoint for path in paths.relays()] == [relay(0, 2)]


def test_paths_are_bounded_and_a_proven_one_is_never_pushed_out() -> None:
    paths = Paths(CHANCE.randbytes, 0.0)
    prove(paths, PUBLIC, 0.02, 1.0)
    for number in range(100):
        paths.add(UdpEndpoint("203.0.113.50", number + 1), 1.0)
        paths.add(relay(number % 8, number), 1.0)
    assert len(paths.directs()) == MAX_DIRECT
    assert len(paths.relays()) == MAX_RELAYS
    assert paths.get(PUBLIC) is not None


# --- Pings for people ---------------------------------------------------------------------------------------


def test_user_pings_end_with_an_answer_or_a_reason() -> None:
    pings = UserPings("bob")
    pings.ask(1, 0.0)
    pings.ask(2, 0.0)
    pings.ask(3, 0.0)
    pings.sent(1, 100, PUBLIC, 0.5)
    pings.sent(2, 101, PUBLIC, 0.5)
    reply = ProbeReply(100, 0.5, 70.0, 70.01, 66)
    assert pings.replied(reply, 0.54)
    assert not pings.replied(reply, 0.55)
    pings.handle_timeout(max(OPENING_TIMEOUT, 0.5 + ANSWER_TIMEOUT))
    results = {result.number: (result.rtt, result.note) for result in pings.results}
    assert results == {1: (pytest.approx(0.03), ""), 2: (None, "no answer"), 3: (None, "no session")}
    assert pings.deadline() is None


def test_user_pings_are_bounded() -> None:
    pings = UserPings("bob")
    for number in range(PINGS_MAX + 1):
        pings.ask(number, 0.0)
    assert [result.number for result in pings.results] == [PINGS_MAX]


# --- Control between nodes ----------------------------------------------------------------------------------


def a_control() -> NodeControl:
    return NodeControl(ControlKey.generate(CHANCE.randbytes), CHANCE.randbytes, 0.0)


def controls() -> tuple[NodeControl, NodeControl]:
    return a_control(), a_control()


def test_control_message_is_opened_and_its_number_accepted_once() -> None:
    a, b = controls()
    datagram = a.seal(Ping(id=1, seq=5), b.key.public)
    assert datagram is not None
    parsed = b.parse(datagram, 1.0)
    assert parsed is not None
    message = b.open(*parsed)
    assert message == Ping(id=1, seq=5)
    assert b.fresh(*parsed, 5)
    assert not b.fresh(*parsed, 5)
    assert b.dropped["replayed-control"] == 1


def test_old_control_key_is_understood_for_an_hour() -> None:
    a, b = controls()
    datagram = a.seal(Ping(id=1, seq=5), b.key.public)
    assert datagram is not None
    b.rotate(ControlKey.generate(CHANCE.randbytes), 100.0)
    assert b.parse(datagram, 101.0) is not None
    assert b.parse(datagram, 100.0 + OLD_KEY_LIFE) is None
    assert b.dropped["mac1"] == 1


def test_message_sealed_with_a_weak_key_is_dropped() -> None:
    a, _ = controls()
    assert a.seal(Ping(id=1, seq=5), bytes(32)) is None
    assert a.dropped["weak-key"] == 1


def test_challenge_is_met_once_in_time_and_by_its_node() -> None:
    challenges = Challenges(CHANCE.randbytes)
    number = challenges.new(b"bob", PUBLIC, 0.0)
    assert challenges.met(number, b"eve", 1.0) == (False, None)
    assert challenges.met(number, b"bob", 1.0) == (True, PUBLIC)
    assert challenges.met(number, b"bob", 1.0) == (False, None)
    late = challenges.new(b"bob", PUBLIC, 0.0)
    assert not challenges.met(late, b"bob", ANSWER_TIME)[0]
    first = challenges.new(b"bob", PUBLIC, 0.0)
    for _ in range(CHALLENGES_MAX):
        challenges.new(b"bob", PUBLIC, 0.0)
    assert challenges.met(first, b"bob", 0.0) == (False, None)
    volley = challenges.new(b"bob", None, 0.0)
    assert challenges.met(volley, b"bob", 0.0) == (True, None)


def test_calls_wait_for_their_callers_record_within_bounds() -> None:
    dropped: Counter[str] = Counter()
    waiting = WaitingCalls(dropped)
    calls = [Called(b"s" * 8, bytes([n]) * 16, 0, 0, PUBLIC, b"", b"") for n in range(WAITING_MAX + 1)]
    for call in calls:
        waiting.add(call, 0.0)
    assert dropped["waiting-calls-full"] == 1
    assert waiting.take(calls[0].caller, 0.1) == []
    assert waiting.take(calls[1].caller, 0.1) == [calls[1]]
    assert waiting.take(calls[1].caller, 0.1) == []
    assert waiting.take(calls[2].caller, WAITING_TIME) == []


def test_same_question_goes_out_once_a_second() -> None:
    dropped: Counter[str] = Counter()
    finds = Finds(dropped)
    assert finds.may_ask(b"a", 0.0)
    assert not finds.may_ask(b"a", 0.9)
    assert finds.may_ask(b"a", 1.0)
    assert sum(finds.may_ask(number.to_bytes(4), 1.0) for number in range(2 * FINDS_MAX)) == FINDS_MAX - 1
    assert dropped["too-many-finds"] == FINDS_MAX + 1


def test_call_body_is_made_to_fit() -> None:
    candidates = [UdpEndpoint(f"2001:db8::{number:x}", 41820) for number in range(1, 13)]
    observed = [(bytes([number]) * 8, UdpEndpoint(f"2001:db8:1::{number:x}", 1)) for number in range(4)]
    body = call_body(lambda: 2**63, 2, candidates, observed, 1e9, bytes(148))
    assert len(encode(body)) <= BODY_MAX
    assert body.candidates[:5] == tuple(candidates[:5])
    assert body.rtt == 60.0


def test_blocklist_is_fetched_part_by_part_and_given_up_in_the_end() -> None:
    ca = SigningKey.generate(CHANCE.randbytes)
    revoked = {f"node-{number}": 1 for number in range(300)}
    held = Blocklist(network=network_id(ca.public), serial=5, issued=1, revoked=revoked).sign(ca)
    fetch = PeerFetch(b"bob", 4, 0.0)
    whole = None
    for step in range(100):
        ask = fetch.ask(float(step))
        assert ask is not None
        part = part_of(held, ask)
        assert part is not None
        whole = fetch.take(part, float(step))
        if whole is not None:
            break
    assert whole == held.encode()
    assert part_of(held, BlocklistAsk(4, 0)) is None
    assert part_of(held, BlocklistAsk(5, 7)) is None
    assert part_of(held, BlocklistAsk(5, 1 << 30)) is None
    old = PeerFetch(b"bob", 5, 0.0)
    asks = [old.ask(0.0) for _ in range(TRIES + 1)]
    assert asks[-1] is None
    first = part_of(held, BlocklistAsk(0, 0))
    assert first is not None
    assert old.take(first, 0.0) is None


def test_deadlines_come_in_order_and_replaced_ones_never() -> None:
    deadlines: Deadlines[str] = Deadlines()
    for number in range(1000):
        deadlines.set("a", 5.0 + number)
        deadlines.set("b", 2.0)
    deadlines.set("c", 3.0)
    deadlines.set("c", None)
    assert deadlines.next() == 2.0
    assert deadlines.take(4.0) == ["b"]
    assert deadlines.next() == 1004.0
    assert deadlines.take(1003.9) == []
    assert deadlines.take(1004.0) == ["a"]
    assert deadlines.next() is None
