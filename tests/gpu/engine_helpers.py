"""Models that the engines of a GPU decode, and whether the texts that come out are greedy."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RepetitionPenaltyLogitsProcessor,
)

from macko_llm import models
from macko_llm.engines.fixed import FixedEngine
from macko_llm.engines.fused_step import FusedStep
from macko_llm.layouts import canonical
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.linear import MackoLinear, arrange_group, group_of
from macko_llm.pruning.scores import lowest, magnitude_scores
from macko_llm.sampling import GREEDY, Sampling

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 1024,  # rows long enough for the sliced layout
    "intermediate_size": 2056,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, every head its own keys, biases": lambda: LlamaConfig(
        **{**SIZES, "num_key_value_heads": 8}, attention_bias=True, mlp_bias=True
    ),
    "llama, eight heads to one key": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "llama, tied": lambda: LlamaConfig(
        **{**SIZES, "num_attention_heads": 32, "num_key_value_heads": 8}, tie_word_embeddings=True
    ),
    "mistral": lambda: MistralConfig(
        **{**SIZES, "num_attention_heads": 64, "num_key_value_heads": 16}, sliding_window=9
    ),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128),
}


PROMPTS = [[7, 8, 9, 10, 11], list(range(40, 80)), [5]]


@torch.no_grad()
def pack(model: PreTrainedModel) -> list[SlicedMatrix | None]:
    """Replace the linears of the blocks, pruned by magnitude to a half, with packed layers in groups; the groups."""
    groups = []
    linears = models.prunable_linears(model)
    for names in models.in_groups(linears, model):
        layers = []
        for name in names:
            weight = linears[name].weight.detach()
            weight = weight.masked_fill(lowest(magnitude_scores(weight), weight.shape[1] // 2), 0)
            weight = weight.half() if weight.dtype == torch.float32 else weight
            bias = linears[name].bias
            layers.append(MackoLinear.from_matrix(canonical.pack(weight), None if bias is None else bias.detach()))
            model.set_submodule(name, layers[-1])
        arrange_group(layers)
        groups.append(group_of(layers))
    return groups


def run(engine: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """[batch][new] tokens; what was returned must stay as it was until the end."""
    tokens = [engine.prefill(prompts)]
    while len(tokens) < new:
        tokens.append(engine.decode(tokens[-1]))
    return torch.stack(tokens, dim=1).tolist()


def fused(model: PreTrainedModel, most: int = 400, sampling: Sampling = GREEDY, **options: Any) -> FixedEngine:
    return FixedEngine(model, max_tokens=most, sampling=sampling, kinds=[FusedStep], **options)


TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 2.5e-1, torch.float32: 1e-3}
"""By how much a chosen token's logit may lie below the largest: what roundings in another order change in logits around 10."""


@torch.inference_mode()
def share_of_best(
    model: PreTrainedModel, prompt: Sequence[int], generated: Sequence[int], penalty: float = 1.0
) -> float:
    """Assert that every generated token was the most probable one, or tied with it; the share of those that were it.

    The reference is one eager forward over prompt and text, which computes every position at once, and transformers'
    repetition penalty.
    """
    ids = torch.tensor([[*prompt, *generated]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    penalize = RepetitionPenaltyLogitsProcessor(penalty)
    logits = torch.cat([penalize(ids[:, : len(prompt) + i], row[None]) for i, row in enumerate(logits)])
    tokens = ids[0, len(prompt) :]
    best = logits.max(dim=-1)
    short = best.values - logits.gather(1, tokens[:, None])[:, 0]
    assert short.max() <= TOLERANCE[model.dtype], f"token {int(short.argmax())} is {short.max():.3f} below the best"
    return float((best.indices == tokens).float().mean())


@torch.no_grad()
def make(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, *, packed: bool
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random model, and the same weights dense in float32."""
    with torch.random.fork_rng(devices=[device]), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.mul_(1 + torch.rand_like(parameter)).add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.1 if parameter.ndim == 1 else 0.04)
    model = model.eval().to(dtype)
    twin = copy.deepcopy(model).float()
    twin.set_attn_implementation("eager")
    if packed:
        assert any(group is not None for group in pack(model)), "the decoder would multiply layer by layer"
        for name, layer in model.named_modules():
            if isinstance(layer, MackoLinear):
                twin.get_submodule(name).weight.copy_(canonical.unpack(layer.matrix))
    return model, twin


def llama(device: torch.device, *, packed: bool = True) -> PreTrainedModel:
    return make(LlamaConfig(**SIZES), torch.float16, device, packed=packed)[0]


def random_texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 320, (length,), generator=generator).tolist() for length in lengths]
