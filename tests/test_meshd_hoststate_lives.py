"""One life of a daemon after another: what the host keeps, what the next adopts, and what is withdrawn."""

import asyncio
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from crossedge.host import sysctl
from crossedge.host.device import open_device
from crossedge.host.links import get_link
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Netlink
from crossedge.host.routes import list_routes
from crossedge.meshd.desired import METRIC_PEER
from crossedge.meshd.hoststate import Desired, HostState
from tests.host_world import DESIRED, both_devices, host_state, ours, picture, sh

pytestmark = [pytest.mark.namespaces, pytest.mark.asyncio]
state = pytest_asyncio.fixture(host_state)


@both_devices
async def test_stop_leaves_all_in_place_and_the_next_start_adopts_it(
    namespace: Namespace, tmp_path: Path, disable: frozenset[str]
) -> None:
    loop = asyncio.get_running_loop()
    first = namespace.call(HostState, DESIRED, disable=disable, record=tmp_path / "host.json")
    first.start(loop)
    await first.settled()
    before, index = picture(namespace), first.report()["tun"]["index"]
    first.close()
    assert picture(namespace) == before
    events: list[str] = []
    with namespace:
        watch = subprocess.Popen(["ip", "monitor", "route", "address"], stdout=subprocess.PIPE, text=True)
    second = namespace.call(HostState, DESIRED, disable=disable, record=tmp_path / "host.json")
    second.start(loop)
    await second.settled()
    watch.terminate()
    events = (watch.communicate()[0]).splitlines()
    assert [line for line in events if "Deleted" in line] == []
    assert picture(namespace) == before
    assert second.report()["tun"]["index"] == index
    assert second.report()["repaired"] == {}
    second.close()


@both_devices
async def test_what_an_earlier_life_left_and_is_not_desired_is_swept(
    namespace: Namespace, tmp_path: Path, disable: frozenset[str]
) -> None:
    loop = asyncio.get_running_loop()
    first = namespace.call(HostState, DESIRED, disable=disable)
    first.start(loop)
    first.close()  # as a kill would: nothing is taken away
    sh(
        namespace,
        "ip route add 10.170.0.0/16 dev crossedge0 table 41820 proto 206",
        "ip -6 route add fd00:0:0:77::/64 dev crossedge0 table 41820 proto 206",
        "ip route add unreachable 10.171.0.0/24 proto 206",
        "ip addr add 10.159.3.3/32 dev crossedge0",
        # Not ours: a pod's route, and what somebody else put into the table.
        "ip route add 10.160.1.7/32 dev lo proto 206",
        "ip route add 10.172.0.0/16 dev lo table 41820 proto static",
    )
    peers = frozenset(peer for peer in DESIRED.peers if str(peer.prefix) != "10.160.2.0/24")
    second = namespace.call(HostState, replace(DESIRED, peers=peers), disable=disable)
    second.start(loop)
    await second.settled()
    routes = ours(namespace)
    assert "10.172.0.0/16 0" in routes
    assert len(routes) == 12
    assert f"10.160.2.0/24 {METRIC_PEER}" not in routes
    with namespace, Netlink() as netlink:
        main = {str(route.destination) for route in list_routes(netlink, table=254, protocol=206)}
    assert main == {"10.160.1.7/32", "10.160.1.0/24", "fd00:0:0:1::/64"}
    assert picture(namespace)["addresses"] == [("10.159.0.1", 32), ("fd00::1", 128)]
    second.close()


@both_devices
async def test_an_inherited_tun_is_used(namespace: Namespace, disable: frozenset[str]) -> None:
    tun = namespace.call(open_device, "crossedge0", disable=disable)
    inherited = os.dup(tun.descriptor)
    tun.close()
    state = namespace.call(HostState, DESIRED, disable=disable, tun_descriptor=inherited)
    assert state.start(asyncio.get_running_loop()).descriptor == inherited
    assert len(ours(namespace)) == 12
    state.close()


@both_devices
async def test_an_inherited_tun_that_was_deleted_is_made_again(
    namespace: Namespace, disable: frozenset[str]
) -> None:
    tun = namespace.call(open_device, "crossedge0", disable=disable)
    sh(namespace, "ip link del crossedge0")
    state = namespace.call(HostState, DESIRED, disable=disable, tun_descriptor=tun.descriptor)
    state.start(asyncio.get_running_loop())
    assert len(ours(namespace)) == 12
    state.close()


