"""Optima of the placements that the benchmark compares with, found by `make exact-sched` and kept as figures.

A row is one placement. It is tried in up to three ways, each of which is kept under its own name:

- `solver`: HiGHS, the problem as it stands;
- `search`: where that did not finish and there are capacities, our own branch and bound, with more work than
  the scheduler gives it;
- `reduced`: then HiGHS again, without what cannot be in an answer better than the one that the search found.

`mean_ms` and `bound_ms` are the best of all, `optimal` says whether these meet (to 0.01 %), `by` which way
settled it. `input` is what was solved; a row whose input is another one by now is solved again, and a way
that a row has already is not gone again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from exact import GAP, Exact, exact
from numpy.typing import NDArray

from crossedge.sched.completion import completed
from crossedge.sched.matrix import LatencyMatrix, State
from crossedge.sched.placement import UNKNOWN_MS, Problem, place

Floats = NDArray[np.float64]
Row = dict[str, Any]
OPTIMA = Path(__file__).with_name("optima.json")
REPLICAS = (3, 5, 8, 20)
EFFORT = 20.0  # of our own branch and bound, over what the scheduler spends
WAYS = {"solver": "HiGHS", "search": "branch and bound", "reduced": "HiGHS, reduced"}


def whole(matrix: LatencyMatrix) -> LatencyMatrix:
    """Return the matrix that is solved: all its pairs have a number, and each counts as measured."""
    rtt = np.nan_to_num(completed(matrix, np.random.default_rng(0)).matrix.rtt, nan=UNKNOWN_MS)
    state = np.where(np.eye(len(rtt), dtype=bool), matrix.state, np.uint8(State.MEASURED))
    return LatencyMatrix(matrix.names, rtt, state, np.ones_like(rtt))


def input_of(matrix: LatencyMatrix, filled: LatencyMatrix, capacities: Floats | None, replicas: int) -> str:
    """Return a short hash of what was measured and asked, and the sum of the matrix as it was completed.

    The sum has six digits: a completed matrix may differ in the last bits between machines.
    """
    asked = f"{replicas} {'' if capacities is None else capacities.tolist()}"
    content = np.nan_to_num(matrix.rtt, nan=-1.0).tobytes() + matrix.measured.tobytes() + asked.encode()
    return f"{sha256(content).hexdigest()[:16]}-{filled.rtt.sum():.6g}"


def capacities_of(kind: str, nodes: int, replicas: int) -> Floats | None:
    """Return 1.2 times an even share, rounded up, for each node; None for kind "free"."""
    return np.full(nodes, np.ceil(1.2 * nodes / replicas)) if kind == "capacitated" else None


def by_solver(rtt: Floats, replicas: int, capacities: Floats | None, limit: float, row: Row) -> Row:
    """Solve by HiGHS, as it stands or, where the row has the search's answer, reduced."""
    n, known = len(rtt), None
    if "search" in row:
        known = np.array(row["search"]["nodes"]), row["search"]["mean_ms"] * n
    found: Exact = exact(rtt, np.ones(n), replicas, capacities, limit, known)
    return {
        "mean_ms": found.total / n if np.isfinite(found.total) else None,
        "bound_ms": max(found.bound, 0.0) / n if np.isfinite(found.bound) else None,
        "finished": found.finished,
        "seconds": round(found.seconds, 2),
    }


def by_search(rtt: Floats, replicas: int, capacities: Floats | None, _: float, __: Row) -> Row:
    """Search by our own branch and bound."""
    start = time.perf_counter()
    problem = Problem(rtt, np.ones(len(rtt)), replicas, capacities)
    ours = place(problem, np.random.default_rng(0), effort=EFFORT)
    return {
        "mean_ms": ours.mean_ms,
        "bound_ms": ours.bound_ms,
        "finished": ours.gap <= 2 * GAP,
        "seconds": round(time.perf_counter() - start, 2),
        "nodes": ours.nodes.tolist(),
    }


Way = Callable[[Floats, int, Floats | None, float, Row], Row]
STEPS: dict[str, Way] = {"solver": by_solver, "search": by_search, "reduced": by_solver}


def missing(row: Row, kind: str) -> list[str]:
    """Return the ways that a row still has to be tried in."""
    if "solver" in row and (row["solver"]["finished"] or kind == "free"):
        return []
    if kind == "free":
        return ["solver"]
    done = {way for way in STEPS if way in row}
    if "reduced" not in done and "nodes" not in row.get("search", {}):
        done.discard("search")  # the reduced problem is made of its answer
    return [way for way in STEPS if way not in done]


def settled(row: Row) -> Row:
    """Return the row with the best of what its ways found, and what that proves."""
    ways = {way: row[way] for way in STEPS if way in row}
    mean = min(said["mean_ms"] for said in ways.values() if said["mean_ms"] is not None)
    bound = max(said["bound_ms"] for said in ways.values() if said["bound_ms"] is not None)
    # HiGHS says of the reduced problem what an answer better than the search's would cost, so no more than it
    bound = min(bound, mean)
    finished = [way for way, said in ways.items() if said["finished"]]
    nearest = max(ways, key=lambda way: ways[way]["bound_ms"] or 0.0)
    by = finished[0] if finished else nearest
    facts = {
        "mean_ms": mean,
        "bound_ms": bound,
        "optimal": bound >= mean * (1.0 - 2 * GAP),
        "by": WAYS[by],
        "proven_by": [WAYS[way] for way in finished],
    }
    return {"input": row["input"]} | facts | ways


def solve_all(
    matrices: dict[str, LatencyMatrix], limit: float, file: Path, rows: str = "*", ways: str = "*"
) -> None:
    """Solve what the file does not have, the quick ones first; each result is written at once.

    Args:
        matrices: by name.
        limit: seconds for HiGHS, each time.
        file: the figures, read and written.
        rows: pattern of the rows to look at, such as "planetlab490-9.capacitated.*".
        ways: pattern of the ways to go.
    """
    known: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    filled = {name: whole(matrix) for name, matrix in matrices.items()}
    tasks = []
    for kind in ("free", "capacitated"):
        for name in sorted(matrices, key=lambda item: (matrices[item].size, item)):
            for p in (p for p in REPLICAS if p < matrices[name].size):
                key, capacities = f"{name}.{kind}.p{p}", capacities_of(kind, matrices[name].size, p)
                given = input_of(matrices[name], filled[name], capacities, p)
                if known.get(key, {}).get("input") != given:
                    known[key] = {"input": given}
                wanted = [
                    way for way in missing(known[key], kind) if fnmatch(key, rows) and fnmatch(way, ways)
                ]
                tasks += [(key, way, filled[name].rtt, p, capacities) for way in wanted]
    print(f"{len(tasks)} to go, at most {limit:g} s each by HiGHS", file=sys.stderr, flush=True)
    for number, (key, way, rtt, p, capacities) in enumerate(tasks, 1):
        row = known[key]
        if way not in missing(row, key.split(".")[1]):  # settled meanwhile
            continue
        print(f"[{number}/{len(tasks)}] {key} by {WAYS[way]} ...", end=" ", file=sys.stderr, flush=True)
        row[way] = STEPS[way](rtt, p, capacities, limit, row if way == "reduced" else {})
        known[key] = row = settled(row)
        said = row[way]
        verdict = "optimal" if said["finished"] else f"not finished, bound {said['bound_ms']}"
        print(f"{said['mean_ms']} ms, {verdict}, {said['seconds']:.0f} s", file=sys.stderr, flush=True)
        kept = {name: held for name, held in known.items() if len(held) > 1}
        file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
