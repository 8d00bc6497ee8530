"""Loading a model in several processes, of which each keeps its slices of the matrices.

Which matrix is sliced how is transformers' plan of the model. "colwise" keeps rows of a matrix, and with them some heads of
an attention or some neurons of an MLP; "rowwise" keeps the columns that read those, and what comes out is summed over all
processes. Two more styles are of layers whose input and output are whole everywhere. All else every process has.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import checkpoint, models
from macko_llm.defaults import LAYOUT, TOKENS_AT_A_TIME
from macko_llm.errors import UsageError
from macko_llm.format import MackoMatrix
from macko_llm.gaps import Gap, find_gaps, move_buffers
from macko_llm.linear import MackoLinear, arrange_group
from macko_llm.loading import hold_bfloat16
from macko_llm.ranks import GatheredLinear, Place, SummedLinear
from macko_llm.refusals import check_layout, check_shares
from macko_llm.slicing import slice_columns, slice_rows
from macko_llm.streaming import TensorReader, wait
from macko_llm.transformers_integration import MackoConfig, layer_groups

_ROWS, _COLUMNS = "colwise", "rowwise"
_OF_ROWS = (_ROWS, "colwise_gather_output", "colwise_rep")
_OF_COLUMNS = (_COLUMNS, "rowwise_split_input", "rowwise_rep")
_WHOLE = ("embedding_rowwise", "embedding_colwise", "replicated_with_grad_allreduce", "mla_kv_a_proj", "replicate")
"""Styles of modules that give the same where every process has all of them."""


def load_slices(
    path: str | Path,
    place: Place,
    device: torch.device,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    layout: str = LAYOUT,
    tokens: int = TOKENS_AT_A_TIME,
) -> PreTrainedModel:
    """Load a process's part of a causal language model, dense or packed; `loading.load` says more of arguments and errors.

    Beside its slices, a process has one whole matrix at a time in memory.

    Args:
        path: a folder or a hub id.
        place: of this process, which is joined to the others (`ranks.joined`) when the model is called.
        device: of this process, the CPU or a GPU.
        dtype: as in `loading.load`.
        trust_remote_code: as in `loading.load`.
        layout: as in `loading.load`.
        tokens: as in `loading.load`.

    Raises:
        CheckpointError: as `loading.load`.
        UsageError: as `loading.load`, and where so many processes cannot share this model, or no several can.
    """
    folder = checkpoint.locate(path)
    check_layout(layout, device.type)
    stored_as = checkpoint.quantization_method(folder)
    if stored_as not in (None, checkpoint.QUANT_METHOD):
        raise UsageError(f"{folder} is quantized with {stored_as}, which cannot be sliced; use one process.")
    held = MackoConfig(layout=layout, tokens=tokens) if stored_as == checkpoint.QUANT_METHOD else None
    model = models.load_empty(folder, dtype=dtype, trust_remote_code=trust_remote_code, quantization_config=held)
    styles = _styles(model, place.size)
    if device.type == "cpu" and dtype == "bfloat16":
        hold_bfloat16(model)
    gaps = find_gaps(model, folder)
    if gaps is None:
        raise UsageError(f"The tensors of {folder} are not named as in the model, and are not sliced; use one process.")
    with models.plain_errors(folder, device), torch.no_grad(), TensorReader(device) as reader:
        move_buffers(model, device)
        _fill(model, styles, place, _Source(gaps, device, reader))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # where the whole matrices were
    return model


def _styles(model: PreTrainedModel, processes: int) -> dict[str, str]:
    """The linear layers that are sliced, by name, and how.

    Raises:
        UsageError: some cannot be.
    """
    kind, plan = type(model).__name__, model.tp_plan
    if not plan:
        raise UsageError(f"transformers has no plan by which processes share a {kind}; use one process.")
    config = model.config.get_text_config(decoder=True)
    counts = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    styles = {}
    for name, thing in (*model.named_modules(), *model.named_parameters()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or style in _WHOLE:
            continue
        linear: Any = thing if isinstance(thing, MackoLinear) or models.is_plain_linear(thing) else None
        if linear is None or style not in (*_OF_ROWS, *_OF_COLUMNS):
            raise UsageError(f"{name} of a {kind} would be shared as {style}, which is not supported; use one process.")
        count = linear.out_features if style in _OF_ROWS else linear.in_features
        if style in (_ROWS, _COLUMNS):
            counts.append(count)
        elif count % processes:
            continue  # its input and output are whole, so it may be, too
        styles[name] = style
    check_shares(processes, counts)
    return styles


class _Source:
    """The tensors of a checkpoint, each read when a module that lacks it is filled."""

    def __init__(self, gaps: dict[str, Gap], device: torch.device, reader: TensorReader) -> None:
        self._gaps = {(id(module), name): gap for gap in gaps.values() for module, name in gap.places}
        self._device = device
        self._reader = reader

    def fill(self, module: nn.Module) -> None:
        """Read what a module itself lacks; a tied weight comes to all who hold it."""
        for name in (*module._parameters, *module._buffers):
            gap = self._gaps.get((id(module), name))
            if gap is None:
                continue
            for owner, own_name in gap.places:
                del self._gaps[id(owner), own_name]
            wait(gap.close(torch.empty_like(gap.empty, device=self._device), self._reader))


def _fill(model: PreTrainedModel, styles: dict[str, str], place: Place, source: _Source) -> None:
    """Close all gaps; what is to be sliced gives way to its slice as soon as it has been read."""
    for group in layer_groups(model):
        parts: list[MackoLinear] = []
        for name, layer in group.items():
            source.fill(layer)
            layer.validate(name)
            parts.append(_put_slice(model, name, styles[name], place) if name in styles else layer)
        arrange_group(parts)
    later = [name for name in styles if isinstance(model.get_submodule(name), nn.Linear)]
    to_slice = {id(model.get_submodule(name)) for name in later}
    for module in model.modules():
        if id(module) not in to_slice:
            source.fill(module)
    for name in later:  # a tied head after its embeddings, of which it is a view
        source.fill(model.get_submodule(name))
        _put_slice(model, name, styles[name], place)


def _put_slice(model: PreTrainedModel, name: str, style: str, place: Place) -> Any:
    """Put what a process computes of a linear layer into the layer's place; the slice itself. The layer loses its weights."""
    linear: Any = model.get_submodule(name)
    if style in _OF_ROWS:
        rows = place.share(linear.out_features)
        bias = None if linear.bias is None else linear.bias[rows].clone()
        if isinstance(linear, MackoLinear):
            part: nn.Module = _packed(linear, slice_rows(linear.matrix, rows.start, rows.stop), bias)
        else:
            tied = linear.weight is getattr(model.get_input_embeddings(), "weight", None)
            part = _dense(linear.weight[rows] if tied else linear.weight[rows].clone(), bias)
        module = part if style == _ROWS else GatheredLinear(part)
    else:
        columns = place.share(linear.in_features)
        if isinstance(linear, MackoLinear):
            part = _packed(linear, slice_columns(linear.matrix, columns.start, columns.stop), None)
        else:
            part = _dense(linear.weight[:, columns].clone(memory_format=torch.contiguous_format), None)
        module = SummedLinear(part, linear.bias, None if style == _COLUMNS else columns)
    model.set_submodule(name, module)
    for parameter in linear._parameters:  # others name the layer still: its group, the gaps that it had
        linear._parameters[parameter] = None
    return part


def _packed(whole: MackoLinear, matrix: MackoMatrix, bias: Tensor | None) -> MackoLinear:
    part = MackoLinear.from_matrix(matrix, bias)
    part.layout, part.tokens = whole.layout, whole.tokens
    return part


def _dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, cols = weight.shape
    part = nn.Linear(cols, rows, bias=False, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    part.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return part
