"""What pods send between two daemons arrives as it was, by its digest, however the wires treat it.

lawn (east) ---- the delay line ---- yard (west)      the rendezvous in the east

The nodes' wires pass trains, cut them, or cut them and do not join them again, as devices do or do not; the
line loses datagrams and lets others overtake them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import pytest

from crossedge.lab.flows import run_flows
from crossedge.lab.topology import Conditions
from tests.daemon_fleet import DEVICES, EACH_DEVICE, Fleet, a_fleet
from tests.underlays import DELAY_MS, EAST, WEST, node, two_regions

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.tool("ethtool")]

NODES: Final = ("lawn", "yard")
LONG: Final = 128 << 20
"""Bytes of a stream through a line that does nothing to it but delay it: as iperf3 sends in some seconds,"""
SHORT: Final = 12 << 20
"""and through one that does."""
WIRES: Final[Mapping[str, str]] = {
    "offloaded": "tso on gso on tx-udp-segmentation on gro off",
    "gro": "tso off gso off tx-udp-segmentation off gro on",
    "wire-like": "tso off gso off tx-udp-segmentation off gro off",
}
DISORDER: Final = (
    "chunk-malformed",
    "bad-tag",
    "frame-length",
    "inner-length",
    "truncated",
    "unknown-datagram",
)
"""What would have been counted if datagrams had been put together wrongly."""


@pytest.fixture(scope="module", params=EACH_DEVICE)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    topology = two_regions("integrity", node("lawn", EAST), node("yard", WEST))
    configs = {"yard": DEVICES[request.param]}
    with a_fleet(topology, tmp_path_factory.mktemp("integrity"), configs=configs) as made:
        made.go_direct(*NODES)
        yield made


@pytest.fixture(params=WIRES)
def wires(request: pytest.FixtureRequest, fleet: Fleet) -> Iterator[str]:
    for name in NODES:
        fleet.run(name, f"ethtool -K eth0 {WIRES[request.param]}")
    yield request.param
    fleet.network.set_wire("east-west", Conditions(delay_ms=DELAY_MS))
    for name in NODES:
        fleet.run(name, f"ethtool -K eth0 {WIRES['offloaded']}")


def send(fleet: Fleet, size: int, *, versions: tuple[int, ...] = (4, 6)) -> None:
    """Send so many bytes both ways at once; fails where one stream does not arrive as it was."""
    lawn, yard = (fleet.member(name) for name in NODES)
    wanted = [(lawn.pod, yard.pod4), (yard.pod, lawn.pod4)] if 4 in versions else []
    wanted += [(lawn.pod, yard.pod6), (yard.pod, lawn.pod6)] if 6 in versions else []
    errors = run_flows(fleet.network, [lawn.pod, yard.pod], wanted, size)
    assert not any(errors), (errors, [fleet.status(name)["dropped"] for name in NODES])


def check(fleet: Fleet, before: Mapping[str, Mapping[str, int]]) -> None:
    """The pair never left the direct path, and nothing was put together that did not belong together."""
    assert fleet.path(*NODES) == "direct"
    for name in NODES:
        dropped = fleet.status(name)["dropped"]
        assert {
            reason: dropped.get(reason, 0) - before[name].get(reason, 0) for reason in DISORDER
        } == dict.fromkeys(DISORDER, 0)


def drops(fleet: Fleet) -> dict[str, dict[str, int]]:
    return {name: dict(fleet.status(name)["dropped"]) for name in NODES}


def reordered(fleet: Fleet) -> int:
    (line,) = (each for each in fleet.network.status()["wires"] if each["name"] == "east-west")
    return sum(int(line["counts"][end].get("reordered", 0)) for end in "ab")


def test_long_streams_arrive_as_they_were(fleet: Fleet, wires: str) -> None:
    before = drops(fleet)
    send(fleet, LONG, versions=(4,))
    send(fleet, SHORT, versions=(6,))
    check(fleet, before)


def test_streams_arrive_as_they_were_where_datagrams_overtake_each_other(fleet: Fleet, wires: str) -> None:
    before, seen = drops(fleet), reordered(fleet)
    fleet.network.set_wire("east-west", Conditions(delay_ms=DELAY_MS, reorder=0.02, reorder_ms=2.0))
    send(fleet, SHORT)
    assert reordered(fleet) - seen > 100
    check(fleet, before)


def test_streams_arrive_as_they_were_where_datagrams_are_lost_and_overtake_each_other(
    fleet: Fleet, wires: str
) -> None:
    before = drops(fleet)
    conditions = Conditions(delay_ms=DELAY_MS, loss=0.01, reorder=0.02, reorder_ms=2.0)
    fleet.network.set_wire("east-west", conditions)
    send(fleet, SHORT)
    check(fleet, before)
