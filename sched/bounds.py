"""Lower bounds for placements: Lagrangian duals of the p-median problem, raised by subgradient steps.

The constraints "every user is served" are relaxed with one multiplier per user. Whatever the multipliers, the
dual value is not above the optimum (weak duality), so a bound holds however few steps were made. Rounding of
floats is taken off at the end.
"""

from __future__ import annotations

import numpy as np

from crossedge.sched.matrix import Floats, Ints

NEAR_PARTS = 3  # of the candidates nearest to a user, replicas' worth of them times this are priced
NEAR_MIN = 200
CLOSE_ENOUGH = 2e-4  # relative gap at which to stop
PATIENCE = 12  # steps without progress before the step length is halved
STEP = 1.2
STEP_MIN = 1e-3
MEMORY = 0.6  # share of the last direction that is kept
ROUNDING = 1e-9
SETS = 12  # that a bound hands on to the search


def median_bound(cost: Floats, replicas: int, opened: Ints, steps: int) -> float:
    """Return a lower bound of the least total cost of serving all users from `replicas` open nodes.

    Args:
        cost: (users, candidates), >= 0.
        replicas: how many are opened.
        opened: a good answer: it starts the multipliers and sets the length of the steps.
        steps: at most so many.

    A multiplier is kept at most at the cost of the user's farthest priced candidate, so that the candidates
    that are not priced have no reduced cost below zero: the bound is exact although most of `cost` is never
    looked at.
    """
    users, candidates = cost.shape
    near = min(candidates, max(NEAR_MIN, NEAR_PARTS * candidates // max(replicas, 1)))
    if near < candidates:
        columns = np.argpartition(cost, near - 1, axis=1)[:, :near]
        values = np.take_along_axis(cost, columns, axis=1)
        limit = values.max(axis=1)
    else:
        columns = np.broadcast_to(np.arange(candidates), cost.shape)
        values = cost
        limit = np.full(users, np.inf)
    flat = np.ascontiguousarray(columns).ravel()
    own = np.partition(cost[:, opened], min(1, len(opened) - 1), axis=1)
    upper = float(own[:, 0].sum())
    last = own[:, min(1, len(opened) - 1)]
    multipliers = np.minimum(0.5 * (own[:, 0] + last) if len(opened) > 1 else own[:, 0] * 1.5, limit)
    best, length, waited = -np.inf, STEP, 0
    best_multipliers = multipliers
    direction = np.zeros(users)
    chosen = np.zeros(candidates, dtype=bool)
    for _ in range(steps):
        reduced = np.minimum(values - multipliers[:, None], 0.0)
        worth = np.bincount(flat, reduced.ravel(), candidates)
        picked = (
            np.argpartition(worth, replicas - 1)[:replicas]
            if replicas < candidates
            else np.arange(candidates)
        )
        value = float(multipliers.sum() + worth[picked].sum())
        if value > best + 1e-6 * abs(best if np.isfinite(best) else 1.0):
            waited = 0
        else:
            waited += 1
        if value > best:
            best, best_multipliers = value, multipliers
        if best >= upper * (1.0 - CLOSE_ENOUGH) or length < STEP_MIN:
            break
        if waited >= PATIENCE:
            length, waited = length / 2, 0
            multipliers = best_multipliers
            direction[:] = 0.0
            continue
        chosen[:] = False
        chosen[picked] = True
        slope = 1.0 - ((reduced < 0.0) & chosen[columns]).sum(axis=1)
        direction = slope + MEMORY * direction
        norm = float(direction @ direction)
        if norm == 0.0:
            break
        multipliers = np.minimum(multipliers + length * (upper - value) / norm * direction, limit)
    return max(0.0, best - ROUNDING * abs(best))


def capacitated_bound(
    rtt: Floats, weights: Floats, capacities: Floats, replicas: int, opened: Ints, upper: float, steps: int
) -> tuple[float, list[Ints]]:
    """Return a lower bound of the least total with capacities kept, and good sets of open nodes.

    The sets are what the relaxed problem opened at its best multipliers, the best last, to search from.

    Args:
        rtt: (users, candidates) ms.
        weights: (users,) demand; it may be split between nodes.
        capacities: (candidates,) demand that a replica there can serve.
        replicas: how many are opened.
        opened: a good answer, to start from.
        upper: its total.
        steps: at most so many.

    With the multipliers fixed, each node alone solves a continuous knapsack: the users that it would gain
    most by.
    """
    users, candidates = rtt.shape
    uniform = bool(np.all(weights == weights[0]) and np.all(capacities == capacities[0]))
    room = int(capacities[0] // weights[0]) if uniform else 0
    whole = uniform and room * weights[0] == capacities[0] and room < users
    own = np.partition(rtt[:, opened], min(1, len(opened) - 1), axis=1)
    multipliers = own[:, min(1, len(opened) - 1)].copy()
    costs = np.ascontiguousarray(rtt.T)
    best, length, waited = -np.inf, STEP, 0
    best_multipliers = multipliers
    direction = np.zeros(users)
    sets: dict[bytes, Ints] = {}
    for _ in range(steps):
        reduced = np.minimum(costs - multipliers[None, :], 0.0)
        if whole:
            worth = np.partition(reduced, room - 1, axis=1)[:, :room].sum(axis=1) * weights[0]
        else:
            order = np.argsort(reduced, axis=1)
            taken = filled(weights[order], capacities)
            worth = (np.take_along_axis(reduced, order, axis=1) * taken).sum(axis=1)
        picked = (
            np.argpartition(worth, replicas - 1)[:replicas]
            if replicas < candidates
            else np.arange(candidates)
        )
        value = float(weights @ multipliers + worth[picked].sum())
        if value > best + 1e-6 * abs(best if np.isfinite(best) else 1.0):
            waited = 0
        else:
            waited += 1
        if value > best:
            best, best_multipliers = value, multipliers
            picked = np.sort(picked)
            sets.pop(picked.tobytes(), None)
            sets[picked.tobytes()] = picked
        if best >= upper * (1.0 - CLOSE_ENOUGH) or length < STEP_MIN:
            break
        if waited >= PATIENCE:
            length, waited = length / 2, 0
            multipliers = best_multipliers
            direction[:] = 0.0
            continue
        order = np.argsort(reduced[picked], axis=1)
        amount = filled(weights[order], capacities[picked])
        amount *= np.take_along_axis(reduced[picked], order, axis=1) < 0.0
        slope = weights - np.bincount(order.ravel(), amount.ravel(), users)
        direction = slope + MEMORY * direction
        norm = float(direction @ direction)
        if norm == 0.0:
            break
        multipliers = multipliers + length * (upper - value) / norm * direction
    return max(0.0, best - ROUNDING * abs(best)), list(sets.values())[-SETS:]


def filled(demand: Floats, capacities: Floats) -> Floats:
    """Return how much of each demand (nodes, users), in order, fits into each node's capacity."""
    after = np.cumsum(demand, axis=1)
    return np.clip(capacities[:, None] - (after - demand), 0.0, demand)
