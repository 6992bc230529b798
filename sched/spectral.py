"""Spectral clustering of round trips at one scale and one number of groups, and the RTT silhouette.

Affinity exp(-rtt / s), symmetric normalised Laplacian (Ng, Jordan, Weiss), start by pivoted QR of the
eigenvectors (Damle, Minden, Ying), then Lloyd steps in the embedding and a last polish on the round trips
themselves. All of it is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh, qr
from scipy.sparse.linalg import LinearOperator, eigsh

from crossedge.sched.matrix import Floats, Ints

SCALE_PARTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # scales tried, as parts of the median RTT
SCALE_MIN = 1.0  # ms
GROUPS_MAX = 16
MIN_NODES = 3
MIN_SHARE = 0.01
DENSE_MAX = 700  # nodes up to which a full eigendecomposition is quicker than an iterative one
LLOYD_STEPS = 30
POLISH_STEPS = 12


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The leading eigenvectors (n, m) and eigenvalues (m,), largest first, of one scale's normalised
    affinity.
    """

    scale_ms: float
    values: Floats
    vectors: Floats


def minimum_size(n: int) -> int:
    """Return how many nodes a group has at least: 3, or 1 % of the nodes."""
    return max(MIN_NODES, int(np.ceil(MIN_SHARE * n)))


def spectrum(rtt: Floats, scale: float, count: int) -> Spectrum:
    """Return the leading part of the spectrum of exp(-rtt / scale), normalised by degree on both sides."""
    n = len(rtt)
    affinity = np.exp(rtt * (-1.0 / scale))
    np.nan_to_num(affinity, copy=False, nan=0.0)
    np.fill_diagonal(affinity, 0.0)
    root = 1.0 / np.sqrt(np.maximum(affinity.sum(1), 1e-12))
    affinity *= root[:, None]
    affinity *= root[None, :]
    count = min(count, n)
    if n <= DENSE_MAX or count >= n - 1:
        values, vectors = eigh(affinity, subset_by_index=(n - count, n - 1), overwrite_a=True)
    else:
        values, vectors = leading(affinity, count)
    order = np.argsort(values)[::-1]
    return Spectrum(scale, values[order], vectors[:, order])


def leading(affinity: object, count: int) -> tuple[Floats, Floats]:
    """Return the `count` largest eigenvalues and their vectors by Lanczos, from a fixed start.

    The matrix is shifted by one: its spectrum lies in -1..1, and the far end would otherwise be as large.
    """
    n = affinity.shape[0]  # type: ignore[attr-defined]  # an array or a sparse matrix

    def multiply(vector: Floats) -> Floats:
        product: Floats = affinity @ vector + vector  # type: ignore[operator]  # see above
        return product

    operator = LinearOperator((n, n), matvec=multiply, dtype=np.float64)
    start = 1.0 + 0.01 * np.cos(np.arange(n, dtype=np.float64))
    values, vectors = eigsh(operator, k=count, which="LA", v0=start, tol=1e-4, ncv=min(n, 2 * count + 20))
    return values - 1.0, vectors


def embedded(vectors: Floats, k: int) -> Ints:
    """Return labels (n,) of k clusters in the row-normalised embedding of the first k eigenvectors."""
    rows = vectors[:, :k]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    pivots = qr(rows.T, mode="r", pivoting=True)[1][:k]
    u, _, v = np.linalg.svd(rows[pivots].T)
    labels: Ints = np.argmax(np.abs(rows @ u @ v), axis=1).astype(np.int64)
    for _ in range(LLOYD_STEPS):
        onehot = indicator(labels, k)
        centres = (onehot.T @ rows) / np.maximum(onehot.sum(0), 1.0)[:, None]
        fresh = np.argmin((centres**2).sum(1)[None, :] - 2.0 * rows @ centres.T, axis=1).astype(np.int64)
        if (fresh == labels).all():
            break
        labels = fresh
    return labels


def indicator(labels: Ints, k: int) -> Floats:
    """Return (n, k) with a one where the node is of the group; a node without a group has none."""
    result = np.zeros((len(labels), k))
    rows = np.nonzero(labels >= 0)[0]
    result[rows, labels[rows]] = 1.0
    return result


def renumbered(labels: Ints) -> Ints:
    """Return labels counted from 0 without holes, the largest group first, then the one seen first."""
    present, first, sizes = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    order = sorted(range(len(present)), key=lambda index: (-sizes[index], first[index]))
    table = np.full(int(present.max(initial=-1)) + 2, -1, dtype=np.int64)
    for position, index in enumerate(order):
        table[present[index]] = position
    return table[labels]


