"""What the layouts of GPUs have in common: the short way to the library."""

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from macko_llm.layouts.layout import Layout, modes_counter, wants_gradient


class Plan(Protocol):
    """What the short way asks of a layout's plan."""

    @property
    def cols(self) -> int:
        """Of the dense matrix."""


class GpuLayout(Layout):
    """A layout whose arrays lie in one buffer on a GPU.

    Attributes:
        data: the buffer, uint8.
        plan: what its bytes mean.
    """

    data: Tensor
    plan: Plan

    @property
    @abstractmethod
    def rows(self) -> int:
        """Of the dense matrix."""

    @abstractmethod
    def _fill(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """The library's product of a few tokens, where `_is_plain` holds: x [..., cols], y [..., rows]."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See Layout."""
        if self._is_plain(x, bias):
            y = x.new_empty((*x.shape[:-1], self.rows))
            self._fill(x, bias, y)
            return y
        return super().linear(x, bias)

    def _is_plain(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the library can be called at once, past torch's dispatch of an op, which takes longer than all else here."""
        data, cols = self.data, self.plan.cols
        return (
            type(x) is Tensor
            and type(data) is Tensor
            and not torch.compiler.is_compiling()
            and x.shape[-1] == cols
            and 0 < x.numel() <= self.few_tokens(x.dtype) * cols
            and x.get_device() == data.get_device()
            and x.is_contiguous()
            and (bias is None or self._is_plain_bias(bias, x.dtype))
            and not wants_gradient(x, bias)
            and not torch.is_autocast_enabled("cuda")
            and not _python_modes()
        )

    def _is_plain_bias(self, bias: Tensor, dtype: torch.dtype) -> bool:
        return (
            bias.dtype is dtype
            and bias.shape == (self.rows,)
            and bias.get_device() == self.data.get_device()
            and bias.is_contiguous()
        )


_python_modes = modes_counter()
