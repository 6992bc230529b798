"""How fast the data path is, beside wireguard-go: `make bench-datapath` writes build/bench/datapath.json.

Each system has two namespaces of its own, joined by a veth pair, and is measured in turn with the others (A B
A B ...). The ratio of a pair of neighbouring runs counts, and the median of those is reported, because both
ends, iperf3 and whatever else runs share the machine. Three conditions of the wire:

- offloaded: veth as the kernel makes it; a train passes as one packet;
- gro: the sender's veth cuts trains into datagrams, the receiver's joins them again (GRO);
- wire: it does not, as with a simple network card.

Rows, each under the three conditions unless it says otherwise (`--only` takes patterns of `condition.row`):

- tcp_1, tcp_1_reverse, tcp_8: TCP by iperf3, 1 stream to the right or to the left, 8 streams (Gbit/s);
- udp_1300: UDP datagrams of 1,300 bytes at 5 Gbit/s offered (Gbit/s received);
- udp_64_pps: datagrams of 64 bytes, sender unbounded (packets/s received);
- rtt_idle, rtt_loaded: mean of pings, alone and beside tcp_1 (ms);
- rtt_rested (offloaded): mean of pings that are 0.2 s apart, where rtt_idle's are 4 ms (ms);
- rtt_20mbit: 95th percentile of pings while one TCP stream fills a 20 Mbit/s link (tbf, 100 ms of queue; ms);
- cpu_per_gb: user and system time of the daemons at both ends per 10^9 bytes of tcp_1 (s);
- tcp_1_chacha: tcp_1 with ChaCha20-Poly1305 (crossedge prefers AES where the CPU has it);
- tcp_1_stock_peer: crossedge to and from a stock wireguard-go, beside wireguard-go at both ends (the worse);
- pod_to_pod: tcp_1 between pods, beside tcp_1 between hosts;
- relay: tcp_1 through the rendezvous, beside wireguard-go hub-and-spoke, in three namespaces;
- tcp_loss_0.1, _1, _3 (wire): tcp_1 for 20 s or more, so many percent of the datagrams lost each way, with no
  delay and with 20 ms of round-trip time by the lab's delay line (the worse); a run is compared with the one
  before and with the one behind it, so that five pairs are three runs of each;
- tcp_1_nebula, rtt_loaded_nebula, cpu_per_gb_nebula: the same beside Nebula, where that is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from datapeers import build_wireguard, find_nebula
from datarows import LOSSES, NEBULA, WORST, Bench, Result, Round

from crossedge.host.namespaces import mount

FLAGS: Final = ("-nm", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")
INSIDE: Final = "CROSSEDGE_BENCH_NAMESPACE"
REPOSITORY: Final = Path(__file__).resolve().parent.parent
CONDITIONS: Final = ("offloaded", "gro", "wire")
LOWER_IS_BETTER: Final = ("rtt_", "cpu_")
# bar and aim, in general and on the wire-like wire
BARS: Final[dict[str, tuple[float, float, float, float]]] = {
    "tcp_1": (2.5, 4.0, 1.5, 2.5),
    "tcp_1_reverse": (2.5, 4.0, 1.5, 2.5),
    "tcp_8": (2.0, 3.5, 1.3, 2.0),
    "udp_1300": (1.6, 2.5, 1.1, 2.5),
    "udp_64_pps": (1.6, 3.0, 1.6, 3.0),
    "rtt_idle": (0.8, 0.6, 0.8, 0.6),
    "rtt_loaded": (1.0, 0.5, 1.0, 0.5),
    "rtt_20mbit": (1.1, 0.7, 1.1, 0.7),
    "cpu_per_gb": (0.5, 0.25, 0.8, 0.25),
    "tcp_1_stock_peer": (0.6, 0.6, 0.6, 0.6),
    "pod_to_pod": (0.85, 0.85, 0.85, 0.85),
    "relay": (1.5, 1.5, 1.5, 1.5),
    **{f"tcp_loss_{loss}": (0.95, 1.3, 0.95, 1.3) for loss in LOSSES},
}
CHACHA_BAR: Final = 2.0  # offloaded only
UNITS: Final = {"udp_64_pps": "packets/s", "cpu_per_gb": "s/GB", "rtt_": "ms", "": "Gbit/s"}

# --- The run -----------------------------------------------------------------------------------------------


def bar_of(full: str) -> tuple[float | None, float | None]:
    """Return bar and aim of `condition.row`."""
    condition, _, name = full.partition(".")
    if name == "tcp_1_chacha":
        return (CHACHA_BAR, CHACHA_BAR) if condition == "offloaded" else (None, None)
    found = BARS.get(name)
    if found is None:
        return None, None
    return found[2:] if condition == "wire" else found[:2]


def unit_of(name: str) -> str:
    """Return the unit of a row's figures."""
    return next(unit for start, unit in UNITS.items() if name.startswith(start))


