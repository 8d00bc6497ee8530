"""A linear layer whose weight is a packed matrix."""

import torch
from torch import Tensor, nn

from macko_llm import ops
from macko_llm.format import ENTRY_ALIGNMENT, MackoMatrix

ARRAY_NAMES = ("weight_values", "weight_deltas", "weight_row_offsets")
"""What a packed layer stores in place of `weight`, in checkpoints and in `state_dict()`; see docs/format.md."""


class MackoLinear(nn.Module):
    """y = x Wᵀ + b like `nn.Linear`, with W in the MACKO format.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        padded: length of the values array, a multiple of 8.
        bias: whether the layer has one.
        dtype: of the values and the bias, float16 or bfloat16.
        device: "meta" makes a placeholder that a checkpoint fills.
    """

    weight_values: Tensor
    weight_deltas: Tensor
    weight_row_offsets: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        padded: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if padded % ENTRY_ALIGNMENT:
            raise ValueError(f"padded is {padded}, not a multiple of {ENTRY_ALIGNMENT}")
        self.in_features = in_features
        self.out_features = out_features
        # Parameters rather than buffers, so that accelerate moves and offloads them like any weight.
        self.weight_values = _constant(torch.zeros(padded, dtype=dtype, device=device))
        self.weight_deltas = _constant(torch.zeros(padded // 2, dtype=torch.uint8, device=device))
        self.weight_row_offsets = _constant(torch.zeros(out_features + 1, dtype=torch.int32, device=device))
        self.bias = _constant(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_matrix(cls, matrix: MackoMatrix, bias: Tensor | None = None) -> "MackoLinear":
        """A layer around a valid matrix, and a bias [rows] of the same dtype or float32."""
        rows, cols = matrix.shape
        layer = cls(cols, rows, len(matrix.values), bias=bias is not None, dtype=matrix.values.dtype, device="meta")
        layer.weight_values = _constant(matrix.values)
        layer.weight_deltas = _constant(matrix.deltas)
        layer.weight_row_offsets = _constant(matrix.row_offsets)
        if bias is not None:
            layer.bias = _constant(bias)
        return layer

    @property
    def matrix(self) -> MackoMatrix:
        """The packed weight; shares memory with the layer."""
        shape = (self.out_features, self.in_features)
        return MackoMatrix(self.weight_values, self.weight_deltas, self.weight_row_offsets, shape)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], of x's dtype: the values' dtype or float32."""
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.linear(x, self.matrix, bias)

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer."""
        entries = self.weight_values.numel()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, entries={entries}, "
            f"dtype={self.weight_values.dtype}, bias={self.bias is not None}"
        )


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
