"""STUN for anyone: RFC 8489 answers, RFC 5780 discovery, and the one stated exception to no amplification."""

from __future__ import annotations

from random import Random

import pytest

from crossedge.rendezvous.settings import SourceLimits
from crossedge.rendezvous.stunserver import StunServer, address_group
from crossedge.wire import stun
from crossedge.wire.endpoint import UdpEndpoint

NOW = 50.0
CLIENT = UdpEndpoint("203.0.113.9", 40000)
CLIENT6 = UdpEndpoint("2001:db8:5::9", 40000)
STOCK = stun.encode_request(b"t" * 12, size=20)
FIRST, SECOND = "192.0.2.1", "192.0.2.2"


def server(*hosts: str, public: dict[str, str] | None = None, slots: int = 4096) -> StunServer:
    made = StunServer(SourceLimits(slots=slots), Random(5).randbytes)
    made.locals.extend(address_group(hosts or (FIRST,), (3478, 3479), 0, public))
    return made


def success(
    made: StunServer, datagram: bytes, local: int = 0, source: UdpEndpoint = CLIENT
) -> tuple[stun.Success, int]:
    answer = made.answer(datagram, source, local, NOW)
    assert answer is not None
    decoded = stun.decode(answer[0])
    assert isinstance(decoded, stun.Success)
    assert answer.destination == source
    return decoded, answer.local


def refusal(made: StunServer, datagram: bytes) -> stun.Failure:
    answer = made.answer(datagram, CLIENT, 0, NOW)
    assert answer is not None
    decoded = stun.decode(answer[0])
    assert isinstance(decoded, stun.Failure)
    return decoded


def test_stock_request_gets_its_mapped_address() -> None:
    answer, local = success(server(), STOCK)
    assert answer == stun.Success(b"t" * 12, CLIENT, UdpEndpoint(FIRST, 3478), None)
    assert local == 0


def test_stock_answers_have_at_most_56_and_92_bytes() -> None:
    answer = server(FIRST, SECOND).answer(STOCK, CLIENT, 0, NOW)
    assert answer is not None
    assert len(answer[0]) == 56
    answer = server("2001:db8::1", "2001:db8::2").answer(STOCK, CLIENT6, 0, NOW)
    assert answer is not None
    assert len(answer[0]) == 92


def test_other_address_is_told_only_where_there_is_one() -> None:
    assert success(server(), STOCK)[0].other is None
    made = server(FIRST, SECOND)
    assert success(made, STOCK, 0)[0].other == UdpEndpoint(SECOND, 3479)
    assert success(made, STOCK, 3)[0].other == UdpEndpoint(FIRST, 3478)


@pytest.mark.parametrize(
    ("change_ip", "change_port", "origin"),
    [(False, True, (FIRST, 3479)), (True, False, (SECOND, 3478)), (True, True, (SECOND, 3479))],
)
def test_change_request_is_answered_from_the_other_address(
    change_ip: bool, change_port: bool, origin: tuple[str, int]
) -> None:
    made = server(FIRST, SECOND)
    request = stun.encode_request(b"t" * 12, change_ip, change_port)
    answer, local = success(made, request)
    assert answer.origin == UdpEndpoint(*origin)
    assert made.locals[local].bound == answer.origin


def test_one_address_changes_the_port_and_refuses_to_change_the_address() -> None:
    answer, local = success(server(), stun.encode_request(b"t" * 12, change_port=True))
    assert (answer.origin, local) == (UdpEndpoint(FIRST, 3479), 1)
    failure = refusal(server(), stun.encode_request(b"t" * 12, change_ip=True))
    assert (failure.code, failure.unknown) == (420, (stun.CHANGE_REQUEST,))


def test_padding_is_refused() -> None:
    body = stun.PADDING.to_bytes(2, "big") + b"\0\4" + b"\x10\x00\0\0"
    request = b"\0\1" + len(body).to_bytes(2, "big") + STOCK[4:20] + body
    failure = refusal(server(), request)
    assert (failure.code, failure.unknown) == (420, (stun.PADDING,))
    answer = server().answer(request, CLIENT, 0, NOW)
    assert answer is not None
    assert len(answer.datagram) <= 56


def test_response_port_moves_the_answer_to_a_port_of_the_askers_address_and_nothing_else() -> None:
    made = server(FIRST, SECOND)
    answer = made.answer(stun.encode_request(b"t" * 12, response_port=50_000), CLIENT, 0, NOW)
    assert answer is not None
    assert answer.destination == UdpEndpoint(CLIENT.host, 50_000)
    assert answer.local == 0
    decoded = stun.decode(answer.datagram)
    assert isinstance(decoded, stun.Success)
    assert decoded.mapped == CLIENT
    refused = made.answer(_with_padding(50_000), CLIENT, 0, NOW)
    assert refused is not None
    assert refused.destination == UdpEndpoint(CLIENT.host, 50_000), "or stock clients wait for ever"


def _with_padding(port: int) -> bytes:
    body = b"\0\x27\0\4" + port.to_bytes(2, "big") + b"\0\0" + b"\0\x26\0\0"
    return b"\0\1" + len(body).to_bytes(2, "big") + STOCK[4:20] + body


def test_public_address_stands_for_a_private_one() -> None:
    made = server("10.0.0.1", "10.0.0.2", public={"10.0.0.1": FIRST, "10.0.0.2": SECOND})
    answer, _ = success(made, STOCK)
    assert answer.origin == UdpEndpoint(FIRST, 3478)
    assert answer.other == UdpEndpoint(SECOND, 3479)


def test_wildcard_tells_no_origin_that_it_does_not_know() -> None:
    assert success(server("0.0.0.0"), STOCK)[0].origin is None


def test_stock_requests_of_a_prefix_get_ten_answers_a_second_and_then_nothing() -> None:
    made = server()
    sources = [UdpEndpoint(f"203.0.113.{host}", 1024 + host) for host in range(1, 101)]
    assert sum(made.answer(STOCK, source, 0, NOW) is not None for source in sources) == 10
    assert made.dropped["stun-rate"] == 90
    assert made.answer(STOCK, UdpEndpoint("203.0.114.1", 1), 0, NOW) is not None
    assert sum(made.answer(STOCK, source, 0, NOW + 0.5) is not None for source in sources) == 5


def test_ipv6_sources_are_limited_by_their_56() -> None:
    made = server("2001:db8::1")
    sources = [UdpEndpoint(f"2001:db8:5:{subnet:x}::1", 9) for subnet in range(100)]
    assert sum(made.answer(STOCK, source, 0, NOW) is not None for source in sources) == 10


def test_padded_requests_have_an_allowance_of_their_own() -> None:
    made = server()
    padded = stun.encode_request(b"t" * 12)
    for _ in range(100):
        made.answer(STOCK, CLIENT, 0, NOW)
    answers = [made.answer(padded, CLIENT, 0, NOW) for _ in range(100)]
    assert all(answer is not None and len(answer[0]) <= len(padded) for answer in answers)


@pytest.mark.parametrize(
    "datagram",
    [
        stun.encode_success(b"t" * 12, CLIENT),
        stun.encode_error(b"t" * 12, 400),
        STOCK[:2] + b"\0\4" + STOCK[4:],
        STOCK + b"\0\1\0\0",
        STOCK[:19],
    ],
    ids=["success", "error", "short", "long", "cut"],
)
def test_what_is_no_request_gets_no_answer(datagram: bytes) -> None:
    made = server()
    assert made.answer(datagram, CLIENT, 0, NOW) is None
    assert sum(made.dropped.values()) == 1
