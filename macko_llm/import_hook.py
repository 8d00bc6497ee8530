"""Registers the "macko" quantization method the moment transformers becomes able to load a model, and packed layers with PEFT.

`import macko_llm` must make `AutoModelForCausalLM.from_pretrained` understand packed checkpoints, but importing
transformers takes seconds, which `macko --help` and shell completion should not pay. PEFT may never be imported.

Where macko is installed, every Python begins with this module (build_backend/macko_llm.pth): it imports next to nothing.
"""

from __future__ import annotations

import sys
from itertools import dropwhile

TYPE_CHECKING = False  # the one of typing takes longer than all of this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

INTEGRATIONS = {
    "transformers.modeling_utils": "macko_llm.transformers_integration",
    "peft.tuners.lora.model": "macko_llm.peft_integration",
}
"""Triggers, and the module that is imported as soon as each of them is."""


class _TriggerFinder:
    """Lets the finders behind it find the triggers, and wraps the loaders that they give.

    It stays for good: being asked for a module is no sign that the module will be run.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in INTEGRATIONS:
            return None
        behind = list(dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]
        found = (finder.find_spec(fullname, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _TriggerLoader(spec.loader, fullname)  # type: ignore[assignment]
        return spec


class _TriggerLoader:
    """Runs the module as its own loader does, gives it that loader back, then registers; a `Loader` in all but its base class.

    Whoever only looks (`get_source`, `get_code`, `is_package`, ...) is answered by that loader.
    """

    def __init__(self, loader: Loader, trigger: str) -> None:
        self._loader = loader
        self._trigger = trigger

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            _integrate(self._trigger)
        except Exception as error:  # who uses transformers may not know of macko
            _warn(self._trigger, error)


def register_with_transformers() -> None:
    """Register now if transformers can load models already, else as soon as it can; so with PEFT."""
    for trigger in INTEGRATIONS:
        if trigger in sys.modules:
            _integrate(trigger)
    if not all(trigger in sys.modules for trigger in INTEGRATIONS) and not any(
        isinstance(finder, _TriggerFinder) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _TriggerFinder())


def _integrate(trigger: str) -> None:
    from importlib import import_module

    import_module(INTEGRATIONS[trigger])


def _warn(trigger: str, error: Exception) -> None:
    import warnings

    without = "refuse to adapt" if trigger.startswith("peft.") else "load as random weights"
    warnings.warn(
        f"macko cannot teach this {trigger.partition('.')[0]} about packed models ({type(error).__name__}: {error}), "
        f"which it would {without}; update or uninstall macko-llm.",
        stacklevel=2,
    )
