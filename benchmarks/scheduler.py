"""Measure the scheduler against its bars: `make bench-sched` writes build/bench/sched.json and prints a
table.

Real matrices come from the folder that CROSSEDGE_DATA names. Without it matrices of the same sizes are
generated; the bars were set for the real ones. Nothing was tuned on the seeds that are used here; `--seed`
takes others. Optima of the real matrices stand in benchmarks/optima.json; `make exact-sched` finds them
again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures
from matrices import WIDE, apart, generated, load, many_points, noisy_round, true_regions
from numpy.typing import NDArray
from optima import OPTIMA, REPLICAS, solve_all
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from crossedge.sched.completion import completed
from crossedge.sched.coordinates import fit
from crossedge.sched.groups import grouped, medoid, minimum_size, silhouette
from crossedge.sched.identity import matched
from crossedge.sched.matrix import LatencyMatrix, State, restricted, sampled_peers, symmetrised
from crossedge.sched.placement import UNKNOWN_MS, Problem, place
from crossedge.sched.replay import Replayer
from crossedge.sched.sparse import grouped_sparse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FRESH = 20_261_122  # first of the seeds; tuning and tests use small ones
SEEDS = 10
NOISY_ROUNDS = 50
PEERS = 16


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured on: the matrices by name, the folder of the real ones, the first seed."""

    matrices: dict[str, LatencyMatrix]
    data: Path | None
    seed: int

    def rng(self, number: int = 0) -> np.random.Generator:
        """Return a generator that nothing else uses."""
        return np.random.default_rng(self.seed + number)

    def wide(self) -> list[str]:
        """Return the names of the matrices that the bars of completion and silhouette name."""
        return [name for name in WIDE if name in self.matrices]


def timed(figures: Figures, name: str, bar: str, action: Callable[[], object], repeats: int = 3) -> None:
    """Add the least wall seconds of some runs, and processor seconds: they differ on a busy machine."""
    wall = processor = np.inf
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        action()
        wall, processor = min(wall, time.perf_counter() - start), min(processor, time.process_time() - used)
    figures.add(f"time.{name}_s", wall, bar)
    figures.add(f"time.{name}_processor_s", processor)


def measure_completion(figures: Figures, bench: Bench) -> None:
    """Hide all pairs but those of 16 random peers, complete, and compare; then with a tenth of the nodes
    dead.
    """
    for name in bench.wide():
        matrix = bench.matrices[name]
        medians, tails, used = [], [], Counter[str]()
        for seed in range(SEEDS):
            rng = bench.rng(seed)
            result = completed(restricted(matrix, sampled_peers(matrix.size, PEERS, rng)), rng)
            hidden = np.triu(result.matrix.state == State.ESTIMATED, 1) & matrix.measured
            error = np.abs(result.matrix.rtt - matrix.rtt)[hidden] / matrix.rtt[hidden]
            medians.append(float(np.median(error)))
            tails.append(float(np.quantile(error, 0.9)))
            used[result.estimator] += 1
        figures.add(f"completion.{name}.median_error", float(np.median(medians)), "<= 0.08")
        figures.add(f"completion.{name}.median_error_worst", max(medians))
        figures.add(f"completion.{name}.p90_error", float(np.median(tails)), "<= 0.40")
        figures.add(f"completion.{name}.p90_error_worst", max(tails))
        figures.add(f"completion.{name}.seeds_by_region", used["regional"])
        invented, touched, alive = np.sum([unreachable(matrix, bench.rng(100 + s)) for s in range(3)], axis=0)
        figures.add(f"completion.{name}.invented", invented, "== 0")
        figures.add(f"completion.{name}.pairs_of_unreachable_nodes", touched)
        figures.add(f"completion.{name}.share_known_of_the_others", alive / 3)


