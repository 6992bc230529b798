"""nftables through its own program: scripts applied as one transaction, tables and chains read as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

SEARCH = os.pathsep.join((os.defpath, "/usr/sbin", "/sbin"))
TIMEOUT = 20.0
"""Seconds after which a run of nft is given up."""

Object = dict[str, Any]
"""A table, chain, rule or set as `nft --json` shows it, without the layer that names its kind."""


class NftError(OSError):
    """nft refused a script, or is not there; the text is one line for the one who runs the program."""


class NftMissingError(NftError):
    """The program nft is not installed."""


def _run(arguments: list[str], script: str = "") -> tuple[int, str, str, int]:
    """Run nft in the namespace of the calling thread; return status, output, errors and process id."""
    program = shutil.which("nft", path=os.environ.get("PATH", "") + os.pathsep + SEARCH)
    if program is None:
        raise NftMissingError("nft is not installed (Debian: apt-get install nftables)")
    with subprocess.Popen(
        [program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": SEARCH, "LC_ALL": "C"},
    ) as child:
        try:
            output, errors = child.communicate(script, TIMEOUT)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise NftError(f"nft did not end within {TIMEOUT:.0f} s") from None
        except BaseException:
            child.kill()
            raise
        return child.returncode, output, errors, child.pid


def _reason(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    for position, line in enumerate(lines):
        if "Error:" in line:
            quoted = lines[position + 1] if position + 1 < len(lines) else ""
            return line[line.index("Error:") + 7 :] + (f" in: {quoted[:200]}" if quoted else "")
    return lines[0] if lines else "no reason given"


def apply(script: str) -> int:
    """Apply a script as one transaction: all of it takes effect at once, or nothing does.

    Returns the process id of nft, which is the netlink port that `NftMonitor` tells for the changes. Raises
    `NftError` with the first complaint.
    """
    status, _, errors, process = _run(["-f", "-"], script)
    if status:
        raise NftError(f"nft refused our rules: {_reason(errors)}")
    return process


def _list(*arguments: str) -> list[tuple[str, Object]] | None:
    """Return what a list command shows, as (kind, object); None where the thing asked for is not there."""
    status, output, errors, _ = _run(["--json", "list", *arguments])
    if status:
        if "No such file or directory" in errors:
            return None
        raise NftError(f"nft cannot list {' '.join(arguments)}: {_reason(errors)}")
    try:
        shown = json.loads(output)["nftables"]
        return [next(iter(each.items())) for each in shown if "metainfo" not in each]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise NftError(f"nft lists {' '.join(arguments)} in a form that we do not know") from error


def list_table(family: str, name: str) -> list[tuple[str, Object]] | None:
    """Return a table and what is in it, as (kind, object) ("chain", "rule", "set"...); None if missing."""
    return _list("table", family, name)


def list_chain(family: str, table: str, name: str) -> list[tuple[str, Object]] | None:
    """Return a chain and its rules; None if missing."""
    return _list("chain", family, table, name)


def list_chains() -> list[Object]:
    """Return all chains of all tables, without their rules."""
    return [shown for kind, shown in _list("chains") or [] if kind == "chain"]
