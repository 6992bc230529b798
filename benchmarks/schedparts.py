"""What `make bench-sched` shows of matrices: completion, groups, noise, placement, stability.

A part is a generator: it yields jobs, gets their results in the same order, and then adds its figures. Jobs
of all parts run side by side on all processors, so nothing here is timed.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures
from matrices import WIDE, load, noisy_round, true_regions
from numpy.typing import NDArray
from optima import OPTIMA, REPLICAS, capacities_of, input_of, whole
from schedload import measure_stability
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from crossedge.sched.completion import completed
from crossedge.sched.groups import Grouping, grouped, medoid, minimum_size, silhouette
from crossedge.sched.identity import matched
from crossedge.sched.matrix import LatencyMatrix, State, restricted, sampled_peers, symmetrised
from crossedge.sched.placement import UNKNOWN_MS, Problem, place
from crossedge.sched.replay import Placed, Replayer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SEEDS = 10
DEAD_SEEDS = 3
KINDS = ("free", "capacitated")
NOISY_ROUNDS = 50
NOISY_AT_ONCE = 10  # rounds of one job
PEERS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What is measured on: the matrices by name, the folder of the real ones, the first seed."""

    matrices: dict[str, LatencyMatrix]
    data: Path | None
    seed: int

    @classmethod
    def of(cls, data: Path | None, only: Iterable[str], seed: int) -> Bench:
        """Return the bench of some of the matrices, all where `only` is empty."""
        matrices, names = load(data), list(only)
        return cls({name: matrices[name] for name in names or matrices}, data, seed)

    def rng(self, number: int = 0) -> np.random.Generator:
        """Return a generator that nothing else uses."""
        return np.random.default_rng(self.seed + number)

    def wide(self) -> list[str]:
        """Return the names of the matrices that the bars of completion and silhouette name."""
        return [name for name in WIDE if name in self.matrices]


Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a bench and further arguments, and those; both are sent to another process."""
Part = Generator[list[Job], list[Any], None]


def jobs(action: Callable[..., Any], *arguments: Iterable[Any]) -> list[Job]:
    """Return a job for each combination of arguments."""
    return [(action, given) for given in product(*arguments)]


# --- Completion ---------------------------------------------------------------------------------------------


def hidden_errors(bench: Bench, name: str, seed: int) -> tuple[float, float, str]:
    """Hide all pairs but those of 16 random peers and complete; return median and 90th percentile of the
    relative error, and the estimator.
    """
    matrix, rng = bench.matrices[name], bench.rng(seed)
    result = completed(restricted(matrix, sampled_peers(matrix.size, PEERS, rng)), rng)
    hidden = np.triu(result.matrix.state == State.ESTIMATED, 1) & matrix.measured
    error = np.abs(result.matrix.rtt - matrix.rtt)[hidden] / matrix.rtt[hidden]
    return float(np.median(error)), float(np.quantile(error, 0.9)), result.estimator


def unreachable(bench: Bench, name: str, seed: int) -> tuple[int, int, float]:
    """Let a tenth of the nodes answer nobody; return how many of their pairs got a number, of how many, and
    the share of the other pairs that have one.
    """
    matrix, rng = bench.matrices[name], bench.rng(100 + seed)
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


def completion(figures: Figures, bench: Bench) -> Part:
    """The matrix from 16 random peers per node, and with a tenth of the nodes dead."""
    names = bench.wide()
    tasks = jobs(hidden_errors, names, range(SEEDS)) + jobs(unreachable, names, range(DEAD_SEEDS))
    results = yield tasks
    for name in names:
        mine = [result for task, result in zip(tasks, results, strict=True) if task[1][0] == name]
        errors, dead = mine[:SEEDS], mine[SEEDS:]
        medians, tails, used = zip(*errors, strict=True)
        figures.add(f"completion.{name}.median_error", float(np.median(medians)), "<= 0.08")
        figures.add(f"completion.{name}.median_error_worst", max(medians))
        figures.add(f"completion.{name}.p90_error", float(np.median(tails)), "<= 0.40")
        figures.add(f"completion.{name}.p90_error_worst", max(tails))
        figures.add(f"completion.{name}.seeds_by_region", Counter(used)["regional"])
        invented, touched, alive = np.sum(dead, axis=0)
        figures.add(f"completion.{name}.invented", invented, "== 0")
        figures.add(f"completion.{name}.pairs_of_unreachable_nodes", touched)
        figures.add(f"completion.{name}.share_known_of_the_others", alive / DEAD_SEEDS)


# --- Groups -------------------------------------------------------------------------------------------------


def medoid_mean(rtt: Floats, labels: Ints) -> float:
    """Return the mean RTT of all nodes to the nearest of the groups' medoids."""
    chosen = [medoid(rtt, np.nonzero(labels == group)[0]) for group in np.unique(labels)]
    return float(np.nan_to_num(rtt[:, chosen], nan=UNKNOWN_MS).min(axis=1).mean())


