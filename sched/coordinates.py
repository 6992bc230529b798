"""Network coordinates: nodes as points with heights, fitted to all measured pairs at once.

The distance of two nodes is the Euclidean distance of their points plus both heights; a height is the access
link that every path of a node crosses (Dabek and others, Vivaldi, SIGCOMM 2004). Vivaldi fits them in a
decentralised way, one sample at a time; here all samples are known, so one robust fit takes them together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path
from scipy.spatial import cKDTree

from crossedge.sched.matrix import Floats, Ints

DIMENSIONS = 8
ROBUST_AT = 0.2  # relative error from which on an error counts linearly, not squared
SHRINK = 2.0  # weight of the term that keeps the points together where few measurements hold them
ITERATIONS = 400
ITERATIONS_WORK = 20_000_000  # pairs priced by a fit of very many nodes
LANDMARKS = 256  # nodes whose shortest paths place all others at the start
START_HEIGHT = 0.02  # of the root mean square RTT, but at most half of the shortest
TINY = 1e-6  # ms squared; keeps the slope finite where two points fall together


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    """Points (n, d) and heights (n,) in milliseconds."""

    points: Floats
    heights: Floats

    def between(self, rows: Ints, columns: Ints) -> Floats:
        """Return the estimated RTT of each pair (rows[i], columns[i]) in milliseconds."""
        apart = self.points[rows] - self.points[columns]
        distance: Floats = np.sqrt(np.einsum("ij,ij->i", apart, apart))
        return distance + self.heights[rows] + self.heights[columns]

    def block(self, rows: Ints, columns: Ints) -> Floats:
        """Return the estimated RTT of all rows to all columns, (len(rows), len(columns)), 0 for a node
        itself.
        """
        left, right = self.points[rows], self.points[columns]
        square = (left**2).sum(1)[:, None] + (right**2).sum(1)[None, :] - 2.0 * left @ right.T
        result: Floats = np.sqrt(np.maximum(square, 0.0))
        result += self.heights[rows][:, None] + self.heights[columns][None, :]
        result[rows[:, None] == columns[None, :]] = 0.0
        return result

    def nearest(self, count: int) -> tuple[Ints, Ints, Floats]:
        """Return `count` near pairs per node: rows, columns and milliseconds, one per direction."""
        n = len(self.points)
        tree = cKDTree(self.points)
        _, index = tree.query(self.points, min(count + 1, n))
        rows = np.repeat(np.arange(n), index.shape[1])
        columns = index.ravel().astype(np.int64)
        other = rows != columns
        rows, columns = rows[other], columns[other]
        return rows, columns, self.between(rows, columns)


def start_points(
    n: int, rows: Ints, columns: Ints, rtt: Floats, dimensions: int, rng: np.random.Generator
) -> Floats:
    """Return points (n, dimensions) by landmark multidimensional scaling of shortest paths (de Silva,
    Tenenbaum).

    Nodes that no path joins to a landmark are placed in the middle.
    """
    graph = csr_matrix((rtt, (rows, columns)), shape=(n, n))
    landmarks = np.sort(rng.choice(n, min(n, LANDMARKS), replace=False))
    paths = np.atleast_2d(shortest_path(graph, directed=False, indices=landmarks))
    finite = np.isfinite(paths)
    paths = np.where(finite, paths, paths[finite].max(initial=1.0))
    square = paths**2
    among = square[:, landmarks]
    mean = among.mean(axis=0)
    centred = -0.5 * (among - mean[None, :] - mean[:, None] + among.mean())
    values, vectors = np.linalg.eigh(centred)
    keep = np.argsort(values)[::-1][:dimensions]
    top = np.maximum(values[keep], 1e-9)
    points: Floats = -0.5 * (square - mean[:, None]).T @ (vectors[:, keep] / np.sqrt(top))
    points[:, values[keep] <= 1e-9] = 0.0
    if len(keep) < dimensions:
        points = np.hstack([points, np.zeros((n, dimensions - len(keep)))])
    return points


def fit(
    n: int,
    rows: Ints,
    columns: Ints,
    rtt: Floats,
    rng: np.random.Generator,
    weight: Floats | None = None,
    dimensions: int = DIMENSIONS,
) -> Coordinates:
    """Fit coordinates of `n` nodes to measured pairs by robust relative error.

    Args:
        n: how many nodes.
        rows: one end of each measured pair.
        columns: the other end.
        rtt: milliseconds, > 0.
        rng: chooses the landmarks of the start.
        weight: how much each pair counts (its confidence); all the same where None.
        dimensions: of the points, heights not counted.

    The loss of a pair is the pseudo-Huber function of (estimate - rtt) / rtt: a pair that no geometry
    explains (a detour) pulls, but does not rule.
    """
    points = start_points(n, rows, columns, rtt, dimensions, rng)
    scale = float(np.sqrt(np.mean(rtt**2)))
    weights = np.ones(len(rtt)) if weight is None else weight
    shape = n * dimensions

    def loss(flat: Floats, robust_at: float) -> tuple[float, Floats]:
        at = flat[:shape].reshape(n, dimensions)
        heights = flat[shape:]
        apart = at[rows] - at[columns]
        distance = np.sqrt(np.einsum("ij,ij->i", apart, apart) + TINY)
        error = (distance + heights[rows] + heights[columns] - rtt) / rtt
        root = np.sqrt(1.0 + (error / robust_at) ** 2)
        slope = weights * error / (robust_at * root * rtt)
        pull = (slope / distance)[:, None] * apart
        gradient = 2.0 * SHRINK / scale**2 * at
        for axis in range(dimensions):
            gradient[:, axis] += np.bincount(rows, pull[:, axis], n) - np.bincount(columns, pull[:, axis], n)
        rise = np.bincount(rows, slope, n) + np.bincount(columns, slope, n)
        value = robust_at * float(weights @ (root - 1.0)) + SHRINK * float((at**2).sum()) / scale**2
        return value, np.concatenate([gradient.ravel(), rise])

    flat = np.concatenate([points.ravel(), np.full(n, min(START_HEIGHT * scale, float(rtt.min()) / 2))])
    most = int(np.clip(ITERATIONS_WORK // len(rtt), 60, ITERATIONS))
    bounds = [(None, None)] * shape + [(0.0, None)] * n
    for robust_at, iterations in ((0.5, most // 2), (ROBUST_AT, most)):
        flat = minimize(
            loss,
            flat,
            (robust_at,),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": iterations},
        ).x
    return Coordinates(flat[:shape].reshape(n, dimensions).copy(), flat[shape:].copy())
