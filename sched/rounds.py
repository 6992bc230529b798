"""One round: reports in; matrix, groups, map and decisions out. A function of its input, fit for a process
of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crossedge.sched.completion import completed, spread_coordinates
from crossedge.sched.decision import Policy
from crossedge.sched.groups import Grouping, grouped
from crossedge.sched.identity import StableGroups
from crossedge.sched.layout import laid_out
from crossedge.sched.matrix import Floats, Ints, LatencyMatrix, State
from crossedge.sched.medoids import assigned
from crossedge.sched.placement import PlacementError
from crossedge.sched.services import ServiceError, ServiceSpec, View, decided, kept
from crossedge.sched.snapshot import Snapshot
from crossedge.sched.sparse import DENSE_NODES, grouped_sparse


@dataclass(frozen=True, slots=True)
class ServiceTask:
    """A service in a round: what is wanted, and where its replicas are. `version` comes back as it went."""

    name: str
    version: int
    spec: ServiceSpec
    current: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What one round works on.

    Attributes:
        round: its number.
        time: Unix seconds of the snapshot.
        snapshot: what the nodes reported.
        groups: identities so far.
        positions: the map of the round before.
        half_life: seconds after which a measurement is worth half.
        estimator: the one to use; None lets the estimators compete.
        error: the estimator's error when they last competed.
        services: what is to be decided; empty where decisions are held.
        policy: when services move that say nothing themselves.
        moves_max: replicas that may move over all services.
        seed: of everything random.
        ask: whether to say anew whom nodes should measure.
    """

    round: int
    time: float
    snapshot: Snapshot
    groups: StableGroups
    positions: Mapping[str, tuple[float, float]]
    half_life: float
    estimator: str | None
    error: float | None
    services: Sequence[ServiceTask]
    policy: Policy
    moves_max: int
    seed: int
    ask: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one round found.

    Attributes:
        view: matrix, groups and map.
        groups: identities from now on.
        grouping: the round's own groups, without regard to identity; None with fewer than two nodes.
        estimator: that filled the matrix, "none" where there was nothing to fill.
        error: its median relative error on hidden pairs, None where it never competed.
        stress: share of RTT that the map cannot show.
        pairs: how many there are of each kind.
        confidence: mean of the pairs with a number, None where there is none.
        decisions: service name to (version, decision).
        moves: replicas that move.
        asked: by node, whom it should measure; None where that was not asked for.
        seconds: wall time of each part.
        processor: seconds of processor time.
    """

    view: View
    groups: StableGroups
    grouping: Grouping | None
    estimator: str
    error: float | None
    stress: float | None
    pairs: dict[str, int]
    confidence: float | None
    decisions: dict[str, tuple[int, dict[str, Any]]]
    moves: int
    asked: dict[str, tuple[str, ...]] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    processor: float = 0.0


def run_round(task: Task) -> Outcome:
    """Make one round."""
    rng = np.random.default_rng((task.seed, task.round))
    used = time.process_time()
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    measured = task.snapshot.matrix(task.half_life)
    matrix, estimator, error = filled(measured, task, rng)
    seconds["completion"] = time.perf_counter() - started
    started = time.perf_counter()
    grouping = group(measured, matrix, rng)
    found = np.full(matrix.size, -1, dtype=np.int64) if grouping is None else grouping.labels
    identities = task.groups.update(matrix.names, found)
    labels = np.array([identities[name] for name in matrix.names], dtype=np.int64)
    seconds["groups"] = time.perf_counter() - started
    started = time.perf_counter()
    layout = laid_out(matrix.names, matrix.rtt, task.positions)
    seconds["map"] = time.perf_counter() - started
    view = View(
        task.round,
        task.time,
        matrix.names,
        task.snapshot.alive,
        matrix.rtt,
        task.snapshot.kinds(matrix),
        matrix.confidence,
        labels,
        layout.points,
        {name: position for position, name in enumerate(matrix.names)},
    )
    started = time.perf_counter()
    decisions, moves = decide_all(task, view, rng)
    seconds["decisions"] = time.perf_counter() - started
    return Outcome(
        view,
        task.groups,
        grouping,
        estimator,
        error,
        layout.stress,
        counts(view),
        mean_confidence(view),
        decisions,
        moves,
        assigned(view, task.round) if task.ask else None,
        seconds,
        time.process_time() - used,
    )


def filled(
    measured: LatencyMatrix, task: Task, rng: np.random.Generator
) -> tuple[LatencyMatrix, str, float | None]:
    """Return the completed matrix, the estimator, and its error."""
    if measured.size < 2:
        return measured, "none", None
    estimator = "coordinates" if measured.size > DENSE_NODES else task.estimator
    completion = completed(measured, rng, estimator)
    if estimator is None:
        return completion.matrix, completion.estimator, completion.errors.get(completion.estimator)
    return completion.matrix, completion.estimator, task.error if completion.estimator != "none" else None


def group(measured: LatencyMatrix, matrix: LatencyMatrix, rng: np.random.Generator) -> Grouping | None:
    """Return the groups of a round, None where there is nothing to group by."""
    if matrix.size < 2 or not measured.measured.any():
        return None
    if matrix.size > DENSE_NODES:
        return grouped_sparse(spread_coordinates(measured, rng), measured.pairs(), rng)
    return grouped(matrix.rtt)


def decide_all(
    task: Task, view: View, rng: np.random.Generator
) -> tuple[dict[str, tuple[int, dict[str, Any]]], int]:
    """Return each service's decision, and how many replicas move by choice.

    Over all services at most `moves_max` replicas move by choice; those of the greatest gain go first, the
    others stay until a later round. Replacing what is gone, and placing what is new, is no choice.
    """
    results: dict[str, tuple[int, dict[str, Any]]] = {}
    wanted: list[tuple[float, ServiceTask]] = []
    for service in task.services:
        try:
            decision = decided(service.spec, service.current, view, task.policy, rng)
        except (PlacementError, ServiceError) as error:
            results[service.name] = (service.version, kept(service.current, error))
            continue
        results[service.name] = (service.version, decision)
        if chosen_moves(decision):
            wanted.append(((decision["before_ms"] or 0.0) - (decision["mean_ms"] or 0.0), service))
    made = 0
    for _, service in sorted(wanted, key=lambda item: (-item[0], item[1].name)):
        version, decision = results[service.name]
        if made + chosen_moves(decision) <= task.moves_max:
            made += chosen_moves(decision)
            continue
        results[service.name] = (version, waiting(service, view, task, rng))
    return results, made


def chosen_moves(decision: Mapping[str, Any]) -> int:
    """Return how many replicas a decision moves by choice."""
    if not decision["by_choice"]:
        return 0
    return sum(1 for move in decision["moves"] if move["from"] is not None)


def waiting(service: ServiceTask, view: View, task: Task, rng: np.random.Generator) -> dict[str, Any]:
    """Return the decision of a service that would move and has to wait for a later round."""
    still = Policy(task.policy.gain_ms, task.policy.gain_share, 0)
    own = service.spec.policy
    spec = service.spec.model_copy(
        update={"policy": None if own is None else own.model_copy(update={"moves_max": 0})}
    )
    decision = decided(spec, service.current, view, still, rng)
    decision["reason"] = f"stays for now: the {task.moves_max} moves of this round are made by other services"
    return decision


def counts(view: View) -> dict[str, int]:
    """Return how many pairs there are of each kind."""
    upper: Ints = np.bincount(
        (view.kind[np.triu_indices(len(view.names), 1)] & 7).astype(np.int64), minlength=5
    )
    return {state.name.lower(): int(upper[state]) for state in State}


def mean_confidence(view: View) -> float | None:
    """Return the mean confidence of pairs with a number, None where there is none."""
    pairs = np.isfinite(view.rtt) & (view.kind != 4)
    known: Floats = view.confidence[pairs]
    return float(known.mean()) if known.size else None
