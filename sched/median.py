"""The p-median problem without capacities: greedy, interchange and restarts, each step over all swaps at
once.

`cost` is always (users, candidates): weight times RTT. Fewer than a dozen array operations price every swap
of an open node for a closed one (after Resende and Werneck's profit tables, as matrix products).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossedge.sched.matrix import Floats, Ints

Costs = NDArray[np.float64] | NDArray[np.float32]

SWAPS_MAX = 200  # per descent; each one improves, so this is a bound and not a limit that is met
IMPROVES = 1e-9  # relative
STILL = 0.7  # of the promised gain
SMALL = 1_000_000  # entries of `cost` up to which the search uses double precision
RESTART_WORK = 3_000_000  # entries of `cost` times restarts
RESTARTS_MAX = 60
RELAXED_STARTS = 4  # sets that a bound opened, from which the search begins again
WORTH_A_SEARCH = 1.05  # times the best total, up to which it does
SHAKE = 0.4  # share of the open nodes that a restart exchanges


def total(cost: Costs, opened: Ints) -> float:
    """Return the cost of serving every user from its nearest open node."""
    return float(cost[:, opened].min(axis=1).sum())


def greedy(cost: Costs, replicas: int, opened: Ints | None = None) -> Ints:
    """Open the node that saves most, one after the other, beginning with those that are open."""
    result = [] if opened is None else [int(index) for index in opened]
    best = cost[:, result].min(axis=1) if result else cost.max(axis=1)
    sums = np.minimum(cost, best[:, None]).sum(axis=0, dtype=np.float64)
    while len(result) < replicas:
        sums[result] = np.inf
        node = int(np.argmin(sums))
        result.append(node)
        nearer = np.nonzero(cost[:, node] < best)[0]  # only these users' savings change
        part = cost[nearer]
        sums -= np.minimum(part, best[nearer, None]).sum(axis=0, dtype=np.float64)
        best[nearer] = part[:, node]
        sums += np.minimum(part, best[nearer, None]).sum(axis=0, dtype=np.float64)
    return np.array(result, dtype=np.int64)


def swap_costs(cost: Costs, opened: Ints) -> Floats:
    """Return (open, candidates): the change of the total if the one is exchanged for the other."""
    own = cost[:, opened]
    nearest = own.argmin(axis=1)
    rows = np.arange(len(cost))
    first = own[rows, nearest]
    if len(opened) > 1:
        own[rows, nearest] = np.inf
        second = own.min(axis=1)
    else:
        second = np.full(len(cost), np.inf)
    home = np.zeros((len(cost), len(opened)), dtype=cost.dtype)
    home[rows, nearest] = 1.0
    saved = np.minimum(cost, first[:, None]).sum(axis=0) - first.sum()
    lost = home.T @ np.clip(cost, first[:, None], second[:, None]) - (home.T @ first)[:, None]
    change: Floats = saved[None, :] + lost
    change[:, opened] = np.inf
    return change


def interchange(cost: Costs, opened: Ints) -> Ints:
    """Exchange open nodes for closed ones, the best swap first, until no swap is an improvement.

    Each pricing of all swaps is used for the best swap of every open node, one after the other: those that
    still gain most of what they promised after the earlier ones are taken.
    """
    opened = opened.copy()
    if len(opened) >= cost.shape[1]:
        return opened
    now = total(cost, opened)
    for _ in range(SWAPS_MAX):
        change = swap_costs(cost, opened)
        columns = change.argmin(axis=1)
        best = change[np.arange(len(opened)), columns]
        before = now
        for row in np.argsort(best):
            if best[row] >= -IMPROVES * now or columns[row] in opened:
                continue
            trial = opened.copy()
            trial[row] = columns[row]
            then = total(cost, trial)
            if then <= now + STILL * float(best[row]):
                opened, now = trial, then
        if now == before:
            break
    return opened


def solve(cost: Floats, replicas: int, rng: np.random.Generator, start: Ints | None = None) -> Ints:
    """Return the best set of open nodes found, sorted.

    Args:
        cost: (users, candidates).
        replicas: how many to open, at most the number of candidates.
        rng: shakes the best answer for restarts.
        start: an earlier answer to begin with as well.
    """
    large = cost.size > SMALL
    search: Costs = cost.astype(np.float32) if large else cost
    best = interchange(search, greedy(search, replicas))
    if start is not None and len(start) == replicas:
        other = interchange(search, start)
        best = min(best, other, key=lambda opened: total(cost, opened))
    for _ in range(int(np.clip(RESTART_WORK // cost.size, 1, RESTARTS_MAX))):
        kept = rng.permutation(best)[: replicas - max(1, round(SHAKE * replicas))]
        others = np.setdiff1d(np.arange(cost.shape[1]), best)
        extra = min(len(others), max(1, (replicas - len(kept)) // 2))
        shaken = np.concatenate([kept, rng.choice(others, extra, replace=False)]) if extra else kept
        trial = interchange(search, greedy(search, replicas, shaken.astype(np.int64)))
        best = min(best, trial, key=lambda opened: total(cost, opened))
    return np.sort(best)


def improved(cost: Floats, opened: Ints, sets: list[Ints]) -> Ints:
    """Return the best of an answer and what interchange makes of other sets of open nodes, sorted."""
    search: Costs = cost.astype(np.float32) if cost.size > SMALL else cost
    best = total(search, opened)
    for trial in sets[-RELAXED_STARTS:]:
        if total(search, trial) < best * WORTH_A_SEARCH:
            opened = min(opened, interchange(search, trial), key=lambda nodes: total(search, nodes))
    return np.sort(opened)