def unreachable(matrix: LatencyMatrix, rng: np.random.Generator) -> tuple[int, int, float]:
    """Let a tenth of the nodes answer nobody; return how many of their pairs got a number, of how many, and
    the share of the other pairs that have one.
    """
    dead = rng.choice(matrix.size, matrix.size // 10, replace=False)
    probed = sampled_peers(matrix.size, PEERS, rng)
    touched = np.zeros_like(probed)
    touched[dead], touched[:, dead] = True, True
    np.fill_diagonal(touched, False)
    rtt = np.where(probed & ~touched & matrix.measured, matrix.rtt, np.nan)
    known = completed(symmetrised(matrix.names, rtt, probed & touched), rng).matrix.known
    others = ~touched
    np.fill_diagonal(others, False)
    return int(np.triu(touched & known).sum()), int(np.triu(touched).sum()), float(known[others].mean())


def medoid_mean(rtt: Floats, labels: Ints) -> float:
    """Return the mean RTT of all nodes to the nearest of the groups' medoids."""
    chosen = [medoid(rtt, np.nonzero(labels == group)[0]) for group in np.unique(labels)]
    return float(np.nan_to_num(rtt[:, chosen], nan=UNKNOWN_MS).min(axis=1).mean())


def measure_groups(figures: Figures, bench: Bench) -> None:
    """Silhouettes, sizes, and scikit-learn with our scale and count."""
    for name, measured in bench.matrices.items():
        rtt = completed(measured, bench.rng()).matrix.rtt
        result = grouped(rtt)
        figures.add(f"groups.{name}.k", result.k)
        figures.add(f"groups.{name}.silhouette", result.silhouette, ">= 0.55" if name in WIDE else "")
        figures.add(
            f"groups.{name}.smallest", int(np.bincount(result.labels).min()), f">= {minimum_size(len(rtt))}"
        )
        figures.add(f"groups.{name}.within_ms", result.within_ms)
        theirs = sklearn_labels(rtt, result.k, result.scale_ms, bench)
        best = max(silhouette(rtt, labels) for labels in theirs)
        figures.add(f"groups.{name}.silhouette_over_sklearn", result.silhouette - best, ">= -1e-9")
        # what a user of either gets for k replicas: our placement, or the medoid of each of their groups
        ours = place(Problem(rtt, np.ones(len(rtt)), result.k), bench.rng()).mean_ms
        placed = min(medoid_mean(rtt, labels) for labels in theirs)
        figures.add(f"groups.{name}.placement_under_sklearn_ms", placed - ours, ">= -1e-9")
        figures.add(f"groups.{name}.medoids_under_sklearn_ms", placed - medoid_mean(rtt, result.labels))
        if name == "aws_cluster52" and bench.data is not None:
            truth = true_regions(bench.data, measured.names)
            figures.add("groups.aws_cluster52.ari", adjusted_rand_score(truth, result.labels), ">= 1.0")


def sklearn_labels(rtt: Floats, k: int, scale: float, bench: Bench) -> list[Ints]:
    """Return what scikit-learn's spectral clustering says, with its defaults, of ten seeds."""
    affinity = np.exp(-np.nan_to_num(rtt, nan=1e9) / scale)
    found = []
    for seed in range(SEEDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = SpectralClustering(k, affinity="precomputed", random_state=bench.seed + seed)
            found.append(model.fit_predict(affinity).astype(np.int64))
    return found


def measure_noise(figures: Figures, bench: Bench) -> None:
    """How many nodes change their group when all measurements get 10 % of noise, without hysteresis."""
    for name, measured in bench.matrices.items():
        completion = completed(measured, bench.rng())
        estimator = completion.estimator if completion.errors else None  # chosen once: it takes long
        before = grouped(completion.matrix.rtt).labels
        first, changed, between = before, [], []
        for seed in range(NOISY_ROUNDS):
            rng = bench.rng(1000 + seed)
            labels = grouped(completed(noisy_round(measured, rng), rng, estimator).matrix.rtt).labels
            changed.append(float((matched(first, labels, 1000) != first).mean()))
            between.append(float((matched(before, labels, 1000) != before).mean()))
            before = labels
        figures.add(f"noise.{name}.changed_median", float(np.median(changed)), "<= 0.03")
        figures.add(f"noise.{name}.changed_worst", max(changed), "<= 0.03")
        figures.add(f"noise.{name}.changed_between_noisy_rounds_median", float(np.median(between)), "<= 0.03")
        figures.add(f"noise.{name}.changed_between_noisy_rounds_worst", max(between))


def measure_placement(figures: Figures, bench: Bench) -> None:
    """Every node one user, with and without capacities, against the exact optimum where it is known."""
    known = json.loads(OPTIMA.read_text()) if bench.data is not None and OPTIMA.exists() else {}
    for name, matrix in bench.matrices.items():
        for kind in ("free", "capacitated"):
            counts = [p for p in REPLICAS if p < matrix.size]
            replayer = Replayer(counts, bench.seed, kind == "capacitated")
            for item in replayer.replay(matrix).placed:
                key = f"placement.{name}.{kind}.p{item.replicas}"
                ours = item.placement
                figures.add(f"{key}.mean_ms", ours.mean_ms)
                figures.add(f"{key}.p95_ms", ours.p95_ms)
                figures.add(f"{key}.bound_ms", ours.bound_ms)
                figures.add(f"{key}.gap", ours.gap, "<= 0.01" if kind == "free" else "")
                for rival, (mean, tail) in item.baselines.items():
                    figures.add(f"{key}.{rival}_ms", mean)
                    figures.add(f"{key}.{rival}_p95_ms", tail)
                compare(
                    figures, key, ours.mean_ms, ours.bound_ms, known.get(f"{name}.{kind}.p{item.replicas}")
                )


def compare(figures: Figures, key: str, mean: float, bound: float, solved: dict[str, Any] | None) -> None:
    """Hold an answer and its bound against what the exact solvers say."""
    if solved is None:
        return
    free = ".free." in key
    if solved["optimal"]:
        figures.add(f"{key}.over_optimum", mean / solved["mean_ms"], "<= 1.001" if free else "<= 1.01")
    else:
        figures.add(f"{key}.over_best_known", mean / solved["mean_ms"], "<= 1.01")
    if solved["bound_ms"] > 0:  # 0 is what a solver says before it has a bound
        figures.add(f"{key}.over_proven_bound", mean / solved["bound_ms"], "<= 1.04")
    figures.add(f"{key}.bound_under_best_known_ms", solved["mean_ms"] - bound, ">= -1e-6")


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


def measure_stability(figures: Figures, bench: Bench) -> None:
    """Replay both PlanetLab slices and noisy repeats; count moves that the thresholds do not allow."""
    if not all(name in bench.matrices for name in WIDE[1:]):
        return
    replayer = Replayer(REPLICAS, bench.seed)
    first, second = (bench.matrices[name] for name in WIDE[1:])
    rounds = [first, second, first, second]
    rounds += [noisy_round(rounds[seed % 2], bench.rng(2000 + seed)) for seed in range(6)]
    forbidden = moves = most = decisions = 0
    changed = []
    labels: dict[str, int] = {}
    for matrix in rounds:
        replay = replayer.replay(matrix)
        if labels:
            changed.append(float(np.mean([labels[name] != replay.labels[name] for name in labels])))
        labels = dict(replay.labels)
        for item in replay.placed:
            if item.decision is None or item.decision.before_ms is None:
                continue
            decisions += 1
            count = len(item.decision.moves)
            moves += count
            most = max(most, count)
            gain = item.decision.before_ms - item.decision.best.mean_ms
            policy = replayer.policy
            worth = gain >= policy.gain_ms and gain >= policy.gain_share * item.decision.before_ms
            forbidden += count if not worth else 0
    figures.add("stability.decisions", decisions)
    figures.add("stability.moves", moves)
    figures.add("stability.moves_without_gain", forbidden, "== 0")
    figures.add("stability.most_moves_in_a_cycle", most, f"<= {replayer.policy.moves_max}")
    figures.add("stability.group_changes_per_round_worst", max(changed), "<= 0.03")


# What is measured, in this order. A further part is a function of the figures and the bench, and a line here.
PARTS: dict[str, Callable[[Figures, Bench], None]] = {
    "time": measure_time,
    "groups": measure_groups,
    "noise": measure_noise,
    "stability": measure_stability,
    "placement": measure_placement,
    "completion": measure_completion,
}


def main() -> None:
    """Measure everything, or only solve exactly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--only", help="names of the matrices to look at, separated by commas")
    parser.add_argument("--seed", type=int, default=FRESH, help="the first seed")
    parser.add_argument("--exact", type=float, metavar="SECONDS", help="only solve exactly, so long for each")
    arguments = parser.parse_args()
    data = Path(os.environ["CROSSEDGE_DATA"]) if os.environ.get("CROSSEDGE_DATA") else None
    matrices = load(data)
    if arguments.only:
        matrices = {name: matrices[name] for name in arguments.only.split(",")}
    if arguments.exact:
        solve_all(matrices, arguments.exact, OPTIMA if data else arguments.output / "optima.json")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures, bench = Figures(), Bench(matrices, data, arguments.seed)
    started = time.perf_counter()
    for part in arguments.parts.split(",") if arguments.parts else PARTS:
        PARTS[part](figures, bench)
    figures.add("bench.seconds", time.perf_counter() - started)
    result = {
        "data": "real" if data else "generated",
        "seed": arguments.seed,
        "missed": figures.missed,
        "figures": figures.rows,
    }
    (arguments.output / "sched.json").write_text(json.dumps(result, indent=2))
    print(f"\n{figures.table()}\n")
    missed = figures.missed
    print(f"{len(figures.rows)} figures, {len(missed)} missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
