"""Token buckets: the rate holds, whatever a stranger does to the table."""

from __future__ import annotations

from random import Random

import pytest

from crossedge.rendezvous.deadlines import Deadlines
from crossedge.rendezvous.limits import Bucket, BucketTable, prefix_key

NOW = 1000.0


@pytest.fixture
def random() -> Random:
    return Random(41820)


def test_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket = Bucket(rate=10, burst=5, now=NOW)
    assert [bucket.take(NOW) for _ in range(6)] == [True] * 5 + [False]
    assert not bucket.take(NOW + 0.09)
    assert bucket.take(NOW + 0.11)
    assert [bucket.take(NOW + 100) for _ in range(6)] == [True] * 5 + [False]


def test_refused_take_costs_nothing() -> None:
    bucket = Bucket(rate=1, burst=10, now=NOW)
    assert not bucket.take(NOW, 11)
    assert bucket.take(NOW, 10)


def test_bucket_without_rate_has_no_limit() -> None:
    bucket = Bucket(rate=0, burst=1, now=NOW)
    assert all(bucket.take(NOW, 1e9) for _ in range(10))


def test_bucket_survives_a_clock_that_stands_still_or_steps_back() -> None:
    bucket = Bucket(rate=10, burst=1, now=NOW)
    assert bucket.take(NOW)
    assert not bucket.take(NOW - 50)
    assert bucket.take(NOW + 0.2)


def test_prefix_is_24_bits_of_ipv4_and_56_of_ipv6() -> None:
    assert prefix_key("192.0.2.1") == prefix_key("192.0.2.254")
    assert prefix_key("192.0.2.1") != prefix_key("192.0.3.1")
    assert prefix_key("2001:db8:0:ff::1") == prefix_key("2001:db8:0:1::2")
    assert prefix_key("2001:db8:0:100::1") != prefix_key("2001:db8:0:1::2")
    assert prefix_key("::1") != prefix_key("0.0.0.1")


def test_each_key_has_its_own_bucket(random: Random) -> None:
    table = BucketTable(4096, rate=10, burst=3, random=random.randbytes)
    for key in range(50):
        assert [table.take(key, NOW) for _ in range(4)] == [True, True, True, False]
    assert table.take(7, NOW + 0.1)


def test_table_does_not_grow(random: Random) -> None:
    table = BucketTable(64, rate=10, burst=3, random=random.randbytes)
    size = len(table)
    for _ in range(10_000):
        table.take(random.getrandbits(24), NOW)
    assert len(table) == size == 64


def test_strangers_that_fill_the_table_win_no_fresh_burst(random: Random) -> None:
    table = BucketTable(64, rate=10, burst=3, random=random.randbytes)
    allowed = sum(table.take(key, NOW) for key in range(10_000))
    assert allowed <= 64 * 3
    allowed = sum(table.take(key, NOW + 1) for key in range(10_000))
    assert allowed <= 64 * 3


def test_pushing_a_key_out_and_coming_back_wins_nothing(random: Random) -> None:
    table = BucketTable(64, rate=1, burst=3, random=random.randbytes)
    won = 0
    for _ in range(200):
        won += table.take(12345, NOW)
        for _ in range(20):
            table.take(random.getrandbits(24), NOW)
    assert won <= 4 * 3


def test_take_some_returns_what_is_left(random: Random) -> None:
    table = BucketTable(64, rate=1, burst=10, random=random.randbytes)
    assert table.take_some(1, NOW, 1, 7) == 7
    assert table.take_some(1, NOW, 1, 7) == 3
    assert table.take_some(1, NOW, 1, 7) == 0
    assert table.take_some(1, NOW + 2.5, 1, 7) == 2.5


def test_deadline_that_was_put_off_is_not_due() -> None:
    true = {"a": 10.0, "b": 20.0}
    deadlines: Deadlines[str] = Deadlines()
    deadlines.add("a", 5.0)
    deadlines.add("b", 6.0)
    assert deadlines.next() == 5.0
    assert list(deadlines.due(7.0, true.__getitem__)) == []
    assert deadlines.next() == 10.0
    assert list(deadlines.due(15.0, true.__getitem__)) == ["a"]
    assert list(deadlines.due(25.0, true.__getitem__)) == ["b"]
    assert deadlines.next() is None


def test_forgotten_deadline_does_not_come_up_and_takes_no_room() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for round_ in range(1000):
        deadlines.add(1, 5.0 + round_)
    assert len(deadlines) < 200
    deadlines.discard(1)
    assert deadlines.next() is None
    assert list(deadlines.due(1e9, lambda _: 0.0)) == []
