"""LoRA of PEFT on packed layers: the adapters are trained beside weights that stay packed."""

from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear

from macko_llm.errors import UsageError
from macko_llm.linear import MackoLinear
from macko_llm.recipe import one_of

_INITIAL_WEIGHTS = (True, False, "gaussian")
"""Of adapters: those for which neither the dense weight nor its inputs are needed."""


class PackedLora(Linear):
    """A packed layer with adapters. All is as on a dense layer, but for what would read or change the dense weight."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT would say so too, with a warning

    @property
    def lora_variants(self) -> dict[tuple[()], None]:
        """Plain LoRA."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **more: Any) -> None:
        """Add an adapter.

        Raises:
            UsageError: it begins from more than random numbers, or is computed with the dense weight, as DoRA is.
        """
        try:
            self.resolve_lora_variant(config=config)
        except ValueError as error:
            raise UsageError(
                f"Packed layers take plain LoRA, without DoRA and the like ({error}); leave that out."
            ) from error
        if config.init_lora_weights not in _INITIAL_WEIGHTS:
            raise UsageError(
                f"Adapters of packed layers do not begin with init_lora_weights={config.init_lora_weights!r}; "
                f"use {one_of(tuple(map(repr, _INITIAL_WEIGHTS)))}."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **more)

    def merge(self, *_: Any, **__: Any) -> None:
        """Refused: the sum has no zeros.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "An adapter cannot be merged into packed weights, whose zeros it would fill; keep it beside them, or merge it into "
            "the dense model."
        )


_config: Any = LoraConfig
_post_init = _config.__post_init__


def _know_packed_layers(config: Any) -> None:
    _post_init(config)
    config._register_custom_module({MackoLinear: PackedLora})


# PEFT asks each config for layers that it does not know itself, so that each must be told.
_config.__post_init__ = _know_packed_layers
