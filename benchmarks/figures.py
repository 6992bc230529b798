"""Figures by name with the bars that they must hold, as JSON and as a table."""

from __future__ import annotations

from typing import Any


class Figures:
    """What was measured, by name, with its bar."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: float, bar: str = "") -> None:
        """Take a figure; `bar` such as "<= 0.08" says what must hold; empty where it is for information."""
        row: dict[str, Any] = {"value": round(float(value), 6)}
        if bar:
            sign, _, limit = bar.partition(" ")
            edge = float(limit)
            holds = {"<=": value <= edge, ">=": value >= edge, "==": value == edge}[sign]
            row |= {"bar": bar, "holds": bool(holds)}
        self.rows[name] = row
        print(f"{name}: {value:.4f} {bar}{'' if row.get('holds', True) else '  MISSED'}", flush=True)

    @property
    def missed(self) -> list[str]:
        """Names of the figures that do not hold their bar."""
        return [name for name, row in self.rows.items() if not row.get("holds", True)]

    def table(self) -> str:
        """Return the figures that have a bar, with the verdict, as aligned text."""
        lines = [
            (name, f"{row['value']:.4g}", row["bar"], "holds" if row["holds"] else "MISSED")
            for name, row in self.rows.items()
            if "bar" in row
        ]
        head = ("figure", "value", "bar", "verdict")
        wide = [max(len(line[column]) for line in [head, *lines]) for column in range(4)]
        return "\n".join(
            f"{name:<{wide[0]}}  {value:>{wide[1]}}  {bar:<{wide[2]}}  {verdict}"
            for name, value, bar, verdict in [head, *lines]
        )
