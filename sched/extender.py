"""kube-scheduler's extender, version 1: which nodes a pod may go to, and how near each is to its users.

The JSON is that of `k8s.io/kube-scheduler/extender/v1`: ExtenderArgs in, ExtenderFilterResult or
HostPriorityList out, keys capitalised, scores 0 to 10 (MaxExtenderPriority). Pods say who uses them by
annotations:

    crossedge.io/users: "node=weight,node=weight"    a weight left out is 1
    crossedge.io/service: "shop"                     the users (and the decision) of a service stored here
    crossedge.io/max-rtt-ms: "50"                    nodes whose mean user RTT is above this are refused

A pod without any of them is none of our business: every node passes, and all get the same score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from crossedge.sched.matrix import Floats
from crossedge.sched.services import ServiceSpec, View
from crossedge.wire.errors import CrossedgeError
from crossedge.wire.identity import is_name

USERS: Final = "crossedge.io/users"
SERVICE: Final = "crossedge.io/service"
MAX_RTT: Final = "crossedge.io/max-rtt-ms"
MAX_PRIORITY: Final = 10
NODES_MAX: Final = 16_384
USERS_MAX: Final = 4096
SOFT_MS: Final = 5.0
"""Milliseconds that do not matter: of two near nodes neither is worth much more."""


class ExtenderError(CrossedgeError):
    """A request by kube-scheduler that makes no sense; the text says what."""


class MalformedError(ExtenderError):
    """A body that is no ExtenderArgs at all."""


@dataclass(frozen=True, slots=True)
class Args:
    """One request.

    Attributes:
        names: candidates, in the order given.
        nodes: their objects, where kube-scheduler sent those; None where it sent names.
        annotations: of the pod.
        pod: namespace and name, for messages.
    """

    names: tuple[str, ...]
    nodes: tuple[Mapping[str, Any], ...] | None
    annotations: Mapping[str, str]
    pod: str


@dataclass(frozen=True, slots=True)
class Demand:
    """Who uses a pod: weights by access node (None: nobody said), the nodes a service was decided to be on,
    and the bound on the mean RTT.
    """

    users: Mapping[str, float] | None
    decided: frozenset[str]
    max_rtt: float | None


def parsed_args(body: bytes) -> Args:
    """Return the request in untrusted JSON; raises only `MalformedError`."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON: {type(error).__name__}") from None
    pod = _object(_object(value, "the body").get("Pod"), "Pod")
    metadata = _object(pod.get("metadata") or {}, "Pod.metadata")
    annotations = _object(metadata.get("annotations") or {}, "Pod.metadata.annotations")
    for key in (USERS, SERVICE, MAX_RTT):
        if not isinstance(annotations.get(key, ""), str):
            raise MalformedError(f"Pod.metadata.annotations[{key!r}] is not text")
    own = metadata.get("name") or metadata.get("generateName") or "?"
    label = f"{metadata.get('namespace') or 'default'}/{own}"
    names, nodes = value.get("NodeNames"), value.get("Nodes")
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise MalformedError("NodeNames is not a list of text")
        _check_count(len(names))
        return Args(tuple(names), None, annotations, label)
    items = _object(nodes, "Nodes (or NodeNames)").get("items")
    if items is None:
        items = []
    if not isinstance(items, list):
        raise MalformedError("Nodes.items is not a list")
    _check_count(len(items))
    found = []
    for position, item in enumerate(items):
        where = f"Nodes.items[{position}]"
        name = _object(_object(item, where).get("metadata"), f"{where}.metadata").get("name")
        if not isinstance(name, str):
            raise MalformedError(f"{where}.metadata.name is not text")
        found.append(name)
    return Args(tuple(found), tuple(items), annotations, label)


def _check_count(count: int) -> None:
    if count > NODES_MAX:
        raise MalformedError(f"{count} nodes, at most {NODES_MAX} are taken")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError(f"{where} is not an object")
    return value


def parsed_users(text: str) -> dict[str, float]:
    """Return demand by access node of `crossedge.io/users`; raises only `ExtenderError`."""
    users: dict[str, float] = {}
    for part in text.split(","):
        name, separator, weight = part.strip().partition("=")
        name = name.strip()
        if not is_name(name):
            raise ExtenderError(f"{USERS}: {part.strip()[:60]!r}: expected node=weight")
        try:
            amount = float(weight) if separator else 1.0
        except ValueError:
            raise ExtenderError(f"{USERS}: {weight.strip()[:60]!r} is no weight for {name}") from None
        if not (math.isfinite(amount) and 0 <= amount <= 1e12):
            raise ExtenderError(f"{USERS}: {weight.strip()[:60]!r} is no weight for {name}")
        if name in users:
            raise ExtenderError(f"{USERS}: {name} stands twice")
        users[name] = amount
    if len(users) > USERS_MAX:
        raise ExtenderError(f"{USERS}: {len(users)} nodes, at most {USERS_MAX} are taken")
    if not any(users.values()):
        raise ExtenderError(f"{USERS}: nobody uses it")
    return users


