"""Which linear layers a recipe prunes."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from macko_llm import models
from macko_llm.errors import UsageError
from macko_llm.recipe import REGEX_PREFIX, PruneRecipe


def chosen_linears(model: PreTrainedModel, recipe: PruneRecipe) -> dict[str, nn.Linear]:
    """The linears to prune, qualified name -> module, one for each weight: where several share it, the first.

    A weight is left alone where any linear that has it is to be left alone.

    Raises:
        CheckpointError: blocks of an unsupported kind.
        UsageError: a pattern that fits no linear layer, or nothing is left to prune.
    """
    linears = models.prunable_linears(model)
    everywhere = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targeted = fitting(recipe.targets, linears, "targets") if recipe.targets else set(linears)
    # An lm_head is never pruned, but to say so in a recipe is no mistake.
    ignored = fitting(recipe.ignore, everywhere, "ignore")
    kept = {id(linear.weight) for name, linear in linears.items() if name in ignored or name not in targeted}
    distinct: dict[int, tuple[str, nn.Linear]] = {}
    for name, linear in linears.items():
        if id(linear.weight) not in kept:
            distinct.setdefault(id(linear.weight), (name, linear))
    if not distinct:
        raise UsageError("The recipe leaves every layer alone; give other targets, or ignore fewer layers.")
    return dict(distinct.values())


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
