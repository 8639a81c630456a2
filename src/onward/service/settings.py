"""The config of an open run: one object rereads the file when it changes and knows when each key takes effect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onward.config import Config
from onward.config.text import read_config
from onward.errors import ConfigError, ModelError, Unreadable

PUT_BACK = "Restore the old values, or make another run: onward init NEW_RUN"


def locked_refusal(changes: Mapping[str, tuple[Any, Any]]) -> ConfigError:
    """Return the refusal of changed identity keys, given as `Config.identity_changes` returns them."""
    what = f"identity keys are locked once a run has begun: {changes_in_words(changes)}"
    return ConfigError(what, where="onward.yaml", hint=PUT_BACK)


def changed_refusal(thing: str, where: object) -> ModelError:
    """Return the refusal of files that are no longer those that the run began with."""
    hint = "Restore the original files; to start over with the changed ones: onward reset"
    return ModelError(f"the {thing} changed on disk since this run began", where=where, hint=hint)


def changes_in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Return, key by key, what the run began with and what its config says."""
    return "; ".join(f"{key}: the run has {old!r}, the config says {new!r}" for key, (old, new) in changes.items())


class Settings:
    """The config as it is on disk, read again only when the file changed.

    Keys that no weight depends on take effect at once: code that needs one reads it from `current` each time. The
    others take effect when the next file begins; see `onward.config.acts`.

    Raises:
        ConfigError: the config is refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._signature = self._look()
        self.current = read_config(path)
        self.problem: str | None = None
        """Why the file cannot be read now; the config read before stays in force."""

    def read(self) -> Config:
        """Return the config that is in the file now.

        Raises:
            ConfigError, Unreadable: it is refused or cannot be read now; the config read before stays current.
        """
        signature = self._look()
        if signature != self._signature or self.problem is not None:
            self.current = read_config(self._path)
            self._signature, self.problem = signature, None
        return self.current

    def refresh(self) -> bool:
        """Read the file again if it changed, and return whether keys changed; a refused one only sets `problem`."""
        before, problem = self.current, self.problem
        try:
            self.read()
        except (ConfigError, Unreadable) as error:
            self.problem = error.what
        return self.current != before or self.problem != problem

    def over(self, config: Config) -> Config:
        """Return a config with the current values of the keys that take effect at once."""
        return config.with_operation_keys_of(self.current)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
