"""Pictures of a replay: the groups on a map by latency, and user latency against the baselines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from crossedge.sched.matrix import Floats
from crossedge.sched.replay import Replay

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555")
MARKS = "osD^vP*X"
DPI = 130


def flat_map(rtt: Floats) -> Floats:
    """Return (n, 2) points whose distances resemble the RTTs: classical multidimensional scaling."""
    known = np.isfinite(rtt)
    filled = np.where(known, rtt, np.median(rtt[known]))
    square = filled**2
    centred = -0.5 * (square - square.mean(0)[None, :] - square.mean(1)[:, None] + square.mean())
    values, vectors = np.linalg.eigh(centred)
    points: Floats = vectors[:, -2:][:, ::-1] * np.sqrt(np.maximum(values[-2:][::-1], 0.0))
    return points


def plot_groups(replay: Replay, path: Path, title: str) -> None:
    """Draw each node on a flat map by latency, with colour and mark of its group, medoids named."""
    points = flat_map(replay.matrix.rtt)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot()
    labels = replay.groups.labels
    for group in range(replay.groups.k):
        members = points[labels == group]
        style = COLOURS[group % len(COLOURS)], MARKS[group // len(COLOURS) % len(MARKS)]
        axes.scatter(
            members[:, 0], members[:, 1], s=22, c=style[0], marker=style[1], alpha=0.75, linewidths=0
        )
        name = replay.matrix.names[replay.groups.medoids[group]]
        axes.annotate(
            f"{name} ({len(members)})", points[replay.groups.medoids[group]], fontsize=9, weight="bold"
        )
    lone = points[labels < 0]
    if len(lone):
        axes.scatter(lone[:, 0], lone[:, 1], s=22, c="black", marker="x", label="nothing known")
        axes.legend()
    axes.set_title(
        f"{title}: {replay.matrix.size} nodes in {replay.groups.k} groups, "
        f"silhouette {replay.groups.silhouette:.2f}, scale {replay.groups.scale_ms:.0f} ms"
    )
    axes.set_xlabel("ms")
    axes.set_ylabel("ms")
    axes.set_aspect("equal", "datalim")
    figure.savefig(path, dpi=DPI)


def plot_latency(replay: Replay, path: Path, title: str) -> None:
    """Draw the mean user RTT over the number of replicas: ours, its bound, the baselines."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    placed = sorted(replay.placed, key=lambda item: item.replicas)
    counts = [item.replicas for item in placed]
    for number, name in enumerate(placed[0].baselines if placed else ()):
        means = [item.baselines[name][0] for item in placed]
        colour = COLOURS[(number + 1) % len(COLOURS)]
        axes.plot(counts, means, color=colour, marker=MARKS[number + 1], label=name)
    axes.plot(
        counts,
        [item.placement.mean_ms for item in placed],
        color=COLOURS[0],
        marker="o",
        lw=2.5,
        label="ours",
    )
    axes.plot(counts, [item.placement.bound_ms for item in placed], "k:", label="lower bound")
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("replicas")
    axes.set_ylabel("mean user RTT, ms")
    axes.set_title(f"{title}: mean user RTT")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=DPI)
