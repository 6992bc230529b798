"""A daemon that is restarted by a service manager which keeps its descriptors: nobody outside notices."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from crossedge.host.device import attached_name
from crossedge.lab.demo_mesh import CONFIG, program
from tests.daemon_fleet import DEVICES, EACH_DEVICE, Fleet, a_fleet, longest_gap
from tests.underlays import FARM, HOME, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

INTERVAL = 0.02
TOPOLOGY = two_regions("inherit", FARM, HOME)
ANY_PORT = "[listen]\nport = 0\n"
LAUNCHER = """
import fcntl, os, sys
numbers, names, *command = sys.argv[1:]
safe = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 100) for number in numbers.split(",") if number]
for position, number in enumerate(safe):
    os.dup2(number, 3 + position)
    os.close(number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(safe)), "LISTEN_FDNAMES": names}
os.execv(command[0], command)
"""


class ServiceManager:
    """Keeps what a daemon asks it to keep, and hands it to the next start, as systemd does."""

    def __init__(self, path: Path) -> None:
        self.kept: dict[str, list[int]] = {}
        self.said: list[str] = []
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def listen(self) -> None:
        """Do what the daemon has asked for until now."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 8)
            except BlockingIOError:
                return
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            self.said.append(data.decode())
            if "FDSTORE" in words:
                self.kept.setdefault(words["FDNAME"], []).extend(descriptors)
            if "FDSTOREREMOVE" in words:
                for number in self.kept.pop(words["FDNAME"], []):
                    os.close(number)

    @property
    def ready(self) -> bool:
        """Whether the daemon of the last start has said that it is up."""
        self.listen()
        return any("READY=1" in text for text in self.said)

    def start(self, fleet: Fleet, node: str) -> None:
        """Start a node's daemon with everything that is kept, and wait until it is up."""
        self.said.clear()
        given = [(name, number) for name, numbers in self.kept.items() for number in numbers]
        member = fleet.member(node)
        daemon = [*program("meshd"), "run", "--root", str(member.root), "--config", str(member.root / CONFIG)]
        numbers = ",".join(str(number) for _, number in given)
        names = ":".join(name for name, _ in given)
        with (fleet.output / f"{node}.log").open("ab") as log:
            fleet.mesh.processes[node] = fleet.network.popen(
                node,
                [sys.executable, "-S", "-c", LAUNCHER, numbers, names, *daemon],
                stdout=log,
                stderr=log,
                pass_fds=[number for _, number in given],
                env={**os.environ, "NOTIFY_SOCKET": str(self._path)},
            )
        until(f"{node} is up", lambda: self.ready, 10.0)

    def close(self) -> None:
        """Forget everything."""
        for numbers in self.kept.values():
            for number in numbers:
                os.close(number)
        self._socket.close()


@pytest.fixture(scope="module", params=EACH_DEVICE)
def device(request: pytest.FixtureRequest) -> str:
    """The kind of the barn's device."""
    return str(request.param)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Fleet]:
    configs = {"barn": DEVICES[device] + ANY_PORT}
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("inherit"), configs=configs) as made:
        assert made.status("barn")["host"]["tun"]["kind"] == device
        yield made


@pytest.fixture(scope="module")
def manager(fleet: Fleet) -> Iterator[ServiceManager]:
    made = ServiceManager(fleet.output / "notify")
    fleet.mesh.end("barn")
    made.start(fleet, "barn")
    yield made
    made.close()


def seen_as(fleet: Fleet) -> str:
    """Return where the rendezvous sees the barn."""
    until("the barn is registered", lambda: fleet.status("barn")["rendezvous"][0]["observed"], 8.0)
    return str(fleet.status("barn")["rendezvous"][0]["observed"])


