"""Adoption: makes a checkpoint of transformers' Trainer a run, with its step and its moments by parameter name."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from onward.atomic import fsync_file
from onward.config import Config
from onward.config.schema import config_files
from onward.config.text import flattened
from onward.data.row_tokenizer import end_token
from onward.data.templates.own_template import keep_template, template_files
from onward.errors import DamagedState, ModelError, UsageError
from onward.layout import RunLayout
from onward.service.admission import admit_new, keep
from onward.service.session import open_session
from onward.service.state.adopted import describe
from onward.service.state.adopted_config import Adopted, read_adopted
from onward.service.state.commits import Commit, Commits
from onward.service.state.unfinished import in_making
from onward.service.tokenizer import copy_tokenizer, load_tokenizer_of
from onward.store.ledger import Ledger
from onward.text import quoted
from onward.training.admission.findings import Findings
from onward.training.admission.reach import weights_of
from onward.training.device.environment import pick_device, pick_dtype
from onward.training.foreign.carried import without_carried
from onward.training.foreign.folders import fresh_hint
from onward.training.foreign.moments import load_into
from onward.training.foreign.scaler import read_scale
from onward.training.foreign.settings import router_loss
from onward.training.measuring.probe import Probe
from onward.training.model.base import (
    OWN_BASE,
    TOKENIZER_MARK,
    WEIGHTS,
    digest_base,
    keep_revision,
    require_plain,
    resolve_base,
    with_stored_path,
)
from onward.training.model.capacity import read_capacity, require_positions
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.state import TrainState

MODEL_FILES = (*WEIGHTS, "generation_config.json")


def adopt(
    checkpoint: Path,
    layout: RunLayout,
    model: str | None,
    settings: Mapping[str, Any],
    report: Callable[[str], None],
    *,
    fresh_moments: bool = False,
) -> list[str]:
    """Make the run in `layout` from `checkpoint`. Everything is loaded and checked before anything is made.

    Args:
        settings: config keys set by the user; they take precedence over the checkpoint.
        fresh_moments: take only the weights; the optimizer starts afresh.

    Returns:
        What the run took over, what was set and what is unknown, one line each.

    Raises:
        UsageError: this is not a Trainer checkpoint, it cannot be continued exactly, or the directory already has a
            config.
        DamagedState: its moments do not fit its model.
        ModelError: the base model or its tokenizer is missing or cannot be loaded, or the adapter is of another kind.
    """
    settings = flattened(settings)
    if layout.config.exists():
        what = "there is already a config in this directory"
        raise UsageError(what, where=layout.config, hint="Name another directory.")
    with _way_out():
        adopted = read_adopted(checkpoint, model, settings, fresh=fresh_moments)
        template_name, template = keep_template(adopted.config.chat_template, layout.root)
        named = resolve_base(adopted.config.model, revision=adopted.revision, download=True, report=report)
        base = _base(adopted, named)
        other_base = list(_other_base(adopted, base, is_named=bool(model or settings.get("model"))))
        require_plain(base, method=adopted.config.method)
        require_positions(read_capacity(base), adopted.config)
        _require_tokenizer(checkpoint, base)
        state, findings, notes = _load(adopted, base)
        config = _with_base(adopted.config, base, checkpoint, layout)
        config = config.model_copy(update={"chat_template": template_name})
        with in_making(layout) as making:
            making.write(template_files(template_name, template, layout.root))
            keep_revision(layout.root, config.model, base)
            _copy_parts(checkpoint, layout, config)
            making.ledger.put(origin_step=state.step)
            keep(making.ledger, findings)
            _commit(layout, making.ledger, config, state, report)
            making.ledger.add_event("info", f"adopted {checkpoint.absolute()} at step {state.step}", state.step)
            making.write(config_files(layout.config, config))
        notes += [*router_loss(adopted.arguments, base), *other_base]
    return describe(replace(adopted, config=config), settings, notes)


@contextlib.contextmanager
def _way_out() -> Generator[None]:
    """Let every refusal of a damaged checkpoint say what to do."""
    try:
        yield
    except DamagedState as error:
        hint = error.hint or "Adopt another checkpoint of the same training: each checkpoint-N can be continued."
        raise DamagedState(error.what, where=error.where, hint=hint) from None


def _with_base(config: Config, base: Path, checkpoint: Path, layout: RunLayout) -> Config:
    if base == checkpoint.resolve():  # the Trainer may delete it: the run keeps a base of its own
        return config.model_copy(update={"model": OWN_BASE})  # relative: the run can be moved
    return with_stored_path(config, base, layout.root)


def _base(adopted: Adopted, named: Path) -> Path:
    """Return the run's base: a full model whose vocabulary differs from that of the named base is its own base."""
    own = adopted.folder.path.resolve()
    if adopted.adapter or named == own or read_capacity(own).embedding_rows == read_capacity(named).embedding_rows:
        return named
    if (own / TOKENIZER_MARK).is_file():
        return own
    rows = (
        f"{read_capacity(own).embedding_rows} rows in its embedding, {named.name} {read_capacity(named).embedding_rows}"
    )
    program = (
        f"from transformers import AutoTokenizer as T; T.from_pretrained('TOKENIZER').save_pretrained({str(own)!r})"
    )
    hint = f"Put the tokenizer with which it was trained into it: python -c {quoted(program)}; then adopt again."
    raise UsageError(f"the checkpoint has {rows}, and no tokenizer", where=own, hint=hint)


