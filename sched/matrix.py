"""The latency matrix: what is measured, what is unreachable, what nobody knows, and how sure that is.

All times are round trips in milliseconds. A matrix is symmetric; `nan` stands wherever there is no number,
and the state says why: a pair that did not answer is never shown as a number, and never as merely unmeasured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossedge.wire.errors import CrossedgeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
States = NDArray[np.uint8]

RTT_MAX = 60_000.0  # ms; no path of this planet answers later than this, so it is a fault of the report
HALF_LIFE = 300.0  # seconds after which a measurement is worth half


class MatrixError(CrossedgeError):
    """What was given is no latency matrix; the text names what is wrong."""


class State(IntEnum):
    """What is known of one pair."""

    UNMEASURED = 0
    MEASURED = 1
    UNREACHABLE = 2
    ESTIMATED = 3


@dataclass(frozen=True, slots=True, eq=False)
class LatencyMatrix:
    """Round trips between `n` nodes.

    Attributes:
        names: the nodes, in the order of rows and columns.
        rtt: (n, n) milliseconds, symmetric, 0 on the diagonal, `nan` where the state has no number.
        state: (n, n) of `State`.
        confidence: (n, n) in 0..1; 0 where there is no number.
    """

    names: tuple[str, ...]
    rtt: Floats
    state: States
    confidence: Floats

    @property
    def size(self) -> int:
        """How many nodes there are."""
        return len(self.names)

    @property
    def known(self) -> Flags:
        """(n, n): whether there is a number, measured or estimated."""
        return np.isfinite(self.rtt)

    @property
    def measured(self) -> Flags:
        """(n, n): whether the pair was measured; False on the diagonal."""
        mask: Flags = self.state == State.MEASURED
        np.fill_diagonal(mask, False)
        return mask

    def pairs(self) -> tuple[Ints, Ints, Floats]:
        """Return each measured pair once: rows, columns (row < column) and milliseconds."""
        rows, columns = np.nonzero(np.triu(self.measured, 1))
        return rows, columns, self.rtt[rows, columns]

    def part(self, keep: Sequence[int] | Ints) -> LatencyMatrix:
        """Return the matrix of some of the nodes, given by their indices."""
        index = np.asarray(keep, dtype=np.int64)
        cut = np.ix_(index, index)
        names = tuple(self.names[i] for i in index)
        return LatencyMatrix(names, self.rtt[cut], self.state[cut], self.confidence[cut])


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return node names as a tuple; MatrixError where one is empty or stands twice."""
    seen: set[str] = set()
    for name in names:
        if not name:
            raise MatrixError("a node without a name")
        if name in seen:
            raise MatrixError(f"node {name!r} stands twice")
        seen.add(name)
    return tuple(names)


def symmetrised(
    names: Sequence[str],
    rtt: Any,
    unreachable: Any = None,
    age: Any = None,
    half_life: float = HALF_LIFE,
) -> LatencyMatrix:
    """Make a matrix of what each node measured towards each other node.

    Args:
        names: the nodes.
        rtt: (n, n) milliseconds from row to column; what is not finite was not measured. The diagonal is
            ignored.
        unreachable: (n, n) flags: the row probed the column and got no answer.
        age: (n, n) seconds since the measurement (or since the silence was found); None means all are fresh.
        half_life: seconds after which a measurement is worth half.

    Of two directions the smaller RTT is kept: queues and busy processors only ever add, so it is nearer to
    the distance. Where one direction answered and the other did not, the younger of the two is believed, at
    equal age the answer: a silence may be a lost burst, an answer cannot be had from what is not there.

    Raises:
        MatrixError: shapes that differ, a negative or absurd RTT, a name that stands twice.
    """
    nodes = checked_names(names)
    n = len(nodes)
    values = np.array(rtt, dtype=np.float64)
    silent = np.zeros((n, n), dtype=bool) if unreachable is None else np.array(unreachable, dtype=bool)
    ages = np.zeros((n, n)) if age is None else np.array(age, dtype=np.float64)
    for name, array in (("rtt", values), ("unreachable", silent), ("age", ages)):
        if array.shape != (n, n):
            raise MatrixError(f"{name} has shape {array.shape}, expected {(n, n)}")
    answered = np.isfinite(values)
    np.fill_diagonal(answered, False)
    np.fill_diagonal(silent, False)
    bad = answered & ((values <= 0) | (values > RTT_MAX))
    if bad.any():
        row, column = (int(index[0]) for index in np.nonzero(bad))
        raise MatrixError(
            f"RTT {nodes[row]} to {nodes[column]} is {values[row, column]:g} ms, "
            f"expected more than 0 and at most {RTT_MAX:g}"
        )
    if (ages < 0).any():
        raise MatrixError("a measurement from the future")
    silent &= ~answered
    answered_age = np.where(answered, ages, np.inf)
    answered_age = np.minimum(answered_age, answered_age.T)
    silent_age = np.where(silent, ages, np.inf)
    silent_age = np.minimum(silent_age, silent_age.T)
    least = np.where(answered, values, np.inf)
    least = np.minimum(least, least.T)
    believed = np.isfinite(answered_age) & (answered_age <= silent_age)
    state = np.full((n, n), State.UNMEASURED, dtype=np.uint8)
    state[np.isfinite(silent_age)] = State.UNREACHABLE
    state[believed] = State.MEASURED
    np.fill_diagonal(state, State.MEASURED)
    result = np.where(believed, least, np.nan)
    np.fill_diagonal(result, 0.0)
    confidence = np.where(believed, 0.5 ** (np.where(believed, answered_age, 0.0) / half_life), 0.0)
    np.fill_diagonal(confidence, 1.0)
    return LatencyMatrix(nodes, result, state, confidence)


def sampled_peers(n: int, peers: int, rng: np.random.Generator) -> Flags:
    """Return (n, n) flags: each row chose `peers` columns at random, and both ends know what one measured."""
    mask = np.zeros((n, n), dtype=bool)
    for row in range(n):
        chosen = rng.choice(n - 1, min(peers, n - 1), replace=False)
        mask[row, chosen + (chosen >= row)] = True
    return mask | mask.T


def restricted(matrix: LatencyMatrix, mask: Flags) -> LatencyMatrix:
    """Return the matrix as it would be if only the pairs of `mask` had been probed."""
    keep = mask | mask.T
    np.fill_diagonal(keep, True)
    state = np.where(keep, matrix.state, np.uint8(State.UNMEASURED)).astype(np.uint8)
    rtt = np.where(keep, matrix.rtt, np.nan)
    return LatencyMatrix(matrix.names, rtt, state, np.where(keep, matrix.confidence, 0.0))
