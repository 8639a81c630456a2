"""Files of every kind against a run: what is accepted, what is said of it, what is lost, and what old runs do."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from commands import assert_refused, make_run, onward

from onward.config import Config
from onward.config.keys import NEW_RUN
from onward.config.text import read_config
from onward.data.files.reading import BadRows
from onward.data.row_tokenizer import cache_key
from onward.data.tokenized import FORMAT
from onward.digest import sha256_json
from onward.errors import UsageError
from onward.service.intake.hub import Hub, HubName, is_hub_name
from onward.service.wishes import Stopped
from onward.views.opened import opened

GOOD = {"prompt": "one", "completion": "two"}


def configure(run: Path, old: str, new: str) -> None:
    """Replace a line of a run's config."""
    text = (run / "onward.yaml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(old)]
    (run / "onward.yaml").write_text(text.replace(line, new))


def test_a_new_run_keeps_all_of_a_text_and_an_old_one_reads_as_it_did(model: Path, tmp_path: Path) -> None:
    """`init` writes `auto` for long texts and documents; a config that does not name the keys means what it meant."""
    run = make_run(tmp_path / "run", model, "max_length=40")
    written = read_config(run / "onward.yaml")
    assert NEW_RUN == {key: value for key, value in written.flat().items() if key in NEW_RUN} | {
        "evaluation.share": 0.05
    }
    text = tmp_path / "book.txt"
    text.write_text("A first line that is\nlonger than others. It\nends here.\n\nA second paragraph.\n")
    added = onward("add", text, "--run", run)
    assert 0 == added.status, added.err
    assert (
        "accepted book.txt: 3 rows (1 text split at max_length=40), 75 tokens; each group of lines between blank ones "
        "is a document (text.documents: blank)"
    ) in added.err
    (entry,) = onward("history", "--run", run, "--json").json
    assert (3, 1, 0, 75) == (entry["rows"], entry["split"], entry["lost_tokens"], entry["tokens"])
    (run / "onward.yaml").write_text(f"model: {model}\nmax_length: 40\n")
    old = read_config(run / "onward.yaml")
    assert ("truncate", "line") == (old.over_length, old.text.documents)
    assert sha256_json([FORMAT, "a", "b", 40, "truncate"]) == cache_key("a", "b", old)
    added = onward("add", text, "--again", "--run", run)
    assert "accepted book.txt: 4 rows, " in added.err


def test_what_is_lost_is_said_in_tokens_and_per_cent(model: Path, tmp_path: Path) -> None:
    """The accepted line, the history and the log name tokens and share; the log's line is a warning."""
    run = make_run(tmp_path / "run", model, "max_length=50", "over_length=truncate")
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 149}, {"text": "y" * 19}])
    lost = "1 of 2 rows cut at max_length=50: 100 tokens lost, 59 %"
    added = onward("add", file, "--run", run)
    assert f"accepted a.jsonl: 2 rows ({lost}), 70 tokens" in added.err
    trained = onward("train", "--run", run)
    assert f"({lost})" in trained.err
    (entry,) = onward("history", "--run", run, "--json").json
    assert (1, 70, 100) == (entry["truncated"], entry["tokens"], entry["lost_tokens"])


def test_bad_rows_are_left_out_if_told_so(model: Path, tmp_path: Path) -> None:
    """By default they refuse the file and the refusal names the key; with it they are named and the rest is trained."""
    run = make_run(tmp_path / "run", model)
    rows = [*[GOOD] * 3, {"instruction": "a", "input": "", "output": ""}]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [*rows, GOOD, {"messages": chat}])
    way = "or leave such rows out: set bad_rows: drop in the run's config"
    assert_refused(onward("add", file, "--run", run), 3, "a.jsonl, line 4: ", "a.jsonl, line 6: ", way)
    assert way == json.loads((run / "rejected" / "a.jsonl.report.json").read_text())["way_out"]
    configure(run, "bad_rows:", "bad_rows: drop")
    for words in ("left out: a.jsonl, line 4: ", "left out: a.jsonl, line 6: ", "; 2 bad rows left out; "):
        assert words in onward("preview", file, "--run", run, "--json").err
    added = onward("add", file, "--run", run)
    assert 0 == added.status, added.err
    for words in ("left out: a.jsonl, line 4: ", "left out: a.jsonl, line 6: ", "a.jsonl: 2 rows left out", ": 4 rows"):
        assert words in added.err
    assert ["a.jsonl"] == [entry["name"] for entry in onward("train", "--run", run, "--json").json]
    (entry,) = onward("history", "--run", run, "--json").json
    assert ("done", 4, 4, 2) == (entry["state"], entry["rows"], entry["rows_trained"], entry["bad_rows"])
    # accepted files are not judged again: their tokens are made again without the same rows
    configure(run, "bad_rows:", "bad_rows: reject")
    shutil.rmtree(run / "cache" / "tokens")
    assert 0 == onward("verify", "--deep", "--run", run).status


