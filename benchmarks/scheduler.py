"""Measure the scheduler against its bars: `make bench-sched` writes build/bench/sched.json.

Real matrices come from the folder that CROSSEDGE_DATA names. Without it matrices of the same sizes are
generated; the bars were set for the real ones. `--exact SECONDS` solves the placements exactly (HiGHS) into
build/bench/sched-exact.json, which later runs read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exact import exact
from numpy.typing import NDArray
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from crossedge.sched.completion import completed
from crossedge.sched.coordinates import fit
from crossedge.sched.files import read_matrix
from crossedge.sched.groups import grouped, medoid, minimum_size, silhouette
from crossedge.sched.identity import matched
from crossedge.sched.matrix import LatencyMatrix, State, restricted, sampled_peers, symmetrised
from crossedge.sched.placement import UNKNOWN_MS, Problem, place
from crossedge.sched.replay import Replayer
from crossedge.sched.sparse import grouped_sparse

Floats = NDArray[np.float64]
REAL = {
    "wondernetwork217": "wondernetwork217/wonderproxy.csv",
    "planetlab490-1": "planetlab490/PlanetLabData_1.tsv.gz",
    "planetlab490-9": "planetlab490/PlanetLabData_9.tsv.gz",
    "aws21": "aws21/aws.csv",
    "aws_cluster52": "aws_cluster52/latency.csv.gz",
}
WIDE = ("wondernetwork217", "planetlab490-1", "planetlab490-9")
REPLICAS = (3, 5, 8, 20)
SEEDS = 10
PEERS = 16


class Figures:
    """What was measured, by name, with its bar."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: float, bar: str = "") -> None:
        """Take a figure; `bar` such as "<= 0.08" says what must hold; empty where it is for information."""
        row: dict[str, Any] = {"value": round(float(value), 6)}
        if bar:
            sign, _, limit = bar.partition(" ")
            edge = float(limit)
            holds = {"<=": value <= edge, ">=": value >= edge, "==": value == edge}[sign]
            row |= {"bar": bar, "holds": bool(holds)}
        self.rows[name] = row
        print(f"{name}: {value:.4f} {bar} {'' if row.get('holds', True) else '  MISSED'}", flush=True)


def generated(n: int, rng: np.random.Generator) -> LatencyMatrix:
    """Return a matrix of nodes in seven regions with access links and detours, for where there is no real
    one.
    """
    centres = rng.normal(0.0, 60.0, (7, 3))
    region = rng.choice(7, n, p=[0.3, 0.25, 0.15, 0.1, 0.08, 0.07, 0.05])
    points = centres[region] + rng.normal(0.0, 5.0, (n, 3))
    access = rng.exponential(2.0, n)
    detour = 1.0 + 0.3 * rng.random((7, 7))
    detour = np.maximum(detour, detour.T)[region][:, region]
    rtt = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2)) * detour
    rtt = rtt + access[:, None] + access[None, :] + 0.3
    return symmetrised([f"node-{index}" for index in range(n)], rtt * np.exp(rng.normal(0.0, 0.05, (n, n))))


def load(data: Path | None) -> dict[str, LatencyMatrix]:
    """Return the matrices by name, completed where pairs are missing."""
    if data is None:
        sizes = dict(zip(REAL, (217, 490, 490, 21, 52), strict=True))
        return {name: generated(n, np.random.default_rng(n)) for name, n in sizes.items()}
    return {name: read_matrix(data / path) for name, path in REAL.items()}


def noisy(rtt: Floats, rng: np.random.Generator, share: float = 0.1) -> Floats:
    """Return the matrix with symmetric multiplicative noise."""
    noise = np.triu(rng.normal(0.0, share, rtt.shape), 1)
    return rtt * np.maximum(1.0 + noise + noise.T, 0.1)


def timed(figures: Figures, name: str, bar: str, action: Callable[[], object], repeats: int = 3) -> None:
    """Add the least wall seconds of some runs, and processor seconds: they differ on a busy machine."""
    wall = processor = np.inf
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        action()
        wall, processor = min(wall, time.perf_counter() - start), min(processor, time.process_time() - used)
    figures.add(f"time.{name}_s", wall, bar)
    figures.add(f"time.{name}_processor_s", processor)


