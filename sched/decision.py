"""When a service moves, and why: hysteresis, a cap on moves, and an account of every candidate.

A service stays where it is unless the better placement gains enough, both in milliseconds and as a share;
then the moves that gain most are made first, at most so many per cycle. Replicas on nodes that are gone are
replaced first and need no gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossedge.sched.matrix import Floats, Ints
from crossedge.sched.placement import UNKNOWN_MS, Placement, Problem, checked, mean_of, place

LISTED = 10  # candidates that an explanation lists beside the chosen ones
SURE = 0.5  # mean confidence of the pairs that a decision rests on, under which it says so


@dataclass(frozen=True, slots=True)
class Policy:
    """When moving is worth it.

    Attributes:
        gain_ms: a better placement must lower the mean user RTT by at least this.
        gain_share: and by at least this share of the present mean.
        moves_max: replicas that may move in one cycle.
    """

    gain_ms: float = 5.0
    gain_share: float = 0.1
    moves_max: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What to do now.

    Attributes:
        nodes: where the replicas are to be, sorted.
        moves: (from, to) of each replica that moves; from is -1 for one that is new.
        mean_ms: mean user RTT after the moves.
        before_ms: mean user RTT now; None where there is no complete placement yet.
        best: the placement that was found without regard to the present one, with its bound.
        reason: one sentence.
    """

    nodes: Ints
    moves: tuple[tuple[int, int], ...]
    mean_ms: float
    before_ms: float | None
    best: Placement
    reason: str


def decide(
    problem: Problem, current: Sequence[int], rng: np.random.Generator, policy: Policy | None = None
) -> Decision:
    """Decide whether a service moves.

    Args:
        problem: the service as it is wanted now.
        current: indices of the nodes where its replicas are; nodes that are gone are not in it.
        rng: shakes the search.
        policy: when moving is worth it.
    """
    policy = policy or Policy()
    _, _, allowed, _ = checked(problem)
    alive = [int(node) for node in dict.fromkeys(current) if node in set(allowed.tolist())]
    present = np.array(sorted(alive), dtype=np.int64)
    best = place(problem, rng, present if len(present) == problem.replicas else None)
    if len(present) > problem.replicas:
        return shrunk(problem, present, best)
    if len(present) < problem.replicas:
        return filled_up(problem, present, best, allowed)
    before = mean_of(problem, present)
    target = mean_of(problem, best.nodes)
    gain = before - target
    if gain < policy.gain_ms or gain < policy.gain_share * before:
        reason = (
            f"stays: the best placement would gain {gain:.1f} ms ({gain / max(before, 1e-9):.0%}), "
            f"and {policy.gain_ms:g} ms and {policy.gain_share:.0%} are needed"
        )
        return Decision(present, (), before, before, best, reason)
    nodes, moves = present, []
    now = before
    for _ in range(policy.moves_max):
        step = best_step(problem, nodes, best.nodes)
        if step is None or step[0] >= now:
            break
        now, leaving, coming = step
        nodes = np.sort(np.where(nodes == leaving, coming, nodes))
        moves.append((leaving, coming))
    if not moves:
        return Decision(
            present, (), before, before, best, "stays: no single move is an improvement by itself"
        )
    reason = (
        f"moves {len(moves)} of {problem.replicas}: {before:.1f} to {now:.1f} ms now, "
        f"{target:.1f} ms when all have moved"
    )
    return Decision(nodes, tuple(moves), now, before, best, reason)


def best_step(problem: Problem, nodes: Ints, goal: Ints) -> tuple[float, int, int] | None:
    """Return the mean after the best single move towards `goal`, and the move; None where all are there."""
    coming = np.setdiff1d(goal, nodes)
    leaving = np.setdiff1d(nodes, goal)
    steps = [
        (mean_of(problem, np.sort(np.where(nodes == old, new, nodes))), int(old), int(new))
        for old in leaving
        for new in coming
    ]
    return min(steps, default=None)


def shrunk(problem: Problem, present: Ints, best: Placement) -> Decision:
    """Return the decision where fewer replicas are wanted: those that are missed least go."""
    before = mean_of(problem, present)
    nodes = present
    while len(nodes) > problem.replicas:
        nodes = min(
            (np.delete(nodes, index) for index in range(len(nodes))), key=lambda left: mean_of(problem, left)
        )
    reason = f"closes {len(present) - len(nodes)} of {len(present)} replicas: fewer are wanted"
    return Decision(nodes, (), mean_of(problem, nodes), before, best, reason)


