"""What two NAT verdicts lead to: who opens sockets, who tries ports, who begins, and when nothing helps."""

from __future__ import annotations

from itertools import product

import pytest

from crossedge.lab.natkinds import kind
from crossedge.meshd.natplan import Method, Nature, Plan, Role, nature, plan
from crossedge.wire.record import NatVerdict
from tests.natmatrix import NAMES, punchable, report

BEGINS = {(Role.LEADER, Role.FOLLOWER), (Role.OPENER, Role.PROBER)}


def both(a: NatVerdict, b: NatVerdict) -> tuple[Plan, Plan]:
    return plan(a, b, leads=True), plan(b, a, leads=False)


@pytest.mark.parametrize(("a", "b"), list(product(NAMES, NAMES)))
def test_both_sides_of_every_pair_agree_and_one_of_them_begins(a: str, b: str) -> None:
    ours, theirs = both(report(a).verdict, report(b).verdict)
    assert ours.method is theirs.method
    assert ours.likely is theirs.likely
    assert (ours.role, theirs.role) in BEGINS or (theirs.role, ours.role) in BEGINS
    assert ours.begins is not theirs.begins


@pytest.mark.parametrize(("a", "b"), list(product(NAMES, NAMES)))
def test_known_ports_are_tried_where_theory_says_that_they_do(a: str, b: str) -> None:
    ours, _ = both(report(a).verdict, report(b).verdict)
    assert ours.likely is punchable(kind(a), kind(b))


@pytest.mark.parametrize(
    ("a", "b", "method"),
    [
        ("port-restricted", "symmetric-sequential", Method.PREDICT),
        ("port-restricted", "symmetric-random", Method.SPRAY),
        ("restricted-cone", "symmetric-random", Method.FRESH),
        ("symmetric-sequential", "symmetric-busy", Method.PREDICT),
        ("address-symmetric", "symmetric-random", Method.PREDICT),
        ("symmetric-sequential", "symmetric-random", Method.NONE),
        ("symmetric-random", "corporate", Method.NONE),
    ],
)
def test_way_follows_from_both_nats(a: str, b: str, method: Method) -> None:
    assert plan(report(a).verdict, report(b).verdict, leads=True).method is method


def test_opener_is_the_hard_side_whoever_leads() -> None:
    easy, hard = report("port-restricted").verdict, report("symmetric-random").verdict
    for leads in (True, False):
        assert plan(hard, easy, leads=leads).role is Role.OPENER
        assert plan(easy, hard, leads=leads).role is Role.PROBER


def test_nat_that_was_not_measured_counts_as_easy() -> None:
    assert nature(NatVerdict()) is Nature.EASY
    assert plan(NatVerdict(), NatVerdict(), leads=True) == Plan(Method.FRESH, Role.LEADER)


def test_reason_names_whose_nat_it_is() -> None:
    ours, theirs = both(report("symmetric-random").verdict, report("linux").verdict)
    assert ours.reason == "our NAT gives each destination another port, random"
    assert theirs.reason == "the peer's NAT gives each destination another port, random"
