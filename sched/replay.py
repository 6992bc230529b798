"""A latency matrix through the whole pipeline: completion, groups, placements, baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crossedge.sched.baselines import baselines
from crossedge.sched.completion import Completion, completed, spread_coordinates
from crossedge.sched.decision import Decision, Policy, decide
from crossedge.sched.groups import Grouping, grouped
from crossedge.sched.identity import StableGroups
from crossedge.sched.matrix import Floats, LatencyMatrix
from crossedge.sched.placement import Placement, PlacementError, Problem, place
from crossedge.sched.sparse import DENSE_NODES, grouped_sparse

HEADROOM = 1.2  # capacity of each node with --capacities, over an even share


def silent(text: str) -> None:
    """Tell nobody what is being done."""


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """One number of replicas: our placement, what the round decided, and the baselines (mean, p95)."""

    replicas: int
    placement: Placement
    decision: Decision | None
    baselines: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """One matrix, replayed."""

    completion: Completion
    groups: Grouping
    labels: dict[str, int]
    placed: list[Placed]
    seconds: dict[str, float]

    @property
    def matrix(self) -> LatencyMatrix:
        """The completed matrix."""
        return self.completion.matrix

    def as_json(self, details: bool = False) -> dict[str, object]:
        """Return what `--json` prints; `details` adds completion, tails of the baselines, and what a round
        decided.
        """
        names = self.matrix.names
        placements: list[dict[str, object]] = []
        for item in self.placed:
            ours = item.placement
            entry: dict[str, object] = {
                "replicas": item.replicas,
                "nodes": [names[node] for node in ours.nodes],
                "mean_ms": ours.mean_ms,
                "p95_ms": ours.p95_ms,
                "bound_ms": ours.bound_ms,
                "gap": ours.gap,
                "baselines": {name: mean for name, (mean, _) in item.baselines.items()},
            }
            placements.append(entry)
            if not details:
                continue
            entry["unserved"] = ours.unserved
            entry["baselines_p95_ms"] = {name: tail for name, (_, tail) in item.baselines.items()}
            if item.decision is not None:
                entry["decision"] = {
                    "nodes": [names[node] for node in item.decision.nodes],
                    "mean_ms": item.decision.mean_ms,
                    "moves": [
                        {"from": names[old] if old >= 0 else None, "to": names[new]}
                        for old, new in item.decision.moves
                    ],
                    "reason": item.decision.reason,
                }
        groups: dict[str, object] = {
            "k": self.groups.k,
            "silhouette": self.groups.silhouette,
            "labels": self.labels,
        }
        result: dict[str, object] = {
            "nodes": self.matrix.size,
            "scale_ms": self.groups.scale_ms,
            "groups": groups,
            "placements": placements,
            "seconds": self.seconds,
        }
        if details:
            groups["within_ms"] = self.groups.within_ms
            groups["medoids"] = [names[node] for node in self.groups.medoids]
            result["completion"] = {
                "estimator": self.completion.estimator,
                "errors": self.completion.errors,
                "lone": [names[node] for node in self.completion.lone],
            }
        return result


@dataclass(slots=True)
class Replayer:
    """Replays matrices one after the other; groups keep their identity and services their place between them.

    Attributes:
        replicas: numbers of replicas to place.
        seed: of everything random.
        capacities: whether each node serves at most 1.2 times an even share of the users.
        policy: when a service moves.
    """

    replicas: Sequence[int]
    seed: int = 0
    capacities: bool = False
    policy: Policy = field(default_factory=Policy)
    _groups: StableGroups = field(default_factory=StableGroups)
    _current: dict[int, list[str]] = field(default_factory=dict)

    def replay(self, matrix: LatencyMatrix, progress: Callable[[str], None] = silent) -> Replay:
        """Take one matrix through everything; PlacementError where the replicas do not fit.

        `progress` is told what is being done, before it is.
        """
        if matrix.size < 2:
            raise PlacementError("a matrix of fewer than two nodes has no latency to place by")
        most = max(self.replicas, default=1)
        if most > matrix.size:
            raise PlacementError(f"{most} replicas on {matrix.size} nodes, expected 1 to {matrix.size}")
        rng = np.random.default_rng(self.seed)
        missing = matrix.size * (matrix.size - 1) // 2 - len(matrix.pairs()[0])
        progress(f"completing {missing} of {matrix.size * (matrix.size - 1) // 2} pairs")
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        large = matrix.size > DENSE_NODES
        completion = completed(matrix, rng, "coordinates" if large else None)
        seconds["completion"] = time.perf_counter() - started
        rtt = completion.matrix.rtt
        progress(f"grouping {matrix.size} nodes")
        started = time.perf_counter()
        if large:
            groups = grouped_sparse(spread_coordinates(matrix, rng), matrix.pairs(), rng)
        else:
            groups = grouped(rtt)
        seconds["groups"] = time.perf_counter() - started
        labels = dict(self._groups.update(matrix.names, groups.labels))
        placed = []
        seconds["placement"] = 0.0
        for count in self.replicas:
            problem = self.problem(rtt, count)
            progress(f"placing {count} replicas")
            started = time.perf_counter()
            placement = place(problem, rng)
            seconds["placement"] += time.perf_counter() - started
            decision = self.decision(matrix, problem, rng)
            placed.append(Placed(count, placement, decision, baselines(problem, groups, rng)))
            nodes = placement.nodes if decision is None else decision.nodes
            self._current[count] = [matrix.names[node] for node in nodes]
        return Replay(completion, groups, labels, placed, seconds)

    def problem(self, rtt: Floats, replicas: int) -> Problem:
        """Return the service to place: every node one user."""
        n = len(rtt)
        limits = np.full(n, np.ceil(HEADROOM * n / replicas)) if self.capacities else None
        return Problem(rtt, np.ones(n), replicas, limits)

    def decision(self, matrix: LatencyMatrix, problem: Problem, rng: np.random.Generator) -> Decision | None:
        """Return what becomes of the placement of the round before, None in the first round or among other
        nodes.
        """
        names = self._current.get(problem.replicas)
        index = {name: position for position, name in enumerate(matrix.names)}
        if names is None or not any(name in index for name in names):
            return None
        return decide(problem, [index[name] for name in names if name in index], rng, self.policy)