def measure_completion(figures: Figures, matrices: dict[str, LatencyMatrix]) -> None:
    """Hide all pairs but those of 16 random peers, complete, and compare; then with a tenth of the nodes
    dead.
    """
    for name in [name for name in WIDE if name in matrices]:
        matrix = matrices[name]
        medians, tails, used = [], [], Counter[str]()
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            result = completed(restricted(matrix, sampled_peers(matrix.size, PEERS, rng)), rng)
            hidden = np.triu(result.matrix.state == State.ESTIMATED, 1) & matrix.measured
            error = np.abs(result.matrix.rtt - matrix.rtt)[hidden] / matrix.rtt[hidden]
            medians.append(float(np.median(error)))
            tails.append(float(np.quantile(error, 0.9)))
            used[result.estimator] += 1
        figures.add(f"completion.{name}.median_error", float(np.median(medians)), "<= 0.08")
        figures.add(f"completion.{name}.p90_error", float(np.median(tails)), "<= 0.40")
        figures.add(f"completion.{name}.seeds_by_region", used["regional"])
        rng = np.random.default_rng(1)
        dead = rng.choice(matrix.size, matrix.size // 10, replace=False)
        probed = sampled_peers(matrix.size, PEERS, rng)
        silent = np.zeros_like(probed)
        silent[dead], silent[:, dead] = probed[dead], probed[:, dead]
        rtt = np.where(probed & ~silent & matrix.measured, matrix.rtt, np.nan)
        result = completed(symmetrised(matrix.names, rtt, silent), rng, "regional")
        touched = np.zeros_like(probed)
        touched[dead], touched[:, dead] = True, True
        np.fill_diagonal(touched, False)
        figures.add(f"completion.{name}.invented", int((touched & result.matrix.known).sum()), "== 0")


def medoid_mean(rtt: Floats, labels: NDArray[np.int64]) -> float:
    """Return the mean RTT of all nodes to the nearest of the groups' medoids."""
    chosen = [medoid(rtt, np.nonzero(labels == group)[0]) for group in np.unique(labels)]
    return float(np.nan_to_num(rtt[:, chosen], nan=UNKNOWN_MS).min(axis=1).mean())


def measure_groups(figures: Figures, matrices: dict[str, LatencyMatrix], data: Path | None) -> None:
    """Silhouettes, sizes, stability under noise, and scikit-learn with our scale and count."""
    for name, measured in matrices.items():
        rtt = completed(measured, np.random.default_rng(0)).matrix.rtt
        result = grouped(rtt)
        sizes = np.bincount(result.labels)
        wide = name in WIDE
        figures.add(f"groups.{name}.k", result.k)
        figures.add(f"groups.{name}.silhouette", result.silhouette, ">= 0.55" if wide else "")
        figures.add(f"groups.{name}.smallest", int(sizes.min()), f">= {minimum_size(len(rtt))}")
        figures.add(f"groups.{name}.within_ms", result.within_ms)
        changes = []
        for seed in range(SEEDS):
            other = grouped(noisy(rtt, np.random.default_rng(seed)))
            changes.append(float((matched(result.labels, other.labels, 1000) != result.labels).mean()))
        figures.add(f"groups.{name}.changed_by_noise", float(np.median(changes)), "<= 0.03")
        figures.add(f"groups.{name}.changed_by_noise_worst", max(changes), "<= 0.03")
        affinity = np.exp(-np.nan_to_num(rtt, nan=1e9) / result.scale_ms)
        theirs, placed = [], []
        for seed in range(SEEDS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = SpectralClustering(result.k, affinity="precomputed", random_state=seed)
                labels = model.fit_predict(affinity).astype(np.int64)
            theirs.append(silhouette(rtt, labels))
            placed.append(medoid_mean(rtt, labels))
        figures.add(f"groups.{name}.silhouette_over_sklearn", result.silhouette - max(theirs), ">= -1e-9")
        ours = place(Problem(rtt, np.ones(len(rtt)), result.k), np.random.default_rng(0)).mean_ms
        figures.add(f"groups.{name}.placement_under_sklearn_ms", min(placed) - ours, ">= -1e-9")
        medoids = medoid_mean(rtt, result.labels)
        figures.add(f"groups.{name}.medoids_under_sklearn_ms", min(placed) - medoids)
        if name == "aws_cluster52" and data is not None:
            with gzip.open(data / REAL[name], "rt") as stream:
                lines = [line.strip().split(",") for line in stream]
            region = {line[0]: line[4] for line in lines} | {line[1]: line[5] for line in lines}
            truth = [region[node] for node in measured.names]
            figures.add("groups.aws_cluster52.ari", adjusted_rand_score(truth, result.labels), ">= 1.0")


def measure_placement(figures: Figures, matrices: dict[str, LatencyMatrix], known: dict[str, Any]) -> None:
    """Every node one user, with and without capacities, against the exact optimum where it was computed."""
    for name, matrix in matrices.items():
        replayed = {
            kind: Replayer([p for p in REPLICAS if p < matrix.size], capacities=kind == "capacitated").replay(
                matrix
            )
            for kind in ("free", "capacitated")
        }
        for kind, replay in replayed.items():
            for item in replay.placed:
                key = f"placement.{name}.{kind}.p{item.replicas}"
                ours = item.placement
                figures.add(f"{key}.mean_ms", ours.mean_ms)
                figures.add(f"{key}.p95_ms", ours.p95_ms)
                figures.add(f"{key}.bound_ms", ours.bound_ms)
                figures.add(f"{key}.gap", ours.gap, "<= 0.01" if kind == "free" else "")
                for rival, (mean, tail) in item.baselines.items():
                    figures.add(f"{key}.{rival}_ms", mean)
                    figures.add(f"{key}.{rival}_p95_ms", tail)
                solved = known.get(f"{name}.{kind}.p{item.replicas}")
                if solved is None:
                    continue
                if solved["finished"]:
                    allowed = 1.001 if kind == "free" else 1.01
                    figures.add(f"{key}.over_optimum", ours.mean_ms / solved["mean_ms"], f"<= {allowed}")
                    figures.add(f"{key}.bound_under_optimum", solved["mean_ms"] - ours.bound_ms, ">= -1e-6")
                elif solved["bound_ms"] > 0:  # 0 is what the solver says before it has a bound
                    figures.add(f"{key}.over_solver_bound", ours.mean_ms / solved["bound_ms"], "<= 1.04")


def solve_exactly(
    matrices: dict[str, LatencyMatrix], known: dict[str, Any], limit: float, file: Path
) -> None:
    """Solve what is not yet known, the quick ones first; each result is written at once."""
    tasks = [
        (name, kind, p)
        for kind in ("free", "capacitated")
        for name in sorted(matrices, key=lambda item: matrices[item].size)
        for p in reversed(REPLICAS)
        if p < matrices[name].size
    ]
    for name, kind, p in tasks:
        key = f"{name}.{kind}.p{p}"
        if key in known:
            continue
        rtt = completed(matrices[name], np.random.default_rng(0)).matrix.rtt
        n = len(rtt)
        capacities = np.full(n, np.ceil(1.2 * n / p)) if kind == "capacitated" else None
        result = exact(np.nan_to_num(rtt, nan=UNKNOWN_MS), np.ones(n), p, capacities, limit)
        known[key] = {
            "mean_ms": result.total / n,
            "bound_ms": result.bound / n,
            "finished": result.finished,
            "seconds": result.seconds,
        }
        print(key, known[key], flush=True)
        file.write_text(json.dumps(known, indent=2))


def measure_time(figures: Figures, data: Path | None) -> None:
    """Groups for 500, 2,000 and 10,000 nodes, and a placement among 2,000."""
    rng = np.random.default_rng(0)
    if data is None:
        points = rng.normal(0.0, 40.0, (15000, 2))
    else:
        with gzip.open(data / "caida_coords15000" / "nodes_2d_15000.xml.gz", "rt") as stream:
            found = re.findall(r"<coord>\s*([-0-9.e]+)", stream.read())
        points = np.array([float(value) for value in found]).reshape(-1, 2)
    for n, limit in ((500, 1), (2000, 5)):
        chosen = points[rng.choice(len(points), n, replace=False)]
        for kind, rtt in (
            ("caida", np.sqrt(((chosen[:, None] - chosen[None]) ** 2).sum(2))),
            ("regions", generated(n, np.random.default_rng(n)).rtt),
        ):
            timed(figures, f"groups_{n}_{kind}", f"<= {limit}", lambda rtt=rtt: grouped(rtt))
            if n == 2000:
                problem = Problem(rtt, np.ones(n), 20)
                placed = []
                timed(
                    figures,
                    f"placement_20_of_2000_{kind}",
                    "<= 2",
                    lambda problem=problem, placed=placed: placed.append(
                        place(problem, np.random.default_rng(0))
                    ),
                )
                figures.add(f"time.placement_20_of_2000_{kind}_gap", placed[0].gap)
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


def measure_stability(figures: Figures, matrices: dict[str, LatencyMatrix]) -> None:
    """Replay both PlanetLab slices and noisy repeats; count moves that the thresholds do not allow."""
    replayer = Replayer(REPLICAS)
    first, second = matrices["planetlab490-1"], matrices["planetlab490-9"]
    rounds = [first, second, first, second]
    for seed in range(4):
        values = noisy(first.rtt, np.random.default_rng(seed))
        np.fill_diagonal(values, 0.0)
        rounds.append(LatencyMatrix(first.names, values, first.state, first.confidence))
    forbidden = moves = most = 0
    changed = []
    labels: dict[str, int] = {}
    for matrix in rounds:
        replay = replayer.replay(matrix)
        if labels:
            changed.append(float(np.mean([labels[name] != replay.labels[name] for name in labels])))
        labels = replay.labels
        for item in replay.placed:
            if item.decision is None or item.decision.before_ms is None:
                continue
            count = len(item.decision.moves)
            moves += count
            most = max(most, count)
            gain = item.decision.before_ms - item.decision.best.mean_ms
            policy = replayer.policy
            worth = gain >= policy.gain_ms and gain >= policy.gain_share * item.decision.before_ms
            forbidden += count if not worth else 0
    figures.add("stability.moves", moves)
    figures.add("stability.moves_without_gain", forbidden, "== 0")
    figures.add("stability.most_moves_in_a_cycle", most, f"<= {replayer.policy.moves_max}")
    figures.add("stability.group_changes_per_round_worst", max(changed))


def main() -> None:
    """Measure everything, or only solve exactly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--exact", type=float, metavar="SECONDS", help="only solve exactly, so long for each")
    parser.add_argument("--only", help="names of the matrices to look at, separated by commas")
    arguments = parser.parse_args()
    data = Path(os.environ["CROSSEDGE_DATA"]) if os.environ.get("CROSSEDGE_DATA") else None
    arguments.output.mkdir(parents=True, exist_ok=True)
    matrices = load(data)
    if arguments.only:
        matrices = {name: matrices[name] for name in arguments.only.split(",")}
    solutions = arguments.output / "sched-exact.json"
    known: dict[str, Any] = json.loads(solutions.read_text()) if solutions.exists() else {}
    if arguments.exact:
        solve_exactly(matrices, known, arguments.exact, solutions)
        return
    figures = Figures()
    measure_time(figures, data)
    measure_groups(figures, matrices, data)
    if all(name in matrices for name in WIDE):
        measure_stability(figures, matrices)
    measure_placement(figures, matrices, known)
    measure_completion(figures, matrices)
    missed = [name for name, row in figures.rows.items() if not row.get("holds", True)]
    result = {"data": "real" if data else "generated", "missed": missed, "figures": figures.rows}
    (arguments.output / "sched.json").write_text(json.dumps(result, indent=2))
    print(f"{len(figures.rows)} figures, {len(missed)} missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
