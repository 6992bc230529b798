"""Whom the scheduler believes: the network's authority, its blocklists, and who holds the token.

Shell: it reads files.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from crossedge.sched.config import OVERLAY, SchedConfig, rooted, split_address
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.bundle import Bundle
from crossedge.wire.errors import ConfigError, WireError

TOKEN_MIN: Final = 16
TOKEN_MAX: Final = 4096
BUNDLE_LIMIT: Final = 2 * 1024 * 1024  # bytes of text


@dataclass(frozen=True, slots=True)
class Trust:
    """What is believed from the start.

    Attributes:
        ca: the authority's Ed25519 public key.
        blocklist: of the bundle, if there is one.
        overlay: this host's overlay addresses, none where it is not a node.
    """

    ca: bytes
    blocklist: Blocklist | None = None
    overlay: tuple[str, ...] = ()


def load_trust(config: SchedConfig, root: Path, file: object) -> Trust:
    """Read and verify the bundle, or take the key from the configuration.

    Raises:
        ConfigError: neither is there, the bundle cannot be used, or it is of another network.
    """
    path = rooted(root, config.bundle)
    try:
        with path.open("rb") as stream:
            text = stream.read(BUNDLE_LIMIT)
    except FileNotFoundError:
        if config.network is None:
            wanted = f"the network's CA key in base64, because there is no bundle at {path}"
            raise ConfigError(file, "network", wanted) from None
        return Trust(config.network)
    except OSError as error:
        raise ConfigError(path, "", f"a readable bundle ({error.strerror})") from error
    try:
        bundle = Bundle.from_text(text)
        bundle.verify(config.network)
    except WireError as error:
        raise ConfigError(path, "", f"a bundle signed by the network's authority; {error}") from error
    certificate = bundle.certificate
    overlay = tuple(str(address) for address in (certificate.overlay4, certificate.overlay6) if address)
    return Trust(bundle.ca, bundle.blocklist, overlay)


def addresses(config: SchedConfig, trust: Trust) -> list[tuple[str, int]]:
    """Return the (address, port) pairs to listen at, "overlay" replaced by what the bundle says."""
    result: list[tuple[str, int]] = []
    for text in config.listen:
        host, port = split_address(text)
        names = trust.overlay if host == OVERLAY else (ip_address(host).compressed,)
        result += [(name, port) for name in names]
    return list(dict.fromkeys(result))


def load_token(path: Path) -> bytes:
    """Return the bearer token in a file.

    A credential that the service manager hands over may be readable by its group, and by nobody else.

    Raises:
        ConfigError: it cannot be read, others than its owner can read it, or it is too short to be a secret.
    """
    what = f"a token of {TOKEN_MIN} characters or more, in a file of mode 0600"
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    handed_over = credentials is not None and path.parent == Path(credentials)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (0o037 if handed_over else 0o077):
                raise ConfigError(path, "", f"{what} (it is {mode & 0o7777:04o}: chmod 600)")
            token = file.read(TOKEN_MAX + 1).strip()
    except OSError as error:
        raise ConfigError(path, "", f"{what} ({error.strerror})") from error
    if not TOKEN_MIN <= len(token) <= TOKEN_MAX or not all(33 <= byte < 127 for byte in token):
        raise ConfigError(path, "", f"{what}, without spaces")
    return token


def is_bearer(header: str | None, token: bytes) -> bool:
    """Tell whether an Authorization header carries the token, in a time that says nothing of the token."""
    scheme, _, given = (header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token)


def is_own_name(host: str, names: frozenset[str]) -> bool:
    """Tell whether a Host header names us: an IP address, localhost, or a name that was configured.

    A stranger's page can have its own name resolve to this host and then read as of its own origin (DNS
    rebinding); it cannot choose what the browser writes into Host.
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and ":" in host else host
    bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if bare.lower() in names or bare.lower() == "localhost":
        return True
    try:
        ip_address(bare)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class Blocklists:
    """The blocklist files; read again when one changes.

    Attributes:
        ca: who must have signed them.
        paths: where they are.
        newest: the verified list with the highest serial so far.
        problems: file to what is wrong with it, for the operator.
    """

    ca: bytes
    paths: tuple[Path, ...]
    newest: Blocklist | None = None
    problems: dict[str, str] = field(default_factory=dict)
    _seen: dict[Path, tuple[int, int, int]] = field(default_factory=dict)

    def refresh(self) -> bool:
        """Look at the files; return whether there is a newer list."""
        changed = False
        for path in self.paths:
            try:
                status = path.stat()
                mark = (status.st_mtime_ns, status.st_size, status.st_ino)
                if self._seen.get(path) == mark:
                    continue
                self._seen[path] = mark
                changed |= self.take(path.read_bytes())
                self.problems.pop(str(path), None)
            except FileNotFoundError:
                self.problems.pop(str(path), None)
            except OSError as error:
                self.problems[str(path)] = f"cannot be read: {error.strerror}"
            except WireError as error:
                self.problems[str(path)] = f"no blocklist of this network: {error}"
        return changed

    def take(self, content: bytes) -> bool:
        """Take a list, armoured or not; return whether it is newer. Raises only `WireError`."""
        armoured = b"-----BEGIN CROSSEDGE" in content
        listed = Blocklist.from_text(content) if armoured else Blocklist.decode(content)
        listed.verify(self.ca)
        if self.newest is not None and listed.serial <= self.newest.serial:
            return False
        listed.check_replaces(self.newest)
        self.newest = listed
        return True
