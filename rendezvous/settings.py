"""What strangers, nodes and networks may cost: the limits that an operator may set."""

from __future__ import annotations

from pydantic import Field

from crossedge.wire.settings import Settings


class SourceLimits(Settings):
    """What one source prefix (IPv4 /24, IPv6 /56) or one node may ask for, and how much is kept."""

    slots: int = Field(default=65_536, ge=64, le=1 << 22)
    """Token buckets in each table; memory is about 80 bytes each once used."""
    stun_rate: float = Field(default=10.0, ge=1)
    """Answers per second and prefix to STUN requests that are shorter than the answer."""
    stun_padded_rate: float = Field(default=200.0, ge=1)
    """Answers per second and prefix to STUN requests at least as long as the answer."""
    cookie_rate: float = Field(default=400.0, ge=1)
    """Cookie replies per second and prefix."""
    cookie_total: float = Field(default=10_000.0, ge=5)
    """Cookie replies per second in all: what a flood from forged sources may cost, about 15 us each with its
    system call; the burst is a fifth of a second of it, as nodes that are here wait behind it."""
    stranger_rate: float = Field(default=400.0, ge=1)
    """Messages per second and prefix of senders that hold a cookie and have no lease."""
    stranger_total: float = Field(default=2_000.0, ge=1)
    """The same in all: each may cost a key agreement and two signatures, about 0.3 ms."""
    node_rate: float = Field(default=100.0, ge=1)
    """Messages per second that one registered node may send; the burst is two seconds of it."""
    page_rate: float = Field(default=500.0, ge=1)
    """Directory pages per second that one registered node may pull; the burst is two seconds of it."""
    called_rate: float = Field(default=100.0, ge=1)
    """Calls per second that are handed to one node; the burst is ten seconds of it."""
    nodes: int = Field(default=16_384, ge=1, le=1 << 20)
    """Nodes whose records are kept, per network."""
    lease: int = Field(default=90, ge=15, le=600)
    """Seconds after its last registration or keepalive until a node counts as gone."""


class RelayLimits(Settings):
    """What the relay may spend."""

    channels: int = Field(default=65_536, ge=0, le=1 << 22)
    """Channels in all; 0 switches the relay off."""
    channels_per_node: int = Field(default=2_048, ge=1)
    """Channels that one node may be a side of."""
    idle: float = Field(default=180.0, ge=30)
    """Seconds without a datagram, `Bind` or `Call` until a channel is forgotten."""
    node_rate: float = Field(default=12_500_000.0, ge=0)
    """Bytes per second that one node may send through the relay; 0 is without limit."""
    network_rate: float = Field(default=125_000_000.0, ge=0)
    """Bytes per second that one network may send through the relay; 0 is without limit."""