def test_directories_that_went_are_made_again(model: Path, tmp_path: Path) -> None:
    """Cache, originals, refusals and restore points may be removed between commands; later files train all the same."""
    run = make_run(tmp_path / "run", model)
    files = [
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.chat_rows(4, seed=place)) for place, name in enumerate("ab")
    ]
    assert 0 == onward("train", files[0], "--run", run).status
    for name in ("cache", "archive", "rejected", "boundaries"):
        shutil.rmtree(run / name)
    assert 3 == onward("add", tiny.write_jsonl(tmp_path / "bad.jsonl", [{}]), "--run", run).status
    assert 0 == onward("train", files[1], "--run", run).status
    assert ["done", "done"] == [
        entry["state"] for entry in onward("history", "--run", run, "--json").json if entry["position"]
    ]


def test_too_many_bad_rows_refuse_a_file(model: Path, tmp_path: Path) -> None:
    """A file of which most rows cannot be trained is refused under `drop` too, with the share."""
    run = make_run(tmp_path / "run", model, "bad_rows=drop")
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [GOOD, {}, {}])
    assert_refused(onward("add", file, "--run", run), 3, "2 of 3 rows exceed bad_rows_share: 0.05, which may be raised")
    broken = tmp_path / "b.json"
    broken.write_text(json.dumps([GOOD] * 30)[:-1])
    assert_refused(onward("add", broken, "--run", run), 3, "the array has no end")
    long = tiny.write_jsonl(tmp_path / "c.jsonl", [*[GOOD] * 30, {"text": "x" * 999}])
    configure(run, "over_length:", "over_length: reject")
    assert_refused(onward("add", long, "--run", run), 3, "the row has 1000 tokens")


@pytest.mark.parametrize(
    ("bad", "rows", "expected"),
    [(0, 1, True), (1, 2, False), (1, 3, True), (10, 21, True), (10, 20, False), (11, 30, False), (11, 220, True)],
)
def test_how_many_rows_may_be_left_out(bad: int, rows: int, expected: bool) -> None:
    """A few, as long as most stay; more only up to the share."""
    assert expected == BadRows(0.05, 10).may_leave_out(bad, rows)


def test_columns_are_read_as_the_config_says(model: Path, tmp_path: Path) -> None:
    """A table of other columns is refused until the config names them, and known pairs are said."""
    run = make_run(tmp_path / "run", model, "columns={text: body}")
    table = tmp_path / "a.csv"
    table.write_text("body,stars\nfine,3\n")
    assert 0 == onward("add", table, "--run", run).status
    pairs = tmp_path / "b.tsv"
    pairs.write_text("question\tanswer\nQ\tA\n")
    assert "question and answer are read as a chat" in onward("add", pairs, "--run", run).err
    assert_refused(
        onward("init", tmp_path / "other", "--model", model, "--set", "columns.promt=q"), 2, "'promt' is not a key"
    )


def test_keys_of_later_releases_change_no_digest_of_an_old_config() -> None:
    """At their defaults they are in no digest: what an earlier release computed is what this one computes."""
    training = Config().training()
    assert not {"columns", "text.documents", "bad_rows", "bad_rows_share"} & training.keys()
    assert {"text.documents": "auto"}.items() <= Config.model_validate(
        {"text": {"documents": "auto"}}
    ).training().items()


# folders of `datasets`


