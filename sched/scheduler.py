"""The scheduler's state: who reported what, the last round, the services. It has no clock and no files.

Reports come in, a `Task` goes out to be worked on, its `Outcome` comes back, and what must be kept of it goes
out to the history. All times are given by the caller: `now` in seconds of an even clock, `unix` the time of
day.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from crossedge.latency.feed import Applied, Feed, NeedsFull
from crossedge.sched.config import SchedConfig
from crossedge.sched.decision import Policy
from crossedge.sched.history import NodeRow, RoundRow, ServiceRow
from crossedge.sched.identity import StableGroups
from crossedge.sched.medoids import KEPT as ASKED_FOR
from crossedge.sched.metrics import Counters
from crossedge.sched.placement import PlacementError, checked
from crossedge.sched.rounds import Outcome, ServiceTask, Task
from crossedge.sched.services import ServiceError, ServiceSpec, View, check_names, nothing, number, problem_of
from crossedge.sched.snapshot import Member, collected
from crossedge.wire.blocklist import Blocklist

FRESH_INTERVALS = 3.0
CYCLE_SHARE = 0.9  # of the cycle that must have passed before services are decided again
CHANGED_SHARE = 0.1  # of the nodes; where more than these came or went, the estimators compete anew
KEPT = ("nodes", "moves", "mean_ms", "p95_ms", "before_ms", "bound_ms", "gap", "reason", "warnings", "error")


@dataclass(slots=True)
class Node:
    """A node that reported, in this life or before. `heard` is the `now` of its last report in this life."""

    node_id: bytes
    name: str
    first: float
    last: float
    seq: int
    serial: int
    heard: float | None = None
    reports: int = 0
    recent: bool = False
    """Whether it was here when the scheduler stopped."""
    unsaved: bool = False
    told: int = 0
    """Which of our wishes whom to measure it was told last."""


@dataclass(slots=True)
class Service:
    """A service and what was decided of it. `version` grows with each change by a client."""

    name: str
    spec: ServiceSpec
    created: float
    updated: float
    version: int
    current: tuple[str, ...] = ()
    decision: dict[str, Any] | None = None

    def row(self) -> ServiceRow:
        """Return what is kept of it."""
        decision = None if self.decision is None else json.dumps(self.decision)
        spec = self.spec.model_dump_json()
        return ServiceRow(self.name, spec, self.created, self.updated, self.current, decision)

    def task(self) -> ServiceTask:
        """Return what a round works on."""
        return ServiceTask(self.name, self.version, self.spec, self.current)

    def as_json(self) -> dict[str, Any]:
        """Return what the API shows."""
        brief = None
        if self.decision is not None:
            brief = {
                key: self.decision[key]
                for key in ("round", "time", "nodes", "mean_ms", "gap", "reason", "error")
            }
        return {
            "name": self.name,
            "created": self.created,
            "updated": self.updated,
            **self.spec.model_dump(),
            "current": list(self.current),
            "decision": brief,
        }


@dataclass(frozen=True, slots=True)
class Kept:
    """What the history takes of one round."""

    row: RoundRow
    nodes: list[NodeRow]
    services: list[ServiceRow]
    decisions: list[tuple[str, str]]
    state: dict[str, object]


@dataclass(slots=True)
class Restored:
    """What an earlier life left."""

    nodes: Sequence[NodeRow] = ()
    services: Sequence[ServiceRow] = ()
    round: int = 0
    round_time: float = 0.0
    groups: Mapping[str, int] = field(default_factory=dict)
    fresh_group: int = 0
    positions: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    estimator: tuple[str | None, float | None, int, int] = (None, None, 0, 0)
    """The one in use, its error, and the round and number of nodes it was chosen at."""


class Scheduler:
    """Reports, rounds and services of one network."""

    def __init__(self, config: SchedConfig, ca: bytes, now: float, restored: Restored | None = None) -> None:
        """Begin at `now`, with what an earlier life left."""
        restored = restored or Restored()
        self.config = config
        self.counters = Counters()
        self.feed = Feed(ca, config.nodes.skew, config.nodes.most)
        self.started = now
        self.view: View = nothing()
        self.outcome: Outcome | None = None
        self.round = restored.round
        self.changes = 0
        """Grows with each report that changed something, for whoever keeps copies of the list of nodes."""
        self.nodes: dict[bytes, Node] = {}
        self.services: dict[str, Service] = {}
        self._groups = StableGroups(
            config.rounds.agreeing, dict(restored.groups), _fresh=restored.fresh_group
        )
        self._positions: Mapping[str, tuple[float, float]] = dict(restored.positions)
        self._estimator, self._error, *validated = restored.estimator
        self._validated = (validated[0], validated[1])
        self._decided = -inf
        self._asked: Mapping[str, tuple[str, ...]] = {}
        self._asked_number = 0
        self._asked_at, self._asked_size = -inf, 0
        recent = restored.round_time - config.nodes.gone_after
        for row in restored.nodes:
            here = row.last >= recent
            self.nodes[row.node_id] = Node(
                row.node_id, row.name, row.first, row.last, row.seq, row.serial, recent=here
            )
        for kept in restored.services:
            decision = None if kept.decision is None else json.loads(kept.decision)
            spec = ServiceSpec.model_validate_json(kept.spec)
            self.services[kept.name] = Service(
                kept.name, spec, kept.created, kept.updated, 0, kept.current, decision
            )

    # Reports

    def report(self, encoded: bytes, now: float, unix: float) -> Applied | NeedsFull:
        """Take a node's signed report.

        Raises:
            WireError: it is not believed (see `Feed.apply`); nothing is stored.
        """
        outcome = self.feed.apply(encoded, now, unix)
        if isinstance(outcome, NeedsFull) or outcome.duplicate:
            return outcome
        certificate = outcome.report.certificate
        node = self.nodes.get(certificate.node_id)
        if node is not None and outcome.report.seq <= node.seq:
            self.feed.drop(node.node_id)  # heard before a restart, and somebody sends it again
            return NeedsFull("old", node.seq)
        if node is None:
            node = Node(certificate.node_id, certificate.name, unix, unix, 0, certificate.serial)
            self.nodes[certificate.node_id] = node
        node.last, node.heard, node.unsaved = unix, now, True
        node.seq, node.serial = outcome.report.seq, certificate.serial
        node.reports += 1
        self.changes += 1
        return outcome

    def medoids_for(self, applied: Applied) -> tuple[str, ...] | None:
        """Return the names of nodes that the sender of a report should measure beside those of its choice.

        None where there is nothing to say: it was told, and this is no full report, with which it is told
        again in case that the answer was lost.
        """
        node = self.nodes.get(applied.report.node_id)
        if node is None or not self._asked_number:
            return None
        if node.told == self._asked_number and not applied.report.full:
            return None
        node.told = self._asked_number
        return self._asked.get(node.name, ())

    def enforce(self, blocklist: Blocklist | None) -> list[str]:
        """Take a verified blocklist; return the names of nodes that were dropped by it."""
        self.feed.blocklist = blocklist
        if blocklist is None:
            return []
        self.feed.drop_revoked()
        gone = [node for node in self.nodes.values() if node.serial < blocklist.revoked.get(node.name, 0)]
        for node in gone:
            del self.nodes[node.node_id]
        self.changes += len(gone)
        return [node.name for node in gone]

    def age(self, node: Node, now: float, unix: float) -> float:
        """Return the seconds since a node's last report."""
        return max(0.0, now - node.heard if node.heard is not None else unix - node.last)

    def state_of(self, node: Node, now: float) -> str:
        """Return "fresh" (within three report intervals), "stale", or "silent" since the start."""
        held = self.feed.nodes.get(node.node_id)
        if node.heard is None or held is None:
            return "silent"
        return "fresh" if now - node.heard <= FRESH_INTERVALS * held.interval else "stale"

    def alive(self, node: Node, now: float) -> bool:
        """Tell whether a node may carry replicas: it reported lately, or did when the scheduler stopped."""
        if node.heard is None:
            return node.recent and now - self.started <= self.config.nodes.gone_after
        return now - node.heard <= self.config.nodes.gone_after

    def warming(self, now: float) -> bool:
        """Tell whether decisions are held, because nodes that were here are not back yet."""
        if now - self.started >= self.config.rounds.warmup:
            return False
        return any(node.recent and node.heard is None for node in self.nodes.values())

    @property
    def policy(self) -> Policy:
        """When services move that say nothing themselves."""
        moves = self.config.moves
        return Policy(moves.gain_ms, moves.gain_share, moves.per_service)

    # Rounds

    def begin(self, now: float, unix: float) -> Generator[None, None, Task]:
        """Return the next round's task, in steps between which others can run."""
        self.feed.drop_silent(now, self.config.nodes.forget_after)
        for node in list(self.nodes.values()):
            if self.age(node, now, unix) > self.config.nodes.forget_after:
                del self.nodes[node.node_id]
        members = [
            Member(node.node_id, node.name, self.alive(node, now))
            for node in sorted(self.nodes.values(), key=lambda node: node.name)
        ]
        snapshot = yield from collected(self.feed, members, now)
        rounds, moves = self.config.rounds, self.config.moves
        since, size = self._validated
        if self.round - since >= rounds.validate_every or (
            not self.warming(now) and abs(len(members) - size) > CHANGED_SHARE * size
        ):
            self._estimator = None
        services: tuple[ServiceTask, ...] = ()
        if not self.warming(now) and now - self._decided >= CYCLE_SHARE * rounds.every:
            self._decided = now
            services = tuple(service.task() for service in self.services.values())
        return Task(
            self.round + 1,
            unix,
            snapshot,
            self._groups,
            self._positions,
            self.config.nodes.half_life,
            self._estimator,
            self._error,
            services,
            self.policy,
            moves.per_round,
            rounds.seed,
            self._ask_anew(len(members), now),
        )

    def _ask_anew(self, size: int, now: float) -> bool:
        if self.warming(now):
            return False
        changed = abs(size - self._asked_size) > CHANGED_SHARE * self._asked_size
        return changed or now - self._asked_at >= ASKED_FOR

    def end(self, outcome: Outcome, now: float, unix: float) -> Kept:
        """Take a round's outcome; return what is to be kept."""
        view = outcome.view
        if self._estimator is None and outcome.error is not None:
            self._validated = (view.round, len(view.names))
            self._estimator = outcome.estimator
        self._error = outcome.error
        if outcome.asked is not None:
            self._asked_at, self._asked_size = now, len(view.names)
            if outcome.asked or self._asked:
                self._asked, self._asked_number = outcome.asked, self._asked_number + 1
        self.round, self.view, self.outcome = view.round, view, outcome
        self._groups = outcome.groups
        self._positions = {
            name: (float(x), float(y))
            for name, (x, y) in zip(view.names, view.points.tolist(), strict=True)
            if x == x  # not nan
        }
        rows, decisions = [], []
        for name, (version, decision) in outcome.decisions.items():
            service = self.services.get(name)
            if service is None or service.version != version:
                continue
            changed = self.settle(service, decision)
            rows.append(service.row())
            if changed:
                decisions.append((name, kept_json(decision)))
        self.counters.add("rounds_total", "done")
        nodes = [node for node in self.nodes.values() if node.unsaved]
        for node in nodes:
            node.unsaved = False
        labels = {
            name: int(label) if label >= 0 else None
            for name, label in zip(view.names, view.labels, strict=True)
        }
        ages = {
            node.name: round(self.age(node, now, unix), 1)
            for node in self.nodes.values()
            if node.name in view.index
        }
        state = {
            "round": view.round,
            "round_time": view.time,
            "groups": dict(self._groups.labels),
            "fresh_group": self._groups._fresh,
            "estimator": (self._estimator, self._error, *self._validated),
            "positions": {name: (round(x, 3), round(y, 3)) for name, (x, y) in self._positions.items()},
        }
        return Kept(
            RoundRow(view.round, view.time, self.summary(now), labels, ages),
            [
                NodeRow(node.node_id, node.name, node.first, node.last, node.seq, node.serial)
                for node in nodes
            ],
            rows,
            decisions,
            state,
        )

    def settle(self, service: Service, decision: dict[str, Any]) -> bool:
        """Take a decision; return whether it changed something, or is the first."""
        before = service.decision
        decision["service"] = service.name
        decision["round"], decision["time"] = self.view.round, self.view.time
        decision["replicas"] = service.spec.replicas
        first = before is None or before["error"] != decision["error"]
        service.decision = decision
        if decision["error"] is not None:
            return first
        for move in decision["moves"]:
            kind = "opened" if move["from"] is None else "by-choice" if decision["by_choice"] else "replaced"
            self.counters.add("moves_total", kind)
        changed = sorted(service.current) != sorted(decision["nodes"])
        service.current = tuple(decision["nodes"])
        return first or changed

    def summary(self, now: float) -> dict[str, Any]:
        """Return the figures of the last round."""
        outcome = self.outcome
        if outcome is None:
            return {}
        grouping = outcome.grouping
        fresh = sum(1 for node in self.nodes.values() if self.state_of(node, now) == "fresh")
        return {
            "nodes": len(outcome.view.names),
            "fresh": fresh,
            **outcome.pairs,
            "estimator": outcome.estimator,
            "error": None if outcome.error is None else number(outcome.error),
            "k": 0 if grouping is None else grouping.k,
            "silhouette": None if grouping is None else number(grouping.silhouette),
            "within_ms": None if grouping is None else number(grouping.within_ms),
            "scale_ms": None if grouping is None else number(grouping.scale_ms),
            "moves": outcome.moves,
            "seconds": number(sum(outcome.seconds.values())),
            "processor_seconds": number(outcome.processor),
        }

    # Services

    def check_service(self, spec: ServiceSpec) -> None:
        """Check that a service can be had.

        Raises:
            ServiceError: a node that is not known, nobody who uses it, or it does not fit.
        """
        check_names(spec, {node.name for node in self.nodes.values()})
        if not self.view.names:
            return
        try:
            problem, _ = problem_of(spec, self.view)
            checked(problem)
        except PlacementError as error:
            raise ServiceError("infeasible", "", str(error)) from error
        except ServiceError as error:
            if error.reason != "no-data":  # what is not known yet is no fault of the request
                raise

    def put_service(self, name: str, spec: ServiceSpec, unix: float) -> tuple[Service, bool]:
        """Store a service; return it and whether it is new.

        Raises:
            ServiceError: it cannot be had, or there are too many; nothing is stored.
        """
        self.check_service(spec)
        held = self.services.get(name)
        if held is None:
            if len(self.services) >= self.config.limits.services:
                raise ServiceError("too-many-services", "", f"{self.config.limits.services} are allowed")
            held = Service(name, spec, unix, unix, 0)
            fresh = True
        else:
            fresh = False
        service = Service(name, spec, held.created, unix, held.version + 1, held.current, held.decision)
        if spec.current is not None:
            service.current = tuple(spec.current)
        self.services[name] = service
        return service, fresh


def kept_json(decision: Mapping[str, Any]) -> str:
    """Return what the history keeps of a decision."""
    return json.dumps({key: decision[key] for key in KEPT})
