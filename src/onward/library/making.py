"""Makes a directory a run, and opens the ledger that shows that it is one.

Everything that can be refused is refused before anything is made, so that a refusal leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.config import Config
from onward.config.keys import NEW_RUN
from onward.config.schema import config_files
from onward.config.text import parse_config, read_config
from onward.errors import OnwardError, UsageError
from onward.layout import MANIFEST, RunLayout
from onward.library.torch_defaults import defaults_of_torch
from onward.service.state.own_parts import OwnParts, is_made
from onward.service.state.unfinished import cannot_be_made, in_making, remove_unfinished_run
from onward.store.disks import require_local, require_locks, require_path, require_shared_memory
from onward.store.ledger import Ledger
from onward.store.waiting import Waiting
from onward.text import quoted

if TYPE_CHECKING:
    from onward.data.tokenizer import TokenizerState
    from onward.service.tokenizer import LoadedTokenizer


def create(
    layout: RunLayout,
    values: Mapping[str, Any],
    report: Callable[[str], None],
    loading: Callable[[], AbstractContextManager[None]],
    *,
    later: bool = False,
) -> None:
    """Make a run from a base model, once the model has passed its admission.

    Args:
        values: config keys; empty if the directory has a config already.
        report: receives a line when something takes long, and what the admission found.
        loading: a context in which large libraries are imported.
        later: postpone the admission to the first start.

    Raises:
        ConfigError: a setting is refused, or `max_length` is above the positions that the model has learned.
        ModelError: the base model or its tokenizer is missing or unusable, or cannot be proven.
        UsageError: the directory is in use.
    """
    with place_for_run(layout), defaults_of_torch():
        _Making(layout, values, report, loading).make(later)


class _Making:
    """A run in the making; the arguments are those of `create`."""

    def __init__(
        self,
        layout: RunLayout,
        values: Mapping[str, Any],
        report: Callable[[str], None],
        loading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.layout = layout
        self.values = values
        self.report = report
        self.loading = loading

    def make(self, later: bool) -> None:
        from onward.data.templates.own_template import keep_template, template_files
        from onward.service.tokenizer import KeptTokenizer
        from onward.training.model.base import OWN_BASE, base_of_run, keep_revision, resolve_base, with_stored_path

        config = _choose_config(self.layout, self.values)
        name, template = keep_template(config.chat_template, self.layout.root)
        with self.loading() if is_made(config) else contextlib.nullcontext():
            own = OwnParts(self.layout, config, self.report)
        base = resolve_base(own.config.model, revision=own.revision, download=True, report=self.report)
        _require_unchanged(base)
        own.require_possible(base)
        if own.config.method != "full" and (own.config.lora.use_dora or own.config.lora.bias != "none"):
            self.report("layers with DoRA or a trained bias use PEFT's own modules, which are slower than Onward's")
        folder = own.tokenizer(base)
        tokenizer = self._load_tokenizer(folder)
        _require_usable(base, own.config, tokenizer.state)
        config = with_stored_path(own.config, base, self.layout.root).model_copy(update={"chat_template": name})
        with in_making(self.layout) as making:
            config = self._make_own(own, config, base, folder)
            if config.model == OWN_BASE:
                base = base_of_run(self.layout.root, OWN_BASE)
            config, facts = (config, {}) if later else self._admit(config, base)
            keep_revision(self.layout.root, config.model, base)
            if own.facts:
                folder = self.layout.tokenizer(base)
                tokenizer = self._load_tokenizer(folder)
            KeptTokenizer(self.layout, folder).keep(tokenizer)
            making.ledger.put(**own.facts, **facts)
            is_new = bool(own.facts) or not self.layout.config.exists()
            files = config_files(self.layout.config, config) if is_new else {}
            making.write(template_files(name, template, self.layout.root) | files)

    def _load_tokenizer(self, folder: Path) -> LoadedTokenizer:
        """Load the tokenizer now: a base without a usable one is refused, and the first file need not wait for it."""
        from onward.service.tokenizer import load_with_files

        if "transformers" in sys.modules:
            return load_with_files(folder)
        self.report("preparing the tokenizer, once")
        with self.loading():
            return load_with_files(folder)

    def _make_own(self, own: OwnParts, config: Config, base: Path, tokenizer: Path) -> Config:
        """Make the parts of the run's own; an adapter that fits the model in no way is refused with what would fit."""
        try:
            return own.make(config, base, tokenizer)
        except OnwardError as error:
            if str(error.where).startswith("lora"):
                from onward.training.admission.remedies import working_config

                working_config(config, base, self._has_chosen_dropout())
            raise

    def _has_chosen_dropout(self) -> bool:
        lora = self.values.get("lora")
        return "lora.dropout" in self.values or (isinstance(lora, Mapping) and "dropout" in lora) or not self.values

    def _admit(self, config: Config, base: Path) -> tuple[Config, dict[str, Any]]:
        """Prove the model; return the config with settings that work, and the facts for the ledger."""
        with self.loading():
            from onward.service.admission import admit_new
        from onward.training.admission.findings import FACT
        from onward.training.foreign.arguments import Arguments
        from onward.training.foreign.settings import router_loss
        from onward.training.model.base import OWN_ADAPTER

        start = self.layout.root / OWN_ADAPTER if config.adapter else None
        config, findings = admit_new(config, base, has_chosen_dropout=self._has_chosen_dropout(), checkpoint=start)
        for line in (*findings.lines(), *router_loss(Arguments(), base)):
            self.report(line)
        return config, {FACT: findings.to_dict()}


