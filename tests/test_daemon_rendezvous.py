"""A rendezvous that dies takes nothing with it, and gets its nodes back when it returns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from crossedge.lab.launch import ROOTS
from tests.daemon_fleet import Fleet, a_fleet
from tests.underlays import FARM, HOME, WEST, behind, serving, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

BACK_WITHIN = 5.0
"""Seconds after the start of a rendezvous within which all nodes are registered again."""
TOPOLOGY = two_regions(
    "servers", HOME, FARM, behind("shop", "till", "late"), servers=serving("first") + serving("second", WEST)
)
SERVERS = ("first", "second")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("servers"), later=["late"]) as made:
        for server in SERVERS:
            until(f"all nodes are at {server}", partial(all_at, made, server), 10.0)
        yield made


def all_at(fleet: Fleet, server: str) -> bool:
    """Tell whether a rendezvous has every node that runs."""
    return fleet.leases(server) == len(fleet.mesh.members.keys() & fleet.mesh.processes.keys())


def checkpoint(server: str) -> Path:
    """Return where a rendezvous keeps the endpoints of its nodes."""
    return ROOTS / server / "var/lib/crossedge/rendezvous/leases"


def registered_again(fleet: Fleet) -> float:
    """Wait until every rendezvous has every node; return how long that took."""

    def all_there() -> bool:
        return all(all_at(fleet, server) for server in SERVERS)

    return until("all nodes are registered again", all_there, BACK_WITHIN)


def test_a_new_pair_comes_up_when_one_of_two_rendezvous_is_killed(fleet: Fleet) -> None:
    fleet.kill("first")
    try:
        seen = fleet.ping("attic", "till", count=100, interval=0.01)
        assert (seen.sent, seen.lost) == (100, 0)
        until("the pair is direct", lambda: fleet.path("attic", "till") == "direct", 3.0)
    finally:
        fleet.start("first")
    registered_again(fleet)


def test_the_first_packet_to_a_pod_of_a_node_that_has_just_joined_is_delivered(fleet: Fleet) -> None:
    fleet.start("late")
    until("it is registered", lambda: all_at(fleet, "first"), 10.0)
    seen = fleet.ping("attic", "late", count=100, interval=0.01)
    assert (seen.sent, seen.lost) == (100, 0)


def test_killed_and_started_a_rendezvous_has_all_nodes_again_within_five_seconds(fleet: Fleet) -> None:
    until("it has left a checkpoint", checkpoint("second").exists, 10.0)
    fleet.kill("second")
    fleet.start("second")
    print("back", registered_again(fleet))


def test_without_its_checkpoint_a_rendezvous_has_all_nodes_again_within_five_seconds(fleet: Fleet) -> None:
    fleet.kill("first")
    checkpoint("first").unlink(missing_ok=True)
    fleet.start("first")
    print("back", registered_again(fleet))


def test_an_established_pair_loses_nothing_while_every_rendezvous_is_gone(fleet: Fleet) -> None:
    fleet.go_direct("attic", "barn")
    ping = fleet.pinging("attic", "barn", count=300)
    for server in SERVERS:
        fleet.kill(server)
    assert ping.running
    seen = ping.result()
    assert (seen.sent, seen.lost) == (300, 0)
    for server in SERVERS:
        fleet.start(server)
    print("back", registered_again(fleet))
