"""The estimator of one path: minimum, smoothing, loss and timeout."""

from __future__ import annotations

import pytest

from crossedge.latency.estimator import TIMEOUT_INITIAL, TIMEOUT_MIN, Estimator, round_trip


def test_residence_of_the_reflector_is_subtracted() -> None:
    assert round_trip(10.0, 500.0, 500.2, 10.25) == pytest.approx(0.05)


@pytest.mark.parametrize("residence", [-1.0, 0.3])
def test_residence_that_cannot_be_is_ignored(residence: float) -> None:
    assert round_trip(10.0, 500.0, 500.0 + residence, 10.25) == pytest.approx(0.25)


def test_answer_that_seems_to_come_before_its_probe_is_zero_not_negative() -> None:
    assert round_trip(10.0, 5.0, 5.0, 9.999) == 0.0


def test_first_sample_sets_the_smoothed_values_as_rfc_6298_says() -> None:
    estimator = Estimator()
    estimator.add(0.080, now=1.0)
    assert estimator.smoothed == pytest.approx(0.080)
    assert estimator.deviation == pytest.approx(0.040)
    estimator.add(0.040, now=2.0)
    assert estimator.deviation == pytest.approx(0.75 * 0.040 + 0.25 * 0.040)
    assert estimator.smoothed == pytest.approx(7 / 8 * 0.080 + 1 / 8 * 0.040)


def test_minimum_is_forgotten_with_its_window() -> None:
    estimator = Estimator(window=60.0)
    estimator.add(0.010, now=0.0)
    for second in range(1, 50):
        estimator.add(0.030, now=float(second))
    assert estimator.minimum(now=50.0) == pytest.approx(0.010)
    assert estimator.minimum(now=61.0) == pytest.approx(0.030)
    assert estimator.minimum(now=200.0) is None


def test_loss_needs_eight_outcomes_and_speaks_of_the_last_64() -> None:
    estimator = Estimator()
    for _ in range(7):
        estimator.lost()
    assert estimator.loss == 0.0
    estimator.lost()
    assert estimator.loss == 1.0
    for number in range(64):
        estimator.add(0.01, now=float(number))
    assert estimator.loss == 0.0
    assert estimator.samples == 64


def test_timeout_follows_rtt_and_is_bounded() -> None:
    estimator = Estimator()
    assert estimator.timeout == TIMEOUT_INITIAL
    for number in range(100):
        estimator.add(0.0001, now=float(number))
    assert estimator.timeout == TIMEOUT_MIN
    for number in range(100, 200):
        estimator.add(0.2, now=float(number))
    assert 0.2 < estimator.timeout < 0.3
