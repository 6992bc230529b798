"""Leaks are proven by two observations and a last check; a pod only out of sight keeps its address."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crossedge.cni import device
from crossedge.cni.ipam import ADDED, SUSPICION, Entry
from crossedge.cni.node import Node, Paths, read_node, write_node
from crossedge.cni.recovery import recover
from crossedge.cni.serve import CniServer
from crossedge.cni.spec import EXISTS, CniError
from crossedge.cni.store import Store
from crossedge.host.netlink import Netlink, Reply
from tests.cni_runtime import Node_, Pod, our_links, pods
from tests.waiting import eventually

pytestmark = pytest.mark.namespaces
PREFIX = ipaddress.ip_network("10.160.1.0/24")


class World:
    """A store with one attachment, a clock, and the pod's namespace."""

    def __init__(self, directory: Path, pod: Pod) -> None:
        self.now = 1000.0
        self.store = Store(directory, "boot", lambda: self.now)
        self.netlink = Netlink()
        draft = Entry(
            0,
            "net",
            pod.id,
            "eth0",
            (),
            host=device.host_name("net", pod.id, "eth0"),
            mac="02:00:00:00:00:01",
            host_mac="02:00:00:00:00:02",
            netns=pod.path,
            inode=pod.namespace.inode,
            boot="boot",
        )
        with self.store.transaction() as change:
            entry = change.put(change.ledger.reserve(draft, [PREFIX], ()))
        device.set_up(self.netlink, entry, pod.namespace, Node((PREFIX,)))
        with self.store.transaction() as change:
            self.entry = change.put(replace(entry, state=ADDED, changed=self.now))

    def observe(self, after: float) -> bool:
        """Look after some seconds; return whether the address was freed."""
        self.now += after
        return bool(recover(self.store, self.netlink))


class Reaping(Netlink):
    """A socket that has what was taken down deleted by another one, just before it is first asked."""

    def __init__(self) -> None:
        super().__init__()
        self.reaped = False

    def get(self, kind: int, body: bytes, what: str, flags: int = 0) -> list[Reply]:
        if not self.reaped:
            with Netlink() as other:
                device.reap(other)
            self.reaped = True
        return super().get(kind, body, what, flags)


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods() as (made,):
        yield made


@pytest.fixture
def world(tmp_path: Path, pod: Pod) -> Iterator[World]:
    made = World(tmp_path, pod)
    yield made
    device.remove(made.netlink, [made.entry.host])
    made.netlink.close()
    made.store.close()


def test_pod_that_lives_is_never_suspected(world: World) -> None:
    assert not any(world.observe(100) for _ in range(3))
    assert not world.store.look().live[world.entry.key].suspect


def test_link_that_goes_while_it_is_looked_at_leaves_its_name_free(world: World, pod: Pod) -> None:
    device.take_down(world.netlink, [world.entry.host])
    with Reaping() as netlink:
        device.set_up(netlink, world.entry, pod.namespace, Node((PREFIX,)))
        assert netlink.reaped
    assert pod.links() == {"eth0"}


def test_link_that_was_taken_down_gives_its_name_up_at_once(world: World, pod: Pod) -> None:
    device.take_down(world.netlink, [world.entry.host])
    device.set_up(world.netlink, world.entry, pod.namespace, Node((PREFIX,)))
    assert pod.links() == {"eth0"}


def test_foreign_interface_keeps_its_name(world: World, pod: Pod) -> None:
    device.remove(world.netlink, [world.entry.host])
    assert pod.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other0").returncode == 0
    with pytest.raises(CniError) as caught:
        device.set_up(world.netlink, world.entry, pod.namespace, Node((PREFIX,)))
    assert caught.value.code == EXISTS
    assert pod.links() == {"eth0", "other0"}


def test_leak_takes_two_observations_apart_in_time(world: World, pod: Pod) -> None:
    pod.namespace.delete()
    assert eventually(lambda: world.entry.host not in device.host_links(world.netlink))
    assert not world.observe(100)  # seen once
    assert not world.observe(SUSPICION / 2)  # too soon
    assert world.observe(SUSPICION)
    assert not world.store.look().live


def test_resurrected_pod_keeps_its_address(world: World, pod: Pod) -> None:
    hidden = Path(pod.path).with_name("hidden")
    device.remove(world.netlink, [world.entry.host])
    hidden.touch()
    subprocess.run(["mount", "--bind", pod.path, hidden], check=True)
    subprocess.run(["umount", pod.path], check=True)
    assert not world.observe(100)
    assert world.store.look().live[world.entry.key].suspect
    subprocess.run(["mount", "--bind", hidden, pod.path], check=True)
    subprocess.run(["umount", hidden], check=True)
    assert not world.observe(SUSPICION + 1)
    assert not world.store.look().live[world.entry.key].suspect  # a further leak starts from the beginning
    assert not world.observe(SUSPICION + 1)
    assert world.entry.key in world.store.look().live


def test_leak_that_a_request_is_working_on_is_left(world: World, pod: Pod) -> None:
    pod.namespace.delete()
    assert eventually(lambda: world.entry.host not in device.host_links(world.netlink))
    world.observe(100)
    with world.store.attachment(world.entry.key):
        assert not world.observe(SUSPICION + 1)
    assert world.observe(1)


