"""Tables for people and JSON for programs, from the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import click


def cell(value: object) -> str:
    """Return how one value stands in a table: nothing known is a dash, never a zero."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value) or "-"
    return str(value)


def table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """Return rows as aligned text.

    Args:
        rows: one mapping per line.
        columns: key of the mapping -> heading, in the order to be shown. Numbers are aligned to the right.
    """
    head = list(columns.values())
    body = [[cell(row.get(key)) for key in columns] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
        for key in columns
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), *(line(cells) for cells in body)])


def echo_rows(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, str], *, as_json: bool, none: str = "none"
) -> None:
    """Print rows as a table, or whole as JSON; where there are none the table says so in a word."""
    if as_json:
        echo_json(rows)
    else:
        click.echo(table(rows, columns) if rows else none)


def echo_json(value: object) -> None:
    """Print a value as indented JSON with stable key order."""
    click.echo(json.dumps(value, indent=2, sort_keys=False, default=str))
