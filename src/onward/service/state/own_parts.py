"""Parts that a run gets of its own when it is made: a base with more tokens or less weight, an adapter to start from.

They are made once, before the ledger, which records them: no later change of the config can make them again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.atomic import TEMPORARY_PREFIX, fsync_file, publish_directory, remove_tree
from onward.config import Config
from onward.errors import ConfigError, DamagedState, UsageError
from onward.layout import RunLayout, typed_path
from onward.store.ledger import Ledger
from onward.text import how_many, quoted
from onward.training.model.base import OWN_ADAPTER, OWN_BASE, TOKENIZER_MARK

if TYPE_CHECKING:
    from onward.training.model.start_adapter import StartAdapter

MADE = "made"
"""The ledger's fact with `{key: value}` of the config's keys that took effect when the run was made."""
_DIGEST = "adapter digest"


class OwnParts:
    """The parts of a new run.

    Args:
        config: the requested config; `self.config` is the result with the adapter that the run starts from.
        report: receives a line for what was taken over.

    Raises:
        UsageError, ConfigError, ModelError: the adapter cannot be the start of this run.
    """

    def __init__(self, layout: RunLayout, config: Config, report: Callable[[str], None]) -> None:
        self._layout, self._report = layout, report
        if is_made(config):
            # Here, where the caller can handle large imports.
            importlib.import_module("onward.training.model.own_base")
        self._start = _read_start(config) if config.adapter else None
        self.config = config if self._start is None else _with_start(config, self._start)
        self.facts: dict[str, Any] = {}
        """What the ledger records of the parts that were made; empty if there are none."""

    def tokenizer(self, base: Path) -> Path:
        """Return the folder with the tokenizer: the adapter's, if it brought one, else the base's."""
        folder = self._layout.tokenizer(base) if self._start is None else self._start.folder
        return folder if (folder / TOKENIZER_MARK).is_file() else self._layout.tokenizer(base)

    @property
    def revision(self) -> str | None:
        """The revision of its base on the hub that the adapter names, if the run's base is the one that it names."""
        return self._start.revision if self._start is not None and self._start.base == self.config.model else None

    def require_possible(self, base: Path) -> None:
        """Refuse parts that cannot be made, before anything is made.

        Raises:
            ModelError: the adapter does not fit the base.
            UsageError: a directory of the run is taken.
        """
        for name in (OWN_BASE, OWN_ADAPTER) if is_made(self.config) else ():
            if (self._layout.root / name).exists():
                hint = f"Name another directory; or, if nothing needs it: rm -r {quoted(self._layout.root / name)}"
                raise UsageError(f"{name}/ already exists", where=self._layout.root.absolute(), hint=hint)
        if self._start is not None:
            self._require_start(self._start, base)

    def _require_start(self, start: StartAdapter, base: Path) -> None:
        from onward.training.model.start_adapter import require_fits_base

        require_fits_base(start.folder, base)
        shape = ", ".join(f"{key} {start.lora[key]}" for key in ("rank", "alpha", "targets") if key in start.lora)
        self._report(f"starts from the weights of {start.folder} ({shape}); moments, step and learning rate are new")
        if start.base and Path(start.base).name != base.name and start.base != self.config.model:
            self._report(f"the adapter was made on {start.base}; here it is used on {self.config.model}, which it fits")

    def make(self, config: Config, base: Path, tokenizer: Path) -> Config:
        """Make the parts; return the config of the run that has them.

        Raises:
            ConfigError: a token is in the vocabulary already, or the adapter needs something that the model lacks.
        """
        if not is_made(config):
            return config
        if self._start is None:
            config = self._make_base(config, base, tokenizer)
        else:
            self._keep_start(self._start, tokenizer)
            config = config.model_copy(update={"adapter": OWN_ADAPTER})
        made = _made(config)
        if config.adapter:
            from onward.training.model.start_adapter import digest_adapter

            made[_DIGEST] = digest_adapter(self._layout.root / OWN_ADAPTER)
        self.facts = {MADE: made}
        return config

    def _make_base(self, config: Config, base: Path, tokenizer: Path) -> Config:
        from onward.training.model.own_base import make_own_base

        with self._publishing(OWN_BASE) as own, self._publishing(OWN_ADAPTER) as adapter:
            config = make_own_base(config, base, tokenizer, own, adapter)
        count = len(config.tokens)
        words = [f"{how_many(count, 'more token')}"] if count else []
        words += [f"what {config.lora.init} leaves of the weights, float32"] if config.takes_from_base else []
        self._report(f"the run has its own base in {OWN_BASE}/: {', '.join(words)}")
        return config.model_copy(update={"model": OWN_BASE, "adapter": OWN_ADAPTER if config.takes_from_base else ""})

    def _keep_start(self, start: StartAdapter, tokenizer: Path) -> None:
        from onward.service.tokenizer import copy_tokenizer
        from onward.training.model.start_adapter import keep_start_adapter

        with self._publishing(OWN_ADAPTER) as folder:
            keep_start_adapter(start.folder, folder)
        if tokenizer == start.folder:
            remove_tree(self._layout.root / "tokenizer")
            with self._publishing("tokenizer") as folder:
                copy_tokenizer(start.folder, folder)

    @contextmanager
    def _publishing(self, name: str) -> Generator[Path]:
        """Atomically make a directory of the run with the files that the body writes; none if it writes none."""
        temporary = self._layout.root / f"{TEMPORARY_PREFIX}{name}"
        remove_tree(temporary)
        temporary.mkdir()
        try:
            yield temporary
            files = sorted(temporary.iterdir())
            for path in files:
                fsync_file(path)
            if files:
                publish_directory(temporary, self._layout.root / name)
        finally:
            remove_tree(temporary)


