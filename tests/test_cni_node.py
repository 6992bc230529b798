"""The plugin on its node, black-box: addresses, GC, STATUS, faults of the machine, what the daemon keeps."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crossedge.cni.device import LOOPBACK
from crossedge.host.addresses import add_address, delete_address
from crossedge.host.links import get_link
from crossedge.host.namespaces import mount, unmount
from crossedge.host.netlink import Batch, Netlink
from tests.cni_runtime import Answer, Node_, Pod, pods
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces


@pytest.fixture(params=["daemon", "local"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node_]:
    yield from started(Node_(tmp_path), request.param)


@pytest.fixture(params=["daemon", "local"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node_]:
    """A node with room for six pods."""
    yield from started(Node_(tmp_path, ("10.160.1.0/29",)), request.param)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Node_]:
    yield from started(Node_(tmp_path), "daemon")


def started(node: Node_, how: str) -> Iterator[Node_]:
    before = set(node.traces())  # of a test that failed elsewhere
    if how == "daemon":
        node.start()
    try:
        yield node
        assert eventually(lambda: set(node.traces()) <= before), node.traces()
    finally:
        node.stop()


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods() as (made,):
        yield made


def addresses(answer: Answer) -> list[str]:
    return [each["address"].split("/")[0] for each in answer.ok().json["ips"]]


def clear(node: Node_) -> None:
    node.plugin.gc([]).ok()


def status(node: Node_) -> Answer:
    return node.plugin.call("STATUS", node.plugin.configuration("1.1.0"))


# Addresses (host-local's cases)


def test_addresses_go_round(small: Node_) -> None:
    found = []
    for _ in range(8):
        with pods() as (pod,):
            found += addresses(small.plugin.add(pod))
            small.plugin.delete(pod).ok()
    numbers = [int(text.rsplit(".", 1)[1]) for text in found]
    assert numbers[:6] == [1, 2, 3, 4, 5, 6]  # neither the network's nor the broadcast address
    assert numbers[6:] == [1, 2]  # nothing else was left, so that which was freed first


def test_exhausted_is_code_11_and_status_50_and_names_the_prefix(small: Node_) -> None:
    with pods(7) as made:
        for each in made[:6]:
            small.plugin.add(each).ok()
        answer = small.plugin.add(made[6])
        assert answer.code == 11
        assert "10.160.1.0/29" in answer.stdout.decode()
        assert made[6].links() == set()
        assert status(small).code == 50
        small.plugin.delete(made[0]).ok()
        small.plugin.add(made[6]).ok()
        clear(small)


def test_freed_address_cools_down_while_others_are_left(small: Node_) -> None:
    with pods(3) as made:
        freed = addresses(small.plugin.add(made[0]))
        small.plugin.delete(made[0]).ok()
        for each in made[1:]:
            assert addresses(small.plugin.add(each)) != freed
        clear(small)


@pytest.mark.parametrize(
    "way",
    [
        {"arguments": "IgnoreUnknown=1;IP=10.160.1.77"},
        {"extra": {"args": {"cni": {"ips": ["10.160.1.77/24"]}}}},
        {"extra": {"runtimeConfig": {"ips": ["10.160.1.77/24"]}}},
        {"arguments": "IP=10.160.1.78", "extra": {"args": {"cni": {"ips": ["10.160.1.77"]}}}},
    ],
    ids=["CNI_ARGS", "args", "runtimeConfig", "args-over-CNI_ARGS"],
)
def test_requested_address_is_given(node: Node_, way: dict[str, Any]) -> None:
    with pods(2) as (first, second):
        assert addresses(node.plugin.add(first, **dict(way)))[0] == "10.160.1.77"
        taken = node.plugin.add(second, **dict(way))
        assert taken.code == 11
        assert "10.160.1.77" in taken.json["msg"]
        assert second.links() == set()
        clear(node)


@pytest.mark.parametrize("address", ["10.160.2.1", "10.160.1.0", "10.160.1.255", "fd00:0:0:2::1"])
def test_requested_address_out_of_range_is_code_7(served: Node_, pod: Pod, address: str) -> None:
    assert served.plugin.add(pod, arguments=f"IP={address}").code == 7
    assert pod.links() == set()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [("IP=nonsense", 4), ("MAC=nonsense", 4), ("FOO=1", 4), ("FOO", 4), ("IgnoreUnknown=1;FOO=1", 0)],
)
def test_arguments_are_checked(served: Node_, pod: Pod, arguments: str, code: int) -> None:
    assert served.plugin.add(pod, arguments=arguments).code == code
    clear(served)


def test_kubernetes_arguments_are_kept(served: Node_, pod: Pod) -> None:
    arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=till;K8S_POD_UID=7"
    served.plugin.add(pod, arguments=f"{arguments};K8S_POD_INFRA_CONTAINER_ID=1").ok()
    assert served.live()[0]["pod"] == "shop/till"
    clear(served)


def test_unsupported_field_is_code_2(served: Node_, pod: Pod) -> None:
    extra = {"runtimeConfig": {"ipRanges": [[{"subnet": "10.0.0.0/8"}]]}}
    assert served.plugin.add(pod, extra=extra).code == 2


def test_dns_of_the_runtime_overrides(served: Node_, pod: Pod) -> None:
    runtime = {"dns": {"servers": ["10.0.0.1"], "searches": ["a.example"], "options": ["ndots:2"]}}
    answer = served.plugin.add(pod, extra={"dns": {"nameservers": ["10.9.9.9"]}, "runtimeConfig": runtime})
    assert answer.ok().json["dns"] == {
        "nameservers": ["10.0.0.1"],
        "search": ["a.example"],
        "options": ["ndots:2"],
    }
    clear(served)


def test_several_prefixes_are_used_in_turn(tmp_path: Path) -> None:
    node = Node_(tmp_path, ("10.160.1.0/30", "10.160.9.0/30"))
    with pods(5) as made:
        found = [addresses(node.plugin.add(each))[0] for each in made[:4]]
        assert found == ["10.160.1.1", "10.160.1.2", "10.160.9.1", "10.160.9.2"]
        assert node.plugin.add(made[4]).code == 11
        clear(node)


def test_dual_stack_is_all_or_nothing(tmp_path: Path) -> None:
    node = Node_(tmp_path, ("10.160.1.0/24", "fd00:0:0:1::/127"))
    with pods(3) as made:
        for each in made[:2]:
            assert len(addresses(node.plugin.add(each))) == 2
        assert node.plugin.add(made[2]).code == 11
        assert len(node.live()) == 2
        clear(node)


def test_previous_result_is_extended(node: Node_, pod: Pod) -> None:
    before = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "other0"}],
        "ips": [{"address": "192.0.2.1/24", "interface": 0}],
        "routes": [{"dst": "192.0.2.0/24"}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    result = node.plugin.add(pod, extra={"prevResult": before}).ok().json
    assert result["interfaces"][0] == {"name": "other0"}
    assert result["ips"][0] == before["ips"][0]
    for each in result["ips"][1:]:
        assert result["interfaces"][each["interface"]]["name"] == "eth0"
    assert result["routes"][0] == {"dst": "192.0.2.0/24"}
    assert result["dns"] == before["dns"]
    node.plugin.check(pod, result).ok()
    clear(node)


def test_mac_is_stable(node: Node_, pod: Pod) -> None:
    macs = set()
    for _ in range(2):
        macs.add(node.plugin.add(pod).ok().json["interfaces"][1]["mac"])
        node.plugin.delete(pod).ok()
    assert len(macs) == 1


def test_add_right_after_del_waits_for_the_old_link(node: Node_, pod: Pod) -> None:
    for number in range(6):
        container = f"c{number // 2}"  # the same one again, and another in the same sandbox
        config = node.plugin.configuration("1.1.0")
        for command in ("ADD", "DEL"):
            node.plugin.call(command, config, container=container, netns=pod.path, interface="eth0").ok()


# GC and STATUS


def test_the_first_packet_of_a_pod_passes_as_soon_as_add_has_answered(served: Node_) -> None:
    """The kernel notes a link's carrier when it has time; until then the link drops all packets."""
    with Netlink() as netlink:
        batch = Batch()
        add_address(batch, LOOPBACK, ipaddress.ip_interface("192.0.2.1/32"))
        netlink.run(batch)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("192.0.2.1", 9))
            receiver.setblocking(False)
            for number in range(20):
                with pods() as (pod,):
                    with pod.namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sender:
                        served.plugin.add(pod).ok()
                        sender.sendto(bytes([number]), ("192.0.2.1", 9))
                        assert receiver.recv(10) == bytes([number])  # a veth hands over at once
                    served.plugin.delete(pod).ok()
    finally:
        with Netlink() as netlink:
            batch = Batch()
            delete_address(batch, LOOPBACK, ipaddress.ip_interface("192.0.2.1/32"))
            netlink.run(batch)


