"""Pods and the daemon: attached by the installed plugin, whether the daemon runs, is replaced, or is cut off.

east ---- meeting                        the rendezvous
  '------ home (kernel NAT) ---- attic
west ---- farm (port-restricted) ---- barn
  '------ yard
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crossedge.cni.device import GROUP, LEAVING
from crossedge.cni.node import Paths
from crossedge.host.links import list_links
from crossedge.lab.launch import ROOTS
from crossedge.lab.runtime import Runtime
from crossedge.lab.topology import Conditions
from tests.daemon_fleet import Fleet, a_fleet, longest_gap, run_here
from tests.fair_clock import FairClock
from tests.underlays import FARM, HOME, WEST, node, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

INTERVAL = 0.02
WINDOW = 6.0
"""Seconds without any peer after which the attic says that it is cut off; 60 by default."""
BACK_WITHIN = 5.0
DARK_AT_MOST = 3.0
"""Seconds between the answers of a pod while the daemon of its node is replaced."""
TOPOLOGY = two_regions("pods", HOME, FARM, node("yard", WEST))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    configs = {"attic": f"[pods]\nunreachable_after = {WINDOW}\n"}
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("pods"), configs=configs) as made:
        yield made


def runtime(fleet: Fleet, node: str = "attic") -> Runtime:
    return fleet.network.nodes[node].runtime


def code(fleet: Fleet) -> int:
    """Return the code of the attic's STATUS, by the installed binary; 0: success."""
    return int(runtime(fleet).status().get("code", 0))


def links(fleet: Fleet, node: str = "attic") -> int:
    """Return how many links of pods a node has."""
    found = list_links(fleet.network.nodes[node].site.netlink)
    return sum(link.group in (GROUP, LEAVING) for link in found)


def addresses(fleet: Fleet, node: str = "attic") -> dict[str, str]:
    """Return the addresses that are in use on a node, by container."""
    rows = json.loads(run_here("crossedge-cni", "--root", str(ROOTS / node), "ips", "--json"))
    return {row["container"]: row["addresses"][0] for row in rows if row["state"] == "in use"}


class Stream:
    """An open connection between two pods that echoes a number every 10 ms, until `close`."""

    def __init__(self, fleet: Fleet, server: str, client: str) -> None:
        there, here = fleet.member(server), fleet.member(client)
        self._listener = fleet.open(there.pod, socket.create_server, (there.pod4, 7000))
        self._client = fleet.open(here.pod, socket.socket, socket.AF_INET, socket.SOCK_STREAM)
        self._client.settimeout(20.0)
        self._client.connect((there.pod4, 7000))
        self._server, _ = self._listener.accept()
        self._end = threading.Event()
        self.error: Exception | None = None
        self.answered: list[float] = []
        self._threads = [threading.Thread(target=each) for each in (self._echo, self._ask)]
        for thread in self._threads:
            thread.start()

    def _echo(self) -> None:
        while data := self._server.recv(4096):
            self._server.sendall(data)

    def _ask(self) -> None:
        try:
            number = 0
            while not self._end.is_set():
                number += 1
                self._client.sendall(number.to_bytes(8, "big"))
                assert self._client.recv(8, socket.MSG_WAITALL) == number.to_bytes(8, "big")
                self.answered.append(time.monotonic())
                self._end.wait(0.01)
        except Exception as error:
            self.error = error
        finally:
            self._client.close()

    def close(self) -> float:
        """End it; return the longest time between two answers in seconds; it fails if anything was lost."""
        self._end.set()
        for thread in self._threads:
            thread.join(25.0)
        for each in (self._server, self._listener):
            each.close()
        assert self.error is None
        return max(b - a for a, b in zip(self.answered, self.answered[1:], strict=False))


