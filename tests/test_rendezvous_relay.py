"""The relay forwards for the two sides of a channel and for nobody else.

alice 198.51.100.1:1000 ---- channel ---- bob 203.0.113.2:2000
carol 192.0.2.3:3000    (in another channel, with alice)
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from crossedge.rendezvous.relay import Channel, Relay, Run, Side
from crossedge.rendezvous.settings import RelayLimits
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError
from crossedge.wire.relay import HEADER, pack_header

NOW = 100.0
NETWORK = b"n" * 16
A = UdpEndpoint("198.51.100.1", 1000)
B = UdpEndpoint("203.0.113.2", 2000)
C = UdpEndpoint("192.0.2.3", 3000)
ENDPOINTS = {b"a" * 16: A, b"b" * 16: B, b"c" * 16: C}


def make(**limits: Any) -> Relay:
    return Relay(RelayLimits(**limits), Random(3).randbytes)


def side(letter: bytes, local: int = 0) -> Side:
    return Side(letter * 16, ENDPOINTS[letter * 16], local)


def channel(relay: Relay, first: bytes = b"a", second: bytes = b"b", now: float = NOW) -> Channel:
    made = relay.open(NETWORK, side(first), side(second), now)
    assert made is not None
    return made


def datagram(made: Channel, payload: bytes = b"payload") -> bytes:
    return pack_header(made.number) + payload


def test_forwards_both_ways_between_the_two_sides() -> None:
    relay = make()
    made = channel(relay)
    data = datagram(made)
    assert relay.route(data, 0, A, NOW) == [Run(0, len(data), B, 0)]
    assert relay.route(data, 0, B, NOW) == [Run(0, len(data), A, 0)]


def test_stranger_is_not_forwarded_not_answered_and_counted() -> None:
    relay = make()
    data = datagram(channel(relay))
    assert relay.route(data, 0, C, NOW) == []
    assert relay.route(data, 0, UdpEndpoint(A.host, A.port + 1), NOW) == []
    assert relay.dropped["not-a-side"] == 2
    assert relay.route(pack_header(12345) + b"x", 0, A, NOW) == []
    assert relay.dropped["unknown-channel"] == 1
    assert relay.route(b"\xce\x02abc", 0, A, NOW) == []
    assert relay.dropped["truncated"] == 1


def test_kernel_address_tuple_counts_as_the_endpoint() -> None:
    relay = make()
    data = datagram(channel(relay))
    source: Any = (A.host, A.port)  # as the kernel gives it; an endpoint is such a tuple with names
    assert relay.route(data, 0, source, NOW) != []


def test_channel_of_a_pair_is_one_whoever_calls() -> None:
    relay = make()
    first = channel(relay, b"a", b"b")
    assert channel(relay, b"b", b"a") is first
    assert channel(relay, b"a", b"c") is not first
    assert len(relay) == 2


def test_train_of_one_channel_leaves_as_one_train() -> None:
    relay = make()
    made = channel(relay)
    train = datagram(made, bytes(92)) * 40 + datagram(made, bytes(10))
    assert relay.route(memoryview(train), 100, A, NOW) == [Run(0, len(train), B, 0)]
    assert relay.forwarded["datagrams"] == 41
    assert relay.forwarded["trains"] == 1
    assert relay.forwarded["bytes"] == len(train)


def test_train_is_split_where_the_channel_changes() -> None:
    relay = make()
    to_b, to_c = channel(relay, b"a", b"b"), channel(relay, b"a", b"c")
    one, two = datagram(to_b, bytes(92)), datagram(to_c, bytes(92))
    train = one * 3 + two * 2 + one + two[:50]
    assert relay.route(train, 100, A, NOW) == [
        Run(0, 300, B, 0),
        Run(300, 500, C, 0),
        Run(500, 600, B, 0),
        Run(600, 650, C, 0),
    ]


def test_foreign_segment_in_a_train_is_dropped_and_the_rest_goes_on() -> None:
    relay = make()
    made = channel(relay)
    good, bad = datagram(made, bytes(92)), pack_header(made.number ^ 1) + bytes(92)
    assert relay.route(good * 2 + bad + good, 100, A, NOW) == [Run(0, 200, B, 0), Run(300, 400, B, 0)]
    assert relay.dropped["unknown-channel"] == 1
    assert relay.route(good + good[: HEADER - 1], 100, A, NOW) == [Run(0, 100, B, 0)]
    assert relay.dropped["truncated"] == 1


def test_bind_with_greater_sequence_rebinds() -> None:
    relay = make()
    made = channel(relay)
    moved = UdpEndpoint("198.51.100.77", 4242)
    mine, other = relay.bind(made.number, b"a" * 16, moved, 2, 5, NOW)
    assert (mine.endpoint, mine.seq, other.seq) == (moved, 5, 0)
    data = datagram(made)
    assert relay.route(data, 0, B, NOW) == [Run(0, len(data), moved, 2)]
    assert relay.route(data, 0, moved, NOW) == [Run(0, len(data), B, 0)]
    assert relay.route(data, 0, A, NOW) == []


@pytest.mark.parametrize("seq", [4, 5])
def test_replayed_bind_moves_nothing(seq: int) -> None:
    relay = make()
    made = channel(relay)
    relay.bind(made.number, b"a" * 16, A, 0, 5, NOW)
    with pytest.raises(WireError, match="stale-sequence"):
        relay.bind(made.number, b"a" * 16, C, 0, seq, NOW)
    assert relay.route(datagram(made), 0, C, NOW) == []


def test_bind_of_a_node_that_is_not_in_the_channel_is_refused() -> None:
    relay = make()
    made = channel(relay)
    with pytest.raises(WireError, match="unknown-channel"):
        relay.bind(made.number, b"c" * 16, C, 0, 1, NOW)
    with pytest.raises(WireError, match="unknown-channel"):
        relay.bind(made.number + 1, b"a" * 16, A, 0, 1, NOW)


def test_call_again_does_not_move_a_bound_side() -> None:
    relay = make()
    made = channel(relay)
    moved = UdpEndpoint("198.51.100.77", 4242)
    relay.bind(made.number, b"a" * 16, moved, 0, 5, NOW)
    assert channel(relay) is made
    assert relay.route(datagram(made), 0, B, NOW)[0].destination == moved


def test_idle_channel_is_forgotten_and_a_used_one_is_not() -> None:
    relay = make()
    idle, used = channel(relay, b"a", b"b"), channel(relay, b"a", b"c")
    assert relay.next_deadline() == NOW + 180
    relay.route(datagram(used), 0, A, NOW + 100)
    relay.handle_timeout(NOW + 180)
    assert relay.get(idle.number) is None
    assert relay.get(used.number) is used
    relay.handle_timeout(NOW + 279)
    assert len(relay) == 1
    relay.handle_timeout(NOW + 280)
    assert len(relay) == 0
    assert relay.next_deadline() is None


def test_channels_are_bounded_in_all_and_per_node() -> None:
    relay = make(channels=2)
    channel(relay, b"a", b"b")
    channel(relay, b"a", b"c")
    assert relay.open(NETWORK, side(b"b"), side(b"c"), NOW) is None
    assert relay.dropped["channel-table-full"] == 1
    relay = make(channels_per_node=1)
    channel(relay, b"a", b"b")
    assert relay.open(NETWORK, side(b"c"), side(b"b"), NOW) is None
    assert relay.dropped["node-channels-full"] == 1


def test_node_that_sends_too_much_is_held_to_its_quota_and_others_are_not() -> None:
    relay = make(node_rate=1000.0)
    to_b = channel(relay, b"a", b"b")
    data = datagram(to_b, bytes(992))
    passed = sum(bool(relay.route(data, 0, A, NOW)) for _ in range(100))
    assert passed == 65
    assert relay.dropped["node-quota"] == 35
    assert relay.route(data, 0, B, NOW) != []
    assert relay.route(data, 0, A, NOW + 1) != []


def test_quota_of_a_node_is_one_over_all_its_channels() -> None:
    relay = make(node_rate=1000.0)
    passed = 0
    for other in (b"b", b"c"):
        data = datagram(channel(relay, b"a", other), bytes(992))
        passed += sum(bool(relay.route(data, 0, A, NOW)) for _ in range(100))
    assert passed == 65


def test_network_is_held_to_its_quota() -> None:
    relay = make(network_rate=1000.0)
    data = datagram(channel(relay), bytes(992))
    passed = sum(bool(relay.route(data, 0, source, NOW)) for source in (A, B) * 50)
    assert passed == 65
    assert relay.dropped["network-quota"] == 35


def test_node_whose_certificate_ended_loses_its_channels_at_once() -> None:
    relay = make()
    gone, kept = channel(relay, b"a", b"b"), channel(relay, b"b", b"c")
    relay.forget_node(b"a" * 16)
    assert relay.route(datagram(gone), 0, B, NOW) == []
    assert relay.route(datagram(kept), 0, B, NOW) != []
    relay.handle_timeout(NOW + 1000)
    assert len(relay) == 0
