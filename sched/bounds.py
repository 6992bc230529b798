"""Lower bounds for placements: Lagrangian duals of the p-median problem, raised by subgradient steps.

The constraints "every user is served" are relaxed with one multiplier per user. Whatever the multipliers, the
dual value is not above the optimum (weak duality), so a bound holds however few steps were made. Rounding of
floats is taken off at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossedge.sched.matrix import Floats, Ints

NEAR_PARTS = 3  # of the candidates nearest to a user, replicas' worth of them times this are priced
NEAR_MIN = 200
CLOSE_ENOUGH = 2e-4  # relative gap at which to stop
PATIENCE = 10  # steps without progress before the step length is halved
STEP = 1.2
STEP_MIN = 1e-3
MEMORY = 0.6  # share of the last direction that is kept
ROUNDING = 1e-9
SETS = 12  # that a bound hands on to the search
KEPT_SHARE = 0.9  # of a node's share, from one step to the next
SORT_PRICE = 12  # what pricing a pair costs where demands or capacities differ, over where they do not


def median_bound(cost: Floats, replicas: int, opened: Ints, steps: int) -> tuple[float, list[Ints]]:
    """Return a lower bound of the least total cost of serving all users from `replicas` open nodes, and sets.

    The sets are those opened at the best multipliers, the best last: good ones to search from.

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
    sets: dict[bytes, Ints] = {}
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
            nodes = np.sort(picked)
            sets.pop(nodes.tobytes(), None)
            sets[nodes.tobytes()] = nodes
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
    return max(0.0, best - ROUNDING * abs(best)), list(sets.values())[-SETS:]


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """What the relaxed problem with capacities says.

    Attributes:
        bound: no placement within the parts has a total below this.
        multipliers: (users,) the best found.
        worths: per part, what opening each of its nodes would add at those multipliers; never above 0.
        shares: per part, how often each node was opened in the later steps, 0..1: nearly the answer of the
            linear programme.
        sets: of open nodes, sorted, each the first at multipliers that were the best so far; the best last.
        steps: that were made.
        priced: pairs looked at in each.
    """

    bound: float
    multipliers: Floats
    worths: list[Floats]
    shares: list[Floats]
    sets: list[Ints]
    steps: int
    priced: int


