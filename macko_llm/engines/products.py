"""The products of a decoded token: linear layers with one input, by the fastest way there is for what they hold."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from macko_llm import native_decode
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.tiled import TiledGroup
from macko_llm.linear import MackoLinear, group_of
from macko_llm.native_decode import Dense, Input

Product = Callable[[Tensor, Tensor, "Tensor | None"], None]
"""(x [texts, cols] or what the transform reads, y [texts, rows], residual [texts, rows] or None): fills y, which may be the
residual. The rows are those of all layers, one layer's behind the other's."""


def make_product(layers: Sequence[nn.Module], transform: Input, texts: int, dtype: torch.dtype) -> Product:
    """Y = transform(x) Wᵀ + bias + residual for layers with one input, whose weights must stay where they are.

    One kernel does it where it can: a packed group or a lone packed matrix for a few texts, dense matrices for one, the
    transform inside if there is one text and no tiles. Otherwise the transform is a kernel of its own; and the layers, if
    they are no group or the texts many, multiply each in its layout.

    Args:
        layers: linear ones, dense or packed.
        transform: what becomes of x.
        texts: rows of x.
        dtype: of x, y and the residual.
    """
    dense = _dense(layers, dtype) if texts == 1 else None
    if dense is not None:
        return lambda x, y, residual: native_decode.dense_gemv(dense, x, transform, residual, y)
    packed = _packed(layers, texts, dtype)
    bias = _joined_bias(layers, dtype)
    if isinstance(packed, SlicedMatrix) and texts == 1:
        return lambda x, y, residual: native_decode.sliced_spmv(packed, x, transform, bias, residual, y)
    plain = Input.plain()

    def multiply(x: Tensor, y: Tensor, residual: Tensor | None) -> None:
        if isinstance(packed, SlicedMatrix):
            native_decode.sliced_spmv(packed, x, plain, bias, residual, y)
        elif packed is not None:
            packed.multiply(x, bias, residual, y)
        else:
            _multiply_with_modules(layers, x, y, residual)

    if transform.is_plain:
        return multiply
    transformed = torch.empty(texts, _cols(layers), dtype=dtype, device=_device(layers))

    def transform_and_multiply(x: Tensor, y: Tensor, residual: Tensor | None) -> None:
        native_decode.apply_transform(transform, x, transformed)
        multiply(transformed, y, residual)

    return transform_and_multiply


def _multiply_with_modules(layers: Sequence[nn.Module], x: Tensor, y: Tensor, residual: Tensor | None) -> None:
    first = layers[0]
    if residual is not None and len(layers) == 1 and type(first) is nn.Linear and first.bias is None:
        torch.addmm(residual, x, first.weight.t(), out=y)
        return
    product = first(x) if len(layers) == 1 else torch.cat([layer(x) for layer in layers], dim=-1)
    if residual is None:
        y.copy_(product)
    else:
        torch.add(product, residual, out=y)


def _packed(layers: Sequence[nn.Module], texts: int, dtype: torch.dtype) -> SlicedMatrix | TiledGroup | None:
    """The layers as one packed matrix for so many texts, if their weights are one and of x's dtype, as are the biases."""
    packed = [layer for layer in layers if isinstance(layer, MackoLinear)]
    if len(packed) < len(layers) or not _biases_are(layers, dtype):
        return None
    matrix = group_of(packed)
    return matrix if matrix is not None and matrix.dtype == dtype and texts <= matrix.few_tokens(dtype) else None


def _dense(layers: Sequence[nn.Module], dtype: torch.dtype) -> Dense | None:
    """The layers as dense matrices for one kernel, if they are plain ones of x's dtype."""
    weights = [layer.weight for layer in layers if type(layer) is nn.Linear]
    if len(weights) < len(layers) or len(weights) > native_decode.DENSE_PARTS or not _biases_are(layers, dtype):
        return None
    if any(weight.dtype != dtype or not weight.is_contiguous() or weight.shape[1] % 8 for weight in weights):
        return None
    return Dense.of(weights, [layer.bias for layer in layers])  # type: ignore[misc]


def _biases_are(layers: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    return all(layer.bias is None or layer.bias.dtype == dtype for layer in layers)


def _joined_bias(layers: Sequence[nn.Module], dtype: torch.dtype) -> Tensor | None:
    """[all rows], zero for the layers without a bias; None if none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    device = _device(layers)
    parts: list[Tensor] = []
    for layer in layers:
        none = torch.zeros(layer.out_features, dtype=dtype, device=device)  # type: ignore[call-overload]
        parts.append(none if layer.bias is None else layer.bias)  # type: ignore[arg-type]
    return torch.cat(parts)


def _device(layers: Sequence[nn.Module]) -> torch.device:
    return next(iter((*layers[0].parameters(), *layers[0].buffers()))).device


def _cols(layers: Sequence[nn.Module]) -> int:
    return layers[0].in_features  # type: ignore[return-value]
