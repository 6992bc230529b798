"""Armoured text and private key files."""

from __future__ import annotations

import pytest

from crossedge.wire.armour import armour, dearmour
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.keyfiles import KeyKind, format_key, load_key, parse_key

KEY = bytes(range(32))
TEXT = format_key(KeyKind.SIGNING, KEY)


def test_golden_key_file() -> None:
    assert TEXT == (
        "-----BEGIN CROSSEDGE SIGNING KEY-----\n"
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"
        "-----END CROSSEDGE SIGNING KEY-----\n"
    )
    assert parse_key(KeyKind.SIGNING, TEXT.encode()) == KEY


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 5000])
def test_armour_round_trips(size: int) -> None:
    data = bytes(n % 256 for n in range(size))
    text = armour("BUNDLE", data)
    assert max(map(len, text.splitlines())) <= 64
    for form in (text, text.replace("\n", "\r\n"), f"a comment\n{text}\nmore", text.rstrip()):
        assert dearmour("BUNDLE", form.encode(), 5000) == data


def test_block_is_found_among_others() -> None:
    both = armour("ONE", b"1") + armour("TWO", b"2")
    assert dearmour("TWO", both.encode(), 10) == b"2"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not-armoured"),
        (b"\xff\x00", "not-armoured"),
        (armour("BUNDLE", b"x").encode(), "other-label"),
        (TEXT.replace("-----END", "----END").encode(), "not-armoured"),
        (TEXT.replace("AAEC", "!!!!").encode(), "not-armoured"),
        (TEXT.replace("=", "").encode(), "not-armoured"),
        (armour("SIGNING KEY", bytes(31)).encode(), "malformed"),
        (armour("SIGNING KEY", bytes(33)).encode(), "too-long"),
        (b"x" * 100_000, "too-long"),
        (format_key(KeyKind.SESSION, KEY).encode(), "other-label"),
    ],
)
def test_text_that_is_no_key_file(text: bytes, reason: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_key(KeyKind.SIGNING, text)
    assert raised.value.reason == reason


@pytest.mark.parametrize("mode", [0o100640, 0o100604, 0o100610, 0o100666])
def test_key_file_that_others_may_use_is_refused(mode: int) -> None:
    with pytest.raises(WireError) as raised:
        parse_key(KeyKind.SIGNING, TEXT.encode(), mode)
    assert raised.value.reason == "key-file-open"
    assert parse_key(KeyKind.SIGNING, TEXT.encode(), 0o100400) == KEY


def test_error_names_the_file_and_what_was_expected() -> None:
    with pytest.raises(ConfigError) as raised:
        load_key("/etc/crossedge/a.key", KeyKind.CA, TEXT.encode())
    line = str(raised.value)
    assert line.startswith("/etc/crossedge/a.key: expected a CROSSEDGE CA KEY with mode 0600")
    assert "it is a CROSSEDGE SIGNING KEY" in line
    assert "\n" not in line
    with pytest.raises(ConfigError, match="0644"):
        load_key("a.key", KeyKind.SIGNING, TEXT.encode(), 0o644)


def test_key_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="31 private bytes"):
        format_key(KeyKind.CA, bytes(31))