def save(folder: Path, shards: list[list[dict[str, Any]]]) -> Path:
    """Write a folder as `Dataset.save_to_disk` does."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_dataset_is_taken_in_as_one_file(model: Path, tmp_path: Path) -> None:
    """Its files in order are one Arrow file of the archive; the same folder is a duplicate; splits are named."""
    run = make_run(tmp_path / "run", model)
    rows = [{"text": f"row {number}"} for number in range(7)]
    folder = save(tmp_path / "sets" / "train", [rows[:3], rows[3:]])
    (tmp_path / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert_refused(onward("add", folder.parent, "--run", run), 2, "1 splits (train)", f"{folder}")
    shown = onward("preview", folder, "--run", run, "--json")
    assert "train.arrow" == onward("preview", folder, "--estimate", "--run", run, "--json").json["name"]
    assert [row["text"] + "<|im_end|>" for row in rows] == [
        "".join(segment["text"] for segment in row["segments"]) for row in shown.json
    ]
    assert_refused(onward("preview", folder.parent, "--run", run), 2, "1 splits (train)", f"{folder}")
    added = onward("train", folder, "--run", run, "--json")
    assert [("train.arrow", 7)] == [(entry["name"], entry["rows_trained"]) for entry in added.json]
    assert_refused(onward("add", folder, "--run", run), 3, "its content is that of file 1 of the stream")
    other = tmp_path / "train.jsonl"
    tiny.write_jsonl(other, rows)
    assert 7 == onward("add", other, "--run", run, "--json").json[0]["rows"]


def test_saved_datasets_that_cannot_be_taken_in(model: Path, tmp_path: Path) -> None:
    """A selection of rows, a missing file, other columns and names outside of the folder are refused."""
    run = make_run(tmp_path / "run", model)
    selection = save(tmp_path / "a", [[{"text": "a"}]])
    state = json.loads((selection / "state.json").read_text())
    (selection / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    for command in ("preview", "add"):
        assert_refused(onward(command, selection, "--run", run), 3, "selection of rows", "flatten_indices")
    columns = save(tmp_path / "b", [[{"text": "a"}], [{"body": "a"}]])
    assert_refused(onward("add", columns, "--run", run), 3, "has different columns from the files before it")
    outside = save(tmp_path / "c", [[{"text": "a"}]])
    (outside / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../a/data-00000-of-00001.arrow"}]}))
    assert_refused(onward("add", outside, "--run", run), 3, "names a file outside the folder")
    assert [] == list((run / "archive").iterdir())


# data sets of the Hub


class Api:
    """Stands for the Hub: data sets with their files, in a folder."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder, self.files = folder, files

    def dataset_info(self, name: str, revision: str | None) -> Any:
        """Return commit and files of a data set."""
        if name != "who/what":
            raise OSError("404: no such repository\nwith more lines")
        return SimpleNamespace(
            sha=revision or "main", siblings=[SimpleNamespace(rfilename=file) for file in self.files]
        )

    def hf_hub_download(self, name: str, file: str, *, repo_type: str, revision: str) -> str:
        """Return the path of a downloaded file."""
        assert (name, repo_type) == ("who/what", "dataset")
        return str(self.folder / revision / file)


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("hf://datasets/who/what", ["README.md", "a.csv"], ["main/a.csv"]),
        ("hf://datasets/who/what@v1", ["data/test-0.parquet", "data/train-0.parquet"], ["v1/data/train-0.parquet"]),
        ("hf://datasets/who/what", ["train-1.csv", "train-0.csv", "dev.csv"], ["main/train-0.csv", "main/train-1.csv"]),
        ("hf://datasets/who/what/b", ["a/x.jsonl", "b/y.jsonl"], ["main/b/y.jsonl"]),
        ("hf://datasets/who/what@refs%2Fx/b/*.csv", ["b/x.jsonl", "b/y.csv"], ["refs/x/b/y.csv"]),
        ("hf://datasets/who/what/b", ["b/test-0.csv", "b/train-0.csv", "train.csv"], ["main/b/train-0.csv"]),
        ("hf://datasets/who/what/b/*", ["b/test-0.csv", "b/train-0.csv"], ["main/b/test-0.csv", "main/b/train-0.csv"]),
        ("hf://datasets/who/what/train", ["train/a.csv", "train/b.csv"], ["main/train/a.csv", "main/train/b.csv"]),
        ("hf://datasets/who/what@refs/pr/7", ["a.csv"], ["refs/pr/7/a.csv"]),
        ("hf://datasets/who/what@refs/convert/parquet/de", ["de/0.parquet", "en/0.parquet"],
         ["refs/convert/parquet/de/0.parquet"]),
        ("hf://datasets/who/what/a[1].csv", ["a1.csv", "a[1].csv"], ["main/a[1].csv"]),
        ("hf://datasets/who/what/a?.csv", ["a1.csv", "a?.csv"], ["main/a?.csv"]),
        ("hf://datasets/who/what/*[1].csv", ["b/a1.csv", "b/a[1].csv"], ["main/b/a[1].csv"]),
    ],
)  # fmt: skip
def test_files_of_a_data_set(tmp_path: Path, name: str, files: list[str], expected: list[str]) -> None:
    """The one file, the files for training, or those that are named; also after a path was made absolute."""
    for path in (Path(name), Path(name).absolute()):
        assert is_hub_name(path)
        found = Hub(Api(tmp_path, *files)).fetch(path)
        assert [tmp_path / file for file in expected] == found


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("hf://datasets/who", ["a.csv"], "not the name of a data set"),
        ("hf://models/who/what", ["a.csv"], "not the name of a data set"),
        ("hf://datasets/nobody/what", [], "nobody/what cannot be fetched: 404: no such repository"),
        ("hf://datasets/who/what", ["a.csv", "b.csv"], "it is not clear which of its files are meant"),
        ("hf://datasets/who/what", ["en/train.csv", "de/train.csv"], "several folders or formats"),
        ("hf://datasets/who/what", ["README.md"], "it is not clear"),
        ("hf://datasets/who/what/c.csv", ["a.csv"], "there is no such file that Onward reads"),
    ],
)
def test_data_sets_that_cannot_be_had(tmp_path: Path, name: str, files: list[str], words: str) -> None:
    """One line says why and of which name; where there are files the hint names one that can be fetched."""
    hub = Hub(Api(tmp_path, *files))
    with pytest.raises(UsageError) as refusal:
        hub.fetch(Path(name))
    assert words in str(refusal.value.what)
    assert "\n" not in str(refusal.value.what)
    assert name == str(refusal.value.where)
    said = str(refusal.value.hint).partition("Name the one you want: ")[2]
    if said:
        assert 1 == len(hub.fetch(Path(said)))


