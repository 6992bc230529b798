"""Longest-prefix match: judged against trying every network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.allowedips import CACHED_ADDRESSES, AllowedIPs

V4 = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 8, 12, 24, 31, 32])).map(
    lambda pair: IPv4Network(pair, strict=False)
)
V6 = st.tuples(st.integers(0, 2**128 - 1), st.sampled_from([0, 7, 48, 64, 127, 128])).map(
    lambda pair: IPv6Network(pair, strict=False)
)
# Few bits that differ, so that networks overlap and addresses hit.
NEAR4 = st.integers(0, 255).map(lambda low: IPv4Address((10 << 24) | low << 6))
NEAR6 = st.integers(0, 255).map(lambda low: IPv6Address((0xFD << 120) | low << 62))
NEAR = st.one_of(
    st.tuples(NEAR4, st.integers(16, 32)).map(lambda pair: IPv4Network(pair, strict=False)),
    st.tuples(NEAR6, st.integers(40, 128)).map(lambda pair: IPv6Network(pair, strict=False)),
)
STEPS = st.lists(st.tuples(st.one_of(NEAR, V4, V6), st.sampled_from(["a", "b", "c", None])), max_size=30)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(STEPS, st.lists(st.one_of(NEAR4, NEAR6, st.ip_addresses()), max_size=20))
def test_the_longest_network_owns_an_address(
    steps: list[tuple[IPv4Network | IPv6Network, str | None]], asked: list[IPv4Address | IPv6Address]
) -> None:
    table: AllowedIPs[str] = AllowedIPs()
    networks: dict[IPv4Network | IPv6Network, str] = {}
    for network, owner in steps:
        if owner is None:
            assert table.remove(network) == networks.pop(network, None)
        else:
            assert table.insert(network, owner) == networks.get(network)
            networks[network] = owner
        for address in asked:
            holding = [known for known in networks if known.version == address.version and address in known]
            longest = max(holding, key=lambda known: known.prefixlen, default=None)
            assert table.lookup(address.packed) == (None if longest is None else networks[longest])
    assert dict(table) == networks
    assert len(table) == len(networks)


def test_a_network_has_one_owner() -> None:
    table: AllowedIPs[str] = AllowedIPs()
    network = ip_network("10.160.1.0/24")
    assert table.insert(network, "first") is None
    assert table.insert(network, "second") == "first"
    assert table.lookup(ip_address("10.160.1.1").packed) == "second"
    assert table.networks_of("first") == []
    assert table.remove_value("second") == [network]
    assert table.lookup(ip_address("10.160.1.1").packed) is None


@pytest.mark.parametrize("address", [b"", b"\n", bytes(5), bytes(15), bytes(17)])
def test_what_is_no_address_belongs_to_nobody(address: bytes) -> None:
    table: AllowedIPs[str] = AllowedIPs()
    table.insert(ip_network("0.0.0.0/0"), "all")
    table.insert(ip_network("::/0"), "all")
    assert table.lookup(address) is None


def test_an_answer_is_forgotten_when_something_changes_and_who_watches_is_told() -> None:
    table: AllowedIPs[str] = AllowedIPs()
    address = ip_address("fd00::1").packed
    answers: list[str | None] = []
    table.watch(lambda: answers.append(table.lookup(address)))
    assert table.lookup(address) is None
    table.insert(ip_network("fd00::/64"), "peer")
    assert table.lookup(address) == "peer"
    table.remove(ip_network("fd00::/64"))
    assert table.lookup(address) is None
    assert answers == ["peer", None]


def test_the_cache_is_bounded() -> None:
    table: AllowedIPs[str] = AllowedIPs()
    table.insert(ip_network("10.0.0.0/8"), "peer")
    for number in range(2 * CACHED_ADDRESSES):
        assert table.lookup((10 << 24 | number).to_bytes(4, "big")) == "peer"
        assert len(table._cache) <= CACHED_ADDRESSES
