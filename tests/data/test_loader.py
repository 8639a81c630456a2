import numpy as np
import pytest
from tiny import byte_tokenizer, chat_rows, write_jsonl

from onward.data.loader import Batch, batch_at, flatten, pad
from onward.data.order import FilePlan
from onward.data.tokenize import RowTokenizer, TokenizedFile, tokenize_file
from onward.data.tokenized import Row


def row(*ids: int) -> Row:
    """Return a row whose odd ids are targets."""
    return Row(np.array(ids, dtype=np.int64), np.array([value % 2 == 1 for value in ids]))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenizedFile:
    """Return a tokenized file of 21 chats."""
    directory = tmp_path_factory.mktemp("file")
    path = write_jsonl(directory / "a.jsonl", chat_rows(21))
    assert tokenize_file(path, directory / "tokens", "00", RowTokenizer(byte_tokenizer(), 500)).ok
    return TokenizedFile.open(directory / "tokens")


def test_batches_follow_the_plan(file: TokenizedFile) -> None:
    """A step's batch has the rows of the plan, with their lines, whichever step is asked for first."""
    plan = FilePlan("00", 21, 8, 2, 5)
    for step in (5, 0, 2):
        batch = batch_at(file, plan, step)
        assert plan.rows_at(step) == batch.indices
        assert [index + 1 for index in batch.indices] == batch.lines
        for index, found in zip(batch.indices, batch.rows, strict=True):
            assert np.array_equal(file.row(index).ids, found.ids)
    assert [8, 8, 5] == [len(batch_at(file, plan, step)) for step in range(3)]
    with pytest.raises(IndexError):
        batch_at(file, plan, 6)


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [(5, 2, [2, 3]), (5, 1, [5]), (5, 5, [1] * 5), (5, 9, [1] * 5), (8, 3, [2, 3, 3]), (1, 4, [1]), (0, 3, [])],
)
def test_split(rows: int, parts: int, expected: list[int]) -> None:
    """The parts are contiguous, nearly equal, never empty, and together the batch."""
    batch = Batch([row(place) for place in range(rows)], list(range(rows)), list(range(1, rows + 1)))
    split = batch.split(parts)
    assert expected == [len(part) for part in split]
    assert batch.indices == [index for part in split for index in part.indices]
    assert batch.lines == [line for part in split for line in part.lines]


def test_counts() -> None:
    """Tokens and targets are counted without padding."""
    batch = Batch([row(2, 1, 1), row(2, 2, 1, 1, 1)], [4, 0], [5, 1])
    assert (8, 5) == (batch.tokens, batch.target_tokens)


def test_padding() -> None:
    """Shorter rows are padded on the right; padding is neither attended to nor a target, nor is the first token."""
    padded = pad(Batch([row(7, 2, 3), row(4, 5, 6, 7, 8)], [0, 1], [1, 2]), pad_id=9)
    assert [[7, 2, 3, 9, 9], [4, 5, 6, 7, 8]] == padded.input_ids.tolist()
    assert [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]] == padded.attention_mask.tolist()
    assert [[False, False, True, False, False], [False, True, False, True, False]] == padded.targets.tolist()
    assert (np.int64, np.int64, np.bool_) == (padded.input_ids.dtype, padded.attention_mask.dtype, padded.targets.dtype)


def test_end_to_end() -> None:
    """Rows laid end to end keep their places, and each target is predicted by the token before it in its row."""
    flat = flatten(Batch([row(7, 2, 3), row(4, 5, 6, 7, 8), row(9)], [0, 1, 2], [1, 2, 3]))
    assert [7, 2, 3, 4, 5, 6, 7, 8, 9] == flat.input_ids.tolist()
    assert [0, 1, 2, 0, 1, 2, 3, 4, 0] == flat.position_ids.tolist()
    assert [3, 5, 7] == flat.input_ids[flat.before_targets + 1].tolist()
    assert (3, 5, 1) == flat.lengths


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [1, 1, 1, 1]), (5, [1, 2, 1]), (6, [2, 1, 1]), (7, [2, 2]), (99, [4])]
)
def test_split_by_tokens(limit: int, expected: list[int]) -> None:
    """The parts have as many rows as fit; a row that is too long is a part by itself."""
    batch = Batch([row(*range(length)) for length in (4, 2, 3, 4)], [0, 1, 2, 3], [1, 2, 3, 4])
    split = batch.split_by_tokens(limit)
    assert expected == [len(part) for part in split]
    assert batch.indices == [index for part in split for index in part.indices]