@both_devices
async def test_the_tun_of_an_earlier_life_with_another_name_is_removed(
    namespace: Namespace, tmp_path: Path, disable: frozenset[str]
) -> None:
    loop = asyncio.get_running_loop()
    for name in ("other0", "crossedge0"):
        state = namespace.call(
            HostState, replace(DESIRED, tun=name), disable=disable, record=tmp_path / "host.json"
        )
        state.start(loop)
        assert len(ours(namespace)) == 12
        state.close()
    with namespace, Netlink() as netlink:
        assert get_link(netlink, "other0") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"boot": "another", "sysctls": 5}', b"\xff"])
async def test_a_broken_record_is_done_without(namespace: Namespace, tmp_path: Path, content: bytes) -> None:
    record = tmp_path / "host.json"
    record.write_bytes(content)
    state = namespace.call(HostState, DESIRED, record=record)
    state.start(asyncio.get_running_loop())
    assert json.loads(record.read_text())["sysctls"]["net/ipv4/ip_forward"] == ["0", "1"]
    state.close()


@both_devices
async def test_cleanup_removes_every_trace(
    namespace: Namespace, tmp_path: Path, disable: frozenset[str]
) -> None:
    def everything() -> list[str]:
        with namespace:
            return [
                subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout
                for command in (
                    "ip -o addr show",
                    "ip -o link show",
                    "ip rule",
                    "ip -6 rule",
                    "ip route show table all",
                    "ip -6 route show table all",
                    "nft list ruleset",
                    "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv6.conf.all.accept_ra",
                )
            ]

    before = everything()
    record = tmp_path / "host.json"
    first = namespace.call(HostState, DESIRED, disable=disable, record=record)
    first.start(asyncio.get_running_loop())
    await first.settled()
    first.close()
    assert everything() != before
    assert record.exists()
    other = namespace.call(HostState, Desired(), record=record)  # another life, that knows nothing
    removed = other.cleanup()
    assert everything() == before
    assert not record.exists()
    assert {line.split()[0] for line in removed} == {"rule", "route", "link", "table", "sysctl"}
    assert other.cleanup() == []
    other.close()


@both_devices
async def test_a_start_that_fails_leaves_nothing_it_made(
    namespace: Namespace, tmp_path: Path, disable: frozenset[str]
) -> None:
    sh(namespace, "ip link add crossedge0 type bridge")
    before = picture(namespace)
    record = tmp_path / "host.json"
    made = namespace.call(HostState, DESIRED, disable=disable, record=record)
    with pytest.raises(OSError, match="ours"):
        made.start(asyncio.get_running_loop())
    made.close()
    assert picture(namespace) == before
    assert not record.exists()


@both_devices
async def test_a_start_that_fails_leaves_what_an_earlier_life_had(
    namespace: Namespace, state: HostState, tmp_path: Path, disable: frozenset[str]
) -> None:
    before = picture(namespace)
    other = namespace.call(HostState, DESIRED, disable=disable, record=tmp_path / "host.json")
    with pytest.raises(OSError, match="another process holds it"):
        other.start(asyncio.get_running_loop())
    other.close()
    assert picture(namespace) == before
    assert (tmp_path / "host.json").exists()


@both_devices
async def test_what_was_started_can_be_withdrawn(
    namespace: Namespace, tmp_path: Path, disable: frozenset[str]
) -> None:
    before = picture(namespace)
    with namespace:
        forwarding = sysctl.read("net/ipv4/ip_forward")
    made = namespace.call(HostState, DESIRED, disable=disable, record=tmp_path / "host.json")
    made.start(asyncio.get_running_loop())
    await made.settled()
    assert picture(namespace) != before
    made.withdraw()
    made.close()
    assert picture(namespace) == before
    with namespace:
        assert sysctl.read("net/ipv4/ip_forward") == forwarding


@both_devices
async def test_cleanup_while_running_is_not_undone_by_ourselves(
    namespace: Namespace, state: HostState, disable: frozenset[str]
) -> None:
    assert state.cleanup()
    await asyncio.sleep(0.1)
    assert picture(namespace)["link"] == []
    assert picture(namespace)["routes"] == []
    assert picture(namespace)["nft"] is None


@both_devices
async def test_a_failed_start_can_be_tried_again(namespace: Namespace, disable: frozenset[str]) -> None:
    blocker = namespace.call(open_device, "crossedge0", disable=disable)
    state = namespace.call(HostState, DESIRED, disable=disable)
    loop = asyncio.get_running_loop()
    with pytest.raises(OSError, match="another process holds it"):
        state.start(loop)
    with pytest.raises(RuntimeError):
        _ = state.tun
    blocker.close()
    state.start(loop)
    with pytest.raises(RuntimeError):
        state.start(loop)
    state.close()
