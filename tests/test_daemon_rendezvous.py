"""A rendezvous that dies takes nothing with it, and gets its nodes back when it returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crossedge.lab.launch import ROOTS
from tests.daemon_fleet import Fleet, a_fleet, until

pytestmark = pytest.mark.namespaces

BACK_WITHIN = 5.0
"""Seconds after the start of a rendezvous within which all nodes are registered again."""
TOPOLOGY = """
name = "servers"
[[region]]
name = "east"
[[region]]
name = "west"
[[backbone]]
between = ["east", "west"]
link = { delay_ms = 5 }
[[node]]
name = "first"
role = "server"
region = "east"
[[node]]
name = "second"
role = "server"
region = "west"
[[router]]
name = "home"
region = "east"
nat = "kernel"
[[node]]
name = "attic"
router = "home"
[[router]]
name = "farm"
region = "west"
nat = "port-restricted"
[[node]]
name = "barn"
router = "farm"
[[router]]
name = "shop"
region = "east"
nat = "kernel"
[[node]]
name = "till"
router = "shop"
"""
SERVERS = ("first", "second")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("servers")) as made:
        for server in SERVERS:
            until(f"all nodes are at {server}", lambda s=server: made.leases(s) == 3, 10.0)
        yield made


def checkpoint(server: str) -> Path:
    """Return where a rendezvous keeps the endpoints of its nodes."""
    return ROOTS / server / "var/lib/crossedge/rendezvous/leases"


def registered_again(fleet: Fleet) -> float:
    """Wait until every rendezvous has every node, and every node knows it; return how long that took."""

    def all_there() -> bool:
        return all(fleet.leases(server) == 3 for server in SERVERS)

    return until("all nodes are registered again", all_there, BACK_WITHIN)


def test_an_established_pair_loses_nothing_while_every_rendezvous_is_gone(fleet: Fleet) -> None:
    fleet.go_direct("attic", "barn")
    ping = fleet.pinging("attic", "barn", count=400)
    for server in SERVERS:
        fleet.kill(server)
    assert ping.running
    seen = ping.result()
    assert (seen.sent, seen.lost) == (400, 0)
    for server in SERVERS:
        fleet.start(server)
    print("back", registered_again(fleet))


def test_killed_and_started_at_once_a_rendezvous_has_all_nodes_again_within_five_seconds(
    fleet: Fleet,
) -> None:
    until("both have left a checkpoint", lambda: all(checkpoint(s).exists() for s in SERVERS), 10.0)
    for server in SERVERS:
        fleet.kill(server)
        fleet.start(server)
    print("back", registered_again(fleet))


def test_without_its_checkpoint_a_rendezvous_has_all_nodes_again_within_five_seconds(fleet: Fleet) -> None:
    for server in SERVERS:
        fleet.kill(server)
        checkpoint(server).unlink()
        fleet.start(server)
    print("back", registered_again(fleet))


def test_a_new_pair_comes_up_when_one_of_two_rendezvous_is_killed(fleet: Fleet) -> None:
    fleet.kill("first")
    try:
        seen = fleet.ping("attic", "till", count=100, interval=0.01)
        assert (seen.sent, seen.lost) == (100, 0)
        assert seen.first_ms is not None
        until("the pair is direct", lambda: fleet.path("attic", "till") == "direct", 3.0)
    finally:
        fleet.start("first")
