"""Tiny random models of every family that macko promises to prune, and a tokenizer for them."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 320
MAX_POSITIONS = 64
WINDOW = 8  # of sliding attention: shorter than any sequence in the tests, so that it matters

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_POSITIONS,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = {**_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2}

SENTENCES = [
    "Once upon a time there was a little fox who lived in the wood.",
    "The fox found a red ball, and the ball was bigger than the fox.",
    "Every morning the old owl told her children a story about the sea.",
    "Nobody in the village had seen the sea, but they all liked the story.",
    "In the end the fox, the owl and the children went to the sea together.",
]


def _llama() -> PretrainedConfig:
    return LlamaConfig(**_GROUPED, hidden_size=64, intermediate_size=160)


def _mistral() -> PretrainedConfig:
    return MistralConfig(**_GROUPED, hidden_size=48, head_dim=16, intermediate_size=128, sliding_window=WINDOW)


def _qwen2() -> PretrainedConfig:
    # 172 columns: not a multiple of 8, so no 4:8 here, and no whole number of 16-byte loads in the kernels.
    return Qwen2Config(**_GROUPED, hidden_size=64, intermediate_size=172)


def _qwen3() -> PretrainedConfig:
    return Qwen3Config(**_GROUPED, hidden_size=64, head_dim=24, intermediate_size=128)


def _gemma2() -> PretrainedConfig:
    return Gemma2Config(**_GROUPED, hidden_size=64, head_dim=16, intermediate_size=128, sliding_window=WINDOW)


def _gemma3() -> PretrainedConfig:
    return Gemma3TextConfig(
        **{**_GROUPED, "num_hidden_layers": 3},
        hidden_size=48,
        head_dim=16,
        intermediate_size=128,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def _phi3() -> PretrainedConfig:
    return Phi3Config(**_GROUPED, hidden_size=64, intermediate_size=128)


def _opt() -> PretrainedConfig:
    return OPTConfig(**_COMMON, num_attention_heads=4, hidden_size=64, ffn_dim=128, word_embed_proj_dim=48)


def _gpt_neox() -> PretrainedConfig:
    return GPTNeoXConfig(**_COMMON, num_attention_heads=4, hidden_size=64, intermediate_size=128)


_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32 whose activations are far from uniform, so that Wanda and magnitude disagree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "norm" in name:
                    parameter.mul_(1 + torch.rand_like(parameter)).add_(0.3 * torch.randn_like(parameter))
                elif parameter.ndim == 1:
                    parameter.normal_(std=0.1)
                else:
                    parameter.normal_(std=0.15)
    return model.eval()


def _builder(make_config: Callable[[], PretrainedConfig]) -> Callable[[], PreTrainedModel]:
    return lambda: build(make_config())


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: _builder(make) for name, make in _CONFIGS.items()}


def byte_level_bpe(texts: list[str]) -> Tokenizer:
    """Byte-level BPE trained on some texts: <s> is 0 and </s> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer trained on `SENTENCES`; <s> begins every text."""
    tokenizer = byte_level_bpe(SENTENCES)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=MAX_POSITIONS
    )


def save_model(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write the tiny model of a family, with the tokenizer, as an ordinary checkpoint; the folder."""
    FAMILIES[family]().to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def random_tokens(nsamples: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """int64 [nsamples, seqlen], without the special tokens."""
    return torch.randint(2, VOCABULARY, (nsamples, seqlen), generator=torch.Generator().manual_seed(seed))
