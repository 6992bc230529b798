"""What the API answers, for its OpenAPI description. Answers are built as plain JSON; tests hold them against
these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from crossedge.sched.services import NodeNames, ServiceSpec


class Answer(BaseModel):
    """The base of every answer: what it does not name is not there."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Fault(Answer):
    """Why a request was refused."""

    error: str
    """A short name."""
    detail: str | None = None
    """What is wrong, for people."""


class ReportTaken(Answer):
    """A report that was taken, and whom its sender is asked to measure beside the peers of its own choice."""

    medoids: list[str]


class NeedsFullAnswer(Answer):
    """A report whose base is not here: send a full one with a higher number."""

    error: str
    reason: str
    seq: int


class Healthy(Answer):
    """The process answers."""

    ok: bool


class Ready(Answer):
    """Whether there is a matrix to decide by."""

    ready: bool
    detail: str


class NodeCounts(Answer):
    """Nodes by the age of their reports."""

    all: int
    fresh: int
    stale: int
    silent: int


class PairCounts(Answer):
    """Pairs by what is known of them."""

    measured: int
    estimated: int
    unreachable: int
    unmeasured: int


class Status(Answer):
    """How the scheduler is."""

    version: str
    time: float
    uptime_s: float
    round: int
    round_time: float | None
    round_seconds: float | None
    round_every_s: float
    nodes: NodeCounts
    pairs: PairCounts
    estimator: str | None
    estimator_error: float | None
    confidence: float | None
    groups: int
    services: int
    writes: Literal["token", "off"]
    reads: Literal["free", "token"]
    problems: list[str]


class CertificateAnswer(Answer):
    """What the node's certificate says."""

    serial: int
    not_after: int
    groups: list[str]
    roles: list[str]


class PeerCounts(Answer):
    """What a node reports of its pairs."""

    measured: int
    direct: int
    relayed: int
    unreachable: int


class NodeAnswer(Answer):
    """One node."""

    name: str
    group: int | None
    state: Literal["fresh", "stale", "silent"]
    report_age_s: float | None
    reports: int
    certificate: CertificateAnswer | None
    overlay: list[str]
    peers: PeerCounts


class Nodes(Answer):
    """All nodes, by name."""

    round: int
    time: float
    nodes: list[NodeAnswer]


class GroupAnswer(Answer):
    """One group; `id` is stable between rounds."""

    id: int
    size: int
    medoid: str
    within_ms: float | None
    members: list[str]


class Groups(Answer):
    """All groups, the largest first."""

    round: int
    time: float | None
    k: int
    scale_ms: float | None
    silhouette: float | None
    within_ms: float | None
    groups: list[GroupAnswer]
    ungrouped: list[str]


class Matrix(Answer):
    """The completed matrix. `kind`: 0 unmeasured, 1 measured, 2 unreachable, 3 estimated, 4 the node itself;
    plus 8 where the measured path is relayed.
    """

    round: int
    time: float | None
    order: Literal["group", "name"]
    names: list[str]
    groups: list[int | None]
    rtt_ms: list[list[float | None]]
    kind: list[list[int]]
    confidence: list[list[float]]


class MapNode(Answer):
    """One node on the map; no position where nothing is known of it."""

    name: str
    x: float | None
    y: float | None
    group: int | None
    state: Literal["fresh", "stale", "silent"]


class Map(Answer):
    """The nodes in the plane, and the pairs that were measured: [a, b, ms, kind]."""

    round: int
    time: float | None
    unit: Literal["ms"]
    stress: float | None
    nodes: list[MapNode]
    links: list[list[float | None]]


class Move(Answer):
    """A replica that moves; from null: it is new."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    source: str | None = Field(alias="from")
    to: str


class Candidate(Answer):
    """One node in the account of a decision."""

    node: str
    chosen: bool
    mean_ms: float | None
    served: float
    verdict: str


class Best(Answer):
    """The placement without regard to where the replicas are now."""

    nodes: list[str]
    mean_ms: float
    p95_ms: float
    bound_ms: float | None
    gap: float | None


class DecisionAnswer(Answer):
    """What is to be done with a service, and why."""

    service: str | None
    round: int
    time: float
    replicas: int
    nodes: list[str]
    moves: list[Move]
    mean_ms: float | None
    p95_ms: float | None
    by_choice: bool
    before_ms: float | None
    reason: str
    best: Best | None
    bound_ms: float | None
    gap: float | None
    unserved: float | None
    confidence: float | None
    warnings: list[str]
    candidates: list[Candidate]
    error: str | None


class User(Answer):
    """Who serves an access node: [replica, demand, ms]."""

    node: str
    weight: float
    served_by: list[tuple[str, float, float | None]]


class Baseline(Answer):
    """What a simpler rule would give."""

    mean_ms: float
    p95_ms: float


class DryRun(DecisionAnswer):
    """A decision that is not carried out."""

    users: list[User]
    baselines: dict[str, Baseline] | None
    seconds: float


class Brief(Answer):
    """A decision in short."""

    round: int
    time: float
    nodes: list[str]
    mean_ms: float | None
    gap: float | None
    reason: str
    error: str | None


class ServiceAnswer(ServiceSpec):
    """A service as it is stored."""

    name: str
    created: float
    updated: float
    current: NodeNames
    decision: Brief | None


class Services(Answer):
    """All services, by name."""

    services: list[ServiceAnswer]


class RoundAnswer(Answer):
    """The figures of one round."""

    round: int
    time: float
    nodes: int
    fresh: int
    measured: int
    estimated: int
    unreachable: int
    unmeasured: int
    estimator: str
    error: float | None
    k: int
    silhouette: float | None
    within_ms: float | None
    scale_ms: float | None
    moves: int
    seconds: float
    processor_seconds: float


class Rounds(Answer):
    """Rounds, newest first."""

    rounds: list[RoundAnswer]


class RoundDetail(RoundAnswer):
    """One round with the group, and the age in seconds of the report, of every node."""

    labels: dict[str, int | None]
    ages_s: dict[str, float | None]


class PastDecision(Answer):
    """A decision that changed something."""

    id: int
    round: int
    time: float
    service: str
    nodes: list[str]
    moves: list[Move]
    mean_ms: float | None
    p95_ms: float | None
    before_ms: float | None
    bound_ms: float | None
    gap: float | None
    reason: str
    warnings: list[str]
    error: str | None


class PastDecisions(Answer):
    """Decisions, newest first."""

    decisions: list[PastDecision]


class ExtenderArgs(BaseModel):
    """kube-scheduler's `ExtenderArgs` (k8s.io/kube-scheduler/extender/v1)."""

    Pod: dict[str, Any]
    Nodes: dict[str, Any] | None = None
    NodeNames: list[str] | None = None


class ExtenderFilterResult(Answer):
    """kube-scheduler's `ExtenderFilterResult`."""

    Nodes: dict[str, Any] | None
    NodeNames: list[str] | None
    FailedNodes: dict[str, str]
    FailedAndUnresolvableNodes: dict[str, str]
    Error: str


class HostPriority(Answer):
    """kube-scheduler's `HostPriority`: a score of 0 to 10."""

    Host: str
    Score: int = Field(ge=0, le=10)
