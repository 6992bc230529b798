"""Groups of thousands of nodes: sparse affinity over near and measured pairs, silhouettes over a sample."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, diags

from crossedge.sched.consensus import candidates, chosen
from crossedge.sched.coordinates import Coordinates
from crossedge.sched.groups import Grouping
from crossedge.sched.matrix import Floats, Ints
from crossedge.sched.spectral import (
    GROUPS_MAX,
    SCALE_MIN,
    SCALE_PARTS,
    Rounds,
    Spectrum,
    leading,
    minimum_size,
)

DENSE_NODES = 4000  # up to here a full matrix is quick enough
NEAR = 24  # estimated near neighbours of each node in the graph
SAMPLE = 1500  # nodes that stand for all in silhouettes


def near_graph(coordinates: Coordinates, measured: tuple[Ints, Ints, Floats]) -> csr_matrix:
    """Return the symmetric sparse RTT (n, n) in ms of near pairs, estimated, and of measured pairs as
    measured.
    """
    n = len(coordinates.points)
    rows, columns, rtt = coordinates.nearest(NEAR)
    if_low, if_high = np.minimum(rows, columns), np.maximum(rows, columns)
    low, high = np.minimum(measured[0], measured[1]), np.maximum(measured[0], measured[1])
    key = np.concatenate([low * n + high, if_low * n + if_high])
    _, first = np.unique(key, return_index=True)  # of a pair that is both, the measured one comes first
    low, high = np.concatenate([low, if_low])[first], np.concatenate([high, if_high])[first]
    times = np.maximum(np.concatenate([measured[2], rtt])[first], 1e-3)
    return csr_matrix(
        (np.tile(times, 2), (np.concatenate([low, high]), np.concatenate([high, low]))), shape=(n, n)
    )


def sparse_spectrum(graph: csr_matrix, scale: float, count: int) -> Spectrum:
    """Return the leading part of the spectrum of a sparse exp(-rtt / scale), normalised by degree on both
    sides.
    """
    affinity = graph.copy()
    affinity.data = np.exp(affinity.data * (-1.0 / scale))
    degree = np.asarray(affinity.sum(axis=1)).ravel()
    root = diags(1.0 / np.sqrt(np.maximum(degree, 1e-12)))
    values, vectors = leading((root @ affinity @ root).tocsr(), count)
    order = np.argsort(values)[::-1]
    return Spectrum(scale, values[order], vectors[:, order])


def grouped_sparse(
    coordinates: Coordinates, measured: tuple[Ints, Ints, Floats], rng: np.random.Generator
) -> Grouping:
    """Group nodes by their coordinates and measured pairs without ever making a full matrix.

    Args:
        coordinates: fitted to all measured pairs.
        measured: rows, columns and milliseconds, each pair once.
        rng: picks the sample.
    """
    n = len(coordinates.points)
    graph = near_graph(coordinates, measured)
    every = np.arange(n)
    sample = np.sort(rng.choice(n, min(n, SAMPLE), replace=False))
    block = coordinates.block(every, sample)
    middle = float(np.median(block))
    alone = np.asarray(np.diff(graph.indptr) == 0)
    scales = sorted({max(SCALE_MIN, middle * part) for part in SCALE_PARTS})
    spectra = [sparse_spectrum(graph, scale, GROUPS_MAX + 1) for scale in scales]
    rounds = Rounds(block, sample)
    best = chosen(candidates(rounds, spectra, alone, minimum_size(n)), n)
    labels = best.labels if best else np.where(alone, -1, 0).astype(np.int64)
    scale, score, gap = (best.scale_ms, best.silhouette, best.gap) if best else (scales[0], 0.0, 0.0)
    k = int(labels.max(initial=-1)) + 1
    means = rounds.means(labels, k)
    medoids = np.array(
        [int(np.argmin(np.where(labels == g, means[:, g], np.inf))) for g in range(k)], dtype=np.int64
    )
    same = (labels[:, None] == labels[sample][None, :]) & (every[:, None] != sample[None, :])
    within = float(np.median(block[same])) if same.any() else 0.0
    return Grouping(labels, k, scale, score, gap, medoids, within)