def test_gc_keeps_what_is_listed_and_frees_the_rest(node: Node_) -> None:
    with pods(3) as made:
        for each in made:
            node.plugin.add(each).ok()
        node.plugin.gc([(made[0].id, "eth0")]).ok()
        assert [entry["container"] for entry in node.live()] == [made[0].id]
        assert eventually(lambda: [bool(each.links()) for each in made] == [True, False, False])
        clear(node)


def test_gc_takes_the_older_key(node: Node_, pod: Pod) -> None:
    node.plugin.add(pod).ok()
    node.plugin.gc([(pod.id, "eth0")], key="cni.dev/attachments").ok()
    assert pod.links() == {"eth0"}
    node.plugin.gc([], key="cni.dev/attachments").ok()
    assert not node.live()


def test_gc_without_a_list_frees_nothing(node: Node_, pod: Pod) -> None:
    node.plugin.add(pod).ok()
    node.plugin.call("GC", node.plugin.configuration("1.1.0")).ok()
    assert pod.links() == {"eth0"}
    clear(node)


def test_gc_with_an_empty_list_of_go_frees_all(node: Node_, pod: Pod) -> None:
    node.plugin.add(pod).ok()
    config = node.plugin.configuration("1.1.0", **{"cni.dev/valid-attachments": None})
    node.plugin.call("GC", config).ok()
    assert not node.live()


