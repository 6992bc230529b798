"""A thousand nodes, and a flood, at a rendezvous that runs as it does for everybody: process and sockets.

They want the machine to themselves: `make rendezvous-load`.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from crossedge.wire.endpoint import UdpEndpoint
from tests.rendezvous_client import UNIX, Node, World
from tests.rendezvous_fleet import Fleet, SocketRun, check_fleet
from tests.rendezvous_flood import Flooder, Keepalives, Registered
from tests.rendezvous_process import RendezvousProcess, lost_in_kernel

pytestmark = [pytest.mark.slow, pytest.mark.namespaces]

SERVER = UdpEndpoint("127.0.0.1", 3478)


def test_a_thousand_nodes_on_real_sockets_register_pull_and_call_without_loss(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    fleet = Fleet(1000, seed=1, began=time.clock_gettime(time.CLOCK_BOOTTIME), unix=int(time.time()))
    server = RendezvousProcess(tmp_path, fleet.ca.public)
    fleet.server_key = server.public_key
    run = SocketRun(fleet)
    try:
        before = server.status()
        check_fleet(run)
        after = server.status()
    finally:
        run.close()
        server.stop()
    assert after["dropped"] == {}
    assert after["failed_sends"] == {}
    assert lost_in_kernel(SERVER) == 0
    assert after["memory_bytes"] - before["memory_bytes"] < 20_000 * len(fleet.nodes)


def test_flood_of_50000_a_second_costs_no_key_agreement_and_keepalives_are_answered(tmp_path: Path) -> None:
    world = World()
    world.now = time.time() - UNIX
    server = RendezvousProcess(tmp_path, world.ca.public)
    flooder: Flooder | None = None
    nodes: list[Registered] = []
    try:
        world.key = type("Public", (), {"public": server.public_key})()
        nodes = [Registered(Node(world, f"n{number}"), f"127.0.{number + 1}.7") for number in range(50)]
        for node in nodes:
            node.register(SERVER)
        before = server.status()
        # From 200 networks, each second message with a wrong cookie: what costs most to find out.
        flooder = Flooder(SERVER, server.public_key, 50_000, 3.0, 200, 0.5)
        flooder.begin()
        keepalives = Keepalives(nodes, SERVER)
        keepalives.run(2.5, 0.01)
        sent, seconds = flooder.end()
        after = server.status()
    finally:
        if flooder is not None:
            flooder.kill()
        for node in nodes:
            node.close()
        server.stop()
    assert sent / seconds > 45_000, "the flooder was too slow for this to say anything"
    assert after["key_agreements"] == before["key_agreements"]
    assert after["leases"] == 50
    # A keepalive that is lost is repeated twice before a node looks elsewhere.
    assert keepalives.lost <= keepalives.sent // 20
    assert keepalives.quantile(0.5) < 0.3
