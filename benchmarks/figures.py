"""Figures by name with the bars that they must hold, as JSON and as a table."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

SIGNS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
}


class Figures:
    """What was measured, by name, with its bar; `ratios` are those of ours over somebody else's, `peers` what
    the others had.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.ratios: dict[str, float] = {}
        self.peers: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: float, bar: str = "") -> None:
        """Take a figure; `bar` such as "<= 0.08" says what must hold; empty where it is for information."""
        row: dict[str, Any] = {"value": round(float(value), 6)}
        if bar:
            sign, _, limit = bar.partition(" ")
            row |= {"bar": bar, "holds": bool(SIGNS[sign](value, float(limit)))}
        self.rows[name] = row
        verdict = "" if "holds" not in row else "  PASS" if row["holds"] else "  FAIL"
        print(f"{name}: {value:.4f} {bar}{verdict}", file=sys.stderr, flush=True)

    def ratio(self, name: str, value: float, bar: str = "") -> None:
        """Take a figure that compares ours with somebody else's."""
        self.add(name, value, bar)
        self.ratios[name] = round(float(value), 6)

    def peer(self, peer: str, name: str, value: float | str) -> None:
        """Take what somebody else had, or which version it was."""
        said = value if isinstance(value, str) else round(float(value), 6)
        self.peers.setdefault(peer, {})[name] = said

    @property
    def missed(self) -> list[str]:
        """Names of the figures that do not hold their bar."""
        return [name for name, row in self.rows.items() if not row.get("holds", True)]

    def table(self) -> str:
        """Return the figures that have a bar, with the verdict, as aligned text."""
        lines = [
            (name, f"{row['value']:.4g}", row["bar"], "PASS" if row["holds"] else "FAIL")
            for name, row in self.rows.items()
            if "bar" in row
        ]
        head = ("figure", "value", "bar", "verdict")
        wide = [max(len(line[column]) for line in [head, *lines]) for column in range(4)]
        return "\n".join(
            f"{name:<{wide[0]}}  {value:>{wide[1]}}  {bar:<{wide[2]}}  {verdict}"
            for name, value, bar, verdict in [head, *lines]
        )
