"""Real daemons in places that look alike: two behind one NAT on one port, two LANs with one prefix.

east ---- meeting (rendezvous)
  |  \\--- left-router (kernel, 192.168.1.0/24) ---- one, two
west ---- right-router (port-restricted, 192.168.1.0/24) ---- three
"""

from __future__ import annotations

from pathlib import Path

import pytest

from crossedge.meshd.config import Listen
from tests.daemon_fleet import a_fleet
from tests.underlays import WEST, behind, two_regions

pytestmark = pytest.mark.namespaces

TOPOLOGY = two_regions(
    "places",
    behind("left-router", "one", "two", lan="192.168.1.0/24"),
    behind("right-router", "three", place=WEST, nat="port-restricted", lan="192.168.1.0/24"),
)


def test_nodes_that_share_a_port_or_a_lan_prefix_all_meet_directly(tmp_path: Path) -> None:
    with a_fleet(TOPOLOGY, tmp_path) as fleet:
        placed = fleet.network.nodes
        assert placed["one"].address4 == placed["three"].address4
        for a, b in (("one", "three"), ("two", "three"), ("one", "two")):
            fleet.go_direct(a, b, 20.0)
        for a, b in (("one", "three"), ("two", "three"), ("one", "two"), ("three", "one"), ("three", "two")):
            assert fleet.ping(a, b, count=10).all
            assert fleet.path(a, b) == "direct"
        inside = fleet.peer("one", "two")["endpoint"]
        assert inside == f"{placed['two'].address4}:{Listen().port}"