class Rounds:
    """RTT sums from nodes to groups, for silhouettes; unknown pairs count for nothing."""

    def __init__(self, rtt: Floats, columns: Ints | None = None) -> None:
        """Take RTT (n, n), or (n, s) to a sample of s nodes that stands for all, given by their indices."""
        known = np.isfinite(rtt)
        self._partial = not bool(known.all())
        self._rtt = (np.where(known, rtt, 0.0) if self._partial else rtt).astype(np.float32)
        self._known = known.astype(np.float32) if self._partial else None
        self._columns: Ints = np.arange(len(rtt)) if columns is None else columns

    def means(self, labels: Ints, k: int) -> Floats:
        """Return (n, k): mean RTT of each node to the others of each group, inf where no pair is known."""
        onehot = indicator(labels[self._columns], k).astype(np.float32)
        sums = (self._rtt @ onehot).astype(np.float64)
        if self._known is not None:
            counts = (self._known @ onehot).astype(np.float64)
        else:
            counts = np.broadcast_to(onehot.sum(0, dtype=np.float64), sums.shape).copy()
        itself = self._columns[labels[self._columns] >= 0]
        counts[itself, labels[itself]] -= 1.0
        return np.where(counts > 0, sums / np.maximum(counts, 1.0), np.inf)


def silhouettes(means: Floats, labels: Ints) -> Floats:
    """Return the silhouette (Rousseeuw) of each node that has a group, from `Rounds.means`; alone: 0."""
    inside = np.nonzero(labels >= 0)[0]
    own = means[inside, labels[inside]]
    others = means[inside].copy()
    others[np.arange(len(inside)), labels[inside]] = np.inf
    other = others.min(axis=1)
    fine = np.isfinite(own) & np.isfinite(other)
    high = np.maximum(np.where(fine, own, 1.0), np.where(fine, other, 1.0))
    return np.where(
        fine, (np.where(fine, other, 0.0) - np.where(fine, own, 0.0)) / np.maximum(high, 1e-9), 0.0
    )


def silhouette(rtt: Floats, labels: Ints) -> float:
    """Return the mean RTT silhouette of a labelling; 0 with fewer than two groups."""
    k = int(labels.max(initial=-1)) + 1
    if k < 2:
        return 0.0
    return float(silhouettes(Rounds(rtt).means(labels, k), labels).mean())


def polished(rounds: Rounds, labels: Ints, k: int, minimum: int) -> tuple[Ints, float]:
    """Return labels and silhouette after specks are dissolved and nodes moved to the group nearest by mean
    RTT.

    A step is kept while it raises the silhouette; groups never fall under `minimum` nodes.
    """
    means = rounds.means(labels, k)
    while True:
        sizes = np.bincount(labels[labels >= 0], minlength=k)
        small = [group for group in range(k) if 0 < sizes[group] < minimum]
        if not small or (sizes > 0).sum() <= 1:
            break
        group = min(small, key=lambda index: (sizes[index], index))
        homeless = np.nonzero(labels == group)[0]
        open_to = means[homeless].copy()
        open_to[:, group] = np.inf
        open_to[:, sizes == 0] = np.inf
        best = np.argmin(open_to, axis=1)
        labels = labels.copy()
        labels[homeless] = np.where(np.isfinite(open_to.min(axis=1)), best, int(np.argmax(sizes)))
        means = rounds.means(labels, k)
    labels = renumbered(labels)
    k = int(labels.max(initial=-1)) + 1
    if k < 2:
        return labels, 0.0
    means = rounds.means(labels, k)
    each = silhouettes(means, labels)
    inside = np.nonzero(labels >= 0)[0]
    share = 1.0
    for _ in range(POLISH_STEPS):
        nearest = np.argmin(means[inside], axis=1)
        movers = np.nonzero((nearest != labels[inside]) & (each < 0))[0]
        movers = movers[np.argsort(each[movers])][: int(np.ceil(share * len(movers)))]
        fresh = labels.copy()
        fresh[inside[movers]] = nearest[movers]
        if not len(movers) or (np.bincount(fresh[inside], minlength=k) < minimum).any():
            break
        fresh_means = rounds.means(fresh, k)
        fresh_each = silhouettes(fresh_means, fresh)
        if fresh_each.mean() > each.mean():
            labels, means, each = fresh, fresh_means, fresh_each
        elif len(movers) > 1:
            share /= 4  # all at once was too much: those that stand worst first
        else:
            break
    return labels, float(each.mean())


def scales_for(rtt: Floats, parts: Sequence[float] = SCALE_PARTS) -> list[float]:
    """Return the scales to try, in ms, from the median of the known pairs."""
    upper = rtt[np.triu_indices(len(rtt), 1)]
    upper = upper[np.isfinite(upper)]
    middle = float(np.median(upper)) if len(upper) else 1.0
    return sorted({max(SCALE_MIN, middle * part) for part in parts})
