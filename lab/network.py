"""A topology built of network namespaces: regions, routers with NATs, nodes, and wires with delay.

    with Network(load_topology("demo")) as network:
        network.popen("home-attic", ["ping", "-c", "1", network.nodes["rendezvous"].address4])

Every region, router and node is a namespace in /run/netns. Call it where nothing else lives there: in the
lab's own mount namespace (`launch.py`) or a test's. Two processes do what the kernel cannot: the delay line
and the modelled NATs. When the object goes, everything goes; when its process dies, they end, and the
namespaces with them.
"""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from types import TracebackType
from typing import Any

from crossedge.host import nft
from crossedge.host.netlink import Batch
from crossedge.host.rules import Rule, add_rule
from crossedge.lab.launch import ROOTS
from crossedge.lab.natbox import TUN_NAME
from crossedge.lab.routerrules import firewall6, kernel_nat, mark_lan
from crossedge.lab.runtime import Pod, Runtime
from crossedge.lab.sites import FORWARDING, Port, Site, join, macs, make_site
from crossedge.lab.topology import AUTO_LAN, KERNEL_NATS, Conditions, Node, Router, Topology
from crossedge.lab.workers import Worker

GATEWAY4, GATEWAY6, CUSTOMER6 = "169.254.0.1", "fe80::1", "fe80::2"
NAT_TABLE, NAT_MARK, NAT_RULE = 100, 1, 100


@dataclass(slots=True)
class PlacedNode:
    """A node and the addresses it got."""

    node: Node
    site: Site
    address4: str
    address6: str | None
    region: str
    nat: str
    runtime: Runtime


@dataclass(slots=True)
class _Region:
    number: int
    site: Site
    customers: int = 0

    @property
    def prefix4(self) -> str:
        return f"5.{self.number}.0.0/16"

    @property
    def prefix6(self) -> str:
        return f"2a00:{self.number:x}::/32"


@dataclass(slots=True)
class PlacedRouter:
    """A router, its LAN and what it got for its WAN."""

    router: Router
    site: Site
    bridge: Port
    lan: IPv4Network
    lan6: IPv6Network | None
    outer: str
    members: int = 0

    @property
    def gateway(self) -> str:
        """Its own address in its LAN."""
        return str(self.lan[1])


