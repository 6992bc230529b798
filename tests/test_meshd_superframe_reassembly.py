"""Chunks that wait for their record: bounded in bytes and time, two candidates at most."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.reassembly import (
    CHUNK_COST,
    LIFETIME,
    RECORD_COST,
    SESSION_BYTES,
    TOTAL_BYTES,
    Reassembly,
)
from tests.data_pair import ALICE, BOB

NOW = 50.0


def chunk(record: int, index: int, size: int = 500) -> bytes:
    return random.Random(record << 8 | index).randbytes(size)


@pytest.fixture
def dropped() -> Counter[str]:
    return Counter()


@pytest.fixture
def reassembly(dropped: Counter[str]) -> Reassembly:
    return Reassembly(dropped)


def test_chunks_make_a_record_in_any_order(reassembly: Reassembly, dropped: Counter[str]) -> None:
    for index in (2, 0, 3):
        assert reassembly.add((1, 10), index, 4, chunk(10, index), ALICE, NOW) == []
    whole = b"".join(chunk(10, index) for index in range(4))
    assert reassembly.add((1, 10), 1, 4, chunk(10, 1), ALICE, NOW) == [whole]
    reassembly.discard((1, 10))
    assert len(reassembly) == reassembly.cost == 0
    assert not dropped


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_runs_of_chunks_do_what_their_chunks_do_one_by_one(data: st.DataObject) -> None:
    one, many = Counter[str](), Counter[str]()
    singly, runs = Reassembly(one), Reassembly(many)
    for _ in range(data.draw(st.integers(1, 12))):
        count = data.draw(st.sampled_from([5, 5, 5, 6]))
        index = data.draw(st.integers(0, count - 1))
        size = data.draw(st.sampled_from([500, 500, 500, 400, 10]))
        source = data.draw(st.sampled_from([ALICE, ALICE, ALICE, BOB]))
        genuine = data.draw(st.integers(0, 3))
        end = data.draw(st.integers(index + 1, count))
        parts = [chunk(10 if genuine else 11, place, size) for place in range(index, end)]
        expected = []
        for place, part in enumerate(parts, index):
            expected += singly.add((1, 10), place, count, part, source, NOW)
        assert runs.add_run((1, 10), index, count, parts, source, NOW) == expected
        assert (runs.cost, len(runs), many) == (singly.cost, len(singly), one)


def test_a_run_past_the_end_of_its_record_is_refused(reassembly: Reassembly, dropped: Counter[str]) -> None:
    assert reassembly.add_run((1, 10), 2, 3, [chunk(10, 2), chunk(10, 3)], ALICE, NOW) == []
    assert dropped == {"chunk-malformed": 2}
    assert len(reassembly) == 0


def test_a_chunk_that_comes_twice_is_counted_once(reassembly: Reassembly, dropped: Counter[str]) -> None:
    for _ in range(3):
        assert reassembly.add((1, 10), 0, 2, chunk(10, 0), ALICE, NOW) == []
    assert dropped == {"chunk-duplicate": 2}
    assert reassembly.cost == RECORD_COST + CHUNK_COST + 500


def test_records_of_two_sessions_do_not_meet(reassembly: Reassembly) -> None:
    assert reassembly.add((1, 10), 0, 2, chunk(10, 0), ALICE, NOW) == []
    assert reassembly.add((2, 10), 1, 2, chunk(10, 1), ALICE, NOW) == []
    assert len(reassembly) == 2


def test_count_size_and_source_tell_candidates_apart(reassembly: Reassembly, dropped: Counter[str]) -> None:
    add = reassembly.add
    assert add((1, 10), 0, 2, chunk(10, 0), ALICE, NOW) == []
    assert add((1, 10), 1, 3, chunk(10, 1), ALICE, NOW) == []
    assert add((1, 10), 1, 2, chunk(10, 1, 501), ALICE, NOW) == []
    assert add((1, 10), 1, 2, chunk(10, 1), BOB, NOW) == []
    assert add((1, 10), 1, 2, chunk(10, 1), ALICE, NOW) == [chunk(10, 0) + chunk(10, 1)]
    assert dropped == {"chunk-conflict": 2}


def test_where_two_chunks_claim_a_place_both_candidates_are_offered(reassembly: Reassembly) -> None:
    genuine, forged = chunk(10, 0), chunk(99, 0)
    for first, second in ((genuine, forged), (forged, genuine)):
        assert reassembly.add((1, 10), 0, 2, first, ALICE, NOW) == []
        assert reassembly.add((1, 10), 0, 2, second, ALICE, NOW) == []
        offered = reassembly.add((1, 10), 1, 2, chunk(10, 1), ALICE, NOW)
        assert offered == [first + chunk(10, 1), second + chunk(10, 1)]
        reassembly.discard((1, 10))


def test_a_candidate_that_did_not_open_can_still_be_mended(reassembly: Reassembly) -> None:
    assert reassembly.add((1, 10), 0, 2, chunk(99, 0), ALICE, NOW) == []
    assert reassembly.add((1, 10), 1, 2, chunk(10, 1), ALICE, NOW) == [chunk(99, 0) + chunk(10, 1)]
    assert reassembly.add((1, 10), 0, 2, chunk(10, 0), ALICE, NOW) == [chunk(10, 0) + chunk(10, 1)]


def test_what_waits_too_long_is_dropped(reassembly: Reassembly, dropped: Counter[str]) -> None:
    reassembly.add((1, 10), 0, 2, chunk(10, 0), ALICE, NOW)
    reassembly.add((1, 12), 0, 2, chunk(12, 0), ALICE, NOW + LIFETIME / 2)
    reassembly.expire(NOW + LIFETIME)
    assert len(reassembly) == 1
    assert dropped == {"chunk-timeout": 1}
    reassembly.add((2, 14), 0, 2, chunk(14, 0), ALICE, NOW + 2 * LIFETIME)
    assert len(reassembly) == 1
    assert dropped == {"chunk-timeout": 2}


def test_one_session_cannot_push_another_out(reassembly: Reassembly, dropped: Counter[str]) -> None:
    reassembly.add((2, 1), 0, 2, chunk(1, 0), ALICE, NOW)
    for number in range(1000):
        reassembly.add((1, number), 0, 2, chunk(number, 0, 1400), ALICE, NOW)
        assert reassembly.cost <= SESSION_BYTES + 5000
    assert dropped["chunk-session-full"] > 800
    assert reassembly.add((2, 1), 1, 2, chunk(1, 1), ALICE, NOW) != []
    newest = reassembly.add((1, 999), 1, 2, chunk(999, 1, 1400), ALICE, NOW)
    assert newest == [chunk(999, 0, 1400) + chunk(999, 1, 1400)]


def test_all_sessions_together_are_bounded(reassembly: Reassembly, dropped: Counter[str]) -> None:
    for session in range(60):
        for number in range(60):
            reassembly.add((session, number), 0, 3, chunk(number, 0, 1400), ALICE, NOW)
    assert reassembly.cost <= TOTAL_BYTES
    assert dropped["chunk-full"] > 0


@pytest.mark.parametrize(("index", "count", "size"), [(2, 2, 500), (9, 3, 500), (0, 2, 63), (0, 2, 0)])
def test_impossible_chunks_are_refused(
    reassembly: Reassembly, dropped: Counter[str], index: int, count: int, size: int
) -> None:
    assert reassembly.add((1, 10), index, count, chunk(10, 0, size), ALICE, NOW) == []
    assert dropped == {"chunk-malformed": 1}
    assert len(reassembly) == 0


def test_discarding_what_is_not_there_changes_nothing(reassembly: Reassembly) -> None:
    reassembly.add((1, 10), 0, 2, chunk(10, 0), ALICE, NOW)
    reassembly.discard((1, 11))
    reassembly.discard((2, 10))
    assert len(reassembly) == 1


STEP = st.tuples(
    st.integers(1, 2),  # session
    st.integers(0, 5),  # counter
    st.integers(0, 4),  # index
    st.integers(2, 4),  # count
    st.sampled_from([64, 100]),  # size
    st.sampled_from([ALICE, BOB]),
    st.booleans(),  # genuine
    st.floats(0, 0.4),  # time that passes
    st.booleans(),  # open what is complete
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_accounts_are_kept_and_bounds_hold_whatever_comes(steps: list[tuple]) -> None:
    dropped: Counter[str] = Counter()
    reassembly = Reassembly(dropped)
    now = NOW
    for session, counter, index, count, size, source, genuine, passed, opens in steps:
        now += passed
        part = chunk(counter if genuine else counter + 100, index, size)
        offered = reassembly.add((session, counter), index, count, part, source, now)
        assert len(offered) <= 2
        for sealed in offered:
            assert len(sealed) == count * size
            assert sealed[index * size : (index + 1) * size] == part
        if offered and opens:
            reassembly.discard((session, counter))
        assert reassembly.cost >= len(reassembly) * RECORD_COST
        assert reassembly.cost <= TOTAL_BYTES
        assert all(len(waiting.candidates) <= 2 for waiting in reassembly.records.values())
    reassembly.expire(now + LIFETIME)
    assert len(reassembly) == reassembly.cost == 0
    assert not reassembly._sessions
