"""What a conforming plugin must do, black-box: the installed binary with the daemon, without it, and as a
control Debian's bridge + host-local under the same tests.

`CONTROL_FAILS` says which lines the control fails, strictly: a line that it holds cannot stand there.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cni_runtime import SYSTEM_PLUGINS, Answer, Node_, Plugin, Pod, pods
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
CONTROL = SYSTEM_PLUGINS / "bridge"
CONTROL_FAILS = {
    "test_del_with_another_container_id_leaves_the_first": "DEL removes whatever interface has the name",
    "test_own_namespace_is_code_8": "this release has no such check: ADD would change the host",
}
NOT_TO_BE_RUN = {"test_own_namespace_is_code_8"}
"""Those that would change the machine under a plugin that fails them."""


@dataclass
class Case:
    plugin: Plugin
    version: str
    node: Node_ | None

    def at_least(self, version: str) -> bool:
        return VERSIONS.index(self.version) >= VERSIONS.index(version)


def control(root: Path) -> Plugin:
    ranges = [[{"subnet": "10.77.0.0/16"}], [{"subnet": "fd77::/64"}]]
    ipam = {"type": "host-local", "dataDir": str(root / "networks"), "ranges": ranges}
    ipam["routes"] = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    config = {"bridge": "cnib0", "isGateway": True, "ipMasq": False, "ipam": ipam}
    return Plugin(CONTROL, "bridge", config, is_control=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node_]:
    node = Node_(tmp_path_factory.mktemp("served"))
    node.start()
    yield node
    node.stop()


@pytest.fixture(scope="module")
def unserved(tmp_path_factory: pytest.TempPathFactory) -> Node_:
    return Node_(tmp_path_factory.mktemp("unserved"))


CASES = [
    *(pytest.param(("daemon", version), id=f"daemon-{version}") for version in VERSIONS),
    *(
        pytest.param(("local", version), id=f"local-{version}", marks=pytest.mark.slow)
        for version in VERSIONS[:-1]
    ),
    pytest.param(("local", VERSIONS[-1]), id=f"local-{VERSIONS[-1]}"),
    *(
        pytest.param(("control", version), id=f"control-{version}", marks=pytest.mark.tool(str(CONTROL)))
        for version in VERSIONS[:3]
    ),
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, served: Node_, unserved: Node_, tmp_path: Path) -> Case:
    return _case(request, served, unserved, tmp_path)


@pytest.fixture(params=[each for each in CASES if "0.3.1" not in each.values[0]])
def checkable(request: pytest.FixtureRequest, served: Node_, unserved: Node_, tmp_path: Path) -> Case:
    """Return a case whose version has CHECK."""
    return _case(request, served, unserved, tmp_path)


def _case(request: pytest.FixtureRequest, served: Node_, unserved: Node_, tmp_path: Path) -> Case:
    kind, version = request.param
    name = request.node.originalname
    if kind == "control":
        if name in CONTROL_FAILS:
            request.applymarker(
                pytest.mark.xfail(reason=CONTROL_FAILS[name], strict=True, run=name not in NOT_TO_BE_RUN)
            )
            if name in NOT_TO_BE_RUN:
                pytest.xfail(CONTROL_FAILS[name])
        return Case(control(tmp_path), version, None)
    node = served if kind == "daemon" else unserved
    return Case(node.plugin, version, node)


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods() as (made,):
        yield made


def added(case: Case, pod: Pod, **kw: Any) -> dict[str, Any]:
    return case.plugin.add(pod, case.version, **kw).ok().json


def hosts(result: dict[str, Any]) -> list[str]:
    return [each["address"].split("/")[0] for each in result["ips"]]


def is_error(answer: Answer, *codes: int) -> None:
    assert answer.status == 1
    assert {"code", "msg"} <= answer.json.keys()
    assert answer.code in codes, answer.json


# Process


def test_no_command_prints_about_and_ends_well(case: Case) -> None:
    answer = case.plugin.call(None, {})
    assert answer.status == 0
    assert not answer.stdout
    assert "CNI" in answer.stderr


def test_unknown_command_is_code_4(case: Case, pod: Pod) -> None:
    config = case.plugin.configuration(case.version)
    answer = case.plugin.call("FLY", config, container=pod.id, netns=pod.path, interface="eth0")
    is_error(answer, 4)


def test_version_wants_nothing_and_does_not_read_stdin(case: Case) -> None:
    read, write = os.pipe()  # which nobody closes: whoever reads it waits for ever
    environment = {"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [str(case.plugin.binary)], stdin=read, env=environment, capture_output=True, timeout=10, check=True
    )
    os.close(read)
    os.close(write)
    assert set(VERSIONS[:3]) <= set(json.loads(done.stdout)["supportedVersions"])


def test_version_takes_the_dummies_of_libcni(case: Case) -> None:
    answer = case.plugin.call("VERSION", {"cniVersion": case.version}, netns="dummy", interface="dummy")
    assert case.version in answer.ok().json["supportedVersions"]


def test_unreadable_stdin_is_an_error(case: Case, pod: Pod) -> None:
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": pod.id,
        "CNI_NETNS": pod.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/",
        "PATH": os.environ["PATH"],
    }
    writable = os.open("/dev/null", os.O_WRONLY)  # which read(2) refuses
    done = subprocess.run(
        [str(case.plugin.binary)], stdin=writable, env=environment, capture_output=True, check=False
    )
    os.close(writable)
    is_error(Answer(done.returncode, done.stdout, ""), 5)


@pytest.mark.parametrize("stdin", [b"", b"{", b"[]", b"nonsense"])
def test_undecodable_stdin_is_code_6(case: Case, pod: Pod, stdin: bytes) -> None:
    answer = case.plugin.call("ADD", stdin=stdin, container=pod.id, netns=pod.path, interface="eth0")
    is_error(answer, 6)


# Variables


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"]),
    ],
)
def test_all_missing_variables_are_named_at_once(case: Case, command: str, needed: list[str]) -> None:
    answer = case.plugin.call(command, case.plugin.configuration(case.version))
    is_error(answer, 4)
    text = answer.json["msg"] + answer.json.get("details", "")
    assert all(name in text for name in needed)


@pytest.mark.parametrize("name", ["a" * 16, ".", "..", "a/b", "a:b", "a b"])
def test_interface_names_that_the_kernel_refuses_are_code_4(case: Case, pod: Pod, name: str) -> None:
    is_error(case.plugin.add(pod, case.version, interface=name), 4)
    assert pod.links() == set()


@pytest.mark.parametrize("container", ["", "-a", "a/b", "a b", "ä"])
def test_bad_container_id_is_code_4(case: Case, pod: Pod, container: str) -> None:
    config = case.plugin.configuration(case.version)
    answer = case.plugin.call("ADD", config, container=container, netns=pod.path, interface="eth0")
    is_error(answer, 4)


@pytest.mark.parametrize("name", [None, "", "-a", "a/b", "a b"])
def test_bad_or_missing_network_name_is_code_7(case: Case, pod: Pod, name: str | None) -> None:
    config = case.plugin.configuration(case.version, name=name)
    if name is None:
        del config["name"]
    is_error(case.plugin.call("ADD", config, container=pod.id, netns=pod.path, interface="eth0"), 7)


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_own_namespace_is_code_8(case: Case, pod: Pod, command: str) -> None:
    answer = case.plugin.call(
        command,
        case.plugin.configuration(case.version),
        container=pod.id,
        netns=f"/proc/{os.getpid()}/ns/net",
        interface="eth0",
    )
    is_error(answer, 8)


# Versions


def test_unsupported_version_is_code_1(case: Case, pod: Pod) -> None:
    is_error(case.plugin.add(pod, "99.0.0"), 1)


def test_missing_version_is_0_1_0(case: Case, pod: Pod) -> None:
    config = case.plugin.configuration(None)
    answer = case.plugin.call("ADD", config, container=pod.id, netns=pod.path, interface="eth0").ok()
    found = answer.json
    assert found["cniVersion"] in ("0.1.0", "")
    assert found["ip4"]["ip"].split("/")[0] in pod.addresses()
    case.plugin.call("DEL", config, container=pod.id, netns=pod.path, interface="eth0").ok()


def test_result_has_the_form_of_its_version(case: Case, pod: Pod) -> None:
    result = added(case, pod)
    assert result["cniVersion"] == case.version
    assert len(result["ips"]) == 2
    for each in result["ips"]:
        assert ("version" in each) == (not case.at_least("1.0.0"))
        if "version" in each:
            assert each["version"] == ("6" if ":" in each["address"] else "4")
    assert ("mtu" in result["interfaces"][-1]) == (case.version == "1.1.0")
    case.plugin.delete(pod, case.version).ok()


def test_operations_of_later_versions_are_code_1(case: Case, pod: Pod) -> None:
    if not case.at_least("0.4.0"):
        is_error(case.plugin.check(pod, {}, case.version), 1)
    if case.plugin.is_control:
        return  # GC and STATUS are unknown to it: code 4
    if not case.at_least("1.1.0"):
        is_error(case.plugin.call("GC", case.plugin.configuration(case.version)), 1)
        is_error(case.plugin.call("STATUS", case.plugin.configuration(case.version)), 1)


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