def _require_unchanged(base: Path) -> None:
    """Refuse a checkpoint of Onward's as a base if a file of its model is not as it was written."""
    if (base / MANIFEST).exists():
        from onward.service.state.reading import as_written
        from onward.training.checkpoints.huggingface import FOR_TRAINING

        as_written(base, FOR_TRAINING)


def _require_usable(base: Path, config: Config, tokenizer: TokenizerState) -> None:
    """Refuse a base whose files show, without loading its weights, that it is unusable."""
    from onward.data.row_tokenizer import end_token
    from onward.training.model.base import require_complete, require_plain
    from onward.training.model.capacity import read_capacity, require_embedded, require_positions

    require_complete(base)
    require_plain(base, method=config.method)
    end_token(tokenizer, base)
    capacity = read_capacity(base)
    require_positions(capacity, config)
    require_embedded(capacity, tokenizer)


@contextlib.contextmanager
def place_for_run(layout: RunLayout) -> Generator[None]:
    """Hold a directory for the making of a run in it; one that was made for that is removed again if it stays empty.

    Raises:
        UsageError: there is something in the directory, or another process makes a run in it.
    """
    refuse_occupied(layout)
    missing = [folder for folder in (layout.root, *layout.root.parents) if not folder.exists()]
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        held = os.open(layout.root, os.O_RDONLY)
    except OSError as error:
        raise cannot_be_made(layout, error) from None
    try:
        _take(held, layout)
        remove_unfinished_run(layout)
        refuse_occupied(layout)
        yield
    finally:
        os.close(held)
        with contextlib.suppress(OSError):  # there is something in it
            for folder in missing:
                folder.rmdir()


def _take(held: int, layout: RunLayout) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what, hint = "another process is making a run in this directory", "Wait for it, or name another directory."
        raise UsageError(what, where=layout.root.absolute(), hint=hint) from None


def refuse_occupied(layout: RunLayout) -> None:
    """Refuse a directory that holds a run or a model already, or whose disk or path cannot hold a ledger.

    Raises:
        UsageError: it does, there is a file of that name, the ledger would be on a disk that other machines use, or
            libraries could not open its path.
    """
    if layout.ledger.exists():
        hint = f"onward status --run {quoted(layout.root)}; for a new run, name another directory."
        raise UsageError("there is already a run in this directory", where=layout.root.absolute(), hint=hint)
    if (layout.checkpoints() or layout.restore_points()) and not layout.unfinished_ledger.exists():
        hint = f"onward adopt {quoted(layout.current)}/checkpoint-N --run NEW_RUN makes a run from it."
        raise UsageError("this directory has a model without its ledger", where=layout.root.absolute(), hint=hint)
    if layout.root.exists() and not layout.root.is_dir():
        raise UsageError("this is a file, not a directory", where=layout.root.absolute())
    if _is_of_model(layout.config):
        hint = f"Name another directory for the run; --model {quoted(layout.root)} makes it from this model."
        raise UsageError("this is the directory of a model", where=layout.root.absolute(), hint=hint)
    require_path(layout, is_new=True)
    require_local(layout)
    _try_on_file(layout.root.absolute(), require_locks)
    _try_on_file(layout.ledger.resolve().parent, lambda file, _: require_shared_memory(file, layout))


def _is_of_model(config: Path) -> bool:
    """Whether a config is that of a model in transformers' layout; a run's may have the same name."""
    if config.suffix != ".json":
        return False
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(config.read_bytes())
        return isinstance(values, dict) and ("model_type" in values or "architectures" in values)
    return False


def _try_on_file(folder: Path, attempt: Callable[[int, Path], None]) -> None:
    """Try an unnamed file in the nearest existing folder; missing write permission is reported later.

    Args:
        attempt: called with the file's descriptor and that folder.
    """
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=there) as file:
        attempt(file.fileno(), there)


def open_ledger(layout: RunLayout, waiting: Waiting | None = None) -> Ledger:
    """Open the ledger of a run.

    Args:
        waiting: how long to wait for others that hold it.

    Raises:
        UsageError: the directory is not a run, such as a relative one after the working directory was changed, or the
            ledger is on a disk that other machines use or at a path that libraries cannot open.
        DamagedState: it is gone, or empty, so it is not the one that the run was made with.
    """
    layout.require()
    require_path(layout)
    require_local(layout)
    ledger = Ledger(layout.ledger, waiting=waiting)
    if ledger.get("run") is not None:
        return ledger
    ledger.close()
    raise layout.empty_ledger()


def _choose_config(layout: RunLayout, values: Mapping[str, Any]) -> Config:
    if not layout.config.exists():
        return parse_config({**NEW_RUN, **values})
    if values:
        hint = "Leave the settings out to use it, or remove it."
        raise UsageError("there is already a config in this directory", where=layout.config, hint=hint)
    return read_config(layout.config)
