"""Measure the probing against its bars: `make bench-latency` writes build/bench/latency.json.

What one measurement of a pair costs is taken from whole nodes in the in-memory internet, with UDP and IP
headers, for each kind of pair; then 1,000 probers run for half an hour of virtual time. Real matrices come
from the folder that CROSSEDGE_DATA names; without it generated ones are used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
from figures import Figures
from matrices import generated
from numpy.typing import NDArray
from schedparts import PEERS
from simworld import SimNode, SimWorld

from crossedge.lab.hosts import Packet
from crossedge.lab.probing import ProbingSim, quantile
from crossedge.latency.feed import Feed
from crossedge.latency.prober import IN_FLIGHT
from crossedge.latency.report import Pair, PairState, Report
from crossedge.sched.completion import completed
from crossedge.sched.files import read_matrix
from crossedge.sched.matrix import LatencyMatrix, State, restricted, sampled_peers, symmetrised
from crossedge.sched.medoids import assigned
from crossedge.sched.services import View

NODES = 1000
FIRST, STEADY = 600.0, 1200.0  # seconds of virtual time
MATRICES = {
    "wondernetwork217": "wondernetwork217/wonderproxy.csv",
    "planetlab490-1": "planetlab490/PlanetLabData_1.tsv.gz",
}
HARD, EASY = "symmetric-random", "port-restricted"
MIX = {"direct": 0.6, "relayed": 0.3, "unreachable": 0.1}
"""Of the pairs at 1,000 nodes: worse than any published share of direct pairs."""
TCP_IP = 12 * 52 + 200
"""Bytes of one report besides itself: the packets of a short TCP connection, both ways, and HTTP's heads."""


def pair_costs() -> dict[str, tuple[float, float]]:
    """Return by kind of pair the bytes, sent and received, of who begins a measurement and of the other."""
    costs = {}
    for kind, (left, right) in {
        "direct": (EASY, EASY),
        "relayed": (HARD, HARD),
        "unreachable": (EASY, EASY),
    }.items():
        found = []
        for seed in range(10):
            world = SimWorld(seed, measure=True)
            a, b = world.node("a", left), world.node("b", right)
            world.settle()
            world.run(30.0)
            for node in (a, b):
                node.mesh.latency.prober.restart(world.net.now + 1e6)
                node.mesh.reach.deadline = (
                    math.inf
                )  # among many nodes measurements prove that somebody is reached
            world.run(60.0)
            if kind == "unreachable":
                b.kill()
            spent: Counter[str] = Counter()

            def watch(packet: Packet, _: float, spent: Counter[str] = spent, world: SimWorld = world) -> None:
                spent[packet.origin.name] += packet.size
                target = world.net.public.get(packet.destination[0])
                if target is not None:
                    spent["router " + target.name] += packet.size

            def total(node: SimNode, spent: Counter[str] = spent) -> int:
                router = node.host.above
                return spent[node.name] + (0 if router is None else spent["router " + router.name])

            world.net.watchers.append(watch)
            world.run(50.0)
            kept = total(a), total(b)
            a.mesh.latency.prober.restart(world.net.now)
            world.run(50.0)  # one that fails is tried again within 30 s, once before its interval
            tries = 2 if kind == "unreachable" else 1
            found.append(((total(a) - 2 * kept[0]) / tries, (total(b) - 2 * kept[1]) / tries))
        costs[kind] = (float(np.mean([one for one, _ in found])), float(np.mean([two for _, two in found])))
    return costs


def report_bytes() -> float:
    """Return the bytes per second of reports about 32 pairs, one in 20 of them changed or due each time."""
    world = SimWorld(1)
    node = world.node("node-with-a-usual-name")
    pair = Pair(bytes(16), PairState.DIRECT, 0.02, 0.02, 0.001, 0.0, 64)
    sizes = []
    for count, base in ((32, 0), (3, 1)):
        report = Report(
            certificate=node.certificate,
            epoch=bytes(8),
            seq=2,
            base=base,
            issued=1_760_000_000,
            pairs=tuple(replace(pair, peer=bytes([number]) * 16) for number in range(1, count + 1)),
            coordinates=node.mesh.latency.vivaldi.place,
        )
        sizes.append(len(report.sign(node.signing).encode()) + TCP_IP)
    return (sizes[0] + 19 * sizes[1]) / 300


