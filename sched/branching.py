"""Branch and bound for placements with capacities: how many replicas does each region get?

With capacities the Lagrangian relaxation leaves a gap of its own, because it opens parts of nodes: one and a
half replicas where users need one or two. Branching on single nodes hardly helps, as the next node in town
costs as much. So a branch here fixes how many nodes are open in a cluster of near nodes; the clusters are
those of a dendrogram, wide ones first. Under such counts the relaxed problem is still solved by sorting, so
every branch is bounded by the same subgradient steps, with only the nodes left that its own reduced costs do
not exclude.

The bound is the least over all branches that are still open, and the search may stop at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist

from crossedge.sched.bounds import CLOSE_ENOUGH, ROUNDING, Relaxation, Relaxed
from crossedge.sched.capacities import Assignment, assign, improve
from crossedge.sched.matrix import Floats, Ints

SAMPLE = 64  # users by whose RTT candidates are told near
BRANCH_STEPS = 40  # of the subgradient method, per branch
BRANCH_LENGTH = 0.3  # of its first step: the multipliers of the branch above are nearly right
OVERHEAD = 60_000  # priced pairs that one step of any size costs as much as, and one assignment per open node
LEAST = 0.02  # score of a split that the relaxed problem is not torn over
NEAR_BEST = 1.02  # sets whose total is within this of the best are searched from
SEARCHES = 10  # at once, and one more for so many branches:
SEARCH_EVERY = 40
PLUNGE_EVERY = 4  # branches taken by their bound between two ways down
BRANCHES_MAX = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A part of the search space: so many open nodes in each of some disjoint sets, none elsewhere."""

    bound: float
    parts: tuple[tuple[Ints, int], ...]
    multipliers: Floats


@dataclass(slots=True, eq=False)
class Found:
    """What the search knows: a bound that holds, and the best answer."""

    bound: float
    opened: Ints
    assignment: Assignment


