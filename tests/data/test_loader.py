import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_state, chat_rows, write_jsonl

from onward.data.plan.loader import Batch, batch_at, flatten, pad
from onward.data.plan.order import FilePlan, Plan, RowReference
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import Row, TokenizedFile
from onward.digest import sha256_file


def row(*ids: int) -> Row:
    """Return a row whose odd ids are targets."""
    return Row(np.array(ids, dtype=np.int64), np.array([value % 2 == 1 for value in ids]))


def batch_of(*rows: Row) -> Batch:
    """Return a batch of all the rows of a file."""
    return Batch(list(rows), [RowReference("00", place) for place in range(len(rows))], [*range(1, len(rows) + 1)])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenizedFile:
    """Return a tokenized file of 21 chats."""
    directory = tmp_path_factory.mktemp("file")
    path = write_jsonl(directory / "a.jsonl", chat_rows(21))
    assert tokenize_file(path, directory / "tokens", sha256_file(path), RowTokenizer(byte_state(), 500)).ok
    return TokenizedFile.open(directory / "tokens")


def test_batches_follow_the_plan(file: TokenizedFile) -> None:
    """A step's batch has the rows of the plan, with their lines, whichever step is asked for first."""
    plan = FilePlan("00", 21, 8, 2, 5)
    for step in (5, 0, 2):
        batch = batch_at({"00": file}, plan, step)
        assert plan.rows_at(step) == batch.references
        assert [row + 1 for _, row in batch.references] == batch.lines
        for (_, index), found in zip(batch.references, batch.rows, strict=True):
            assert np.array_equal(file.row(index).ids, found.ids)
    assert [8, 8, 5] == [len(batch_at({"00": file}, plan, step)) for step in range(3)]
    with pytest.raises(IndexError):
        batch_at({"00": file}, plan, 6)


def test_batches_never_change(file: TokenizedFile) -> None:
    """Rows, targets, indices and lines of a first training never change: runs go on after an update."""
    plan = FilePlan("00", 21, 8, 2, 5)
    digest = hashlib.sha256()
    for step in range(plan.steps):
        batch = batch_at({"00": file}, plan, step)
        rows = [[row.ids.tolist(), row.targets.tolist()] for row in batch.rows]
        digest.update(json.dumps([*rows, [row for _, row in batch.references], batch.lines]).encode())
    assert "483b51d71a0b3afd867666240e3843fa8ab55d78ecea7300e2c9ed876c0de05f" == digest.hexdigest()


@dataclass(frozen=True)
class Alternating:
    """A plan of two files, one row of each in every step."""

    plans: tuple[FilePlan, FilePlan]
    sha256: str = "aa"

    @property
    def sources(self) -> tuple[str, ...]:
        """Both files."""
        return tuple(plan.sha256 for plan in self.plans)

    @property
    def steps(self) -> int:
        """As many as the first file has rows."""
        return self.plans[0].steps

    def epoch_of(self, step_in_file: int) -> int:
        """The epoch of the first file."""
        return self.plans[0].epoch_of(step_in_file)

    def rows_at(self, step_in_file: int) -> list[RowReference]:
        """One row of each."""
        return [row for plan in self.plans for row in plan.rows_at(step_in_file)]


def test_a_batch_takes_each_row_from_its_source(file: TokenizedFile, tmp_path: Path) -> None:
    """The rows of a step may come from several files; each is looked up in its own."""
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": f"other {place}"} for place in range(9)])
    assert tokenize_file(path, tmp_path / "tokens", sha256_file(path), RowTokenizer(byte_state(), 500)).ok
    files = {"aa": file, "bb": TokenizedFile.open(tmp_path / "tokens")}
    plan: Plan = Alternating((FilePlan("aa", 9, 1, 1, 0), FilePlan("bb", 9, 1, 1, 0)))
    for step in range(plan.steps):
        batch = batch_at(files, plan, step)
        assert ["aa", "bb"] == [sha256 for sha256, _ in batch.references]
        for (sha256, index), line, row in zip(batch.references, batch.lines, batch.rows, strict=True):
            assert files[sha256].row(index).ids.tolist() == row.ids.tolist()
            assert files[sha256].line(index) == line


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [(5, 2, [2, 3]), (5, 1, [5]), (5, 5, [1] * 5), (5, 9, [1] * 5), (8, 3, [2, 3, 3]), (1, 4, [1]), (0, 3, [])],
)
def test_split(rows: int, parts: int, expected: list[int]) -> None:
    """The parts are contiguous, nearly equal, never empty, and together the batch."""
    batch = batch_of(*(row(place) for place in range(rows)))
    split = batch.split(parts)
    assert expected == [len(part) for part in split]
    assert batch.references == [reference for part in split for reference in part.references]
    assert batch.lines == [line for part in split for line in part.lines]


