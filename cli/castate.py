"""The state directory of a certificate authority: what it signed, gave out and revoked.

    ca.key       the authority's Ed25519 key, mode 0600
    state.json   all the rest; written whole (fsync and rename) before anything that is signed leaves
    blocklist    the newest signed blocklist, made again from state.json where a crash left an older one
    lock         held by whoever changes the state

A crash between two of these steps costs a serial number at most.
"""

from __future__ import annotations

import fcntl
import os
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crossedge.cli.allocation import free_prefix, reserved
from crossedge.cli.identityfiles import DAY, make_directory, read_file, read_key, write_file
from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import Bundle, RendezvousAddress
from crossedge.wire.certificate import Certificate, Request
from crossedge.wire.endpoint import Network
from crossedge.wire.errors import ConfigError
from crossedge.wire.identity import SigningKey, key_id, network_id
from crossedge.wire.keyfiles import CA_FILE, KeyKind, format_key
from crossedge.wire.prefixes import overlap, overlapping

SIGN: Final = "crossedge ca sign"
STATE_FILE: Final = "state.json"
BLOCKLIST_FILE: Final = "blocklist"
LOCK_FILE: Final = "lock"

BACKDATE: Final = 300
"""Seconds by which a certificate begins before it is signed, for clocks that are a little late."""

DELEGATED_SERIALS: Final = 2**32
"""How many lists a revoke-only key may sign before the authority's next one."""


Found = TypeVar("Found", IPv4Network, IPv6Network)


class State(BaseModel):
    """The base of what is in state.json: strict, so that a damaged file is noticed."""

    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True)


class Entry(State):
    """A node as it was last signed."""

    serial: int
    x25519: str
    """Hexadecimal, as all keys and ids here."""
    ed25519: str
    prefixes4: tuple[IPv4Network, ...]
    prefixes6: tuple[IPv6Network, ...]
    overlay4: IPv4Address
    overlay6: IPv6Address
    groups: tuple[str, ...]
    roles: tuple[str, ...]
    not_before: int
    not_after: int

    @property
    def prefixes(self) -> tuple[Network, ...]:
        """The pod prefixes of both families."""
        return (*self.prefixes4, *self.prefixes6)


class Supernets(State):
    """What prefixes and addresses are taken from."""

    pods: IPv4Network
    pods_length: int = Field(ge=8, le=30)
    """Prefix length of one node's IPv4 pods."""
    overlay: IPv4Network
    network6: IPv6Network
    """Its first /64 is the overlay; the others are the nodes' pods."""

    def all(self) -> tuple[Network, ...]:
        """Return the supernets of the network."""
        return (self.pods, self.overlay, self.network6)

    @property
    def overlay6(self) -> IPv6Network:
        """The /64 that IPv6 overlay addresses come from."""
        return IPv6Network((self.network6.network_address, 64))


class Revocations(State):
    """The newest blocklist of the authority's own."""

    serial: int = 0
    issued: int = 0
    revoked: dict[str, int] = Field(default_factory=dict)
    """Name to lowest valid serial."""
    reserved: int = 0
    """The highest serial that a revoke-only key may use."""


class Authority(State):
    """All of state.json."""

    version: Literal[1] = 1
    network: str
    ca: str
    """The authority's public key, base64."""
    supernets: Supernets
    serial: int = 0
    """Of the newest certificate."""
    rendezvous: tuple[str, ...] = ()
    """What the last bundle named, for the next."""
    blocklist: Revocations = Field(default_factory=Revocations)
    nodes: dict[str, Entry] = Field(default_factory=dict)


class Wishes(State):
    """What is asked of a signature; None keeps what a name had before."""

    rendezvous: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    roles: tuple[str, ...] | None = None
    prefixes: tuple[IPv4Network | IPv6Network, ...] = ()
    days: int = 365


def default_network6(ca_public: bytes) -> IPv6Network:
    """Return fd and the first 40 bits of the network id, a /48 (RFC 4193)."""
    return IPv6Network((b"\xfd" + network_id(ca_public)[:5] + bytes(10), 48))


