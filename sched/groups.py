"""Groups of near nodes by spectral clustering of round trips, with scale and number chosen from the data.

The same matrix always gives the same groups, and a little noise changes little: see `consensus`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossedge.sched.consensus import candidates, chosen, steadied
from crossedge.sched.matrix import Floats, Ints
from crossedge.sched.spectral import (
    GROUPS_MAX,
    Rounds,
    embedded,
    minimum_size,
    renumbered,
    scales_for,
    silhouette,
    spectrum,
)

__all__ = ["Grouping", "grouped", "medoid", "minimum_size", "silhouette", "with_count"]

SAMPLE = 1000  # nodes above which evenly spaced ones stand for all while labellings are compared
STEADIED_MAX = 365  # nodes up to which noise is tried; with more, one answer is steady by itself


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """Groups of nodes.

    Attributes:
        labels: (n,) group of each node from 0, -1 where nothing is known of the node.
        k: how many groups.
        scale_ms: `s` of the affinity.
        silhouette: mean RTT silhouette over all nodes with a group, -1..1; 0 with one group.
        gap: eigengap after the k-th eigenvalue of the normalised affinity.
        medoids: (k,) per group the node with the least mean RTT to the others.
        within_ms: median RTT of pairs inside one group.
    """

    labels: Ints
    k: int
    scale_ms: float
    silhouette: float
    gap: float
    medoids: Ints
    within_ms: float


def with_count(rtt: Floats, k: int, scale: float) -> Ints:
    """Return labels (n,) of exactly k spectral clusters at one scale, specks and all: a baseline for
    placement.
    """
    k = min(k, len(rtt))
    if k < 2:
        return np.zeros(len(rtt), dtype=np.int64)
    return renumbered(embedded(spectrum(rtt, scale, k).vectors, k))


def medoid(rtt: Floats, members: Ints) -> int:
    """Return the member with the least mean RTT to the other members."""
    inner = rtt[np.ix_(members, members)]
    known = np.isfinite(inner)
    mean = np.where(known, inner, 0.0).sum(1) / np.maximum(known.sum(1) - 1, 1)
    mean[(known.sum(1) <= 1) & (len(members) > 1)] = np.inf
    return int(members[np.argmin(mean)])


def grouped(rtt: Floats) -> Grouping:
    """Group nodes by a matrix (n, n) of RTT in ms with `nan` for what is not known.

    Scales and counts are swept; the labelling with the best sum of silhouette and a little of the eigengap is
    taken; among few nodes, where noise could tip it, the one that noise changes least. Groups have at least
    `minimum_size` nodes; with too few nodes, or none apart, there is one group.
    """
    n = len(rtt)
    alone = np.isfinite(rtt).sum(1) <= 1 if n > 1 else np.zeros(n, dtype=bool)
    step = -(-n // SAMPLE)
    columns = np.arange(0, n, step)
    rounds = Rounds(rtt[:, columns], columns)
    scales = scales_for(rtt)
    spectra = [spectrum(rtt, scale, GROUPS_MAX + 1) for scale in scales]
    found = candidates(rounds, spectra, alone, minimum_size(n))
    if n <= STEADIED_MAX and step == 1:
        labels, best = steadied(rtt, rounds, found, alone)
    else:
        best = chosen(found, n)
        labels = best.labels if best else np.where(alone, -1, 0).astype(np.int64)
    score = silhouette(rtt, labels)
    k = int(labels.max(initial=-1)) + 1
    medoids = np.array([medoid(rtt, np.nonzero(labels == group)[0]) for group in range(k)], dtype=np.int64)
    same = np.triu(labels[:, None] == labels[None, :], 1) & (labels >= 0)[:, None] & np.isfinite(rtt)
    within = float(np.median(rtt[same])) if same.any() else 0.0
    scale, gap = (best.scale_ms, best.gap) if best else (scales[0], 0.0)
    return Grouping(labels, k, scale, score, gap, medoids, within)
