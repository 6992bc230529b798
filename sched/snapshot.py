"""What the nodes reported, as arrays: the input of a round."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from crossedge.latency.feed import Feed
from crossedge.latency.report import PairState
from crossedge.sched.matrix import Flags, Floats, Ints, LatencyMatrix, State, States, symmetrised

BATCH = 64  # nodes read between two yields: about a millisecond

KIND_SELF = 4
KIND_RELAYED = 8


@dataclass(frozen=True, slots=True)
class Member:
    """A node of the network as far as the scheduler knows it."""

    node_id: bytes
    name: str
    alive: bool
    """Whether it reported lately enough to carry replicas."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What was known of `n` nodes at one moment, one entry per direction that was probed.

    Attributes:
        names: the nodes.
        alive: (n,) whether a node may carry replicas.
        rows: (m,) who probed.
        columns: (m,) whom.
        ms: (m,) round trips in milliseconds, `nan` where nothing answered.
        age: (m,) seconds since the measurement, or since the silence was found.
        relayed: (m,) whether the path goes through a relay.
    """

    names: tuple[str, ...]
    alive: Flags
    rows: Ints
    columns: Ints
    ms: Floats
    age: Floats
    relayed: Flags

    def matrix(self, half_life: float) -> LatencyMatrix:
        """Return the symmetric matrix of what was measured."""
        n = len(self.names)
        rtt, silent, age = np.full((n, n), np.nan), np.zeros((n, n), dtype=bool), np.zeros((n, n))
        rtt[self.rows, self.columns] = self.ms
        silent[self.rows, self.columns] = ~np.isfinite(self.ms)
        age[self.rows, self.columns] = self.age
        return symmetrised(self.names, rtt, silent, age, half_life)

    def kinds(self, matrix: LatencyMatrix) -> States:
        """Return (n, n) of `State` with `KIND_SELF` on the diagonal, plus `KIND_RELAYED` where the measured
        path is relayed. Where the two ends differ about that, the younger measurement is believed.
        """
        n = len(self.names)
        relayed = np.zeros((n, n), dtype=bool)
        answered = np.isfinite(self.ms)
        rows, columns = self.rows[answered], self.columns[answered]
        order = np.argsort(-self.age[answered], kind="stable")  # the youngest is written last
        rows, columns, by_relay = rows[order], columns[order], self.relayed[answered][order]
        low, high = np.minimum(rows, columns), np.maximum(rows, columns)
        relayed[low, high] = by_relay
        relayed |= relayed.T
        kinds: States = matrix.state.copy()
        kinds[relayed & (matrix.state == State.MEASURED)] |= KIND_RELAYED
        np.fill_diagonal(kinds, KIND_SELF)
        return kinds


def collected(feed: Feed, members: Sequence[Member], now: float) -> Generator[None, None, Snapshot]:
    """Return what the members reported, in steps: it yields now and then, so that others can run between.

    Pairs with nodes that are no members are left out: a node counts from its own first report on.
    """
    index = {member.node_id: position for position, member in enumerate(members)}
    rows: list[int] = []
    columns: list[int] = []
    ms: list[float] = []
    age: list[float] = []
    relayed: list[bool] = []
    for position, member in enumerate(members):
        if position % BATCH == BATCH - 1:
            yield
        held = feed.nodes.get(member.node_id)
        if held is None:
            continue
        for peer, pair in held.pairs.items():
            column = index.get(peer)
            if column is None:
                continue
            rows.append(position)
            columns.append(column)
            ms.append(pair.minimum * 1000.0 if pair.minimum is not None else np.nan)
            age.append(held.age(peer, now))
            relayed.append(pair.state is PairState.RELAYED)
    return Snapshot(
        tuple(member.name for member in members),
        np.array([member.alive for member in members], dtype=bool),
        np.array(rows, dtype=np.int64),
        np.array(columns, dtype=np.int64),
        np.array(ms, dtype=np.float64),
        np.array(age, dtype=np.float64),
        np.array(relayed, dtype=bool),
    )
