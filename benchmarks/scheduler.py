"""Measure the scheduler against its bars: `make bench-sched` writes build/bench/sched.json and prints a
table. Exit status 1 where a bar is missed.

First what is timed, alone; then what is counted, on all processors; at last a running service under load,
alone again. On a machine that is otherwise quiet that takes six minutes on two processors.

Real matrices come from the folder that CROSSEDGE_DATA names. Without it matrices of the same sizes are
generated; the bars were set for the real ones. Nothing was tuned on the seeds that are used here; `--seed`
takes others. Optima of the real matrices stand in benchmarks/optima.json; `make exact-sched` finds them
again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from figures import Figures
from optima import OPTIMA, solve_all
from schedload import measure_service
from schedparts import PARTS, Bench, Job
from schedtimes import measure_time

FRESH = 20_261_122  # first of the seeds; tuning and tests use small ones
TOLD_EVERY = 10.0  # seconds between lines of progress
ALL = ("time", *PARTS, "load")

_bench: Bench | None = None  # of a worker


def begin(data: Path | None, only: list[str], seed: int) -> None:
    """Begin a worker."""
    global _bench
    _bench = Bench.of(data, only, seed)


def work(job: Job) -> Any:
    """Do one job in a worker; return its result and the processor seconds that it took."""
    action, given = job
    before = time.process_time()
    return action(_bench, *given), time.process_time() - before


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def measure_parts(figures: Figures, bench: Bench, parts: list[str], workers: int) -> None:
    """Run the jobs of these parts side by side, then add the figures part by part."""
    running = {part: PARTS[part](figures, bench) for part in parts}
    given = {part: next(running[part], []) for part in parts}
    tasks = [(part, job) for part in parts for job in given[part]]
    if not tasks:
        return
    say(f"{len(tasks)} jobs of {', '.join(parts)} on {workers} processors")
    started = told = time.monotonic()
    context = multiprocessing.get_context("spawn")
    only = list(bench.matrices)
    with ProcessPoolExecutor(workers, context, begin, (bench.data, only, bench.seed)) as pool:
        futures = {pool.submit(work, job): part for part, job in tasks}
        for done, future in enumerate(as_completed(futures), 1):
            future.result()  # what fails ends it here
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                say(f"{done} of {len(tasks)} jobs done, {told - started:.0f} s ({futures[future]})")
        say(f"all jobs done in {time.monotonic() - started:.0f} s")
        for part in (part for part in parts if given[part]):
            done_by = [future.result() for future, name in futures.items() if name == part]
            results = [result for result, _ in done_by]
            figures.add(f"bench.{part}_processor_seconds", sum(used for _, used in done_by))
            with suppress(StopIteration):
                running[part].send(results)


def write(file: Path, figures: Figures, of: dict[str, Any], parts: list[str]) -> None:
    """Write the figures; those of other parts stay as the file has them, if they are of the same data."""
    held = json.loads(file.read_text()) if file.exists() else {}
    if any(held.get(key) != value for key, value in of.items()):
        held = {}

    def kept(rows: dict[str, Any]) -> dict[str, Any]:
        return {name: row for name, row in rows.items() if part_of(name) in set(ALL) - set(parts)}

    peers = {peer: kept(rows) | figures.peers.get(peer, {}) for peer, rows in held.get("peers", {}).items()}
    result = of | {
        "parts": [part for part in ALL if part in {*parts, *held.get("parts", ())}],
        "figures": kept(held.get("figures", {})) | figures.rows,
        "ratios": kept(held.get("ratios", {})) | figures.ratios,
        "peers": figures.peers | peers,
    }
    result["failed"] = [name for name, row in result["figures"].items() if not row.get("holds", True)]
    file.write_text(json.dumps(result, indent=2) + "\n")


def part_of(figure: str) -> str:
    """Return the part that measures a figure."""
    first = figure.partition(".")[0]
    return "load" if first == "service" else first


def main() -> int:
    """Measure everything, or only solve exactly; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument(
        "--only",
        default=",".join(ALL),
        metavar="PART,...",
        help=f"some of {','.join(ALL)}; figures of the others stay as sched.json has them",
    )
    parser.add_argument("--matrices", default="", metavar="NAME,...", help="some of the matrices")
    parser.add_argument("--seed", type=int, default=FRESH, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that count")
    parser.add_argument("--exact", type=float, metavar="SECONDS", help="only solve exactly, so long for each")
    parser.add_argument("--rows", default="*", help="with --exact: pattern of the rows to solve")
    parser.add_argument("--ways", default="*", help="with --exact: pattern of the ways to solve them")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(ALL):
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    data = Path(os.environ["CROSSEDGE_DATA"]) if os.environ.get("CROSSEDGE_DATA") else None
    bench = Bench.of(data, filter(None, arguments.matrices.split(",")), arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.exact:
        file = OPTIMA if data else arguments.output / "optima.json"
        solve_all(bench.matrices, arguments.exact, file, arguments.rows, arguments.ways)
        return 0
    figures, started = Figures(), time.perf_counter()
    if "time" in parts:
        measure_time(figures, bench)
    measure_parts(figures, bench, [part for part in PARTS if part in parts], arguments.workers)
    if "load" in parts:
        measure_service(figures)
    figures.add("bench.seconds", time.perf_counter() - started)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    figures.add("bench.processor_seconds", sum(one.ru_utime + one.ru_stime for one in used))
    print(f"\n{figures.table()}\n")
    file, missed = arguments.output / "sched.json", figures.missed
    write(file, figures, {"data": "real" if data else "generated", "seed": bench.seed}, parts)
    print(f"{len(figures.rows)} figures in {file}; {'PASS' if not missed else 'FAIL: ' + ', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
