"""Engines of a GPU beyond their texts: how precise every logit is, races, other streams, and what becomes of them when a
model changes, breaks or cannot be captured.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import CONFIGS, PROMPTS, SIZES, fused, llama, make, random_texts, run, share_of_best
from torch import Tensor
from transformers import (
    LlamaConfig,
    PreTrainedModel,
)

from macko_llm.engine import make_engine
from macko_llm.engines.fixed import FixedEngine
from macko_llm.engines.fused_step import FusedStep
from macko_llm.engines.transformers_step import TransformersStep
from macko_llm.errors import MackoWarning
from macko_llm.sampling import GREEDY, NOT_FINITE, Sampling

pytestmark = pytest.mark.usefixtures("kernels", "no_fallback")

DRAWN = Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=5)
PENALIZED = Sampling(repetition_penalty=1.3)


# Races, streams


@torch.inference_mode()
def one_by_one(step: FusedStep, steps: int) -> list[Tensor]:
    """The tokens of a step whose kernels wait for each other."""
    tokens = []
    for _ in range(steps):
        for launch in step._launches:
            launch.run()
            torch.cuda.synchronize()
        tokens.append(step._decoder.token.clone())
    return tokens


@pytest.mark.parametrize(
    ("name", "dtype", "packed", "lengths"),
    [
        ("llama", torch.bfloat16, False, [5]),
        ("llama", torch.float16, False, [5, 40, 1]),
        ("llama", torch.float16, True, [900]),
        ("qwen3", torch.bfloat16, True, [7, 30, 2]),
        ("mistral", torch.float16, True, [33]),
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_graphs_back_to_back_are_their_kernels_one_by_one(
    cuda: torch.device, name: str, dtype: torch.dtype, packed: bool, lengths: list[int], sampling: Sampling
) -> None:
    """50 replays that nothing waits for: all tokens, and every key and value that was written, bit for bit."""
    model, _ = make(CONFIGS[name](), dtype, cuda, packed=packed)
    prompts, steps = random_texts(*lengths), 50
    engines = [fused(model, most=max(lengths) + 60, sampling=sampling, bucket=1024) for _ in "12"]
    token, _ = (engine.prefill(prompts) for engine in engines)
    found = []
    for _ in range(steps):
        token = engines[0].decode(token)
        found.append(token)
    replayed, plain = (engine._step for engine in engines)
    assert isinstance(replayed, FusedStep)
    assert isinstance(plain, FusedStep)
    assert torch.equal(torch.stack(found), torch.stack(one_by_one(plain, steps)))
    for one, other in zip(replayed._layers, plain._layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert not replayed._decoder._tickets.any()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_engines_that_take_turns_do_not_disturb_each_other(cuda: torch.device, sampling: Sampling) -> None:
    model = llama(cuda)
    prompts = [PROMPTS[:1], PROMPTS]
    expected = [run(fused(model, sampling=sampling), batch, 30) for batch in prompts]
    engines = [fused(model, sampling=sampling) for _ in prompts]
    tokens = [[engine.prefill(batch)] for engine, batch in zip(engines, prompts, strict=True)]
    for _ in range(29):
        for engine, so_far in zip(engines, tokens, strict=True):
            so_far.append(engine.decode(so_far[-1]))
    assert [torch.stack(so_far, dim=1).tolist() for so_far in tokens] == expected


@pytest.mark.parametrize("kind", [FusedStep, TransformersStep])
def test_work_follows_the_current_stream(cuda: torch.device, kind: Any) -> None:
    """While the default stream is busy, so that what is queued there comes too late."""
    model, stream = llama(cuda), torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        engine = FixedEngine(model, max_tokens=100, sampling=GREEDY, kinds=[kind], bucket=16)
        token = engine.prefill(PROMPTS)
        with torch.cuda.stream(torch.cuda.default_stream(cuda)):
            torch.cuda._sleep(1_000_000_000)
        tokens = [token]
        for _ in range(20):
            tokens.append(engine.decode(tokens[-1]))
        texts = torch.stack(tokens, dim=1).tolist()
        assert torch.cuda.current_stream(cuda) == stream
    torch.cuda.synchronize(cuda)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert share_of_best(model, prompt, text) > 0.9


def test_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    with torch.cuda.device(other):
        model = llama(other)
    for kind in (FusedStep, TransformersStep):
        engine = FixedEngine(model, max_tokens=100, sampling=GREEDY, kinds=[kind], bucket=16)
        text = run(engine, PROMPTS[:1], 30)[0]
        assert share_of_best(model, PROMPTS[0], text) > 0.9


@pytest.mark.parametrize("kind", [FusedStep, TransformersStep])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALIZED], ids=["greedy", "drawn", "penalized"])
@pytest.mark.parametrize("texts", [1, 3])
def test_no_decode_waits_for_the_gpu(cuda: torch.device, kind: Any, sampling: Sampling, texts: int) -> None:
    engine = FixedEngine(llama(cuda), max_tokens=100, sampling=sampling, kinds=[kind])
    token = engine.prefill(PROMPTS[:texts])
    torch.cuda.synchronize(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            token = engine.decode(token)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert token.shape == (texts,)


# Limits and numbers that are none


@pytest.mark.parametrize(
    ("kind", "dtype", "packed"), [(FusedStep, torch.float16, True), (TransformersStep, torch.float32, False)]
)
def test_texts_that_end_at_the_last_position(cuda: torch.device, kind: Any, dtype: torch.dtype, packed: bool) -> None:
    """An engine with room for just these tokens, in a cache that just fits or lacks the last token's slot."""
    (model, _), prompt = make(LlamaConfig(**SIZES), dtype, cuda, packed=packed), PROMPTS[0]

    def text(new: int, room: int, bucket: int) -> list[int]:
        engine = FixedEngine(model, max_tokens=len(prompt) + room, sampling=GREEDY, kinds=[kind], bucket=bucket)
        return run(engine, [prompt], new)[0]

    expected = text(12, 100, 256)
    for new in (1, 2, 3, 12):
        for bucket in (len(prompt) + new - 1, len(prompt) + new, 256):
            assert text(new, new, bucket) == expected[:new]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_text_that_breaks_on_the_way_leaves_the_others_and_the_next_ones_alone(
    cuda: torch.device, sampling: Sampling, packed: bool
) -> None:
    model = llama(cuda, packed=packed)
    clean = run(fused(model, sampling=sampling), PROMPTS, 20)
    unused = next(token for token in range(1, 320) if not any(token in text for text in (*PROMPTS, *clean)))
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = torch.nan
    engine = fused(model, sampling=sampling)
    tokens = [engine.prefill(PROMPTS)]
    for step in range(19):
        fed = tokens[-1].clone()
        if step == 8:
            fed[1] = unused
        tokens.append(engine.decode(fed))
    found = torch.stack(tokens, dim=1).tolist()
    assert [found[0], found[2]] == [clean[0], clean[2]]
    assert found[1] == [*clean[1][:9], *[NOT_FINITE] * 11]
    assert run(engine, PROMPTS, 20) == clean


