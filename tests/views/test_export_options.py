"""Which options of an export go together."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

from onward.errors import OnwardError, UsageError
from onward.views.export import export as exporting
from onward.views.export import gguf
from onward.views.export.export import DTYPES, FORMATS, Wanted

QUANTIZED = (None, "f16", "q8_0", "q4_k_m", "float16")


@pytest.mark.parametrize("file_format", [None, *FORMATS])
def test_options_go_together_or_are_refused(file_format: str | None, tmp_path: Path) -> None:
    """How weights are stored is said once: by a type, or for GGUF by a kind; each kind is one that can be written."""
    for dtype, quantize in itertools.product((None, *DTYPES), QUANTIZED):
        wanted = Wanted(tmp_path / "out", file_format, dtype=dtype, quantize=quantize)
        is_possible = quantize is None or (file_format in ("gguf", "ollama") and dtype is None)
        if is_possible:
            wanted.require_possible()
            assert (quantize or dtype or "f16") == wanted.kind
            assert wanted.kind in (*gguf.DIRECT, *gguf.K_QUANTS)
        else:
            with pytest.raises(UsageError, match="in place of --dtype"):
                wanted.require_possible()


def test_only_gguf_is_a_single_file(tmp_path: Path) -> None:
    """And only under a name that says so."""
    names = itertools.product((None, *FORMATS), ("out", "out.gguf", "out.GGUF"))
    found = [(each, name) for each, name in names if Wanted(tmp_path / name, each).is_file]
    assert [("gguf", "out.gguf")] == found


@pytest.mark.parametrize(("file_format", "name"), [(None, "m.gguf"), ("adapter", "m.gguf"), ("gguf", "m.GGUF")])
def test_no_folder_gets_the_name_of_a_gguf_file(file_format: str | None, name: str, tmp_path: Path) -> None:
    """Whoever forgets the format would have an adapter's folder, which llama.cpp refuses; the way out is named."""
    with pytest.raises(UsageError, match="folder with the name of a GGUF file") as refused:
        Wanted(tmp_path / name, file_format).require_possible()
    assert f"{tmp_path}/m.gguf --format gguf" in str(refused.value.hint)
    Wanted(tmp_path / "m.gguf", "gguf").require_possible()


def test_whatever_has_the_name_is_in_the_way(tmp_path: Path) -> None:
    """A file, a folder, and a link to something that is gone."""
    for make in (Path.touch, Path.mkdir, lambda path: path.symlink_to("gone")):
        target = tmp_path / "out"
        make(target)
        with pytest.raises(UsageError, match="nothing is written over it"):
            Wanted(target).require_possible()
        target.rmdir() if target.is_dir() else target.unlink()


@pytest.mark.parametrize(("code", "status"), [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EACCES, 2)])
def test_a_disk_that_fills_while_it_is_written_is_no_wrong_usage(
    code: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place where nothing may be written is; either way nothing stays."""

    def fail(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(exporting, "fsync_file", fail)
    wanted = Wanted(tmp_path / "out", "adapter")
    with pytest.raises(OnwardError, match="cannot write it") as refused, exporting._published(wanted) as folder:
        (folder / "config.json").write_text("{}")
    assert (status, []) == (refused.value.exit_status, [*tmp_path.iterdir()])


@pytest.mark.parametrize(("code", "words"), [(errno.EACCES, "it cannot be read"), (errno.ENOSPC, "cannot write it")])
def test_a_base_that_may_not_be_read_is_not_what_cannot_be_written(code: int, words: str, tmp_path: Path) -> None:
    """Only a full disk is said of the export where the system names the file that was copied."""
    base, wanted = tmp_path / "model.safetensors", Wanted(tmp_path / "out", "adapter")
    with pytest.raises(OnwardError, match=words) as refused, exporting._published(wanted):
        raise OSError(code, os.strerror(code), str(base))
    assert (1, str(base), []) == (refused.value.exit_status, refused.value.where, [*tmp_path.iterdir()])
