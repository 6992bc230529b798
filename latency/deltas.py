"""What to put into the next report to one receiver: what changed since the last one that it has for sure.

Receivers lay a report over whatever they have from its base on, so a pair is named again until a report that
named it was acknowledged: an answer that is lost costs a few bytes, never a wrong state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from crossedge.latency.report import Pair, PairState

FULL_AGAIN: Final = 300.0  # seconds after which everything is said again, whatever the receiver has
FRESH_AGAIN: Final = 60.0  # seconds by which a measurement that says the same has to be younger
MINIMUM_STEP: Final = (0.000_1, 0.01)  # seconds, share: what a change of the distance is
SMOOTHED_STEP: Final = (0.001, 0.1)
DEVIATION_STEP: Final = (0.002, 0.5)
LOSS_STEP: Final = 0.03


@dataclass(frozen=True, slots=True)
class _Told:
    pair: Pair
    measured: float


@dataclass(frozen=True, slots=True)
class Draft:
    """The content of a report."""

    base: int
    """0 for a full one."""
    pairs: tuple[Pair, ...]


def _moved(old: float | None, new: float | None, step: tuple[float, float]) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(new - old) > max(step[0], step[1] * old)


def changed(old: Pair, new: Pair) -> bool:
    """Tell whether a receiver should hear of the difference."""
    return (
        old.state is not new.state
        or _moved(old.minimum, new.minimum, MINIMUM_STEP)
        or _moved(old.smoothed, new.smoothed, SMOOTHED_STEP)
        or _moved(old.deviation, new.deviation, DEVIATION_STEP)
        or (old.loss is None) is not (new.loss is None)
        or abs((old.loss or 0.0) - (new.loss or 0.0)) > LOSS_STEP
    )


class Deltas:
    """What one receiver knows."""

    __slots__ = ("_base", "_full_at", "_known", "_sent", "_unsure")

    def __init__(self) -> None:
        self._base = 0
        self._known: dict[bytes, _Told] = {}
        self._unsure: set[bytes] = set()
        self._sent: tuple[int, dict[bytes, _Told]] = (0, {})
        self._full_at = float("-inf")

    def draft(self, seq: int, pairs: Iterable[Pair], now: float) -> Draft:
        """Return what the report with this number says, given everything that is known now."""
        present = {pair.peer: _Told(pair, now - pair.age) for pair in pairs}
        if not self._base or now - self._full_at >= FULL_AGAIN:
            self._full_at = now
            self._unsure |= present.keys() | self._known.keys()
            self._sent = (seq, present)
            return Draft(0, tuple(told.pair for told in present.values()))
        said: dict[bytes, _Told] = {}
        for peer, told in present.items():
            before = self._known.get(peer)
            if (
                before is None
                or peer in self._unsure
                or changed(before.pair, told.pair)
                or told.measured - before.measured >= FRESH_AGAIN
            ):
                said[peer] = told
        gone = (self._known.keys() | self._unsure) - present.keys()
        after = {peer: told for peer, told in {**self._known, **said}.items() if peer not in gone}
        self._unsure |= said.keys() | gone
        self._sent = (seq, after)
        forgotten = tuple(Pair(peer, PairState.FORGOTTEN) for peer in sorted(gone))
        return Draft(self._base, tuple(told.pair for told in said.values()) + forgotten)

    def acknowledged(self, seq: int) -> None:
        """Note that the receiver has the report with this number; only the last one counts."""
        if seq != self._sent[0]:
            return
        self._base, self._known = self._sent
        self._unsure.clear()

    def start_over(self) -> None:
        """Say everything in the next report: the receiver has no base of ours."""
        self._base = 0
        self._known = {}
        self._unsure.clear()
        self._full_at = float("-inf")
