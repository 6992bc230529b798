"""The rendezvous' configuration: /etc/crossedge/rendezvous.toml, parsed once at the start."""

from __future__ import annotations

import base64
import binascii
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from crossedge.rendezvous.settings import RelayLimits, SourceLimits
from crossedge.wire.bundle import RendezvousAddress
from crossedge.wire.endpoint import UdpEndpoint, parse_endpoint
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.settings import Settings, parse_settings

CONFIG_FILE = Path("/etc/crossedge/rendezvous.toml")
DEFAULT_PORT = 3478


def _endpoint(value: object) -> UdpEndpoint:
    wanted = 'address:port or [IPv6 address]:port, such as "0.0.0.0:3478"'
    try:
        endpoint = value if isinstance(value, UdpEndpoint) else parse_endpoint(str(value))
    except ValueError:
        raise ValueError(wanted) from None
    if endpoint.port > 65534:
        raise ValueError("a port below 65535 (the next port is used too)")
    return endpoint


def _address(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("an IP address")
    try:
        return ip_address(value).compressed
    except ValueError:
        raise ValueError("an IP address") from None


def _network_key(value: object) -> bytes:
    wanted = "base64 of a network's 32-byte CA key (crossedge ca show prints it)"
    try:
        key = value if isinstance(value, bytes) else base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(wanted) from None
    if len(key) != 32:
        raise ValueError(wanted)
    return key


def _some(value: tuple[bytes, ...]) -> tuple[bytes, ...]:
    if not value:
        raise ValueError("the CA key of one network at least (crossedge ca init prints it)")
    return value


def _advertised(value: str) -> str:
    try:
        if value:
            parse_address(value)
    except WireError:
        raise ValueError("host or host:port, with [ ] around an IPv6 address") from None
    return value


def parse_address(text: str, port: int = DEFAULT_PORT, key: bytes = bytes(32)) -> RendezvousAddress:
    """Return how nodes name a server at `host` or `host:port`; raises only `WireError`."""
    host, separator, last = text.rpartition(":")
    if not (separator and last.isdigit() and (host.endswith("]") or ":" not in host)):
        text = f"[{text}]:{port}" if ":" in text and not text.startswith("[") else f"{text}:{port}"
    return RendezvousAddress.parse(f"{text}#{base64.b64encode(key).decode()}")


Listen = Annotated[UdpEndpoint, BeforeValidator(_endpoint), PlainSerializer(str)]
Address = Annotated[str, BeforeValidator(_address)]
NetworkKey = Annotated[bytes, BeforeValidator(_network_key)]


Networks = Annotated[tuple[NetworkKey, ...], AfterValidator(_some)]
Advertised = Annotated[str, AfterValidator(_advertised)]


class RendezvousConfig(Settings):
    """rendezvous.toml."""

    networks: Networks
    """CA keys (base64) of the networks that are served."""
    address: Advertised = ""
    """Host name or address, and port where it is not that of `listen`, at which nodes reach this server: what
    `show` prints; "" finds one."""
    listen: tuple[Listen, ...] = Field(
        (UdpEndpoint("0.0.0.0", DEFAULT_PORT), UdpEndpoint("::", DEFAULT_PORT)), min_length=1, max_length=8
    )
    """UDP addresses; the port after each is opened too (RFC 5780)."""
    alternate: tuple[Address, ...] = ()
    """Second addresses of this host, at most one per family, for full RFC 5780 behaviour discovery. The
    family's `listen` must then name an address, not the wildcard."""
    public: dict[Address, Address] = Field(default_factory=dict)
    """Local address -> address it is reached at, where a one-to-one NAT stands before this host."""
    key_file: Path = Path("/etc/crossedge/rendezvous.key")
    """The long-term control key, mode 0600, made by `crossedge-rendezvous init`."""
    blocklists: tuple[Path, ...] = ()
    """Signed blocklists to enforce and to serve; looked at again when they change."""
    state_dir: Path = Path("/var/lib/crossedge/rendezvous")
    """Directory of the lease checkpoint."""
    control_socket: Path = Path("/run/crossedge-rendezvous/control.sock")
    """Unix socket of `crossedge-rendezvous status`."""
    limits: SourceLimits = SourceLimits()
    relay: RelayLimits = RelayLimits()
    disable_offloads: tuple[Literal["gso", "gro"], ...] = ()
    """UDP offloads not to use even where the kernel has them."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged to stderr."""


def rooted(root: Path, path: Path) -> Path:
    """Return a path as it is under another root directory."""
    return root / path.relative_to(path.anchor)


def load_config(file: Path) -> RendezvousConfig:
    """Read and check the configuration.

    Raises:
        ConfigError: it cannot be read, or a key in it is unknown or wrong; it names both.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(file, "", f"a readable configuration file ({reason})") from error
    config = parse_settings(text, str(file), RendezvousConfig)
    _check_alternates(config, file)
    return config


def _check_alternates(config: RendezvousConfig, file: Path) -> None:
    for address in config.alternate:
        family = [endpoint for endpoint in config.listen if (":" in endpoint.host) == (":" in address)]
        if len(family) != 1 or family[0].host in ("0.0.0.0", "::", address):
            raise ConfigError(file, "listen", f"exactly one first address beside the alternate {address}")
    if len({":" in address for address in config.alternate}) != len(config.alternate):
        raise ConfigError(file, "alternate", "at most one address per family")
