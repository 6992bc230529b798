"""What may be sent to addresses that have not agreed: bounded per address, per endpoint, in all."""

from __future__ import annotations

from crossedge.meshd.budget import (
    ADDRESS_BURST,
    ADDRESS_RATE,
    DAEMON_BURST,
    SINGLE_OBSERVER_PACKETS,
    SINGLE_OBSERVER_TIME,
    TABLE,
    Budget,
)
from crossedge.wire.endpoint import UdpEndpoint

VICTIM = "192.0.2.66"


def spend(budget: Budget, endpoint: UdpEndpoint, tries: int, now: float, *, single: bool = False) -> int:
    return sum(budget.take(endpoint, now, single_observer=single) is None for _ in range(tries))


def test_ports_of_one_address_share_its_budget() -> None:
    budget = Budget(0.0)
    sent = sum(spend(budget, UdpEndpoint(VICTIM, port), 1, 0.0) for port in range(1, 1000))
    assert sent == ADDRESS_BURST
    assert budget.take(UdpEndpoint(VICTIM, 7), 0.0) == "budget-address"
    assert spend(budget, UdpEndpoint(VICTIM, 7), 1000, 10.0) == 10 * ADDRESS_RATE


def test_endpoint_that_one_observer_saw_gets_ten_packets() -> None:
    budget = Budget(0.0)
    endpoint = UdpEndpoint(VICTIM, 41820)
    assert (
        sum(spend(budget, endpoint, 3, float(t), single=True) for t in range(60)) == SINGLE_OBSERVER_PACKETS
    )
    assert budget.take(endpoint, 60.0, single_observer=True) == "budget-single-observer"
    assert spend(budget, endpoint, 99, 60.0 + SINGLE_OBSERVER_TIME, single=True) == SINGLE_OBSERVER_PACKETS


def test_second_observer_lifts_the_ten_but_not_the_address_budget() -> None:
    budget = Budget(0.0)
    endpoint = UdpEndpoint(VICTIM, 41820)
    spend(budget, endpoint, 99, 0.0, single=True)
    budget.confirm(endpoint)
    assert spend(budget, endpoint, 999, 0.0, single=True) == ADDRESS_BURST - SINGLE_OBSERVER_PACKETS


def test_whole_daemon_has_a_budget_too() -> None:
    budget = Budget(0.0)
    sent = sum(
        spend(budget, UdpEndpoint(f"192.0.{index >> 8}.{index & 255}", 1), 4, 0.0) for index in range(2000)
    )
    assert sent == DAEMON_BURST
    assert budget.take(UdpEndpoint("198.51.100.1", 1), 0.0) == "budget-daemon"


def test_table_is_bounded_and_forgets_only_who_is_owed_nothing() -> None:
    budget = Budget(0.0)
    now = 0.0
    for index in range(TABLE):
        now += 0.01
        budget.take(UdpEndpoint(f"2001:db8::{index:x}", 1), now)
    assert spend(budget, UdpEndpoint(VICTIM, 1), 999, now) == ADDRESS_BURST
    for index in range(TABLE):
        now += 0.01
        budget.take(UdpEndpoint(f"2001:db8:1::{index:x}", 1), now)
    refilled = min(ADDRESS_BURST, TABLE * 0.01 * ADDRESS_RATE)
    assert spend(budget, UdpEndpoint(VICTIM, 1), 999, now) <= refilled + 1


def test_clock_that_goes_back_gives_nothing_for_free() -> None:
    budget = Budget(100.0)
    endpoint = UdpEndpoint(VICTIM, 1)
    spend(budget, endpoint, 999, 100.0)
    assert spend(budget, endpoint, 999, 50.0) == 0
    assert spend(budget, endpoint, 999, 100.0) == 0