def ask(sim: ProbingSim, rtt: NDArray[np.float64], points: NDArray[np.float64]) -> None:
    """Let a scheduler that sees six groups tell every node whom to measure."""
    labels = (np.arctan2(points[:, 1], points[:, 0]) // (np.pi / 3)).astype(np.int64) + 3
    names = tuple(map(str, range(NODES)))
    index = {name: number for number, name in enumerate(names)}
    there, nothing = np.ones(NODES, dtype=bool), np.zeros_like(rtt)
    view = View(1, 0.0, names, there, rtt, nothing.astype(np.uint8), nothing, labels, points, index)
    for name, peers in assigned(view, 1).items():
        sim.nodes[index[name]].prober.ask("scheduler", [sim.ids[index[peer]] for peer in peers], sim.now)


def measure_cost(figures: Figures) -> None:
    """Bytes per second and bursts in flight at 1,000 nodes."""
    costs = pair_costs()
    for kind, (mine, other) in costs.items():
        figures.add(f"probing.pair_{kind}_bytes_opener", mine)
        figures.add(f"probing.pair_{kind}_bytes_other", other)
    rng = np.random.default_rng(1)
    points = rng.normal(0.0, 40.0, (NODES, 2))
    access = rng.exponential(3.0, NODES) + 0.5
    kinds = rng.choice(list(MIX), (NODES, NODES), p=list(MIX.values()))

    def kind_of(a: int, b: int) -> str:
        return str(kinds[min(a, b), max(a, b)])

    def rtt(a: int, b: int) -> float | None:
        if kind_of(a, b) == "unreachable":
            return None
        return float(np.hypot(*(points[a] - points[b])) + access[a] + access[b])

    sim = ProbingSim(rtt, NODES, lambda a, b: costs[kind_of(a, b)])
    sim.run(FIRST)
    ask(sim, np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)), points)
    first = [node.spent / FIRST for node in sim.nodes]
    for node in sim.nodes:
        node.spent = 0.0
    sim.run(STEADY)
    reports = report_bytes()
    spent = [node.spent / STEADY for node in sim.nodes]
    figures.add("probing.reports_bytes_per_s", reports)
    figures.add("probing.bytes_per_s_mean", float(np.mean(spent)) + reports, "<= 1000")
    figures.add("probing.bytes_per_s_worst_node", max(spent) + reports, "<= 1000")
    figures.add("probing.bytes_per_s_first_10_min", float(np.mean(first)) + reports, "<= 1000")
    figures.add("probing.in_flight_most", max(node.most_in_flight for node in sim.nodes), f"<= {IN_FLIGHT}")
    figures.add("probing.interval_s", sim.nodes[0].prober.interval)
    ages = [sim.now - when for node in sim.nodes for when in node.measured.values()]
    figures.add("probing.age_median_s", quantile(ages, 0.5))
    figures.add("probing.pairs_per_node", len(ages) / NODES)


def answers(matrix: LatencyMatrix, dead: Collection[int] = ()) -> Callable[[int, int], float | None]:
    """Return what tells of a pair its measured RTT, None where there is none or one of the two is dead."""

    def rtt(a: int, b: int) -> float | None:
        there = matrix.measured[a, b] and a not in dead and b not in dead
        return float(matrix.rtt[a, b]) if there else None

    return rtt


