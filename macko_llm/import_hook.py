"""Registers the "macko" quantization method the moment transformers becomes able to load a model.

`import macko_llm` must make `AutoModelForCausalLM.from_pretrained` understand packed checkpoints, but importing
transformers takes seconds, which `macko --help` and shell completion should not pay.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from itertools import dropwhile
from types import ModuleType
from typing import Any

TRIGGER = "transformers.modeling_utils"
INTEGRATION = "macko_llm.transformers_integration"


class _TriggerFinder(importlib.abc.MetaPathFinder):
    """Lets the finders behind it find the trigger, and wraps the loader that they give.

    It stays for good: being asked for the module is no sign that the module will be run.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        behind = list(dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]
        found = (finder.find_spec(fullname, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _TriggerLoader(spec.loader)
        return spec


class _TriggerLoader(importlib.abc.Loader):
    """Runs the module as its own loader does, gives it that loader back, then registers.

    Whoever only looks (`get_source`, `get_code`, `is_package`, ...) is answered by that loader.
    """

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        importlib.import_module(INTEGRATION)


def register_with_transformers() -> None:
    """Register now if transformers can load models already, else as soon as it can."""
    if TRIGGER in sys.modules:
        importlib.import_module(INTEGRATION)
    elif not any(isinstance(finder, _TriggerFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TriggerFinder())
