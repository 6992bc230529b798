"""Services: what is to be placed for whom, and the account that is given of where.

Everything here works on the completed matrix of one round, a `View`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from crossedge.sched.decision import LISTED, SURE, Decision, Policy, decide, explain
from crossedge.sched.matrix import Flags, Floats, Ints, States
from crossedge.sched.placement import Problem, flow_to, served
from crossedge.wire.errors import CrossedgeError
from crossedge.wire.identity import NAME_PATTERN

REPLICAS_MAX = 1000
NAMES_MAX = 16_384
AMOUNT_MAX = 1e12
USERS_LISTED = 500

NodeName = Annotated[str, Field(pattern=NAME_PATTERN)]
Amount = Annotated[float, Field(ge=0, le=AMOUNT_MAX, allow_inf_nan=False)]
NodeNames = Annotated[list[NodeName], Field(max_length=NAMES_MAX)]


class ServiceError(CrossedgeError):
    """A service that cannot be had as it is asked for; `reason` is a short name, `field` what is wrong."""

    def __init__(self, reason: str, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}" if field else detail)
        self.reason = reason
        self.field = field


class ServicePolicy(BaseModel):
    """When this service moves; the scheduler's own settings where a field is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gain_ms: float | None = Field(default=None, ge=0, le=60_000, allow_inf_nan=False)
    """Milliseconds of mean user RTT that a better placement must gain."""
    gain_share: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """And the share of the present mean."""
    moves_max: int | None = Field(default=None, ge=0, le=100)
    """Replicas that may move in one round."""


