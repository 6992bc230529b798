"""Which scale and number of groups, and groups that noise does not change.

The best silhouette alone is a poor judge among few nodes: several numbers of groups score nearly the same,
and a little noise on the round trips makes another one win, which moves half of the nodes. So the matrix is
disturbed a few times, as the next round of measurements would disturb it, and every candidate pays for the
nodes that change their group by that (stability selection after Lange, Roth, Braun and Buhmann, 2004). The
groups themselves are then those that the disturbed matrices agree on (evidence accumulation after Fred and
Jain, 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from crossedge.sched.matrix import Flags, Floats, Ints
from crossedge.sched.spectral import (
    GROUPS_MAX,
    Rounds,
    Spectrum,
    embedded,
    minimum_size,
    polished,
    renumbered,
    scales_for,
    spectrum,
)

GAP_WEIGHT = 0.06  # how much of a group count's standing is its eigengap; the rest is silhouette
NEARLY_AS_GOOD = 0.003  # of standing: within this the labelling with fewer groups is taken, the steadier one
NEARLY_PER_NODE = 1.5  # and with few nodes within this over their number, as less can be told from noise
DISTURBED = 8  # times that a matrix is disturbed
DISTURBED_WORK = 400_000  # entries of all disturbed matrices
NOISE = 0.1  # of an RTT, standard deviation
SEED = 206  # of the noise: the same matrix has the same groups
UNSTEADY = 1.0  # of standing, that a candidate loses per share of the nodes that noise moves
TOLERATED = 0.03  # such share that costs nothing
CONTENDERS = 0.12  # of standing below the best, up to which a candidate is looked at again

Key = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A labelling of one scale and one number of clusters.

    Attributes:
        key: number of the scale, and of clusters asked for.
        labels: (n,) group of each node, -1 where nothing is known of it.
        groups: how many are left after specks were dissolved.
        silhouette: mean over all nodes.
        scale_ms: of the affinity.
        gap: eigengap after the clusters asked for.
    """

    key: Key
    labels: Ints
    groups: int
    silhouette: float
    scale_ms: float
    gap: float

    @property
    def standing(self) -> float:
        """What candidates are compared by, before noise."""
        return self.silhouette + GAP_WEIGHT * self.gap


def candidates(
    rounds: Rounds, spectra: Sequence[Spectrum], alone: Flags, minimum: int, only: set[Key] | None = None
) -> list[Candidate]:
    """Return the labellings of all scales and counts (or of some, by key) that have two groups or more."""
    found = []
    for scale, part in enumerate(spectra):
        most = min(GROUPS_MAX, (len(alone) - int(alone.sum())) // minimum, len(part.values))
        for count in range(2, most + 1):
            if only is not None and (scale, count) not in only:
                continue
            labels = embedded(part.vectors, count)
            labels[alone] = -1
            labels, score = polished(rounds, labels, count, minimum)
            gap = float(part.values[count - 1] - part.values[count]) if count < len(part.values) else 0.0
            groups = int(labels.max(initial=-1)) + 1
            if groups > 1:
                found.append(Candidate((scale, count), labels, groups, score, part.scale_ms, gap))
    return found


def best_of(found: Sequence[Candidate], standings: Sequence[float], n: int) -> Candidate:
    """Return the candidate of fewest groups among those that stand nearly as well as the best."""
    enough = max(standings) - max(NEARLY_AS_GOOD, NEARLY_PER_NODE / n)
    ranked = [
        (item.groups, -standing, number)
        for number, (item, standing) in enumerate(zip(found, standings, strict=True))
        if standing >= enough
    ]
    return found[min(ranked)[2]]


def chosen(found: Sequence[Candidate], n: int) -> Candidate | None:
    """Return the best candidate by silhouette and eigengap, None where there is none."""
    return best_of(found, [item.standing for item in found], n) if found else None


def agreement(one: Ints, two: Ints) -> float:
    """Return the share of nodes whose group is the same in two labellings, matched as well as can be."""
    both = (one >= 0) & (two >= 0)
    table = np.zeros((int(one.max(initial=0)) + 1, int(two.max(initial=0)) + 1))
    np.add.at(table, (one[both], two[both]), 1.0)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum()) / max(int(both.sum()), 1)


def disturbed(rtt: Floats, rng: np.random.Generator) -> Floats:
    """Return the matrix with symmetric multiplicative noise."""
    noise = np.triu(rng.normal(0.0, NOISE, rtt.shape), 1)
    result: Floats = rtt * np.maximum(1.0 + noise + noise.T, NOISE)
    return result


def agreed(labellings: Sequence[Ints], groups: int, alone: Flags) -> Ints:
    """Return the labels (n,) of groups that most labellings agree on: average linkage of how often two nodes
    are apart.
    """
    inside = np.nonzero(~alone)[0]
    apart = np.mean([labels[inside, None] != labels[None, inside] for labels in labellings], axis=0)
    tree = linkage(squareform(apart, checks=False), "average")
    labels = np.full(len(alone), -1, dtype=np.int64)
    labels[inside] = fcluster(tree, groups, "maxclust") - 1
    return renumbered(labels)


def steadied(
    rtt: Floats, rounds: Rounds, found: Sequence[Candidate], alone: Flags
) -> tuple[Ints, Candidate | None]:
    """Return labels (n,) that noise changes little, and the candidate whose scale and number they have.

    Args:
        rtt: (n, n) ms.
        rounds: of it.
        found: its candidates.
        alone: (n,) nodes of which nothing is known.
    """
    n = len(rtt)
    if not found:
        return np.where(alone, -1, 0).astype(np.int64), None
    least = max(item.standing for item in found) - CONTENDERS
    contenders = [item for item in found if item.standing >= least]
    only = {item.key for item in contenders}
    rng = np.random.default_rng(SEED)
    trials = []
    for _ in range(min(DISTURBED, DISTURBED_WORK // n**2)):
        other = disturbed(rtt, rng)
        spectra = [spectrum(other, scale, GROUPS_MAX + 1) for scale in scales_for(other)]
        again = candidates(Rounds(other), spectra, alone, minimum_size(n), only)
        trials.append({item.key: item for item in again})
    standings = []
    for item in contenders:
        others = [trial[item.key] for trial in trials if item.key in trial]
        same = sum(agreement(item.labels, other.labels) for other in others)
        score = float(np.mean([item.silhouette, *(other.silhouette for other in others)]))
        moved = 1.0 - same / max(len(trials), 1)
        standings.append(score + GAP_WEIGHT * item.gap - UNSTEADY * max(0.0, moved - TOLERATED))
    best = best_of(contenders, standings, n)
    labellings = []
    for trial in [{item.key: item for item in contenders}, *trials]:
        alike = [item for item in trial.values() if item.groups == best.groups]
        if alike:
            labellings.append(max(alike, key=lambda item: item.silhouette).labels)
    labels, _ = polished(rounds, agreed(labellings, best.groups, alone), best.groups, minimum_size(n))
    return (labels if int(labels.max()) + 1 == best.groups else best.labels), best
