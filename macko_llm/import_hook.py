"""Registers the "macko" quantization method the moment transformers becomes able to load a model.

`import macko_llm` must make `AutoModelForCausalLM.from_pretrained` understand packed checkpoints, but importing
transformers takes seconds, which `macko --help` and shell completion should not pay.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TRIGGER = "transformers.modeling_utils"
INTEGRATION = "macko_llm.transformers_integration"


class _TriggerFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the trigger, and wraps the loader that they give."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _TriggerLoader(spec.loader)
        return spec


class _TriggerLoader(importlib.abc.Loader):
    """Runs the module as its own loader does, gives it that loader back, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

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
    else:
        sys.meta_path.insert(0, _TriggerFinder())
