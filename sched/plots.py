"""Pictures of a replay: the groups on a map by latency, and user latency against the baselines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from crossedge.sched.matrix import Floats
from crossedge.sched.replay import Replay

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555")
MARKS = "osD^vPX*<>"
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
        style = COLOURS[group % len(COLOURS)], MARKS[group % len(MARKS)]
        axes.scatter(
            members[:, 0], members[:, 1], s=22, c=style[0], marker=style[1], alpha=0.75, linewidths=0
        )
        name = replay.matrix.names[replay.groups.medoids[group]]
        axes.annotate(
            f"{name} ({len(members)})",
            points[replay.groups.medoids[group]],
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=9,
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        at = points[replay.groups.medoids[group]]
        axes.scatter(at[:1], at[1:], s=90, facecolors="none", edgecolors="black", linewidths=1.2)
    lone = points[labels < 0]
    if len(lone):
        axes.scatter(lone[:, 0], lone[:, 1], s=22, c="black", marker="x", label="nothing known")
        axes.legend()
    axes.set_title(
        f"{title}: {replay.matrix.size} nodes in {replay.groups.k} groups, "
        f"silhouette {replay.groups.silhouette:.2f}, scale {replay.groups.scale_ms:.0f} ms"
    )
    axes.set_xlabel("ms, on a flat map by latency; rings are the groups' medoids")
    axes.set_ylabel("ms")
    axes.set_aspect("equal", "datalim")
    figure.savefig(path, dpi=DPI)


def plot_latency(replay: Replay, path: Path, title: str) -> None:
    """Draw user RTT over the number of replicas, mean and 95th percentile: ours, its bound, the baselines."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    mean, tail = figure.subplots(1, 2)
    placed = sorted(replay.placed, key=lambda item: item.replicas)
    counts = [item.replicas for item in placed]
    for column, axes, text in ((0, mean, "mean user RTT, ms"), (1, tail, "95th percentile of user RTT, ms")):
        for number, name in enumerate(placed[0].baselines if placed else ()):
            values = [item.baselines[name][column] for item in placed]
            colour, mark = COLOURS[(number + 1) % len(COLOURS)], MARKS[(number + 1) % len(MARKS)]
            axes.plot(counts, values, color=colour, marker=mark, label=name)
        ours = [(item.placement.mean_ms, item.placement.p95_ms)[column] for item in placed]
        axes.plot(counts, ours, color=COLOURS[0], marker="o", lw=2.5, label="ours")
        if column == 0:
            bounds = [item.placement.bound_ms for item in placed]
            axes.plot(counts, bounds, "k:", lw=2, label="lower bound of ours")
        finish(axes, counts, text)
    figure.suptitle(f"{title}: every node one user")
    figure.savefig(path, dpi=DPI)


def finish(axes: Axes, counts: list[int], text: str) -> None:
    """Label one panel."""
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("replicas")
    axes.set_ylabel(text)
    axes.grid(alpha=0.3)
    axes.legend()