def filled_up(problem: Problem, present: Ints, best: Placement, allowed: Ints) -> Decision:
    """Return the decision where replicas are missing: the others stay, new ones go where they help most."""
    missing = problem.replicas - len(present)
    if not len(present):
        moves = tuple((-1, int(node)) for node in best.nodes)
        return Decision(
            best.nodes, moves, mean_of(problem, best.nodes), None, best, "placed for the first time"
        )
    nodes = present
    while len(nodes) < problem.replicas:
        options = np.setdiff1d(allowed, nodes)
        trials = [np.append(nodes, option) for option in options]
        nodes = min(trials, key=lambda trial: mean_of(problem, trial))
    if problem.capacities is not None and problem.capacities[nodes].sum() < problem.weights.sum() * (
        1 - 1e-12
    ):
        coming, leaving = np.setdiff1d(best.nodes, present), np.setdiff1d(present, best.nodes)
        homes = [-1] * (len(coming) - len(leaving)) + leaving.tolist()
        moves = tuple(zip(homes, coming.tolist(), strict=True))
        reason = "placed anew: the replicas that are left and any others hold too little of the demand"
        return Decision(best.nodes, moves, mean_of(problem, best.nodes), None, best, reason)
    moves = tuple((-1, int(node)) for node in nodes[len(present) :])
    return Decision(
        np.sort(nodes),
        moves,
        mean_of(problem, nodes),
        None,
        best,
        f"opens {missing} replicas that were missing",
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """One node in the account of a decision.

    Attributes:
        node: its index.
        chosen: whether a replica is there.
        mean_ms: mean RTT of all users to it alone, over known pairs; None where none is known.
        served: share of the demand that it serves.
        verdict: why it was taken or not.
    """

    node: int
    chosen: bool
    mean_ms: float | None
    served: float
    verdict: str


def explain(
    problem: Problem,
    nodes: Ints,
    flow: Floats,
    confidence: Floats | None = None,
    listed: int = LISTED,
    names: Sequence[str] | None = None,
) -> list[Candidate]:
    """Say of the chosen nodes and of the nearest others why they were taken or refused.

    Args:
        problem: what was placed.
        nodes: the chosen nodes.
        flow: (users, chosen) who is served where.
        confidence: (users, nodes) of the RTT; None where all is measured.
        listed: how many of the others to list, those nearest to all users first.
        names: what the nodes are called in the verdicts; their indices where None.
    """
    demand = problem.weights
    known = np.isfinite(problem.rtt) & (demand > 0)[:, None]
    weight = (demand[:, None] * known).sum(axis=0)
    means = np.where(
        weight > 0,
        (demand[:, None] * np.where(known, problem.rtt, 0.0)).sum(axis=0) / np.maximum(weight, 1e-12),
        np.inf,
    )
    now = mean_of(problem, nodes)
    result = []
    for index, node in enumerate(nodes.tolist()):
        share = float(flow[:, index].sum() / demand.sum())
        verdict = f"serves {share:.0%} of the users"
        if problem.capacities is not None:
            verdict += f", {flow[:, index].sum():g} of {problem.capacities[node]:g}"
        if confidence is not None and share > 0:
            sure = float((flow[:, index] * confidence[:, node]).sum() / flow[:, index].sum())
            if sure < SURE:
                verdict += f"; too little is measured to be sure (confidence {sure:.2f})"
        mean = float(means[node]) if np.isfinite(means[node]) else None
        result.append(Candidate(node, True, mean, share, verdict))
    others = [int(node) for node in np.argsort(means, kind="stable") if node not in set(nodes.tolist())]
    shares = weight / demand.sum()
    return result + [
        refused(problem, nodes, node, now, means[node], float(shares[node]), names)
        for node in others[:listed]
    ]


def refused(
    problem: Problem,
    nodes: Ints,
    node: int,
    now: float,
    mean: float,
    share: float,
    names: Sequence[str] | None = None,
) -> Candidate:
    """Say why a node was not taken: not allowed, nothing known of it, or the best exchange is worse."""
    at = float(mean) if np.isfinite(mean) else None
    if problem.allowed is not None and not problem.allowed[node]:
        return Candidate(node, False, at, 0.0, "not allowed for this service")
    if at is None:
        return Candidate(node, False, None, 0.0, "too little data: no RTT to any user is known")
    trials = [np.where(nodes == old, node, nodes) for old in nodes]
    best, old = min(
        (mean_of(problem, trial), int(leaving)) for trial, leaving in zip(trials, nodes, strict=True)
    )
    called = old if names is None else names[old]
    text = (
        f"{best - now:+.2f} ms in place of node {called}"
        if best < UNKNOWN_MS / 10
        else "leaves users unserved"
    )
    if share < 1.0:
        text += f"; unknown to {1.0 - share:.0%} of the users"
    return Candidate(node, False, at, 0.0, text)
