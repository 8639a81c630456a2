"""Makes every process with this folder on its path see an emulated GPU as soon as it has imported PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FOLLOWED = {"torch": "show", "onward.training.layers.decoder_parts": "give_kernels"}
"""Modules, and the function of `face` that follows when each was loaded."""


class After:
    """Finds modules like everybody else; what is loaded is followed by a function."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module that is followed, once."""
        del path, target
        then = FOLLOWED.pop(name, None)
        if then is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            import face

            getattr(face, then)(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, After)
