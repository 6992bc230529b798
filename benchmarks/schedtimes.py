"""How long groups and placements take; each alone, so on a machine that is otherwise quiet."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from figures import Figures
from matrices import apart, generated, many_points
from numpy.typing import NDArray
from schedparts import PEERS, Bench

from crossedge.sched.coordinates import fit
from crossedge.sched.groups import grouped
from crossedge.sched.placement import Problem, place
from crossedge.sched.sparse import grouped_sparse

Floats = NDArray[np.float64]


def timed(figures: Figures, name: str, bar: str, action: Callable[[], object], repeats: int = 3) -> None:
    """Add the least wall seconds of some runs, and processor seconds: they differ on a busy machine."""
    wall = processor = np.inf
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        action()
        wall, processor = min(wall, time.perf_counter() - start), min(processor, time.process_time() - used)
    figures.add(f"time.{name}_s", wall, bar)
    figures.add(f"time.{name}_processor_s", processor)


def measure_time(figures: Figures, bench: Bench) -> None:
    """Groups for 500, 2,000 and 10,000 nodes, and a placement among 2,000."""
    points, rng = many_points(bench.data, bench.rng()), bench.rng(1)
    for n, limit in ((500, 1), (2000, 5)):
        chosen = points[rng.choice(len(points), n, replace=False)]
        for kind, rtt in (("caida", apart(chosen)), ("regions", generated(n, rng).rtt)):
            timed(figures, f"groups_{n}_{kind}", f"<= {limit}", lambda rtt=rtt: grouped(rtt))
            if n == 2000:
                measure_time_of_placement(figures, kind, rtt, bench)
    n = 10_000
    chosen = points[rng.choice(len(points), n, replace=False)]
    rows = np.repeat(np.arange(n), PEERS)
    columns = rng.integers(0, n - 1, len(rows))
    columns += columns >= rows
    key = np.unique(np.minimum(rows, columns) * n + np.maximum(rows, columns))
    rows, columns = key // n, key % n
    rtt = np.sqrt(((chosen[rows] - chosen[columns]) ** 2).sum(1)) + 0.1
    grouping = []

    def sparsely() -> None:
        coordinates = fit(n, rows, columns, rtt, rng)
        grouping.append(grouped_sparse(coordinates, (rows, columns, rtt), rng))

    timed(figures, "groups_10000_sparse_with_coordinates", "<= 60", sparsely, repeats=1)
    figures.add("time.groups_10000_sparse_k", grouping[0].k)


def measure_time_of_placement(figures: Figures, kind: str, rtt: Floats, bench: Bench) -> None:
    """Time the placement of 20 replicas, without capacities and (for information) with them."""
    n = len(rtt)
    limits = np.full(n, np.ceil(1.2 * n / 20))
    for label, problem in (
        ("", Problem(rtt, np.ones(n), 20)),
        ("_capacitated", Problem(rtt, np.ones(n), 20, limits)),
    ):
        placed = []
        timed(
            figures,
            f"placement_20_of_2000_{kind}{label}",
            "" if label else "<= 2",
            lambda problem=problem, placed=placed: placed.append(place(problem, bench.rng())),
            repeats=1 if label else 3,
        )
        figures.add(f"time.placement_20_of_2000_{kind}{label}_gap", placed[0].gap)