def test_gc_leaves_other_networks_alone(node: Node_, pod: Pod) -> None:
    node.plugin.add(pod, extra={"name": "other"}).ok()
    node.plugin.gc([]).ok()
    assert pod.links() == {"eth0"}
    node.plugin.delete(pod, extra={"name": "other"}).ok()


def test_gc_frees_links_that_nobody_has(node: Node_, pod: Pod) -> None:
    node.plugin.add(pod).ok()
    log = node.paths.state / "attachments.log"
    log.unlink()
    clear(node)
    assert eventually(lambda: pod.links() == set())


def test_status_is_well_with_the_daemon_and_50_without(tmp_path: Path) -> None:
    node = Node_(tmp_path)
    assert status(node).code == 50
    assert "meshd" in status(node).json["msg"]
    node.start()
    status(node).ok()
    node.stop()


def test_status_is_51_while_no_peer_is_reachable_and_gates_nothing(served: Node_, pod: Pod) -> None:
    cut_off = served.root / "cut-off"
    cut_off.touch()
    assert status(served).code == 51
    result = served.plugin.add(pod).ok().json
    served.plugin.check(pod, result).ok()
    served.plugin.delete(pod).ok()
    cut_off.unlink()
    status(served).ok()


# Faults of the machine


def test_node_without_a_prefix_is_code_11_and_status_50(tmp_path: Path, pod: Pod) -> None:
    node = Node_(tmp_path)
    node.paths.node.unlink()
    assert node.plugin.add(pod).code == 11
    assert status(node).code == 50


def test_reboot_frees_all_without_any_hand(tmp_path: Path) -> None:
    node = Node_(tmp_path)
    with pods(2) as made:
        before = [addresses(node.plugin.add(each)) for each in made]
    boot = tmp_path / "boot"
    boot.write_text("11111111-2222-3333-4444-555555555555\n")
    mount(str(boot), "/proc/sys/kernel/random/boot_id", "none", 0x1000)
    try:
        node.start()
        with pods(1) as (pod,):
            assert addresses(node.plugin.add(pod)) not in before  # the turn goes on
            assert [entry["container"] for entry in node.live() if entry["boot"].startswith("1111")] == [
                pod.id
            ]
            program = Path(sys.executable).with_name("crossedge-cni")
            command = [str(program), "--root", str(tmp_path), "ips", "--json"]
            listed = subprocess.run(command, capture_output=True, check=True)
            assert [row["container"] for row in json.loads(listed.stdout)] == [pod.id]
            node.plugin.delete(pod).ok()
    finally:
        node.stop()
        unmount("/proc/sys/kernel/random/boot_id")


# The daemon, and its absence


def test_daemon_adopts_what_was_done_without_it_and_the_other_way_round(tmp_path: Path) -> None:
    node = Node_(tmp_path)
    with pods(3) as made:
        first = addresses(node.plugin.add(made[0]))
        node.start()
        second = node.plugin.add(made[1])
        assert not set(first) & set(addresses(second))
        node.plugin.delete(made[0]).ok()
        node.stop()
        assert made[1].run("ping", "-c1", "-W1", "169.254.1.1").returncode != 2
        node.plugin.check(made[1], second.json).ok()
        node.plugin.delete(made[1]).ok()
        node.start()
        node.plugin.add(made[2]).ok()
        node.plugin.delete(made[2]).ok()
        assert eventually(lambda: not node.traces()), node.traces()
        node.stop()


