"""What the reading side of the API answers, as plain JSON or bytes, of the scheduler's state. No I/O."""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import numpy as np

from crossedge.latency.report import PairState
from crossedge.sched.matrix import Ints, State
from crossedge.sched.rounds import Outcome, counts
from crossedge.sched.scheduler import Scheduler
from crossedge.sched.services import View, number
from crossedge.sched.snapshot import KIND_RELAYED

JSON_NODES: Final = 300
"""Nodes of the largest matrix that is given as JSON."""
LINKS_MAX: Final = 40_000
MAGIC: Final = b"CEM1"
UNIT: Final = 10.0  # steps of the binary matrix in one millisecond
NO_NUMBER: Final = 65535
TOO_LARGE: Final = 65534


def rounded(value: float | None) -> float | None:
    """Return a number for JSON; what is not finite is null."""
    return None if value is None or not np.isfinite(value) else number(value)


def group_of(label: int) -> int | None:
    """Return a group's identity for JSON."""
    return label if label >= 0 else None


def status(scheduler: Scheduler, now: float, unix: float) -> dict[str, Any]:
    """Return nodes, pairs and the last round in figures."""
    states = [scheduler.state_of(node, now) for node in scheduler.nodes.values()]
    outcome, view = scheduler.outcome, scheduler.view
    problems = []
    gone = sorted(
        node.name
        for node in scheduler.nodes.values()
        if scheduler.age(node, now, unix) > scheduler.config.nodes.gone_after
    )
    if gone:
        some = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
        problems.append(
            f"no report for more than {scheduler.config.nodes.gone_after:g} s from {len(gone)} of "
            f"{len(states)} nodes: {some}"
        )
    if scheduler.warming(now):
        problems.append("nothing is decided yet: nodes that were here before the start are not back")
    problems += [
        f"service {service.name}: {service.decision['error']}"
        for service in scheduler.services.values()
        if service.decision is not None and service.decision["error"]
    ]
    return {
        "time": unix,
        "uptime_s": number(now - scheduler.started),
        "round": view.round,
        "round_time": view.time if view.round else None,
        "round_seconds": None if outcome is None else number(sum(outcome.seconds.values())),
        "round_every_s": scheduler.config.rounds.every,
        "nodes": {
            "all": len(states),
            **{state: states.count(state) for state in ("fresh", "stale", "silent")},
        },
        "pairs": counts(view) if outcome is None else outcome.pairs,
        "estimator": None if outcome is None else outcome.estimator,
        "estimator_error": None if outcome is None else rounded(outcome.error),
        "confidence": None if outcome is None else rounded(outcome.confidence),
        "groups": len(set(view.labels[view.labels >= 0].tolist())),
        "services": len(scheduler.services),
        "problems": problems,
    }


def nodes(scheduler: Scheduler, now: float, unix: float) -> dict[str, Any]:
    """Return every node: the age of its report, its certificate, what it says of its pairs."""
    view = scheduler.view
    listed = []
    for node in sorted(scheduler.nodes.values(), key=lambda node: node.name):
        held = scheduler.feed.nodes.get(node.node_id)
        position = view.index.get(node.name)
        states = [] if held is None else [pair.state for pair in held.pairs.values()]
        direct, relayed = states.count(PairState.DIRECT), states.count(PairState.RELAYED)
        certificate = None if held is None else held.certificate
        listed.append(
            {
                "name": node.name,
                "group": None if position is None else group_of(int(view.labels[position])),
                "state": scheduler.state_of(node, now),
                "report_age_s": round(scheduler.age(node, now, unix), 1),
                "reports": node.reports,
                "certificate": None
                if certificate is None
                else {
                    "serial": certificate.serial,
                    "not_after": certificate.not_after,
                    "groups": list(certificate.groups),
                    "roles": list(certificate.roles),
                },
                "overlay": []
                if certificate is None
                else [str(address) for address in (certificate.overlay4, certificate.overlay6) if address],
                "peers": {
                    "measured": direct + relayed,
                    "direct": direct,
                    "relayed": relayed,
                    "unreachable": states.count(PairState.UNREACHABLE),
                },
            }
        )
    return {"round": view.round, "time": unix, "nodes": listed}