def start_folder(layout: RunLayout, ledger: Ledger, config: Config) -> Path | None:
    """Return the folder of the adapter that a run starts from; None for fresh weights.

    Raises:
        DamagedState: the adapter changed since the run was made.
        ConfigError: the config asks for something that takes effect only when a run is made.
    """
    made: dict[str, Any] = ledger.get(MADE) or {}
    now, default = _made(config), _made(Config())
    asked = [key for key in now if now[key] != made.get(key, default[key])]
    if asked:
        raise ConfigError(
            f"{asked[0]} takes effect only when a run is made: this one has {made.get(asked[0], default[asked[0]])!r}",
            where=layout.config, hint="Restore the old value, or make another run: onward init NEW_RUN",
        )  # fmt: skip
    if not config.adapter:
        return None
    from onward.training.model.start_adapter import digest_adapter

    folder = layout.root / OWN_ADAPTER
    if digest_adapter(folder) != made.get(_DIGEST):
        what = "the adapter that the run starts from was changed since the run was made"
        raise DamagedState(what, where=folder, hint="Put it back from a copy, or make another run: onward init NEW_RUN")
    return folder


def _made(config: Config) -> dict[str, Any]:
    """Return the keys that take effect when a run is made, with their values."""
    init = config.lora.init if config.takes_from_base else "default"
    return {"tokens": config.tokens, "adapter": config.adapter, "lora.init": init}


def is_made(config: Config) -> bool:
    """Whether a config asks for parts that are made with the run."""
    return bool(config.adapter or config.tokens or config.takes_from_base)


def _read_start(config: Config) -> StartAdapter:
    if config.tokens:
        what = "a run with new tokens cannot start from an adapter with another vocabulary"
        hint = "Leave out tokens or the adapter; or merge the adapter into its base and add the tokens to that."
        raise ConfigError(what, where="tokens", hint=hint)
    from onward.service.state.reading import as_written
    from onward.training.checkpoints.huggingface import FOR_TRAINING
    from onward.training.model.start_adapter import read_start_adapter

    folder = typed_path(config.adapter).resolve()
    as_written(folder, FOR_TRAINING)
    return read_start_adapter(folder)


def _with_start(config: Config, start: StartAdapter) -> Config:
    from onward.training.model.start_adapter import with_start_adapter

    return with_start_adapter(config, start)