class ServiceSpec(BaseModel):
    """A service to place."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    replicas: int = Field(ge=1, le=REPLICAS_MAX)
    """How many replicas, each on a node of its own."""
    users: Literal["all"] | Annotated[dict[NodeName, Amount], Field(max_length=NAMES_MAX)] = "all"
    """Demand at each access node, in any unit; "all": every node has one user."""
    capacity: Amount | None = None
    """Demand that a replica can serve, in the same unit; null: any."""
    capacities: Annotated[dict[NodeName, Amount], Field(max_length=NAMES_MAX)] = Field(default_factory=dict)
    """The same for single nodes, where they differ."""
    allowed: NodeNames | None = None
    """Where replicas may stand; null: everywhere."""
    current: NodeNames | None = None
    """Where the replicas are now; null: where the scheduler last put them."""
    policy: ServicePolicy | None = None
    """When it moves; null: as the scheduler's settings say."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The completed matrix of one round, as services, pages and the extender read it.

    Attributes:
        round: its number, 0 before the first.
        time: Unix seconds when it was made of reports.
        names: the nodes.
        alive: (n,) whether a node may carry replicas.
        rtt: (n, n) ms, `nan` where nobody knows.
        kind: (n, n) as in `Snapshot.kinds`.
        confidence: (n, n) in 0..1.
        labels: (n,) stable group identity, -1 without one.
        points: (n, 2) positions on the map in ms, `nan` without one.
        index: name to position.
    """

    round: int
    time: float
    names: tuple[str, ...]
    alive: Flags
    rtt: Floats
    kind: States
    confidence: Floats
    labels: Ints
    points: Floats
    index: dict[str, int]


def nothing() -> View:
    """Return the view before the first round."""
    square = np.zeros((0, 0))
    none = np.zeros(0, dtype=np.int64)
    return View(
        0, 0.0, (), np.zeros(0, bool), square, square.astype(np.uint8), square, none, np.zeros((0, 2)), {}
    )


def check_names(spec: ServiceSpec, known: set[str]) -> None:
    """Check that every node that a service names is known; `ServiceError("unknown-node")` otherwise."""
    named: list[tuple[str, Sequence[str]]] = [
        ("users", [] if spec.users == "all" else list(spec.users)),
        ("capacities", list(spec.capacities)),
        ("allowed", spec.allowed or []),
        ("current", spec.current or []),
    ]
    for field, names in named:
        for name in names:
            if name not in known:
                raise ServiceError("unknown-node", field, f"no node is called {name!r}")
    for field, listed in (("allowed", spec.allowed), ("current", spec.current)):
        if listed is not None and len(set(listed)) < len(listed):
            raise ServiceError("doubled-node", field, "a node stands twice")
    if spec.users != "all" and not any(spec.users.values()):
        raise ServiceError("no-demand", "users", "somebody must use the service")


def problem_of(spec: ServiceSpec, view: View) -> tuple[Problem, list[str]]:
    """Return the placement problem of a service, and warnings.

    Nodes that are gone are passed over, and so are users of whom no RTT to any allowed node is known: what
    cannot be told apart must not decide.

    Raises:
        ServiceError: nobody is left who uses it, or nothing is known of those who do.
    """
    n = len(view.names)
    warnings = []
    if spec.users == "all":
        weights = view.alive.astype(np.float64)
    else:
        weights = np.zeros(n)
        gone = [name for name in spec.users if name not in view.index]
        for name, amount in spec.users.items():
            if name in view.index:
                weights[view.index[name]] = amount
        if gone:
            warnings.append(f"users at {len(gone)} nodes that are gone do not count: {', '.join(gone[:3])}")
    if not weights.any():
        raise ServiceError("no-demand", "users", "nobody uses the service at a node that is here")
    capacities = None
    if spec.capacity is not None or spec.capacities:
        capacities = np.full(n, float(weights.sum()) if spec.capacity is None else spec.capacity)
        for name, amount in spec.capacities.items():
            if name in view.index:
                capacities[view.index[name]] = amount
    allowed = view.alive.copy()
    if spec.allowed is not None:
        inside = np.zeros(n, dtype=bool)
        inside[[view.index[name] for name in spec.allowed if name in view.index]] = True
        allowed &= inside
    blind = (weights > 0) & ~np.isfinite(view.rtt[:, allowed]).any(axis=1)
    if blind.any():
        if (blind | (weights == 0)).all():
            raise ServiceError(
                "no-data", "users", "too little data: no RTT is known from any user to any node"
            )
        lost = [view.names[node] for node in np.nonzero(blind)[0]]
        warnings.append(
            f"too little data: no RTT is known from {len(lost)} access nodes with a demand of "
            f"{weights[blind].sum():g}, which does not count: {', '.join(lost[:3])}"
        )
        weights[blind] = 0.0
    return Problem(view.rtt, weights, spec.replicas, capacities, allowed), warnings


def policy_of(spec: ServiceSpec, standard: Policy) -> Policy:
    """Return when a service moves."""
    own = spec.policy or ServicePolicy()
    return Policy(
        standard.gain_ms if own.gain_ms is None else own.gain_ms,
        standard.gain_share if own.gain_share is None else own.gain_share,
        standard.moves_max if own.moves_max is None else own.moves_max,
    )


def decided(
    spec: ServiceSpec,
    current: Sequence[str],
    view: View,
    standard: Policy,
    rng: np.random.Generator,
    listed: int = LISTED,
) -> dict[str, Any]:
    """Return what becomes of a service in this round, as JSON.

    Args:
        spec: the service.
        current: nodes of its replicas; those that are gone may be among them.
        view: the round.
        standard: when services move that say nothing themselves.
        rng: shakes the search.
        listed: how many candidates to account for beside the chosen.

    Raises:
        ServiceError: nobody uses it.
        PlacementError: it does not fit.
    """
    problem, warnings = problem_of(spec, view)
    held = [view.index[name] for name in current if name in view.index]
    decision = decide(problem, held, rng, policy_of(spec, standard))
    return account(problem, decision, held, view, warnings, listed)


def before_of(problem: Problem, held: Sequence[int]) -> tuple[float | None, float]:
    """Return the mean over known pairs with the replicas where they are, None where there are none or where
    they serve nobody, and the demand that has no known RTT to them.
    """
    allowed = np.ones(problem.rtt.shape[1], dtype=bool) if problem.allowed is None else problem.allowed
    present = np.array(sorted({node for node in held if allowed[node]}), dtype=np.int64)
    if not len(present):
        return None, 0.0
    rtt, flow = flow_to(problem, present)
    mean, _, unserved = served(rtt, flow)
    return (mean if flow.sum() > unserved else None), unserved


def account(
    problem: Problem, decision: Decision, held: Sequence[int], view: View, warnings: list[str], listed: int
) -> dict[str, Any]:
    """Return the JSON of a decision: figures, moves, who serves whom, and why the others were refused."""
    names, best = view.names, decision.best
    before, unserved_before = before_of(problem, held)
    reason = decision.reason
    if unserved_before > 0 and decision.moves and decision.before_ms is not None:
        reason = (
            f"moves {len(decision.moves)}: a demand of {unserved_before:g} had no known RTT to any replica"
        )
    rtt, flow = flow_to(problem, decision.nodes)
    mean, tail, unserved = served(rtt, flow)
    confidence = confidence_of(
        flow, view.confidence[:, decision.nodes], np.isfinite(view.rtt[:, decision.nodes])
    )
    if unserved > 0:
        warnings = [*warnings, f"no RTT is known from a demand of {unserved:g} to any replica"]
    if confidence is None or confidence < SURE:
        warnings = [*warnings, "too little is measured to be sure of this"]
    return {
        "nodes": [names[node] for node in decision.nodes],
        "moves": [
            {"from": names[old] if old >= 0 else None, "to": names[new]} for old, new in decision.moves
        ],
        "mean_ms": number(mean) if flow.sum() > unserved else None,
        "p95_ms": number(tail) if flow.sum() > unserved else None,
        "by_choice": decision.before_ms is not None,
        "before_ms": None if before is None else number(before),
        "reason": reason,
        "best": {
            "nodes": [names[node] for node in best.nodes],
            "mean_ms": number(best.mean_ms),
            "p95_ms": number(best.p95_ms),
            "bound_ms": number(best.bound_ms) if best.unserved <= 0 else None,
            "gap": number(best.gap) if best.unserved <= 0 else None,
        },
        "bound_ms": number(best.bound_ms) if unserved <= 0 else None,
        "gap": number(max(0.0, 1.0 - best.bound_ms / max(decision.mean_ms, 1e-9))) if unserved <= 0 else None,
        "unserved": number(unserved),
        "confidence": None if confidence is None else number(confidence),
        "warnings": warnings,
        "candidates": [
            {
                "node": names[item.node],
                "chosen": item.chosen,
                "mean_ms": None if item.mean_ms is None else number(item.mean_ms),
                "served": number(item.served),
                "verdict": item.verdict,
            }
            for item in explain(problem, decision.nodes, flow, view.confidence, listed, names)
        ],
        "error": None,
    }


def confidence_of(flow: Floats, confidence: Floats, known: Flags) -> float | None:
    """Return the mean confidence of the pairs that demand uses; None where no pair is known."""
    used = np.where(known, flow, 0.0)
    total = float(used.sum())
    return float((used * confidence).sum() / total) if total > 0 else None


def users_of(problem: Problem, nodes: Ints, view: View) -> list[dict[str, Any]]:
    """Return who serves each user, the heaviest users first, as JSON."""
    _, flow = flow_to(problem, nodes)
    order = np.argsort(-problem.weights, kind="stable")[:USERS_LISTED]
    result = []
    for user in order.tolist():
        if problem.weights[user] <= 0:
            break
        parts = []
        for index in np.nonzero(flow[user] > 0)[0].tolist():
            node = int(nodes[index])
            ms = view.rtt[user, node]
            parts.append(
                [view.names[node], number(flow[user, index]), number(ms) if np.isfinite(ms) else None]
            )
        result.append({"node": view.names[user], "weight": number(problem.weights[user]), "served_by": parts})
    return result


def kept(current: Sequence[str], error: CrossedgeError) -> dict[str, Any]:
    """Return the decision of a service that cannot be decided: it stays, and the error says why."""
    return {
        "nodes": list(current),
        "moves": [],
        "mean_ms": None,
        "p95_ms": None,
        "by_choice": False,
        "before_ms": None,
        "reason": "stays: it cannot be decided",
        "best": None,
        "bound_ms": None,
        "gap": None,
        "unserved": None,
        "confidence": None,
        "warnings": [],
        "candidates": [],
        "error": str(error),
    }


def number(value: float) -> float:
    """Return a number as JSON shows it: six digits after the point are more than anybody measures."""
    return round(float(value), 6)
