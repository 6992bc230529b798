"""Who this node is: its bundle and private keys, read and checked once at the start.

Everything that can be wrong with them is one `ConfigError` that names the file and what was expected.
"""

from __future__ import annotations

from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crossedge.host.files import PrivateFileError, read_private
from crossedge.meshd.config import MeshdConfig, StaticPeer
from crossedge.wire.bundle import Bundle
from crossedge.wire.envelope import ControlKey
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.identity import SigningKey
from crossedge.wire.keyfiles import SESSION_FILE, SIGNING_FILE, KeyKind, load_key
from crossedge.wire.settings import parse_settings

BUNDLE_LIMIT: Final = 2 * 1024 * 1024  # bytes of text; a bundle with a full blocklist has half of it
CONFIG_LIMIT: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's verified bundle and the private keys that belong to its certificate."""

    bundle: Bundle
    session: bytes
    """X25519 private key of WireGuard sessions, 32 bytes."""
    signing: SigningKey

    @property
    def name(self) -> str:
        """The node's name."""
        return self.bundle.certificate.name


def under(root: Path, path: Path) -> Path:
    """Return a configured path below `root` ("/": as it stands)."""
    return root / path.relative_to("/") if path.is_absolute() else path


def read_config(file: Path, *, required: bool) -> MeshdConfig:
    """Return the configuration in a file, or the defaults where it is missing and not `required`.

    Raises:
        ConfigError: it cannot be read, or what stands in it cannot be used.
    """
    if not required and not file.exists():
        return MeshdConfig()
    try:
        with file.open("rb") as opened:
            text = opened.read(CONFIG_LIMIT).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(file, "", f"a readable TOML file; {error}") from error
    return parse_settings(text, str(file), MeshdConfig)


def load_identity(config: MeshdConfig, root: Path) -> Identity:
    """Return the node's identity.

    Raises:
        ConfigError: a file is missing or unreadable, a key file may be read by others, the keys are not those
            of the certificate, or the bundle was signed by another network's authority.
    """
    file = under(root, config.bundle)
    try:
        with file.open("rb") as opened:
            text = opened.read(BUNDLE_LIMIT)
    except OSError as error:
        raise ConfigError(
            file, "", f"the bundle of this node (crossedge node join puts it there); {error.strerror}"
        ) from error
    try:
        bundle = Bundle.from_text(text)
        bundle.verify()
    except WireError as error:
        raise ConfigError(
            file,
            "",
            f"a bundle signed by one network's authority; {error.detail or error.reason} ({error.reason})",
        ) from error
    keys = under(root, config.keys)
    signing = SigningKey(_read_key(keys / SIGNING_FILE, KeyKind.SIGNING))
    session = _read_key(keys / SESSION_FILE, KeyKind.SESSION)
    certificate = bundle.certificate
    if (certificate.ed25519, certificate.x25519) != (signing.public, ControlKey(session).public):
        raise ConfigError(file, "", f"the bundle for the keys in {keys}; it is for other keys")
    return Identity(bundle, session, signing)


def load_preshared_key(peer: StaticPeer, root: Path) -> bytes | None:
    """Return the 32-byte pre-shared key of a static peer, None where it has none; `ConfigError` as above."""
    if peer.preshared_key_file is None:
        return None
    file = under(root, peer.preshared_key_file)
    try:
        key = b64decode(read_private(file).strip(), validate=True)
    except PrivateFileError as error:
        raise ConfigError(file, "", f"a base64 key with mode 0600; it {error.why}") from error
    except ValueError as error:
        raise ConfigError(file, "", "a base64 key of 32 bytes") from error
    if len(key) != 32:
        raise ConfigError(file, "", f"a base64 key of 32 bytes, got {len(key)}")
    return key


def _read_key(file: Path, kind: KeyKind) -> bytes:
    try:
        text = read_private(file)
    except PrivateFileError as error:
        raise ConfigError(
            file, "", f"a CROSSEDGE {kind.value} file with mode 0600; it {error.why}"
        ) from error
    return load_key(file, kind, text)
