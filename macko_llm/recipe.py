"""What a pruning run is made of: every setting with its default, in one place, and as a TOML file."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from macko_llm.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHODS = ("wanda", "magnitude", "ria", "sparsegpt")
"""What `pruning.methods.METHODS` has, which cannot be imported without torch."""
WITHOUT_CALIBRATION = ("magnitude",)
"""Those that look at the weights alone."""
NO_UPDATE = "none"
UPDATES = (NO_UPDATE, "admm")
UNIFORM = "uniform"
ALLOCATIONS = (UNIFORM, "owl")
UNSTRUCTURED = "unstructured"
REGEX_PREFIX = "re:"
"""Begins a pattern of layer names that is a regular expression."""


@dataclass(frozen=True)
class PruneRecipe:
    """The settings of one pruning run.

    Attributes:
        method: "wanda" (Sun et al., 2024, arXiv 2306.11695), "magnitude", "ria" (Zhang et al., ICLR 2024) or "sparsegpt"
            (Frantar and Alistarh, 2023, arXiv 2301.00774).
        sparsity: share of the weights of every output row that is removed, in [0, 1); by RIA of the whole matrix, by SparseGPT
            of every 128 columns.
        pattern: "unstructured", or "n:m": the n lowest of every m consecutive columns go. n:m fixes the sparsity to n / m.
        update: "admm" (Boža, 2024, arXiv 2401.02938) gives the weights that the method keeps the values with which the outputs
            of their layer change least; "none" leaves them to the method.
        allocation: "uniform", or "owl" (Yin et al., 2024, arXiv 2310.05175): blocks with more outliers keep more, and as many
            weights go in all. Not with an n:m pattern.
        targets: patterns of the layers to prune (`macko_llm.pruning.selection.fits`); none means every linear of the blocks.
        ignore: patterns of layers to leave dense; they win over `targets`.
        calibration: "c4", "wikitext2", a dataset of the hub, or a path; see `macko_llm.calibration`.
        split: of a dataset; None means "train".
        text_column: of a dataset, or the field of .json, .jsonl and .parquet files; None means "text".
        chat_template: put each document into the tokenizer's chat template; of documents without "text", "messages" is read.
        nsamples: calibration sequences.
        seqlen: tokens in each of them; None means 2048, or the model's longest context where that is shorter.
        seed: of the draw of the calibration sequences.
        dtype: "auto" (the checkpoint's), "float16", "bfloat16" or "float32"; the result is saved in it.
        layers: patterns of layers, as in `targets`, each with the sparsity of the layers that it fits, which neither `sparsity`
            nor `allocation` decides then; of several that fit the last counts, and 0 leaves a layer as it is. One that fits the
            lm_head and no layer of the blocks has it pruned, too, whatever the targets. A mapping, or pairs. Not with an n:m
            pattern.

    Raises:
        UsageError: a value that makes no sense.
    """

    method: str = "wanda"
    sparsity: float = 0.5
    pattern: str = UNSTRUCTURED
    update: str = NO_UPDATE
    allocation: str = UNIFORM
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    calibration: str = "c4"
    split: str | None = None
    text_column: str | None = None
    chat_template: bool = False
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    dtype: str = "auto"
    layers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        _check_types(self)
        if self.method not in METHODS:
            raise UsageError(f"There is no pruning method {self.method!r}; use {one_of(METHODS)}.")
        if self.update not in UPDATES:
            raise UsageError(f"There is no update {self.update!r}; use {one_of(UPDATES)}.")
        if self.allocation not in ALLOCATIONS:
            raise UsageError(f"There is no allocation {self.allocation!r}; use {one_of(ALLOCATIONS)}.")
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"The sparsity {self.sparsity} is outside [0, 1); 0.5 removes half of the weights.")
        if self.nsamples < 1:
            raise UsageError(f"nsamples is {self.nsamples}; calibrate with at least 1 sequence.")
        if self.seqlen is not None and self.seqlen < 1:
            raise UsageError(f"seqlen is {self.seqlen}; a calibration sequence has at least 1 token.")
        if not self.calibration:
            raise UsageError("The calibration source is empty; use c4, wikitext2, a dataset or a path.")
        for pattern in (*self.targets, *self.ignore, *dict(self.layers)):
            _check_layer_pattern(pattern)
        for pattern, share in self.layers:
            if not 0 <= share < 1:
                raise UsageError(
                    f"layers gives {pattern!r} the sparsity {share}, outside [0, 1); 0.5 removes half of the weights."
                )
        for name in ("split", "text_column"):
            if getattr(self, name) == "":
                raise UsageError(f"{name} is empty; name one, or leave it out for the usual one.")
        fixed = _pattern_sparsity(self.pattern)
        if fixed is not None:
            if self.allocation != UNIFORM:
                raise UsageError(
                    f"The pattern {self.pattern} fixes the sparsity of every layer, which {self.allocation} would vary; "
                    f"use the allocation {UNIFORM}, or the pattern {UNSTRUCTURED}."
                )
            if self.layers:
                raise UsageError(
                    f"The pattern {self.pattern} fixes the sparsity of every layer, which layers would vary; "
                    f"leave layers out, or use the pattern {UNSTRUCTURED}."
                )
            if self.sparsity not in (fixed, PruneRecipe.sparsity):
                raise _sparsity_conflict(self.pattern, fixed, self.sparsity)
            object.__setattr__(self, "sparsity", fixed)

    @property
    def group(self) -> tuple[int, int] | None:
        """(n, m) of an n:m pattern, None for an unstructured one."""
        return _parse_pattern(self.pattern)

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is read."""
        return self.method not in WITHOUT_CALIBRATION or self.update != NO_UPDATE or self.allocation != UNIFORM

    @property
    def title(self) -> str:
        """What prunes, in few words: "wanda", "wanda + admm", "wanda + admm, owl"."""
        return title(self.settings())

    def settings(self) -> dict[str, Any]:
        """The settings that say something, by name, as TOML and JSON have them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["layers"] = dict(self.layers) or None
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not False and value not in (None, ())
        }


def one_of(words: tuple[str, ...]) -> str:
    """The words as a sentence has them: "one, two or three"."""
    return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def title(settings: Mapping[str, Any]) -> str:
    """`PruneRecipe.title` of settings as `PruneRecipe.settings` and macko.json have them; without a method it is unknown."""
    words = str(settings.get("method", "an unknown method"))
    if settings.get("update", NO_UPDATE) != NO_UPDATE:
        words += f" + {settings['update']}"
    if settings.get("allocation", UNIFORM) != UNIFORM:
        words += f", {settings['allocation']}"
    return words


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, flat but for the table `layers`, for `make_recipe`.

    Raises:
        UsageError: the file is missing, is not TOML, or names something that is not a setting.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read ({error.strerror}); check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} is not TOML ({error}); write lines such as sparsity = 0.5.") from error
    _check_keys(values, f"The recipe {path}")
    return values


def make_recipe(file_values: Mapping[str, Any], flags: Mapping[str, Any]) -> PruneRecipe:
    """A recipe from a file's settings and the command line's; a flag that is not None overrides the file.

    Raises:
        UsageError: an unknown setting, a value that makes no sense, or an n:m pattern with another sparsity.
    """
    _check_keys(file_values, "The recipe")
    _check_keys(flags, "The call")
    values = {**file_values, **{name: value for name, value in flags.items() if value is not None}}
    recipe = PruneRecipe(**values)
    # Only here is a sparsity of 0.5 that was asked for told from the default of 0.5.
    if values.get("sparsity", recipe.sparsity) != recipe.sparsity:
        raise _sparsity_conflict(recipe.pattern, recipe.sparsity, values["sparsity"])
    return recipe


def to_toml(recipe: PruneRecipe) -> str:
    """The recipe as the TOML that `load_recipe` reads back."""
    settings = recipe.settings()
    table = settings.pop("layers", None)  # what comes after the head of a table belongs to it
    lines = [f"{name} = {_toml_value(value)}\n" for name, value in settings.items()]
    if table:
        lines += [
            "\n[layers]\n",
            *(f"{_toml_value(pattern)} = {_toml_value(share)}\n" for pattern, share in table.items()),
        ]
    return "".join(lines)


def _toml_value(value: str | float | bool | list[str]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for DEL, which JSON leaves bare.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return repr(value)


def _check_types(recipe: PruneRecipe) -> None:
    kinds: dict[str, tuple[type, ...]] = {"sparsity": (float, int), "nsamples": (int,), "seed": (int,)}
    kinds["seqlen"] = (int, type(None))
    for name in ("targets", "ignore"):
        value = getattr(recipe, name)
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
            raise UsageError(f'{name} is {value!r}; it must be a list of layer names, such as ["down_proj"].')
        object.__setattr__(recipe, name, tuple(value))
        kinds[name] = (tuple,)
    kinds["chat_template"] = (bool,)
    object.__setattr__(recipe, "layers", _checked_layers(recipe.layers))
    kinds["layers"] = (tuple,)
    kinds["split"] = kinds["text_column"] = (str, type(None))
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        allowed = kinds.get(field.name, (str,))
        if isinstance(value, bool) != (allowed == (bool,)) or not isinstance(value, allowed):
            raise UsageError(f"{field.name} is {value!r}; it must be of type {allowed[0].__name__}.")
    object.__setattr__(recipe, "sparsity", float(recipe.sparsity))


def _checked_layers(value: Any) -> tuple[tuple[str, float], ...]:
    """Pairs of any origin; a pattern that comes twice counts where it comes last."""
    checked: dict[str, float] = {}
    try:
        for pattern, share in value.items() if isinstance(value, Mapping) else value:
            if not isinstance(pattern, str) or isinstance(share, bool) or not isinstance(share, (float, int)):
                raise ValueError
            checked.pop(pattern, None)
            checked[pattern] = float(share)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'layers is {value!r}; it must be a table of layer names and their sparsities, such as {{"down_proj" = 0.4}}.'
        ) from error
    return tuple(checked.items())


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in fields(PruneRecipe)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise UsageError(f"{where} sets {unknown[0]!r}, which is not a setting; the settings are {', '.join(known)}.")


def _check_layer_pattern(pattern: str) -> None:
    if not pattern:
        raise UsageError("The name of a layer is empty; write for example down_proj.")
    if pattern.startswith(REGEX_PREFIX):
        try:
            re.compile(pattern.removeprefix(REGEX_PREFIX))
        except re.error as error:
            raise UsageError(
                f"{pattern!r} is no regular expression ({error}); write for example {REGEX_PREFIX}.*down_proj."
            ) from error


def _parse_pattern(pattern: str) -> tuple[int, int] | None:
    if pattern == UNSTRUCTURED:
        return None
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern, flags=re.ASCII)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise UsageError(f"There is no pattern {pattern!r}; use {UNSTRUCTURED}, 2:4 or 4:8.")
    return int(match[1]), int(match[2])


def _pattern_sparsity(pattern: str) -> float | None:
    group = _parse_pattern(pattern)
    return None if group is None else group[0] / group[1]


def _sparsity_conflict(pattern: str, fixed: float, asked: float) -> UsageError:
    return UsageError(f"The pattern {pattern} fixes the sparsity to {fixed:g}, not {asked:g}; leave the sparsity out.")
