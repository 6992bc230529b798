"""The errors that rooms share."""

from __future__ import annotations


class CrossedgeError(Exception):
    """The root of every error that crossedge raises on purpose."""


class WireError(CrossedgeError, ValueError):
    """Bytes from somewhere else that cannot be used.

    Every decoder of untrusted bytes raises this and nothing else. `reason` is a short kebab-case name, fit to
    count drops under; `detail` says more for people and never quotes the bytes themselves.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class IdentityError(WireError):
    """A statement that is well-formed and must not be believed: a bad signature, another network, expired."""


class ConfigError(CrossedgeError):
    """Something an operator wrote or named that cannot be used; one line that says what was expected.

    `file` is the file (or command) at fault, `key` the setting in it ("" for the whole file), `expected`
    reads on after the word "expected".
    """

    def __init__(self, file: object, key: str, expected: str) -> None:
        where = f"{file}: {key}" if key else f"{file}"
        super().__init__(" ".join(f"{where}: expected {expected}".split()))
        self.file = str(file)
        self.key = key
        self.expected = expected