# Models that change, and models that cannot be captured


def halve(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(halve)


def replace(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * 0.5


@pytest.mark.parametrize("change", [hook, replace])
def test_what_wants_to_see_or_replace_a_module_is_obeyed(
    cuda: torch.device, change: Callable[[PreTrainedModel], None]
) -> None:
    model = llama(cuda)
    before = run(make_engine(model, max_tokens=100, sampling=GREEDY), PROMPTS, 40)
    change(model)
    engine = make_engine(model, max_tokens=100, sampling=GREEDY)
    texts = run(engine, PROMPTS, 40)
    assert isinstance(engine._step, TransformersStep)  # type: ignore[attr-defined]
    assert texts != before
    shares = [share_of_best(model, prompt, text) for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert sum(shares) / 3 > 0.97


def test_a_captured_forward_of_packed_layers(cuda: torch.device) -> None:
    """One text and three at once, where the kernels are not asked."""
    model = llama(cuda)
    for prompts in (PROMPTS[:1], PROMPTS):
        engine = FixedEngine(model, max_tokens=150, sampling=GREEDY, kinds=[TransformersStep], bucket=32)
        texts = run(engine, prompts, 60)
        assert engine._step._graph is not None  # type: ignore[union-attr]
        shares = [share_of_best(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        assert sum(shares) / len(shares) > 0.97


@pytest.mark.parametrize(
    ("kinds", "then", "told"),
    [((FusedStep, TransformersStep), TransformersStep, 0), ((FusedStep,), type(None), 1)],
    ids=["a captured forward", "the eager engine"],
)
def test_a_model_that_changes_on_the_way_goes_on_in_another_step(
    cuda: torch.device, kinds: Any, then: type, told: int
) -> None:
    """The kernels give their cache away when it has to grow and a hook has come."""
    model = llama(cuda)
    prompts = random_texts(7, 11, 3)
    engine = FixedEngine(model, max_tokens=100, sampling=GREEDY, kinds=kinds, bucket=16)
    tokens = [engine.prefill(prompts)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(50):
            if len(tokens) == 4:
                assert isinstance(engine._step, FusedStep)
                model.model.norm.register_forward_hook(lambda *_: None)
            tokens.append(engine.decode(tokens[-1]))
    assert isinstance(engine._step, then)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, MackoWarning)]
    assert [message.endswith("could: hooks want to see its modules run.") for message in said] == [True] * told
    texts = torch.stack(tokens, dim=1).tolist()
    shares = [share_of_best(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert sum(shares) / 3 > 0.97


UNCAPTURABLE = """
import json
import warnings

import torch
from families import FAMILIES

from macko_llm.engine import make_engine
from macko_llm.engines.eager import EagerEngine
from macko_llm.errors import MackoWarning
from macko_llm.sampling import GREEDY

PROMPTS = [[5, 6, 7, 8], [9, 10]]


def text(engine):
    tokens = [engine.prefill(PROMPTS)]
    while len(tokens) < 12:
        tokens.append(engine.decode(tokens[-1]))
    return torch.stack(tokens, dim=1).tolist()


def outcome(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "fine"


def waits(module, inputs, output):
    output.sum().item()


model = FAMILIES["llama"]().to("cuda")
clean = text(EagerEngine(model, max_tokens=60, sampling=GREEDY))
hook = model.model.layers[1].mlp.register_forward_hook(waits)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = text(make_engine(model, max_tokens=60, sampling=GREEDY))
said = [str(warning.message) for warning in caught if issubclass(warning.category, MackoWarning)]
hook.remove()
after = {
    "random numbers": outcome(lambda: torch.randn(4, device="cuda").tolist()),
    "giving memory back": outcome(torch.cuda.empty_cache),
}
with warnings.catch_warnings():
    warnings.simplefilter("error", MackoWarning)
    after["the next engine"] = outcome(lambda: text(make_engine(model, max_tokens=60, sampling=GREEDY)))
print(json.dumps({"same": found == clean, "said": said, **after}))
"""


@pytest.fixture(scope="module")
def uncapturable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a model that waits for the GPU in its forward does, in a process of its own, which it may well damage."""
    script = tmp_path_factory.mktemp("uncapturable") / "uncapturable.py"
    script.write_text(UNCAPTURABLE)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_that_cannot_be_captured_goes_on_with_one_warning(uncapturable: dict[str, Any]) -> None:
    assert uncapturable["same"]
    (said,) = uncapturable["said"]
    assert "generates more slowly than it could" in said
    assert "synchronizing" in said


@pytest.mark.parametrize("what", ["random numbers", "giving memory back", "the next engine"])
def test_a_model_that_cannot_be_captured_leaves_torch_in_order(uncapturable: dict[str, Any], what: str) -> None:
    assert uncapturable[what] == "fine"
