"""What the kernels of a decoded token are held against, in plain torch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm.native_decode import Input

HALVES = [torch.float16, torch.bfloat16]


EPSILON = 1e-5


TRANSFORMS = ["plain", "rms_norm", "silu_gate"]


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=generator.device, generator=generator) * scale).to(dtype)


def make_input(transform: str, weight: Tensor) -> Input:
    return {
        "plain": Input.plain,
        "rms_norm": lambda: Input.rms_norm(weight, EPSILON),
        "silu_gate": Input.silu_gate,
    }[transform]()


def transformed(transform: str, x: Tensor, weight: Tensor) -> Tensor:
    """[tokens, cols], rounded as transformers' Llama rounds: RMSNorm before its weight, silu before the product."""
    if transform == "plain":
        return x
    if transform == "rms_norm":
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        return weight * wide.to(x.dtype)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def x_for(transform: str, generator: torch.Generator, tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    return normal(generator, tokens, cols * (2 if transform == "silu_gate" else 1), dtype=dtype)


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Against float64, within the roundings of the output: of the product, and of its sum with the residual."""
    product = x.double() @ weight.double().t()
    if bias is not None:
        product += bias.double()
    expected = product.to(y.dtype).double()
    if residual is not None:
        expected = (expected + residual.double()).to(y.dtype).double()
    # The float32 sum itself may be off by its rounding; two units of the last place of the larger of product and sum.
    unit = torch.finfo(y.dtype).eps * torch.maximum(product.abs(), expected.abs()).clamp(min=1e-2)
    slack = 1e-6 * (x.double().abs() @ weight.double().abs().t())
    assert ((y.double() - expected).abs() <= 2 * unit + slack).all()


def like(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "device": tensor.device}


def assert_close_units(found: Tensor, expected: Tensor, units: int) -> None:
    unit = torch.finfo(found.dtype).eps * expected.double().abs().clamp(min=torch.finfo(found.dtype).tiny)
    assert ((found.double() - expected.double()).abs() <= units * unit + 1e-7).all()


def zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16, device=device)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[..., head_dim] 16-bit, each product and the sum rounded."""
    low, high = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-high, low), dim=-1) * sines


def normalised(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else transformed("rms_norm", x, weight)
