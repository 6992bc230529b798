"""Vivaldi: nodes find their places from their own measurements, and liars cannot carry them off."""

from __future__ import annotations

import math

import pytest

from crossedge.lab.chance import Chance
from crossedge.latency.coordinates import STEP_MAX, Vivaldi, distance
from crossedge.latency.report import Coordinates

NODES, PEERS, ROUNDS = 60, 16, 40


def world(seed: int) -> list[list[float]]:
    """Return the RTTs of nodes on a plane behind access links, in milliseconds, with 10 % of noise."""
    chance = Chance(seed)
    places = [(150 * chance.uniform(), 80 * chance.uniform(), 1 + 9 * chance.uniform()) for _ in range(NODES)]
    rtts = [[0.0] * NODES for _ in range(NODES)]
    for row, (x, y, access) in enumerate(places):
        for column, (u, v, other) in enumerate(places[:row]):
            noise = 0.95 + 0.1 * chance.uniform()
            rtts[row][column] = rtts[column][row] = (math.hypot(x - u, y - v) + access + other) * noise
    return rtts


def converge(rtts: list[list[float]], liars: set[int], seed: int) -> list[Vivaldi]:
    chance = Chance(seed)
    nodes = [Vivaldi(chance.fork(f"{number}").token) for number in range(NODES)]
    peers = [
        sorted({int(chance.uniform() * NODES) for _ in range(PEERS)} - {number}) for number in range(NODES)
    ]
    for _ in range(ROUNDS):
        for number, node in enumerate(nodes):
            for peer in peers[number]:
                said = nodes[peer].place
                if peer in liars:
                    said = Coordinates(tuple(9e4 * (chance.uniform() - 0.5) for _ in range(8)), 0.01, 0.0)
                if number not in liars:
                    node.update(rtts[number][peer], said)
    return nodes


def median_error(nodes: list[Vivaldi], rtts: list[list[float]], honest: list[int]) -> float:
    errors = sorted(
        abs(distance(nodes[a].place, nodes[b].place) - rtts[a][b]) / rtts[a][b]
        for a in honest
        for b in honest
        if a < b
    )
    return errors[len(errors) // 2]


def test_pairs_that_were_never_measured_are_estimated_well() -> None:
    rtts = world(1)
    nodes = converge(rtts, set(), 2)
    assert median_error(nodes, rtts, list(range(NODES))) < 0.08
    assert max(node.place.error for node in nodes) < 0.3


def test_liars_among_the_peers_cost_accuracy_and_not_the_map() -> None:
    rtts, liars = world(1), set(range(0, NODES, 7))  # 15 %
    nodes = converge(rtts, liars, 2)
    honest = [number for number in range(NODES) if number not in liars]
    assert median_error(nodes, rtts, honest) < 0.25
    assert all(math.hypot(*nodes[number].place.point) < 1000 for number in honest)


def test_one_sample_moves_a_node_by_a_bounded_step() -> None:
    node = Vivaldi(Chance(1).token)
    for far in (1e5, -1e5):
        before = node.place
        node.update(10.0, Coordinates((far, *(0.0,) * 7), 0.0, 0.0))
        moved = math.dist(before.point, node.place.point) + abs(before.height - node.place.height)
        assert moved <= STEP_MAX * 1.001


@pytest.mark.parametrize("rtt", [0.0, -1.0, 60_001.0, float("nan"), float("inf")])
def test_what_is_no_rtt_is_ignored(rtt: float) -> None:
    node = Vivaldi(Chance(1).token)
    before = node.place
    node.update(rtt, Coordinates((1.0,) * 8, 1.0, 0.5))
    assert node.place == before


def test_nodes_at_the_same_place_part() -> None:
    a, b = Vivaldi(Chance(1).token), Vivaldi(Chance(2).token)
    for _ in range(60):
        a.update(20.0, b.place)
        b.update(20.0, a.place)
    assert distance(a.place, b.place) == pytest.approx(20.0, rel=0.1)
