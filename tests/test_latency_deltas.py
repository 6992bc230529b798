"""Delta-coded reports end in the receiver's state being the sender's, whatever is lost on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crossedge.lab.chance import Chance
from crossedge.latency.deltas import FULL_AGAIN, Deltas, changed
from crossedge.latency.feed import Applied, Feed, NeedsFull
from crossedge.latency.report import Pair, PairState, Report
from tests.test_latency_report import CA, NODE, NOW, certificate

PAIR = Pair(b"\x01" * 16, PairState.DIRECT, 0.020, 0.022, 0.001, 0.0, 64, 0.0)
CERTIFICATE = certificate()


def encoded(deltas: Deltas, seq: int, pairs: list[Pair], now: float) -> bytes:
    draft = deltas.draft(seq, pairs, now)
    return (
        Report(
            certificate=CERTIFICATE,
            epoch=b"instance",
            seq=seq,
            base=draft.base,
            issued=NOW,
            pairs=draft.pairs,
        )
        .sign(NODE)
        .encode()
    )


@pytest.mark.parametrize("seed", range(5))
def test_receiver_has_the_senders_state_though_reports_and_answers_are_lost(seed: int) -> None:
    chance = Chance(seed)
    deltas, feed = Deltas(), Feed(CA.public)
    state: dict[bytes, Pair] = {}
    now = 0.0
    for seq in range(1, 150):
        now += 5.0
        for _ in range(3):
            peer = bytes([int(chance.uniform() * 12)]) * 16
            draw = chance.uniform()
            if draw < 0.2:
                state.pop(peer, None)
            elif draw < 0.4:
                state[peer] = Pair(peer, PairState.UNREACHABLE)
            else:
                state[peer] = replace(
                    PAIR, peer=peer, minimum=round(0.01 * 1.05 ** int(100 * chance.uniform()), 6)
                )
        if chance.uniform() < 0.02:
            feed.drop(CERTIFICATE.node_id)  # the scheduler was started again
        report = encoded(deltas, seq, list(state.values()), now)
        if chance.uniform() < 0.3:
            continue
        answer = feed.apply(report, now, NOW)
        if isinstance(answer, NeedsFull):
            deltas.start_over()
            continue
        if chance.uniform() < 0.7:
            deltas.acknowledged(seq)
        held = feed.nodes[CERTIFICATE.node_id].pairs
        assert {(pair.peer, pair.state, pair.minimum) for pair in held.values()} == {
            (pair.peer, pair.state, pair.minimum) for pair in state.values()
        }


def test_what_stays_the_same_is_not_said_again_until_it_is_due() -> None:
    deltas = Deltas()
    assert deltas.draft(1, [PAIR], 0.0).base == 0
    deltas.acknowledged(1)
    assert deltas.draft(2, [replace(PAIR, age=15.0)], 15.0).pairs == ()
    fresh = replace(PAIR, smoothed=0.0223, age=5.0)
    assert deltas.draft(3, [fresh], 30.0).pairs == ()
    assert deltas.draft(4, [fresh], 70.0).pairs == (fresh,)
    assert deltas.draft(5, [replace(PAIR, age=FULL_AGAIN)], FULL_AGAIN).base == 0


def test_small_report_is_small() -> None:
    deltas, feed = Deltas(), Feed(CA.public)
    pairs = [replace(PAIR, peer=bytes([number]) * 16) for number in range(1, 33)]
    full = encoded(deltas, 1, pairs, 0.0)
    assert isinstance(feed.apply(full, 0.0, NOW), Applied)
    deltas.acknowledged(1)
    slower = [replace(pairs[0], minimum=0.030), *pairs[1:]]
    small = encoded(deltas, 2, slower, 15.0)
    assert isinstance(feed.apply(small, 15.0, NOW), Applied)
    assert len(full) < 1600
    assert len(small) < 400


@pytest.mark.parametrize(
    ("new", "worth"),
    [
        (replace(PAIR, minimum=0.02015), False),
        (replace(PAIR, minimum=0.02025), True),
        (replace(PAIR, smoothed=0.0239), False),
        (replace(PAIR, smoothed=0.0245), True),
        (replace(PAIR, deviation=0.0035), True),
        (replace(PAIR, loss=0.02), False),
        (replace(PAIR, loss=0.04), True),
        (replace(PAIR, loss=None), True),
        (replace(PAIR, age=99.0), False),
        (Pair(PAIR.peer, PairState.UNREACHABLE, loss=0.0), True),
        (replace(PAIR, state=PairState.RELAYED), True),
    ],
)
def test_which_changes_are_worth_a_word(new: Pair, worth: bool) -> None:
    assert changed(PAIR, new) is worth