def test_an_open_stream_and_pings_of_a_pod_outlive_the_daemon_and_pods_come_and_go_meanwhile(
    fleet: Fleet,
) -> None:
    fleet.go_direct("attic", "barn")
    pods = runtime(fleet)
    fleet.network.attach_pod("attic", "before")
    stream = Stream(fleet, "barn", "attic")
    pings = fleet.pinging("barn", "attic", count=2000, interval=INTERVAL)
    clock, begun = FairClock(), time.monotonic()
    assert fleet.mesh.end("attic", signal.SIGTERM) == 0
    stopped = time.monotonic()
    assert code(fleet) == 50
    during = fleet.network.attach_pod("attic", "during")
    fleet.network.detach_pod("attic", "before")
    held = addresses(fleet)
    assert held.keys() == {"pod-attic", "pod-during"}
    down = time.monotonic() - stopped
    fleet.start("attic")
    until("it serves pods again", lambda: code(fleet) == 0, 10.0)
    seen, silent = pings.stop(), stream.close()
    print(
        f"stop {stopped - begun:.2f} s, down for {down:.2f} s more; "
        f"pings dark {longest_gap(seen) * INTERVAL:.2f} s, stream silent {silent:.2f} s"
    )
    allowed = down + DARK_AT_MOST + clock.waited
    assert longest_gap(seen) * INTERVAL < allowed
    assert silent < 2 * allowed + 1.0  # TCP waits twice as long each time
    assert addresses(fleet) == held
    assert links(fleet) == 2
    # What was attached meanwhile is served, kept and detached by the daemon.
    ping = ["ping", "-n", "-c", "1", "-W", "1", during.address(4)]
    until("it is reached", lambda: fleet.network.run(fleet.member("barn").pod, ping).returncode == 0, 3.0)
    fleet.run("attic", f"ip route del {during.address(4)}")
    until("its route is back", lambda: fleet.network.run("attic", ping).returncode == 0, 1.0)
    fleet.network.detach_pod("attic", "during")
    served = fleet.status("attic")["pods"]["served"]
    assert served["DEL"] == 1
    until("its link is gone", lambda: links(fleet) == 1, 2.0)
    assert addresses(fleet).keys() == {"pod-attic"}
    assert pods.pods.keys() == {"pod-attic"}


def test_status_is_51_when_no_peer_is_reached_and_success_as_soon_as_one_is(fleet: Fleet) -> None:
    fleet.go_direct("attic", "barn")
    until("STATUS is success", lambda: code(fleet) == 0, BACK_WITHIN)
    conditions = fleet.network.wires["east-west"]
    assert isinstance(conditions, Conditions)
    fleet.network.set_wire("east-west", conditions, cut=True)
    taken = until("STATUS says that pods are cut off", lambda: code(fleet) == 51, WINDOW + 12.0)
    print("cut off after", taken)
    assert taken > WINDOW / 2
    answer = runtime(fleet).status()
    assert "no peer was reached" in answer["msg"]
    problems = [each["what"] for each in fleet.status("attic")["problems"]]
    assert any("pods here are cut off" in each for each in problems)
    other = fleet.network.attach_pod("attic", "other")  # STATUS gates nothing
    assert fleet.run("attic", f"ping -n -c 1 -W 1 {other.address(4)}").returncode == 0
    fleet.network.detach_pod("attic", "other")
    fleet.network.set_wire("east-west", conditions)
    print("back after", until("STATUS is success", lambda: code(fleet) == 0, BACK_WITHIN))


def test_runtimes_find_the_network_when_the_daemon_is_ready_and_not_before_and_after_it_stops(
    fleet: Fleet,
) -> None:
    paths = Paths(ROOTS / "yard")
    command = ("crossedge-cni", "--root", str(ROOTS / "yard"))

    def install() -> dict[str, Any]:
        return dict(json.loads(run_here(*command, "install", "--no-portmap", "--json")))

    assert fleet.mesh.end("yard", signal.SIGTERM) == 0
    assert paths.conflist.exists()
    run_here(*command, "uninstall")
    assert [Path(each) for each in install()["written"]] == [paths.binary, paths.prepared]
    assert not paths.conflist.exists()
    fleet.start("yard")
    until("the conflist is there", paths.conflist.exists, 10.0)
    until("what was prepared is gone, which goes after that", lambda: not paths.prepared.exists(), 1.0)
    run_here(*command, "uninstall")
    with fleet.network.nodes["yard"].site.namespace:
        assert [Path(each) for each in install()["written"]] == [paths.binary, paths.conflist]
    assert fleet.mesh.end("yard", signal.SIGTERM) == 0
    assert paths.conflist.exists()
    fleet.start("yard")
