"""Numbers for the pairs that nobody measured, with a confidence; none for what cannot be reached.

Three estimators compete on measured pairs that are hidden from them, and the best one is used: shortest paths
over measured pairs, coordinates, and coordinates corrected by region. The last one learns what geometry
cannot know: paths between two regions are detours by much the same factor, so the residual (the logarithm of
measured over estimated) of a pair is the mean of the residuals of measured pairs whose ends are near its
ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, shortest_path

from crossedge.sched.coordinates import Coordinates, fit
from crossedge.sched.matrix import Flags, Floats, Ints, LatencyMatrix, State

MIN_PEERS = 3  # measured pairs that a node needs before anything is estimated for it
FOLDS = 3
FIT_PAIRS = 32  # per node: more would move coordinates little and take long
ROUNDS = (
    (40.0, 2),
    (20.0, 3),
    (10.0, 3),
)  # how near is near in ms, and how often residuals are taken at that
SHRINK = 0.1  # measured pairs' worth of doubt in a regional residual
RESIDUAL_MAX = 1.0  # of one round: a factor of e
BLOCK = 4096  # pairs evaluated at once

Pairs = tuple[Ints, Ints, Floats]
Estimator = Callable[[int, Ints, Ints, Floats, Floats, np.random.Generator], Floats]


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """A completed matrix and how it came about.

    Attributes:
        matrix: measured, else estimated, else nothing.
        estimator: the one that was used, "none" where nothing was left to estimate.
        errors: median relative error of each estimator on pairs hidden from it.
        lone: indices of nodes for which nothing was estimated: too little is known of them, or they do not
            answer.
    """

    matrix: LatencyMatrix
    estimator: str
    errors: dict[str, float]
    lone: Ints


def by_paths(
    n: int, rows: Ints, columns: Ints, rtt: Floats, weight: Floats, rng: np.random.Generator
) -> Floats:
    """Estimate each pair as the shortest path over measured pairs: never too near, often too far."""
    del weight, rng
    graph = csr_matrix((rtt, (rows, columns)), shape=(n, n))
    result: Floats = shortest_path(graph, directed=False)
    return result


def by_coordinates(
    n: int, rows: Ints, columns: Ints, rtt: Floats, weight: Floats, rng: np.random.Generator
) -> Floats:
    """Estimate each pair by coordinates fitted to the measured pairs, or to enough of them."""
    every = np.arange(n)
    if len(rtt) > FIT_PAIRS * n:
        kept = rng.choice(len(rtt), FIT_PAIRS * n, replace=False)
        rows, columns, rtt, weight = rows[kept], columns[kept], rtt[kept], weight[kept]
    return fit(n, rows, columns, rtt, rng, weight).block(every, every)


def by_region(
    n: int, rows: Ints, columns: Ints, rtt: Floats, weight: Floats, rng: np.random.Generator
) -> Floats:
    """Estimate each pair by coordinates, then correct it by the residuals between the same regions."""
    return corrected(by_coordinates(n, rows, columns, rtt, weight, rng), rows, columns, rtt, weight)


def corrected(base: Floats, rows: Ints, columns: Ints, rtt: Floats, weight: Floats) -> Floats:
    """Return `base` (n, n) times the exponential of residuals smoothed over both ends.

    The kernel of an end is exp(-base / s) with s from wide to narrow, each width repeated on what is left.
    """
    n = len(base)
    both = np.concatenate([rows, columns]), np.concatenate([columns, rows])
    total = np.zeros((n, n))
    at_pairs = np.zeros(len(rtt))
    goal = np.log(rtt / np.maximum(base[rows, columns], 1e-3))
    for width, repeats in ROUNDS:
        kernel = np.exp(-base / width)
        support = kernel @ (csr_matrix((np.tile(weight, 2), both), shape=(n, n)) @ kernel) + SHRINK
        summed = np.zeros(len(rtt))
        for _ in range(repeats):
            residual = np.clip(goal - at_pairs, -RESIDUAL_MAX, RESIDUAL_MAX) * weight
            summed += residual
            half = csr_matrix((np.tile(residual, 2), both), shape=(n, n)) @ kernel
            for start in range(0, len(rtt), BLOCK):
                cut = slice(start, start + BLOCK)
                at_pairs[cut] += (
                    np.einsum("ij,ij->i", kernel[rows[cut]], half[:, columns[cut]].T)
                    / support[rows[cut], columns[cut]]
                )
        total += kernel @ (csr_matrix((np.tile(summed, 2), both), shape=(n, n)) @ kernel) / support
    result: Floats = base * np.exp(total)
    return (result + result.T) / 2


ESTIMATORS: dict[str, Estimator] = {
    "shortest-paths": by_paths,
    "coordinates": by_coordinates,
    "regional": by_region,
}


def estimable(matrix: LatencyMatrix) -> tuple[Flags, Ints]:
    """Return which pairs may be estimated, (n, n), and the indices of nodes for which none may.

    Both ends must have answered at least `MIN_PEERS` peers and more peers than not, and a chain of measured
    pairs must join them: across a partition there is nothing to estimate from. Pairs found unreachable stay
    so.
    """
    measured = matrix.measured
    silent = matrix.state == State.UNREACHABLE
    answers, silences = measured.sum(1), silent.sum(1)
    sound = (answers >= min(MIN_PEERS, max(matrix.size - 1, 1))) & (answers > silences)
    _, part = connected_components(csr_matrix(measured & sound[:, None] & sound[None, :]), directed=False)
    allowed = sound[:, None] & sound[None, :] & (part[:, None] == part[None, :])
    allowed &= matrix.state == State.UNMEASURED
    np.fill_diagonal(allowed, False)
    return allowed, np.nonzero(~sound)[0]


def cross_validated(
    n: int, pairs: Pairs, weight: Floats, rng: np.random.Generator, folds: int = FOLDS
) -> dict[str, float]:
    """Return each estimator's median relative error on measured pairs that were hidden from it."""
    rows, columns, rtt = pairs
    if len(rtt) > FIT_PAIRS * n:  # enough to tell which is best
        kept = rng.choice(len(rtt), FIT_PAIRS * n, replace=False)
        rows, columns, rtt, weight = rows[kept], columns[kept], rtt[kept], weight[kept]
    fold = rng.permutation(len(rtt)) % (folds * 2)
    misses: dict[str, list[Floats]] = {name: [] for name in ESTIMATORS}
    for number in range(folds):
        hidden = fold == number
        shown = ~hidden
        known = rows[shown], columns[shown], rtt[shown], weight[shown]
        base = by_coordinates(n, *known, rng)
        for name, estimate in (
            ("shortest-paths", by_paths(n, *known, rng)),
            ("coordinates", base),
            ("regional", corrected(base, *known)),  # without a second fit
        ):
            miss = np.abs(estimate[rows[hidden], columns[hidden]] - rtt[hidden]) / rtt[hidden]
            misses[name].append(np.where(np.isfinite(miss), miss, 1.0))
    return {name: float(np.median(np.concatenate(found))) for name, found in misses.items()}


