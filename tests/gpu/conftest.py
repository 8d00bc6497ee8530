"""Every test in this folder needs a CUDA GPU and is skipped, saying so, where there is none."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from macko_llm import native
from macko_llm.errors import MackoWarning

# So that their assertions show their values, as those of tests do.
pytest.register_assert_rewrite("sliced_helpers", "tiled_helpers", "decode_helpers", "engine_helpers")


@pytest.fixture(scope="session", autouse=True)
def cuda() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def kernels() -> None:
    """The native library's."""
    if not native.has_cuda():
        pytest.skip("the native library was built without CUDA")


@pytest.fixture(scope="module")
def full_precision_sums() -> Iterator[None]:
    """Dense products of many tokens: without it cuBLAS may add partial sums in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before


@pytest.fixture
def no_fallback() -> Iterator[None]:
    """A step that could not be made would warn, and the eager engine would pass every test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MackoWarning)
        yield


@pytest.fixture(scope="module")
def tensor_cores() -> None:
    """Those that multiply tiles."""
    from tiled_helpers import skip_without_tensor_cores  # only now are its assertions rewritten

    skip_without_tensor_cores()
