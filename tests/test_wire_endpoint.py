"""Endpoints in bytes and text, and the addresses that nobody may be aimed at."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from crossedge.wire.endpoint import (
    RelayEndpoint,
    UdpEndpoint,
    pack_endpoint,
    parse_endpoint,
    refused_candidate,
    unpack_endpoint,
)
from crossedge.wire.errors import WireError

MESH = (ip_network("10.160.0.0/12"), ip_network("fd12:3456:789a::/48"))


@pytest.mark.parametrize(
    ("endpoint", "packed"),
    [
        (UdpEndpoint("198.51.100.7", 41820), "c6336407a35c"),
        (UdpEndpoint("255.255.255.255", 1), "ffffffff0001"),
        (UdpEndpoint("2001:db8::7", 65535), "20010db8000000000000000000000007ffff"),
    ],
)
def test_golden_endpoint(endpoint: UdpEndpoint, packed: str) -> None:
    assert pack_endpoint(endpoint).hex() == packed
    assert unpack_endpoint(bytes.fromhex(packed)) == endpoint


def test_udp_endpoint_is_what_the_kernel_gives() -> None:
    assert UdpEndpoint("192.0.2.1", 5) == ("192.0.2.1", 5)
    assert {UdpEndpoint("192.0.2.1", 5)} == {("192.0.2.1", 5)}


@pytest.mark.parametrize("packed", ["", "c6336407", "c63364070000", "c6336407a35c00", "00" * 17, "00" * 19])
def test_bytes_that_are_no_endpoint(packed: str) -> None:
    with pytest.raises(WireError) as raised:
        unpack_endpoint(bytes.fromhex(packed))
    assert raised.value.reason == "bad-endpoint"


def test_ipv4_endpoint_has_one_form_only() -> None:
    with pytest.raises(WireError, match="4 bytes"):
        unpack_endpoint(bytes(10) + b"\xff\xff\x01\x02\x03\x04\x00\x05")


@pytest.mark.parametrize(
    "endpoint", [("198.51.100.7", 0), ("198.51.100.7", 65536), ("nowhere", 1), ("::1::", 1)]
)
def test_endpoint_that_cannot_be_packed_is_the_callers_fault(endpoint: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="not a"):
        pack_endpoint(UdpEndpoint(*endpoint))


def test_text_form_round_trips() -> None:
    for text in ("198.51.100.7:41820", "[2001:db8::7]:1"):
        assert str(parse_endpoint(text)) == text
    assert parse_endpoint("[2001:DB8:0::7]:1").host == "2001:db8::7"
    assert str(RelayEndpoint(UdpEndpoint("192.0.2.1", 3478), 5)) == "relay 000000000005 at 192.0.2.1:3478"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "198.51.100.7",
        "198.51.100.7:",
        "198.51.100.7:0",
        "198.51.100.7:70000",
        "host:1",
        "2001:db8::7:1",
        "[198.51.100.7]:1",
        "[2001:db8::7]",
        "1.2.3.4:+5",
        "1.2.3.4:٣",
    ],
)
def test_text_that_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_endpoint(text)


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("0.1.2.3", "reserved"),
        ("224.0.0.251", "multicast"),
        ("239.255.255.250", "multicast"),
        ("ff02::1", "multicast"),
        ("ff0e::1", "multicast"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("255.255.255.255", "reserved"),
        ("240.0.0.1", "reserved"),
        ("::ffff:10.0.0.1", "v4-mapped"),
        ("10.160.3.4", "mesh-prefix"),
        ("fd12:3456:789a:5::1", "mesh-prefix"),
        ("example.com", "not-an-address"),
        ("", "not-an-address"),
        ("192.168.1.7", None),
        ("10.0.0.1", None),
        ("100.64.3.4", None),
        ("198.51.100.7", None),
        ("2001:db8::7", None),
        ("fd00::1", None),
    ],
)
def test_refused_candidates_say_why(host: str, why: str | None) -> None:
    assert refused_candidate(host, MESH) == why
