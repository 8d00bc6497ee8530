"""`macko generate`: prompts, sampling, several texts, where a text ends."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import macko, macko_json, write_models_and_texts
from helpers import quiet_transformers
from transformers import PreTrainedModel

from macko_llm import loading
from macko_llm.linear import MackoLinear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models_and_texts(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    with quiet_transformers():
        yield


@pytest.mark.parametrize("model", ["dense", "packed"])
def test_generate(model: str) -> None:
    call = ["generate", model, "--prompt", "Once upon a time", "--max-new-tokens", 12, "--dtype", "float32"]
    content = macko_json(*call)
    assert content.keys() == {
        "text",
        "prompt_tokens",
        "new_tokens",
        "prefill_tokens_per_second",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert content["new_tokens"] <= 12
    result = macko(*call)
    assert result.stdout == content["text"] + "\n"
    summary = r"prompt: \d+ tokens, [\d.]+ tokens/s; decode: \d+ tokens, [\d.]+ tokens/s; peak memory: [\d.]+ [MG]B\n"
    assert re.fullmatch(summary, result.stderr)


def test_sampling_is_seeded() -> None:
    call = ["generate", "packed", "--prompt", "Once", "--max-new-tokens", 20, "--temperature", 1.5, "--top-p", 0.95]
    texts = [macko(*call, "--top-k", 200, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_min_p_and_the_repetition_penalty_arrive() -> None:
    """A min-p of 1 leaves the most probable token, which is greedy; a penalty changes what greedy says."""
    call = ["generate", "packed", "--prompt", "Once", "--max-new-tokens", 20, "--dtype", "float32"]
    greedy = macko(*call).stdout
    assert macko(*call, "--temperature", 1.5, "--min-p", 1).stdout == greedy
    assert macko(*call, "--repetition-penalty", 1.0).stdout == greedy
    assert macko(*call, "--repetition-penalty", 1e3).stdout != greedy


def test_the_prompt_from_stdin() -> None:
    """The file's last line end is no part of the prompt; all else is."""
    for prompt in ("Once upon a time", "Two\nlines\n"):
        call = ["generate", "packed", "--max-new-tokens", 5, "--json"]
        piped = macko(*call, "--prompt", "-", stdin=prompt + "\n")
        given = macko(*call, "--prompt", prompt)
        for key in ("text", "prompt_tokens"):
            assert json.loads(piped.stdout)[key] == json.loads(given.stdout)[key]


def test_prompts_from_files_come_after_those_given_as_text(folder: Path) -> None:
    (folder / "owl.txt").write_bytes("Zwölf Eulen\nsaßen\n".encode())
    (folder / "fox.txt").write_bytes(b"The fox")
    long = ["--prompt", "Once", "--prompt", "Zwölf Eulen\nsaßen", "--prompt", "The fox", "--max-new-tokens", 5]
    short = ["-f", "owl.txt", "-p", "Once", "--prompt-file", folder / "fox.txt", "-n", 5]
    assert macko("generate", "packed", *short).stdout == macko("generate", "packed", *long).stdout


@pytest.mark.parametrize("prompts", [1, 3])
def test_packed_layers_are_laid_out_for_as_many_texts_as_there_are_prompts(
    prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, models = loading.load, []

    def remember(*arguments: Any, **options: Any) -> PreTrainedModel:
        models.append(load(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(loading, "load", remember)
    macko("generate", "packed", *["-p", "Once"] * prompts, "-n", 2, "--device", "cpu")
    layers = [module for module in models[0].modules() if isinstance(module, MackoLinear)]
    assert {(layer.layout, layer.tokens) for layer in layers} == {("auto", prompts)}


def test_several_prompts() -> None:
    """Each text is what its prompt gives alone; the summary is about all of them."""
    call = ["generate", "packed", "--max-new-tokens", 12, "--dtype", "float32"]
    prompts = ["Once upon a time", "The fox", "Every morning the old owl told"]
    alone = [macko_json(*call, "--prompt", prompt) for prompt in prompts]
    several = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    together = json.loads(macko(*call, *several, "--json").stdout)
    for key in ("text", "prompt_tokens", "new_tokens"):
        assert [one[key] for one in together] == [one[key] for one in alone]
    result = macko(*call, *several)
    assert result.stdout == "".join(f"--- prompt {n} ---\n{one['text']}\n" for n, one in enumerate(alone, 1))
    read, written = (sum(one[key] for one in alone) for key in ("prompt_tokens", "new_tokens"))
    assert f"prompt: {read} tokens" in result.stderr
    assert f"decode: {written} tokens, " in result.stderr
    macko(*call, "--prompt", "-", "--prompt", "-", exit_code=2)


def test_stop_strings() -> None:
    call = ["generate", "packed", "--prompt", "Once", "--max-new-tokens", 30, "--dtype", "float32"]
    text = macko_json(*call)["text"]
    cut = macko(*call, "--stop", text[9:12], "--stop", "never said").stdout
    assert cut == text[: text.index(text[9:12])] + "\n"
    macko(*call, "--stop", "", exit_code=2)


def test_chat(folder: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (folder / "dense" / "chat_template.jinja").write_text(template)
    try:
        call = ["generate", "dense", "--prompt", "Hi", "--chat", "--max-new-tokens", 2]
        short = macko_json(*call)["prompt_tokens"]
        assert macko_json(*call, "--system-prompt", "Be brief")["prompt_tokens"] > short
    finally:
        (folder / "dense" / "chat_template.jinja").unlink()
    macko("generate", "dense", "--prompt", "Hi", "--chat", exit_code=2)
