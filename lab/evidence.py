"""What a lab counts: drops of the daemons, the rendezvous, the modelled NATs and the wires.

Where a promise is broken, the counters that grew meanwhile say where packets went.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from crossedge.lab.demo_mesh import Mesh
from crossedge.lab.launch import ROOTS
from crossedge.lab.network import Network
from crossedge.lab.pings import PingResult
from crossedge.rendezvous.control import ask

Counts = dict[str, Counter[str]]
"""Counters by name, by what has them."""


def counters(mesh: Mesh, members: Collection[str]) -> Counts:
    """Return every drop counter of some members of a mesh, of its rendezvous and of the network."""
    found: Counts = {}
    lab = mesh.network.status()
    for wire in lab["wires"]:
        for end, counts in (wire["counts"] or {}).items():
            found[f"wire {wire['name']}, {end}"] = _flat(counts["dropped"])
    for name in mesh.servers:
        try:
            status = ask(ROOTS / name / "run/crossedge-rendezvous/control.sock", "status")
        except (OSError, ValueError):
            status = {}
        found[name] = _flat({key: status.get(key, {}) for key in ("dropped", "refused", "failed_sends")})
    for name in members:
        found[name] = _flat(mesh.members[name].ask("status").get("dropped", {}))
    for router in lab["routers"]:
        found[router["name"]] = _flat({key: router.get(key, {}) for key in ("dropped", "udp")})
    return found


def grown(before: Counts, after: Counts) -> list[str]:
    """Return a line for everything of which a counter grew; what was not looked at before began at 0."""
    lines = []
    for name, counts in after.items():
        old = before.get(name, Counter())
        by = {key: count - old[key] for key, count in sorted(counts.items()) if count > old[key]}
        if by:
            lines.append(f"{name}: {', '.join(f'{key} {count}' for key, count in by.items())}")
    return lines


def of_ping(result: PingResult) -> str:
    """Return what a run of ping saw, in a few words."""
    if not result.sent:
        return "ping says nothing"
    lost, slowest = ranges(result.missing) or "none", max(result.times.values(), default=0.0)
    late = f"; when ping had ended came {ranges(sorted(result.late))}" if result.late else ""
    return f"of pings 1-{result.sent} lost {lost}{late}; slowest answer {slowest:.0f} ms"


def of_machine(network: Network) -> str:
    """Return how busy the machine is, in a few words."""
    late = [
        counts["late_us"]["max"] or 0
        for wire in network.status()["wires"]
        for counts in (wire["counts"] or {}).values()
    ]
    wires = f", wires at most {max(late) / 1000:.0f} ms late" if late else ""
    return f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}{wires}"


def ranges(numbers: list[int]) -> str:
    """Return sorted numbers in short: "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _flat(values: Mapping[str, Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(value))
        else:
            found[key] += int(value)
    return found