def completed(matrix: LatencyMatrix, rng: np.random.Generator, estimator: str | None = None) -> Completion:
    """Fill what may be estimated.

    Args:
        matrix: measured pairs.
        rng: seeds folds and starts.
        estimator: name of one of `ESTIMATORS`; None lets cross-validation choose.

    The confidence of an estimate is what the estimator's error leaves of 1, less where few measured pairs lie
    near.
    """
    allowed, lone = estimable(matrix)
    rows, columns, rtt = matrix.pairs()
    if not allowed.any() or not len(rtt):
        return Completion(matrix, "none", {}, lone)
    weight = matrix.confidence[rows, columns]
    errors: dict[str, float] = {}
    if estimator is None:
        errors = cross_validated(matrix.size, (rows, columns, rtt), weight, rng)
        estimator = min(errors, key=lambda name: errors[name])
    estimate = ESTIMATORS[estimator](matrix.size, rows, columns, rtt, weight, rng)
    fill = allowed & np.isfinite(estimate) & (estimate > 0)
    result = np.where(fill, estimate, matrix.rtt)
    state = np.where(fill, np.uint8(State.ESTIMATED), matrix.state).astype(np.uint8)
    width = ROUNDS[1][0]
    kernel = np.exp(-np.where(np.isfinite(result), result, np.inf) / width)
    graph = csr_matrix((np.tile(weight, 2), (np.r_[rows, columns], np.r_[columns, rows])), shape=result.shape)
    support = kernel @ (graph @ kernel)
    trust = max(0.0, 1.0 - errors.get(estimator, 0.25)) * support / (1.0 + support)
    confidence = np.where(fill, trust, matrix.confidence)
    return Completion(LatencyMatrix(matrix.names, result, state, confidence), estimator, errors, lone)


def spread_coordinates(matrix: LatencyMatrix, rng: np.random.Generator) -> Coordinates:
    """Return coordinates of all nodes of a matrix, for maps and for choosing whom to probe."""
    rows, columns, rtt = matrix.pairs()
    return fit(matrix.size, rows, columns, rtt, rng, matrix.confidence[rows, columns])