def measure_completion(figures: Figures, matrices: dict[str, LatencyMatrix], seeds: int) -> None:
    """The matrix completed from the pairs that probers chose, beside that from pairs chosen at random."""
    for name, matrix in matrices.items():
        rows: dict[str, list[tuple[float, float]]] = {"ours": [], "random": []}
        degree = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            mask = np.zeros((matrix.size, matrix.size), dtype=bool)
            sim = ProbingSim(
                answers(matrix),
                matrix.size,
                lambda _, __: (0.0, 0.0),
                seed + 1,
            )
            sim.run(1800.0)
            for node, peer in sim.pairs():
                mask[node, peer] = True
            degree.append((mask | mask.T).sum() / matrix.size)
            for kind, chosen in (("ours", mask), ("random", sampled_peers(matrix.size, PEERS, rng))):
                result = completed(restricted(matrix, chosen), rng)
                hidden = np.triu(result.matrix.state == State.ESTIMATED, 1) & matrix.measured
                error = np.abs(result.matrix.rtt - matrix.rtt)[hidden] / matrix.rtt[hidden]
                rows[kind].append((float(np.median(error)), float(np.quantile(error, 0.9))))
        figures.add(f"probing.{name}.pairs_per_node", float(np.mean(degree)))
        for kind, errors in rows.items():
            median, tail = np.median(np.array(errors), axis=0)
            ours = kind == "ours"
            figures.add(f"probing.{name}.{kind}_median_error", float(median), "<= 0.08" if ours else "")
            figures.add(f"probing.{name}.{kind}_p90_error", float(tail), "<= 0.40" if ours else "")
        dead = set(np.random.default_rng(1).choice(matrix.size, matrix.size // 10, replace=False).tolist())
        sim = ProbingSim(
            answers(matrix, dead),
            matrix.size,
            lambda _, __: (0.0, 0.0),
        )
        sim.run(1800.0)
        rtt = np.full_like(matrix.rtt, np.nan)
        silent = np.zeros((matrix.size, matrix.size), dtype=bool)
        for node, peer in sim.pairs():
            rtt[node, peer] = matrix.rtt[node, peer]
        for node, peer in sim.silences():
            silent[node, peer] = True
        result = completed(symmetrised(matrix.names, rtt, silent), np.random.default_rng(1))
        touched = np.zeros((matrix.size, matrix.size), dtype=bool)
        touched[list(dead)], touched[:, list(dead)] = True, True
        np.fill_diagonal(touched, False)
        figures.add(f"probing.{name}.invented", int((touched & result.matrix.known).sum()), "== 0")


def measure_feed(figures: Figures) -> None:
    """What a report costs the scheduler: verified, decoded and laid over the last."""
    world = SimWorld(1)
    node = world.node("node")
    feed = Feed(world.ca.public)
    reports = []
    for seq in range(1, 201):
        pairs = tuple(
            Pair(bytes([number]) * 16, PairState.DIRECT, 0.02, 0.02, 0.001, 0.0, 64)
            for number in range(1, 33 if seq == 1 else 9)
        )
        report = Report(
            certificate=node.certificate,
            epoch=bytes(8),
            seq=seq,
            base=seq - 1,
            issued=1_760_000_000,
            pairs=pairs,
        )
        reports.append(report.sign(node.signing).encode())
    start = perf_counter()
    for encoded in reports:
        feed.apply(encoded, 0.0, 1_760_000_000)
    each = (perf_counter() - start) / len(reports)
    figures.add("reports.apply_us", each * 1e6)
    figures.add("reports.core_share_1000_nodes_15_s", each * 1000 / 15, "<= 0.5")


def main() -> None:
    """Write the figures; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("cost", "completion", "feed"), help="measure one part")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of the completion")
    parser.add_argument("--output", type=Path, default=Path("build/bench/latency.json"))
    given = parser.parse_args()
    data = os.environ.get("CROSSEDGE_DATA")
    rng = np.random.default_rng(0)
    matrices = {
        name: read_matrix(Path(data) / file)
        if data
        else generated(int(name[-3:] if "-" not in name else 490), rng)
        for name, file in MATRICES.items()
    }
    figures = Figures()
    if given.only in (None, "feed"):
        measure_feed(figures)
    if given.only in (None, "cost"):
        measure_cost(figures)
    if given.only in (None, "completion"):
        measure_completion(figures, matrices, given.seeds)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(figures.rows, indent=2))
    raise SystemExit(any(not row.get("holds", True) for row in figures.rows.values()))


if __name__ == "__main__":
    main()
