"""The scheduler's configuration: /etc/crossedge/sched.toml, parsed once at the start."""

from __future__ import annotations

import base64
import binascii
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from crossedge.wire.errors import ConfigError
from crossedge.wire.settings import Settings, parse_settings

CONFIG_FILE = Path("/etc/crossedge/sched.toml")
DEFAULT_PORT = 8478
OVERLAY = "overlay"


def _network_key(value: object) -> bytes:
    wanted = "base64 of the network's 32-byte CA key (crossedge ca show prints it)"
    try:
        key = value if isinstance(value, bytes) else base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(wanted) from None
    if len(key) != 32:
        raise ValueError(wanted)
    return key


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of `address:port`, `[IPv6]:port` or `overlay:port`; ValueError otherwise."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"[ ] around the IPv6 address of {text!r}")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError(f"a port after the colon of {text!r}")
    if host != OVERLAY:
        ip_address(host)
    return host, int(port)


def _listen(value: str) -> str:
    try:
        split_address(value)
    except ValueError:
        raise ValueError('address:port, [IPv6 address]:port or "overlay:port"') from None
    return value


Listen = Annotated[str, AfterValidator(_listen)]
NetworkKey = Annotated[
    bytes, BeforeValidator(_network_key), PlainSerializer(lambda key: base64.b64encode(key).decode())
]


class Rounds(Settings):
    """When matrix, groups and decisions are made anew."""

    every: float = Field(default=30.0, ge=1, le=3600)
    """Seconds from the start of one round to the start of the next, and the cycle of `moves_max`."""
    rest: float = Field(default=3.0, ge=0, le=100)
    """After a round the worker rests at least so many times the processor time that the round took."""
    warmup: float = Field(default=60.0, ge=0, le=3600)
    """Seconds after the start within which nothing is decided, unless every node that was there before is
    back."""
    agreeing: int = Field(default=3, ge=1, le=100)
    """Rounds that must agree before a node changes its group."""
    validate_every: int = Field(default=10, ge=1, le=1000)
    """Rounds after which the estimators are compared again on hidden pairs."""
    seed: int = Field(default=0, ge=0)
    """Of everything random."""


class Moves(Settings):
    """When a service moves, where it says nothing itself."""

    gain_ms: float = Field(default=5.0, ge=0, le=60_000)
    """Milliseconds of mean user RTT that a better placement must gain."""
    gain_share: float = Field(default=0.1, ge=0, le=1)
    """And the share of the present mean."""
    per_service: int = Field(default=1, ge=0, le=100)
    """Replicas of one service that may move in one round."""
    per_round: int = Field(default=5, ge=0, le=1000)
    """Replicas that may move in one round over all services."""


class Nodes(Settings):
    """When a node counts as here."""

    gone_after: float = Field(default=120.0, ge=5, le=86_400)
    """Seconds without a report after which replicas are taken off a node."""
    forget_after: float = Field(default=86_400.0, ge=60, le=31 * 86_400)
    """Seconds without a report after which a node is not shown any more."""
    half_life: float = Field(default=300.0, ge=1, le=86_400)
    """Seconds after which a measurement is worth half."""
    skew: float = Field(default=300.0, ge=1, le=86_400)
    """Seconds that the clock of a report may be off."""
    most: int = Field(default=5000, ge=2, le=16_384)
    """Nodes; reports of further ones are refused."""


class HistorySettings(Settings):
    """What is kept of the past."""

    days: float = Field(default=14.0, gt=0, le=3650)
    """Days after which a round and its decisions are deleted."""
    megabytes: float = Field(default=256.0, ge=1, le=100_000)
    """Size of the database above which the oldest rounds are deleted."""


class Kubernetes(Settings):
    """Labels and annotations on the nodes of a Kubernetes cluster."""

    label_nodes: bool = False
    """Whether to keep crossedge.io/group and crossedge.io/coordinates on each node."""
    url: str = Field(default="", pattern=r"^(https?://[^\s/]+)?$")
    """The API server; "" is the one of the cluster that this runs in."""
    token_file: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    """Bearer token of the service account, read anew for each round."""
    ca_file: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
    """Certificate authority of the API server."""


class Limits(Settings):
    """What strangers and clients can take."""

    services: int = Field(default=100, ge=1, le=10_000)
    """Services that can be stored."""
    reports_per_second: float = Field(default=100.0, gt=0, le=10_000)
    """Reports per second of one source address, over time."""
    reports_burst: float = Field(default=2000.0, ge=1, le=1_000_000)
    """And at once; nodes behind one NAT share them."""
    connections: int = Field(default=4096, ge=16, le=100_000)
    """Open connections."""


class SchedConfig(Settings):
    """sched.toml."""

    bundle: Path = Path("/etc/crossedge/node.bundle")
    """The signed bundle of this host, where it is a node itself: it says what the network and the overlay
    address are, and has a blocklist. It may be missing where `network` is there."""
    network: NetworkKey | None = None
    """CA key (base64) of the network, where there is no bundle."""
    blocklists: tuple[Path, ...] = (Path("/etc/crossedge/blocklist"),)
    """Signed blocklists to enforce beside the bundle's, as text or as bytes; looked at again when they
    change. One that is missing is no error."""
    listen: Annotated[tuple[Listen, ...], Field(min_length=1, max_length=8)] = (
        f"127.0.0.1:{DEFAULT_PORT}",
        f"{OVERLAY}:{DEFAULT_PORT}",
    )
    """TCP addresses; "overlay" stands for the overlay addresses of the bundle, if there is one."""
    hosts: tuple[str, ...] = ()
    """Names under which the API may be called, beside localhost and IP addresses: a page of another name
    could be a stranger's whose name was pointed here."""
    token_file: Path | None = None
    """File with the bearer token that writes want, mode 0600; without it nothing can be written but nodes'
    reports."""
    reads: Literal["free", "token"] = "free"
    """Whether reading wants the token too."""
    state_dir: Path = Path("/var/lib/crossedge/sched")
    """Directory of the history."""
    rounds: Rounds = Rounds()
    moves: Moves = Moves()
    nodes: Nodes = Nodes()
    history: HistorySettings = HistorySettings()
    limits: Limits = Limits()
    kubernetes: Kubernetes = Kubernetes()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged to stderr."""


def rooted(root: Path, path: Path) -> Path:
    """Return a path as it is under another root directory."""
    return root / path.relative_to(path.anchor)


def load_config(file: Path, required: bool) -> SchedConfig:
    """Read and check the configuration; a file that is missing and not required means all defaults.

    Raises:
        ConfigError: it cannot be read, or a key in it is unknown or wrong; it names both.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not required:
            return SchedConfig()
        raise ConfigError(file, "", "a configuration file, and there is none") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(file, "", f"a readable configuration file ({reason})") from error
    config = parse_settings(text, str(file), SchedConfig)
    if config.reads == "token" and config.token_file is None:
        raise ConfigError(file, "token_file", 'a file with a token where reads = "token"')
    return config