def _other_base(adopted: Adopted, base: Path, *, is_named: bool) -> Iterator[str]:
    """Compare the base of an adapter with the one that Onward recorded, if it wrote the checkpoint.

    Args:
        is_named: whether the user named it: one that was saved anew has another hash.

    Raises:
        ModelError: it is another, and nobody asked for it.
    """
    if not adopted.adapter or adopted.base_digest in ("", digest_base(base)):
        return
    what = "the base model on disk is not the one on which this adapter was trained"
    if not is_named:
        start = f"onward init NEW_RUN --model {quoted(base)} --adapter {quoted(adopted.folder.path)}"
        hint = f"Name the original: --model FOLDER; to start from the adapter's weights on this one: {start}"
        raise ModelError(what, where=base, hint=hint)
    yield f"{what} (its files have other hashes); the run is of {base}, as you say"


def _load(adopted: Adopted, base: Path) -> tuple[TrainState, Findings, list[str]]:
    """Return the state that the Trainer had, how its model is treated, and notes on its moments."""
    config, folder, device = adopted.config, adopted.folder, pick_device()
    with without_carried(folder.path, base, adopted.adapter) if adopted.adapter else nullcontext(folder.path) as path:
        _, findings = admit_new(config, base, has_chosen_dropout=True, checkpoint=path)
        dtype = pick_dtype(config.dtype, device)
        model = build_model(ModelSpec(config, base, device, dtype), checkpoint=path, treatment=findings.treatment)
    state = TrainState.start(model, config)
    if state.scale is not None:
        state.scale = read_scale(folder.path)
    if adopted.moments is None:
        state.counters.step = state.counters.adam_origin = folder.step
        return state, findings, []
    left_out = weights_of(dict(model.named_parameters()), frozenset(findings.left_out))
    notes = load_into(state, adopted.moments, folder, left_out)
    adam = state.view().adam_step()
    if not 0 < adam <= folder.step:
        what = f"Adam counts {adam} steps, trainer_state.json {folder.step}"
        what = what if folder.step else "it was saved before the first step, so there are no moments to continue with"
        raise DamagedState(what, where=folder.path, hint=fresh_hint(folder.path))
    state.counters.step, state.counters.adam_origin = folder.step, folder.step - adam
    return state, findings, notes


def _copy_parts(checkpoint: Path, layout: RunLayout, config: Config) -> None:
    """Copy what the run keeps of the checkpoint: its base, or its tokenizer."""
    if config.model == OWN_BASE:
        _copy(checkpoint, MODEL_FILES, layout.root / OWN_BASE)
        copy_tokenizer(checkpoint, layout.root / OWN_BASE)
    elif (checkpoint / TOKENIZER_MARK).is_file():  # the one that the checkpoint was trained with
        _copy(checkpoint, ("config.json",), layout.root / "tokenizer")
        copy_tokenizer(checkpoint, layout.root / "tokenizer")


def _commit(
    layout: RunLayout, ledger: Ledger, config: Config, state: TrainState, report: Callable[[str], None]
) -> None:
    """Commit the adopted state as the run's first, and record the handover from the checkpoint."""
    session = open_session(layout, ledger, report=report, config=config)
    probe = Probe(state.model, config.seed, session.device, session.dtype, exact=config.deterministic)
    commit = Commit(state.model, state.view(), config, probe.of_model, session.facts())
    values = json.dumps(Commits(layout, ledger).commit(commit).manifest.measured)
    ledger.add_handover(kind="adopt", step=state.step, before=values, after=values, difference=0.0, name="bitwise")


def _copy(source: Path, patterns: Iterable[str], target: Path) -> None:
    """Copy files: a link would change if a Trainer wrote the same checkpoint once more."""
    target.mkdir(exist_ok=True)
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        shutil.copyfile(path, target / path.name)
        fsync_file(target / path.name)


def _require_tokenizer(checkpoint: Path, base: Path) -> None:
    own = (checkpoint / TOKENIZER_MARK).is_file()
    if not own and base == checkpoint.resolve():
        hint = "--model BASE names the folder of the model from which it was made, which has one."
        raise UsageError("the checkpoint has no tokenizer", where=checkpoint, hint=hint)
    folder = checkpoint if own else base
    end_token(load_tokenizer_of(folder), folder)
