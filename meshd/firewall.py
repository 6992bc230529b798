"""Our table of nftables, `inet crossedge`, from what the host should look like. No other table is touched.

prerouting   our own datagrams get our mark back; nothing enters by the far end of a veth pair in the TUN's
             place; a mesh source from outside the TUN is a lie
forward      TCP's segment size fits the TUN; from the TUN only to our pods, and what the inbound rules say;
             to the mesh only through the TUN
input        from the TUN what the inbound rules say
output       to the mesh only through the TUN
postrouting  pods reach the world by the host's address, but each other by their own
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from itertools import chain as joined

from crossedge.host.netlink import Network
from crossedge.host.vethpair import far_name
from crossedge.meshd.desired import ANYONE, MARK, Desired, InboundRule
from crossedge.meshd.ruleset import Chain, Rule, Ruleset, without_covered

TABLE = "crossedge"
FAMILY = "inet"
PRIORITY_RAW = -300
PRIORITY_FILTER = 0
PRIORITY_SRCNAT = 100
MULTICAST = {"ip": "224.0.0.0/4", "ip6": "ff00::/8"}
VERSIONS = {"ip": "4", "ip6": "6"}
TCP_HEADERS = {"ipv4": 40, "ipv6": 60}
"""Bytes of IP and TCP header that a segment's size does not count."""


Cache = dict[str, tuple[frozenset[Network], dict[int, frozenset[Network]]]]
"""What was made of the members of each group, for groups that have not changed since."""


def build(desired: Desired, cache: Cache | None = None) -> Ruleset:
    """Return the table; raises `ValueError` for an interface name that cannot be quoted.

    With a `cache`, kept between calls, a group whose members are those of before costs little.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.@+=,-]{1,15}", desired.tun):
        raise ValueError(f"interface name {desired.tun!r} cannot be used in nftables")
    groups = {rule.group for rule in desired.inbound} - {ANYONE}
    sets: dict[str, frozenset[Network]] = {}
    _add(sets, "pods", desired.pods)
    _add(sets, "mesh", desired.mesh)
    _add(sets, "through", joined(desired.mesh, (peer.prefix for peer in desired.stock)))
    known = {} if cache is None else cache
    for group in known.keys() - groups:
        del known[group]
    for group in groups:
        members = desired.members.get(group, frozenset())
        if group not in known or known[group][0] != members:
            known[group] = members, without_covered(members)
        for version, networks in known[group][1].items():
            sets[f"{group_set(group)}{version}"] = networks
    tun = f'"{desired.tun}"'
    return Ruleset(
        TABLE,
        sets,
        (
            Chain("prerouting", _prerouting(desired), "filter", "prerouting", PRIORITY_RAW),
            Chain("forward", _forward(tun, desired.mtu), "filter", "forward", PRIORITY_FILTER),
            Chain("input", (Rule(f"iifname {tun} goto inbound_host"),), "filter", "input", PRIORITY_FILTER),
            Chain("output", _output(tun), "filter", "output", PRIORITY_FILTER),
            Chain("postrouting", _postrouting(tun), "nat", "postrouting", PRIORITY_SRCNAT),
            Chain("inbound_pods", _inbound(desired.inbound, "pods")),
            Chain("inbound_host", _inbound(desired.inbound, "host")),
        ),
    )


def group_set(group: str) -> str:
    """Return the name, without IP version, of the set of a group's source prefixes."""
    readable = re.sub(r"[^a-z0-9]+", "_", group.lower())[:24]
    return f"group_{readable}_{hashlib.blake2s(group.encode(), digest_size=4).hexdigest()}_"


def _add(sets: dict[str, frozenset[Network]], name: str, networks: Iterable[Network]) -> None:
    for version, kept in without_covered(networks).items():
        sets[f"{name}{version}"] = kept


