"""The models that a decode benchmark runs: dense and packed ones, from a name alone or from a checkpoint.

What is built replaces its layers one at a time, so that a packed model never needs the memory of the dense one on top.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from macko_llm import checkpoint, models
from macko_llm.benchmarks.shapes import shape_config
from macko_llm.benchmarks.weights import random_pruned
from macko_llm.defaults import TOKENS_AT_A_TIME
from macko_llm.dtypes import VALUE_DTYPES, dtype_name
from macko_llm.errors import UsageError
from macko_llm.layouts import canonical
from macko_llm.linear import MackoLinear, arrange_group
from macko_llm.loading import load
from macko_llm.pruning.scores import lowest, magnitude_scores, removed_per_row
from macko_llm.refusals import check_subject

STD = 0.02
"""Of random weights: logits stay finite through any number of blocks."""
SPARSITY = 0.5
"""Packed where none is asked for."""

Weights = Callable[[nn.Linear], Tensor]
"""The weight that a layer shall have, [rows, cols] on the device."""


class Subject(ABC):
    """One model to measure, built anew for each row.

    Args:
        name: of the shape or the checkpoint.
        skeleton: the model on the meta device.
        sparsities: of the packed rows; None is the sparsity that the checkpoint has.
    """

    def __init__(self, name: str, skeleton: PreTrainedModel, sparsities: Sequence[float | None]) -> None:
        self.name, self.skeleton, self.sparsities = name, skeleton, sparsities

    @property
    def linear_weights(self) -> int:
        """Weights of the dense linears that a token passes: those of the blocks and the output's."""
        linears = [*models.prunable_linears(self.skeleton).values(), self.skeleton.get_output_embeddings()]
        return sum(linear.weight.numel() for linear in linears)

    @abstractmethod
    def dense(self) -> PreTrainedModel:
        """The model with dense layers."""

    @abstractmethod
    def packed(self, sparsity: float | None, tokens: int = TOKENS_AT_A_TIME) -> PreTrainedModel:
        """The model with packed layers, at one of `sparsities`, arranged for so many tokens at a time."""


class RandomShape(Subject):
    """A shape with normal weights of STD: speed and memory do not depend on the values."""

    def __init__(
        self, name: str, config: PretrainedConfig, sparsities: Sequence[float], dtype: torch.dtype, device: torch.device
    ) -> None:
        require_packable(dtype)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        super().__init__(name, skeleton, sparsities or (SPARSITY,))
        self._dtype, self._device = dtype, device

    def dense(self) -> PreTrainedModel:
        """See Subject."""
        model, generator = self._surroundings()
        for linear in models.prunable_linears(model).values():
            linear.weight = _constant(self._weight(linear, 0, generator))
        return model

    def packed(self, sparsity: float | None, tokens: int = TOKENS_AT_A_TIME) -> PreTrainedModel:
        """See Subject; every row of a weight has exactly int(cols * sparsity) zeros, at random places."""
        model, generator = self._surroundings()
        pack_linears(model, partial(self._weight, sparsity=sparsity or 0, generator=generator), tokens)
        return model

    def _surroundings(self) -> tuple[PreTrainedModel, torch.Generator]:
        """The model on the device, all but the weights of the blocks' linears, and the state of the draw."""
        generator = torch.Generator(self._device).manual_seed(0)
        # Buffers are computed, not loaded, so they must be real: the angles of RoPE.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.skeleton.config, dtype=self._dtype)
        later = {f"{name}.weight" for name in models.prunable_linears(model)}
        for name, parameter in list(model.named_parameters()):
            if name not in later:
                _set(model, name, _constant(random_parameter(name, parameter.shape, parameter.dtype, generator)))
        for name, buffer in list(model.named_buffers()):
            _set(model, name, buffer.to(self._device))
        model.tie_weights()
        return model.eval(), generator

    def _weight(self, linear: nn.Linear, sparsity: float, generator: torch.Generator) -> Tensor:
        return random_pruned((linear.out_features, linear.in_features), sparsity, self._dtype, generator, std=STD)


class DenseCheckpoint(Subject):
    """A dense model; it is pruned in memory by magnitude, and only at the sparsities that were asked for."""

    def __init__(self, folder: Path, sparsities: Sequence[float], dtype: str, device: torch.device) -> None:
        super().__init__(folder.name, models.skeleton(folder), sparsities)
        self._load = partial(load, folder, dtype=dtype, device=str(device))

    def dense(self) -> PreTrainedModel:
        """See Subject."""
        return self._load()

    def packed(self, sparsity: float | None, tokens: int = TOKENS_AT_A_TIME) -> PreTrainedModel:
        """See Subject; the smallest int(cols * sparsity) weights of every row are gone."""
        model = self._load()
        require_packable(model.dtype)
        pack_linears(model, partial(_pruned_by_magnitude, sparsity=sparsity or 0), tokens)
        return model


