"""Engines of a GPU beyond their texts: how precise every logit is, races, other streams, and what becomes of them when a
model changes, breaks or cannot be captured.
"""

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import share_of_best
from test_gpu_decode_texts import CONFIGS, PROMPTS, fused, pack, run
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from macko_llm import ops
from macko_llm.engine import make_engine
from macko_llm.engines.decoder import why_not
from macko_llm.engines.eager import EagerEngine
from macko_llm.engines.fixed import FixedEngine
from macko_llm.engines.fused_step import FusedStep
from macko_llm.engines.transformers_step import TransformersStep
from macko_llm.errors import MackoWarning
from macko_llm.linear import MackoLinear
from macko_llm.sampling import GREEDY, NOT_FINITE, Sampling

pytestmark = pytest.mark.usefixtures("kernels")

HALVES = [torch.float16, torch.bfloat16]
DRAWN = Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=5)
_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 1024,  # rows long enough for the sliced layout
    "intermediate_size": 2056,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
MORE_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama, heads narrower than their share": lambda: LlamaConfig(**_SIZES, head_dim=64),
    "qwen3, three heads of 256 to one key": lambda: Qwen3Config(**{**_SIZES, "num_attention_heads": 6}, head_dim=256),
    "llama, linear rotations": lambda: LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama, rotations of llama3": lambda: LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **_ROPE,
        },
    ),
    "llama, rotations of yarn": lambda: LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, **_ROPE}
    ),
    "mistral, no window": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "qwen2, a window from the second block on": lambda: Qwen2Config(**_SIZES, **_WINDOWS),
    "qwen3, narrow heads, windows, biases": lambda: Qwen3Config(**_SIZES, **_WINDOWS, head_dim=32, attention_bias=True),
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """A step that could not be made would warn, and the eager engine would pass every test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MackoWarning)
        yield


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
                twin.get_submodule(name).weight.copy_(ops.unpack(layer.matrix))
    return model, twin


def llama(device: torch.device, *, packed: bool = True) -> PreTrainedModel:
    return make(LlamaConfig(**_SIZES), torch.float16, device, packed=packed)[0]


def random_texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 320, (length,), generator=generator).tolist() for length in lengths]


# Logits


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
    model, twin = make(LlamaConfig(**_SIZES, attention_bias=True), torch.float16, cuda, packed=packed)
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
    model, _ = make(LlamaConfig(**_SIZES, sliding_window=9), torch.float16, cuda, packed=False)
    prompts = random_texts(*[40] * 32)
    expected = run(EagerEngine(model, max_tokens=60, sampling=GREEDY), prompts, 8)
    found = run(make_engine(model, max_tokens=60, sampling=GREEDY), prompts, 8)
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 28  # but for ties


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
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
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
    (model, _), prompt = make(LlamaConfig(**_SIZES), dtype, cuda, packed=packed), PROMPTS[0]

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
    assert "captur" in said


@pytest.mark.parametrize("what", ["random numbers", "giving memory back", "the next engine"])
def test_a_capture_that_failed_leaves_torch_in_order(uncapturable: dict[str, Any], what: str) -> None:
    assert uncapturable[what] == "fine"
