"""Blocklists, and delegations of the right to revoke."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.errors import IdentityError, WireError
from tests.identities import (
    CA,
    NETWORK,
    NODE,
    NOW,
    STRANGER,
    blocklist,
    certificate,
    delegation,
    packed,
)


def test_blocklist_revokes_what_is_below_the_serial() -> None:
    listed = blocklist()
    assert listed.revokes(certificate(serial=17))
    assert not listed.revokes(certificate(serial=18))
    assert not listed.revokes(certificate(name="edge-8"))


def test_blocklist_is_believed_from_the_authority_and_from_whom_it_lets_revoke() -> None:
    blocklist().verify(CA.public)
    blocklist(STRANGER, delegation=delegation().encode()).verify(CA.public)
    refused = {
        "other-network": (blocklist(network=bytes(16)), CA),
        "bad-signature": (blocklist(STRANGER), CA),
    }
    for reason, (listed, ca) in refused.items():
        with pytest.raises(IdentityError, match=reason):
            listed.verify(ca.public)


@pytest.mark.parametrize(
    ("reason", "word", "changes"),
    [
        ("bad-signature", delegation(STRANGER), {}),
        ("bad-signature", delegation(key=NODE.public), {}),
        ("other-network", delegation(network=bytes(16)), {}),
        ("delegation-exceeded", delegation(), {"serial": 101}),
        ("delegation-expired", delegation(), {"issued": NOW - 1}),
        ("delegation-expired", delegation(), {"issued": NOW + 86401}),
    ],
)
def test_delegation_that_does_not_hold(reason: str, word: Delegation, changes: dict[str, object]) -> None:
    with pytest.raises(IdentityError, match=reason):
        blocklist(STRANGER, delegation=word.encode(), **changes).verify(CA.public)


def test_delegation_that_is_garbage_is_a_wire_error() -> None:
    with pytest.raises(WireError):
        blocklist(STRANGER, delegation=bytes(100)).verify(CA.public)


def test_blocklist_never_goes_back() -> None:
    held = blocklist(serial=5)
    blocklist(serial=6).check_replaces(held)
    held.check_replaces(None)
    for serial in (4, 5):
        with pytest.raises(IdentityError, match="blocklist-stale"):
            blocklist(serial=serial).check_replaces(held)


def test_only_the_authority_takes_a_revocation_back() -> None:
    held = blocklist(serial=5)
    blocklist(serial=6, revoked={}).check_replaces(held)
    delegated = delegation().encode()
    more = {"edge-7.berlin": 18, "edge-8": 4}
    blocklist(STRANGER, serial=6, revoked=more, delegation=delegated).check_replaces(held)
    for less in ({}, {"edge-7.berlin": 17}, {"edge-8": 99}):
        with pytest.raises(IdentityError, match="blocklist-unrevokes"):
            blocklist(STRANGER, serial=6, revoked=less, delegation=delegated).check_replaces(held)


def test_blocklist_is_bounded() -> None:
    with pytest.raises(ValidationError):
        blocklist(revoked={f"n{n}": 1 for n in range(4097)})
    largest = blocklist(revoked={f"n{n:062}": 2**64 - 1 for n in range(3500)})
    assert Blocklist.decode(largest.encode()) == largest
    with pytest.raises(WireError, match="malformed"):
        Blocklist.decode(packed(Blocklist, CA, {"n": NETWORK, "s": 1, "i": 1, "r": {"Bad Name": 1}}))