def clusters(rtt: Floats) -> tuple[Floats, Floats]:
    """Return the dendrogram of the candidates: (clusters, candidates) membership, and (clusters,) how far in
    ms each is from what it is joined with. The whole is not in it.
    """
    candidates = rtt.shape[1]
    sampled = rtt[:: max(1, len(rtt) // SAMPLE)].T
    joined = linkage(pdist(sampled, "cityblock") / sampled.shape[1], "average")
    member = np.zeros((2 * candidates - 1, candidates), dtype=np.float32)
    member[:candidates] = np.eye(candidates, dtype=np.float32)
    apart = np.zeros(2 * candidates - 1)
    for row, (left, right, distance, _) in enumerate(joined, candidates):
        member[row] = member[int(left)] + member[int(right)]
        apart[int(left)] = apart[int(right)] = distance
    return member[:-1].astype(np.float64), apart[:-1]


class Search:
    """Best-first branch and bound; `run` until its work is used up or the answer is proven."""

    def __init__(
        self, rtt: Floats, weights: Floats, capacities: Floats, opened: Ints, assignment: Assignment
    ) -> None:
        """Take the problem (users, candidates) and a feasible answer to begin with."""
        self._rtt, self._weights, self._capacities = rtt, weights, capacities
        self._relaxation = Relaxation(rtt, weights, capacities)
        self.best = Found(0.0, opened, assignment)
        self._closed = np.inf  # least bound among the branches that were given up as no better than the best
        self._open: list[tuple[float, int, Branch]] = []
        self._number = count()
        self._tried: set[bytes] = set()
        self._searches = SEARCHES
        self.work = 0
        self.branches = 0

    @property
    def upper(self) -> float:
        """The total that a branch must be able to beat."""
        return self.best.assignment.total * (1.0 - CLOSE_ENOUGH / 2)

    def bound(self) -> float:
        """Return the total that nothing can be below."""
        least = min(self._closed, self._open[0][0] if self._open else np.inf)
        return max(0.0, min(least, self.best.assignment.total) * (1.0 - ROUNDING))

    def run(self, multipliers: Floats, work: float) -> None:
        """Search from the whole problem, beginning with good multipliers, until so many pairs were priced."""
        self._member, self._apart = clusters(self._rtt)
        whole = np.arange(self._rtt.shape[1])
        plunge: Branch | None = Branch(0.0, ((whole, len(self.best.opened)),), multipliers)
        rested = PLUNGE_EVERY
        while self.work < work and len(self._open) < BRANCHES_MAX:
            rested += 1
            if plunge is None:
                if not self._open or self._open[0][0] >= self.upper:
                    return
                plunge = heappop(self._open)[2]
            branches = sorted(self._explore(plunge), key=lambda branch: branch.bound)
            plunge = None
            for branch in branches:
                if plunge is None and branch.bound < self.upper and rested > PLUNGE_EVERY:
                    plunge = branch  # answers are found at the bottom, bounds at the top
                else:
                    self._push(branch)
            if plunge is None and rested > PLUNGE_EVERY:
                rested = 0
        if plunge is not None:
            self._push(plunge)

    def _push(self, branch: Branch) -> None:
        if branch.bound >= self.upper:
            self._closed = min(self._closed, branch.bound)
        else:
            heappush(self._open, (branch.bound, next(self._number), branch))

    def _explore(self, branch: Branch) -> list[Branch]:
        """Bound a branch and return what it is divided into, nothing where that closes it."""
        self.branches += 1
        self._searches += self.branches % SEARCH_EVERY == 0
        relaxed = self._relaxed(branch, branch.multipliers, BRANCH_STEPS)
        if relaxed.bound < self.upper:
            found = self._try(relaxed.sets[-1])
            if found is not None and self._relaxed(branch, found, 1).bound > relaxed.bound:
                relaxed = self._relaxed(branch, found, BRANCH_STEPS)
        value = max(relaxed.bound, branch.bound)
        if value >= self.upper:
            self._closed = min(self._closed, value)
            return []
        parts, shares, worths = [], [], []
        for (nodes, number), share, worth in zip(branch.parts, relaxed.shares, relaxed.worths, strict=True):
            least = np.partition(worth, number - 1)[number - 1]
            keep = relaxed.bound + np.maximum(worth - least, 0.0) < self.upper
            self._closed = min(self._closed, self.upper) if not keep.all() else self._closed
            parts.append((nodes[keep], number))
            shares.append(share[keep])
            worths.append(worth[keep])
        if all(len(nodes) == number for nodes, number in parts):
            opened = np.sort(np.concatenate([nodes for nodes, _ in parts]))
            self._try(opened, again=True)
            self._closed = min(self._closed, max(value, self.best.assignment.total))
            return []
        return self._divide(tuple(parts), shares, worths, value, relaxed.multipliers)

    def _divide(
        self,
        parts: tuple[tuple[Ints, int], ...],
        shares: list[Floats],
        worths: list[Floats],
        value: float,
        multipliers: Floats,
    ) -> list[Branch]:
        """Return a branch per number of open nodes in the cluster that the relaxed answer is torn over."""
        best, chosen, inside = -1.0, 0, np.zeros(0, dtype=bool)
        for index, (nodes, number) in enumerate(parts):
            if len(nodes) == number:
                continue
            member = self._member[:, nodes]
            size = member.sum(axis=1)
            opened = member @ shares[index]
            score = (np.abs(opened - np.round(opened)) + LEAST) * (self._apart + 1e-6)
            score[(size == 0) | (size == len(nodes))] = -1.0
            row = int(score.argmax())
            if score[row] > best:
                best, chosen, inside = float(score[row]), index, member[row] > 0
        nodes, number = parts[chosen]
        left, right = np.sort(worths[chosen][inside]), np.sort(worths[chosen][~inside])
        sums = np.r_[0.0, np.cumsum(left)], np.r_[0.0, np.cumsum(right)]
        rest = float(self._weights @ multipliers) + sum(
            float(np.sort(worth)[: part[1]].sum())
            for index, (part, worth) in enumerate(zip(parts, worths, strict=True))
            if index != chosen
        )
        others = parts[:chosen] + parts[chosen + 1 :]
        branches = []
        for here in range(max(0, number - len(right)), min(number, len(left)) + 1):
            there = number - here
            fresh = tuple(part for part in ((nodes[inside], here), (nodes[~inside], there)) if part[1] > 0)
            least = max(rest + float(sums[0][here] + sums[1][there]), value)
            branches.append(Branch(least, others + fresh, multipliers))
        return branches

    def _relaxed(self, branch: Branch, multipliers: Floats, steps: int) -> Relaxed:
        """Return what subgradient steps from these multipliers say of a branch."""
        total = self.best.assignment.total
        relaxed = self._relaxation.solve(branch.parts, multipliers, total, steps, BRANCH_LENGTH)
        self.work += relaxed.steps * (OVERHEAD + relaxed.priced)
        return relaxed

    def _try(self, opened: Ints, again: bool = False) -> Floats | None:
        """Take a set of open nodes as the answer where it is better, and search on from a good one.

        Return the multipliers that are the dual of its assignment: with them the relaxed problem is exact for
        that set, which subgradient steps take long to find where a whole region is short of room. None where
        there is no room, or the set was tried before and is not asked for again.
        """
        key = opened.tobytes()
        if key in self._tried and not again:
            return None
        self._tried.add(key)
        self.work += OVERHEAD * len(opened)
        found = assign(self._rtt[:, opened], self._weights, self._capacities[opened])
        if found.unserved > 0:
            return None
        multipliers: Floats = (self._rtt[:, opened] + found.prices).min(axis=1)
        best = self.best.assignment.total
        if found.total < best * NEAR_BEST and self._searches and not again:
            self._searches -= 1
            opened, found = improve(self._rtt, self._weights, self._capacities, opened)
        if found.unserved <= 0 and found.total < best * (1.0 - ROUNDING):
            self.best.opened, self.best.assignment = np.sort(opened), found
        return multipliers