def check_supernets(file: object, supernets: Supernets) -> None:
    """Refuse supernets that overlap each other or a range that nobody may take; `ConfigError`."""
    named: dict[str, Network] = {
        "--pods": supernets.pods,
        "--overlay": supernets.overlay,
        "--network6": supernets.network6,
    }
    for option, network in named.items():
        why = reserved(network)
        if why is not None:
            raise ConfigError(file, option, f"a network outside {why}, got {network}")
    if supernets.pods.overlaps(supernets.overlay):
        raise ConfigError(
            file, "--overlay", f"a network apart from --pods {supernets.pods}, got {supernets.overlay}"
        )
    if not supernets.pods.prefixlen <= supernets.pods_length <= 30:
        raise ConfigError(
            file, "--pods-length", f"{supernets.pods.prefixlen} to 30, got {supernets.pods_length}"
        )
    if supernets.overlay.prefixlen > 30:
        raise ConfigError(file, "--overlay", f"a /30 or larger, got {supernets.overlay}")
    if supernets.network6.prefixlen >= 64:
        raise ConfigError(file, "--network6", f"a prefix shorter than /64, got {supernets.network6}")


class CertificateAuthority:
    """An open state directory. Changes are on disk when a method returns."""

    def __init__(self, path: Path, key: SigningKey, state: Authority) -> None:
        self.path = path
        self.key = key
        self.state = state

    @classmethod
    def create(
        cls, path: Path, random: Callable[[int], bytes], plan: Callable[[bytes], Supernets], now: int
    ) -> CertificateAuthority:
        """Make a new authority; `ConfigError` where there is one.

        `plan` gives the supernets for the authority's public key. A key that a crash left without a state is
        taken up.
        """
        make_directory(path)
        with _locked(path):
            if (path / STATE_FILE).exists():
                raise ConfigError(path, "", "a directory without a certificate authority; this one has it")
            key_file = path / CA_FILE
            if key_file.exists():
                key = SigningKey(read_key(key_file, KeyKind.CA))
            else:
                key = SigningKey.generate(random)
            state = Authority(
                network=network_id(key.public).hex(),
                ca=b64encode(key.public).decode(),
                supernets=plan(key.public),
            )
            check_supernets("crossedge ca init", state.supernets)
            if not key_file.exists():
                write_file(key_file, format_key(KeyKind.CA, key.seed), 0o600)
            authority = cls(path, key, state)
            authority._raise_blocklist(now)
            authority._save()
            authority._write_blocklist()
            return authority

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[CertificateAuthority]:
        """Open the authority alone, to change it; `ConfigError` where there is none or it is damaged."""
        load_state(path)
        with _locked(path):
            state = load_state(path)
            key = SigningKey(read_key(path / CA_FILE, KeyKind.CA))
            if network_id(key.public).hex() != state.network:
                raise ConfigError(path / CA_FILE, "", f"the key of network {state.network}")
            authority = cls(path, key, state)
            authority._write_blocklist()
            yield authority

    def sign(self, request: Request, wishes: Wishes, now: int) -> Bundle:
        """Return the bundle for a (verified) request; the state is on disk before.

        Older certificates of the name are revoked where they have another key, or a prefix that is free now.
        `ConfigError` where a wish cannot be met.
        """
        name = request.name
        held = self.state.nodes.get(name)
        for other, entry in self.state.nodes.items():
            if other != name and {entry.x25519, entry.ed25519} & {
                request.x25519.hex(),
                request.ed25519.hex(),
            }:
                raise ConfigError(SIGN, "REQUEST", f"keys of its own for {name}; {other} has them")
        rendezvous = self.state.rendezvous if wishes.rendezvous is None else wishes.rendezvous
        if not rendezvous:
            raise ConfigError(SIGN, "--rendezvous", "host:port#key; none was ever given")
        prefixes4, prefixes6 = self._prefixes(name, wishes.prefixes, held)
        entry = Entry(
            serial=self.state.serial + 1,
            x25519=request.x25519.hex(),
            ed25519=request.ed25519.hex(),
            prefixes4=prefixes4,
            prefixes6=prefixes6,
            overlay4=held.overlay4 if held else self._overlay4(),
            overlay6=held.overlay6 if held else self._overlay6(),
            groups=_chosen(wishes.groups, held.groups if held else None, ()),
            roles=_chosen(wishes.roles, held.roles if held else None, ("node",)),
            not_before=max(0, now - BACKDATE),
            not_after=now + wishes.days * DAY,
        )
        self.state.serial = entry.serial
        self.state.rendezvous = tuple(rendezvous)
        self.state.nodes[name] = entry
        if held is not None and _outdates(entry, held):
            self._revoke_below(name, entry.serial, now)
        try:
            bundle = self._bundle(request, entry, now)
        except ValueError as error:
            raise ConfigError(SIGN, "REQUEST", f"what fits a certificate; {error}") from error
        self._save()
        self._write_blocklist()
        return bundle

    def _bundle(self, request: Request, entry: Entry, now: int) -> Bundle:
        certificate = Certificate(
            network=bytes.fromhex(self.state.network),
            serial=entry.serial,
            name=request.name,
            x25519=request.x25519,
            ed25519=request.ed25519,
            overlay4=entry.overlay4,
            overlay6=entry.overlay6,
            prefixes4=entry.prefixes4,
            prefixes6=entry.prefixes6,
            groups=entry.groups,
            roles=entry.roles,
            not_before=entry.not_before,
            not_after=entry.not_after,
            issuer=key_id(self.key.public),
        ).sign(self.key)
        return Bundle(
            certificate=certificate,
            ca=self.key.public,
            blocklist=self.blocklist(),
            rendezvous=tuple(RendezvousAddress.parse(text) for text in self.state.rendezvous),
            supernets=self.state.supernets.all(),
            issued=now,
        ).sign(self.key)

    def revoke(self, name: str, now: int) -> Blocklist:
        """Return the new blocklist, which revokes what `name` has; `ConfigError` if it has nothing."""
        entry = self.state.nodes.get(name)
        if entry is None:
            known = ", ".join(sorted(self.state.nodes)[:8]) or "none yet"
            raise ConfigError(
                "crossedge ca revoke", "NAME", f"a name that was signed here ({known}), got {name}"
            )
        if self.state.blocklist.revoked.get(name, 0) <= entry.serial:
            self._revoke_below(name, entry.serial + 1, now)
            self._save()
            self._write_blocklist()
        return self.blocklist()

    def merge(self, other: Blocklist, now: int) -> Blocklist:
        """Return the new blocklist with what a revoke-only key revoked; `IdentityError` if it may not."""
        other.verify(self.key.public)
        revoked = self.state.blocklist.revoked
        for name, low in other.revoked.items():
            # A certificate that is signed from now on holds, whatever the other key wrote.
            bound = min(low, self.state.serial + 1)
            revoked[name] = max(bound, revoked.get(name, 0))
        self._raise_blocklist(now)
        self._save()
        self._write_blocklist()
        return self.blocklist()

    def delegate(self, key: bytes, days: int, now: int) -> Delegation:
        """Return the authority's word that the Ed25519 public key `key` may sign blocklists."""
        blocklist = self.state.blocklist
        blocklist.reserved = max(blocklist.serial, blocklist.reserved) + DELEGATED_SERIALS
        self._save()
        return Delegation(
            network=bytes.fromhex(self.state.network),
            key=key,
            not_before=max(0, now - BACKDATE),
            not_after=now + days * DAY,
            last_serial=blocklist.reserved,
        ).sign(self.key)

    def blocklist(self) -> Blocklist:
        """Return the newest blocklist of the authority's own, signed."""
        held = self.state.blocklist
        return Blocklist(
            network=bytes.fromhex(self.state.network),
            serial=held.serial,
            issued=held.issued,
            revoked=dict(sorted(held.revoked.items())),
        ).sign(self.key)

    def _revoke_below(self, name: str, serial: int, now: int) -> None:
        self.state.blocklist.revoked[name] = serial
        self._raise_blocklist(now)

    def _raise_blocklist(self, now: int) -> None:
        held = self.state.blocklist
        held.serial = max(held.serial, held.reserved) + 1
        held.issued = now

    def _write_blocklist(self) -> None:
        text = self.blocklist().to_text()
        path = self.path / BLOCKLIST_FILE
        if not path.exists() or path.read_bytes() != text.encode():
            write_file(path, text)

    def _save(self) -> None:
        write_file(self.path / STATE_FILE, self.state.model_dump_json(indent=1) + "\n", 0o600)

    def _prefixes(
        self, name: str, wanted: Sequence[Network], held: Entry | None
    ) -> tuple[tuple[IPv4Network, ...], tuple[IPv6Network, ...]]:
        supernets = self.state.supernets
        for prefix in wanted:
            self._check_prefix(name, prefix)
        both = overlapping(wanted)
        if both is not None:
            raise ConfigError(
                SIGN, "--prefix", f"prefixes apart from each other; {both[0]} overlaps {both[1]}"
            )
        given: list[Network] = [supernets.overlay6]
        for other, entry in self.state.nodes.items():
            if other != name:
                given += entry.prefixes
        v4 = tuple(prefix for prefix in wanted if isinstance(prefix, IPv4Network))
        v6 = tuple(prefix for prefix in wanted if isinstance(prefix, IPv6Network))
        if not v4:
            v4 = (
                held.prefixes4
                if held
                else _one(free_prefix(supernets.pods, supernets.pods_length, given), "pods")
            )
        if not v6:
            v6 = held.prefixes6 if held else _one(free_prefix(supernets.network6, 64, given), "network6")
        return v4, v6

    def _check_prefix(self, name: str, prefix: Network) -> None:
        supernets = self.state.supernets
        within = supernets.pods if prefix.version == 4 else supernets.network6
        low, high = int(within.network_address), int(within.broadcast_address)
        if not (low <= int(prefix.network_address) and int(prefix.broadcast_address) <= high):
            raise ConfigError(SIGN, "--prefix", f"a prefix inside {within}, got {prefix}")
        if overlap(prefix, supernets.overlay6):
            raise ConfigError(
                SIGN,
                "--prefix",
                f"a prefix apart from the overlay {supernets.overlay6}, got {prefix}",
            )
        for other, entry in self.state.nodes.items():
            for taken in entry.prefixes:
                if other != name and overlap(prefix, taken):
                    raise ConfigError(
                        SIGN, "--prefix", f"a free prefix; {prefix} overlaps {taken} of {other}"
                    )

    def _overlay4(self) -> IPv4Address:
        overlay = self.state.supernets.overlay
        taken = [IPv4Network((entry.overlay4, 32)) for entry in self.state.nodes.values()]
        ends = [IPv4Network((overlay.network_address, 32)), IPv4Network((overlay.broadcast_address, 32))]
        return _one(free_prefix(overlay, 32, [*taken, *ends]), "overlay")[0].network_address

    def _overlay6(self) -> IPv6Address:
        overlay = self.state.supernets.overlay6
        taken = [IPv6Network((entry.overlay6, 128)) for entry in self.state.nodes.values()]
        anycast = IPv6Network((overlay.network_address, 128))  # RFC 4291, 2.6.1
        return _one(free_prefix(overlay, 128, [*taken, anycast]), "overlay6")[0].network_address


def _outdates(new: Entry, old: Entry) -> bool:
    """Tell whether an older certificate must not be used any more, and not only give way."""
    keys = (new.x25519, new.ed25519) != (old.x25519, old.ed25519)
    return keys or not set(old.prefixes) <= set(new.prefixes)


def _chosen(
    wish: tuple[str, ...] | None, held: tuple[str, ...] | None, default: tuple[str, ...]
) -> tuple[str, ...]:
    if wish is not None:
        return wish
    return default if held is None else held


def _one(found: Found | None, what: str) -> tuple[Found]:
    if found is None:
        raise ConfigError(SIGN, what, "a free prefix; all of the supernet is given out")
    return (found,)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(path, "", f"a directory that we may write to; {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def load_state(path: Path) -> Authority:
    """Return the state, without key or lock; `ConfigError` if there is none or it is damaged."""
    file = path / STATE_FILE
    if not file.exists():
        raise ConfigError(path, "", "a certificate authority's directory, made by crossedge ca init")
    text = read_file(file, "the state of a certificate authority")
    try:
        return Authority.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(file, key, f"what crossedge ca wrote; {first['msg']}") from error
