"""A map of the nodes in the plane: distances as near to the RTT as two dimensions allow, still from round to
round.

Stress majorisation (de Leeuw, 1977; "SMACOF") from the positions of the round before, turned and mirrored
onto them (orthogonal Procrustes), so that a node moves on the map only when its latencies do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import eigsh

from crossedge.sched.matrix import Floats

WORK = 40_000_000  # distances computed by one layout
STEPS_MIN = 5
STEPS_MAX = 100
ENOUGH = 1e-4  # relative fall of the stress under which a further step is not worth it
NEAR = 0.05  # ms between two nodes that fall on the same spot

Positions = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Positions (n, 2) in ms, `nan` for nodes of which nothing is known, and the share of RTT that is not
    shown.
    """

    points: Floats
    stress: float | None


def first_points(target: Floats, known: Floats) -> Floats:
    """Return (n, 2) by classical multidimensional scaling, unknown distances taken as the mean."""
    n = len(target)
    mean = float(target[known > 0].mean()) if known.any() else 1.0
    square = np.where(known > 0, target, mean) ** 2
    np.fill_diagonal(square, 0.0)
    rows = square.mean(axis=0)
    centred = -0.5 * (square - rows[None, :] - rows[:, None] + rows.mean())
    if n < 4:
        values, vectors = np.linalg.eigh(centred)
    else:
        values, vectors = eigsh(centred, k=2, which="LA", v0=1.0 + 0.01 * np.cos(np.arange(n)), tol=1e-4)
    order = np.argsort(values)[::-1][:2]
    points: Floats = vectors[:, order] * np.sqrt(np.maximum(values[order], 0.0))
    if points.shape[1] < 2:
        points = np.hstack([points, np.zeros((n, 2 - points.shape[1]))])
    return points


def spread(points: Floats) -> Floats:
    """Return the points, moved a little and always alike, so that no two fall on the same spot."""
    angle = np.arange(len(points)) * 2.399963  # the golden angle
    moved: Floats = points + NEAR * np.c_[np.cos(angle), np.sin(angle)]
    return moved


def distances(points: Floats) -> Floats:
    """Return (n, n) Euclidean distances, in place where that saves memory."""
    square: Floats = (points**2).sum(1)
    result: Floats = points @ points.T
    result *= -2.0
    result += square[:, None]
    result += square[None, :]
    np.maximum(result, 1e-8, out=result)
    np.sqrt(result, out=result)
    return result


def majorised(points: Floats, target: Floats, known: Floats, steps: int) -> tuple[Floats, float]:
    """Return points after some Guttman transforms, and the stress. An unknown distance pulls nowhere."""
    n = len(points)
    whole = float((target**2 * known).sum())
    stress = last = np.inf
    for _ in range(steps):
        apart = distances(points)
        stress = float((((apart - target) ** 2) * known).sum())
        if last - stress < ENOUGH * last:
            break
        last = stress
        ratio = np.where(known > 0, target / apart, 1.0)
        np.fill_diagonal(ratio, 0.0)
        points = (points * ratio.sum(1)[:, None] - ratio @ points) / n
    return points, float(np.sqrt(stress / whole)) if whole > 0 else 0.0


def aligned(points: Floats, before: Floats, common: Sequence[int]) -> Floats:
    """Return the points moved, turned and mirrored so that those in `common` lie nearest to `before`."""
    index = np.asarray(common, dtype=np.int64)
    here, there = points[index].mean(axis=0), before[index].mean(axis=0)
    u, _, v = np.linalg.svd((points[index] - here).T @ (before[index] - there))
    result: Floats = (points - here) @ (u @ v) + there
    return result


def laid_out(names: Sequence[str], rtt: Floats, before: Positions) -> Layout:
    """Return the map of a matrix (n, n) in ms with `nan` for what is not known.

    Args:
        names: the nodes.
        rtt: their round trips.
        before: positions in the round before, as far as there are any.
    """
    n = len(names)
    points = np.full((n, 2), np.nan)
    finite = np.isfinite(rtt)
    placed = np.nonzero(finite.sum(1) > 1)[0]
    if len(placed) < 2:
        points[placed] = 0.0
        return Layout(points, None)
    known = finite[np.ix_(placed, placed)].astype(np.float64)
    np.fill_diagonal(known, 0.0)
    target = np.nan_to_num(rtt[np.ix_(placed, placed)], nan=0.0)
    old = np.array([before.get(names[node], (np.nan, np.nan)) for node in placed.tolist()])
    held = np.nonzero(np.isfinite(old[:, 0]))[0]
    if len(held) >= 3 and 2 * len(held) >= len(placed):
        start = old.copy()
        for node in np.nonzero(~np.isfinite(old[:, 0]))[0]:
            to = np.where(known[node, held] > 0, target[node, held], np.inf)
            start[node] = old[held[int(np.argmin(to))]]
    else:
        start = first_points(target, known)
    steps = int(np.clip(WORK // len(placed) ** 2, STEPS_MIN, STEPS_MAX))
    found, stress = majorised(spread(start), target, known, steps)
    if len(held) >= 2:
        found = aligned(found, np.nan_to_num(old), held.tolist())
    else:
        found = found - found.mean(axis=0)
    points[placed] = found
    return Layout(points, stress)
