"""Trains the bundled demo model on generated stories: a Llama of two million weights with its own tokenizer.

    python -m tools.stories.train -o macko_llm/demo/model --device cuda

It exists so that every command can be tried in seconds, offline, on a model that is real: grouped-query attention, tied
embeddings, and so few weights for what it knows that careless pruning shows.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .stories import HELD_OUT_SEED, TRAIN_SEED, stories, story_text

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCAB_SIZE = 2048
MAX_FOLDER_BYTES = 5_600_000
"""The model travels in the wheel."""
_TOKENIZER_STORIES = 20_000
_HELD_OUT_CHARACTERS = 200_000


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides what the trained model is.

    Attributes:
        steps: optimizer steps.
        batch_size: windows in a step.
        seqlen: tokens in a window, and the model's longest context.
        learning_rate: at its peak, after the warmup.
        weight_decay: of matrices; norms have none.
        stories: distinct stories to train on.
        seed: of the initial weights and of the order of the windows; the text does not depend on it.
        compile: use torch.compile.
    """

    steps: int = 7_648
    batch_size: int = 128
    seqlen: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    stories: int = 200_000
    seed: int = 0
    compile: bool = False


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the stories that begins every text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories(TRAIN_SEED, _TOKENIZER_STORIES), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def build_model(options: TrainOptions, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=options.seqlen,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(options.seed)
    return LlamaForCausalLM(config)


def documents(count: int, seed: int = TRAIN_SEED) -> Iterator[str]:
    """So many stories: most alone, some in little anthologies, so that the model also knows the blank line between."""
    source = stories(seed, count)
    rng = random.Random(seed)
    while document := "\n\n".join(itertools.islice(source, rng.choice((1, 1, 1, 1, 1, 4)))):
        yield document


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> tuple[Tensor, Tensor]:
    """BOS + text + EOS, one text after another.

    Returns:
        [tokens] int16 stream, [texts] int64 positions of the BOS tokens.
    """
    eos = tokenizer.eos_token_id
    pieces: list[Tensor] = []
    while batch := list(itertools.islice(texts, 4096)):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch):
            pieces.append(torch.tensor([*encoding.ids, eos], dtype=torch.int16))
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.cat(pieces), lengths.cumsum(0) - lengths


def sample_windows(stream: Tensor, starts: Tensor, options: TrainOptions) -> Tensor:
    """Random windows, half of them from the beginning of a text, as prompts are. [batch_size, seqlen] int64."""
    last = len(stream) - options.seqlen
    anywhere = torch.randint(last, (options.batch_size,), device=stream.device)
    at_bos = starts[torch.randint(len(starts), (options.batch_size,), device=stream.device)].clamp(max=last)
    begin = torch.where(torch.rand(options.batch_size, device=stream.device) < 0.5, at_bos, anywhere)
    return stream[begin[:, None] + torch.arange(options.seqlen, device=stream.device)].long()


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warmup, then a cosine down to a hundredth of the peak."""
    warmup = min(500, options.steps // 10 + 1)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, options.steps - warmup)
    return options.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def loss_of(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    """Mean loss of predicting each token of the windows but the first, under bf16 autocast."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Callable[..., Any], windows: Tensor) -> float:
    """Mean loss over all windows of the held-out text."""
    chunks = windows.split(32)
    return sum(loss_of(model, chunk).item() * len(chunk) for chunk in chunks) / len(windows)


def train(options: TrainOptions, device: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model, printing losses on the way."""
    start = time.perf_counter()
    tokenizer = train_tokenizer()
    stream, starts = token_stream(tokenizer, documents(options.stories))
    held_out = torch.tensor(tokenizer(story_text(HELD_OUT_SEED, _HELD_OUT_CHARACTERS))["input_ids"])
    windows = held_out[: len(held_out) // options.seqlen * options.seqlen].view(-1, options.seqlen).to(device)
    stream, starts = stream.to(device), starts.to(device)

    with torch.device(device):
        model = build_model(options, tokenizer)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} weights, {len(stream):,} training tokens, "
        f"{windows.numel():,} held-out tokens; ready after {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
        fused=device.startswith("cuda"),
    )
    forward = torch.compile(model) if options.compile else model
    report_every = max(1, options.steps // 20)
    start = time.perf_counter()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        loss = loss_of(forward, sample_windows(stream, starts, options))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % report_every == 0 or step + 1 == options.steps:
            train_loss, held = loss.item(), held_out_loss(model, windows)
            rate = (step + 1) * options.batch_size * options.seqlen / (time.perf_counter() - start)
            print(
                f"step {step + 1:6d}  train loss {train_loss:.4f}  held-out loss {held:.4f}  "
                f"perplexity {math.exp(held):.3f}  {rate / 1e3:,.0f}k tokens/s",
                flush=True,
            )
    return model, tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Write model, tokenizer and generation config as an ordinary checkpoint, in float16.

    Returns:
        The folder's size in bytes.
    """
    limit = torch.finfo(torch.float16).max
    for name, parameter in model.named_parameters():
        if not bool((parameter.detach().abs() < limit).all()):  # false for NaN too
            raise FloatingPointError(f"{name} does not fit float16")
    model = model.cpu().half()
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > MAX_FOLDER_BYTES:
        raise ValueError(f"{folder} has {size:,} bytes; the wheel has room for {MAX_FOLDER_BYTES:,}")
    return size


def main() -> None:
    """The command line: one flag an option."""
    default = TrainOptions()
    parser = argparse.ArgumentParser(prog="python -m tools.stories.train", description="Train the bundled demo model.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--seqlen", type=int, default=default.seqlen)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=default.weight_decay)
    parser.add_argument("--stories", type=int, default=default.stories)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    arguments = vars(parser.parse_args())
    output, device = arguments.pop("output"), arguments.pop("device")
    model, tokenizer = train(TrainOptions(**arguments), device)
    print(f"{output}: {save(model, tokenizer, output):,} bytes")


if __name__ == "__main__":
    main()