def demand_of(
    args: Args, known: set[str], services: Mapping[str, tuple[ServiceSpec, Sequence[str]]], view: View
) -> Demand:
    """Return who uses a pod.

    Args:
        args: the request.
        known: names of all nodes.
        services: by name, the service and where its replicas are to be.
        view: the last round.

    Raises:
        ExtenderError: an annotation that cannot be used, an unknown node or service in it.
    """
    users: dict[str, float] | None = None
    decided: frozenset[str] = frozenset()
    if SERVICE in args.annotations:
        name = args.annotations[SERVICE].strip()
        if name not in services:
            raise ExtenderError(f"{SERVICE}: no service is called {name[:63]!r}")
        spec, nodes = services[name]
        decided = frozenset(nodes)
        if spec.users == "all":
            users = {node: 1.0 for node, alive in zip(view.names, view.alive.tolist(), strict=True) if alive}
        else:
            users = dict(spec.users)
    if USERS in args.annotations:
        users = parsed_users(args.annotations[USERS])
        for node in users:
            if node not in known:
                raise ExtenderError(f"{USERS}: no node is called {node!r}")
    limit = None
    if MAX_RTT in args.annotations:
        text = args.annotations[MAX_RTT]
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if not limit > 0:
            raise ExtenderError(f"{MAX_RTT}: {text[:60]!r}: expected milliseconds")
        if users is None:
            raise ExtenderError(f"{MAX_RTT} without {USERS} or {SERVICE}")
    return Demand(users, decided, limit)


def mean_rtts(users: Mapping[str, float], view: View) -> Floats:
    """Return (n,) the mean RTT in ms of the users to each node over known pairs, `nan` without any."""
    pairs = [
        (view.index[name], amount) for name, amount in users.items() if amount > 0 and name in view.index
    ]
    n = len(view.names)
    if not pairs or not n:
        return np.full(n, np.nan)
    rows = np.array([row for row, _ in pairs])
    weights = np.array([amount for _, amount in pairs])
    block = view.rtt[rows]
    known = np.isfinite(block)
    whole = weights @ known
    with np.errstate(invalid="ignore"):
        result: Floats = np.where(whole > 0, (weights @ np.where(known, block, 0.0)) / whole, np.nan)
    return result


def filtered(args: Args, demand: Demand, view: View) -> dict[str, Any]:
    """Return the ExtenderFilterResult.

    A node of which too little is known now is in FailedNodes; one that is too far, or no node of the mesh, in
    FailedAndUnresolvableNodes, because evicting pods would not bring it nearer.
    """
    failed: dict[str, str] = {}
    hopeless: dict[str, str] = {}
    passed: set[str] | None = None
    if demand.users is not None:
        passed = set()
        means = mean_rtts(demand.users, view).tolist()
        alive = view.alive.tolist()
        for name in args.names:
            position = view.index.get(name)
            if position is None:
                hopeless[name] = "crossedge: it is no node of the mesh, or never reported"
            elif not alive[position]:
                failed[name] = "crossedge: it has not reported for too long"
            elif math.isnan(means[position]):
                failed[name] = "crossedge: too little data: no RTT to any user is known"
            elif demand.max_rtt is not None and means[position] > demand.max_rtt:
                hopeless[name] = (
                    f"crossedge: mean user RTT {means[position]:.1f} ms, above {demand.max_rtt:g} ms"
                )
            else:
                passed.add(name)
    names = [name for name in args.names if passed is None or name in passed]
    result: dict[str, Any] = {
        "Nodes": None,
        "NodeNames": names,
        "FailedNodes": failed,
        "FailedAndUnresolvableNodes": hopeless,
        "Error": "",
    }
    if args.nodes is not None:
        kept = [
            node
            for name, node in zip(args.names, args.nodes, strict=True)
            if passed is None or name in passed
        ]
        result["Nodes"] = {"metadata": {}, "items": kept}
        result["NodeNames"] = None
    return result


def prioritized(args: Args, demand: Demand, view: View) -> list[dict[str, Any]]:
    """Return the HostPriorityList: 10 for the nearest (and for where a service was decided to be), less in
    proportion to the mean user RTT, 0 where none is known.
    """
    if demand.users is None:
        return [{"Host": name, "Score": 0} for name in args.names]
    by_position = mean_rtts(demand.users, view).tolist()
    positions = [view.index.get(name) for name in args.names]
    means = [math.nan if position is None else by_position[position] for position in positions]
    best = min((mean for mean in means if not math.isnan(mean)), default=0.0) + SOFT_MS
    top = MAX_PRIORITY - 1 if demand.decided else MAX_PRIORITY
    result = []
    for name, mean in zip(args.names, means, strict=True):
        score = 0
        if name in demand.decided:
            score = MAX_PRIORITY
        elif not math.isnan(mean):
            score = round(top * best / (mean + SOFT_MS))
        result.append({"Host": name, "Score": score})
    return result


def refusal(error: str) -> dict[str, Any]:
    """Return an ExtenderFilterResult that says why there is none."""
    return {
        "Nodes": None,
        "NodeNames": None,
        "FailedNodes": {},
        "FailedAndUnresolvableNodes": {},
        "Error": error,
    }
