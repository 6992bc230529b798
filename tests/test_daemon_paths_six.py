"""Narrow links under IPv6: what pods send arrives, whether or not anybody tells how narrow they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon_fleet import Fleet, a_fleet
from tests.narrow_links import Narrow, check_narrow
from tests.underlays import WEST, behind, inside, node, two_regions

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

OUTER = 48
"""Bytes of the IPv6 and UDP headers around a datagram."""
TOPOLOGY = two_regions(
    "paths-six",
    behind("home", nat="symmetric-random", ipv6=True),
    inside("home", "attic", ipv6=True),
    behind("narrow", place=WEST, nat="symmetric-random", ipv6=True, link={"mtu": 1280, "mtu_icmp": False}),
    inside("narrow", "hut", ipv6=True),
    servers=node("meeting", role="server", ipv6=True),
)
"""By IPv4 this pair cannot be direct, so what is direct is IPv6."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("six")) as made:
        yield made


@pytest.mark.parametrize("told", [False, True], ids=["black-hole", "icmp"])
@pytest.mark.parametrize("mtu", [1280, 1492])
def test_what_pods_send_passes_a_narrow_ipv6_underlay(fleet: Fleet, mtu: int, told: bool) -> None:
    check_narrow(fleet, Narrow("attic", "hut", OUTER), mtu, told)
    assert str(fleet.peer("attic", "hut")["endpoint"]).startswith("[")