class PackedCheckpoint(Subject):
    """A packed model, and the dense one that it unpacks to."""

    def __init__(self, folder: Path, dtype: str, device: torch.device) -> None:
        super().__init__(folder.name, models.skeleton(folder), (None,))
        self._load = partial(load, folder, dtype=dtype, device=str(device))

    def dense(self) -> PreTrainedModel:
        """See Subject."""
        model = self._load()
        for name, layer in packed_layers(model):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = _constant(canonical.unpack(layer.matrix).to(model.dtype))
            linear.register_parameter("bias", None if layer.bias is None else _constant(layer.bias))
            model.set_submodule(name, linear)
        return model

    def packed(self, sparsity: float | None, tokens: int = TOKENS_AT_A_TIME) -> PreTrainedModel:
        """See Subject."""
        del sparsity  # the checkpoint's own
        return self._load(tokens=tokens)


def make_subject(
    model: str | None,
    config: str | None,
    *,
    sparsities: Sequence[float],
    random_weights: bool,
    dtype: str,
    device: torch.device,
) -> Subject:
    """What `macko bench decode` was asked to run.

    Args:
        model: a folder or hub id, dense or packed.
        config: name of a shape, in place of a model; its weights are random.
        sparsities: of the packed rows.
        random_weights: take only the shape of the model.
        dtype: "auto" is the checkpoint's, and float16 for random weights.
        device: where it shall run.

    Raises:
        UsageError: not exactly one of model and config, sparsities for a model that is packed, an impossible dtype.
        CheckpointError: the model is not usable.
    """
    folder = check_subject(model, config, sparsities, random_weights)
    resolved = models.resolve_dtype(dtype)
    random_dtype = torch.float16 if isinstance(resolved, str) else resolved
    if folder is None:
        assert config is not None  # one of the two is there
        return RandomShape(config, shape_config(config), sparsities, random_dtype, device)
    if random_weights:
        return RandomShape(folder.name, models.skeleton(folder).config, sparsities, random_dtype, device)
    if not checkpoint.is_packed(folder):
        return DenseCheckpoint(folder, sparsities, dtype, device)
    return PackedCheckpoint(folder, dtype, device)


def require_packable(dtype: torch.dtype) -> None:
    """Refuse a dtype whose values the format does not hold.

    Raises:
        UsageError: it is neither float16 nor bfloat16.
    """
    if dtype not in VALUE_DTYPES.values():
        raise UsageError(f"Weights in {dtype_name(dtype)} cannot be packed; use --dtype float16 or bfloat16.")


def pack_linears(model: PreTrainedModel, weight_of: Weights, tokens: int) -> None:
    """Put packed layers in place of the linears of the blocks, a group at a time, arranged for so many tokens at a time."""
    for group in _groups(model):
        layers = []
        for name, linear in group.items():
            layer = MackoLinear.from_matrix(canonical.pack(weight_of(linear)), linear.bias)
            layer.tokens = tokens
            model.set_submodule(name, layer)
            layers.append(layer)
        arrange_group(layers)


def _groups(model: PreTrainedModel) -> list[dict[str, nn.Linear]]:
    """The linears of the blocks by name, those together that are laid out together."""
    linears = models.prunable_linears(model)
    return [{name: linears[name] for name in names} for names in models.in_groups(linears, model)]


def packed_layers(model: nn.Module) -> Iterator[tuple[str, MackoLinear]]:
    """The packed layers by name."""
    yield from [(name, module) for name, module in model.named_modules() if isinstance(module, MackoLinear)]


def packed_sparsity(model: nn.Module) -> float:
    """The share of zeros in the packed layers; 0 where there are none."""
    layers = [layer for _, layer in packed_layers(model)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    nonzero = sum(int(layer.matrix.values.count_nonzero()) for layer in layers)
    return 1 - nonzero / weights if layers else 0.0


def _pruned_by_magnitude(linear: nn.Linear, sparsity: float) -> Tensor:
    weight = linear.weight.detach()
    removed = lowest(magnitude_scores(weight), removed_per_row(weight.shape[1], sparsity, None))
    return weight.masked_fill(removed, 0)


def random_parameter(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A parameter of a random model, on the generator's device: matrices are normal with STD."""
    value = torch.empty(shape, dtype=dtype, device=generator.device)
    if value.ndim > 1:
        return value.normal_(std=STD, generator=generator)
    return value.fill_("norm" in name)  # scales of norms are 1, biases 0


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by its qualified name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