@pytest.mark.asyncio
async def test_server_frees_leaks_by_itself(
    tmp_path: Path, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossedge.cni.serve.SUSPICION", 0.05)
    monkeypatch.setattr("crossedge.cni.recovery.SUSPICION", 0.05)
    node = Node_(tmp_path)
    node.plugin.add(pod).ok()
    server = CniServer(Paths(tmp_path), Node((PREFIX,)))
    server.start(asyncio.get_running_loop())
    pod.namespace.delete()
    for _ in range(100):
        await asyncio.sleep(0.03)
        if not node.live():
            break
    server.stop()
    assert not node.live()


# The command


def command(root: Path, *arguments: str, status: int = 0) -> str:
    program = Path(sys.executable).with_name("crossedge-cni")
    done = subprocess.run(
        [program, "--root", root, *arguments], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_command_shows_checks_and_frees(tmp_path: Path) -> None:
    node = Node_(tmp_path)
    with pods() as (pod,):
        node.plugin.add(pod).ok()
        (row,) = json.loads(command(tmp_path, "ips", "--json"))
        assert row["container"] == pod.id
        assert row["addresses"] == ["10.160.1.1", "fd00:0:0:1::1"]
        assert row["state"] == "in use"
        assert pod.id in command(tmp_path, "ips")
        assert json.loads(command(tmp_path, "check", "--json")) == {"problems": []}
    assert eventually(lambda: not our_links())
    assert "is gone" in command(tmp_path, "check", status=1)
    assert "seems gone" in command(tmp_path, "gc")
    assert node.live()  # seen once
    node.plugin.delete(pod).ok()
    assert json.loads(command(tmp_path, "gc", "--json")) == {"freed": [], "links": [], "suspects": []}


def test_command_uninstalls_all_once_no_pod_has_an_address(tmp_path: Path) -> None:
    node = Node_(tmp_path)
    listed = json.loads(node.paths.conflist.read_text())
    assert listed["cniVersion"] == "1.0.0"
    assert listed["cniVersions"] == ["0.4.0", "1.0.0", "1.1.0"]
    with pods() as (pod,):
        node.plugin.add(pod).ok()
        found = json.loads(command(tmp_path, "uninstall", "--json"))
        assert set(found["removed"]) == {str(node.paths.binary), str(node.paths.conflist)}
        assert found["attachments"] == 1
        assert "1 attachments" in command(tmp_path, "uninstall")
        Node_(tmp_path).plugin.delete(pod).ok()
    assert str(node.paths.state) in command(tmp_path, "uninstall")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not node.paths.state.exists()
    assert command(tmp_path, "uninstall") == "nothing to remove\n"


def test_command_says_what_is_missing_and_makes_nothing(tmp_path: Path) -> None:
    problems = json.loads(command(tmp_path, "check", "--json", status=1))["problems"]
    assert [each for each in problems if "opt/cni/bin/crossedge is missing" in each]
    assert [each for each in problems if "no pod prefix yet" in each]
    assert "joined a network" in command(tmp_path, "install", status=1)
    assert command(tmp_path, "ips") == "none\n"
    assert json.loads(command(tmp_path, "ips", "--json")) == []
    assert not list(tmp_path.iterdir())
    bad = tmp_path / "bad.bundle"
    bad.write_text("nonsense")
    assert str(bad) in command(tmp_path, "install", "--bundle", str(bad), status=1)
    for name in ("install", "uninstall", "check", "gc", "ips"):
        assert "--json" in command(tmp_path, name, "--help")


def test_command_installs_from_the_bundle(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("crossedge")

    def crossedge(*arguments: str) -> None:
        subprocess.run([program, "--root", tmp_path, *arguments], check=True, capture_output=True)

    crossedge("ca", "init")
    request = tmp_path / "edge1.request"
    crossedge("node", "init", "--name", "edge1", "-o", str(request))
    bundle = tmp_path / "edge1.bundle"
    rendezvous = f"rendezvous.example:3478#{base64.b64encode(bytes(range(32))).decode()}"
    crossedge("ca", "sign", str(request), "--rendezvous", rendezvous, "-o", str(bundle))
    found = json.loads(command(tmp_path, "install", "--bundle", str(bundle), "--json"))
    assert len(found["prefixes"]) == 2
    (problem,) = json.loads(command(tmp_path, "check", "--json", status=1))["problems"]
    assert "waits for meshd to be ready" in problem
    command(tmp_path, "install", "--bundle", str(bundle), "--now")
    assert json.loads(command(tmp_path, "check", "--json")) == {"problems": []}
    said_by_daemon = replace(read_node(Paths(tmp_path)), mtu=1300, big_tcp=True)
    write_node(Paths(tmp_path), said_by_daemon)
    match = ("--pod-cidr", found["prefixes"][0])
    assert command(tmp_path, "install", "--bundle", str(bundle), *match)
    said = command(
        tmp_path, "install", "--bundle", str(bundle), *match, "--pod-cidr", "10.244.3.0/24", status=1
    )
    assert "10.244.3.0/24" in said
    assert found["prefixes"][0] in said
    assert read_node(Paths(tmp_path)) == said_by_daemon
    with pods() as (pod,):
        node = Node_.__new__(Node_)
        node.paths, node.root = Paths(tmp_path), tmp_path
        assert json.loads(node.paths.node.read_text())["prefixes"] == found["prefixes"]
        done = subprocess.run(
            [node.paths.binary],
            input=b'{"cniVersion":"1.0.0","name":"crossedge","type":"crossedge"}',
            env={
                "CNI_COMMAND": "ADD",
                "CNI_CONTAINERID": pod.id,
                "CNI_NETNS": pod.path,
                "CNI_IFNAME": "eth0",
                "PATH": os.environ["PATH"],
            },
            capture_output=True,
            check=True,
        )
        address = json.loads(done.stdout)["ips"][0]["address"].split("/")[0]
        assert ipaddress.ip_address(address) in ipaddress.ip_network(found["prefixes"][0])
