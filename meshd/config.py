"""The daemon's configuration: /etc/crossedge/meshd.toml, parsed once.

Every key has a default but those of a static peer, so a node needs no file at all: its bundle says what the
network is, its key directory who it is.
"""

from __future__ import annotations

import base64
import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from crossedge.meshd.scheduler import Target
from crossedge.wire.settings import Settings


def _key(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("a base64 key of 32 bytes")
    try:
        key = base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ValueError("a base64 key of 32 bytes") from error
    if len(key) != 32:
        raise ValueError("a base64 key of 32 bytes")
    return key


def _network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if not isinstance(value, str):
        raise ValueError("a prefix such as 10.8.0.2/32")
    try:
        return ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"a prefix such as 10.8.0.2/32 ({error})") from error


def _host_port(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("host:port, or [IPv6]:port")
    return value


def _ports(value: str) -> str:
    first, separator, last = value.partition("-")
    try:
        low, high = int(first), int(last) if separator else int(first)
    except ValueError:
        low, high = 0, 0
    if not 0 < low <= high < 65536:
        raise ValueError('a port such as "443" or a range such as "8000-8010"')
    return value


Key = Annotated[bytes, BeforeValidator(_key)]
Network = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, PlainValidator(_network)]
HostPort = Annotated[str, AfterValidator(_host_port)]
Ports = Annotated[str, AfterValidator(_ports)]
InterfaceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")]


class Listen(Settings):
    """Where the daemon's one UDP port is."""

    port: int = Field(default=41820, ge=0, le=65535)
    """UDP port, the same for IPv4 and IPv6; 0 lets the kernel choose."""
    ipv4: bool = True
    """Open an IPv4 socket."""
    ipv6: bool = True
    """Open an IPv6 socket, where the kernel has IPv6."""


class Tun(Settings):
    """The virtual interface."""

    name: InterfaceName = "crossedge0"
    """Interface name, at most 15 characters."""
    mtu: int = Field(default=1380, ge=1280, le=9000)
    """MTU in bytes that pods see, the same on every path."""


class Inbound(Settings):
    """One rule of what members of a group may reach here. With no rules at all every member may reach all."""

    group: str = Field(min_length=1, max_length=64)
    """Certificate group that may enter, or "any"."""
    protocol: Literal["tcp", "udp", "icmp", "any"] = "any"
    """Protocol that is let in; "icmp" means ICMP and ICMPv6."""
    ports: tuple[Ports, ...] = ()
    """Ports or ranges; empty means all."""
    to: Literal["pods", "host"] = "pods"
    """What may be reached: the pods, or the host itself."""

    @model_validator(mode="after")
    def _has_ports_where_there_are_ports(self) -> Inbound:
        if self.ports and self.protocol == "icmp":
            raise ValueError('no ports with protocol "icmp", which has none')
        return self


class StaticPeer(Settings):
    """A stock WireGuard peer, outside the certificate authority."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    """Name for status output."""
    public_key: Key
    """Its X25519 public key, base64."""
    preshared_key_file: Path | None = None
    """File with a base64 pre-shared key (mode 0600), or none."""
    endpoint: HostPort | None = None
    """Where it listens; none means that it comes to us."""
    allowed_ips: tuple[Network, ...] = Field(min_length=1)
    """What it may send from, and what is routed to it."""
    keepalive: int = Field(default=0, ge=0, le=65535)
    """Persistent keepalive in seconds; 0 is off."""


class Pods(Settings):
    """What container runtimes are told of this node."""

    unreachable_after: float = Field(default=60.0, ge=5.0, le=3600.0)
    """Seconds without reaching any peer after which the CNI plugin's STATUS says so (code 51)."""


def _scheduler(value: str) -> str:
    Target.parse(value)
    return value


SchedulerUrl = Annotated[str, AfterValidator(_scheduler)]


class Latency(Settings):
    """What is measured of pairs without traffic."""

    probe: bool = True
    """Measure them, within the bounds of docs/latency.md; pairs with traffic are measured in any case."""


class Reports(Settings):
    """Who is told what was measured."""

    url: tuple[SchedulerUrl, ...] = Field(default=(), max_length=4)
    """Schedulers, as http://host:8478; none: nobody is told."""
    interval: int = Field(default=15, ge=1, le=3600)
    """Seconds between reports."""


def _distinct(peers: tuple[StaticPeer, ...]) -> tuple[StaticPeer, ...]:
    if len({peer.name for peer in peers}) < len(peers):
        raise ValueError("another name for each static peer")
    if len({peer.public_key for peer in peers}) < len(peers):
        raise ValueError("another public_key for each static peer")
    return peers


class MeshdConfig(Settings):
    """meshd.toml."""

    bundle: Path = Path("/etc/crossedge/node.bundle")
    """Signed bundle from `crossedge ca sign`."""
    keys: Path = Path("/var/lib/crossedge/meshd")
    """Directory with the node's private keys, made by `crossedge node init`."""
    state: Path = Path("/var/lib/crossedge/meshd")
    """Directory for what must survive a restart."""
    run: Path = Path("/run/crossedge")
    """Directory of the control socket."""
    listen: Listen = Listen()
    tun: Tun = Tun()
    pods: Pods = Pods()
    stun: tuple[HostPort, ...] = ()
    """Further STUN servers, as independent observers of our address."""
    advertise: tuple[HostPort, ...] = ()
    """Public addresses that are forwarded to this node by hand."""
    inbound: tuple[Inbound, ...] = ()
    latency: Latency = Latency()
    reports: Reports = Reports()
    static_peer: Annotated[tuple[StaticPeer, ...], AfterValidator(_distinct)] = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged to stderr."""
    disable_offloads: tuple[
        Literal["gso", "gro", "tso", "uso", "big_tcp", "stamps", "superframes", "aes"], ...
    ] = ()
    """Offloads not to use even where kernel or CPU have them (for faults in a driver).

    Without "big_tcp", "tso" or "uso" the device is a TUN, where it is a veth pair otherwise.
    """


CONFIG_FILE = Path("/etc/crossedge/meshd.toml")
