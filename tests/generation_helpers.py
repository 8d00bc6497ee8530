"""Tokenizers, tiny models and scripted ones for the tests of generation."""

from types import SimpleNamespace

import torch
from families import FAMILIES, VOCABULARY, byte_level_bpe
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from macko_llm.generation import stream

CORPUS = [
    "Once upon a time, a cat met a dog. 👩‍👩‍👧 naïve café 😀😃 日本語 Привет",
    "the end of the story\n\n  of  the dog",
] * 3


def byte_level():
    """Trained byte-level BPE, as in GPT-2: any byte is a token, special ones are <s> and </s>."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(CORPUS), bos_token="<s>", eos_token="</s>")


def byte_fallback():
    """BPE in the manner of sentencepiece, as in Llama 2: ▁ for spaces, the first one stripped, bytes for unknown characters."""
    words = ["▁the", "▁dog", "▁met", "▁▁"]
    pieces = [word[:end] for word in words for end in range(2, len(word) + 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({*"".join(words)}), *pieces]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
TOKENIZER = TOKENIZERS["byte level"]


def build(family):
    """A tiny model of a family that says various things and never stops by itself."""
    model = FAMILIES[family]()
    model.generation_config.eos_token_id = None
    # Tied random embeddings say the last token for ever.
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


def prompt_of(length, seed=0):
    return torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def tokens_of(model, prompt, **options):
    return [step.token_id for step in stream(model, TOKENIZER, prompt, **{"stop_ids": (), **options})]


def greedy_of_transformers(model, prompt, new, **options):
    everything = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, **options
    )
    return everything[0, prompt.shape[1] :].tolist()


class Scripted(nn.Module):
    """Says the given tokens, whatever it reads; remembers what it was fed."""

    def __init__(self, script, vocabulary):
        super().__init__()
        self.script, self.fed = script, []
        self.config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=10**6, num_hidden_layers=1)
        self.device = torch.device("cpu")

    def forward(self, input_ids, past_key_values, use_cache):
        assert use_cache
        assert past_key_values.get_seq_length() == 0
        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        logits[:, -1, self.script[len(self.fed)]] = 1
        self.fed.append(input_ids.tolist())
        return SimpleNamespace(logits=logits)


def spoken(tokenizer, prompt, new, **options):
    """The steps of a model that says `new`."""
    options = {"max_new_tokens": len(new), "stop_ids": (), **options}
    return list(stream(Scripted(new, len(tokenizer)), tokenizer, prompt, **options))


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
