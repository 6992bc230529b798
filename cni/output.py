"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import click


def table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """Return rows as aligned text; `columns` are keys with their headings, in order."""
    lines = [list(columns.values())]
    for row in rows:
        cells = [row.get(key) for key in columns]
        lines.append([", ".join(map(str, c)) if isinstance(c, list) else str(c or "-") for c in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def echo_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2, default=str))
