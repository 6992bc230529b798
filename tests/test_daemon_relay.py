"""Where no direct path can be had, a pair stays on the relay: without loss, and it says why.

    east ---- meeting                            the rendezvous, which is the relay
      |  \\--- attic-router (symmetric-random) ---- attic
      '------ loft-router (kernel-fully-random) -- loft
    west ---- cellar-router (symmetric-random) --- cellar

Every NAT gives each destination another random port, so what one end tells the other is of no use.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from crossedge.lab.flows import run_flows
from crossedge.lab.launch import ROOTS
from crossedge.rendezvous.control import ask as ask_rendezvous
from tests.daemon_fleet import Fleet, a_fleet
from tests.underlays import WEST, behind, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

TOPOLOGY = two_regions(
    "relay",
    behind("attic-router", "attic", nat="symmetric-random"),
    behind("cellar-router", "cellar", place=WEST, nat="symmetric-random"),
    behind("loft-router", "loft", nat="kernel-fully-random"),
)
PAIRS = [("attic", "cellar"), ("attic", "loft")]
TRIES_END = 8.0  # seconds in which both tries to punch have failed
FLOW = 4 * 1024 * 1024


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("relay")) as made:
        yield made


def relayed(fleet: Fleet) -> dict[str, int]:
    """Return what the rendezvous forwarded: trains, datagrams, bytes."""
    answer = ask_rendezvous(ROOTS / "meeting" / "run/crossedge-rendezvous/control.sock", "status")
    found: dict[str, int] = answer["relay"]
    return found


def shown(fleet: Fleet, node: str, other: str) -> dict[str, Any]:
    """Return what `crossedge peers --json` says on a node of another."""
    rows = json.loads(fleet.command(node, "crossedge", "peers", "--json").stdout)
    row: dict[str, Any] = next(row for row in rows if row["name"] == other)
    return row


def test_cold_pairs_lose_nothing_and_stay_on_the_relay(fleet: Fleet) -> None:
    """100 pings at 10 ms from the first packet on, then through the time in which they try to punch."""
    for a, b in PAIRS:
        cold = fleet.pinging(a, b, count=100, interval=0.01).result()
        print(
            f"{a} - {b}: first answer after {cold.first_ms} ms, then {cold.settled_ms} ms, {cold.lost} lost"
        )
        assert cold.all
    later = [fleet.pinging(a, b, count=int(TRIES_END / 0.05), interval=0.05) for a, b in PAIRS]
    for pings in later:
        assert pings.result().all
    for a, b in PAIRS:
        assert fleet.path(a, b) == "relay"
        assert "direct after" not in fleet.log(a) + fleet.log(b)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_peers_say_why_they_are_not_direct(fleet: Fleet, a: str, b: str) -> None:
    assert fleet.ping(a, b, count=3).all

    rows: list[dict[str, Any]] = []

    def gave_up(node: str, other: str) -> bool:
        rows.append(shown(fleet, node, other))
        return "punching failed" in str(rows[-1]["why_not_direct"])

    for node, other in ((a, b), (b, a)):
        until(f"{node} gave up for now", partial(gave_up, node, other), 2 * TRIES_END)
        row = rows[-1]  # asked again, it may try again
        print(f"{node}: {other}: {row['why_not_direct']}")
        assert (row["path"], row["state"]) == ("relay", "up")
        assert re.fullmatch(
            r"punching failed, again (in \d+ s|when a network changes); our NAT gives each destination "
            r"another port, random; the peer's NAT gives each destination another port, random",
            row["why_not_direct"],
        )
        assert fleet.network.nodes["meeting"].address4 in row["endpoint"]
        table = fleet.command(node, "crossedge", "peers").stdout
        assert "relay" in table


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_tcp_flows_through_the_relay_and_pings_beside_it_are_not_lost(fleet: Fleet, a: str, b: str) -> None:
    before = relayed(fleet)
    pods = [fleet.member(name).pod for name in (a, b)]
    wanted = [(fleet.member(a).pod, fleet.member(b).pod4), (fleet.member(b).pod, fleet.member(a).pod6)]
    pings = fleet.pinging(a, b, count=100, interval=0.02)
    start = time.monotonic()
    assert run_flows(fleet.network, pods, wanted, FLOW) == ["", ""]
    seconds = time.monotonic() - start
    after = relayed(fleet)
    grown = {what: after[what] - before[what] for what in ("trains", "datagrams", "bytes")}
    print(f"{a} - {b}: 2 x {FLOW >> 20} MiB at once in {seconds:.2f} s; relay forwarded {grown}")
    assert pings.result().all
    assert grown["bytes"] > 2 * FLOW
    assert fleet.path(a, b) == "relay"


def test_trains_stay_trains_where_the_kernel_translates(fleet: Fleet) -> None:
    """Relayed datagrams each have a header, and still leave and come as trains."""
    before = relayed(fleet)
    target = fleet.member("attic").pod4
    assert run_flows(
        fleet.network, [fleet.member("attic").pod], [(fleet.member("loft").pod, target)], FLOW
    ) == [""]
    after = relayed(fleet)
    trains, datagrams = after["trains"] - before["trains"], after["datagrams"] - before["datagrams"]
    print(f"{datagrams} datagrams in {trains} trains")
    assert datagrams > 2 * trains


def test_status_counts_relayed_pairs(fleet: Fleet) -> None:
    assert fleet.ping("attic", "cellar").all
    status = fleet.status("attic")
    assert status["peers"]["relay"] >= 1
    assert status["peers"]["direct"] == 0
    assert status["nat"]["mapping"] == "address_and_port_dependent"
