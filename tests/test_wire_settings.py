"""One line for each mistake in a configuration file: the file, the key, what was expected."""

import pytest

from crossedge.meshd.config import MeshdConfig
from crossedge.wire.errors import ConfigError
from crossedge.wire.settings import parse_settings

KEY = "A" * 43 + "="


def test_empty_file_gives_the_defaults() -> None:
    config = parse_settings("", "meshd.toml", MeshdConfig)
    assert config.listen.port == 41820
    assert config.tun.mtu == 1380


def test_whole_example_is_read() -> None:
    text = f"""
    bundle = "/tmp/a.bundle"
    stun = ["198.51.100.1:3478", "[2001:db8::1]:3478"]
    [listen]
    port = 41000
    [[inbound]]
    group = "shop"
    protocol = "tcp"
    ports = ["443", "8000-8010"]
    [[static_peer]]
    name = "laptop"
    public_key = "{KEY}"
    allowed_ips = ["10.9.0.2/32", "fd00::2/128"]
    """
    config = parse_settings(text, "meshd.toml", MeshdConfig)
    assert config.inbound[0].ports == ("443", "8000-8010")
    assert config.static_peer[0].public_key == bytes(32)
    assert str(config.static_peer[0].allowed_ips[1]) == "fd00::2/128"


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("port = 1", "port", "a known key (advertise, bundle"),
        ("[listen]\nprt = 1", "listen.prt", "a known key (ipv4, ipv6, port)"),
        ('[listen]\nport = "41820"', "listen.port", "a valid integer, got '41820'"),
        ("[listen]\nport = 70000", "listen.port", "less than or equal to 65535"),
        ("[[static_peer]]\nname = 'x'\nallowed_ips = []", "static_peer.0.public_key", "a value"),
        ("[[inbound]]\ngroup = 'a'\nports = ['9-1']", "inbound.0.ports.0", "a port"),
        ("stun = ['nowhere']", "stun.0", "host:port"),
        ("[listen", "(whole file)", "TOML"),
    ],
)
def test_mistake_names_file_key_and_what_was_expected(text: str, key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_settings(text, "/etc/crossedge/meshd.toml", MeshdConfig)
    message = str(raised.value)
    assert message.startswith(f"/etc/crossedge/meshd.toml: {key}: expected ")
    assert expected in message
    assert "\n" not in message
