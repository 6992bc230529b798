"""A daemon that dies leaves what the next one repairs; one that stops in order leaves pods what they have."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from crossedge.lab.demo import registered
from crossedge.lab.demo_mesh import CONFIG
from crossedge.meshd.state import MAX_MEMBERS_SIZE, MEMBERS
from crossedge.wire.codec import load
from tests.daemon_fleet import DEVICES, EACH_DEVICE, Fleet, a_fleet, changes, longest_gap, pod_prefixes
from tests.fair_clock import FairClock
from tests.underlays import FARM, HOME, WEST, node, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

BACK_WITHIN = 3.0
"""Seconds after the start of a killed daemon within which its pairs are back."""
INTERVAL = 0.02
TOPOLOGY = two_regions("restart", HOME, FARM, node("yard", WEST))


@pytest.fixture(scope="module", params=EACH_DEVICE)
def device(request: pytest.FixtureRequest) -> str:
    """The kind of the attic's device."""
    return str(request.param)


@pytest.fixture(scope="module")
def pristine(device: str) -> dict[str, Any]:
    """What the attic looked like before its daemon ran for the first time."""
    return {}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, pristine: dict[str, Any], device: str) -> Iterator[Fleet]:
    configs = {"attic": DEVICES[device]}
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("restart"), start=False, configs=configs) as made:
        until(
            "the pod's link has settled", lambda: "NO-CARRIER" not in made.run("attic", "ip link").stdout, 3.0
        )
        pristine |= {**made.picture("attic"), "sysctls": made.sysctls("attic")}
        made.begin()
        assert made.status("attic")["host"]["tun"]["kind"] == device
        yield made


def settle(fleet: Fleet) -> None:
    """Have both pairs of the attic direct, as the tests begin."""
    for other in ("barn", "yard"):
        fleet.go_direct("attic", other)


def test_killed_and_started_nothing_is_stale_or_doubled_and_pairs_are_back_within_three_seconds(
    fleet: Fleet,
) -> None:
    settle(fleet)
    before = fleet.picture("attic")
    there = fleet.pinging("attic", "barn", count=1000, interval=INTERVAL)
    back = fleet.pinging("barn", "attic", count=1000, interval=INTERVAL, six=True)
    clock = FairClock()
    fleet.kill("attic")
    fleet.start("attic")
    dark = {name: longest_gap(ping.stop()) * INTERVAL for name, ping in (("out", there), ("in", back))}
    print("dark", dark, clock.waited)
    assert max(dark.values()) < BACK_WITHIN + clock.waited
    until("the pair is direct again", lambda: fleet.path("attic", "barn") == "direct", 5.0)
    idle = until("the pair without traffic is back", lambda: fleet.answers("yard", "attic"), BACK_WITHIN)
    print("idle pair", idle)
    assert changes(before, fleet.picture("attic")) == []


def persisted_sessions(fleet: Fleet) -> int:
    """Return for how many sessions of the attic the next life is told to open them."""
    try:
        held = load((fleet.state("attic") / MEMBERS).read_bytes(), MAX_MEMBERS_SIZE)
    except FileNotFoundError:
        return 0
    active = held["active"]
    return len(active) if isinstance(active, tuple) else 0


def test_killed_for_a_while_a_daemon_opens_its_sessions_itself_and_need_not_be_called(fleet: Fleet) -> None:
    settle(fleet)
    until("both sessions are persisted", lambda: persisted_sessions(fleet) == 2, 10.0)
    ping = fleet.pinging("barn", "attic", count=1000, interval=INTERVAL)
    fleet.kill("attic")
    until("the barn has noticed", lambda: fleet.peer("barn", "attic")["path"] != "direct", 8.0)
    before = ping.answered
    fleet.start("attic")
    print("back", until("the barn's ping is answered", lambda: ping.answered > before, BACK_WITHIN))
    ping.stop()
    fleet.mesh.wait("registered", registered, 10.0)


def test_a_route_that_is_no_longer_wanted_is_swept_when_a_killed_daemon_starts(fleet: Fleet) -> None:
    settle(fleet)
    until("the members are persisted", lambda: (fleet.state("attic") / "members").exists(), 3.0)
    before = fleet.picture("attic")
    yard = fleet.member("yard")
    old = pod_prefixes(yard)[4]
    fleet.kill("attic")
    assert str(old) in fleet.mesh_routes("attic")
    fleet.mesh.end("yard")
    fleet.sign("yard", "--prefix", "10.160.77.0/24")
    fleet.start("yard")
    fleet.start("attic")

    def swept() -> bool:
        routes = fleet.mesh_routes("attic")
        return str(old) not in routes and "10.160.77.0/24" in routes

    print("swept", until("the old route is swept, the new one is there", swept, 5.0))
    after = fleet.picture("attic")
    assert len(after["routes"]) == len(before["routes"])
    assert changes({**before, "routes": [], "nft": []}, {**after, "routes": [], "nft": []}) == []


def test_what_a_killed_daemon_left_is_swept_even_by_one_that_lost_its_state(fleet: Fleet) -> None:
    settle_routes = fleet.mesh_routes("attic")
    fleet.kill("attic")
    (fleet.state("attic") / "members").unlink()
    fleet.run("attic", "ip route add 10.160.99.0/24 dev crossedge0 table 41820 proto 206 metric 1024")
    fleet.kill("meeting")  # nobody who could tell it of its peers
    fleet.start("attic")
    until("the stale routes are gone", lambda: "10.160.99.0/24" not in fleet.mesh_routes("attic"), 3.0)
    barn = str(pod_prefixes(fleet.member("barn"))[4])
    fleet.start("meeting")
    until("its peers are back", lambda: fleet.mesh_routes("attic") == settle_routes, 8.0)
    assert barn in fleet.mesh_routes("attic")


def test_a_clean_stop_keeps_the_interface_and_the_routes_and_cleanup_removes_every_trace(
    fleet: Fleet, pristine: dict[str, Any]
) -> None:
    fleet.go_direct("attic", "barn")
    before = fleet.picture("attic")
    assert fleet.mesh.end("attic", signal.SIGTERM) == 0
    stopped = fleet.picture("attic")
    for what in ("addresses", "rules", "nft"):
        assert stopped[what] == before[what], what

    def where(picture: dict[str, Any]) -> list[tuple[object, ...]]:
        routes = picture["routes"]
        assert isinstance(routes, list)
        return [
            tuple(route.get(key) for key in ("dst", "dev", "table", "metric", "type")) for route in routes
        ]

    assert where(stopped) == where(before)
    done = fleet.command("attic", "meshd", "cleanup", "--config", str(fleet.member("attic").root / CONFIG))
    assert done.returncode == 0, done.stderr
    assert "link crossedge0" in done.stdout.splitlines()
    assert changes(pristine, {**fleet.picture("attic"), "sysctls": fleet.sysctls("attic")}) == []
    again = fleet.command("attic", "meshd", "cleanup")
    assert (again.returncode, again.stdout) == (0, "")
    fleet.start("attic")
    fleet.go_direct("attic", "barn")
