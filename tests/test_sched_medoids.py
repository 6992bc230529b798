"""Whom a scheduler asks nodes to measure, and how that gets to the node that should."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import uvicorn

from crossedge.lab.chance import Chance
from crossedge.latency.prober import ALL_PAIRS, Prober
from crossedge.latency.report import Coordinates
from crossedge.meshd.reporter import Reporter, Source
from crossedge.sched.api import create_app
from crossedge.sched.medoids import ASKED_BY, PER_NODE, assigned
from crossedge.sched.serve import opened
from crossedge.sched.services import View
from tests.sched_fleet import Fleet, VirtualClock, client_of, make_service, post_report, two_regions


def view_of(sizes: tuple[int, ...], silent: int = 0) -> View:
    """Return a round over regions of these sizes; the last nodes do not report any more."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)) * 3, sizes)  # identities are not 0, 1, 2
    n = len(labels)
    points = rng.normal(0.0, 100.0, (labels.max() + 1, 2))[labels] + rng.normal(0.0, 3.0, (n, 2))
    rtt = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + 1.0
    np.fill_diagonal(rtt, 0.0)
    names = tuple(f"n{number}" for number in range(n))
    alive = np.arange(n) < n - silent
    nothing = np.zeros((n, n))
    index = {name: number for number, name in enumerate(names)}
    return View(1, 0.0, names, alive, rtt, nothing.astype(np.uint8), nothing, labels, points, index)


def test_every_node_is_asked_for_other_groups_and_none_is_asked_by_many() -> None:
    view = view_of((150, 100, 40, 10), silent=5)
    told = assigned(view, 1)
    group = dict(zip(view.names, view.labels.tolist(), strict=True))
    asked = Counter(peer for peers in told.values() for peer in peers)
    assert max(asked.values()) == ASKED_BY
    assert max(map(len, told.values())) == PER_NODE
    for name, peers in told.items():
        assert group[name] not in {group[peer] for peer in peers}
        assert len({group[peer] for peer in peers}) == len(peers)
    gone = set(view.names[-5:])
    assert not gone & (told.keys() | asked.keys())
    for label in np.unique(view.labels):
        members = np.nonzero((view.labels == label) & view.alive)[0]
        medoid = members[view.rtt[np.ix_(members, members)].sum(axis=1).argmin()]
        assert asked[view.names[medoid]] == ASKED_BY
    assert assigned(view, 1) == told
    assert assigned(view, 2) != told


def test_where_all_pairs_are_measured_nobody_is_asked() -> None:
    assert assigned(view_of((ALL_PAIRS // 2, ALL_PAIRS // 2)), 1) == {}
    assert assigned(view_of((200,)), 1) == {}


def test_reporter_delivers_over_ipv6_and_its_node_measures_whom_the_scheduler_names(tmp_path: Path) -> None:
    """Real sockets at ::1, the daemon's reporter and prober, the whole application."""
    clock = VirtualClock()
    service = make_service(tmp_path, clock)
    fleet = Fleet(two_regions((40, 40)))
    node = fleet.nodes[0]
    prober = Prober(node.id, Chance(1).token, 0.0)
    for other in fleet.nodes:
        prober.add(other.id)

    def number() -> int:
        node.seq += 1
        return node.seq

    source = Source(
        node.certificate,
        node.key,
        number,
        clock.unix,
        pairs=lambda: fleet.pairs(0),
        place=lambda: None,
        asked=lambda url, nodes: prober.ask(url, nodes, 0.0),
    )

    async def script() -> None:
        sockets = opened([("::1", 0)], tmp_path / "sched.toml")
        port = sockets[0].getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(create_app(service, lifespan=False), log_config=None, lifespan="off")
        )
        serving = asyncio.create_task(server.serve(sockets))
        reporter = Reporter(f"http://[::1]:{port}", source, b"instance", 15, frozenset({4, 6}))
        try:
            assert await reporter._once() == 15.0
            assert service.scheduler.feed.nodes[node.id].pairs.keys() == {p.peer for p in fleet.pairs(0)}
            fleet.report_all(service)
            await service.round()
            assert not service.problems
            again = Reporter(f"http://[::1]:{port}", source, b"restarts", 15, frozenset({6}))
            assert await again._once() == 15.0
            assert again.status()["problem"] is None
            assert again.ignored == 0
        finally:
            server.should_exit = True
            with suppress(asyncio.CancelledError):
                await serving
            await service.stop()

    asyncio.run(script())
    prober.refresh(Coordinates((0.0,) * 8, 0.1, 0.2), 0.0)
    (asked,) = service.scheduler._asked[node.name]
    assert int(asked[1:]) >= 40  # of the other region
    assert next(other.id for other in fleet.nodes if other.name == asked) in prober.targets


def test_a_node_is_told_once_and_again_with_each_full_report(tmp_path: Path) -> None:
    async def script() -> None:
        clock = VirtualClock()
        service = make_service(tmp_path, clock)
        fleet = Fleet(two_regions((40, 40)))
        fleet.report_all(service)
        node, unix = fleet.nodes[3], clock.unix()
        async with client_of(service) as client:

            async def told(**changes: object) -> list[str] | None:
                answer = await post_report(client, node.report(unix, fleet.pairs(3), **changes))
                assert answer.status_code in (200, 204), answer.text
                assert bool(answer.content) == (answer.status_code == 200)
                return answer.json()["medoids"] if answer.content else None

            assert await told() is None  # no round yet
            await service.round()
            named = await told(base=node.seq)
            assert named is not None
            assert len(named) == 1
            assert await told(base=node.seq) is None
            assert await told() == named
            clock.at += 10.0
            fleet.report_all(service)
            await service.round()
            assert await told(base=node.seq) is None  # another round asks for nothing else
        await service.stop()

    asyncio.run(script())
