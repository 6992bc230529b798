"""A seeded part of the matrix that `make nat-matrix` runs in full: each pair is direct, or says why not."""

from __future__ import annotations

import pytest

from crossedge.lab.natkinds import kind
from crossedge.meshd.latertries import SPRAY_PROBES, SPRAY_SOCKETS
from tests.natmatrix import HORIZON, NAMES, Row, meet, pairs, punchable

SEEDS = (1, 2)
NEVER = [("symmetric-sequential", "symmetric-random"), ("symmetric-random", "corporate")]


def check(row: Row) -> None:
    for outcome in row.outcomes:
        if row.theory:
            assert outcome.direct, outcome
        assert outcome.direct or (outcome.relayed and outcome.why and outcome.seconds <= HORIZON), outcome
        assert outcome.packets <= 2 * (SPRAY_SOCKETS + SPRAY_PROBES) + 200, outcome


@pytest.mark.parametrize("a", NAMES)
def test_pairs_of_a_kind_are_direct_or_say_why_not(a: str) -> None:
    for one, two in pairs():
        if one == a:
            check(meet(one, two, SEEDS))


@pytest.mark.parametrize(("a", "b"), NEVER)
def test_pair_that_nothing_helps_gives_up_soon_and_cheaply(a: str, b: str) -> None:
    for outcome in meet(a, b, SEEDS).outcomes:
        assert not outcome.direct
        assert outcome.relayed
        assert "again when a network changes; our NAT gives each destination another port" in outcome.why
        assert outcome.seconds < 3.0
        assert outcome.packets < 40


def test_theory_knows_the_pairs_of_rfc_4787() -> None:
    def works(a: str, b: str) -> bool:
        return punchable(kind(a), kind(b))

    assert works("port-restricted", "port-restricted")
    assert works("restricted-cone", "symmetric-random")
    assert works("linux", "linux")
    assert not works("port-restricted", "symmetric-sequential")
    assert not works("address-symmetric", "address-symmetric")
    assert not works("linux", "linux-random")
