"""What benchmarks/datapath.py measures: runs of one system, rounds of them in turn, the worlds they want."""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from datapeers import find_nebula, nebula, stock_peer, wireguard, wireguard_hub
from dataworld import Authority, Crossedge, System, World, run

LOSSES: Final = {"0.1": (1000, 1), "1": (100, 1), "3": (100, 3)}
"""In so many datagrams so many are dropped."""
LOSS_SECONDS: Final = 20.0
WORST: Final = {
    "tcp_1_stock_peer": ("tcp_1_to_stock", "tcp_1_from_stock"),
    **{f"tcp_loss_{loss}": (f"tcp_loss_{loss}_0ms", f"tcp_loss_{loss}_20ms") for loss in LOSSES},
}
"""Rows whose ratio is the worse one of two."""

NEBULA: Final = "_nebula"
"""How rows end that have Nebula beside crossedge, where it is installed."""

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
    """Pings on an idle tunnel, 4 ms apart: ping itself waits actively at less than 10 ms."""
    return {"rtt_idle": statistics.mean(pings(system, int(seconds / 0.004), 0.004))}


def rested(system: System, seconds: float) -> Figures:
    """Pings on an idle tunnel, so far apart that ping sleeps and nothing is warm."""
    return {"rtt_rested": statistics.mean(pings(system, int(seconds / 0.2), 0.2))}


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
    """Turns that are taken one after the other, again and again."""

    turns: list[Turn]
    rows: list[Row]
    seconds: float
    shared: bool = False
    """There are two turns, and each run belongs to the pair with the run before and to that with the next:
    for long runs."""

    def runs(self, pairs: int) -> list[dict[str, Figures]]:
        """Take turns; returns the figures of each pair (or more) of runs, by who it was."""
        if not self.shared:
            return [{turn.who: turn.work(self.seconds) for turn in self.turns} for _ in range(pairs)]
        taken = []
        for number in range(pairs + 1):
            turn = self.turns[number % 2]
            taken.append((turn.who, turn.work(self.seconds)))
        return [dict(taken[number : number + 2]) for number in range(pairs)]


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
        if kind == "nebula":
            return nebula(world)
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
        if condition == "offloaded" and want("rtt_rested"):
            yield simple("rtt_rested", a(), b(), 3.0, rested)
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
        if hosts and find_nebula():
            turns.append(Turn("nebula", partial(tcp_and_pings, self.system("nebula"))))
            rows += [
                Row(n + NEBULA, ("crossedge", n), ("nebula", n))
                for n in ("tcp_1", "rtt_loaded", "cpu_per_gb")
            ]
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
        """Yield the rounds with loss."""
        seconds = (
            max(LOSS_SECONDS, self._options.seconds) if not self._options.short else self._options.seconds
        )
        for delay in ("0ms", "20ms"):
            for loss in LOSSES:
                if not self.wanted("wire", f"tcp_loss_{loss}"):
                    continue
                row = f"tcp_loss_{loss}_{delay}"
                turns = [
                    Turn(who, partial(lossy, self.system(f"{kind}@{delay}"), loss=loss, delay=delay))
                    for who, kind in (("crossedge", "crossedge"), ("wireguard-go", "wireguard"))
                ]
                rows = [Row(row, ("crossedge", row), ("wireguard-go", row))]
                yield Round(turns, rows, seconds, shared=True)

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
