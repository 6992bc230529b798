"""The latency matrices that the scheduler is measured on: real ones, or generated ones of the same sizes."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossedge.sched.files import read_matrix
from crossedge.sched.matrix import LatencyMatrix, symmetrised

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
REAL = {
    "wondernetwork217": "wondernetwork217/wonderproxy.csv",
    "planetlab490-1": "planetlab490/PlanetLabData_1.tsv.gz",
    "planetlab490-9": "planetlab490/PlanetLabData_9.tsv.gz",
    "aws21": "aws21/aws.csv",
    "aws_cluster52": "aws_cluster52/latency.csv.gz",
}
WIDE = ("wondernetwork217", "planetlab490-1", "planetlab490-9")


def generated(n: int, rng: np.random.Generator) -> LatencyMatrix:
    """Return a matrix of nodes in seven regions with access links and detours, for where there is no real
    one.
    """
    centres = rng.normal(0.0, 60.0, (7, 3))
    region = rng.choice(7, n, p=[0.3, 0.25, 0.15, 0.1, 0.08, 0.07, 0.05])
    points = centres[region] + rng.normal(0.0, 5.0, (n, 3))
    access = rng.exponential(2.0, n)
    detour = 1.0 + 0.3 * rng.random((7, 7))
    detour = np.maximum(detour, detour.T)[region][:, region]
    rtt = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2)) * detour
    rtt = rtt + access[:, None] + access[None, :] + 0.3
    return symmetrised([f"node-{index}" for index in range(n)], rtt * np.exp(rng.normal(0.0, 0.05, (n, n))))


def load(data: Path | None) -> dict[str, LatencyMatrix]:
    """Return the matrices by name, as they were measured."""
    if data is None:
        sizes = dict(zip(REAL, (217, 490, 490, 21, 52), strict=True))
        return {name: generated(n, np.random.default_rng(n)) for name, n in sizes.items()}
    return {name: read_matrix(data / path) for name, path in REAL.items()}


def noisy(rtt: Floats, rng: np.random.Generator, share: float = 0.1) -> Floats:
    """Return the matrix with symmetric multiplicative noise of this standard deviation."""
    noise = np.triu(rng.normal(0.0, share, rtt.shape), 1)
    return rtt * np.maximum(1.0 + noise + noise.T, 0.1)


def noisy_round(matrix: LatencyMatrix, rng: np.random.Generator) -> LatencyMatrix:
    """Return what the next round would measure: the same pairs, with noise."""
    return LatencyMatrix(matrix.names, noisy(matrix.rtt, rng), matrix.state, matrix.confidence)


def true_regions(data: Path, names: tuple[str, ...]) -> list[str]:
    """Return the region of each node of aws_cluster52, as its operators name it."""
    with gzip.open(data / REAL["aws_cluster52"], "rt") as stream:
        lines = [line.strip().split(",") for line in stream]
    region = {line[0]: line[4] for line in lines} | {line[1]: line[5] for line in lines}
    return [region[node] for node in names]


def many_points(data: Path | None, rng: np.random.Generator) -> Floats:
    """Return 15,000 points whose distances are milliseconds, to try large numbers of nodes on."""
    if data is None:
        return rng.normal(0.0, 40.0, (15000, 2))
    with gzip.open(data / "caida_coords15000" / "nodes_2d_15000.xml.gz", "rt") as stream:
        found = re.findall(r"<coord>\s*([-0-9.e]+)", stream.read())
    return np.array([float(value) for value in found]).reshape(-1, 2)


def apart(points: Floats) -> Floats:
    """Return all distances of some points."""
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(2))
