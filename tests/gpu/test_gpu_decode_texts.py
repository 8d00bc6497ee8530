"""Texts that the engines of a GPU write: greedy ones against the model's own forward, whole engines against each other."""

import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import CONFIGS, PROMPTS, fused, pack, run, share_of_best
from families import FAMILIES, build, make_tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from macko_llm import generation
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.engine import make_engine
from macko_llm.engines.decoder import why_not
from macko_llm.engines.eager import EagerEngine
from macko_llm.engines.fixed import FixedEngine
from macko_llm.engines.fused_step import FusedStep
from macko_llm.engines.transformers_step import TransformersStep
from macko_llm.layouts import canonical
from macko_llm.layouts.choice import TILED_CAPABILITY
from macko_llm.layouts.tiled import TiledGroup
from macko_llm.linear import arrange_group, group_of
from macko_llm.loading import load
from macko_llm.sampling import GREEDY, NOT_FINITE, Sampling
from macko_llm.transformers_integration import layer_groups
from tools.stories.stories import HELD_OUT_SEED, story_text

pytestmark = pytest.mark.usefixtures("kernels", "no_fallback")

VOCABULARY, WINDOW = 320, 9


def make_model(name: str, dtype: torch.dtype, device: torch.device, *, packed: bool) -> PreTrainedModel:
    model = build(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.25)  # of weights made for 64 columns
    model = model.to(dtype).to(device)
    if packed:
        groups = pack(model)
        assert None not in groups, "the decoder would multiply layer by layer"
    assert why_not(model) is None
    return model


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_texts_are_greedy(cuda: torch.device, name: str, dtype: torch.dtype, packed: bool) -> None:
    """Past a window, past the first cache, one text at a time and three of different lengths at once."""
    model = make_model(name, dtype, cuda, packed=packed)
    alone = [run(fused(model, bucket=32), [prompt], 90)[0] for prompt in PROMPTS]
    together = run(fused(model, bucket=32), PROMPTS, 90)
    shares = [
        share_of_best(model, prompt, text)
        for texts in (alone, together)
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    assert min(len(set(text)) for text in alone) > 3, "too dull a text to prove anything"
    assert sum(shares) / len(shares) > (0.97 if dtype == torch.float16 else 0.9)


def test_a_cache_that_grows_changes_nothing(cuda: torch.device) -> None:
    model = make_model("llama", torch.float16, cuda, packed=True)
    assert run(fused(model, bucket=16), PROMPTS[:1], 120) == run(fused(model, bucket=1024), PROMPTS[:1], 120)


def test_a_prefill_begins_anew_and_texts_are_reproducible(cuda: torch.device) -> None:
    model = make_model("qwen3", torch.bfloat16, cuda, packed=True)
    engine = fused(model)
    first = run(engine, PROMPTS, 30)
    assert run(engine, PROMPTS[:1], 7) == [row[:7] for row in run(fused(model), PROMPTS[:1], 30)]
    assert run(engine, PROMPTS, 30) == first


@pytest.mark.parametrize("kind", [FusedStep, TransformersStep])
def test_texts_with_a_repetition_penalty(cuda: torch.device, kind: Any) -> None:
    """One text and three of different lengths at once, through a cache that grows; a second time all is forgotten."""
    model, penalty = make_model("llama", torch.float16, cuda, packed=True), 1.3
    sampling = Sampling(repetition_penalty=penalty)
    for prompts in (PROMPTS[:1], PROMPTS):
        engine = FixedEngine(model, max_tokens=200, sampling=sampling, kinds=[kind], bucket=32)
        texts = run(engine, prompts, 90)
        assert isinstance(engine._step, kind)
        assert run(engine, prompts, 90) == texts
        shares = [share_of_best(model, prompt, text, penalty) for prompt, text in zip(prompts, texts, strict=True)]
        assert sum(shares) / len(shares) > 0.9
        assert texts != run(FixedEngine(model, max_tokens=200, sampling=GREEDY, kinds=[kind]), prompts, 90)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, seed=1),
        Sampling(temperature=1.2, top_k=20, top_p=0.9, seed=2),
        Sampling(temperature=1.2, min_p=0.02, seed=2, repetition_penalty=1.3),
    ],
)
def test_draws_are_those_of_the_eager_engine(cuda: torch.device, sampling: Sampling) -> None:
    """A draw near the border of two tokens may fall on the other side; from then on the texts differ."""
    model = make_model("llama", torch.float16, cuda, packed=True)
    prompts = [[seed, 9, 8, 7] for seed in range(5, 69)]
    expected = run(EagerEngine(model, max_tokens=400, sampling=sampling), prompts, 12)
    found = run(fused(model, sampling=sampling), prompts, 12)
    assert found == run(fused(model, sampling=sampling), prompts, 12)
    same = [one[:3] == other[:3] for one, other in zip(found, expected, strict=True)]
    assert sum(same) > 0.9 * len(same)
    other_seed = run(fused(model, sampling=Sampling(temperature=0.7, seed=3)), prompts, 12)
    assert sum(one[:3] == other[:3] for one, other in zip(found, other_seed, strict=True)) < 0.5 * len(same)