def measure(bench: Bench, rounds: Iterator[Round], condition: str, pairs: int) -> dict[str, Result]:
    """Run every round so many times; say each row as soon as it is there."""
    results: dict[str, Result] = {}
    for each in rounds:
        bench.set_condition(condition)
        runs = each.runs(pairs)
        for row in each.rows:
            result = Result(f"{condition}.{row.name}")
            for found in runs:
                result.ours.append(found[row.ours[0]][row.ours[1]])
                result.theirs.append(found[row.theirs[0]][row.theirs[1]])
            known = row.name.removesuffix(NEBULA)
            if bench.wanted(condition, known, *(k for k, v in WORST.items() if known in v)):
                results[result.name] = result
                print(line(result), flush=True)
    return results


def line(result: Result) -> str:
    """Return a row of the table."""
    name = result.name.partition(".")[2]
    ratio = statistics.median(result.ratios)
    bar, _ = bar_of(result.name)
    verdict = ""
    if bar is not None:
        holds = ratio <= bar if name.startswith(LOWER_IS_BETTER) else ratio >= bar
        verdict = f"bar {bar:<5g} {'holds' if holds else 'MISSED'}"
    ours, theirs = statistics.median(result.ours), statistics.median(result.theirs)
    shown = "{:>11,.0f}" if name.endswith("pps") else "{:>11.3f}"
    low, high = min(result.ratios), max(result.ratios)
    return (
        f"{result.name:<28}{shown.format(ours)}{shown.format(theirs)} {unit_of(name):<10}"
        f"{ratio:6.2f}  ({low:.2f} to {high:.2f})  {verdict}"
    )


def summarise(results: dict[str, Result]) -> dict[str, float]:
    """Return the median ratio of each row; of a row that has two, the worse."""
    ratios = {
        name: round(statistics.median(result.ratios), 3)
        for name, result in results.items()
        if not name.endswith(NEBULA)
    }
    for condition in CONDITIONS:
        for name, parts in WORST.items():
            found = [ratios.pop(f"{condition}.{part}") for part in parts if f"{condition}.{part}" in ratios]
            if found:
                ratios[f"{condition}.{name}"] = min(found)
    return ratios


def main(options: argparse.Namespace) -> int:
    """Measure, print the table, write the file."""
    began = time.time()
    binary, version, newest = build_wireguard(REPOSITORY / "build/bench")
    print(f"wireguard-go {version}" + ("" if newest else " (packaged: this run does not count for the bars)"))
    print(
        f"{'':<28}{'crossedge':>11}{'other':>11} {'':<10}{'ratio':>6}  (lowest to highest of {options.pairs})"
    )
    results: dict[str, Result] = {}
    memory: dict[str, Any] = {}
    with ExitStack() as stack:
        bench = Bench(stack, options, binary)
        for condition in CONDITIONS:
            results |= measure(bench, bench.rounds(condition), condition, options.pairs)
        memory = bench.memory()
        bench.close_worlds()
        results |= measure(bench, bench.losses(), "wire", options.pairs)
    ratios = summarise(results)
    report = {
        "schema": 1,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds_taken": round(time.time() - began, 1),
        "peers": {
            "wireguard-go": {"version": version, "newest": newest},
            "nebula": {"version": find_nebula() or None},
        },
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg(), "kernel": os.uname().release},
        "pairs": options.pairs,
        "seconds": options.seconds,
        "counts": newest and options.pairs >= 5 and not options.short,
        "figures": {
            name: {
                "unit": unit_of(name.partition(".")[2]),
                "crossedge": [round(value, 4) for value in result.ours],
                "other": [round(value, 4) for value in result.theirs],
                "medians": [
                    round(statistics.median(result.ours), 4),
                    round(statistics.median(result.theirs), 4),
                ],
                "ratios": [round(value, 3) for value in result.ratios],
                "median_ratio": round(statistics.median(result.ratios), 3),
            }
            for name, result in results.items()
        },
        "ratios": ratios,
        "bars": {name: bar_of(name)[0] for name in ratios if bar_of(name)[0] is not None},
        "memory": memory,
    }
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds_taken']:.0f} s; {output}")
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="rows to run: tcp_1, wire.*, *.udp_* (may be repeated)",
    )
    parser.add_argument("--pairs", type=int, default=5, help="runs of each system per row (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run (default 2)")
    parser.add_argument("--short", action="store_true", help="runs with loss take --seconds, too, not 20 s")
    parser.add_argument(
        "--output", default=str(REPOSITORY / "build/bench/datapath.json"), help="where the results go"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    if not os.environ.get(INSIDE):
        build_wireguard(REPOSITORY / "build/bench")  # modules are fetched here: inside there is no network
        user = [] if os.geteuid() == 0 else ["-Ur"]
        words = ["unshare", *user, *FLAGS, sys.executable, *sys.argv]
        os.execvpe("unshare", words, {**os.environ, INSIDE: "1"})  # noqa: S606 - our own words
    mount("tmpfs", "/run", "tmpfs", 0)
    Path("/run/bench").mkdir()
    sys.exit(main(chosen))
