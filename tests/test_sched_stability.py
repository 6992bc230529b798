"""Rounds on a virtual clock: nothing moves without a gain, nor more than the cap; the gone is replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossedge.sched.service import SchedulerService
from crossedge.sched.services import ServiceSpec
from tests.sched_fleet import Fleet, VirtualClock, make_service
from tests.sched_worlds import noisy, regions

pytestmark = pytest.mark.asyncio
GAIN_MS, GAIN_SHARE, PER_SERVICE, PER_ROUND = 5.0, 0.1, 1, 3


def weights_of(service: SchedulerService, name: str) -> np.ndarray:
    spec, view = service.scheduler.services[name].spec, service.scheduler.view
    if spec.users == "all":
        return np.asarray(view.alive, dtype=float)
    return np.array([spec.users.get(node, 0.0) for node in view.names])


def mean(service: SchedulerService, weights: np.ndarray, nodes: list[str]) -> float:
    """Return the mean user RTT, worked out by the test itself."""
    view = service.scheduler.view
    columns = [view.index[node] for node in nodes]
    return float(weights @ view.rtt[:, columns].min(axis=1) / weights.sum())


class Watch:
    """Makes rounds and holds every decision against the thresholds and the caps."""

    def __init__(self, service: SchedulerService, clock: VirtualClock, fleet: Fleet) -> None:
        self.service, self.clock, self.fleet = service, clock, fleet
        self.moves = 0

    async def round(self, silent: tuple[str, ...] = (), forced: bool = False) -> int:
        scheduler = self.service.scheduler
        before = {name: list(service.current) for name, service in scheduler.services.items()}
        self.clock.at += 30.0
        self.fleet.report_all(self.service, silent)
        await self.service.round()
        assert not self.service.problems
        made = 0
        for name, service in scheduler.services.items():
            decision = service.decision
            assert decision is not None
            assert decision["error"] is None
            if not before[name]:
                continue
            came = set(service.current) - set(before[name])
            assert len(came) == len(decision["moves"])
            if not came or forced:
                continue
            made += len(came)
            assert len(came) <= PER_SERVICE
            weights = weights_of(self.service, name)
            was, best = (
                mean(self.service, weights, nodes) for nodes in (before[name], decision["best"]["nodes"])
            )
            assert was - best >= GAIN_MS
            assert was - best >= GAIN_SHARE * was
            assert mean(self.service, weights, list(service.current)) < was
        assert made <= PER_ROUND
        self.moves += made
        return made


async def test_services_move_for_a_gain_only_and_never_more_than_the_cap(tmp_path: Path) -> None:
    clock = VirtualClock()
    matrix, _ = regions((12, 10, 8), seed=4)
    fleet = Fleet(matrix.rtt)
    moves = {"gain_ms": GAIN_MS, "gain_share": GAIN_SHARE, "per_service": PER_SERVICE, "per_round": PER_ROUND}
    service = make_service(tmp_path, clock, moves=moves)
    watch = Watch(service, clock, fleet)
    await watch.round()
    for count in (1, 3, 5):
        await service.put_service(f"all-{count}", ServiceSpec(replicas=count))
    for index in range(6):
        users = {f"n{node}": 1.0 for node in range(index, index + 4)}
        await service.put_service(f"west-{index}", ServiceSpec(replicas=2, users=users))
    for seed in range(6):
        fleet.rtt = noisy(matrix.rtt, seed)
        await watch.round()
    assert watch.moves == 0  # noise alone is no gain that is worth a move

    for index in range(6):
        users = {f"n{29 - node}": 1.0 for node in range(index, index + 4)}
        await service.put_service(f"west-{index}", ServiceSpec(replicas=2, users=users))
    made = [await watch.round() for _ in range(5)]
    assert made[:2] == [PER_ROUND, PER_ROUND]  # all six want to move at once
    assert sum(made) >= 6
    assert made[-1] == 0
    for index in range(6):
        current = service.scheduler.services[f"west-{index}"].current
        assert set(current) & {f"n{node}" for node in range(22, 30)}
    await service.stop()


async def test_what_stands_on_a_node_that_is_gone_is_replaced_at_once(tmp_path: Path) -> None:
    clock = VirtualClock()
    matrix, _ = regions((6, 6), seed=1)
    fleet = Fleet(matrix.rtt)
    service = make_service(tmp_path, clock)
    watch = Watch(service, clock, fleet)
    await watch.round()
    await service.put_service("shop", ServiceSpec(replicas=3))
    await watch.round()
    shop = service.scheduler.services["shop"]
    lost, others = shop.current[0], set(shop.current[1:])
    for _ in range(4):  # two minutes: it may be late, it is not gone
        await watch.round(silent=(lost,))
        assert lost in shop.current
    await watch.round(silent=(lost,), forced=True)
    assert lost not in shop.current
    assert others < set(shop.current)
    assert service.scheduler.counters.get("moves_total", "opened") == 4
    await service.stop()


async def test_the_estimators_compete_at_first_and_then_now_and_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    matrix, _ = regions((10, 10), seed=2)
    rng = np.random.default_rng(0)
    rtt = np.where(rng.random((20, 20)) < 0.6, matrix.rtt, np.nan)
    service = make_service(tmp_path, clock, rounds={"validate_every": 2})
    fleet = Fleet(rtt)
    used = []
    for _ in range(4):
        clock.at += 30
        fleet.report_all(service)
        task = None
        steps = service.scheduler.begin(clock.now(), clock.unix())
        while task is None:
            try:
                next(steps)
            except StopIteration as stop:
                task = stop.value
        used.append(task.estimator)
        await service.round()
    assert used[0] is None
    assert used[1] is not None
    assert None in used[2:]
    assert service.scheduler.outcome is not None
    assert service.scheduler.outcome.error is not None
    await service.stop()