class Relaxation:
    """The problem with capacities, its users' demand relaxed.

    With the multipliers fixed, each node alone solves a continuous knapsack: the users that it would gain
    most by. Of each part of the candidates the nodes that are worth most are opened, as many as it says.
    """

    def __init__(self, rtt: Floats, weights: Floats, capacities: Floats) -> None:
        """Take RTT (users, candidates) in ms, demand that may be split, and capacities (candidates,)."""
        self._costs = np.ascontiguousarray(rtt.T)
        self._weights, self._capacities = weights, capacities
        alike = bool(np.all(weights == weights[0]) and np.all(capacities == capacities[0]))
        room = int(capacities[0] // weights[0]) if alike else 0
        self._room = room if alike and room and room * weights[0] == capacities[0] else 0
        self._free = bool(np.all(capacities >= weights.sum()))
        self.price = 1 if self._room or self._free else SORT_PRICE

    def start(self, opened: Ints) -> Floats:
        """Return multipliers to begin with, from a good set of open nodes: each user's second nearest."""
        position = min(1, len(opened) - 1)
        result: Floats = np.partition(self._costs[opened], position, axis=0)[position]
        return result

    def _worth(self, reduced: Floats, capacities: Floats) -> Floats:
        """Return what opening each node adds, from what each user adds there."""
        if self._free:
            priced: Floats = reduced @ self._weights
            return priced
        if self._room:
            if self._room < reduced.shape[1]:
                reduced = np.partition(reduced, self._room - 1, axis=1)[:, : self._room]
            alike: Floats = reduced.sum(axis=1) * float(self._weights[0])
            return alike
        order = np.argsort(reduced, axis=1)
        taken = filled(self._weights[order], capacities)
        result: Floats = (np.take_along_axis(reduced, order, axis=1) * taken).sum(axis=1)
        return result

    def _slope(self, reduced: Floats, capacities: Floats) -> Floats:
        """Return the demand that the open nodes leave, or serve too often (negative), per user."""
        if self._free:
            return np.asarray(self._weights * (1.0 - (reduced < 0.0).sum(axis=0)), dtype=np.float64)
        order = np.argsort(reduced, axis=1)
        amount = filled(self._weights[order], capacities)
        amount *= np.take_along_axis(reduced, order, axis=1) < 0.0
        used = np.bincount(order.ravel(), amount.ravel(), len(self._weights))
        return np.asarray(self._weights - used, dtype=np.float64)

    def solve(
        self,
        parts: Sequence[tuple[Ints, int]],
        multipliers: Floats,
        upper: float,
        steps: int,
        length: float = STEP,
    ) -> Relaxed:
        """Raise the bound by subgradient steps.

        Args:
            parts: disjoint sets of candidates and how many of each are open.
            multipliers: (users,) to begin with.
            upper: the total of a good answer; the steps end where the bound comes close.
            steps: at most so many.
            length: of the first one.
        """
        active = np.concatenate([nodes for nodes, _ in parts])
        ends = np.cumsum([len(nodes) for nodes, _ in parts])
        spans = [
            (int(end) - len(nodes), int(end), number)
            for (nodes, number), end in zip(parts, ends, strict=True)
        ]
        costs, capacities = self._costs[active], self._capacities[active]
        best, waited, made = -np.inf, 0, 0
        best_multipliers, best_worth = multipliers, np.zeros(len(active))
        direction, share = np.zeros(len(multipliers)), np.zeros(len(active))
        sets: dict[bytes, Ints] = {}
        for made in range(1, steps + 1):
            reduced = np.minimum(costs - multipliers, 0.0)
            worth = self._worth(reduced, capacities)
            picked = np.concatenate(
                [start + lowest(worth[start:end], number) for start, end, number in spans]
            )
            value = float(self._weights @ multipliers + worth[picked].sum())
            share *= KEPT_SHARE if made > 1 else 0.0
            share[picked] += 1.0 - KEPT_SHARE if made > 1 else 1.0
            waited = 0 if value > best + 1e-6 * abs(best if np.isfinite(best) else 1.0) else waited + 1
            if value > best:
                best, best_multipliers, best_worth = value, multipliers, worth
                nodes = np.sort(active[picked])
                sets.pop(nodes.tobytes(), None)
                sets[nodes.tobytes()] = nodes
            if best >= upper * (1.0 - CLOSE_ENOUGH / 2) or length < STEP_MIN:
                break
            if waited >= PATIENCE:
                length, waited = length / 2, 0
                multipliers = best_multipliers
                direction[:] = 0.0
                continue
            slope = self._slope(reduced[picked], capacities[picked])
            direction = slope + MEMORY * direction
            norm = float(direction @ direction)
            if norm == 0.0:
                break
            multipliers = multipliers + length * (upper - value) / norm * direction
        cut = ends[:-1]
        return Relaxed(
            best,
            best_multipliers,
            np.split(best_worth, cut),
            np.split(share, cut),
            list(sets.values())[-SETS:],
            made,
            costs.size * self.price,
        )


def lowest(values: Floats, number: int) -> Ints:
    """Return the indices of the `number` least values, in any order."""
    if number >= len(values):
        return np.arange(len(values))
    return np.argpartition(values, number - 1)[:number]


def filled(demand: Floats, capacities: Floats) -> Floats:
    """Return how much of each demand (nodes, users), in order, fits into each node's capacity."""
    after = np.cumsum(demand, axis=1)
    return np.clip(capacities[:, None] - (after - demand), 0.0, demand)
