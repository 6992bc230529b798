"""A table of nftables as a value: its script, the script of a change, and what the kernel has otherwise."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from crossedge.host.netlink import Network

ELEMENTS_PER_LINE = 64


class Rule(NamedTuple):
    """A rule, without its comment."""

    text: str
    label: str = ""
    """Name of what it counts, for those that have a counter."""

    @property
    def comment(self) -> str:
        """The comment that marks the rule as ours, unchanged: its label and a digest of its text."""
        digest = hashlib.blake2s(self.text.encode(), digest_size=6).hexdigest()
        return f"{self.label or 'crossedge'} {digest}"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain: its rules in order and, if it is a base chain, where it hooks in (its policy is accept)."""

    name: str
    rules: tuple[Rule, ...]
    type: str = ""
    hook: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Ruleset:
    """A private table of family inet."""

    name: str
    sets: Mapping[str, frozenset[Network]]
    """Sets of prefixes that do not overlap; the last character of a name is the IP version."""
    chains: tuple[Chain, ...]

    def script(self) -> str:
        """Return a script that makes the table what it should be, whatever it was, in one transaction."""
        lines = [f"table inet {self.name}", f"delete table inet {self.name}", f"table inet {self.name} {{"]
        for name, networks in sorted(self.sets.items()):
            lines += [f"set {name} {{", f"type ipv{name[-1]}_addr", "flags interval"]
            if networks:
                lines.append(f"elements = {{ {_elements(networks)} }}")
            lines.append("}")
        for chain in self.chains:
            lines.append(f"chain {chain.name} {{")
            if chain.hook:
                lines.append(f"type {chain.type} hook {chain.hook} priority {chain.priority}; policy accept;")
            lines += [f'{rule.text} comment "{rule.comment}"' for rule in chain.rules]
            lines.append("}")
        lines.append("}")
        return "\n".join(lines) + "\n"

    def delta(self, before: Ruleset) -> str | None:
        """Return a script from `before` to this ("" for none); None if more than elements of sets changed."""
        if (self.name, self.chains, self.sets.keys()) != (before.name, before.chains, before.sets.keys()):
            return None
        removed, added = [], []
        for name, networks in self.sets.items():
            old = before.sets[name]
            if networks is old:
                continue
            if gone := old - networks:
                removed.append(f"delete element inet {self.name} {name} {{ {_elements(gone)} }}")
            if new := networks - old:
                added.append(f"add element inet {self.name} {name} {{ {_elements(new)} }}")
        # What goes, goes first: a prefix may have been replaced by a part of it.
        return "\n".join([*removed, *added])

    def differences(self, listed: Sequence[tuple[str, Mapping[str, Any]]] | None) -> list[str]:
        """Return in words how the kernel's table, as nft lists it, differs; nothing if it does not."""
        if listed is None:
            return ["the table is gone"]
        found = []
        shown = {entry["name"]: entry for kind, entry in listed if kind == "chain"}
        comments: dict[str, list[str]] = {name: [] for name in shown}
        for kind, entry in listed:
            if kind == "rule":
                comments.setdefault(entry["chain"], []).append(entry.get("comment", ""))
        for chain in self.chains:
            if chain.name not in shown:
                found.append(f"chain {chain.name} is gone")
                continue
            entry = shown.pop(chain.name)
            if comments[chain.name] != [rule.comment for rule in chain.rules]:
                found.append(f"rules of chain {chain.name} are not ours")
            elif chain.hook and (
                (entry.get("hook"), entry.get("type"), entry.get("prio"), entry.get("policy"))
                != (chain.hook, chain.type, chain.priority, "accept")
            ):
                found.append(f"chain {chain.name} hooks in otherwise")
        found += [f"chain {name} is not ours" for name in shown]
        sets = {entry["name"]: entry for kind, entry in listed if kind == "set"}
        for name, networks in self.sets.items():
            if name not in sets:
                found.append(f"set {name} is gone")
            elif not _same(parse_elements(sets[name].get("elem", [])), networks):
                found.append(f"elements of set {name} are not ours")
        found += [f"set {name} is not ours" for name in sets.keys() - self.sets.keys()]
        return found


def counters(listed: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, int]:
    """Return the packets that labelled rules counted, by label, from what nft lists of a table."""
    found: dict[str, int] = {}
    for kind, entry in listed:
        label = entry.get("comment", "").rpartition(" ")[0] if kind == "rule" else ""
        for expression in entry.get("expr", []) if label else []:
            if isinstance(expression.get("counter"), dict):
                found[label] = found.get(label, 0) + int(expression["counter"].get("packets", 0))
    return found


def _elements(networks: Iterable[Network]) -> str:
    ordered = sorted(networks, key=lambda network: (int(network.network_address), network.prefixlen))
    texts = [str(network) for network in ordered]
    lines = [
        ", ".join(texts[start : start + ELEMENTS_PER_LINE])
        for start in range(0, len(texts), ELEMENTS_PER_LINE)
    ]
    return ",\n".join(lines)


def parse_elements(elements: Iterable[Any]) -> list[Network]:
    """Return the networks of a set's elements, as nft's JSON shows them; else raises `ValueError`."""
    found: list[Network] = []
    for element in elements:
        match element:
            case {"elem": {"val": value}}:
                found += parse_elements([value])
            case str():
                found.append(ipaddress.ip_network(element))
            case {"prefix": {"addr": address, "len": length}}:
                found.append(ipaddress.ip_network(f"{address}/{length}"))
            case {"range": [first, last]}:
                found += _range(ipaddress.ip_address(first), ipaddress.ip_address(last))
            case _:
                raise ValueError(f"{element!r} is no element of a set of prefixes")
    return found


def _range(
    first: ipaddress.IPv4Address | ipaddress.IPv6Address, last: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> list[Network]:
    if isinstance(first, ipaddress.IPv4Address) and isinstance(last, ipaddress.IPv4Address):
        return list(ipaddress.summarize_address_range(first, last))
    if isinstance(first, ipaddress.IPv6Address) and isinstance(last, ipaddress.IPv6Address):
        return list(ipaddress.summarize_address_range(first, last))
    raise ValueError(f"{first}-{last} is no range")


def _same(some: Iterable[Network], others: frozenset[Network]) -> bool:
    """Tell whether two sets hold the same addresses, however they are divided into prefixes."""
    shown = set(some)
    return shown == others or _collapsed(shown) == _collapsed(others)


def _collapsed(networks: Iterable[Network]) -> list[Network]:
    fours = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    sixes = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return [*ipaddress.collapse_addresses(fours), *ipaddress.collapse_addresses(sixes)]


def without_covered(networks: Iterable[Network]) -> dict[int, frozenset[Network]]:
    """Return, by IP version, the networks that no other one holds: sets of intervals refuse overlaps."""
    kept: dict[int, list[Network]] = {4: [], 6: []}
    ordered = sorted(
        (network.version, int(network.network_address), network.prefixlen, position, network)
        for position, network in enumerate(networks)
    )
    end, of = 0, 0
    for version, start, length, _, network in ordered:
        if version == of and start < end:
            continue
        kept[version].append(network)
        end, of = start + (1 << (network.max_prefixlen - length)), version
    return {version: frozenset(those) for version, those in kept.items()}