def echo_pair(fleet: Fleet, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection between the two pods."""
    barn = fleet.member("barn")
    listener = stack.enter_context(fleet.open(barn.pod, socket.create_server, (barn.pod4, 7000)))
    client = stack.enter_context(fleet.open(fleet.member("attic").pod, socket.socket))
    client.settimeout(10.0)
    client.connect((barn.pod4, 7000))
    server = stack.enter_context(listener.accept()[0])
    server.settimeout(10.0)
    return client, server


def test_a_restart_takes_over_tun_and_sockets_and_nobody_outside_notices(
    fleet: Fleet, manager: ServiceManager
) -> None:
    assert sorted(manager.kept) == ["tun", "udp4", "udp6"]
    assert all(len(numbers) == 1 for numbers in manager.kept.values())
    before = seen_as(fleet)
    fleet.go_direct("attic", "barn")
    with ExitStack() as stack:
        client, server = echo_pair(fleet, stack)
        client.sendall(b"before")
        assert server.recv(100) == b"before"
        ping = fleet.pinging("attic", "barn", count=1000, interval=INTERVAL)
        assert fleet.mesh.end("barn", signal.SIGTERM) == 0
        assert "LOWER_UP" in fleet.run("barn", "ip link show crossedge0").stdout
        client.sendall(b"meanwhile")
        manager.start(fleet, "barn")
        assert "taken over from an earlier life: tun, udp4, udp6" in fleet.log("barn")
        assert server.recv(100) == b"meanwhile"
        server.sendall(b"after")
        assert client.recv(100) == b"after"
        print("dark", longest_gap(ping.stop()) * INTERVAL)
    assert seen_as(fleet) == before
    manager.listen()
    assert {name: len(numbers) for name, numbers in manager.kept.items()} == {"udp4": 1, "udp6": 1, "tun": 1}
    until("the pair is direct", lambda: fleet.path("attic", "barn") == "direct", 5.0)


def test_a_tun_that_was_deleted_is_no_longer_kept(fleet: Fleet, manager: ServiceManager) -> None:
    fleet.run("barn", "ip link delete crossedge0")
    until("the pods are joined again", lambda: fleet.answers("attic", "barn"), 3.0)
    manager.listen()
    (kept,) = manager.kept["tun"]
    with fleet.network.site("barn").namespace:
        assert attached_name(kept) == "crossedge0"


@pytest.mark.pair
def test_a_restart_with_another_kind_of_device_keeps_that_ones_descriptor(
    fleet: Fleet, manager: ServiceManager, device: str
) -> None:
    config = fleet.member("barn").root / CONFIG
    (other,) = DEVICES.keys() - {device}
    for kind in (other, device):
        assert fleet.mesh.end("barn", signal.SIGTERM) == 0
        config.write_text(DEVICES[kind] + ANY_PORT)
        manager.start(fleet, "barn")
        assert fleet.status("barn")["host"]["tun"]["kind"] == kind
        until("the pods are joined", lambda: fleet.answers("attic", "barn"), 5.0)
        manager.listen()
        assert {name: len(numbers) for name, numbers in manager.kept.items()} == {
            "udp4": 1,
            "udp6": 1,
            "tun": 1,
        }
        (kept,) = manager.kept["tun"]
        assert attached_name(kept) == "crossedge0"


def test_what_no_longer_fits_is_closed_and_the_daemon_starts(
    fleet: Fleet, manager: ServiceManager, device: str
) -> None:
    fleet.mesh.end("barn", signal.SIGKILL)
    config = fleet.member("barn").root / CONFIG
    config.write_text(DEVICES[device] + "[listen]\nport = 5555\nipv6 = false\n")
    manager.kept["tun"] += [os.open("/dev/null", os.O_RDWR)]
    manager.start(fleet, "barn")
    manager.listen()
    assert sorted(manager.kept) == ["tun", "udp4"]
    assert [len(numbers) for numbers in manager.kept.values()] == [1, 1]
    with socket.socket(fileno=os.dup(manager.kept["udp4"][0])) as kept:
        assert kept.getsockname() == ("0.0.0.0", 5555)
    until("the pods are joined", lambda: fleet.answers("attic", "barn"), 5.0)
