"""Optima of the placements that the benchmark compares with, found by `make exact-sched` and kept as figures.

Each is solved by HiGHS as it stands; where that does not finish in time and there are capacities, again with
the problem reduced; and where that does not either, by our own branch and bound with more time than the
scheduler gives it. What the file says of each: the best mean known, the best bound proven, whether they meet
(to 0.01 %), by which way, and what HiGHS alone said.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from exact import GAP, exact
from numpy.typing import NDArray

from crossedge.sched.completion import completed
from crossedge.sched.matrix import LatencyMatrix
from crossedge.sched.placement import UNKNOWN_MS, Problem, place

Floats = NDArray[np.float64]
OPTIMA = Path(__file__).with_name("optima.json")
REPLICAS = (3, 5, 8, 20)
EFFORT = 60.0  # of our own branch and bound, over what the scheduler spends


def solve(rtt: Floats, replicas: int, capacities: Floats | None, limit: float) -> dict[str, Any]:
    """Return the figures of one placement, every node one user."""
    n = len(rtt)
    weights = np.ones(n)
    solver = exact(rtt, weights, replicas, capacities, limit)
    figures: dict[str, Any] = {
        "mean_ms": solver.total / n,
        "bound_ms": solver.bound / n,
        "optimal": solver.finished,
        "by": "HiGHS",
        "seconds": solver.seconds,
        "solver": {"mean_ms": solver.total / n, "bound_ms": solver.bound / n, "seconds": solver.seconds},
    }
    if solver.finished or capacities is None:
        return figures
    start = time.perf_counter()
    ours = place(Problem(rtt, weights, replicas, capacities), np.random.default_rng(0), effort=EFFORT)
    figures = take(figures, ours.mean_ms, ours.bound_ms, "branch and bound", time.perf_counter() - start)
    helped = exact(rtt, weights, replicas, capacities, limit, (ours.nodes, ours.mean_ms * n))
    figures["reduced"] = {
        "mean_ms": helped.total / n if np.isfinite(helped.total) else None,
        "bound_ms": helped.bound / n,
        "finished": helped.finished,
        "seconds": helped.seconds,
    }
    by = "HiGHS, reduced" if helped.finished else figures["by"]
    return take(figures, helped.total / n, helped.bound / n, by, helped.seconds)


def take(figures: dict[str, Any], mean: float, bound: float, by: str, seconds: float) -> dict[str, Any]:
    """Return the figures with what another way found, where it is better."""
    best, proven = min(figures["mean_ms"], mean), max(figures["bound_ms"], bound)
    optimal = proven >= best * (1.0 - 2 * GAP)
    fresh = {"mean_ms": best, "bound_ms": min(best, proven), "optimal": optimal, "by": by, "seconds": seconds}
    return figures | fresh


def solve_all(matrices: dict[str, LatencyMatrix], limit: float, file: Path) -> None:
    """Solve what the file does not have, the quick ones first; each result is written at once."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    tasks = [
        (name, kind, p)
        for kind in ("free", "capacitated")
        for name in sorted(matrices, key=lambda item: matrices[item].size)
        for p in REPLICAS
        if p < matrices[name].size and f"{name}.{kind}.p{p}" not in known
    ]
    for name, kind, p in tasks:
        rtt = completed(matrices[name], np.random.default_rng(0)).matrix.rtt
        capacities = np.full(len(rtt), np.ceil(1.2 * len(rtt) / p)) if kind == "capacitated" else None
        known[f"{name}.{kind}.p{p}"] = solve(np.nan_to_num(rtt, nan=UNKNOWN_MS), p, capacities, limit)
        print(f"{name}.{kind}.p{p}", known[f"{name}.{kind}.p{p}"], flush=True)
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
