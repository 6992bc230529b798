"""STUN: the test vectors of RFC 5769, the sizes that we promise, and what is refused."""

from __future__ import annotations

import pytest

from crossedge.wire import stun
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError

TRANSACTION = bytes(range(12))
V4 = UdpEndpoint("198.51.100.7", 41820)
V6 = UdpEndpoint("2001:db8::7", 65535)

# RFC 5769, sections 2.1 to 2.3
RFC_REQUEST = (
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74"
    "002400046e0001ff80290008932ff9b151263b36000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf"
)
RFC_IPV4 = (
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
)
RFC_IPV6 = (
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c"
)


def message(kind: int, *attributes: tuple[int, bytes]) -> bytes:
    body = b""
    for name, value in attributes:
        body += name.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)
    return kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + TRANSACTION + body


@pytest.mark.parametrize(
    ("vector", "mapped"),
    [
        (RFC_IPV4, UdpEndpoint("192.0.2.1", 32853)),
        (RFC_IPV6, UdpEndpoint("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
)
def test_response_of_rfc_5769_is_read(vector: str, mapped: UdpEndpoint) -> None:
    answer = stun.decode(bytes.fromhex(vector))
    assert isinstance(answer, stun.Success)
    assert answer.mapped == mapped
    assert answer.transaction.hex() == "b7e7a701bc34d686fa87dfae"


def test_request_of_rfc_5769_is_read_and_its_ice_attribute_not_understood() -> None:
    assert stun.decode(bytes.fromhex(RFC_REQUEST)) == stun.Request(
        bytes.fromhex("b7e7a701bc34d686fa87dfae"), unknown=(0x0024,)
    )


@pytest.mark.parametrize("vector", [RFC_REQUEST, RFC_IPV4, RFC_IPV6])
def test_wrong_fingerprint_is_refused(vector: str) -> None:
    datagram = bytearray.fromhex(vector)
    datagram[-1] ^= 1
    with pytest.raises(WireError, match="bad-fingerprint"):
        stun.decode(bytes(datagram))


GOLDEN = {
    "00010048": stun.encode_request(TRANSACTION),
    "00010000": stun.encode_request(TRANSACTION, size=20),
    "0003000400000006": stun.encode_request(TRANSACTION, True, True, size=0),
    "002000080001824ee721c045": stun.encode_success(TRANSACTION, V4),
    "802c00080001a35cc6336407": stun.encode_success(TRANSACTION, V4, V4, V4),
    "000900040000041400 0a0002 0026 0000".replace(" ", ""): stun.encode_error(TRANSACTION, 420, [0x0026]),
}


@pytest.mark.parametrize(("part", "datagram"), GOLDEN.items())
def test_golden_parts_are_where_they_belong(part: str, datagram: bytes) -> None:
    assert part in datagram.hex()
    assert datagram[4:20] == b"\x21\x12\xa4\x42" + TRANSACTION


@pytest.mark.parametrize(("endpoint", "size"), [(V4, 56), (V6, 92)])
def test_success_is_no_larger_than_is_stated(endpoint: UdpEndpoint, size: int) -> None:
    answer = stun.encode_success(TRANSACTION, endpoint, endpoint, endpoint)
    assert len(answer) == size
    assert len(stun.encode_request(TRANSACTION)) >= size
    assert stun.decode(answer) == stun.Success(TRANSACTION, endpoint, endpoint, endpoint)


def test_error_is_no_larger_than_a_success() -> None:
    answer = stun.encode_error(TRANSACTION, 420, range(100, 200))
    assert len(answer) <= 56
    assert stun.decode(answer) == stun.Failure(TRANSACTION, 420, (100, 101, 102, 103))


@pytest.mark.parametrize("change_ip", [False, True])
@pytest.mark.parametrize("change_port", [False, True])
def test_change_request_round_trips(change_ip: bool, change_port: bool) -> None:
    datagram = stun.encode_request(TRANSACTION, change_ip, change_port)
    assert len(datagram) == stun.REQUEST_SIZE
    assert stun.decode(datagram) == stun.Request(TRANSACTION, change_ip, change_port)


def test_stock_request_of_20_bytes_is_read() -> None:
    assert stun.decode(message(stun.REQUEST)) == stun.Request(TRANSACTION)


def test_response_port_is_read() -> None:
    datagram = stun.encode_request(TRANSACTION, response_port=40_000)
    assert len(datagram) == stun.REQUEST_SIZE
    assert stun.decode(datagram) == stun.Request(TRANSACTION, response_port=40_000)


@pytest.mark.parametrize("name", [stun.PADDING, 0x7FFF])
def test_padding_is_refused_like_the_unknown(name: int) -> None:
    request = stun.decode(message(stun.REQUEST, (name, bytes(4))))
    assert isinstance(request, stun.Request)
    assert request.unknown == (name,)


def test_optional_attribute_is_ignored() -> None:
    assert stun.decode(message(stun.REQUEST, (0xC057, bytes(8)))) == stun.Request(TRANSACTION)


def test_old_mapped_address_is_the_second_choice() -> None:
    plain = bytes.fromhex("0001a35cc6336407")
    answer = stun.decode(message(stun.SUCCESS, (stun.MAPPED_ADDRESS, plain)))
    assert isinstance(answer, stun.Success)
    assert answer.mapped == V4
    both = stun.decode(
        message(
            stun.SUCCESS,
            (stun.MAPPED_ADDRESS, plain),
            (stun.XOR_MAPPED_ADDRESS, bytes.fromhex("0001824e00000000")),
        )
    )
    assert isinstance(both, stun.Success)
    assert both.mapped.host == "33.18.164.66"


def test_first_of_two_attributes_counts() -> None:
    request = message(stun.REQUEST, (stun.CHANGE_REQUEST, b"\0\0\0\2"), (stun.CHANGE_REQUEST, b"\0\0\0\4"))
    assert stun.decode(request) == stun.Request(TRANSACTION, change_port=True)


REFUSED = {
    "empty": b"",
    "cut short": message(stun.REQUEST)[:19],
    "no magic cookie": b"\0\1\0\0" + bytes(16),
    "another method": message(0x0003),
    "an indication": message(0x0011),
    "length too large": message(stun.REQUEST) + bytes(4),
    "length too small": message(stun.REQUEST, (0x8022, b"abcd"))[:-4],
    "length not of four": b"\0\1\0\2" + message(stun.REQUEST)[4:] + bytes(2),
    "attribute past the end": message(stun.REQUEST, (0x8022, b"abcd"))[:22] + b"\0\xff" + b"abcd",
    "change request of 3 bytes": message(stun.REQUEST, (stun.CHANGE_REQUEST, b"abc")),
    "response port 0": message(stun.REQUEST, (stun.RESPONSE_PORT, bytes(4))),
    "response port of 2 bytes": message(stun.REQUEST, (stun.RESPONSE_PORT, b"ab")),
    "success without an address": message(stun.SUCCESS),
    "success with an unknown attribute": message(stun.SUCCESS, (0x0024, bytes(4))),
    "address of a strange family": message(stun.SUCCESS, (stun.MAPPED_ADDRESS, b"\0\3\0\1\1\2\3\4")),
    "IPv6 family with 4 bytes": message(stun.SUCCESS, (stun.MAPPED_ADDRESS, b"\0\2\0\1\1\2\3\4")),
    "address with port 0": message(stun.SUCCESS, (stun.MAPPED_ADDRESS, b"\0\1\0\0\1\2\3\4")),
    "address too long": message(stun.SUCCESS, (stun.XOR_MAPPED_ADDRESS, bytes(21))),
    "address of one byte": message(stun.SUCCESS, (stun.XOR_MAPPED_ADDRESS, b"\0")),
    "error without a code": message(stun.FAILURE),
    "error code 2xx": message(stun.FAILURE, (stun.ERROR_CODE, b"\0\0\2\0")),
    "error code x100": message(stun.FAILURE, (stun.ERROR_CODE, b"\0\0\4\x64")),
    "fingerprint not last": message(stun.REQUEST, (stun.FINGERPRINT, bytes(4)), (0x8022, b"")),
    "fingerprint of 8 bytes": message(stun.REQUEST, (stun.FINGERPRINT, bytes(8))),
    "too many attributes": message(stun.REQUEST, *((0x8022, b""),) * 25),
    "too long": message(stun.REQUEST, (0x8022, bytes(1600))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_stun_is_a_wire_error(name: str) -> None:
    with pytest.raises(WireError):
        stun.decode(REFUSED[name])


def test_what_follows_message_integrity_is_not_read() -> None:
    request = message(stun.REQUEST, (0x0008, bytes(20)), (stun.CHANGE_REQUEST, b"\0\0\0\4"))
    assert stun.decode(request) == stun.Request(TRANSACTION)


def test_transaction_has_12_bytes() -> None:
    with pytest.raises(ValueError, match="transaction"):
        stun.encode_request(bytes(11))
