"""Real runtimes with the installed plugin: podman with its CNI backend, and libcni's own cnitool.

client (192.0.2.2) ---- the node (192.0.2.1) ---- containers
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

from crossedge.host.namespaces import mount, unmount
from tests.cni_podman import SERVE, Podman, a_podman
from tests.cni_runtime import SYSTEM_PLUGINS, Node_, Pod, pods
from tests.waiting import eventually

pytestmark = [pytest.mark.namespaces, pytest.mark.tool(str(SYSTEM_PLUGINS / "portmap"))]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node_]:
    Path("/var/lib/cni").mkdir(parents=True, exist_ok=True)
    mount("tmpfs", "/var/lib/cni", "tmpfs", 0)  # where libcni keeps results
    made = Node_(tmp_path)
    made.start()
    try:
        yield made
        assert eventually(lambda: not made.traces()), made.traces()
    finally:
        made.stop()
        unmount("/var/lib/cni")


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


@pytest.fixture
def client() -> Iterator[Pod]:
    """Another machine, that reaches the node at 192.0.2.1."""
    with pods() as (made,):
        ip(f"link add uplink type veth peer name eth0 netns {made.id}")
        ip("addr add 192.0.2.1/24 dev uplink")
        ip("link set uplink up")
        with made.namespace:
            ip("addr add 192.0.2.2/24 dev eth0")
            ip("link set eth0 up")
        yield made


def fetch(client: Pod, port: int) -> str:
    script = f"exec 3<>/dev/tcp/192.0.2.1/{port}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    return client.run("timeout", "3", "bash", "-c", script).stdout


# podman


@pytest.fixture
def podman(node: Node_, tmp_path: Path) -> Iterator[Podman]:
    with a_podman(node.paths, tmp_path / "podman") as made:
        yield made


@pytest.mark.tool("podman")
@pytest.mark.tool("runc")
@pytest.mark.tool("busybox")
def test_podman_starts_connects_publishes_and_stops(podman: Podman, node: Node_, client: Pod) -> None:
    assert "crossedge" in podman("network", "ls")
    podman.run("web", "-p", "8080:80", *SERVE)
    podman.run("other", "box", "/bin/sleep", "1000")
    for address in podman.addresses("web"):
        assert "1 packets received" in podman("exec", "other", "/bin/ping", "-c1", "-W2", address)
    assert eventually(lambda: "it works" in fetch(client, 8080))
    assert len(node.live()) == 2
    podman("stop", "-t", "0", "web")
    assert len(node.live()) == 1
    podman("start", "web")
    assert eventually(lambda: "it works" in fetch(client, 8080))
    podman("rm", "-f", "-t", "0", "-a")
    assert not node.live()


@pytest.mark.tool("podman")
@pytest.mark.tool("runc")
@pytest.mark.tool("busybox")
def test_podman_asks_for_address_and_mac_and_works_without_the_daemon(podman: Podman, node: Node_) -> None:
    node.stop()
    ask = ("--ip", "10.160.1.99", "--mac-address", "02:00:00:00:00:99")
    podman.run("fixed", *ask, "box", "/bin/sleep", "1000")
    assert podman.addresses("fixed")[0] == "10.160.1.99"
    assert "02:00:00:00:00:99" in podman("inspect", "fixed")
    node.start()
    podman("rm", "-f", "-t", "0", "-a")
    assert not node.live()


# cnitool


@dataclass
class CniTool:
    node: Node_

    def __call__(
        self, command: str, netns: str, mappings: list[dict[str, Any]] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "NETCONFPATH": str(self.node.paths.conflist.parent),
            "CNI_PATH": f"{self.node.paths.binary.parent}:{SYSTEM_PLUGINS}",
        }
        if mappings:
            environment["CAP_ARGS"] = json.dumps({"portMappings": mappings})
        done = subprocess.run(
            ["cnitool", command, "crossedge", netns],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture
def cnitool(node: Node_) -> CniTool:
    return CniTool(node)


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods() as (made,):
        yield made


@pytest.mark.tool("cnitool")
def test_cnitool_add_check_del_with_cached_results(cnitool: CniTool, pod: Pod) -> None:
    # portmap of Debian knows versions up to 1.0.0, so the chain runs in that one.
    conflist = cnitool.node.paths.conflist
    listed = json.loads(conflist.read_text())
    conflist.write_text(json.dumps({**listed, "cniVersions": ["0.4.0", "1.0.0"]}))
    result = json.loads(cnitool("add", pod.path).stdout)
    assert pod.addresses() == {each["address"].split("/")[0] for each in result["ips"]}
    cnitool("check", pod.path)
    cnitool.node.stop()  # which would set it right
    with pod.namespace:
        subprocess.run(["ip", "addr", "flush", "dev", "eth0", "scope", "global"], check=True)
    assert cnitool("check", pod.path, check=False).returncode
    cnitool.node.start()
    cnitool("del", pod.path)
    assert not cnitool.node.live()
    cnitool("del", pod.path)


@pytest.mark.tool("cnitool")
def test_cnitool_gc_and_status_in_1_1_0(cnitool: CniTool, pod: Pod) -> None:
    conflist = cnitool.node.paths.conflist
    listed = json.loads(conflist.read_text())
    conflist.write_text(json.dumps({**listed, "plugins": listed["plugins"][:1]}))  # ours alone is 1.1.0
    assert json.loads(cnitool("add", pod.path).stdout)["cniVersion"] == "1.1.0"
    cnitool("status", pod.path)
    cnitool("gc", pod.path)  # cnitool lists nothing as valid
    assert not cnitool.node.live()
    cnitool.node.stop()
    assert (
        "meshd"
        in cnitool("status", pod.path, check=False).stderr + cnitool("status", pod.path, check=False).stdout
    )
    cnitool.node.start()


@pytest.mark.tool("cnitool")
def test_portmap_in_the_chain_udp_goes_to_the_second_container(cnitool: CniTool, client: Pod) -> None:
    conflist = cnitool.node.paths.conflist
    listed = json.loads(conflist.read_text())
    conflist.write_text(json.dumps({**listed, "cniVersions": ["0.4.0", "1.0.0"]}))
    mapping = [{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]
    answer = (
        "import socket,sys; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('',53))\n"
        "while True:\n d,a=s.recvfrom(100); s.sendto(sys.argv[1].encode(),a)"
    )
    ask = (
        "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('',4000))\n"
        "s.settimeout(.3); s.sendto(b'?',('192.0.2.1',5353)); print(s.recv(100).decode())"
    )
    with pods(2) as made:
        for name, each in zip(("first", "second"), made, strict=True):
            cnitool("add", each.path, mapping)
            with each.namespace:
                server = subprocess.Popen(["/usr/bin/python3", "-c", answer, name])

            def asked(name: str = name) -> bool:
                return name in client.run("/usr/bin/python3", "-c", ask).stdout

            assert eventually(asked)
            cnitool("del", each.path, mapping)
            server.kill()
            server.wait()