def test_a_download_ends_when_a_stop_is_asked_for(tmp_path: Path) -> None:
    """However long a file takes to come, nobody waits for it, and it holds no lock."""
    given_up = threading.Event()

    class Slow(Api):
        def hf_hub_download(self, name: str, file: str, *, repo_type: str, revision: str) -> str:
            given_up.wait(60)
            raise OSError("too late")

    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        Hub(Slow(tmp_path, "a.csv")).fetch(Path("hf://datasets/who/what"), stop)
    assert not given_up.is_set()
    given_up.set()


def test_a_look_at_a_data_set(tmp_path: Path) -> None:
    """The one file that a name stands for is looked at; of several, one is to be named, and then it is found."""
    files = ["train-0.csv", "train-1.csv"]
    (tmp_path / "main").mkdir()
    for file in files:
        (tmp_path / "main" / file).touch()
    hub = Hub(Api(tmp_path, *files))
    with pytest.raises(UsageError, match="this names 2 files") as refusal, opened(Path("hf://datasets/who/what"), hub):
        pass
    with opened(Path(str(refusal.value.hint).partition(": ")[2]), hub) as file:
        assert tmp_path / "main" / "train-0.csv" == file


def test_a_name_of_the_hub_in_a_command_is_one_line(model: Path, tmp_path: Path) -> None:
    """What cannot be fetched ends the command with wrong usage, and nothing was added."""
    run = make_run(tmp_path / "run", model)
    for command in ("preview", "add"):
        refused = onward(command, "hf://datasets/who", "--run", run)
        assert_refused(refused, 2, "not the name of a data set", "hf://datasets/OWNER/NAME")


@pytest.mark.parametrize("revision", ["", "@c", "@c%2Fd", "@refs%2Fpr%2F7", "@refs%2Fconvert%2Fparquet"])
def test_a_name_of_the_hub_is_printed_as_it_may_be_typed(revision: str) -> None:
    """A slash in a revision stays apart from those of the path."""
    for path in ("", "/d/e.csv"):
        name = f"hf://datasets/a/b{revision}{path}"
        assert name == str(HubName.of(Path(name)))