def test_logits_that_are_not_finite(cuda: torch.device) -> None:
    model = make_model("llama", torch.float16, cuda, packed=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[10] = torch.nan
    tokens = run(fused(model), [[5, 10, 6], [5, 6, 7]], 5)
    assert tokens[0] == [NOT_FINITE] * 5
    assert NOT_FINITE not in tokens[1]


def test_a_graph_replayed_says_what_its_kernels_say_one_by_one(cuda: torch.device) -> None:
    """Kernels that start early must not read what is not there yet: every logit of every step, bit for bit."""
    model = make_model("llama", torch.float16, cuda, packed=True)
    engines = [fused(model), fused(model)]
    tokens = [engine.prefill(PROMPTS[:1]) for engine in engines]
    steps = [engine._step for engine in engines]
    for _ in range(60):
        tokens[0] = engines[0].decode(tokens[0])
        for launch in steps[1]._launches:  # type: ignore[union-attr]
            launch.run()
            torch.cuda.synchronize(cuda)
        one, other = (step._decoder.logits for step in steps)  # type: ignore[union-attr]
        assert torch.equal(one, other)


def test_the_parts_of_a_token_are_measured(cuda: torch.device) -> None:
    engine = fused(make_model("llama", torch.float16, cuda, packed=True))
    assert engine.parts() is None
    engine.decode(engine.prefill(PROMPTS[:1]))
    parts = engine.parts()
    assert parts is not None
    assert parts.keys() == {"linears", "attention"}
    assert min(parts.values()) > 0


def test_an_engine_leaves_nothing_behind(cuda: torch.device) -> None:
    """Its cache is freed with it, not when Python happens to look for cycles."""
    model = make_model("llama", torch.float16, cuda, packed=True)
    run(fused(model), PROMPTS[:1], 3)  # what libraries keep
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated(cuda)
        for sampling in (GREEDY, Sampling(temperature=1.0, seed=1)):
            engine = fused(model, sampling=sampling)
            run(engine, PROMPTS[:1], 3)
            del engine
            assert torch.cuda.memory_allocated(cuda) == before
    finally:
        gc.enable()


def test_rubbish_in_cycles_breaks_no_capture(cuda: torch.device) -> None:
    """Other graphs that lie about when a step is captured, and a collector that looks at every turn."""
    model = make_model("llama", torch.float16, cuda, packed=True)
    rubbish: Any = fused(model)
    run(rubbish, PROMPTS[:1], 3)
    rubbish.itself = rubbish
    del rubbish
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        run(fused(model), PROMPTS[:1], 3)
    finally:
        gc.set_threshold(*thresholds)


# Which step decodes


def test_the_first_kind_that_suits_decodes(cuda: torch.device) -> None:
    for model, kind in (
        (make_model("llama", torch.float16, cuda, packed=True), FusedStep),
        (FAMILIES["qwen3"]().half().to(cuda), TransformersStep),  # heads of 24 dimensions
        (FAMILIES["gemma3"]().to(cuda), TransformersStep),
    ):
        engine = make_engine(model, max_tokens=64, sampling=GREEDY)
        engine.decode(engine.prefill([[5, 6, 7]]))
        assert isinstance(engine._step, kind)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *_: None), "hooks"),
        (lambda model: setattr(model.model.norm, "forward", model.model.norm.forward), "replaced"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "gelu"),
        (lambda model: model.float(), "float32"),
        (lambda model: model.cpu(), "no GPU"),
        (lambda model: model.model.layers[0].mlp.cpu(), "several devices"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(
    cuda: torch.device, change: Callable[[Any], object], reason: str
) -> None:
    model = make_model("llama", torch.float16, cuda, packed=False)
    change(model)
    assert reason in (why_not(model) or "")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_captured_forward_says_what_the_eager_engine_says(cuda: torch.device, name: str) -> None:
    model = FAMILIES[name]().to(cuda)
    prompts = [[7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6, 7]]
    engine = FixedEngine(model, max_tokens=60, sampling=GREEDY, kinds=[TransformersStep], bucket=16)
    assert run(engine, prompts, 40) == run(EagerEngine(model, max_tokens=60, sampling=GREEDY), prompts, 40)
    assert engine._step._graph is not None  # type: ignore[union-attr]


# Trained models


TEXTS, NEW_TOKENS = 200, 40


def trained(name: str, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, Any, list[list[int]]]:
    """A trained model, packed, its tokenizer, and TEXTS beginnings of texts that it knows, of many lengths."""
    if name == "bundled":
        folder, text = MODEL_FOLDER, story_text(HELD_OUT_SEED, 200_000)
    else:  # the folder MACKO_TEST_LLAMA, and the file MACKO_TEST_TEXT
        folder, file = (os.environ.get(f"MACKO_TEST_{what}") for what in ("LLAMA", "TEXT"))
        if not (folder and file):
            pytest.skip(
                "needs MACKO_TEST_LLAMA, the folder of a trained Llama, and MACKO_TEST_TEXT, a text file it knows"
            )
        text = Path(file).read_text()[:200_000]
    model = load(folder, dtype=str(dtype).removeprefix("torch."), device=str(device))
    pack(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    return model, tokenizer, [ids[start : start + 8 + start % 40] for start in range(0, TEXTS * 100, 100)]


@pytest.mark.parametrize("name", ["bundled", "of others"])
def test_generated_texts_are_the_eager_models_but_for_ties(cuda: torch.device, name: str) -> None:
    """Packed, through `stream`, in float16: every token is the best of the model's own forward, or tied with it."""
    model, tokenizer, prompts = trained(name, torch.float16, cuda)
    assert why_not(model) is None
    shares = []
    for prompt in prompts:
        steps = generation.stream(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, stop_ids=())
        shares.append(share_of_best(model, prompt, [step.token_id for step in steps]))
    whole, mean = sum(share == 1 for share in shares), sum(shares) / len(shares)
    print(f"\n{name}: {whole} of {TEXTS} texts, {mean:.5f} of their tokens are the best of one forward")
    assert mean > 0.995


@pytest.mark.parametrize("name", ["bundled", "of others"])
def test_in_float32_texts_are_the_eager_models(cuda: torch.device, name: str) -> None:
    """All of them, token by token: nothing is tied in float32."""
    model, _, prompts = trained(name, torch.float32, cuda)
    for start in range(0, TEXTS, 50):
        batch = prompts[start : start + 50]
        most = max(map(len, batch)) + NEW_TOKENS
        found = run(make_engine(model, max_tokens=most, sampling=GREEDY), batch, NEW_TOKENS)
        assert found == run(EagerEngine(model, max_tokens=most, sampling=GREEDY), batch, NEW_TOKENS)


# transformers' own generation


def test_generate_with_a_static_cache_and_a_real_compiler(cuda: torch.device) -> None:
    model = make_model("llama", torch.float16, cuda, packed=True)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPTS[0]], device=cuda)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's
        found = model.generate(ids, cache_implementation="static", **options)
    assert getattr(model, "_compiled_call", None) is not None, "it did not compile"
    share_of_best(model, PROMPTS[0], found[0, len(PROMPTS[0]) :].tolist())


