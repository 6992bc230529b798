"""Placement with capacities: who is served where, exactly, and a search over which nodes to open.

For a given set of open nodes the cheapest assignment is a transportation problem with few sinks: each user
starts at its nearest node, then what is too much flows along shortest paths between the nodes (successive
shortest paths on a graph with one vertex per open node). Its dual prices then price all swaps at once from
below, so that only swaps that can be an improvement are solved exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix

from crossedge.sched.matrix import Floats, Ints

TRIALS_MAX = 80  # swaps solved exactly before a step gives up
STEPS_MAX = 60
SHAKEN = 8  # of so many open nodes a restart exchanges one
ALTERNATIONS = 8
TINY = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Who is served where.

    Attributes:
        flow: (users, open nodes) demand.
        prices: (open nodes,) ms by which capacity there is short: what one unit more would save.
        total: sum of demand times RTT.
        unserved: demand for which there was no room.
    """

    flow: Floats
    prices: Floats
    total: float
    unserved: float


def cheapest_moves(rtt: Floats, flow: Floats, node: int) -> tuple[Floats, Ints]:
    """Return what it costs per unit to move some user of `node` to each open node, and which user."""
    users = np.nonzero(flow[:, node] > TINY)[0]
    if not len(users):
        return np.full(rtt.shape[1], np.inf), np.zeros(rtt.shape[1], dtype=np.int64)
    extra = rtt[users] - rtt[users, node][:, None]
    row = extra.argmin(axis=0)
    return extra[row, np.arange(rtt.shape[1])], users[row]


def distances(lengths: Floats, goals: Ints) -> tuple[Floats, Ints]:
    """Return each vertex's least length to a goal, and the next vertex on the way (Bellman and Ford)."""
    n = len(lengths)
    far = np.full(n, np.inf)
    far[goals] = 0.0
    following = np.arange(n)
    for _ in range(n):
        through = lengths + far[None, :]
        step = through.argmin(axis=1)
        value = through[np.arange(n), step]
        better = value < far - 1e-12
        if not better.any():
            break
        far = np.where(better, value, far)
        following = np.where(better, step, following)
    return far, following


def assign(rtt: Floats, weights: Floats, capacities: Floats, limit: float = np.inf) -> Assignment:
    """Serve all demand at least total RTT from nodes (users, open nodes) within their capacities.

    Demand of one user may be split. Where the room does not suffice, the rest stays where it is nearest and
    is counted as unserved. So it does where the total is sure to pass `limit`: paths only grow longer, hence
    all that is still too much somewhere costs at least the shortest one.
    """
    users, nodes = rtt.shape
    flow = np.zeros((users, nodes))
    flow[np.arange(users), rtt.argmin(axis=1)] = weights
    load = flow.sum(axis=0)
    lengths = np.empty((nodes, nodes))
    movers = np.zeros((nodes, nodes), dtype=np.int64)
    for node in range(nodes):
        lengths[node], movers[node] = cheapest_moves(rtt, flow, node)
    scale = max(float(weights.sum()), 1.0) * TINY
    total = float((flow * rtt).sum())
    while True:
        over = np.nonzero(load > capacities + scale)[0]
        under = np.nonzero(load < capacities - scale)[0]
        if not len(over) or not len(under):
            break
        far, following = distances(lengths, under)
        node = int(over[np.argmin(far[over])])
        if not np.isfinite(far[node]):
            break
        if total + float(far[node] * (load[over] - capacities[over]).sum()) > limit:
            break
        path = [node]
        while load[path[-1]] >= capacities[path[-1]] - scale and len(path) <= nodes:
            path.append(int(following[path[-1]]))
        steps = list(pairwise(path))
        amount = min(
            load[node] - capacities[node],
            capacities[path[-1]] - load[path[-1]],
            *(flow[movers[here, there], here] for here, there in steps),
        )
        for here, there in steps:
            flow[movers[here, there], here] -= amount
            flow[movers[here, there], there] += amount
        load[node] -= amount
        load[path[-1]] += amount
        total += float(amount) * sum(float(lengths[here, there]) for here, there in steps)
        for vertex in path:
            lengths[vertex], movers[vertex] = cheapest_moves(rtt, flow, vertex)
    under = np.nonzero(load < capacities - scale)[0]
    prices = distances(lengths, under)[0] if len(under) else np.zeros(nodes)
    prices = np.where(np.isfinite(prices), prices, 0.0)
    unserved = float(np.maximum(load - capacities - scale, 0.0).sum())
    return Assignment(flow, prices, float((flow * rtt).sum()), unserved)


def worth(found: Assignment, worst: float) -> float:
    """Return what a search compares: the total, with unserved demand at ten times the worst RTT."""
    return found.total + 10.0 * worst * found.unserved


