"""Blocklists: which certificates hold no more, and the delegation that lets a key revoke and nothing else."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from crossedge.wire.armour import armour, dearmour
from crossedge.wire.certificate import Certificate
from crossedge.wire.codec import U64, Bytes16, Bytes32, Key
from crossedge.wire.errors import IdentityError
from crossedge.wire.identity import Name, Signed, network_id
from crossedge.wire.limits import MAX_BLOCKLIST, MAX_REVOKED


class Delegation(Signed):
    """The authority's word that a key may sign blocklists, up to a serial and for a time.

    The bound on the serial is the way back from a stolen key: the authority's own next list is above it.
    """

    DOMAIN: ClassVar[bytes] = b"crossedge/delegation/v1"
    LIMIT: ClassVar[int] = 256

    network: Annotated[Bytes16, Key("n")]
    key: Annotated[Bytes32, Key("k")]
    """Ed25519 public key."""
    not_before: Annotated[U64, Key("b")]
    """Unix time in seconds."""
    not_after: Annotated[U64, Key("a")]
    """Unix time in seconds; the last one that is covered."""
    last_serial: Annotated[U64, Key("s")]
    """The highest serial that a list by this key may have."""

    def to_text(self) -> str:
        """Return the armoured text of a signed delegation."""
        return armour("DELEGATION", self.encode())

    @classmethod
    def from_text(cls, text: bytes) -> Delegation:
        """Return the delegation in untrusted armoured text, not verified; raises only `WireError`."""
        return cls.decode(dearmour("DELEGATION", text, cls.LIMIT))

    @model_validator(mode="after")
    def _consistent(self) -> Delegation:
        if self.not_after < self.not_before:
            raise ValueError("ends before it begins")
        return self


class Blocklist(Signed):
    """For each name whose older certificates were revoked, the lowest serial that still holds."""

    DOMAIN: ClassVar[bytes] = b"crossedge/blocklist/v1"
    LIMIT: ClassVar[int] = MAX_BLOCKLIST

    network: Annotated[Bytes16, Key("n")]
    serial: Annotated[U64, Key("s")]
    """Grows with each list of a network; holders keep it for good and never go back."""
    issued: Annotated[U64, Key("i")]
    """Unix time in seconds."""
    revoked: Annotated[dict[Name, U64], Field(max_length=MAX_REVOKED), Key("r")] = {}  # noqa: RUF012  # pydantic copies it
    """Name to lowest valid serial."""
    delegation: Annotated[bytes, Field(max_length=Delegation.LIMIT), Key("d")] = b""
    """An encoded `Delegation` where a revoke-only key signed; b"" where the authority did."""

    def to_text(self) -> str:
        """Return the armoured text of a signed list."""
        return armour("BLOCKLIST", self.encode())

    @classmethod
    def from_text(cls, text: bytes) -> Blocklist:
        """Return the list in untrusted armoured text, not verified; raises only `WireError`."""
        return cls.decode(dearmour("BLOCKLIST", text, cls.LIMIT))

    def verify(self, ca_public: bytes) -> None:
        """Check that this authority, or a key that it lets revoke, signed it; `IdentityError` otherwise.

        `WireError` where the delegation inside is malformed.
        """
        if self.network != network_id(ca_public):
            raise IdentityError("other-network", "blocklist")
        if not self.delegation:
            self.check_signature(ca_public)
            return
        delegation = Delegation.decode(self.delegation)
        if delegation.network != self.network:
            raise IdentityError("other-network", "delegation")
        delegation.check_signature(ca_public)
        if self.serial > delegation.last_serial:
            raise IdentityError("delegation-exceeded", f"serial {self.serial} of {delegation.last_serial}")
        if not delegation.not_before <= self.issued <= delegation.not_after:
            raise IdentityError("delegation-expired")
        self.check_signature(delegation.key)

    def check_replaces(self, held: Blocklist | None) -> None:
        """Check that this (verified) list may take the place of the one that is held.

        `IdentityError("blocklist-stale")` if its serial is not higher, `IdentityError("blocklist-unrevokes")`
        if a revoke-only key signed it and it revokes less: that is for the authority alone.
        """
        if held is None:
            return
        if self.serial <= held.serial:
            raise IdentityError("blocklist-stale", f"serial {self.serial}, {held.serial} is held")
        if self.delegation and any(self.revoked.get(name, 0) < low for name, low in held.revoked.items()):
            raise IdentityError("blocklist-unrevokes", "signed by a key that may only revoke")

    def revokes(self, certificate: Certificate) -> bool:
        """Tell whether a certificate holds no more."""
        return certificate.serial < self.revoked.get(certificate.name, 0)
