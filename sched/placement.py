"""Where the replicas of a service go: near the users' weight, within capacities, with a proven bound.

The objective is the mean RTT of users to the replica that serves them, weighted by demand. Each answer
carries a lower bound that no placement can beat, so its distance from the optimum is known without knowing
the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossedge.sched import capacities as capacitated
from crossedge.sched import median
from crossedge.sched.bounds import ROUNDING, Relaxation, median_bound
from crossedge.sched.branching import Search
from crossedge.sched.capacities import assign
from crossedge.sched.matrix import Flags, Floats, Ints
from crossedge.wire.errors import CrossedgeError

UNKNOWN_MS = (
    10_000.0  # what serving a user over a pair without a number counts as: only if nothing else is left
)
BOUND_WORK = 80_000_000  # priced pairs, over all steps, that a bound may look at
BOUND_STEPS = 600
CAPACITATED_WORK = 60_000_000
BRANCH_WORK = 800_000_000  # of branch and bound with capacities, at effort 1
RESTART_WORK = 2_000_000  # entries of the problem times restarts, with capacities
RESTARTS_MAX = 12
BRANCH_SIZE = 1_000_000  # entries of a problem without capacities up to which a gap is branched on
PROVEN = 1e-3  # gap that is left alone
STARTS = 3  # sets of the relaxed problem from which a search with capacities starts


class PlacementError(CrossedgeError):
    """The request cannot be met; the text says what does not fit."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One service to place.

    Attributes:
        rtt: (users, nodes) ms; `nan` where nothing is known.
        weights: (users,) demand at each access node, >= 0.
        replicas: how many replicas, each on a node of its own.
        capacities: (nodes,) demand that a replica there can serve; None where there is no limit.
        allowed: (nodes,) whether a replica may stand there; None means everywhere.
    """

    rtt: Floats
    weights: Floats
    replicas: int
    capacities: Floats | None = None
    allowed: Flags | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """An answer.

    Attributes:
        nodes: (replicas,) indices, sorted.
        mean_ms: mean RTT of the demand that is served over known pairs.
        p95_ms: RTT that 95 % of that demand does not exceed.
        bound_ms: no placement's mean is below this.
        gap: share of the mean that is above the bound; 0 is proven optimal.
        flow: (users, replicas) demand of each user that each replica serves.
        unserved: demand that no replica serves over a known pair.
    """

    nodes: Ints
    mean_ms: float
    p95_ms: float
    bound_ms: float
    gap: float
    flow: Floats
    unserved: float


def checked(problem: Problem) -> tuple[Floats, Floats, Ints, Floats | None]:
    """Return RTT without unknowns, demand, indices of allowed nodes and their capacities; or say what does
    not fit.

    Users without demand are dropped; the RTT's columns are the allowed nodes.
    """
    rtt, weights = np.asarray(problem.rtt, dtype=np.float64), np.asarray(problem.weights, dtype=np.float64)
    if rtt.ndim != 2 or weights.shape != (len(rtt),):
        raise PlacementError(f"demand for {len(weights)} access nodes, expected {len(rtt)}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise PlacementError("demand must be finite, not negative, and more than nothing")
    allowed = np.ones(rtt.shape[1], dtype=bool) if problem.allowed is None else problem.allowed
    nodes = np.nonzero(allowed)[0]
    if not 1 <= problem.replicas <= len(nodes):
        raise PlacementError(f"{problem.replicas} replicas on {len(nodes)} nodes, expected 1 to {len(nodes)}")
    limits = None
    if problem.capacities is not None:
        limits = np.asarray(problem.capacities, dtype=np.float64)
        if limits.shape != (rtt.shape[1],) or not np.isfinite(limits).all() or (limits < 0).any():
            raise PlacementError("capacities must be one finite number per node, not negative")
        limits = limits[nodes]
        most = float(np.sort(limits)[::-1][: problem.replicas].sum())
        if most < weights.sum() * (1.0 - 1e-12):
            raise PlacementError(
                f"the {problem.replicas} largest capacities hold {most:g} of a demand of {weights.sum():g}"
            )
    users = weights > 0
    costs = rtt[users][:, nodes]
    return np.where(np.isfinite(costs), costs, UNKNOWN_MS), weights[users], nodes, limits


def nearest_flow(rtt: Floats, weights: Floats) -> Floats:
    """Return the flow (users, open nodes) where every user goes to its nearest node."""
    flow = np.zeros(rtt.shape)
    flow[np.arange(len(rtt)), rtt.argmin(axis=1)] = weights
    return flow


def served(rtt: Floats, flow: Floats) -> tuple[float, float, float]:
    """Return mean and 95th percentile in ms of the demand served over known pairs, and the demand that is
    not.
    """
    known = rtt < UNKNOWN_MS
    amounts = np.where(known, flow, 0.0).ravel()
    times = rtt.ravel()
    whole = float(amounts.sum())
    missing = max(0.0, float(flow.sum()) - whole)
    if whole <= 0.0:
        return UNKNOWN_MS, UNKNOWN_MS, missing
    order = np.argsort(times, kind="stable")
    after = np.cumsum(amounts[order])
    tail = float(times[order][min(int(np.searchsorted(after, 0.95 * whole * (1 - 1e-12))), len(times) - 1)])
    return float(amounts @ times) / whole, tail, missing


def flow_to(problem: Problem, opened: Ints) -> tuple[Floats, Floats]:
    """Return RTT (all users, opened) without unknowns, and the cheapest flow to those nodes."""
    rtt = problem.rtt[:, opened]
    rtt = np.where(np.isfinite(rtt), rtt, UNKNOWN_MS)
    if problem.capacities is None:
        return rtt, nearest_flow(rtt, problem.weights)
    return rtt, assign(rtt, problem.weights, problem.capacities[opened]).flow


def mean_of(problem: Problem, opened: Ints) -> float:
    """Return the objective of any set of open nodes: mean ms with unknown pairs counted as `UNKNOWN_MS`."""
    rtt = problem.rtt[:, opened]
    rtt = np.where(np.isfinite(rtt), rtt, UNKNOWN_MS)
    if problem.capacities is None:
        return float(problem.weights @ rtt.min(axis=1) / problem.weights.sum())
    found = assign(rtt, problem.weights, problem.capacities[opened])
    return (found.total + UNKNOWN_MS * found.unserved) / float(problem.weights.sum())


def place(
    problem: Problem, rng: np.random.Generator, start: Ints | None = None, effort: float = 1.0
) -> Placement:
    """Find a placement and prove how far from the optimum it can be at most.

    Args:
        problem: what to place.
        rng: shakes the search.
        start: the present placement, to begin with as well.
        effort: how long to search and prove with capacities, 1 being a second or so.

    Raises:
        PlacementError: what was asked does not fit.
    """
    rtt, weights, nodes, limits = checked(problem)
    replicas = problem.replicas
    cost = rtt * weights[:, None]
    known_start = None
    if start is not None and len(start) == replicas and np.isin(start, nodes).all():
        known_start = np.searchsorted(nodes, np.sort(start))
    opened = median.solve(cost, replicas, rng, known_start)
    near = min(len(nodes), max(200, 3 * len(nodes) // replicas))
    demand = float(weights.sum())
    if limits is None:
        steps = int(np.clip(BOUND_WORK // (len(cost) * near), 60, BOUND_STEPS))
        bound, sets = median_bound(cost, replicas, opened, steps)
        opened = median.improved(cost, opened, sets)
        objective = median.total(cost, opened)
        if bound < objective * (1.0 - PROVEN) and rtt.size <= BRANCH_SIZE:
            opened, objective, bound = branched(rtt, weights, opened, bound, effort)
    else:
        starts = [opened] if known_start is None else [opened, known_start]
        opened, objective, bound = within_limits(rtt, weights, limits, starts, rng, effort)
        if objective == np.inf:
            raise PlacementError(f"no room was found for a demand of {demand:g} within the capacities")
    bound = min(bound, objective)
    chosen = np.sort(nodes[opened])
    every, flow = flow_to(problem, chosen)
    mean, tail, missing = served(every, flow)
    gap = (objective - bound) / objective if objective > 0 else 0.0
    return Placement(chosen, mean, tail, bound / demand, gap, flow, missing)


def branched(
    rtt: Floats, weights: Floats, opened: Ints, bound: float, effort: float
) -> tuple[Ints, float, float]:
    """Return open nodes, their total and a lower bound where there are no capacities and a gap is left."""
    limits = np.full(rtt.shape[1], float(weights.sum()))
    relaxation = Relaxation(rtt, weights, limits)
    search = Search(rtt, weights, limits, opened, assign(rtt[:, opened], weights, limits[opened]))
    search.run(relaxation.start(opened), effort * BRANCH_WORK / 4)
    return search.best.opened, search.best.assignment.total, max(bound, search.bound())


def within_limits(
    rtt: Floats, weights: Floats, limits: Floats, starts: list[Ints], rng: np.random.Generator, effort: float
) -> tuple[Ints, float, float]:
    """Return open nodes, their total within the capacities (inf: no room was found) and a lower bound."""
    replicas = len(starts[0])
    tolerated = 1e-6 * float(weights.sum())
    relaxation = Relaxation(rtt, weights, limits)
    steps = int(np.clip(CAPACITATED_WORK // (rtt.size * relaxation.price), 30, BOUND_STEPS))
    first, found = capacitated.improve(rtt, weights, limits, starts[0])
    every = [(np.arange(rtt.shape[1]), replicas)]
    relaxed = relaxation.solve(every, relaxation.start(first), found.total, steps)
    starts = [first, *starts[1:], *capacitated.cheapest(rtt, weights, limits, relaxed.sets, STARTS)]
    restarts = int(np.clip(RESTART_WORK // rtt.size, 0, RESTARTS_MAX))
    opened, found = capacitated.solve(rtt, weights, limits, replicas, starts, rng, restarts)
    if found.unserved > tolerated:
        return opened, np.inf, relaxed.bound
    search = Search(rtt, weights, limits, opened, found)
    search.run(relaxed.multipliers, effort * BRANCH_WORK)
    best = search.best
    return best.opened, best.assignment.total, max(search.bound(), relaxed.bound * (1.0 - ROUNDING))
