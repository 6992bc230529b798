"""Topology files: which regions, routers and nodes a lab has, in TOML."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from crossedge.lab.natkinds import KINDS
from crossedge.wire.errors import ConfigError
from crossedge.wire.settings import Settings, parse_settings

KERNEL_NATS = {
    "kernel": "nftables masquerade; new input from the WAN is dropped, as home routers do",
    "kernel-accepting": "nftables masquerade; the router accepts input from the WAN",
    "kernel-random": "nftables masquerade random",
    "kernel-fully-random": "nftables masquerade fully-random",
}
"""Routers whose NAT is the kernel's own; every other kind is one of `natkinds.KINDS`."""
RESERVED = ("region-", "pod-")


def _nat(value: str) -> str:
    known = [*KERNEL_NATS, *(name for name, kind in KINDS.items() if kind.translates)]
    if value not in known:
        raise ValueError(f"one of {', '.join(known)}")
    return value


def _lan(value: str) -> str:
    try:
        network = ipaddress.IPv4Network(value)
    except ValueError as error:
        raise ValueError(f"an IPv4 prefix such as 192.168.1.0/24 ({error})") from error
    if not network.is_private or not 8 <= network.prefixlen <= 29:
        raise ValueError("a private IPv4 prefix of 8 to 29 bits")
    return value


def _free_name(value: str) -> str:
    if value.startswith(RESERVED):
        raise ValueError(f"a name that does not begin with {', '.join(RESERVED)}")
    return value


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$"), AfterValidator(_free_name)]
Share = Annotated[float, Field(ge=0, lt=1)]
Milliseconds = Annotated[float, Field(ge=0, le=10_000)]


class Conditions(Settings):
    """What a link does to packets, the same in both directions."""

    delay_ms: Milliseconds = 0.0
    """One-way delay in milliseconds."""
    jitter_ms: Milliseconds = 0.0
    """Added to the delay, uniform from 0 to this, in milliseconds; order is kept."""
    loss: Share = 0.0
    """Share of packets lost, 0 to 1."""
    reorder: Share = 0.0
    """Share of packets that are held back by `reorder_ms`, so that later ones overtake them, 0 to 1."""
    reorder_ms: Milliseconds = 1.0
    """How long, in milliseconds."""
    rate_mbit: float | None = Field(default=None, gt=0, le=100_000)
    """Rate limit in Mbit/s; none: as fast as the machine."""
    queue_kib: int = Field(default=512, ge=4, le=65_536)
    """Most that waits at a limited rate, in KiB."""
    mtu: int = Field(default=1500, ge=576, le=1500)
    """Largest IP packet in bytes."""
    mtu_icmp: bool = True
    """Answer larger packets with ICMP; false: they vanish (a path MTU black hole)."""

    @property
    def plain(self) -> bool:
        """Tell whether a bare veth pair does as well."""
        return self == Conditions()


class Region(Settings):
    """A part of the internet with a router of its own."""

    name: Name


class Backbone(Settings):
    """How two regions are joined."""

    between: tuple[Name, Name]
    link: Conditions = Conditions()


class Router(Settings):
    """A router with a LAN behind it and a NAT between."""

    name: Name
    region: Name | None = None
    """The region that its WAN is in; or see `behind`."""
    behind: Name | None = None
    """The router whose LAN its WAN is in: double NAT."""
    nat: Annotated[str, AfterValidator(_nat)] = "kernel"
    """Kind of NAT."""
    lan: Annotated[str, AfterValidator(_lan)] | None = None
    """IPv4 prefix of its LAN; none: the next free one."""
    ipv6: bool = False
    """Give the LAN a global IPv6 prefix, behind a stateful firewall."""
    link: Conditions = Conditions()
    """The link of its WAN."""


class Node(Settings):
    """A machine."""

    name: Name
    region: Name | None = None
    """The region where it has a public address; or see `router`."""
    router: Name | None = None
    """The router whose LAN it is in."""
    ipv6: bool = False
    """Give it a global IPv6 address too (its router needs `ipv6`)."""
    role: Literal["node", "server"] = "node"
    """What it is for: "node" runs meshd, "server" something else, such as the rendezvous."""
    link: Conditions = Conditions()
    """The link to its router or region."""


