"""How precise the logits of a decoded token are: held against float32, beside the model's own forward in 16 bits."""

from collections.abc import Callable

import pytest
import torch
from engine_helpers import CONFIGS, SIZES, fused, llama, make, random_texts, run
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from macko_llm.engine import make_engine
from macko_llm.engines.decoder import why_not
from macko_llm.engines.eager import EagerEngine
from macko_llm.engines.fixed import FixedEngine
from macko_llm.engines.fused_step import FusedStep
from macko_llm.sampling import GREEDY

pytestmark = pytest.mark.usefixtures("kernels", "no_fallback")

_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}


_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 64}


MORE_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama, heads narrower than their share": lambda: LlamaConfig(**SIZES, head_dim=64),
    "qwen3, three heads of 256 to one key": lambda: Qwen3Config(**{**SIZES, "num_attention_heads": 6}, head_dim=256),
    "llama, linear rotations": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama, rotations of llama3": lambda: LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **_ROPE,
        },
    ),
    "llama, rotations of yarn": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, **_ROPE}
    ),
    "mistral, no window": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2, a window from the second block on": lambda: Qwen2Config(**SIZES, **_WINDOWS),
    "qwen3, narrow heads, windows, biases": lambda: Qwen3Config(**SIZES, **_WINDOWS, head_dim=32, attention_bias=True),
}


def fed_logits(engine: FixedEngine, texts: list[list[int]], steps: int) -> tuple[Tensor, list[int]]:
    """[batch, steps, vocabulary] of a step that is fed the ends of texts; the capacities of its caches on the way."""
    engine.prefill([text[:-steps] for text in texts])
    rows, capacities = [], []
    for step in range(steps):
        engine.decode(torch.tensor([text[step - steps] for text in texts], device=engine.device))
        assert isinstance(engine._step, FusedStep)
        rows.append(engine._step._decoder.logits.clone())
        capacities.append(engine._step.capacity)
    return torch.stack(rows, dim=1), capacities


@torch.inference_mode()
def read_logits(model: PreTrainedModel, texts: list[list[int]], steps: int) -> Tensor:
    """The same by one forward of the model over each text."""
    rows = [model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits[0] for text in texts]
    return torch.stack([row[-steps:] for row in rows])


def deviation(logits: Tensor, exact: Tensor) -> float:
    return float((logits.double() - exact.double()).norm() / exact.double().norm())


def assert_precise(model: PreTrainedModel, twin: PreTrainedModel, texts: list[list[int]], steps: int) -> FixedEngine:
    """The kernels are off by no more than the model's own forward in 16 bits is, measured at the same in float32."""
    assert why_not(model) is None
    engine = fused(model, most=max(map(len, texts)) + 1, bucket=32)
    found, _ = fed_logits(engine, texts, steps)
    exact = read_logits(twin, texts, steps)
    own = deviation(read_logits(model, texts, steps), exact)
    assert 0 < deviation(found, exact) < 1.5 * own
    assert own < (0.02 if model.dtype == torch.float16 else 0.16), "a model this rough proves nothing"
    return engine


@pytest.mark.parametrize(
    ("dtype", "packed"), [(torch.float16, True), (torch.bfloat16, False)], ids=["fp16-packed", "bf16-dense"]
)
@pytest.mark.parametrize("name", [*CONFIGS, *MORE_CONFIGS])
def test_logits_are_as_precise_as_the_models_own(
    cuda: torch.device, name: str, dtype: torch.dtype, packed: bool
) -> None:
    """One text, and three of different lengths at once; over a cache that grows and windows that end."""
    model, twin = make({**CONFIGS, **MORE_CONFIGS}[name](), dtype, cuda, packed=packed)
    for lengths in ([45], [25, 64, 21]):
        assert_precise(model, twin, random_texts(*lengths), 20)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("batch", [2, 4, 5, 12, 13])
def test_logits_of_every_size_of_batch(cuda: torch.device, batch: int, packed: bool) -> None:
    model, twin = make(LlamaConfig(**SIZES, attention_bias=True), torch.float16, cuda, packed=packed)
    assert_precise(model, twin, random_texts(*range(12, 12 + batch)), 10)


@pytest.mark.parametrize("name", ["llama", "qwen2, a window from the second block on"])
def test_logits_far_into_a_text(cuda: torch.device, name: str) -> None:
    """Where several blocks share the slots of a head, for two texts of which one begins late."""
    model, twin = make({**CONFIGS, **MORE_CONFIGS}[name](), torch.float16, cuda, packed=True)
    engine = assert_precise(model, twin, random_texts(1100, 700), 100)
    assert engine._step._decoder._splits > 1  # type: ignore[union-attr]


def test_a_cache_that_grows_changes_no_logit(cuda: torch.device) -> None:
    """Bit for bit, in caches so short that one block has all slots of a head."""
    model = llama(cuda)
    for lengths, steps, grown in (([60], 55, {8, 16, 32, 64}), ([32, 50, 40], 30, {32, 64})):
        texts = random_texts(*lengths)
        small, capacities = fed_logits(fused(model, most=64, bucket=8), texts, steps)
        assert set(capacities) == grown
        large, capacities = fed_logits(fused(model, most=400, bucket=256), texts, steps)
        assert set(capacities) == {256}
        assert torch.equal(small, large)


def test_a_window_that_llama_does_not_have(cuda: torch.device) -> None:
    """A Llama's config may name one, and then transformers' cache forgets what is outside, though its mask shows it."""
    model, _ = make(LlamaConfig(**SIZES, sliding_window=9), torch.float16, cuda, packed=False)
    prompts = random_texts(*[40] * 32)
    expected = run(EagerEngine(model, max_tokens=60, sampling=GREEDY), prompts, 8)
    found = run(make_engine(model, max_tokens=60, sampling=GREEDY), prompts, 8)
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 28  # but for ties
