"""Latency matrices from files: CSV, TSV and npz, square or in long form, gzipped or not."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crossedge.sched.matrix import Floats, LatencyMatrix, MatrixError, symmetrised

BYTES_MAX = 1 << 30
SOURCES = ("source", "src", "from")
DESTINATIONS = ("dest", "dst", "destination", "target", "to")
TIMES = ("ms", "rtt", "rtt_ms", "time", "time(ms)", "latency", "latency_ms")


def read_matrix(path: Path) -> LatencyMatrix:
    """Read one file; MatrixError names the file and what is wrong with it."""
    try:
        if path.name.endswith(".npz"):
            return read_npz(path)
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as stream:
                data = stream.read(BYTES_MAX + 1)
        if len(data) > BYTES_MAX:
            raise MatrixError(f"more than {BYTES_MAX} bytes")
        return parse_text(data.decode("utf-8-sig"))
    except MatrixError as error:
        raise MatrixError(f"{path}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise MatrixError(f"{path}: cannot be read: {error}") from error


def read_npz(path: Path) -> LatencyMatrix:
    """Read an npz archive: the square array `rtt` (or the only one), and `names` where it has them."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise MatrixError(f"is no npz archive of plain arrays: {error}") from error
    square = [name for name, array in arrays.items() if array.ndim == 2 and array.shape[0] == array.shape[1]]
    name = "rtt" if "rtt" in square else square[0] if len(square) == 1 else ""
    if not name or not np.issubdtype(arrays[name].dtype, np.number):
        raise MatrixError("expected one square array of numbers, named rtt")
    names = [str(item) for item in arrays["names"]] if "names" in arrays else numbered(len(arrays[name]))
    return from_square(names, arrays[name].astype(np.float64))


def numbered(n: int) -> list[str]:
    """Return names for nodes that have none."""
    return [f"node-{index}" for index in range(n)]


def parse_text(text: str) -> LatencyMatrix:
    """Parse CSV or TSV: a square matrix with or without names, or long form with a header."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise MatrixError("is empty")
    mark = "\t" if "\t" in lines[0] else ";" if ";" in lines[0] and "," not in lines[0] else ","
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=mark)]
    head = [cell.lower() for cell in rows[0]]
    if any(name in head for name in SOURCES) and any(name in head for name in DESTINATIONS):
        return parse_long(head, rows[1:])
    return parse_square(rows)


def number(cell: str, where: str) -> float:
    """Return a cell as milliseconds, nan where it is empty; MatrixError names what is no number."""
    if not cell:
        return np.nan
    try:
        return float(cell)
    except ValueError:
        raise MatrixError(f"{where}: {cell[:40]!r} is no number") from None


def is_number(cell: str) -> bool:
    """Tell whether a cell is empty or a number."""
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True


def parse_square(rows: Sequence[Sequence[str]]) -> LatencyMatrix:
    """Parse rows of a square matrix; names stand in the first row, the first column, or both, or nowhere."""
    headed = not all(is_number(cell) for cell in rows[0][1:])
    sided = not all(is_number(row[0]) for row in rows[headed:])
    body = [list(row[sided:]) for row in rows[headed:]]
    n = len(body)
    if headed:
        names = [cell for cell in (rows[0][1:] if sided else rows[0]) if cell]
        if len(names) != n:
            raise MatrixError(f"{len(names)} names in the header and {n} rows, expected as many")
        if sided and [row[0] for row in rows[1:]] != names:
            raise MatrixError("rows and columns name different nodes, or in different order")
    else:
        names = [row[0] for row in rows] if sided else numbered(n)
    values = np.empty((n, n))
    for index, row in enumerate(body):
        if len(row) < n or any(row[n:]):
            raise MatrixError(f"row {index + 1} has {len(row)} values, expected {n}: is it square?")
        values[index] = [number(cell, f"row {index + 1}") for cell in row[:n]]
    return from_square(names, values)


def from_square(names: Sequence[str], values: Floats) -> LatencyMatrix:
    """Make a matrix of numbers where 0 off the diagonal means that nothing was measured."""
    return symmetrised(names, np.where(values == 0, np.nan, values))


def parse_long(head: Sequence[str], rows: Sequence[Sequence[str]]) -> LatencyMatrix:
    """Parse lines of source, destination, milliseconds; of repeated pairs the least counts.

    Where there is a column `size`, only the smallest size is taken: larger probes measure bandwidth.
    """
    source = next(head.index(name) for name in SOURCES if name in head)
    target = next(head.index(name) for name in DESTINATIONS if name in head)
    found = [head.index(name) for name in TIMES if name in head]
    if not found:
        raise MatrixError(f"no column of milliseconds, expected one of {', '.join(TIMES)}")
    size = head.index("size") if "size" in head else None
    width = max(source, target, found[0], size or 0) + 1
    for line, row in enumerate(rows, 2):
        if len(row) < width:
            raise MatrixError(f"line {line} has {len(row)} values, expected {width}")
    if size is not None:
        smallest = min((number(row[size], "size") for row in rows), default=np.nan)
        rows = [row for row in rows if number(row[size], "size") == smallest]
    names = list(dict.fromkeys(name for row in rows for name in (row[source], row[target])))
    index = {name: position for position, name in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    for row in rows:
        time = number(row[found[0]], f"{row[source]} to {row[target]}")
        if time:
            at = index[row[source]], index[row[target]]
            values[at] = np.fmin(values[at], time)
    return from_square(names, values)