class Network:
    """A lab's network, up while the object is entered."""

    def __init__(self, topology: Topology, seed: int = 1) -> None:
        self.topology = topology
        self.seed = seed
        self.nodes: dict[str, PlacedNode] = {}
        self.routers: dict[str, PlacedRouter] = {}
        self.wires: dict[str, Conditions] = {}
        self._regions: dict[str, _Region] = {}
        self._macs = macs()
        self._stack = ExitStack()
        self._wire_ends: list[dict[str, Any]] = []
        self._delayline: Worker | None = None
        self._natbox: Worker | None = None

    def __enter__(self) -> Network:
        with ExitStack() as stack:
            self._stack = stack
            self._build()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def site(self, name: str) -> Site:
        """Return the namespace of a node, router, region or pod; LookupError names what there is."""
        found = self.sites().get(name)
        if found is None:
            raise LookupError(f"no {name!r} in lab {self.topology.name}; there are {', '.join(self.sites())}")
        return found

    def sites(self) -> dict[str, Site]:
        """Return every namespace that a command can run in."""
        sites = {name: placed.site for name, placed in self.nodes.items()}
        for placed in self.nodes.values():
            sites |= {name: pod.site for name, pod in placed.runtime.pods.items()}
        sites |= {name: router.site for name, router in self.routers.items()}
        return sites | {region.site.name: region.site for region in self._regions.values()}

    def popen(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in a namespace; options are those of `subprocess.Popen`."""
        with self.site(name).namespace:
            return subprocess.Popen(list(command), **options)

    def run(
        self, name: str, command: Sequence[str], timeout: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a namespace to its end; both outputs are captured as text."""
        with self.site(name).namespace:
            return subprocess.run(list(command), capture_output=True, text=True, timeout=timeout, check=False)

    def attach_pod(self, node: str, name: str) -> Pod:
        """Give a node a pod, by the CNI plugin that is installed below the node's root."""
        return self.nodes[node].runtime.add(f"pod-{name}")

    def detach_pod(self, node: str, name: str) -> None:
        """Take a pod from a node, by the same plugin."""
        self.nodes[node].runtime.delete(f"pod-{name}")

    def set_wire(self, name: str, conditions: Conditions, *, cut: bool = False, way: str = "both") -> None:
        """Change a wire that has a delay line, now; `cut` loses everything."""
        if self._delayline is None or name not in {wire["name"] for wire in self._wire_ends}:
            raise LookupError(f"no delayed wire {name!r} in lab {self.topology.name}")
        given = {**conditions.model_dump(), "cut": cut}
        self._delayline.ask({"set": name, "conditions": given, "way": way})
        self.wires[name] = conditions

    def reboot(self, router: str) -> None:
        """Let a router with a modelled NAT forget its mappings."""
        if self._natbox is None:
            raise LookupError(f"no modelled router in lab {self.topology.name}")
        self._natbox.ask({"reboot": router})

    def trace(self, wire: str) -> dict[str, list[tuple[int, int, int]]]:
        """Return the last frames that left a wire, by the end ("a" or "b") that they came in at.

        Of each its Unix time of arrival in nanoseconds, its bytes, and for how many nanoseconds the wire
        really had it.
        """
        if self._delayline is None or wire not in self.wires:
            raise LookupError(f"no wire {wire!r} in lab {self.topology.name}")
        answer = self._delayline.ask({"trace": wire})
        return {end: [(at, size, here) for at, size, here in answer[end]] for end in "ab"}

    def processes(self) -> set[int]:
        """Return the ids of the processes that the lab runs itself."""
        return {w.process.pid for w in (self._delayline, self._natbox) if w is not None}

    def status(self) -> dict[str, Any]:
        """Return what there is and what it counted."""
        wires = self._delayline.ask({"stats": True})["wires"] if self._delayline else {}
        boxes = self._natbox.ask({"stats": True})["boxes"] if self._natbox else {}
        return {
            "name": self.topology.name,
            "nodes": [
                {
                    "name": name,
                    "region": placed.region,
                    "nat": placed.nat,
                    "ipv4": placed.address4,
                    "ipv6": placed.address6,
                    "pods": list(placed.runtime.pods),
                }
                for name, placed in self.nodes.items()
            ],
            "routers": [
                {
                    "name": name,
                    "nat": placed.router.nat,
                    "outer": placed.outer,
                    "lan": str(placed.lan),
                    **boxes.get(name, {}),
                }
                for name, placed in self.routers.items()
            ],
            "wires": [
                {"name": name, **conditions.model_dump(exclude_defaults=True), "counts": wires.get(name)}
                for name, conditions in self.wires.items()
            ],
        }

    # Building

    def _build(self) -> None:
        topology = self.topology
        self._wires = make_site(self._stack, "wires", self._macs, named=False)
        self._wires.tune({f"net/ipv6/conf/{scope}/disable_ipv6": "1" for scope in ("all", "default")})
        for number, region in enumerate(topology.region, 1):
            site = self._make_site(f"region-{region.name}")
            site.tune(FORWARDING)
            self._regions[region.name] = _Region(number, site)
        for number, backbone in enumerate(topology.backbone):
            self._join_regions(number, *backbone.between, backbone.link)
        self._route_regions()
        for router in self._outermost_first():
            self._place_router(router)
        for node in topology.node:
            self._place_node(node)
        self._start_workers()

    def _make_site(self, name: str) -> Site:
        return make_site(self._stack, name, self._macs)

    def _outermost_first(self) -> list[Router]:
        waiting = deque(self.topology.router)
        placed: list[Router] = []
        while waiting:
            router = waiting.popleft()
            if router.behind is None or any(outer.name == router.behind for outer in placed):
                placed.append(router)
            else:
                waiting.append(router)
        return placed

    def _wire(self, name: str, a: Port, b: Port, conditions: Conditions) -> None:
        """Join two ports, by a bare veth pair or through the delay line."""
        self.wires[name] = conditions
        if conditions.plain:
            join(a, b)
            return
        number = len(self._wire_ends)
        ends = self._wires.port(f"w{number}a"), self._wires.port(f"w{number}b")
        join(a, ends[0])
        join(b, ends[1])
        self._wire_ends.append(
            {"name": name, "a": ends[0].name, "b": ends[1].name, "conditions": conditions.model_dump()}
        )

    def _join_regions(self, number: int, first: str, second: str, conditions: Conditions) -> None:
        pairs = [(self._regions[first], second), (self._regions[second], first)]
        a, b = (region.site.port(f"b-{other}"[:15]) for region, other in pairs)
        self._wire(f"{first}-{second}", a, b, conditions)
        for mine, other, side in ((a, b, 1), (b, a, 2)):
            mine.site.address(mine, f"169.254.{number + 1}.{side}/32", local=True)
            mine.site.address(mine, f"fe80::{side}/64", local=True)
            mine.site.neighbour(mine, f"169.254.{number + 1}.{3 - side}", other.mac)
            mine.site.neighbour(mine, f"fe80::{3 - side}", other.mac)

    def _route_regions(self) -> None:
        """Route every region's prefixes along the fewest backbones."""
        links: dict[str, list[tuple[str, int, int]]] = {name: [] for name in self._regions}
        for number, backbone in enumerate(self.topology.backbone):
            first, second = backbone.between
            links[first].append((second, number, 2))
            links[second].append((first, number, 1))
        for name, region in self._regions.items():
            hop: dict[str, tuple[str, int, int]] = {}
            seen, queue = {name}, deque([name])
            while queue:
                here = queue.popleft()
                for other, number, side in links[here]:
                    if other not in seen:
                        seen.add(other)
                        queue.append(other)
                        hop[other] = hop.get(here, (other, number, side))
            for target, (neighbour, number, side) in hop.items():
                port = region.site.ports[f"b-{neighbour}"[:15]]
                far = self._regions[target]
                region.site.route(far.prefix4, port.index, f"169.254.{number + 1}.{side}")
                region.site.route(far.prefix6, port.index, f"fe80::{side}")

    def _customer(self, name: str, region: _Region, port: Port, conditions: Conditions) -> tuple[str, str]:
        """Join a customer's port to a region; return its IPv4 address and the first 48 bits of its IPv6."""
        region.customers += 1
        number = region.customers
        mine = region.site.port(f"c{number}")
        self._wire(name, mine, port, conditions)
        outer, six = f"5.{region.number}.{number >> 8}.{number & 255}", f"2a00:{region.number:x}:{number:x}"
        region.site.address(mine, f"{GATEWAY4}/32", local=True)
        region.site.address(mine, f"{GATEWAY6}/64", local=True)
        region.site.route(f"{outer}/32", mine.index)
        region.site.neighbour(mine, outer, port.mac)
        region.site.neighbour(mine, CUSTOMER6, port.mac)
        region.site.route(f"{six}::/48", mine.index, CUSTOMER6)
        port.site.neighbour(port, GATEWAY4, mine.mac)
        port.site.neighbour(port, GATEWAY6, mine.mac)
        return outer, six

    def _place_router(self, router: Router) -> None:
        site = self._make_site(router.name)
        site.tune(FORWARDING)
        wan = site.port("wan")
        modelled = router.nat not in KERNEL_NATS
        if router.behind is None:
            region = self._regions[router.region or ""]
            outer, six = self._customer(router.name, region, wan, router.link)
            if not modelled:
                site.address(wan, f"{outer}/32")
            site.route("0.0.0.0/0", wan.index, GATEWAY4)
            if router.ipv6:
                site.address(wan, f"{CUSTOMER6}/64", local=True)
                site.route("::/0", wan.index, GATEWAY6)
        else:
            above = self.routers[router.behind]
            outer, six = self._lan_member(router.name, above, wan, router.link), ""
            above.site.neighbour(above.bridge, outer, wan.mac)
            site.neighbour(wan, above.gateway, above.bridge.mac)
            if not modelled:
                site.address(wan, f"{outer}/{above.lan.prefixlen}", connected=True)
            site.route("0.0.0.0/0", wan.index, above.gateway)
        bridge = site.bridge("lan")
        lan = IPv4Network(router.lan or f"{AUTO_LAN}{len(self.routers)}.0/24")
        site.address(bridge, f"{lan[1]}/{lan.prefixlen}", connected=True)
        lan6 = None
        if router.ipv6:
            lan6 = IPv6Network(f"{six}:1::/64")
            site.link_local(bridge)
            site.address(bridge, f"{lan6[1]}/64", connected=True)
        self.routers[router.name] = PlacedRouter(router, site, bridge, lan, lan6, outer)
        script = firewall6()
        script += mark_lan(NAT_MARK) if modelled else kernel_nat(router.nat)
        site.namespace.call(nft.apply, script)
        if modelled:
            site.tune({"net/ipv4/conf/wan/proxy_arp": "1"})

    def _lan_member(self, name: str, router: PlacedRouter, port: Port, conditions: Conditions) -> str:
        """Join a port to a router's LAN; return the address that it may take."""
        router.members += 1
        mine = router.site.port(f"p{router.members}")
        self._wire(name, mine, port, conditions)
        router.site.enslave(mine, router.bridge)
        return str(router.lan[1 + router.members])

    def _place_node(self, node: Node) -> None:
        site = self._make_site(node.name)
        port = site.port("eth0")
        six: str | None = None
        if node.router is None:
            region = self._regions[node.region or ""]
            address, prefix = self._customer(node.name, region, port, node.link)
            site.address(port, f"{address}/32")
            site.route("0.0.0.0/0", port.index, GATEWAY4)
            if node.ipv6:
                six = f"{prefix}:1::1"
                site.address(port, f"{CUSTOMER6}/64", local=True)
                site.address(port, f"{six}/128")
                site.route("::/0", port.index, GATEWAY6)
        else:
            router = self.routers[node.router]
            address = self._lan_member(node.name, router, port, node.link)
            site.address(port, f"{address}/{router.lan.prefixlen}", connected=True)
            site.route("0.0.0.0/0", port.index, router.gateway)
            if node.ipv6 and router.lan6 is not None:
                six = str(router.lan6[1 + router.members])
                site.link_local(port)
                site.address(port, f"{six}/64", connected=True)
                site.route("::/0", port.index, str(router.lan6[1]))
        runtime = Runtime(site, ROOTS / node.name, self._macs)
        self._stack.callback(runtime.close)
        self.nodes[node.name] = PlacedNode(
            node, site, address, six, self.topology.region_of(node), self.topology.nat_of(node), runtime
        )

    def _start_workers(self) -> None:
        boxes = [placed for placed in self.routers.values() if placed.router.nat not in KERNEL_NATS]
        if boxes:
            self._natbox = self._worker(
                "crossedge.lab.natbox",
                {
                    "seed": self.seed,
                    "boxes": [
                        {
                            "name": placed.router.name,
                            "namespace": placed.site.namespace.fileno(),
                            "nat": placed.router.nat,
                            "addresses": [placed.outer],
                            "lan": str(placed.lan),
                        }
                        for placed in boxes
                    ],
                },
                [placed.site.namespace.fileno() for placed in boxes],
            )
            for placed in boxes:
                index = placed.site.index_of(TUN_NAME)
                placed.site.tune({f"net/ipv6/conf/{TUN_NAME}/disable_ipv6": "1"})
                placed.site.route(f"{placed.outer}/32", index)
                placed.site.route("0.0.0.0/0", index, table=NAT_TABLE)
                batch = Batch()
                add_rule(batch, Rule(2, NAT_RULE, NAT_TABLE, mark=NAT_MARK))
                placed.site.netlink.run(batch)
        if self._wire_ends:
            descriptor = self._wires.namespace.fileno()
            first = {"seed": self.seed, "namespace": descriptor, "wires": self._wire_ends}
            self._delayline = self._worker("crossedge.lab.delayline", first, [descriptor])

    def _worker(self, module: str, first: dict[str, Any], descriptors: list[int]) -> Worker:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # `pass_fds` makes them inheritable in the child only
        worker = Worker(module, first, descriptors)
        self._stack.callback(worker.stop)
        return worker
