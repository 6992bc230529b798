"""Groups that keep their identity from round to round, and nodes that do not flicker between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from crossedge.sched.matrix import Ints

AGREEING_ROUNDS = 3


def matched(old: Ints, new: Ints, fresh: int) -> Ints:
    """Return `new` with its groups named as the groups of `old` that they overlap most.

    Args:
        old: identity of each node's group, -1 where it had none.
        new: group of each of the same nodes, from 0, -1 where it has none.
        fresh: the first identity that was never used; groups without a counterpart get this one and the next.

    The matching maximises the number of nodes that keep their identity (Hungarian method); a group that
    shares no node with the one it would be matched to gets a fresh identity.
    """
    k = int(new.max(initial=-1)) + 1
    identities = np.unique(old[old >= 0])
    overlap = np.zeros((k, len(identities)))
    both = (old >= 0) & (new >= 0)
    np.add.at(overlap, (new[both], np.searchsorted(identities, old[both])), 1.0)
    names = np.full(k + 1, -1, dtype=np.int64)
    for row, column in zip(*linear_sum_assignment(-overlap), strict=True):
        if overlap[row, column] > 0:
            names[row] = identities[column]
    for group in range(k):
        if names[group] < 0:
            names[group] = fresh
            fresh += 1
    return names[new]


@dataclass(slots=True)
class StableGroups:
    """The identity of each node's group over rounds.

    A node changes its group only after `rounds` consecutive rounds that agree on the same other group, at
    once where it had none or where its group is gone. State is bounded by the nodes of the latest round.
    """

    rounds: int = AGREEING_ROUNDS
    labels: dict[str, int] = field(default_factory=dict)
    _wanted: dict[str, tuple[int, int]] = field(default_factory=dict)
    _fresh: int = 0

    def update(self, names: Sequence[str], labels: Ints) -> Mapping[str, int]:
        """Take one round's groups and return the identity of each node's group, -1 where nothing is known."""
        old = np.array([self.labels.get(name, -1) for name in names], dtype=np.int64)
        found = matched(old, np.asarray(labels, dtype=np.int64), self._fresh)
        self._fresh = max(self._fresh, int(found.max(initial=-1)) + 1)
        alive = set(found[found >= 0].tolist())
        settled: dict[str, int] = {}
        wanted: dict[str, tuple[int, int]] = {}
        for name, before, now in zip(names, old.tolist(), found.tolist(), strict=True):
            if now == before or before < 0 or before not in alive:
                settled[name] = now
                continue
            target, count = self._wanted.get(name, (now, 0))
            count = count + 1 if target == now else 1
            if count >= self.rounds:
                settled[name] = now
            else:
                settled[name] = before
                wanted[name] = (now, count)
        self.labels, self._wanted = settled, wanted
        return settled