def test_counts() -> None:
    """Tokens and targets are counted without padding."""
    batch = batch_of(row(2, 1, 1), row(2, 2, 1, 1, 1))
    assert (8, 5) == (batch.tokens, batch.target_tokens)


def test_padding() -> None:
    """Shorter rows are padded on the right; padding is neither attended to nor a target, nor is the first token."""
    padded = pad(batch_of(row(7, 2, 3), row(4, 5, 6, 7, 8)), pad_id=9)
    assert [[7, 2, 3, 9, 9], [4, 5, 6, 7, 8]] == padded.input_ids.tolist()
    assert [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]] == padded.attention_mask.tolist()
    assert [[False, False, True, False, False], [False, True, False, True, False]] == padded.targets.tolist()
    assert (np.int64, np.int64, np.bool_) == (padded.input_ids.dtype, padded.attention_mask.dtype, padded.targets.dtype)


def test_end_to_end() -> None:
    """Rows laid end to end keep their places, and each target is predicted by the token before it in its row."""
    flat = flatten(batch_of(row(7, 2, 3), row(4, 5, 6, 7, 8), row(9)))
    assert [7, 2, 3, 4, 5, 6, 7, 8, 9] == flat.input_ids.tolist()
    assert [0, 1, 2, 0, 1, 2, 3, 4, 0] == flat.position_ids.tolist()
    assert [3, 5, 7] == flat.input_ids[flat.before_targets + 1].tolist()
    assert (3, 5, 1) == flat.lengths


def test_weights() -> None:
    """Each target has the weight that its row gives it, 1 in a row that gives none; without any, all count as 1."""
    weights = np.array([5, 1, 1, 0.25, 1 << 24], dtype=np.float32)
    batch = batch_of(row(4, 5, 6), replace(row(2, 1, 4, 3, 7), weights=weights))
    assert (1 << 24) + 1 + 1 + 0.25 == batch.weight
    flat, padded = flatten(batch).weights, pad(batch, 0).weights
    assert flat is not None
    assert padded is not None
    assert [1, 1, 0.25, 1 << 24] == flat.tolist()
    assert [[1, 1, 1, 1, 1], [5, 1, 1, 0.25, 1 << 24]] == padded.tolist()
    assert (np.float32, np.float32) == (flat.dtype, padded.dtype)
    plain = batch.take([0])
    assert (1, None, None) == (plain.weight, flatten(plain).weights, pad(plain, 0).weights)


def test_longest_rows_first() -> None:
    """Rows of equal length keep their order."""
    batch = batch_of(row(1, 2), row(1, 2, 3), row(1), row(3, 2, 1))
    assert [1, 3, 0, 2] == [reference.row for reference in batch.longest_first().references]


def tokens_of(rows: list[Row]) -> int:
    """Return the tokens of rows laid end to end."""
    return sum(len(each.ids) for each in rows)


def padded_size(rows: list[Row]) -> int:
    """Return the tokens of rows padded to the longest of them."""
    return len(rows) * max(len(each.ids) for each in rows)


@pytest.mark.parametrize(
    ("split", "size"), [(Batch.split_by_tokens, tokens_of), (Batch.split_by_padded_size, padded_size)]
)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), limit=st.integers(1, 40))
def test_split_by_size(
    split: Callable[[Batch, int], list[Batch]], size: Callable[[list[Row]], int], lengths: list[int], limit: int
) -> None:
    """Each part takes as many rows as fit, a row that is too long is a part by itself, and together they are all."""
    batch = batch_of(*(row(*range(length)) for length in lengths))
    parts = split(batch, limit)
    assert batch.references == [reference for part in parts for reference in part.references]
    assert batch.lines == [line for part in parts for line in part.lines]
    assert all(len(part) == 1 or 0 < size(part.rows) <= limit for part in parts)
    assert all(size([*one.rows, following.rows[0]]) > limit for one, following in pairwise(parts))
