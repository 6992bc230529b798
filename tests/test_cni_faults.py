"""Bad input and faults of the machine: the right code, one clear message, and nothing changed.

What is compared before and after: links, addresses, routes, neighbours and rules of the host and of the pod,
nftables, forwarding, and what the store says is in use.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from crossedge.host import sysctl
from crossedge.host.namespaces import mount, unmount
from tests.cni_runtime import Answer, Node_, Plugin, Pod, our_links, pods
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces

WRITABLE, READ_ONLY = 0x20, 0x21
"""MS_REMOUNT, with MS_RDONLY."""
SHOWN = (
    "ip -d link",
    "ip addr",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip -4 neigh",
    "ip -6 neigh",
    "ip rule",
    "nft list ruleset",
)


@pytest.fixture(params=["daemon", "local"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node_]:
    made = Node_(tmp_path)
    if request.param == "daemon":
        made.start()
    yield made
    made.stop()
    assert not made.traces()
    assert not our_links()


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods() as (made,):
        yield made


def state(node: Node_, pod: Pod) -> dict[str, Any]:
    """Return all that a request could change."""
    found: dict[str, Any] = {"live": node.live()}
    for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        found[name] = sysctl.read(name)
    for command in SHOWN:
        found[command] = subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout
        found["pod " + command] = pod.run(*command.split()).stdout
    return found


@contextmanager
def unchanged(node: Node_, pod: Pod) -> Iterator[None]:
    sysctl.write("net/ipv4/ip_forward", "0")  # as on a machine that never had a pod
    # Of another pod's link the kernel says only after a while that it has a carrier.
    assert eventually(lambda: "NO-CARRIER" not in state(node, pod)["ip -d link"])
    before = state(node, pod)
    yield
    after = state(node, pod)
    assert {key: value for key, value in after.items() if before[key] != value} == {}


def says(answer: Answer, code: int, *words: str) -> None:
    """Check that there is one error, of this code, that says so in one line."""
    assert answer.status == 1
    assert answer.code == code, answer.json
    assert "\n" not in answer.json["msg"]
    text = answer.json["msg"] + " " + answer.json.get("details", "")
    assert all(word in text for word in words), text
    assert not answer.stderr


GOOD = {"cniVersion": "1.1.0", "name": "net", "type": "crossedge"}
BAD_INPUT: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "no-json": (6, {"stdin": b"{"}, ["JSON"]),
    "no-object": (6, {"stdin": b"[]"}, ["JSON object"]),
    "deep": (6, {"stdin": b"[" * 100_000}, ["JSON"]),
    "no-utf8": (6, {"stdin": b'{"name": "\xff"}'}, ["JSON"]),
    "no-name": (7, {"config": {"cniVersion": "1.1.0"}}, ["name"]),
    "version": (1, {"config": {**GOOD, "cniVersion": "9.9.9"}}, ["9.9.9"]),
    "version-no-text": (1, {"config": {**GOOD, "cniVersion": [1]}}, ["[1]"]),
    "previous-result": (7, {"config": {**GOOD, "prevResult": {"ips": [{"address": "x"}]}}}, ["prevResult"]),
    "runtime-config": (7, {"config": {**GOOD, "runtimeConfig": 7}}, ["runtimeConfig"]),
    "ips": (7, {"config": {**GOOD, "runtimeConfig": {"ips": "10.160.1.7"}}}, ["runtimeConfig.ips"]),
    "mac": (7, {"config": {**GOOD, "runtimeConfig": {"mac": "01:00:00:00:00:00"}}}, ["runtimeConfig.mac"]),
    "ip-ranges": (
        2,
        {"config": {**GOOD, "runtimeConfig": {"ipRanges": [[{"subnet": "10.9.0.0/24"}]]}}},
        ["ipRanges", "10.9.0.0/24", "10.160.1.0/24"],
    ),
    "pod-cidrs": (
        7,
        {"config": {**GOOD, "podCIDRs": ["10.160.1.0/24", "10.244.3.0/24"]}},
        ["10.244.3.0/24", "10.160.1.0/24", "Node.spec.podCIDRs"],
    ),
    "pod-cidr-nonsense": (7, {"config": {**GOOD, "podCIDRs": "nonsense"}}, ["podCIDRs", "nonsense"]),
    "container": (4, {"container": "a/b"}, ["CNI_CONTAINERID"]),
    "interface": (4, {"interface": "a" * 16}, ["CNI_IFNAME"]),
    "interface-no-utf8": (4, {"interface": os.fsdecode(b"\xff" * 16)}, ["CNI_IFNAME"]),
    "missing": (4, {"interface": None, "container": None}, ["CNI_CONTAINERID", "CNI_IFNAME"]),
    "arguments": (4, {"arguments": "IP=10.160.1.999"}, ["IP", "10.160.1.999"]),
    "namespace": (8, {"netns": "/run/netns/no-such"}, ["/run/netns/no-such"]),
    "namespace-is-a-file": (8, {"netns": "/etc/hostname"}, ["/etc/hostname"]),
    "command": (4, {"command": "FLY"}, ["FLY", "ADD"]),
}


def test_bad_input_is_one_clear_error_and_changes_nothing(node: Node_, pod: Pod) -> None:
    with unchanged(node, pod):
        for code, given, words in BAD_INPUT.values():
            asked = {"container": pod.id, "netns": pod.path, "interface": "eth0", "config": GOOD, **given}
            says(node.plugin.call(asked.pop("command", "ADD"), **asked), code, *words)


def test_prefixes_that_match_are_taken_and_others_are_status_50(node: Node_, pod: Pod) -> None:
    good = {"runtimeConfig": {"ipRanges": [[{"subnet": "10.160.1.0/24"}]]}, "podCIDRs": list(node.prefixes)}
    node.plugin.add(pod, extra=good).ok()
    node.plugin.delete(pod, extra=good).ok()
    bad = node.plugin.configuration("1.1.0", podCIDRs=["10.244.3.0/24"])
    says(node.plugin.call("STATUS", bad), 50, "10.244.3.0/24", "10.160.1.0/24")


# Faults of the machine


@contextmanager
def store_on(node: Node_, options: str) -> Iterator[Path]:
    """Have the store on a file system of its own, before the daemon is started."""
    text = node.paths.node.read_bytes()
    serving = node.daemon is not None
    node.stop()
    mount("tmpfs", str(node.paths.state), "tmpfs", 0, options)
    try:
        node.paths.node.write_bytes(text)
        if serving:
            node.start()
        yield node.paths.state
    finally:
        node.stop()
        unmount(str(node.paths.state))


def remount(node: Node_, place: Path, flags: int) -> None:
    """Change the mount; a file system with a file that is open to be written stays as it is."""
    serving = node.daemon is not None
    node.stop()
    mount("", str(place), "none", flags)
    if serving:
        node.start()


def test_store_that_becomes_read_only(node: Node_, pod: Pod) -> None:
    with pods() as (other,), store_on(node, "size=1m") as place:
        node.plugin.add(other).ok()
        remount(node, place, READ_ONLY)
        with unchanged(node, pod):
            says(node.plugin.add(pod), 5, str(place), "Read-only")
        says(node.plugin.call("STATUS", GOOD), 50, str(place), "Read-only")
        node.plugin.delete(other).ok()  # best effort: an error would be repeated for ever
        remount(node, place, WRITABLE)
        node.plugin.gc([]).ok()
        assert not node.live()


def test_store_that_is_full(node: Node_, pod: Pod) -> None:
    with pods() as (other,), store_on(node, "size=64k") as place:
        node.plugin.add(other).ok()
        with (place / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))
        log = place / "attachments.log"
        with log.open("ab") as opened:  # up to the end of its page, whose rest costs no space
            opened.write(b"\n" * (4096 - log.stat().st_size % 4096))
        with unchanged(node, pod):
            says(node.plugin.add(pod), 5, str(place), "No space")
            says(node.plugin.call("STATUS", GOOD), 50, str(place), "No space")
        node.plugin.delete(other).ok()
        assert eventually(lambda: not other.links())
        (place / "filler").unlink()
        node.plugin.gc([]).ok()
        assert not node.live()


def test_store_that_is_no_directory(tmp_path: Path, pod: Pod) -> None:
    node = Node_(tmp_path)
    log = node.paths.state / "attachments.log"
    log.mkdir()
    log.joinpath("x").touch()
    answer = node.plugin.add(pod)
    says(answer, 5, str(node.paths.state))
    assert not pod.links()


def add_link(pod: Pod, name: str) -> None:
    subprocess.run(["ip", "link", "add", "eth0", "netns", pod.id, "type", "bridge"], check=True)


def foreign_on_the_host(pod: Pod, name: str) -> None:
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)


@pytest.mark.parametrize("foreign", [add_link, foreign_on_the_host])
def test_foreign_interface_of_the_same_name(
    node: Node_, pod: Pod, foreign: Callable[[Pod, str], None]
) -> None:
    name = node.plugin.add(pod).ok().json["interfaces"][0]["name"]
    node.plugin.delete(pod).ok()
    subprocess.run(["ip", "link", "del", "group", str(0xCE5F)], check=False, capture_output=True)
    foreign(pod, name)
    with unchanged(node, pod):
        says(node.plugin.add(pod), 100, "eth0" if foreign is add_link else name)
    node.plugin.delete(pod).ok()
    subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


def test_kernel_without_ipv6(node: Node_, pod: Pod) -> None:
    mount("tmpfs", "/proc/sys/net/ipv6", "tmpfs", 1)
    try:
        with unchanged(node, pod):
            says(node.plugin.add(pod), 101, "IPv6", "fd00:0:0:1::/64")
            says(node.plugin.call("STATUS", node.plugin.configuration("1.1.0")), 50, "IPv6")
    finally:
        unmount("/proc/sys/net/ipv6")


@pytest.mark.parametrize("text", ['{"prefixes": ["10.160.1.0/33"]}', '{"prefixes": 7}', "nonsense", "[]"])
def test_bad_prefix_of_the_node(tmp_path: Path, pod: Pod, text: str) -> None:
    node = Node_(tmp_path)
    node.paths.node.write_text(text)
    with unchanged(node, pod):
        says(node.plugin.add(pod), 7, str(node.paths.node))


# Who may ask


@pytest.mark.parametrize("served", [True, False])
def test_another_user_is_refused_and_the_binary_says_so(pod: Pod, served: bool) -> None:
    if Path("/proc/self/uid_map").read_text().split()[2] == "1":
        pytest.skip("not run, missing: a second user id")
    root = Path(tempfile.mkdtemp(dir="/run"))
    root.chmod(0o755)
    node = Node_(root)
    node.start()
    try:
        for each in (node.paths.socket.parent, node.paths.socket.parent.parent):
            each.chmod(0o755)
        if served:
            node.paths.socket.chmod(0o666)  # a mistake that the credentials make up for
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "c",
            "CNI_NETNS": pod.path,
            "CNI_IFNAME": "eth0",
        }
        with unchanged(node, pod):
            done = subprocess.run(
                [node.paths.binary],
                input=json.dumps(GOOD).encode(),
                env=environment,
                capture_output=True,
                check=False,
                user=65534,
                group=65534,
                extra_groups=[],
            )
            says(Answer(done.returncode, done.stdout, done.stderr.decode()), 104, "65534", "root")
    finally:
        node.stop()
        shutil.rmtree(root)


def test_binary_runs_its_source_where_its_python_is_another(tmp_path: Path) -> None:
    node = Node_(tmp_path)
    text = node.paths.binary.read_bytes()
    assert text.count(b"loader.MAGIC_NUMBER == b'") == 1
    assert b"marshal.loads(CODE)" in text
    node.paths.binary.write_bytes(text.replace(b"loader.MAGIC_NUMBER == b'", b"loader.MAGIC_NUMBER == b'x"))
    plugin = Plugin(node.paths.binary, "crossedge")
    assert "1.1.0" in plugin.call("VERSION", {}).ok().json["supportedVersions"]
