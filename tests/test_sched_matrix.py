"""The latency matrix and its files: three states kept apart, and one clear error for what is no matrix."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from crossedge.sched.files import parse_text, read_matrix
from crossedge.sched.matrix import MatrixError, State, restricted, sampled_peers, symmetrised
from tests.sched_worlds import regions

NAN = float("nan")


def test_smaller_direction_is_kept_and_diagonal_is_zero() -> None:
    matrix = symmetrised(["a", "b"], [[7.0, 12.0], [10.0, NAN]])
    assert matrix.rtt.tolist() == [[0.0, 10.0], [10.0, 0.0]]
    assert matrix.state.tolist() == [[State.MEASURED] * 2] * 2


def test_unreachable_is_neither_a_number_nor_unmeasured() -> None:
    silent = [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    matrix = symmetrised(["a", "b", "c"], np.full((3, 3), NAN), silent)
    assert np.isnan(matrix.rtt[0, 1])
    assert matrix.state[0, 1] == matrix.state[1, 0] == State.UNREACHABLE
    assert matrix.state[0, 2] == State.UNMEASURED
    assert matrix.confidence[0, 1] == matrix.confidence[0, 2] == 0.0


@pytest.mark.parametrize(
    ("answer_age", "silence_age", "state"),
    [(10, 10, State.MEASURED), (10, 99, State.MEASURED), (99, 10, State.UNREACHABLE)],
)
def test_younger_of_answer_and_silence_is_believed(answer_age: int, silence_age: int, state: State) -> None:
    matrix = symmetrised(
        ["a", "b"], [[0, 5.0], [NAN, 0]], [[0, 0], [1, 0]], [[0, answer_age], [silence_age, 0]]
    )
    assert matrix.state[0, 1] == state
    assert np.isfinite(matrix.rtt[0, 1]) == (state == State.MEASURED)


def test_confidence_halves_with_age() -> None:
    matrix = symmetrised(["a", "b"], [[0, 5.0], [NAN, 0]], age=[[0, 600.0], [0, 0]], half_life=300.0)
    assert matrix.confidence[0, 1] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("rtt", "text"),
    [
        ([[0, -1.0], [NAN, 0]], "RTT a to b is -1 ms"),
        ([[0, 1e9], [NAN, 0]], "RTT a to b is 1e.09 ms"),
        ([[0, 1.0]], "shape"),
    ],
)
def test_absurd_values_are_named(rtt: object, text: str) -> None:
    with pytest.raises(MatrixError, match=text):
        symmetrised(["a", "b"], rtt)


def test_node_that_stands_twice_is_named() -> None:
    with pytest.raises(MatrixError, match="'a' stands twice"):
        symmetrised(["a", "a"], np.ones((2, 2)))


def test_restricted_keeps_only_what_was_probed() -> None:
    matrix, _ = regions((20, 20), seed=1)
    mask = sampled_peers(40, 5, np.random.default_rng(0))
    part = restricted(matrix, mask)
    assert (mask.sum(1) >= 5).all()
    assert (mask == mask.T).all()
    assert (part.measured == mask).all()


SQUARE = [
    "a,b,c\n0,1,2\n1,0,3\n2,3,0\n",
    ",a,b,c,\na,0,1,2,\nb,1,0,3,\nc,2,3,0,\n",
    "a\tb\tc\n0\t1\t2\t\n1\t0\t3\t\n2\t3\t0\t\n",
    "a;b;c\n0;1;2\n1;0;3\n2;3;0\n",
    "source,dest,ms\na,b,1\nb,a,4\na,c,2\nb,c,3\n",
    "src,dst,size,rtt\na,b,24,1\na,b,24,6\na,b,9000,0.5\na,c,24,2\nb,c,24,3\n",
]


@pytest.mark.parametrize("text", SQUARE)
def test_square_and_long_forms_say_the_same(text: str) -> None:
    matrix = parse_text(text)
    assert matrix.names == ("a", "b", "c")
    assert matrix.rtt.tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]


@pytest.mark.parametrize("missing", ["", "nan", "0", "0.0", "NaN"])
def test_missing_entries_are_unmeasured(missing: str) -> None:
    matrix = parse_text(f"0,{missing},2\n{missing},0,3\n2,3,0\n")
    assert matrix.names == ("node-0", "node-1", "node-2")
    assert matrix.state[0, 1] == State.UNMEASURED
    assert np.isnan(matrix.rtt[0, 1])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("a,b\n0,1\n", "2 names in the header and 1 rows"),
        ("0,1,2\n1,0\n2,3,0\n", "row 2 has 2 values, expected 3"),
        ("0,1\n1,x0\n", "'x0' is no number"),
        ("a,b\n0,far\n1,0\n", "'far' is no number"),
        ("source,dest,hops\na,b,1\n", "no column of milliseconds"),
        ("source,dest,ms\na,b\n", "line 2 has 2 values, expected 3"),
        (",a,b\nb,0,1\na,1,0\n", "different order"),
    ],
)
def test_what_is_no_matrix_is_said(text: str, says: str) -> None:
    with pytest.raises(MatrixError, match=says):
        parse_text(text)


def test_gzip_and_npz_are_read_and_errors_name_the_file(tmp_path: Path) -> None:
    matrix, _ = regions((5, 5), seed=3)
    np.savez(tmp_path / "m.npz", rtt=matrix.rtt, names=np.array(matrix.names))
    assert np.allclose(read_matrix(tmp_path / "m.npz").rtt, matrix.rtt)
    (tmp_path / "m.tsv.gz").write_bytes(
        gzip.compress("\n".join("\t".join(map(str, r)) for r in matrix.rtt).encode())
    )
    assert np.allclose(read_matrix(tmp_path / "m.tsv.gz").rtt, matrix.rtt)
    for name, content in (
        ("bad.npz", b"PK nonsense"),
        ("bad.csv", b"\xff\xfe\x00"),
        ("bad.csv.gz", b"\x1f\x8b\x08"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MatrixError, match=name):
            read_matrix(tmp_path / name)
    with pytest.raises(MatrixError, match=r"missing\.csv"):
        read_matrix(tmp_path / "missing.csv")