class Topology(Settings):
    """A lab."""

    name: Name
    region: tuple[Region, ...] = Field(min_length=1, max_length=64)
    backbone: tuple[Backbone, ...] = ()
    router: tuple[Router, ...] = Field(default=(), max_length=200)
    node: tuple[Node, ...] = Field(default=(), max_length=200)

    def nat_of(self, node: Node) -> str:
        """Return what NATs stand before a node, the outermost last: "none" where there is none."""
        kinds = [router.nat for router in self.routers_above(node)]
        return " behind ".join(kinds) if kinds else "none"

    def region_of(self, node: Node) -> str:
        """Return the name of the region that a node's packets enter."""
        above = list(self.routers_above(node))
        return (above[-1].region if above else node.region) or ""

    def routers_above(self, node: Node) -> Iterator[Router]:
        """Yield the routers between a node and its region, the nearest first."""
        routers = {router.name: router for router in self.router}
        name = node.router
        while name is not None:
            yield routers[name]
            name = routers[name].behind


def named_topologies() -> dict[str, str]:
    """Return the text of each topology that comes with the lab, by name."""
    folder = resources.files("crossedge.lab") / "topologies"
    return {
        entry.name.removesuffix(".toml"): entry.read_text()
        for entry in sorted(folder.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".toml")
    }


def load_topology(name: str) -> Topology:
    """Return the topology in a file, or one that comes with the lab; `ConfigError` says what is wrong."""
    path = Path(name)
    if path.suffix == ".toml" or "/" in name:
        try:
            return parse_topology(path.read_text(), name)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(name, "", f"a readable TOML file ({error})") from error
    known = named_topologies()
    if name not in known:
        raise ConfigError(name, "", f"a .toml file or one of {', '.join(known)}")
    return parse_topology(known[name], f"{name}.toml")


def parse_topology(text: str, file: str) -> Topology:
    """Return the topology of a TOML text; `ConfigError` names the file and the key at fault."""
    topology = parse_settings(text, file, Topology)
    _check(topology, file)
    return topology


def _check(topology: Topology, file: str) -> None:
    """Check what one model cannot see: that names are unique and refer to what there is."""
    regions = {region.name for region in topology.region}
    routers = {router.name: router for router in topology.router}
    names: set[str] = set()
    keys = [(f"router.{index}", router.name) for index, router in enumerate(topology.router)]
    keys += [(f"node.{index}", node.name) for index, node in enumerate(topology.node)]
    for key, name in keys:
        if name in names:
            raise ConfigError(file, f"{key}.name", f"a name used once, got {name!r} again")
        names.add(name)
    if len(regions) != len(topology.region):
        raise ConfigError(file, "region", "names used once")
    for index, backbone in enumerate(topology.backbone):
        for name in backbone.between:
            if name not in regions:
                raise ConfigError(file, f"backbone.{index}.between", f"names of regions, got {name!r}")
        if backbone.between[0] == backbone.between[1]:
            raise ConfigError(file, f"backbone.{index}.between", "two different regions")
    for index, router in enumerate(topology.router):
        _check_place(file, f"router.{index}", "behind", router.region, router.behind, regions, routers)
        if router.ipv6 and router.behind is not None:
            raise ConfigError(file, f"router.{index}.ipv6", "false for a router behind another")
        seen = {router.name}
        outer = router.behind
        while outer is not None:
            if outer in seen:
                raise ConfigError(file, f"router.{index}.behind", "no circle of routers")
            seen.add(outer)
            outer = routers[outer].behind if outer in routers else None
    for index, node in enumerate(topology.node):
        _check_place(file, f"node.{index}", "router", node.region, node.router, regions, routers)
        if node.ipv6 and node.router is not None and not routers[node.router].ipv6:
            raise ConfigError(file, f"node.{index}.ipv6", f"false, as router {node.router} has no IPv6")
    lans = [(f"router.{i}.lan", router.lan) for i, router in enumerate(topology.router) if router.lan]
    for key, lan in lans:
        if lan.startswith(AUTO_LAN):
            raise ConfigError(file, key, f"a prefix outside {AUTO_LAN}0.0/16, which is given out by itself")


AUTO_LAN = "172.28."
"""LANs without a prefix of their own get 172.28.N.0/24."""


def _check_place(
    file: str,
    key: str,
    other: str,
    region: str | None,
    above: str | None,
    regions: set[str],
    routers: dict[str, Router],
) -> None:
    if (region is None) == (above is None):
        raise ConfigError(file, key, f'either "region" or "{other}"')
    if region is not None and region not in regions:
        raise ConfigError(file, f"{key}.region", f"one of {', '.join(sorted(regions))}, got {region!r}")
    if above is not None and above not in routers:
        raise ConfigError(
            file, f"{key}.{other}", f"one of {', '.join(sorted(routers)) or 'no routers'}, got {above!r}"
        )