def groups(outcome: Outcome | None, view: View) -> dict[str, Any]:
    """Return the groups by their stable identities, the largest first."""
    labels = view.labels
    found = []
    for label in sorted(set(labels[labels >= 0].tolist())):
        members = np.nonzero(labels == label)[0]
        inner = view.rtt[np.ix_(members, members)]
        known = np.isfinite(inner)
        np.fill_diagonal(known, False)
        means = np.where(known, inner, 0.0).sum(1) / np.maximum(known.sum(1), 1)
        means[known.sum(1) == 0] = np.inf
        found.append(
            {
                "id": int(label),
                "size": len(members),
                "medoid": view.names[int(members[int(np.argmin(means))])],
                "within_ms": number(np.median(inner[known])) if known.any() else None,
                "members": [view.names[node] for node in members.tolist()],
            }
        )
    found.sort(key=lambda item: (-int(item["size"]), item["id"]))  # type: ignore[call-overload]  # mixed values
    grouping = None if outcome is None else outcome.grouping
    return {
        "round": view.round,
        "time": view.time if view.round else None,
        "k": len(found),
        "scale_ms": None if grouping is None else rounded(grouping.scale_ms),
        "silhouette": None if grouping is None else rounded(grouping.silhouette),
        "within_ms": None if grouping is None else rounded(grouping.within_ms),
        "groups": found,
        "ungrouped": [name for name, label in zip(view.names, labels.tolist(), strict=True) if label < 0],
    }


def ordered(view: View, order: str) -> Ints:
    """Return the nodes' positions in the order asked for: by name, or group after group, the largest first,
    and within a group by mean RTT to the others of it.
    """
    n = len(view.names)
    if order == "name":
        return np.arange(n)
    labels = view.labels
    present, sizes = np.unique(labels[labels >= 0], return_counts=True)
    rank = {
        int(label): place
        for place, (_, label) in enumerate(
            sorted((-size, label) for label, size in zip(present, sizes, strict=True))
        )
    }
    means = np.zeros(n)
    for label in present.tolist():
        members = np.nonzero(labels == label)[0]
        inner = view.rtt[np.ix_(members, members)]
        known = np.isfinite(inner)
        means[members] = np.where(known, inner, 0.0).sum(1) / known.sum(1)
    places = np.array([rank.get(int(label), len(rank)) for label in labels], dtype=np.int64)
    result: Ints = np.lexsort((np.arange(n), means, places)) if n else np.arange(0)
    return result


def matrix(view: View, order: str) -> dict[str, Any]:
    """Return the matrix as JSON; only for at most `JSON_NODES` nodes."""
    index = ordered(view, order)
    cut = np.ix_(index, index)
    rtt = view.rtt[cut].round(4)
    return {
        "round": view.round,
        "time": view.time if view.round else None,
        "order": order,
        "names": [view.names[node] for node in index.tolist()],
        "groups": [group_of(int(view.labels[node])) for node in index],
        "rtt_ms": np.where(np.isfinite(rtt), rtt, np.array(None)).tolist(),
        "kind": view.kind[cut].tolist(),
        "confidence": view.confidence[cut].round(4).tolist(),
    }


def matrix_bytes(view: View, order: str) -> bytes:
    """Return the matrix as bytes, little-endian:

        +--------+--------+---------+----------+------------------+
        | "CEM1" | u32 n  | u32 round| u32 L   | L bytes of JSON  |
        +--------+--------+---------+----------+------------------+
        | n * n u16: RTT in 0.1 ms; 65535 no number, 65534 that or more |
        | n * n u8: kind                                          |
        +---------------------------------------------------------+

    L is such that the numbers begin at a multiple of 8.
    """
    index = ordered(view, order)
    cut = np.ix_(index, index)
    head = json.dumps(
        {
            "time": view.time if view.round else None,
            "order": order,
            "names": [view.names[node] for node in index.tolist()],
            "groups": [group_of(int(view.labels[node])) for node in index],
        }
    ).encode()
    head += b" " * (-len(head) % 8)
    rtt = view.rtt[cut]
    steps = np.full(rtt.shape, NO_NUMBER, dtype="<u2")
    known = np.isfinite(rtt)
    steps[known] = np.minimum(np.rint(rtt[known] * UNIT), TOO_LARGE).astype("<u2")
    fields = struct.pack("<4sIII", MAGIC, len(index), view.round & 0xFFFFFFFF, len(head))
    return fields + head + steps.tobytes() + view.kind[cut].tobytes()


def map_of(scheduler: Scheduler, now: float, links: bool) -> dict[str, Any]:
    """Return the nodes in the plane, and the pairs that were measured."""
    view, outcome = scheduler.view, scheduler.outcome
    states = {node.name: scheduler.state_of(node, now) for node in scheduler.nodes.values()}
    listed = [
        {
            "name": name,
            "x": rounded(x),
            "y": rounded(y),
            "group": group_of(label),
            "state": states.get(name, "silent"),
        }
        for name, (x, y), label in zip(view.names, view.points.tolist(), view.labels.tolist(), strict=True)
    ]
    return {
        "round": view.round,
        "time": view.time if view.round else None,
        "unit": "ms",
        "stress": None if outcome is None else rounded(outcome.stress),
        "nodes": listed,
        "links": links_of(view) if links else [],
    }


def links_of(view: View) -> list[list[float | None]]:
    """Return [a, b, ms, kind] of each measured or unreachable pair, the shortest `LINKS_MAX`."""
    states = view.kind & 7
    probed = np.triu((states == State.MEASURED) | (states == State.UNREACHABLE), 1)
    rows, columns = np.nonzero(probed)
    ms = view.rtt[rows, columns]
    if len(rows) > LINKS_MAX:
        nearest = np.sort(np.argsort(np.nan_to_num(ms, nan=np.inf), kind="stable")[:LINKS_MAX])
        rows, columns, ms = rows[nearest], columns[nearest], ms[nearest]
    kinds = view.kind[rows, columns].tolist()
    return [
        [a, b, rounded(value), kind]
        for a, b, value, kind in zip(rows.tolist(), columns.tolist(), ms.tolist(), kinds, strict=True)
    ]


def ready(scheduler: Scheduler, now: float) -> str:
    """Return why nothing can be decided yet, "" where all is ready."""
    if not scheduler.view.round:
        return "no round has ended yet"
    if len(scheduler.view.names) < 2:
        return "fewer than two nodes have reported"
    if scheduler.warming(now):
        return "nodes that were here before the start are not back yet"
    return ""


Gauge = tuple[str, str, list[tuple[dict[str, str], float]]]


def gauges(
    scheduler: Scheduler, now: float, unix: float, round_seconds: float, database_bytes: int
) -> list[Gauge]:
    """Return what the metrics page shows beside the counters."""
    shown = status(scheduler, now, unix)
    view, outcome = scheduler.view, scheduler.outcome
    result: list[Gauge] = [
        (
            "nodes",
            "Nodes by the age of their reports.",
            [({"state": s}, shown["nodes"][s]) for s in ("fresh", "stale", "silent")],
        ),
        (
            "pairs",
            "Pairs by what is known of them.",
            [({"kind": kind}, value) for kind, value in shown["pairs"].items()],
        ),
        (
            "relayed_pairs",
            "Measured pairs whose path is relayed.",
            [({}, float((view.kind & KIND_RELAYED > 0).sum() / 2))],
        ),
        ("round", "Number of the last round.", [({}, view.round)]),
        ("round_seconds", "Wall seconds of the last round.", [({}, round_seconds)]),
        ("groups", "Groups of the last round.", [({}, shown["groups"])]),
        ("services", "Services that are stored.", [({}, shown["services"])]),
        ("warming", "Whether decisions are held after a start.", [({}, float(scheduler.warming(now)))]),
        ("history_bytes", "Bytes of the history.", [({}, database_bytes)]),
        ("uptime_seconds", "Seconds since the start.", [({}, shown["uptime_s"])]),
    ]
    if view.round:
        result.append(("round_age_seconds", "Age of the last round.", [({}, max(0.0, unix - view.time))]))
    if outcome is not None and outcome.grouping is not None:
        result.append(("silhouette", "RTT silhouette of the groups.", [({}, outcome.grouping.silhouette)]))
    if outcome is not None and outcome.error is not None:
        result.append(("estimator_error", "Median relative error on hidden pairs.", [({}, outcome.error)]))
    ages = [scheduler.age(node, now, unix) for node in scheduler.nodes.values()]
    if ages:
        result.append(("report_age_seconds_max", "Age of the oldest last report.", [({}, max(ages))]))
    decided = [(name, service.decision) for name, service in sorted(scheduler.services.items())]
    for key, text in (
        ("mean_ms", "Mean user RTT of a service in ms."),
        ("gap", "Distance from the bound, at most."),
    ):
        samples = [
            ({"service": name}, float(decision[key]))
            for name, decision in decided
            if decision is not None and decision[key] is not None
        ]
        result.append((f"service_{key}", text, samples))
    return result