def sklearn_labels(rtt: Floats, k: int, scale: float, seed: int) -> Ints:
    """Return what scikit-learn's spectral clustering says, with its defaults."""
    affinity = np.exp(-np.nan_to_num(rtt, nan=1e9) / scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SpectralClustering(k, affinity="precomputed", random_state=seed)
        return np.asarray(model.fit_predict(affinity), dtype=np.int64)


def both_groupings(bench: Bench, name: str) -> tuple[Floats, Grouping, list[Ints], float]:
    """Return the completed matrix, our groups, scikit-learn's of ten seeds with our scale and count, and the
    mean RTT of our placement of as many replicas.
    """
    rtt = completed(bench.matrices[name], bench.rng()).matrix.rtt
    ours = grouped(rtt)
    theirs = [sklearn_labels(rtt, ours.k, ours.scale_ms, bench.seed + seed) for seed in range(SEEDS)]
    placed = place(Problem(rtt, np.ones(len(rtt)), ours.k), bench.rng()).mean_ms
    return rtt, ours, theirs, placed


def groups(figures: Figures, bench: Bench) -> Part:
    """Silhouettes, sizes, and scikit-learn with our scale and count."""
    results = yield jobs(both_groupings, bench.matrices)
    figures.peer("scikit-learn", "version", version("scikit-learn"))
    for name, (rtt, ours, theirs, placed) in zip(bench.matrices, results, strict=True):
        figures.add(f"groups.{name}.k", ours.k)
        figures.add(f"groups.{name}.silhouette", ours.silhouette, ">= 0.55" if name in WIDE else "")
        least = int(np.bincount(ours.labels).min())
        figures.add(f"groups.{name}.smallest", least, f">= {minimum_size(len(rtt))}")
        figures.add(f"groups.{name}.within_ms", ours.within_ms)
        best = max(silhouette(rtt, labels) for labels in theirs)
        figures.peer("scikit-learn", f"groups.{name}.silhouette", best)
        figures.add(f"groups.{name}.silhouette_over_sklearn", ours.silhouette - best, ">= -1e-9")
        # what a user of either gets for k replicas: our placement, or the medoid of each of their groups
        medoids = min(medoid_mean(rtt, labels) for labels in theirs)
        figures.peer("scikit-learn", f"groups.{name}.medoids_ms", medoids)
        figures.add(f"groups.{name}.placement_under_sklearn_ms", medoids - placed, ">= -1e-9")
        figures.add(f"groups.{name}.medoids_under_sklearn_ms", medoids - medoid_mean(rtt, ours.labels))
        if name == "aws_cluster52" and bench.data is not None:
            truth = true_regions(bench.data, bench.matrices[name].names)
            figures.add("groups.aws_cluster52.ari", adjusted_rand_score(truth, ours.labels), ">= 1.0")


# --- Noise --------------------------------------------------------------------------------------------------


@cache
def undisturbed(bench: Bench, name: str) -> tuple[str | None, Ints]:
    """Return the estimator, chosen once because that takes long, and the groups without noise."""
    found = completed(bench.matrices[name], bench.rng())
    return found.estimator if found.errors else None, grouped(found.matrix.rtt).labels


def noisy_labels(bench: Bench, name: str, first: int) -> tuple[Ints, list[Ints]]:
    """Return the groups without noise, and in some rounds where all measurements have 10 % of it."""
    estimator, before = undisturbed(bench, name)
    found = []
    for seed in range(first, first + NOISY_AT_ONCE):
        rng = bench.rng(1000 + seed)
        noisy = noisy_round(bench.matrices[name], rng)
        found.append(grouped(completed(noisy, rng, estimator).matrix.rtt).labels)
    return before, found


def noise(figures: Figures, bench: Bench) -> Part:
    """How many nodes change their group when all measurements get 10 % of noise, without hysteresis."""
    starts = range(0, NOISY_ROUNDS, NOISY_AT_ONCE)
    tasks = jobs(noisy_labels, bench.matrices, starts)
    results = yield tasks
    for name in bench.matrices:
        mine = [result for task, result in zip(tasks, results, strict=True) if task[1][0] == name]
        first = mine[0][0]
        rounds = [first, *(labels for _, found in mine for labels in found)]
        changed = [float((matched(first, labels, 1000) != first).mean()) for labels in rounds[1:]]
        between = [
            float((matched(before, labels, 1000) != before).mean()) for before, labels in pairwise(rounds)
        ]
        figures.add(f"noise.{name}.changed_median", float(np.median(changed)), "<= 0.03")
        figures.add(f"noise.{name}.changed_worst", max(changed), "<= 0.03")
        figures.add(f"noise.{name}.changed_between_noisy_rounds_median", float(np.median(between)), "<= 0.03")
        figures.add(f"noise.{name}.changed_between_noisy_rounds_worst", max(between))


# --- Placement ----------------------------------------------------------------------------------------------


def placements(bench: Bench, name: str, kind: str) -> list[tuple[Placed, str]]:
    """Return our placements with their baselines on the matrix that the optima are of, and what names it."""
    matrix = bench.matrices[name]
    filled, counts = whole(matrix), [p for p in REPLICAS if p < matrix.size]
    placed = Replayer(counts, bench.seed, kind == "capacitated").replay(filled).placed
    asked = [capacities_of(kind, matrix.size, p) for p in counts]
    given = [input_of(matrix, filled, limits, p) for limits, p in zip(asked, counts, strict=True)]
    return list(zip(placed, given, strict=True))


def placement(figures: Figures, bench: Bench) -> Part:
    """Every node one user, with and without capacities, against the exact optimum where it is known."""
    known = json.loads(OPTIMA.read_text()) if bench.data is not None else {}
    tasks = jobs(placements, sorted(bench.matrices, key=lambda name: -bench.matrices[name].size), KINDS)
    results = yield tasks
    figures.peer("HiGHS", "version", f"of scipy {version('scipy')}")
    lacking = 0
    for (_, (name, kind)), found in zip(tasks, results, strict=True):
        for item, given in found:
            row, ours = f"{name}.{kind}.p{item.replicas}", item.placement
            key = f"placement.{row}"
            figures.add(f"{key}.mean_ms", ours.mean_ms)
            figures.add(f"{key}.p95_ms", ours.p95_ms)
            figures.add(f"{key}.bound_ms", ours.bound_ms)
            figures.add(f"{key}.gap", ours.gap, "<= 0.01" if kind == "free" else "")
            for rival, (mean, tail) in item.baselines.items():
                figures.peer(rival, f"{key}.mean_ms", mean)
                figures.peer(rival, f"{key}.p95_ms", tail)
                figures.ratio(f"{key}.over_{rival}", ours.mean_ms / mean if mean else 1.0)
            solved = known.get(row)
            if solved is not None and solved["input"] == given:
                compare(figures, key, ours.mean_ms, ours.bound_ms, solved)
            else:
                lacking += 1
    if bench.data is not None:
        figures.add("placement.rows_without_exact_figures", lacking, "== 0")


def compare(figures: Figures, key: str, mean: float, bound: float, solved: dict[str, Any]) -> None:
    """Hold an answer and its bound against what the exact solvers say.

    Where they did not settle it, the bound that HiGHS had when its time was over is the measure; beside it
    stands the best bound that anything proved. A bound of 0 is what HiGHS says before it has one.
    """
    free = ".free." in key
    figures.peer(solved["by"], f"{key}.mean_ms", solved["mean_ms"])
    figures.peer(solved["by"], f"{key}.bound_ms", solved["bound_ms"])
    if solved["optimal"]:
        figures.ratio(f"{key}.over_optimum", mean / solved["mean_ms"], "<= 1.001" if free else "<= 1.01")
    else:
        figures.ratio(f"{key}.over_best_known", mean / solved["mean_ms"])
        figures.ratio(f"{key}.over_best_bound", mean / solved["bound_ms"], "<= 1.04")
        theirs = max(solved.get(way, {}).get("bound_ms") or 0.0 for way in ("solver", "reduced"))
        if theirs > 0:
            figures.ratio(f"{key}.over_bound_of_highs", mean / theirs, "<= 1.04")
    figures.add(f"{key}.bound_under_best_known_ms", solved["mean_ms"] - bound, ">= -1e-6")


# --- Stability ----------------------------------------------------------------------------------------------


def replayed_rounds(bench: Bench) -> dict[str, float]:
    """Replay both PlanetLab slices and noisy repeats; count moves that the thresholds do not allow."""
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
    return {
        "decisions": decisions,
        "moves": moves,
        "moves_without_gain": forbidden,
        "most_moves_in_a_cycle": most,
        "group_changes_per_round_worst": max(changed),
    }


def served_rounds(bench: Bench) -> dict[str, float]:
    """Do the same with signed reports to a whole service, on a virtual clock."""
    return {} if bench.data is None else asyncio.run(measure_stability(bench.data))


def stability(figures: Figures, bench: Bench) -> Part:
    """Moves and changes of groups over both PlanetLab slices and noisy repeats."""
    if not all(name in bench.matrices for name in WIDE[1:]):
        return
    bars = {
        "moves_without_gain": "== 0",
        "most_moves_in_a_cycle": f"<= {Replayer(REPLICAS).policy.moves_max}",
        "group_changes_per_round_worst": "<= 0.03",
        "broken_rules": "== 0",
        "most_moves_in_a_round": "<= 5",
    }
    replayed, served = yield [(replayed_rounds, ()), (served_rounds, ())]
    for where, found in (("stability", replayed), ("stability.service", served)):
        for name, value in found.items():
            figures.add(f"{where}.{name}", value, bars.get(name, ""))


PARTS: dict[str, Callable[[Figures, Bench], Part]] = {
    "stability": stability,
    "placement": placement,
    "groups": groups,
    "noise": noise,
    "completion": completion,
}
"""What is measured; the jobs that take longest come first. A further part is a generator, and a line here."""
