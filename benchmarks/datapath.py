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
- rtt_20mbit: 95th percentile of pings while one TCP stream fills a 20 Mbit/s link (tbf, 100 ms of queue; ms);
- cpu_per_gb: user and system time of the daemons at both ends per 10^9 bytes of tcp_1 (s);
- tcp_1_chacha: tcp_1 with ChaCha20-Poly1305 (crossedge prefers AES where the CPU has it);
- tcp_1_stock_peer: crossedge to and from a stock wireguard-go, beside wireguard-go at both ends (the worse);
- pod_to_pod: tcp_1 between pods, beside tcp_1 between hosts;
- relay: tcp_1 through the rendezvous, beside wireguard-go hub-and-spoke, in three namespaces;
- tcp_loss_0.1, _1, _3 (wire): tcp_1 for 20 s or more, so many percent of the datagrams lost each way, with no
  delay and with 20 ms of round-trip time by the lab's delay line (the worse).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from dataworld import (
    Authority,
    Crossedge,
    System,
    World,
    build_wireguard,
    run,
    stock_peer,
    wireguard,
    wireguard_hub,
)

from crossedge.host.namespaces import mount

FLAGS: Final = ("-nm", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")
INSIDE: Final = "CROSSEDGE_BENCH_NAMESPACE"
REPOSITORY: Final = Path(__file__).resolve().parent.parent
CONDITIONS: Final = ("offloaded", "gro", "wire")
LOSSES: Final = {"0.1": (1000, 1), "1": (100, 1), "3": (100, 3)}
LOSS_SECONDS: Final = 20.0
WORST: Final = {
    "tcp_1_stock_peer": ("tcp_1_to_stock", "tcp_1_from_stock"),
    **{f"tcp_loss_{loss}": (f"tcp_loss_{loss}_0ms", f"tcp_loss_{loss}_20ms") for loss in LOSSES},
}
"""Rows whose ratio is the worse one of two."""

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

Figures = dict[str, float]


# --- What is measured --------------------------------------------------------------------------------------


def iperf(system: System, seconds: float, *words: str) -> dict[str, Any]:
    """Run iperf3 from the left, against a server of its own, and return its summary."""
    system.listen()
    command = ["iperf3", "-J", "-c", system.target, "-t", f"{max(1, round(seconds))}", *words]
    answer = json.loads(run(system.left, *command, timeout=seconds + 60))
    if "error" in answer:
        raise RuntimeError(f"{system.world.name}: iperf3: {answer['error']}")
    end: dict[str, Any] = answer["end"]
    return end


def pings(system: System, count: int, interval: float) -> list[float]:
    """Return round-trip times in milliseconds, sorted."""
    words = ["ping", "-n", "-c", str(count), "-i", str(interval), "-W", "1", system.target]
    with system.left.namespace:
        text = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    found = sorted(float(number) for number in re.findall(r"time=([\d.]+) ms", text))
    if len(found) < count / 2:
        raise RuntimeError(f"{system.world.name}: {len(found)} of {count} pings answered")
    return found


def tcp(system: System, seconds: float, name: str, *words: str) -> Figures:
    """One or more TCP streams."""
    end = iperf(system, seconds, *words)
    return {name: end["sum_received"]["bits_per_second"] / 1e9}


def tcp_and_pings(system: System, seconds: float) -> Figures:
    """One TCP stream; pings beside it; what it costs."""
    before = system.cpu()
    with ThreadPoolExecutor(1) as pool:
        count = max(10, int((seconds - 0.4) / 0.05))
        found = pool.submit(lambda: (time.sleep(0.2), pings(system, count, 0.05))[1])
        end = iperf(system, seconds)
        times = found.result()
    received = end["sum_received"]
    return {
        "retransmits": float(end["sum_sent"].get("retransmits", 0)),
        "tcp_1": received["bits_per_second"] / 1e9,
        "rtt_loaded": statistics.mean(times),
        "cpu_per_gb": (system.cpu() - before) / (received["bytes"] / 1e9),
    }


def udp(system: System, seconds: float, name: str, size: int, rate: str) -> Figures:
    """UDP of one size at an offered rate: what is received."""
    end = iperf(system, seconds, "-u", "-l", str(size), "-b", rate)["sum"]
    received = end["packets"] - end["lost_packets"]
    per_second = received / end["seconds"]
    return {name: per_second if name.endswith("pps") else per_second * size * 8 / 1e9}


def idle(system: System, seconds: float) -> Figures:
    """Pings on an idle tunnel."""
    return {"rtt_idle": statistics.mean(pings(system, int(seconds / 0.004), 0.004))}


def narrow(system: System, seconds: float) -> Figures:
    """Pings beside one TCP stream that fills a narrow link."""
    left = system.world.left
    rule = ["root", "tbf", "rate", "20mbit", "burst", "16kb", "latency", "100ms"]
    run(left, "tc", "qdisc", "replace", "dev", "eth0", *rule)
    try:
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(iperf, system, seconds + 2)
            time.sleep(1.5)
            times = pings(system, int(seconds / 0.02), 0.02)
            stream.result()
    finally:
        run(left, "tc", "qdisc", "del", "dev", "eth0", "root")
    return {"rtt_20mbit": times[int(len(times) * 0.95)]}


def lossy(system: System, seconds: float, loss: str, delay: str) -> Figures:
    """One TCP stream; the middle drops datagrams, each way by a count of its own."""
    every, count = LOSSES[loss]
    middle = system.world.site("middle")
    verdicts = ", ".join(f"{1 + number * every // count} : drop" for number in range(count))
    rules = ["add table inet loss", "flush table inet loss"]
    rules.append("add chain inet loss f { type filter hook forward priority 0; }")
    rules += [
        f'add rule inet loss f iifname "{side}" numgen inc mod {every} vmap {{ {verdicts} }}'
        for side in ("left", "right")
    ]
    run(middle, "nft", "; ".join(rules))
    return tcp(system, seconds, f"tcp_loss_{loss}_{delay}")


# --- Rounds ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Turn:
    """One run of one system."""

    who: str
    work: Callable[[float], Figures]


@dataclass(slots=True)
class Row:
    """A ratio of what two turns of a round measured."""

    name: str
    ours: tuple[str, str]
    """Who, and the name of the figure."""
    theirs: tuple[str, str]


@dataclass(slots=True)
class Round:
    """Turns that are taken one after the other, again and again; or, where they load nothing, together."""

    turns: list[Turn]
    rows: list[Row]
    seconds: float
    together: bool = False

    def run(self) -> dict[str, Figures]:
        """Take each turn once."""
        if not self.together:
            return {turn.who: turn.work(self.seconds) for turn in self.turns}
        with ThreadPoolExecutor(len(self.turns)) as pool:
            results = [(turn.who, pool.submit(turn.work, self.seconds)) for turn in self.turns]
            return {who: result.result() for who, result in results}


@dataclass(slots=True)
class Result:
    """All runs of one row under one condition."""

    name: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Ours by theirs, pair by pair."""
        return [a / b if b else 0.0 for a, b in zip(self.ours, self.theirs, strict=True)]


def simple(
    name: str, a: System, b: System, seconds: float, work: Callable[[System, float], Figures]
) -> Round:
    """Return a round of one row, of two systems."""
    turns = [Turn("crossedge", partial(work, a)), Turn("wireguard-go", partial(work, b))]
    return Round(turns, [Row(name, ("crossedge", name), ("wireguard-go", name))], seconds)


class Bench:
    """The worlds, made when a row wants them, and the rounds in them."""

    def __init__(self, stack: ExitStack, options: argparse.Namespace, binary: str) -> None:
        self._stack = stack
        self._options = options
        self._binary = binary
        self._authority: Authority | None = None
        self._number = 0
        self._systems: dict[str, System] = {}
        self._worlds: list[World] = []

    def wanted(self, condition: str, *names: str) -> bool:
        """Tell whether one of these rows is to be run."""
        patterns = self._options.only or ["*"]
        return any(
            fnmatch.fnmatch(f"{condition}.{name}", pattern) or fnmatch.fnmatch(name, pattern)
            for name in names
            for pattern in patterns
        )

    def close_worlds(self) -> None:
        """End all worlds: what is idle costs, too."""
        self._stack.close()
        self._systems.clear()
        self._worlds.clear()

    def system(self, name: str) -> System:
        """Return a system by its name."""
        if name not in self._systems:
            self._systems[name] = self._make(name)
        return self._systems[name]

    def set_condition(self, condition: str) -> None:
        """Set the wires of all worlds that there are."""
        for world in self._worlds:
            world.set_condition(condition)

    def _world(self, name: str, **shape: Any) -> World:
        self._number += 1
        world = World(self._stack, name, self._number, **shape)
        self._worlds.append(world)
        return world

    def _make(self, name: str) -> System:
        if self._authority is None:
            self._authority = Authority()
        authority, binary = self._authority, self._binary
        kind, _, where = name.partition("@")
        if where == "hub":
            world = self._world(f"{kind}-hub", middle=True)
            return (
                wireguard_hub(world, binary)
                if kind == "wireguard"
                else Crossedge(world, authority, ["left", "right"]).system(path="relay")
            )
        if where:
            world = self._world(name.replace("@", "-"), middle=True, delay=10.0 if "20ms" in where else 0.0)
            world.forward()
        else:
            world = self._world(kind)
        if kind == "wireguard":
            return wireguard(world, binary)
        if kind == "stock":
            return stock_peer(world, authority, binary)
        config = 'disable_offloads = ["aes"]\n' if kind == "chacha" else ""
        mesh = Crossedge(world, authority, ["left", "right"], config)
        if kind == "crossedge" and not where and self.wanted("*", "pod_to_pod"):
            self._systems["pods"] = mesh.system(pods=True)
        return mesh.system()

    def rounds(self, condition: str) -> Iterator[Round]:
        """Yield what is to be run under a condition on the plain worlds."""
        want, seconds = partial(self.wanted, condition), self._options.seconds
        first = ("tcp_1", "rtt_loaded", "cpu_per_gb", "tcp_1_chacha", "tcp_1_stock_peer", "pod_to_pod")
        if want(*first):
            yield self._first(want, seconds)
        a, b = partial(self.system, "crossedge"), partial(self.system, "wireguard")
        if want("tcp_1_reverse"):
            work = partial(_named, "tcp_1_reverse", "-R")
            yield simple("tcp_1_reverse", a(), b(), seconds, work)
        if want("tcp_8"):
            yield simple("tcp_8", a(), b(), seconds, partial(_named, "tcp_8", "-P8"))
        for name, size, rate in (("udp_1300", 1300, "5G"), ("udp_64_pps", 64, "0")):
            if want(name):
                work = partial(_udp_named, name, size, rate)
                yield simple(name, a(), b(), seconds, work)
        if want("rtt_idle"):
            yield simple("rtt_idle", a(), b(), 1.0, idle)
        if want("rtt_20mbit"):
            yield simple("rtt_20mbit", a(), b(), 2.0, narrow)
        if want("relay"):
            a, b = partial(self.system, "crossedge@hub"), partial(self.system, "wireguard@hub")
            yield simple("relay", a(), b(), seconds, partial(_named, "relay", "-P1"))

    def _first(self, want: Callable[..., bool], seconds: float) -> Round:
        """All that is compared with one TCP stream through wireguard-go or between hosts."""
        turns, rows = [], []
        hosts, stock = want("tcp_1", "rtt_loaded", "cpu_per_gb", "pod_to_pod"), want("tcp_1_stock_peer")
        if hosts:
            turns.append(Turn("crossedge", partial(tcp_and_pings, self.system("crossedge"))))
            rows += [
                Row(n, ("crossedge", n), ("wireguard-go", n)) for n in ("tcp_1", "rtt_loaded", "cpu_per_gb")
            ]
        turns.append(Turn("wireguard-go", partial(tcp_and_pings, self.system("wireguard"))))
        if want("tcp_1_chacha"):
            turns.append(Turn("chacha", partial(_named, "tcp", "-P1", self.system("chacha"))))
            rows.append(Row("tcp_1_chacha", ("chacha", "tcp"), ("wireguard-go", "tcp_1")))
        if stock:
            for name, flag in (("tcp_1_to_stock", "-P1"), ("tcp_1_from_stock", "-R")):
                turns.append(Turn(name, partial(_named, "tcp", flag, self.system("stock"))))
                rows.append(Row(name, (name, "tcp"), ("wireguard-go", "tcp_1")))
        if want("pod_to_pod"):
            turns.append(Turn("pods", partial(_named, "tcp", "-P1", self.system("pods"))))
            rows.append(Row("pod_to_pod", ("pods", "tcp"), ("crossedge", "tcp_1")))
        return Round(turns, rows, seconds)

    def losses(self) -> Iterator[Round]:
        """Yield the rounds with loss; those with delay load the machine little and run together."""
        seconds = (
            max(LOSS_SECONDS, self._options.seconds) if not self._options.short else self._options.seconds
        )
        chosen = [loss for loss in LOSSES if self.wanted("wire", f"tcp_loss_{loss}")]
        delayed = Round([], [], seconds, together=True)
        for loss in chosen:
            rows = {d: f"tcp_loss_{loss}_{d}" for d in ("0ms", "20ms")}
            turns = [
                Turn(who, partial(lossy, self.system(f"{kind}@0ms"), loss=loss, delay="0ms"))
                for who, kind in (("crossedge", "crossedge"), ("wireguard-go", "wireguard"))
            ]
            row = rows["0ms"]
            yield Round(turns, [Row(row, ("crossedge", row), ("wireguard-go", row))], seconds)
            row = rows["20ms"]
            for who, kind in (("crossedge", "crossedge"), ("wireguard-go", "wireguard")):
                system = self.system(f"{kind}@20ms-{loss.replace('.', '')}")
                delayed.turns.append(Turn(f"{who} {loss}", partial(lossy, system, loss=loss, delay="20ms")))
            delayed.rows.append(Row(row, (f"crossedge {loss}", row), (f"wireguard-go {loss}", row)))
        if delayed.turns:
            yield delayed

    def memory(self) -> dict[str, float]:
        """Return MiB of the largest crossedge daemon: now, and at its peak."""
        system = self._systems.get("crossedge")
        if system is None:
            return {}
        return {"now_mib": round(system.memory(), 1), "peak_mib": round(system.memory("VmHWM"), 1)}


def _named(name: str, flag: str, system: System, seconds: float) -> Figures:
    return tcp(system, seconds, name, flag)


def _udp_named(name: str, size: int, rate: str, system: System, seconds: float) -> Figures:
    return udp(system, seconds, name, size, rate)


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
        runs = [each.run() for _ in range(pairs)]
        for row in each.rows:
            result = Result(f"{condition}.{row.name}")
            for found in runs:
                result.ours.append(found[row.ours[0]][row.ours[1]])
                result.theirs.append(found[row.theirs[0]][row.theirs[1]])
            if bench.wanted(condition, row.name, *(k for k, v in WORST.items() if row.name in v)):
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
    ratios = {name: round(statistics.median(result.ratios), 3) for name, result in results.items()}
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
        "wireguard_go": {"version": version, "newest": newest},
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
        user = [] if os.geteuid() == 0 else ["-Ur"]
        words = ["unshare", *user, *FLAGS, sys.executable, *sys.argv]
        os.execvpe("unshare", words, {**os.environ, INSIDE: "1"})  # noqa: S606 - our own words
    mount("tmpfs", "/run", "tmpfs", 0)
    Path("/run/bench").mkdir()
    sys.exit(main(chosen))
