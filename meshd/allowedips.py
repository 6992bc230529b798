"""Which peer an address belongs to: longest-prefix match over IPv4 and IPv6.

One dict per prefix length, asked from the longest down. A mesh uses two or three lengths per family, so that
a miss costs two or three dict look-ups; the answers for single addresses are cached besides, within a bound.
Outbound the destination's owner is the peer to send to; inbound the source's owner must be the peer that sent
(the "cryptokey routing" of the WireGuard paper, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Generic, TypeAlias, TypeVar

Network: TypeAlias = IPv4Network | IPv6Network
Value = TypeVar("Value")

CACHED_ADDRESSES: Final = 4096  # answers remembered; the cache is emptied when it is full


class AllowedIPs(Generic[Value]):
    """Networks and whose they are. A network has one owner: giving it to another takes it from the first."""

    def __init__(self) -> None:
        self._networks: dict[Network, Value] = {}
        self._tables: dict[int, list[tuple[int, dict[int, Value]]]] = {4: [], 16: []}
        self._cache: dict[bytes, Value | None] = {}
        self._watchers: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._networks)

    def __iter__(self) -> Iterator[tuple[Network, Value]]:
        return iter(list(self._networks.items()))

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` with each change, so that whoever remembers answers forgets them."""
        self._watchers.append(changed)

    def insert(self, network: Network, value: Value) -> Value | None:
        """Give `network` to `value`; returns who had exactly this network before, else None."""
        previous = self._networks.get(network)
        self._networks[network] = value
        shift = network.max_prefixlen - network.prefixlen
        self._table(network, shift)[int(network.network_address) >> shift] = value
        self._changed()
        return previous

    def remove(self, network: Network) -> Value | None:
        """Take `network` from its owner and return the owner; None where nobody had it."""
        if network not in self._networks:
            return None
        value = self._networks.pop(network)
        shift = network.max_prefixlen - network.prefixlen
        table = self._table(network, shift)
        del table[int(network.network_address) >> shift]
        if not table:
            tables = self._tables[network.max_prefixlen // 8]
            tables[:] = [entry for entry in tables if entry[1]]
        self._changed()
        return value

    def remove_value(self, value: Value) -> list[Network]:
        """Take every network from `value` and return them."""
        networks = self.networks_of(value)
        for network in networks:
            self.remove(network)
        return networks

    def networks_of(self, value: Value) -> list[Network]:
        """Return the networks that belong to `value`."""
        return [network for network, owner in self._networks.items() if owner is value]

    def lookup(self, address: bytes) -> Value | None:
        """Return the owner of a packed address (4 or 16 bytes), by its longest network; None where nobody is.

        Any other length belongs to nobody.
        """
        try:
            return self._cache[address]
        except KeyError:
            pass
        number = int.from_bytes(address, "big")
        found: Value | None = None
        for shift, table in self._tables.get(len(address), ()):
            found = table.get(number >> shift)
            if found is not None:
                break
        if len(self._cache) >= CACHED_ADDRESSES:
            self._cache.clear()
        self._cache[address] = found
        return found

    def _table(self, network: Network, shift: int) -> dict[int, Value]:
        tables = self._tables[network.max_prefixlen // 8]
        for known, table in tables:
            if known == shift:
                return table
        table = {}
        tables.append((shift, table))
        tables.sort(key=lambda entry: entry[0])
        return table

    def _changed(self) -> None:
        self._cache.clear()
        for changed in self._watchers:
            changed()
