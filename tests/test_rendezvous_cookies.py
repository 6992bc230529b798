"""Cookies hold for one address, one sender and a few minutes."""

from __future__ import annotations

from random import Random

from crossedge.rendezvous.cookies import COOKIE_SECRET_TIME, CookieJar
from crossedge.wire.endpoint import UdpEndpoint

NOW = 5000.0
SOURCE = UdpEndpoint("203.0.113.7", 41820)
SENDER = bytes(range(32))


def jar() -> CookieJar:
    return CookieJar(Random(1).randbytes, NOW)


def test_cookie_counts_for_its_address_port_and_sender_only() -> None:
    cookies = jar()
    cookie = cookies.give(SOURCE, SENDER, NOW)
    assert len(cookie) == 16
    assert cookie in cookies.accepted(SOURCE, SENDER, NOW)
    assert cookie not in cookies.accepted(UdpEndpoint("203.0.113.7", 41821), SENDER, NOW)
    assert cookie not in cookies.accepted(UdpEndpoint("203.0.113.8", 41820), SENDER, NOW)
    assert cookie not in cookies.accepted(SOURCE, bytes(32), NOW)
    assert cookie not in cookies.accepted(UdpEndpoint("2001:db8::7", 41820), SENDER, NOW)


def test_cookie_of_the_previous_secret_is_accepted_and_an_older_one_is_not() -> None:
    cookies = jar()
    cookie = cookies.give(SOURCE, SENDER, NOW)
    assert cookie in cookies.accepted(SOURCE, SENDER, NOW + COOKIE_SECRET_TIME)
    assert cookies.give(SOURCE, SENDER, NOW + COOKIE_SECRET_TIME) != cookie
    assert cookie not in cookies.accepted(SOURCE, SENDER, NOW + 2 * COOKIE_SECRET_TIME)


def test_cookie_does_not_outlive_a_long_pause() -> None:
    cookies = jar()
    cookie = cookies.give(SOURCE, SENDER, NOW)
    assert cookie not in cookies.accepted(SOURCE, SENDER, NOW + 10 * COOKIE_SECRET_TIME)
