"""What the host should look like: which routes there are, and how long packets may be on them."""

from __future__ import annotations

from ipaddress import ip_network
from unittest import mock

import pytest

from crossedge.meshd.config import MeshdConfig
from crossedge.meshd.constants import TRANSPORT_OVERHEAD
from crossedge.meshd.desired import PeerRoute
from crossedge.meshd.hostplan import plan
from crossedge.meshd.snapshots import MeshRoute
from crossedge.meshd.train import whole_mtu

LARGEST_GSO = 65_535  # bytes of a train with its headers that a device takes (Linux: netif_skb_features)
HEADERS = 14 + 40 + 8  # Ethernet, IPv6, UDP
LONGEST = 65_507  # bytes of a train as wireguard-go makes it (conn/bind_std.go: maxIPv4PayloadLen)


def test_routes_to_stock_peers_have_an_mtu_at_which_trains_stay_whole_and_others_none() -> None:
    certificate = mock.Mock(overlay4=None, overlay6=None, prefixes=())
    identity = mock.Mock(bundle=mock.Mock(certificate=certificate, supernets=()))
    one, narrow, member = (ip_network(f"10.9.{n}.0/24") for n in range(3))
    routes = [
        MeshRoute(one, 1440, "one", (), True),
        MeshRoute(narrow, 1200, "narrow", (), True),
        MeshRoute(member, 0, "member", (), False),
    ]
    desired = plan(MeshdConfig(), identity, 41820, routes)
    assert desired.stock == {PeerRoute(one, 1376), PeerRoute(narrow, 1200)}
    assert desired.peers == {PeerRoute(member, 0)}


@pytest.mark.parametrize("mtu", [*range(1200, 1520), *range(1520, 9001, 17)])
def test_a_train_of_wireguard_go_is_one_that_a_device_takes(mtu: int) -> None:
    whole = whole_mtu(mtu)
    assert mtu - 33 < whole <= mtu
    assert whole >= 1280 or whole == mtu
    datagram = -(-whole // 16) * 16 + TRANSPORT_OVERHEAD
    assert min(64, LONGEST // datagram) * datagram + HEADERS <= LARGEST_GSO
