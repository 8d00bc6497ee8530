"""One model in two processes, joined by gloo: what they compute, what each holds, and how they end."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from families import VOCABULARY, build, make_tokenizer, save_model
from helpers import assert_plain
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

import macko_llm
from macko_llm import ranks, tensor_parallel
from macko_llm.cli.launching import in_processes, place_of_torchrun
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.errors import MackoError, UsageError
from macko_llm.generation import generate
from macko_llm.linear import MackoLinear
from macko_llm.models import load_tokenizer, prunable_linears
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.ranks import GatheredLinear, Place, SummedLinear
from macko_llm.recipe import PruneRecipe
from macko_llm.refusals import check_shares
from macko_llm.sampling import Sampling
from macko_llm.tensor_parallel import load_slices

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)
"""Every linear layer of a block has a bias, the summed ones too, and the head is the embeddings."""
MODELS = ("llama", "qwen2", "phi3", "biases", "dense", "mixed")
"""Packed but for "dense"; of "mixed", q and down are dense. The plan of phi3 gathers and splits."""
PACKED_LAYERS = {"phi3": 8, "dense": 0, "mixed": 10, "demo": 28}
PROMPT = "Once upon a time"
NEW_TOKENS = 24
WRONG_CALL = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")

    def pack(name: str, source: Path, **recipe: Any) -> None:
        prune_checkpoint(source, folder / f"{name}-pruned", PruneRecipe(method="magnitude", sparsity=0.5, **recipe))
        pack_checkpoint(folder / f"{name}-pruned", folder / name)

    for name in ("llama", "qwen2", "phi3", "opt"):
        pack(name, save_model(folder / f"{name}-dense", name, torch.float16))
    build(LLAMA).half().save_pretrained(folder / "biases-dense")
    make_tokenizer().save_pretrained(folder / "biases-dense")
    pack("biases", folder / "biases-dense")
    pack("mixed", folder / "llama-dense", ignore=["q_proj", "down_proj"])
    pack("demo", MODEL_FOLDER)
    (folder / "llama-dense").rename(folder / "dense")
    return folder


# What two processes compute


@dataclass
class Answer:
    """What a process says of a model."""

    logits: torch.Tensor
    greedy: str
    drawn: str


def _answer(model: PreTrainedModel, folder: Path) -> Answer:
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids

    def text(sampling: Sampling) -> str:
        return generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, sampling=sampling, stop_ids=()).text

    with torch.inference_mode():
        logits = model(prompt).logits
    return Answer(logits, text(Sampling()), text(Sampling(temperature=5.0)))


def _answers(place: Place, folder: Path, _: object) -> dict[str, list[Answer]]:
    with ranks.joined(place, "cpu"):
        return {
            name: ranks.gathered(_answer(load_slices(folder / name, place, CPU, dtype="float32"), folder / name))
            for name in MODELS
        }


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, list[Answer]]:
    return in_processes(2, _answers, folder, on_text=None)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_what_one_does(name: str, folder: Path, answers: dict[str, list[Answer]]) -> None:
    model = macko_llm.load(folder / name, dtype="float32", device="cpu")
    assert len(_packed(model)) == PACKED_LAYERS.get(name, 14)
    alone = _answer(model, folder / name)
    assert len(answers[name]) == 2
    for answer in answers[name]:
        torch.testing.assert_close(answer.logits, alone.logits, rtol=1e-4, atol=1e-4)
        assert answer.greedy == alone.greedy


def test_without_a_seed_all_write_what_the_first_draws(answers: dict[str, list[Answer]]) -> None:
    for first, second in answers.values():
        assert first.drawn == second.drawn
        assert first.drawn != first.greedy


# What each of them holds


def _packed(model: nn.Module) -> list[MackoLinear]:
    return [module for module in model.modules() if isinstance(module, MackoLinear)]


def test_the_parts_of_packed_matrices_add_up_to_the_whole(folder: Path) -> None:
    whole = sum(layer.matrix.nbytes for layer in _packed(macko_llm.load(folder / "demo", device="cpu")))
    parts = [load_slices(folder / "demo", Place(rank, 2, rank), CPU) for rank in range(2)]
    held = [sum(layer.matrix.nbytes for layer in _packed(part)) for part in parts]
    assert whole <= sum(held) < 1.05 * whole
    assert max(held) < 0.55 * whole


@pytest.mark.parametrize("name", ["demo", "demo-pruned"])
def test_no_two_whole_matrices_are_there_at_once(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: WeakSet[MackoLinear | nn.Linear] = WeakSet()
    whole_at_once = []
    put = tensor_parallel._put_slice

    def counted(model: PreTrainedModel, *rest: Any) -> Any:
        if not whole:
            whole.update(prunable_linears(model).values() if name == "demo-pruned" else _packed(model))
        gc.collect()
        whole_at_once.append(sum(map(_has_weights, whole)))  # in the model or not
        return put(model, *rest)

    monkeypatch.setattr(tensor_parallel, "_put_slice", counted)
    load_slices(folder / name, Place(0, 2, 0), CPU)
    assert whole_at_once == [1] * PACKED_LAYERS["demo"] + [0]  # and the head


def _has_weights(layer: MackoLinear | nn.Linear) -> bool:
    if isinstance(layer, MackoLinear):
        return layer.is_arranged or not (layer.weight_values is None or layer.weight_values.is_meta)
    return not (layer.weight is None or layer.weight.is_meta)


def test_a_tied_head_is_a_view_of_the_embeddings(folder: Path) -> None:
    for rank in range(2):
        model: Any = load_slices(folder / "demo", Place(rank, 2, rank), CPU)
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.part.weight
        assert embeddings.shape[0] == 2 * head.shape[0]
        assert head.data_ptr() == embeddings[rank * head.shape[0] :].data_ptr()


def test_a_head_that_cannot_be_shared_is_whole_everywhere(tmp_path: Path) -> None:
    config = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": VOCABULARY + 1})
    build(config).save_pretrained(tmp_path)
    model: Any = load_slices(tmp_path, Place(1, 2, 1), CPU)
    assert type(model.lm_head) is nn.Linear
    assert not any(isinstance(module, GatheredLinear) for module in model.modules())
    assert sum(isinstance(module, SummedLinear) for module in model.modules()) == 4


# What cannot be shared


@pytest.mark.parametrize(
    ("processes", "counts", "fix"),
    [
        (3, [6, 2], "use 1 or 2 processes."),
        (16, [32, 8], "use 1, 2, 4 or 8 processes."),
        (2, [7, 1], "use one process."),
        (4, [12, [8, 6]], "use 1 or 2 processes."),
    ],
)
def test_a_wrong_count_names_the_right_ones(processes: int, counts: list[Any], fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_shares(processes, counts)
    assert_plain(str(caught.value))
    assert str(caught.value).endswith(fix)


def test_counts_that_a_config_does_not_name_are_passed_by() -> None:
    check_shares(3, [None, 6, None])
    check_shares(3, [None])


def test_widths_count_as_heads_do(tmp_path: Path) -> None:
    build(LlamaConfig(**{**LLAMA.to_dict(), "intermediate_size": 161})).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="use one process"):
        load_slices(tmp_path, Place(0, 2, 0), CPU)


def test_a_model_without_a_plan_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="no plan by which processes share a OPTForCausalLM") as caught:
        load_slices(folder / "opt", Place(0, 2, 0), CPU)
    assert_plain(str(caught.value))


@pytest.mark.parametrize(
    ("gpus", "device", "sentence"),
    [
        (0, "cuda", "There is no GPU here; use --device cpu."),
        (1, "auto", "There is 1 GPU here, and 2 processes need one each; use --device cpu, or fewer processes."),
    ],
)
def test_all_processes_tell_of_missing_gpus(
    gpus: int, device: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for rank in range(2):  # of four, two each on two machines
        for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UsageError) as caught, ranks.joined(place_of_torchrun(), device):
            pass
        assert str(caught.value) == sentence
        assert_plain(sentence)


# How they end


def _second_refuses(place: Place, _: object) -> None:
    with ranks.joined(place, "cpu"):
        if place.rank == 1:
            raise UsageError("Use something else.")
        ranks.gathered(None)  # waits for ever


def _second_dies(place: Place, _: object) -> None:
    with ranks.joined(place, "cpu"):
        if place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def _first_has_lost_the_second_before_it_is_gone(place: Place, _: object) -> None:
    if place.rank == 0:
        raise RuntimeError("connection closed by peer")
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


class _InterruptedWhenItComes:
    """Ctrl-C in a process that unpickles it, which is before its work begins."""

    def __reduce__(self) -> Any:
        return os.kill, (_Own(), signal.SIGINT)


class _Own:
    def __reduce__(self) -> Any:
        return os.getpid, ()


def _second_fails_at_work(place: Place, _: object) -> list[str]:
    def work() -> None:
        if place.rank == 1:
            raise KeyError("gone")

    with ranks.joined(place, "cpu"):
        try:
            ranks.together(work)
        except MackoError as error:
            return ranks.gathered(str(error))
    return []


def _rank(place: Place, _: object, __: object) -> int:
    return place.rank


def _speaks(place: Place, on_text: Any) -> list[int]:
    print("nobody shall see this")
    print("nor this", file=sys.stderr)
    if on_text is not None:
        on_text("one ")
        on_text("two")
    return [place.rank, int(os.environ["OMP_NUM_THREADS"])]


def test_a_refusal_in_one_process_ends_all() -> None:
    with pytest.raises(UsageError, match=r"^Use something else\.$"):
        in_processes(2, _second_refuses, on_text=None)


def test_a_process_that_is_killed_ends_all() -> None:
    with pytest.raises(MackoError, match="Process 1 of 2 was ended from outside"):
        in_processes(2, _second_dies, on_text=None)


def test_who_is_killed_is_named_even_if_another_tells_of_the_connection_sooner() -> None:
    with pytest.raises(MackoError, match="Process 1 of 2 was ended from outside"):
        in_processes(2, _first_has_lost_the_second_before_it_is_gone, on_text=None)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Ctrl-C reaches processes that start, on Windows")
def test_ctrl_c_is_not_heard_by_processes_that_are_starting(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_processes(2, _rank, _InterruptedWhenItComes(), on_text=None) == 0
    assert capfd.readouterr() == ("", "")


def test_work_together_fails_everywhere_if_it_fails_once() -> None:
    first, second = in_processes(2, _second_fails_at_work, on_text=None)
    assert first == second == "Process 1 of 2 failed (KeyError: 'gone'); see `macko doctor`."


def test_only_the_first_is_heard_and_threads_are_shared(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    said: list[str] = []
    assert in_processes(2, _speaks, on_text=said.append) == [0, 3]
    assert said == ["one ", "two"]
    assert capfd.readouterr() == ("", "")


# The command

MACKO = [sys.executable, "-m", "macko_llm"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "macko_llm"]


def _run(command: list[str], folder: Path, *more: str, exit_code: int = 0, stdin: str = "") -> tuple[str, str]:
    done = subprocess.run(
        [*command, "generate", str(folder / "demo"), "-n", "40", "--device", "cpu", *more],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def written_alone(folder: Path) -> str:
    return _run(MACKO, folder, "--prompt", PROMPT)[0]


def test_generate_writes_the_same_in_two_processes(folder: Path, written_alone: str) -> None:
    out, err = _run(MACKO, folder, "--prompt", PROMPT, "--tensor-parallel", "2")
    assert len(out) > 40
    assert out == written_alone
    assert err.startswith("prompt: ")
    assert len(err.splitlines()) == 1


def test_torchrun_starts_processes_that_share_a_prompt_from_stdin(folder: Path, written_alone: str) -> None:
    out, err = _run(TORCHRUN, folder, "--prompt", "-", stdin=PROMPT)
    assert out == written_alone
    assert sum(line.startswith("prompt: ") for line in err.splitlines()) == 1


def test_what_torchrun_has_started_cannot_be_another_number(folder: Path) -> None:
    _, err = _run(TORCHRUN, folder, "--prompt", PROMPT, "--tensor-parallel", "3", exit_code=1)
    sentences = [line for line in err.splitlines() if line.startswith("macko: ")]
    assert sentences == ["macko: torchrun has started 2 processes, and --tensor-parallel asks for 3; leave that out."]


def test_processes_that_torchrun_ends_say_nothing_of_it(folder: Path) -> None:
    _, err = _run(TORCHRUN, folder, "--prompt-file", str(folder / "none.txt"), exit_code=1)
    (sentence,) = [line for line in err.splitlines() if line.startswith("macko: ")]
    assert "none.txt cannot be read" in sentence


@pytest.mark.parametrize("more", [("--tensor-parallel", "4"), ("--tensor-parallel", "2", "--device", "cuda:1")])
def test_a_wrong_call_is_one_sentence(folder: Path, more: tuple[str, ...]) -> None:
    out, err = _run(MACKO, folder, "--prompt", PROMPT, *more, "--json", exit_code=WRONG_CALL)
    sentence = err.removeprefix("macko: ").removesuffix("\n")
    assert_plain(sentence)
    assert json.loads(out) == {"error": sentence}


def test_a_refusal_of_the_processes_is_one_sentence(folder: Path) -> None:
    out, err = _run(MACKO, folder, "--prompt", "x" * 2000, "--tensor-parallel", "2", exit_code=WRONG_CALL)
    assert out == ""
    assert_plain(err.removeprefix("macko: ").removesuffix("\n"))
