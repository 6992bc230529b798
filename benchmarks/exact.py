"""Exact placements, to compare ours with: slow, and not part of the product.

Two solvers that share nothing but the matrix: mixed-integer programming (HiGHS), and for the placements with
capacities that it does not finish, our own branch and bound, run to the end. To HiGHS the latter may be given
as a help: what reduced costs exclude is left out, and counts of open nodes in clusters are integers to branch
on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csc_array, hstack

from crossedge.sched.bounds import Relaxation
from crossedge.sched.branching import clusters

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
GAP = 1e-4  # relative, at which an answer counts as optimal
ROOT_STEPS = 3000
COUNTS = 40  # clusters whose number of open nodes is an integer of its own


@dataclass(frozen=True, slots=True)
class Exact:
    """What the solver says: totals of weight times RTT, and whether it finished.

    Attributes:
        total: the best answer's, inf where it found none.
        bound: none can be below this.
        finished: whether the answer is proven to be the optimum (to the solver's 0.01 %).
        seconds: how long it took.
    """

    total: float
    bound: float
    finished: bool
    seconds: float


def reduced(
    rtt: Floats, weights: Floats, capacities: Floats, opened: Ints, upper: float
) -> tuple[Flags, Flags]:
    """Return which nodes (nodes,) and which pairs (users, nodes) an answer better than `upper` may use.

    At the best multipliers found, the Lagrangian bound with a node forced open, or a user forced to it, is
    above `upper` for all others. The latter holds for users that are not split: demands of one and whole
    capacities.
    """
    users, nodes = rtt.shape
    relaxation = Relaxation(rtt, weights, capacities)
    whole = np.arange(nodes)
    relaxed = relaxation.solve([(whole, len(opened))], relaxation.start(opened), upper, ROOT_STEPS)
    worth = relaxed.worths[0]
    dearer = np.maximum(worth - np.partition(worth, len(opened) - 1)[len(opened) - 1], 0.0)
    limit = upper * (1.0 + 1e-9)
    open_to = relaxed.bound + dearer <= limit
    pairs = np.broadcast_to(open_to, (users, nodes)).copy()
    if np.all(weights == 1.0) and np.all(capacities == np.floor(capacities)):
        gain = rtt - relaxed.multipliers[:, None]
        for node in np.nonzero(open_to)[0]:
            taken = np.sort(np.minimum(gain[:, node], 0.0))
            last = taken[min(int(capacities[node]), users) - 1]  # the user that makes room
            pairs[:, node] = relaxed.bound + dearer[node] + np.maximum(gain[:, node] - last, 0.0) <= limit
    return open_to, pairs


def exact(
    rtt: Floats,
    weights: Floats,
    replicas: int,
    capacities: Floats | None,
    limit: float,
    known: tuple[Ints, float] | None = None,
) -> Exact:
    """Solve one placement by HiGHS: (users, candidates) of RTT, demand, capacities; limit in seconds.

    The strong formulation: x[i, j] of user i's demand goes to j, only if y[j] is open. With `known`, an
    answer's nodes and total, the problem with capacities is reduced first (`reduced`), which keeps every
    better answer.
    """
    users, nodes = rtt.shape
    start = time.perf_counter()
    open_to, pairs = np.ones(nodes, dtype=bool), np.ones((users, nodes), dtype=bool)
    if known is not None and capacities is not None:
        open_to, pairs = reduced(rtt, weights, capacities, *known)
    rows, columns = np.nonzero(pairs)
    count, ones, every = len(rows), np.ones(len(rows)), np.arange(len(rows))
    groups = np.zeros((0, nodes))
    if known is not None:
        member, apart = clusters(rtt)
        groups = member[np.argsort(-apart, kind="stable")[:COUNTS]]
    counts = len(groups)

    def matrix(x: coo_array, y: coo_array, z: coo_array | None = None) -> csc_array:
        return csc_array(hstack([x, y, coo_array((y.shape[0], counts)) if z is None else z]))

    empty = coo_array((1, count))
    constraints = [
        LinearConstraint(
            matrix(coo_array((ones, (rows, every)), shape=(users, count)), coo_array((users, nodes))),
            1.0,
            1.0,
        ),
        LinearConstraint(matrix(empty, coo_array(np.ones((1, nodes)))), replicas, replicas),
        LinearConstraint(
            matrix(
                coo_array((ones, (every, every))), coo_array((-ones, (every, columns)), shape=(count, nodes))
            ),
            -np.inf,
            0.0,
        ),
    ]
    if capacities is not None:
        load = coo_array((weights[rows], (columns, every)), shape=(nodes, count))
        constraints.append(LinearConstraint(matrix(load, coo_array(np.diag(-capacities))), -np.inf, 0.0))
    if counts:
        sums = matrix(coo_array((counts, count)), coo_array(groups), coo_array(-np.eye(counts)))
        constraints.append(LinearConstraint(sums, 0.0, 0.0))
    result = milp(
        np.concatenate([weights[rows] * rtt[rows, columns], np.zeros(nodes + counts)]),
        integrality=np.concatenate([np.zeros(count), np.ones(nodes + counts)]),
        bounds=Bounds(0.0, np.concatenate([ones, open_to.astype(float), np.full(counts, float(replicas))])),
        constraints=constraints,
        options={"time_limit": limit, "mip_rel_gap": GAP},
    )
    seconds = time.perf_counter() - start
    total = float(result.fun) if result.fun is not None else float("inf")
    bound = float(result.mip_dual_bound) if result.mip_dual_bound is not None else 0.0
    return Exact(total, bound, result.status == 0, seconds)
