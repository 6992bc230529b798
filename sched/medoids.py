"""Which other groups' central nodes each node is asked to measure, in a mesh too large to measure all pairs.

A node that chooses its peers by hashing and by nearness may have measured nothing of a small group far away,
and that is where a placement has to guess. A group's medoid tells most about it; but were it measured by
everybody, it would pay for a thousand pairs. So every node is asked for `PER_NODE` other groups, the groups
in turn, and of a group's nodes, the most central first, each is named to at most `ASKED_BY` others.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from crossedge.latency.prober import ALL_PAIRS
from crossedge.sched.services import View

PER_NODE: Final = 2
ASKED_BY: Final = 4
KEPT: Final = 3600.0
"""Seconds for which what was asked stays: a pair that is new costs a measurement at once."""


def assigned(view: View, seed: int) -> dict[str, tuple[str, ...]]:
    """Return by node's name whom it is asked to measure; empty where all pairs are measured anyway.

    Args:
        view: the round: groups, matrix and who is there.
        seed: of the turns.
    """
    here = np.nonzero(view.alive & (view.labels >= 0))[0]
    labels = [int(label) for label in np.unique(view.labels[here])]
    if len(view.names) <= ALL_PAIRS + 1 or len(labels) < 2:
        return {}
    asking: dict[int, list[int]] = {label: [] for label in labels}
    for turn, node in enumerate(np.random.default_rng(seed).permutation(here).tolist()):
        others = [label for label in labels if label != view.labels[node]]
        for slot in range(min(PER_NODE, len(others))):
            asking[others[(turn + slot) % len(others)]].append(node)
    told: dict[str, list[str]] = {}
    for label, nodes in asking.items():
        members = here[view.labels[here] == label]
        distance = view.rtt[np.ix_(members, members)]
        known = np.isfinite(distance).sum(axis=1)
        mean = np.where(known > 1, np.nansum(distance, axis=1) / np.maximum(known - 1, 1), np.inf)
        central = members[np.argsort(mean, kind="stable")].tolist()
        for position, node in enumerate(nodes[: ASKED_BY * len(central)]):
            told.setdefault(view.names[node], []).append(view.names[central[position // ASKED_BY]])
    return {name: tuple(named) for name, named in told.items()}
