"""What ADD, DEL and CHECK of a conforming plugin do to pods; the cases are those of `cni_cases`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cni_cases import (
    CASES,
    CHECKABLE,
    Case,
    a_case,
    a_pod,
    a_served_node,
    added,
    an_unserved_node,
    hosts,
    is_error,
)
from tests.cni_runtime import SYSTEM_PLUGINS, Answer, Pod, pods
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces
served = pytest.fixture(scope="module")(a_served_node)
unserved = pytest.fixture(scope="module")(an_unserved_node)
case = pytest.fixture(params=CASES)(a_case)
checkable = pytest.fixture(params=CHECKABLE)(a_case)
pod = pytest.fixture(a_pod)


# ADD


def test_add_gives_interface_addresses_and_routes(case: Case, pod: Pod) -> None:
    result = added(case, pod)
    assert pod.links() == {"eth0"}
    assert pod.addresses() == set(hosts(result))
    inside = [each for each in result["interfaces"] if each.get("sandbox")]
    assert [each["name"] for each in inside] == ["eth0"]
    assert inside[0]["sandbox"] == pod.path
    assert inside[0]["mac"] == pod.ip("link", "show", "eth0")[0]["address"]
    for each in result["ips"]:
        assert result["interfaces"][each["interface"]]["name"] == "eth0"
        assert each["gateway"]
    for family in ("-4", "-6"):
        assert [r for r in pod.ip(family, "route") if r["dst"] == "default"]
    assert {route["dst"] for route in result["routes"]} == {"0.0.0.0/0", "::/0"}
    case.plugin.delete(pod, case.version).ok()


def test_addresses_are_usable_at_once(case: Case, pod: Pod) -> None:
    added(case, pod)
    flags = [each for link in pod.ip("addr", "show", "dev", "eth0") for each in link["addr_info"]]
    assert not [each for each in flags if each["scope"] == "global" and each.get("tentative")]
    case.plugin.delete(pod, case.version).ok()


def test_pods_reach_each_other(case: Case) -> None:
    with pods(2) as (first, second):
        reached = hosts(added(case, first))
        added(case, second)
        for address in reached:
            done = second.run("ping", "-c1", "-W2", address)
            assert done.returncode == 0, done.stdout
        case.plugin.delete(first, case.version).ok()
        case.plugin.delete(second, case.version).ok()


def test_existing_interface_is_an_error_and_stays(case: Case, pod: Pod) -> None:
    with pod.namespace:
        subprocess.run(["ip", "link", "add", "eth0", "type", "bridge"], check=True)
    answer = case.plugin.add(pod, case.version)
    assert answer.status == 1
    assert "eth0" in answer.json["msg"] or "exist" in answer.json["msg"]
    assert pod.links() == {"eth0"}
    if case.node is not None:
        assert not [entry for entry in case.node.live() if entry["container"] == pod.id]


def test_second_add_fails_and_leaves_the_first(case: Case, pod: Pod) -> None:
    result = added(case, pod)
    try:
        answer = case.plugin.add(pod, case.version)
        assert answer.status == 1
        assert pod.addresses() == set(hosts(result))
        with pods() as (other,):
            assert not set(hosts(added(case, other))) & set(hosts(result))
            case.plugin.delete(other, case.version).ok()
        assert "exist" in answer.json["msg"] or "already" in answer.json["msg"]
    finally:
        case.plugin.delete(pod, case.version).ok()


def test_two_interfaces_of_one_container(case: Case, pod: Pod) -> None:
    first, second = added(case, pod), added(case, pod, interface="net1")
    assert pod.links() == {"eth0", "net1"}
    assert not set(hosts(first)) & set(hosts(second))
    case.plugin.delete(pod, case.version, interface="net1").ok()
    assert eventually(lambda: pod.links() == {"eth0"})
    case.plugin.delete(pod, case.version).ok()


def test_failed_add_gives_its_addresses_back(case: Case, pod: Pod) -> None:
    with pod.namespace:
        subprocess.run(["ip", "link", "add", "eth0", "type", "bridge"], check=True)
    assert case.plugin.add(pod, case.version).status == 1
    with pod.namespace:
        subprocess.run(["ip", "link", "del", "eth0"], check=True)
    added(case, pod)
    case.plugin.delete(pod, case.version).ok()


def test_namespace_that_is_none_is_an_error(case: Case, pod: Pod, tmp_path: Path) -> None:
    config = case.plugin.configuration(case.version)
    (tmp_path / "file").touch()
    for path in ("/run/netns/no-such", str(tmp_path / "file")):
        answer = case.plugin.call("ADD", config, container=pod.id, netns=path, interface="eth0")
        assert answer.status == 1
        assert answer.code


def test_mac_of_the_runtime_is_used(case: Case) -> None:
    ways: list[dict[str, Any]] = [
        {"arguments": "IgnoreUnknown=1;MAC=02:00:00:00:00:11"},
        {"extra": {"args": {"cni": {"mac": "02:00:00:00:00:12"}}}},
        {"extra": {"runtimeConfig": {"mac": "02:00:00:00:00:13"}, "capabilities": {"mac": True}}},
    ]
    for number, way in enumerate(ways, 1):
        with pods() as (pod,):
            result = added(case, pod, **way)
            assert result["interfaces"][-1]["mac"] == f"02:00:00:00:00:1{number}"
            assert pod.ip("link", "show", "eth0")[0]["address"] == f"02:00:00:00:00:1{number}"
            case.plugin.delete(pod, case.version).ok()


def test_dns_of_the_configuration_is_passed_on(case: Case) -> None:
    dns = {"nameservers": ["10.0.0.53"], "search": ["example.net"]}
    for given, expected in ((dns, dns), ({}, {}), (None, {})):
        with pods() as (pod,):
            extra = {} if given is None else {"dns": given}
            found = added(case, pod, extra=extra).get("dns") or {}
            assert found == expected
            case.plugin.delete(pod, case.version).ok()


# DEL


def gone(case: Case, pod: Pod) -> bool:
    if case.node is not None and [e for e in case.node.live() if e["container"] == pod.id]:
        return False
    return bool(eventually(lambda: pod.links() == set()))


def test_del_removes_all_and_may_be_said_twice(case: Case, pod: Pod) -> None:
    added(case, pod)
    for _ in range(2):
        case.plugin.delete(pod, case.version).ok()
    assert gone(case, pod)


@pytest.mark.parametrize("netns", [None, "", "/run/netns/no-such"])
def test_del_works_without_the_namespace(case: Case, netns: str | None) -> None:
    with pods() as (pod,):
        added(case, pod)
    case.plugin.delete(pod, case.version, netns=netns).ok()
    if case.node is not None:
        assert not [entry for entry in case.node.live() if entry["container"] == pod.id]


def test_del_with_empty_netns_removes_a_link_that_lives(case: Case, pod: Pod) -> None:
    added(case, pod)
    case.plugin.delete(pod, case.version, netns="").ok()
    if not case.plugin.is_control:  # which has no record of the link
        assert gone(case, pod)


def test_del_of_what_never_was_succeeds(case: Case, pod: Pod) -> None:
    case.plugin.delete(pod, case.version).ok()


def test_del_after_a_failed_add_succeeds(case: Case, pod: Pod) -> None:
    with pod.namespace:
        subprocess.run(["ip", "link", "add", "eth0", "type", "bridge"], check=True)
    assert case.plugin.add(pod, case.version).status == 1
    case.plugin.delete(pod, case.version).ok()


def test_del_when_the_interface_is_gone_frees_the_addresses(case: Case, pod: Pod) -> None:
    added(case, pod)
    with pod.namespace:
        subprocess.run(["ip", "link", "del", "eth0"], check=True)
    case.plugin.delete(pod, case.version).ok()
    assert gone(case, pod)


def test_del_with_another_container_id_leaves_the_first(case: Case, pod: Pod) -> None:
    result = added(case, pod)
    config = case.plugin.configuration(case.version)
    case.plugin.call("DEL", config, container="stranger", netns=pod.path, interface="eth0").ok()
    assert pod.addresses() == set(hosts(result))
    case.plugin.delete(pod, case.version).ok()


def test_del_takes_the_previous_result_or_none(case: Case, pod: Pod) -> None:
    result = added(case, pod)
    case.plugin.delete(pod, case.version, extra={"prevResult": result}).ok()
    assert gone(case, pod)


# CHECK


def checked(case: Case, pod: Pod, result: Any) -> Answer:
    return case.plugin.check(pod, result, case.version)


def test_check_passes_after_add(checkable: Case, pod: Pod) -> None:
    result = added(checkable, pod)
    checked(checkable, pod, result).ok()
    checkable.plugin.delete(pod, checkable.version).ok()


def test_check_needs_the_previous_result(checkable: Case, pod: Pod) -> None:
    added(checkable, pod)
    assert checked(checkable, pod, None).status == 1
    checkable.plugin.delete(pod, checkable.version).ok()


@pytest.mark.parametrize(
    "harm",
    [
        "ip link del eth0",
        "ip addr flush dev eth0 scope global",
        "ip route del default",
    ],
)
def test_check_finds_what_is_missing(checkable: Case, pod: Pod, harm: str) -> None:
    result = added(checkable, pod)
    with pod.namespace:
        subprocess.run(harm.split(), check=True)
    answer = checked(checkable, pod, result)
    if answer.status or checkable.node is None or checkable.node.daemon is None:
        is_error(answer, *range(1, 1000))  # else the daemon had set it right already
    checkable.plugin.delete(pod, checkable.version).ok()


def test_check_tolerates_what_later_plugins_changed(checkable: Case, pod: Pod) -> None:
    result = added(checkable, pod)
    with pod.namespace:
        for command in (
            "ip link set eth0 mtu 1300",
            "ip addr add 192.0.2.7/32 dev eth0",
            "ip route add 198.51.100.0/24 dev eth0",
        ):
            subprocess.run(command.split(), check=True)
    checked(checkable, pod, result).ok()
    checkable.plugin.delete(pod, checkable.version).ok()


def test_check_of_a_deleted_attachment_fails(checkable: Case, pod: Pod) -> None:
    result = added(checkable, pod)
    checkable.plugin.delete(pod, checkable.version).ok()
    assert checked(checkable, pod, result).status == 1


# Concurrency


def test_containers_in_parallel_get_different_addresses(case: Case) -> None:
    number = 8
    with pods(number) as made:
        environment = {"CNI_COMMAND": "ADD", "CNI_IFNAME": "eth0", "PATH": os.environ["PATH"]}
        environment["CNI_PATH"] = str(SYSTEM_PLUGINS)
        running = []
        for pod in made:
            child = subprocess.Popen(
                [str(case.plugin.binary)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**environment, "CNI_CONTAINERID": pod.id, "CNI_NETNS": pod.path},
            )
            assert child.stdin is not None
            child.stdin.write(json.dumps(case.plugin.configuration(case.version)).encode())
            child.stdin.close()
            child.stdin = None
            running.append(child)
        results = [json.loads(child.communicate(timeout=60)[0]) for child in running]
        assert not [child.returncode for child in running if child.returncode]
        found = [address for result in results for address in hosts(result)]
        assert len(set(found)) == 2 * number
        for pod in made:
            case.plugin.delete(pod, case.version).ok()
