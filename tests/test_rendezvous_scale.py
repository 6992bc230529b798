"""Many nodes at one rendezvous: nothing is lost, and a restart costs digests."""

from __future__ import annotations

import pytest

from crossedge.wire.messages import MAX_KNOWN
from tests.rendezvous_fleet import CoreRun, Fleet, check_fleet

CALLS = 4


def check_core(count: int) -> None:
    run = CoreRun(Fleet(count, seed=1, began=1000.0))
    check_fleet(run)
    assert run.service.drops() == {}
    assert run.service.status(run.now)["refused"] == {}
    asked = run.service.status(run.now)["received"]
    assert asked["Register"] == count + 2  # none had to be sent twice
    assert asked["Call"] == count * CALLS
    assert asked["PullDigests"] == -(-count // MAX_KNOWN)  # of the one restart
    run.run_until(run.now + 120.0)  # longer than a lease
    assert len(run.service.registry.leases) == count
    assert run.fleet.complete


def test_nodes_register_pull_and_call_without_loss() -> None:
    check_core(120)


@pytest.mark.slow
def test_a_thousand_nodes_register_pull_and_call_without_loss() -> None:
    check_core(1000)