def test_a_batch_and_stop_strings_through_generation(cuda: torch.device) -> None:
    model = make_model("llama", torch.float16, cuda, packed=True)
    tokenizer = make_tokenizer()
    whole = generation.generate(model, tokenizer, PROMPTS[0], max_new_tokens=60, stop_ids=())
    middle = whole.text[len(whole.text) // 2 :][:3]
    cut = generation.generate(model, tokenizer, PROMPTS[0], max_new_tokens=60, stop_ids=(), stop=[middle])
    assert cut.text == whole.text.partition(middle)[0]
    batch = generation.generate_batch(model, tokenizer, PROMPTS, max_new_tokens=20, stop_ids=())
    assert [one.new_tokens for one in batch] == [20] * 3


def test_linears_that_are_no_group_are_multiplied_one_by_one(cuda: torch.device) -> None:
    """Canonical layers, and a dense one among packed ones: slower, never wrong."""
    model = make_model("llama", torch.float16, cuda, packed=True)
    attention = model.model.layers[0].self_attn
    dense = nn.Linear(1024, attention.k_proj.out_features, bias=False, device=cuda, dtype=torch.float16)
    dense.weight.data = canonical.unpack(attention.k_proj.matrix)
    attention.k_proj = dense
    model.model.layers[1].mlp.down_proj.restore()
    text = run(fused(model), PROMPTS[:1], 40)[0]
    assert share_of_best(model, PROMPTS[0], text) > 0.9


@pytest.mark.parametrize("texts", [1, 3, 21])
@pytest.mark.parametrize("name", ["llama", "llama, every head its own keys, biases"])
def test_tiled_layers_are_multiplied_by_one_kernel(cuda: torch.device, name: str, texts: int) -> None:
    if torch.cuda.get_device_capability(cuda) < TILED_CAPABILITY:
        pytest.skip("this GPU multiplies no tiles")
    model = make_model(name, torch.float16, cuda, packed=True)
    for group in layer_groups(model):
        for layer in group.values():
            layer.restore()
            layer.layout = "tiled"
        arrange_group(list(group.values()))
        assert isinstance(group_of(list(group.values())), TiledGroup)
    prompts = (PROMPTS * 7)[:texts]
    found = run(fused(model), prompts, 40)
    assert min(share_of_best(model, *pair) for pair in zip(prompts, found, strict=True)) > 0.9
