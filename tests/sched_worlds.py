"""Latency worlds for the scheduler's tests: regions with access links and detours, all from a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossedge.sched.matrix import LatencyMatrix, symmetrised

Floats = NDArray[np.float64]


def regions(
    sizes: tuple[int, ...], seed: int, apart: float = 80.0, wide: float = 4.0, noise: float = 0.05
) -> tuple[LatencyMatrix, NDArray[np.int64]]:
    """Return a matrix of nodes in regions about `apart` ms from each other, and each node's region."""
    rng = np.random.default_rng(seed)
    k = len(sizes)
    angle = 2 * np.pi * np.arange(k) / k
    centres = apart * k / 4 * np.c_[np.cos(angle), np.sin(angle), rng.normal(0, 0.2, k)]
    region = np.repeat(np.arange(k), sizes)
    n = len(region)
    points = centres[region] + rng.normal(0.0, wide, (n, 3))
    access = rng.exponential(1.0, n)
    rtt = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2)) + access[:, None] + access[None, :] + 0.3
    factor = np.triu(rng.normal(0.0, noise, (n, n)), 1)
    rtt *= np.exp(factor + factor.T)
    return symmetrised([f"node-{index}" for index in range(n)], rtt), region


def noisy(rtt: Floats, seed: int, share: float = 0.1) -> Floats:
    """Return the matrix with symmetric multiplicative noise."""
    noise = np.triu(np.random.default_rng(seed).normal(0.0, share, rtt.shape), 1)
    return rtt * np.maximum(1.0 + noise + noise.T, 0.1)


def brute_force(rtt: Floats, weights: Floats, replicas: int) -> float:
    """Return the least mean over all sets of so many nodes."""
    from itertools import combinations

    return min(
        float(weights @ rtt[:, list(chosen)].min(axis=1))
        for chosen in combinations(range(rtt.shape[1]), replicas)
    ) / float(weights.sum())
