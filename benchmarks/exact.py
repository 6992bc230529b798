"""Exact placements by mixed-integer programming (HiGHS), to compare ours with: slow, and not part of the
product.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, eye_array, hstack, kron

Floats = NDArray[np.float64]


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


def exact(rtt: Floats, weights: Floats, replicas: int, capacities: Floats | None, limit: float) -> Exact:
    """Solve one placement: (users, candidates) of RTT, demand of users, capacities of candidates; limit in
    seconds.

    The strong formulation: x[i, j] of user i's demand goes to j, only if y[j] is open.
    """
    users, nodes = rtt.shape
    count = users * nodes
    cost = np.concatenate([(weights[:, None] * rtt).ravel(), np.zeros(nodes)])
    served = hstack([kron(eye_array(users), np.ones((1, nodes))), coo_array((users, nodes))])
    opened = hstack([coo_array((1, count)), np.ones((1, nodes))])
    linked = hstack([eye_array(count), kron(np.ones((users, 1)), -eye_array(nodes))])
    constraints = [
        LinearConstraint(served.tocsc(), 1.0, 1.0),
        LinearConstraint(opened.tocsc(), replicas, replicas),
        LinearConstraint(linked.tocsc(), -np.inf, 0.0),
    ]
    if capacities is not None:
        load = hstack([kron(weights[None, :], eye_array(nodes)), coo_array(np.diag(-capacities))])
        constraints.append(LinearConstraint(load.tocsc(), -np.inf, 0.0))
    integrality = np.concatenate([np.zeros(count), np.ones(nodes)])
    start = time.perf_counter()
    result = milp(
        cost,
        integrality=integrality,
        bounds=Bounds(0.0, 1.0),
        constraints=constraints,
        options={"time_limit": limit, "mip_rel_gap": 1e-4},
    )
    seconds = time.perf_counter() - start
    total = float(result.fun) if result.fun is not None else float("inf")
    bound = float(result.mip_dual_bound) if result.mip_dual_bound is not None else 0.0
    return Exact(total, bound, result.status == 0, seconds)