def swap_bounds(rtt: Floats, weights: Floats, capacities: Floats, opened: Ints, prices: Floats) -> Floats:
    """Return (open, candidates): a total that the swap of the two cannot beat, from the prices before it."""
    own = rtt[:, opened] + prices[None, :]
    nearest = own.argmin(axis=1)
    rows = np.arange(len(rtt))
    first = own[rows, nearest]
    own[rows, nearest] = np.inf
    second = own.min(axis=1) if len(opened) > 1 else np.full(len(rtt), np.inf)
    result = np.empty((len(opened), rtt.shape[1]))
    paid = prices * capacities[opened]
    nearer = np.minimum(rtt, first[:, None])
    whole = weights @ nearer
    for index in range(len(opened)):
        others = float(paid.sum() - paid[index])
        mine = np.nonzero(nearest == index)[0]  # only for these users the others are farther than before
        rest = np.minimum(rtt[mine], second[mine, None])
        bound = whole + weights[mine] @ (rest - nearer[mine])
        if prices[index] > 0.0:
            left = np.where(nearest == index, second, first)
            priced = weights @ np.minimum(rtt + prices[index], left[:, None]) - prices[index] * capacities
            bound = np.maximum(bound, priced)
        result[index] = bound - others
    result[:, opened] = np.inf
    return result


def alternate(rtt: Floats, weights: Floats, capacities: Floats, opened: Ints) -> tuple[Ints, Assignment]:
    """Move each open node to the best place for the users it has, assign again, until nothing improves
    (Maranzana).
    """
    worst = float(rtt.max())
    found = assign(rtt[:, opened], weights, capacities[opened])
    for _ in range(ALTERNATIONS):
        costs = csr_matrix(found.flow.T) @ rtt
        costs[capacities[None, :] < capacities[opened][:, None]] = np.inf
        trial = opened.copy()
        taken = set(opened.tolist())
        for index in range(len(opened)):
            taken.discard(int(trial[index]))
            costs[index, list(taken)] = np.inf
            trial[index] = int(np.argmin(costs[index]))
            taken.add(int(trial[index]))
        if (trial == opened).all():
            break
        limit = np.inf if found.unserved > 0 else found.total
        then = assign(rtt[:, trial], weights, capacities[trial], limit)
        if worth(then, worst) >= worth(found, worst) * (1.0 - TINY):
            break
        opened, found = trial, then
    return opened, found


def improve(
    rtt: Floats, weights: Floats, capacities: Floats, opened: Ints, steps: int = STEPS_MAX
) -> tuple[Ints, Assignment]:
    """Return a set of open nodes that alternation and the promising swaps do not improve."""
    worst = float(rtt.max())
    opened, found = alternate(rtt, weights, capacities, opened)
    for _ in range(steps):
        bounds = swap_bounds(rtt, weights, capacities, opened, found.prices)
        now = worth(found, worst)
        order = np.argsort(bounds, axis=None)[:TRIALS_MAX]
        for position in order:
            row, column = np.unravel_index(int(position), bounds.shape)
            if bounds[row, column] >= now * (1.0 - TINY):
                return opened, found
            trial = opened.copy()
            trial[row] = column
            then = assign(
                rtt[:, trial], weights, capacities[trial], np.inf if found.unserved > 0 else found.total
            )
            if worth(then, worst) < now * (1.0 - TINY):
                opened, found = alternate(rtt, weights, capacities, trial)
                break
        else:
            return opened, found
    return opened, found


def cheapest(rtt: Floats, weights: Floats, capacities: Floats, sets: list[Ints], count: int) -> list[Ints]:
    """Return the sets of open nodes, at most `count`, with the least total of their exact assignment."""
    worst = float(rtt.max())
    found: list[float] = []
    for opened in sets:
        limit = sorted(found)[count - 1] if len(found) >= count else np.inf
        found.append(worth(assign(rtt[:, opened], weights, capacities[opened], limit), worst))
    return [sets[index] for index in np.argsort(found)[:count]]


def solve(
    rtt: Floats,
    weights: Floats,
    capacities: Floats,
    replicas: int,
    starts: list[Ints],
    rng: np.random.Generator,
    restarts: int,
) -> tuple[Ints, Assignment]:
    """Return the best set found from several starts and `restarts` shaken copies of the best."""
    worst = float(rtt.max())
    roomy = np.argsort(-capacities, kind="stable")[:replicas]
    results = [improve(rtt, weights, capacities, start) for start in starts]
    if all(found.unserved > 0 for _, found in results):
        results.append(improve(rtt, weights, capacities, roomy))
    best = min(results, key=lambda item: worth(item[1], worst))
    for _ in range(restarts):
        opened = best[0].copy()
        others = np.setdiff1d(np.arange(rtt.shape[1]), opened)
        swapped = rng.choice(replicas, max(1, replicas // SHAKEN), replace=False)
        if len(others) < len(swapped):
            break
        opened[swapped] = rng.choice(others, len(swapped), replace=False)
        trial = improve(rtt, weights, capacities, opened)
        best = min(best, trial, key=lambda item: worth(item[1], worst))
    return best