def _prerouting(desired: Desired) -> tuple[Rule, ...]:
    rules = []
    if desired.port:
        # A strict check of the reverse path, where a route into the TUN covers a peer's address, needs it.
        rules.append(Rule(f"udp dport {desired.port} fib daddr type local meta mark set {MARK:#x}"))
    rules += _done(f'iifname "{desired.tun}"', 'iifname "lo"')
    # What leaves the host by the TUN arrives there, for our packet socket and nobody else.
    rules.append(Rule(f'iifname "{far_name(desired.tun)}" drop'))
    rules += [
        Rule(f"{family} saddr @mesh{version} {family} saddr != @pods{version} counter drop", "spoofed")
        for family, version in VERSIONS.items()
    ]
    return tuple(rules)


def _done(*conditions: str) -> list[Rule]:
    """Let go what the rules of a chain are not for, first: every packet passes here, and each match costs."""
    return [Rule(f"{condition} accept") for condition in conditions]


def _forward(tun: str, mtu: int) -> tuple[Rule, ...]:
    syn = "tcp flags & (syn | rst) == syn tcp option maxseg size"
    rules = [Rule(f"oifname {tun} {syn} set rt mtu")]
    for nfproto, headers in TCP_HEADERS.items():
        size = mtu - headers
        clamp = f"{syn} > {size} tcp option maxseg size set {size}"
        rules.append(Rule(f"iifname {tun} meta nfproto {nfproto} {clamp}"))
    rules.append(Rule(f"iifname {tun} goto inbound_pods"))
    rules += [Rule(f"oifname != {tun} {leak}", "leak") for leak in _leaks()]
    return tuple(rules)


def _output(tun: str) -> tuple[Rule, ...]:
    done = _done(f"meta mark {MARK:#x}", f"oifname {tun}", 'oifname "lo"')
    return (*done, *(Rule(leak, "leak") for leak in _leaks()))


def _leaks() -> list[str]:
    no_route = "counter reject with icmpx no-route"
    return [
        f"{family} daddr @through{version} {family} daddr != @pods{version} {no_route}"
        for family, version in VERSIONS.items()
    ]


def _postrouting(tun: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            f"oifname != {tun} {family} saddr @pods{version} {family} daddr != @mesh{version} "
            f"{family} daddr != {MULTICAST[family]} masquerade"
        )
        for family, version in VERSIONS.items()
    )


def _inbound(inbound: tuple[InboundRule, ...], to: str) -> tuple[Rule, ...]:
    rules = [Rule("ct state established,related accept")]
    if to == "pods":
        # What peers may send to is checked by the data path already; this is the second lock.
        rules += [
            Rule(f"{family} daddr != @pods{version} counter drop", "not-our-pod")
            for family, version in VERSIONS.items()
        ]
    if not inbound:
        return (*rules, Rule("accept"))
    for rule in inbound:
        if rule.to == to:
            rules += [Rule(text) for text in _accept(rule)]
    return (*rules, Rule("counter reject with icmpx admin-prohibited", f"refused-{to}"))


def _accept(rule: InboundRule) -> list[str]:
    if rule.group == ANYONE:
        return [f"{_traffic(rule, 'icmp, ipv6-icmp')}accept"]
    name = group_set(rule.group)
    return [
        f"{family} saddr @{name}{version} {_traffic(rule, 'icmp' if family == 'ip' else 'ipv6-icmp')}accept"
        for family, version in VERSIONS.items()
    ]


def _traffic(rule: InboundRule, icmp: str) -> str:
    """Return the match of a rule's protocol and ports, followed by a space unless it is empty."""
    ports = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in _merged(rule.ports))
    if rule.protocol == "icmp":
        return f"meta l4proto {{ {icmp} }} "
    if rule.protocol == "any":
        return f"meta l4proto {{ tcp, udp }} th dport {{ {ports} }} " if ports else ""
    return f"{rule.protocol} dport {{ {ports} }} " if ports else f"meta l4proto {rule.protocol} "


def _merged(ports: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ports):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged
