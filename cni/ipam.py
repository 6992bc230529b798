"""Which address a pod gets, and what is kept about it: no I/O, no clock.

Every reservation is an `Entry`, told from all others by its serial number. It is born `ADDING`, becomes
`ADDED` when the pod's devices are there, and ends `GONE`: a tombstone that keeps its addresses from being
given out again until they have cooled down. An entry of an earlier boot is nothing: its pod ended with it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from crossedge.cni.spec import BAD_CONFIG, EXISTS, TRY_LATER, CniError
from crossedge.host.netlink import Address, Network

COOL_DOWN: Final = 30.0
"""Seconds before a freed address is given out again, unless nothing else is left."""
SUSPICION: Final = 10.0
"""Least seconds between the two observations that prove a leak."""

ADDING, ADDED, GONE = "adding", "added", "gone"


@dataclass(frozen=True, slots=True)
class Entry:
    """A reservation of addresses for an attachment, as it is stored."""

    serial: int
    network: str
    container: str
    interface: str
    addresses: tuple[Address, ...]
    host: str = ""
    """Name of the link at the host's side."""
    mac: str = ""
    """Of the pod's interface."""
    host_mac: str = ""
    netns: str = ""
    """Path of the network namespace."""
    inode: int = 0
    """Of the network namespace."""
    boot: str = ""
    """Boot id of the kernel that it lives in."""
    pod: str = ""
    token: str = ""
    """Of the request, so that its repetition after a crash is known for one."""
    state: str = ADDING
    changed: float = 0.0
    """Seconds since boot at the last change of state."""
    suspect: float = 0.0
    """When its namespace was first seen to be gone; 0: it was not."""

    @property
    def key(self) -> tuple[str, str]:
        """What the specification knows an attachment by."""
        return self.container, self.interface

    def to_json(self) -> dict[str, Any]:
        """Return plain values; empty ones are left out."""
        found = {key: value for key, value in asdict(self).items() if value}
        found["addresses"] = [str(address) for address in self.addresses]
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Return the entry of plain values; raises `ValueError`, `TypeError` or `KeyError`."""
        found = {key: data[key] for key in cls.__slots__ if key in data}
        found["addresses"] = tuple(ipaddress.ip_address(text) for text in data["addresses"])
        return cls(**found)


@dataclass(slots=True)
class Ledger:
    """All entries of one boot, by serial number, and what follows from them."""

    boot: str
    entries: dict[int, Entry] = field(default_factory=dict)
    last: int = 0
    """Highest serial number so far."""
    live: dict[tuple[str, str], Entry] = field(default_factory=dict)
    used: dict[Address, int] = field(default_factory=dict)
    """Serial number by address, of live entries."""
    cooling: dict[Address, float] = field(default_factory=dict)
    """When an address was freed, in seconds since boot."""
    cursor: dict[int, Address] = field(default_factory=dict)
    """The address given out last, by family."""

    def apply(self, entry: Entry) -> None:
        """Take in an entry, in place of the one with its serial number."""
        self.last = max(self.last, entry.serial)
        before = self.entries.get(entry.serial)
        if before is not None and before.state != GONE:
            self._forget(before)
        for address in entry.addresses:
            if before is None:
                self.cursor[address.version] = address
        if entry.boot != self.boot:
            self.entries.pop(entry.serial, None)
            return
        self.entries[entry.serial] = entry
        if entry.state == GONE:
            for address in entry.addresses:
                self.cooling[address] = entry.changed
            return
        self.live[entry.key] = entry
        for address in entry.addresses:
            self.used[address] = entry.serial
            self.cooling.pop(address, None)

    def _forget(self, entry: Entry) -> None:
        if self.live.get(entry.key) is entry:
            del self.live[entry.key]
        for address in entry.addresses:
            if self.used.get(address) == entry.serial:
                del self.used[address]

    def expire(self, now: float) -> None:
        """Drop tombstones that have cooled down."""
        for serial in [s for s, e in self.entries.items() if e.state == GONE and now - e.changed > COOL_DOWN]:
            entry = self.entries.pop(serial)
            for address in entry.addresses:
                if self.cooling.get(address) == entry.changed:
                    del self.cooling[address]

    def reserve(self, entry: Entry, prefixes: Collection[Network], wishes: Iterable[Address]) -> Entry:
        """Return `entry` with a serial number and an address of each family that `prefixes` have.

        Nothing changes until the result is given to `apply`. `entry.changed` is now.

        Raises:
            CniError: code 100 (the attachment has addresses already), 11 (no address left, or the one asked
                for is in use), 7 (the one asked for is not ours).
        """
        if entry.key in self.live:
            raise CniError(
                EXISTS, f"container {entry.container} has an interface {entry.interface} on this node already"
            )
        wanted = {address.version: address for address in wishes}
        versions = sorted({prefix.version for prefix in prefixes})
        for version, address in wanted.items():
            if version not in versions:
                raise CniError(BAD_CONFIG, f"address {address}: this node has no IPv{version} prefix")
        found = []
        for version in versions:
            mine = [prefix for prefix in prefixes if prefix.version == version]
            asked = wanted.get(version)
            found.append(self._take(asked, mine) if asked else self._next(mine, entry.changed))
        return replace(entry, serial=self.last + 1, addresses=tuple(found), state=ADDING)

    def _take(self, address: Address, prefixes: list[Network]) -> Address:
        if not any(_usable(address, prefix) for prefix in prefixes):
            raise CniError(
                BAD_CONFIG,
                f"address {address} is not one that this node can give out",
                "its prefixes: " + ", ".join(map(str, prefixes)),
            )
        if address in self.used:
            holder = self.entries[self.used[address]]
            raise CniError(
                TRY_LATER, f"address {address} is in use", f"by {holder.container}/{holder.interface}"
            )
        return address

    def _next(self, prefixes: list[Network], now: float) -> Address:
        """Return the next free address behind the last; a cooling one only where all else is used."""
        oldest: tuple[float, Address] | None = None
        for prefix in self._from_cursor(prefixes):
            for address in _walk(prefix, self.cursor.get(prefix.version)):
                if address in self.used:
                    continue
                freed = self.cooling.get(address)
                if freed is None or now - freed > COOL_DOWN:
                    return address
                if oldest is None or freed < oldest[0]:
                    oldest = freed, address
        if oldest is None:
            raise CniError(
                TRY_LATER,
                f"no IPv{prefixes[0].version} address is left on this node",
                f"all of {', '.join(map(str, prefixes))} are in use; they come free when pods end",
            )
        return oldest[1]

    def _from_cursor(self, prefixes: list[Network]) -> list[Network]:
        cursor = self.cursor.get(prefixes[0].version)
        start = next((i for i, prefix in enumerate(prefixes) if cursor is not None and cursor in prefix), 0)
        return prefixes[start:] + prefixes[:start]

    def available(self, prefixes: Collection[Network]) -> bool:
        """Tell whether another reservation would find an address of each family."""
        for version in {prefix.version for prefix in prefixes}:
            mine = [prefix for prefix in prefixes if prefix.version == version]
            taken = sum(1 for address in self.used if any(_usable(address, prefix) for prefix in mine))
            if taken >= sum(capacity(prefix) for prefix in mine):
                return False
        return bool(prefixes)


def bounds(prefix: Network) -> tuple[int, int]:
    """Return the first and the last offset into a prefix that a pod may have.

    Neither the prefix's own address (with IPv6 the routers' anycast) nor the broadcast address.
    """
    size = prefix.num_addresses
    if size <= 2:
        return 0, size - 1
    return 1, size - 2 if prefix.version == 4 else size - 1


def capacity(prefix: Network) -> int:
    """Return how many pods a prefix holds."""
    first, last = bounds(prefix)
    return last - first + 1


def _usable(address: Address, prefix: Network) -> bool:
    if address.version != prefix.version or address not in prefix:
        return False
    first, last = bounds(prefix)
    return first <= int(address) - int(prefix.network_address) <= last


def _walk(prefix: Network, cursor: Address | None) -> Iterable[Address]:
    """Yield the addresses of a prefix in turn, from the one behind `cursor` round to it."""
    first, last = bounds(prefix)
    base = int(prefix.network_address)
    kind = ipaddress.IPv4Address if prefix.version == 4 else ipaddress.IPv6Address
    start = first
    if cursor is not None and cursor in prefix and int(cursor) - base < last:
        start = max(int(cursor) - base + 1, first)
    for offset in range(start, last + 1):
        yield kind(base + offset)
    for offset in range(first, start):
        yield kind(base + offset)