def test_daemon_that_dies_while_it_serves_is_replaced_by_the_shim(tmp_path: Path, pod: Pod) -> None:
    node = Node_(tmp_path)
    node.start()
    node.stop(9)  # its socket stays, and nobody listens
    node.plugin.add(pod).ok()
    node.plugin.delete(pod).ok()
    assert not node.live()


@contextmanager
def two_joined(served: Node_) -> Iterator[tuple[Pod, Pod, dict[str, Any], list[str]]]:
    """Attach a pod and another that reaches it; yield both, with the result and addresses of the first."""
    with pods(2) as (pod, other):
        result = served.plugin.add(pod).ok().json
        served.plugin.add(other).ok()
        addresses = [each["address"].split("/")[0] for each in result["ips"]]
        assert other.run("ping", "-c1", "-W1", addresses[0]).returncode == 0
        yield pod, other, result, addresses


HARMS = {
    "link": "ip link del {link}",
    "route": "ip route del {v4}",
    "route-6": "ip -6 route del {v6}",
    "link-down": "ip link set {link} down",
    "neighbour": "ip neigh del {v4} dev {link}",
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_deleted_by_hand_is_back_within_a_second(served: Node_, harm: str) -> None:
    with two_joined(served) as (pod, other, result, (v4, v6)):
        link = result["interfaces"][0]["name"]
        subprocess.run(HARMS[harm].format(link=link, v4=v4, v6=v6).split(), check=True)
        with Netlink() as netlink:

            def whole() -> bool:
                found = get_link(netlink, link)
                listed = subprocess.run(
                    ["ip", "neigh", "show", "dev", link], capture_output=True, text=True, check=False
                ).stdout
                return found is not None and found.up and v4 in listed

            assert eventually(whole)
        for address in (v4, v6):
            done = eventually(lambda a=address: other.run("ping", "-c1", "-W0.2", a).returncode == 0)
            assert done, served.traces()
        assert pod.ip("link", "show", "eth0")[0]["address"] == result["interfaces"][1]["mac"]
        served.plugin.check(pod, result).ok()
        clear(served)


HARMS_INSIDE = {
    "link": "ip link del eth0",
    "link-down": "ip link set eth0 down",
    "address": "ip addr del {v4}/32 dev eth0",
    "address-6": "ip addr del {v6}/128 dev eth0",
    "all-addresses": "ip addr flush dev eth0",
    "default-route": "ip route del default",
    "default-route-6": "ip -6 route del default",
    "gateway-route": "ip route flush dev eth0",
    "neighbour": "ip neigh del 169.254.1.1 dev eth0",
    "neighbour-6": "ip neigh del fe80::1 dev eth0",
}


@pytest.mark.parametrize("harm", HARMS_INSIDE)
def test_what_is_deleted_inside_the_pod_is_back_within_a_second(served: Node_, harm: str) -> None:
    with two_joined(served) as (pod, other, result, (v4, v6)):
        done = pod.run(*HARMS_INSIDE[harm].format(v4=v4, v6=v6).split())
        assert done.returncode == 0, done.stderr
        assert eventually(lambda: served.plugin.check(pod, result).status == 0)
        for address in (v4, v6):
            back = eventually(lambda a=address: other.run("ping", "-c1", "-W0.2", a).returncode == 0, 1.0)
            assert back, (address, served.traces())
        clear(served)


def test_default_route_that_leads_elsewhere_is_left(served: Node_, pod: Pod) -> None:
    result = served.plugin.add(pod).ok().json
    v4 = result["ips"][0]["address"]
    for command in (
        "link add vpn0 type bridge",
        "link set vpn0 up",
        "addr add 192.0.2.1/24 dev vpn0",
        "route replace default via 192.0.2.2",
        f"addr del {v4} dev eth0",
    ):
        assert pod.run("ip", *command.split()).returncode == 0
    assert eventually(lambda: v4.split("/")[0] in pod.addresses())
    assert [each["gateway"] for each in pod.ip("-4", "route", "show", "default")] == ["192.0.2.2"]
    served.plugin.check(pod, result).ok()
    clear(served)


def test_pods_keep_their_traffic_while_the_daemon_restarts(served: Node_) -> None:
    with pods(2) as (pod, other):
        (v4, _) = addresses(served.plugin.add(pod))
        served.plugin.add(other).ok()
        with other.namespace:
            ping = subprocess.Popen(
                ["ping", "-i", "0.05", "-c", "40", "-W", "1", v4], stdout=subprocess.PIPE, text=True
            )
        served.stop()
        served.start()
        output = ping.communicate(timeout=20)[0]
        assert "40 received" in output, output
        clear(served)
