"""Changes that others make are told as they happen."""

import asyncio
import ipaddress
import subprocess
from collections.abc import Callable

import pytest

from crossedge.host.addresses import LinkAddress
from crossedge.host.links import Link
from crossedge.host.monitor import Event, Monitor, NftEvent, NftMonitor
from crossedge.host.namespaces import Namespace
from crossedge.host.routes import Route
from crossedge.host.rules import Rule

pytestmark = [pytest.mark.namespaces, pytest.mark.asyncio]


def sh(namespace: Namespace, command: str, *, text: str = "") -> subprocess.Popen[str]:
    with namespace:
        child = subprocess.Popen(command.split(), stdin=subprocess.PIPE, text=True)
        child.communicate(text)
    assert child.returncode == 0, command
    return child


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_links_addresses_routes_and_rules_are_told(namespace: Namespace) -> None:
    events: list[Event] = []
    monitor = namespace.call(Monitor, events.append)
    sh(namespace, "ip link add test0 type bridge")  # before start: not missed
    monitor.start(asyncio.get_running_loop())
    sh(namespace, "ip link set test0 up")
    sh(namespace, "ip addr add 10.0.0.1/24 dev test0")
    sh(namespace, "ip route add 10.9.0.0/16 dev test0 table 41820")
    sh(namespace, "ip -6 rule add not fwmark 5 lookup 41820 priority 5206")
    sh(namespace, "ip addr del 10.0.0.1/24 dev test0")
    sh(namespace, "ip link del test0")

    def seen(kind: str, deleted: bool, test: Callable[[object], bool]) -> bool:
        return any(e.kind == kind and e.deleted == deleted and test(e.item) for e in events)

    await until(lambda: seen("link", True, lambda i: isinstance(i, Link) and i.name == "test0"))
    assert seen("link", False, lambda i: isinstance(i, Link) and i.name == "test0" and not i.up)
    assert seen("link", False, lambda i: isinstance(i, Link) and i.name == "test0" and i.up)
    address = ipaddress.ip_interface("10.0.0.1/24")
    for deleted in (False, True):
        assert seen("address", deleted, lambda i: isinstance(i, LinkAddress) and i.interface == address)
    assert seen("route", False, lambda i: isinstance(i, Route) and i.table == 41820)
    assert seen("rule", False, lambda i: isinstance(i, Rule) and i.priority == 5206 and i.invert)
    monitor.close()
    monitor.close()


async def test_only_what_was_asked_for_is_told(namespace: Namespace) -> None:
    events: list[Event] = []
    monitor = namespace.call(Monitor, events.append, ["rule"])
    monitor.start(asyncio.get_running_loop())
    sh(namespace, "ip link add test0 type bridge")
    sh(namespace, "ip rule add lookup 41820 priority 5206")
    await until(lambda: bool(events))
    assert [event.kind for event in events] == ["rule"]
    monitor.close()


async def test_lost_events_are_told_as_an_overrun(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossedge.host.monitor.BUFFER", 4096)
    events: list[Event] = []
    monitor = namespace.call(Monitor, events.append, ["route"])
    sh(namespace, "ip link set lo up")
    routes = "\n".join(f"route add 10.{i}.{j}.0/24 dev lo" for i in range(4) for j in range(250))
    sh(namespace, "ip -batch -", text=routes)
    monitor.start(asyncio.get_running_loop())
    await until(lambda: any(event.kind == "overrun" for event in events))
    count = len(events)
    sh(namespace, "ip route add 10.99.0.0/16 dev lo")
    await until(lambda: len(events) > count)
    monitor.close()


async def test_each_touched_table_is_told_once_per_transaction(namespace: Namespace) -> None:
    events: list[NftEvent] = []
    monitor = namespace.call(NftMonitor, events.append)
    monitor.start(asyncio.get_running_loop())
    ours = "table inet crossedge { set s { type ipv4_addr; elements = { 10.0.0.1 }; }; chain c { }; }"
    other = "table ip filter { chain forward { type filter hook forward priority 0; policy drop; }; }"
    child = sh(namespace, "nft -f -", text=ours + "\n" + other)
    await until(lambda: len(events) == 2)
    assert {(event.table, event.chains, event.port) for event in events} == {
        ("crossedge", True, child.pid),
        ("filter", True, child.pid),
    }
    events.clear()
    sh(namespace, "nft -f -", text="add element inet crossedge s { 10.0.0.3 }")
    await until(lambda: len(events) == 1)
    assert (events[0].table, events[0].family, events[0].chains) == ("crossedge", 1, False)
    events.clear()
    sh(namespace, "nft flush ruleset")
    await until(lambda: {event.table for event in events} == {"crossedge", "filter"})
    monitor.close()
