"""Which linear layers a recipe prunes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from macko_llm import models
from macko_llm.errors import UsageError
from macko_llm.recipe import REGEX_PREFIX, PruneRecipe


@dataclass(frozen=True)
class Head:
    """An lm_head that is to be pruned.

    Attributes:
        name: its qualified name.
        linear: the module.
        patterns: those of the recipe's `layers` that name it.
    """

    name: str
    linear: nn.Linear
    patterns: tuple[str, ...]


def chosen_linears(model: PreTrainedModel, recipe: PruneRecipe) -> dict[str, nn.Linear]:
    """The linears to prune, qualified name -> module, one for each weight: where several share it, the first.

    A weight is left alone where any linear that has it is to be left alone. The lm_head comes last, where it is asked for.

    Raises:
        CheckpointError: blocks of an unsupported kind.
        UsageError: a pattern that fits no linear layer, or nothing is left to prune; or as `asked_head`.
    """
    linears = models.prunable_linears(model)
    everywhere = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targeted = fitting(recipe.targets, linears, "targets") if recipe.targets else set(linears)
    # An lm_head is seldom pruned, but to say so in a recipe is no mistake.
    ignored = fitting(recipe.ignore, everywhere, "ignore")
    kept = {id(linear.weight) for name, linear in linears.items() if name in ignored or name not in targeted}
    distinct: dict[int, tuple[str, nn.Linear]] = {}
    for name, linear in linears.items():
        if id(linear.weight) not in kept:
            distinct.setdefault(id(linear.weight), (name, linear))
    head = asked_head(model, recipe)
    if head is not None:
        distinct[id(head.linear.weight)] = (head.name, head.linear)
    if not distinct:
        raise UsageError("The recipe leaves every layer alone; give other targets, or ignore fewer layers.")
    return dict(distinct.values())


def asked_head(model: PreTrainedModel, recipe: PruneRecipe) -> Head | None:
    """The lm_head, if the recipe asks for it: by a pattern of its `layers` that fits no linear of a block.

    So a pattern that is meant for the blocks, such as "*", never prunes it by accident.

    Raises:
        CheckpointError: blocks of an unsupported kind.
        UsageError: `layers` asks for embeddings, for a tied lm_head or for one that is no plain linear layer.
    """
    linears = models.prunable_linears(model)
    others = [pattern for pattern, _ in recipe.layers if not any(fits(pattern, name) for name in linears)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and any(fits(pattern, name) for pattern in others):
            raise UsageError(
                f"layers asks for {name}, an embedding, which multiplies nothing and stays dense; leave it out of layers."
            )
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    patterns = tuple(pattern for pattern in others if fits(pattern, name))
    if head is None or not patterns or any(fits(pattern, name) for pattern in recipe.ignore):
        return None
    if not models.is_plain_linear(head):
        raise UsageError(
            f"layers asks for {name}, a {type(head).__name__}, which cannot be pruned; leave it out of layers."
        )
    elsewhere = (part for module in model.modules() if module is not head for part in module._parameters.values())
    if any(part is head.weight for part in elsewhere):
        raise UsageError(
            f"layers asks for {name}, whose weights are the embeddings' too (tie_word_embeddings); leave it out of layers, or "
            "save the model with a weight for each."
        )
    return Head(name, cast(nn.Linear, head), patterns)


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern means a layer.

    Args:
        pattern: a name as in a shell, `*` for any text, of the whole layer or of its end from a dot on (`down_proj`,
            `model.layers.0.*`, `mlp.*_proj`); or "re:" and a regular expression for the beginning of the name.
        name: qualified name of the layer.
    """
    if pattern.startswith(REGEX_PREFIX):
        return re.match(pattern.removeprefix(REGEX_PREFIX), name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def fitting(patterns: Sequence[str], names: Iterable[str], setting: str) -> set[str]:
    """The names that any of the patterns fits.

    Raises:
        UsageError: a pattern that fits none; `setting` is where it stands.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in patterns:
        fitting = [name for name in known if fits(pattern, name)]
        if not fitting:
            raise UsageError(
                f"{setting} has {pattern!r}, which fits no layer; write names such as {known[0]}, {known[0].split('.')[-1]} "
                f"or {REGEX_PREFIX}.*{known[0].split('.')[-1]}."
            )
        found.update(fitting)
    return found
