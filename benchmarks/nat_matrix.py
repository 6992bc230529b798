"""Punch every pair of NAT kinds many times in the in-memory internet; write the table into the docs.

python benchmarks/nat_matrix.py [--seeds 200] [--processes 2] [--json FILE] [--write FILE | --check FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: our `sched` must not hide the standard library's

from tests.natmatrix import LOSS, Row, meet, pairs, report

FIGURES = ("s, p50", "s, p95", "packets, p50", "packets, p95")
SLACK = (0.15, 3.0, 4.0, 60.0)
"""How much a figure may differ beside a quarter of it: the 95th percentile of a few late tries moves most."""
GUESSES = 1.5
"""Percent of guessed pairs by which a share may differ: two sprays of 97.8 % each, in 200 runs."""
BEGIN, END = "<!-- nat-matrix -->", "<!-- /nat-matrix -->"


def one(job: tuple[str, str, int]) -> Row:
    """Return what becomes of one pair under that many seeds."""
    a, b, seeds = job
    return meet(a, b, range(1, seeds + 1))


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the value that this share of the values does not exceed (the nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)] if ordered else None


def summary(row: Row) -> dict[str, object]:
    """Return the figures of one pair."""
    times = [outcome.seconds for outcome in row.successes]
    packets = [outcome.packets for outcome in row.outcomes]
    failed = [outcome for outcome in row.outcomes if not outcome.direct]
    return {
        "a": row.a,
        "b": row.b,
        "theory": row.theory,
        "seeds": len(row.outcomes),
        "direct": len(times),
        "seconds_p50": quantile(times, 0.5),
        "seconds_p95": quantile(times, 0.95),
        "packets_p50": quantile(packets, 0.5),
        "packets_p95": quantile(packets, 0.95),
        "stuck": sum(not (outcome.relayed and outcome.why) for outcome in failed),
        "why": sorted({outcome.why for outcome in failed}),
    }


def line(found: dict[str, object]) -> str:
    """Return the row of the table."""
    share = 100.0 * float(str(found["direct"])) / float(str(found["seeds"]))
    way = "by theory" if found["theory"] else "by a guess" if found["direct"] else "relay"
    times = [found["seconds_p50"], found["seconds_p95"]]
    shown = ["–" if value is None else f"{float(str(value)):.2f}" for value in times]
    cells = [
        found["a"],
        found["b"],
        way,
        f"{share:.1f} %",
        *shown,
        found["packets_p50"],
        found["packets_p95"],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: Sequence[dict[str, object]], seeds: int) -> str:
    """Return the table, with what it is of."""
    works = [row for row in rows if row["theory"]]
    guessed = [row for row in rows if not row["theory"] and row["direct"]]
    left = [row for row in rows if not row["direct"]]

    def share(group: Sequence[dict[str, object]]) -> str:
        direct, tried = (sum(int(str(row[key])) for row in group) for key in ("direct", "seeds"))
        return f"{direct:,} of {tried:,}" if tried else "none"

    return f"""{BEGIN}
{len(rows)} pairs of {len({row["a"] for row in rows})} kinds, {seeds} seeds each, {LOSS:.0%} of the packets \
lost on each access link, each way. Direct: {share(works)} where
theory says that punching works, {share(guessed)} in the {len(guessed)} pairs where ports are guessed. \
The other {len(left)} pairs stay on the relay and say why;
{sum(int(str(row["stuck"])) for row in rows)} were stuck.

| one side | other side | how | direct | s, p50 | s, p95 | packets, p50 | p95 |
|---|---|---|---|---|---|---|---|
{chr(10).join(map(line, rows))}
{END}"""


def rows_of(text: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the rows of a table by their two kinds: how, direct, and four figures."""
    _, _, rest = text.partition(BEGIN)
    rows = [line.strip("| ").split(" | ") for line in rest.partition(END)[0].splitlines() if "%" in line]
    return {tuple(cells[:2]): tuple(cells[2:]) for cells in rows if len(cells) == 8}


def _alike(before: tuple[str, ...], after: tuple[str, ...]) -> bool:
    """Tell whether two rows have the same way and share; a guess may fail now and then."""
    slack = GUESSES if before[0] == "by a guess" else 0.0
    shares = [float(row[1].rstrip(" %")) for row in (before, after)]
    return before[0] == after[0] and abs(shares[0] - shares[1]) <= slack


def differences(shown: str, found: str) -> list[str]:
    """Return in what a document's table differs from another one by more than what any change may shift."""
    wrong = []
    old, new = rows_of(shown), rows_of(found)
    for pair in sorted(old.keys() | new.keys()):
        before, after = old.get(pair), new.get(pair)
        if before is None or after is None or not _alike(before, after):
            wrong.append(f"{' and '.join(pair)}: {before} in the document, {after} found")
            continue
        for name, one, two, slack in zip(FIGURES, before[2:], after[2:], SLACK, strict=True):
            if one == two:
                continue
            if "–" in (one, two) or abs(float(one) - float(two)) > 0.25 * float(one) + slack:
                wrong.append(f"{' and '.join(pair)}: {name} {one} in the document, {two} found")
    return wrong


def main() -> None:
    """Run all pairs, print the table, and write it where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200, help="runs of each pair (200)")
    parser.add_argument("--processes", type=int, default=2, help="processes to run on (2)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--write", type=Path, help="put the table into this document, between its marks")
    parser.add_argument("--check", type=Path, help="compare with the table in this document, change nothing")
    options = parser.parse_args()
    start = time.monotonic()
    jobs = [(a, b, options.seeds) for a, b in pairs()]
    for a, b, _ in jobs:
        report(a)  # once, before the processes part
        report(b)
    with get_context("fork").Pool(options.processes) as pool:
        rows = [summary(row) for row in pool.imap(one, jobs, chunksize=1)]
    took = time.monotonic() - start
    text = table(rows, options.seeds)
    print(text)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(jobs) * options.seeds} punches on {options.processes} processes in {took:.0f} s "
        f"({usage.ru_utime + usage.ru_stime:.0f} s of CPU)",
        file=sys.stderr,
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"seconds": round(took, 1), "pairs": rows}, indent=1) + "\n")
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        options.write.write_text(before + text + after)
    missed = [row for row in rows if row["stuck"] or (row["theory"] and row["direct"] != row["seeds"])]
    for row in missed:
        print(f"not as it must be: {row}", file=sys.stderr)
    differs = differences(options.check.read_text(), text) if options.check else []
    for what in differs:
        print(what, file=sys.stderr)
    if differs:
        print(f"{options.check} shows another table: renew it by make nat-matrix", file=sys.stderr)
    sys.exit(bool(missed or differs))


if __name__ == "__main__":
    main()
