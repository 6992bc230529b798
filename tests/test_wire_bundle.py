"""Bundles, which are all that a node needs, and the addresses of rendezvous servers in them."""

from __future__ import annotations

from base64 import b64encode

import msgpack
import pytest

from crossedge.wire.bundle import Bundle, RendezvousAddress
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import key_id
from tests.identities import (
    CA,
    NETWORK,
    OTHER_CA,
    RENDEZVOUS,
    blocklist,
    bundle,
    certificate,
    packed,
)


def test_bundle_is_all_that_a_node_needs() -> None:
    read = Bundle.from_text(bundle().to_text().encode())
    read.verify()
    read.verify(CA.public)
    assert read == bundle()
    assert read.network == NETWORK
    assert read.certificate.name == "edge-7.berlin"
    assert read.rendezvous == (RENDEZVOUS,)


def test_bundle_is_believed_only_whole() -> None:
    with pytest.raises(IdentityError, match="other-network"):
        bundle().verify(OTHER_CA.public)
    with pytest.raises(IdentityError, match="bad-signature"):
        bundle(OTHER_CA).verify()
    with pytest.raises(IdentityError, match="bad-signature"):
        bundle(certificate=certificate(OTHER_CA)).verify()
    with pytest.raises(IdentityError, match="bad-signature"):
        bundle(blocklist=blocklist(OTHER_CA)).verify()


@pytest.mark.parametrize(
    "changes", [{"c": 5}, {"c": b"x"}, {"b": []}, {"v": ["x"]}, {"v": [5]}, {"n": [b""]}]
)
def test_bundle_with_a_wrong_field_is_a_wire_error(changes: dict[str, object]) -> None:
    values = msgpack.unpackb(bundle().encode()[:-64])
    with pytest.raises(WireError):
        Bundle.decode(packed(Bundle, CA, {**values, **changes}))


KEY64 = b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        (f"198.51.100.7:3478#{KEY64}", "198.51.100.7", 3478),
        (f"[2001:db8::7]:1#{KEY64}", "2001:db8::7", 1),
        (f"rendezvous.example.com:65535#{KEY64}", "rendezvous.example.com", 65535),
    ],
)
def test_rendezvous_address_round_trips(text: str, host: str, port: int) -> None:
    address = RendezvousAddress.parse(text)
    assert (address.host, address.port, address.public_key) == (host, port, bytes(range(32)))
    assert str(address) == text
    assert address.key_id == key_id(bytes(range(32)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:3478",
        f"host#{KEY64}",
        f":3478#{KEY64}",
        f"host:0#{KEY64}",
        f"host:70000#{KEY64}",
        f"host:٣#{KEY64}",
        f"2001:db8::7:3478#{KEY64}",
        f"[host]:3478#{KEY64}",
        f"[2001:db8::7:3478#{KEY64}",
        f"1.2.3:3478#{KEY64}",
        f"ho st:3478#{KEY64}",
        f"{'a' * 254}:3478#{KEY64}",
        "host:3478#AAAA",
        f"host:3478#{KEY64}#",
        f"host:3478#{KEY64[:-1]}",
        "host:3478#\ud800",
    ],
)
def test_rendezvous_address_says_what_was_expected(text: str) -> None:
    with pytest.raises(WireError) as raised:
        RendezvousAddress.parse(text)
    assert raised.value.reason == "bad-rendezvous"
    assert "host:port" in raised.value.detail
