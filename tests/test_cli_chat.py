"""`macko chat`: from a pipe, as its other end sees it, and at a terminal."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import quiet_transformers
from typer.testing import CliRunner, Result

from macko_llm import generation
from macko_llm.cli.main import app
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.loading import load
from macko_llm.models import load_tokenizer
from macko_llm.text import encode_prompt, encode_text

TEMPLATE = "<|bos|>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TIMEOUT = 240
PATIENCE = 10
NOTICE = "macko: The model has no chat template, so it continues what you write.\n"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template, which has no meaning to it."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(MODEL_FOLDER, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chat(model: Path, stdin: str, *arguments: object, exit_code: int = 0) -> Result:
    call = ["chat", str(model), "--device", "cpu", *map(str, arguments)]
    result = CliRunner().invoke(app, call, input=stdin)
    assert result.exit_code == exit_code, result.output
    return result


def answers(folder: Path, *prompts: str, new: int, template: bool = True) -> list[str]:
    """What the model makes of whole texts, each written out by hand."""
    model, tokenizer = load(folder, device="cpu"), load_tokenizer(folder)
    return [
        generation.generate(
            model,
            tokenizer,
            encode_text(tokenizer, prompt, special_tokens=False) if template else encode_prompt(tokenizer, prompt),
            max_new_tokens=new,
        ).text
        for prompt in prompts
    ]


def test_turns_of_a_pipe_are_answered_in_order_and_remembered(chatty: Path) -> None:
    beginning = "<|bos|>system: Be kind\nuser: Who is the fox?\nassistant:"
    (first,) = answers(chatty, beginning, new=12)
    after = f"<|bos|>system: Be kind\nuser: Who is the fox?\nassistant: {first}\nuser: And the owl?\nassistant:"
    (second,) = answers(chatty, after, new=12)
    # /reset forgets the turns and not the system; what stands after /exit is not read.
    call = "Who is the fox?\n\nAnd the owl?\n/reset\nWho is the fox?\n/exit\nnever"
    result = chat(chatty, call, "--system", "Be kind", "-n", 12)
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert first != second
    assert "macko: The conversation is forgotten.\n" in result.stderr
    assert (
        result.stderr.count("macko: The answer was cut at --max-new-tokens 12; give a larger number for longer ones.\n")
        == 3
    )


def test_a_model_without_a_template_continues_what_both_wrote() -> None:
    (first,) = answers(MODEL_FOLDER, "Once upon a time", new=10, template=False)
    (second,) = answers(MODEL_FOLDER, f"Once upon a time{first}\nThe owl", new=10, template=False)
    result = chat(MODEL_FOLDER, "Once upon a time\nThe owl\n", "-n", 10)
    assert (result.stdout, result.stderr) == (f"{first}\n{second}\n", NOTICE)
    refused = chat(MODEL_FOLDER, "Hi\n", "--system", "Be kind", exit_code=2)
    assert refused.stdout == ""
    assert "no chat template, where a system prompt would stand; drop --system" in refused.stderr


def test_the_oldest_turns_are_forgotten_where_there_is_no_room(chatty: Path) -> None:
    """Each once, and for good: what is answered, and what is told, are those of prompts that are written out here."""
    lines = [*("the fox and the owl " * 24 + str(number) for number in range(4)), "and the hen " * 80]
    said = chat(chatty, "".join(f"{line}\n" for line in lines), "-n", 8)
    tokenizer = load_tokenizer(chatty)
    turns: list[str] = []
    written, told = [], []
    for line in lines:
        before = len(turns)
        turns.append(f"user: {line}\nassistant:")
        while len(tokenizer("<|bos|>" + "".join(turns), add_special_tokens=False)["input_ids"]) > 512 - 8:
            del turns[0]
        told.append(before + 1 - len(turns))
        (answer,) = answers(chatty, "<|bos|>" + "".join(turns), new=8)
        written.append(answer)
        turns[-1] += f" {answer}\n"
    assert said.stdout == "".join(f"{answer}\n" for answer in written)
    assert {1, 2} <= set(told)
    sentences = ["the oldest turn is" if count == 1 else f"the {count} oldest turns are" for count in told if count]
    longer = "macko: The conversation is longer than the model's 512 positions; "
    assert [line for line in said.stderr.splitlines() if "forgotten" in line] == [
        f"{longer}{sentence} forgotten." for sentence in sentences
    ]


def test_a_line_too_long_for_the_model_ends_a_pipe(chatty: Path) -> None:
    result = chat(chatty, "Hi\n" + "word " * 600 + "\nHi\n", "-n", 3, exit_code=2)
    assert result.stdout.count("\n") == 1
    assert "tokens, and the model has 509 before its answer; say it shorter" in result.stderr


@pytest.mark.parametrize("new", [511, 512, 9999])
def test_answers_that_leave_no_room_for_a_line_are_refused_before_one_is_read(new: int, chatty: Path) -> None:
    said = (
        f"macko: --max-new-tokens is {new}, which leaves no room for what is said before in the model's 512 positions; "
    )
    assert chat(chatty, "Hi\n", "-n", new, exit_code=2).stderr == f"{said}use a smaller --max-new-tokens.\n"
    with_system = chat(chatty, "Hi\n", "-n", new, "--system", "Be kind", exit_code=2).stderr
    assert with_system == f"{said}use a smaller --max-new-tokens, or say less with --system.\n"


def test_a_tokenizer_of_another_model_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(MODEL_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 10  # which the weights do not fit, either
    (folder / "config.json").write_text(json.dumps(config))
    said = chat(folder, "Hi\n", exit_code=1).stderr
    assert "but the model knows only 10; use the tokenizer that belongs to the model." in said


def test_a_seed_gives_the_conversation_again_and_other_words_to_each_answer(chatty: Path) -> None:
    call = ["-n", 8, "--temperature", 1.5, "--seed", 3]
    script = "Hi\n/reset\nHi\n"
    first, again = (chat(chatty, script, *call).stdout for _ in range(2))
    assert first == again
    one, other = first.splitlines()[:1], first.splitlines()[-1:]
    assert one != other
    assert chat(chatty, script, *call[:-1], 2**64 - 1).stdout.endswith(chat(chatty, "Hi\n", *call[:-1], 0).stdout)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_an_answer_comes_before_the_next_line_is_sent() -> None:
    """Programs that talk through pipes wait for one another."""
    call = [sys.executable, "-m", "macko_llm", "chat", str(MODEL_FOLDER), "-n", "5"]
    process = subprocess.Popen(
        call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for line in ("Once upon a time", "The owl"):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        assert process.stdout.readline().strip()
    rest, messages = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, rest, messages) == (0, "", NOTICE)


def test_what_an_output_has_no_letters_for_is_said_in_a_sentence(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(MODEL_FOLDER, odd)
    tokens = json.loads((odd / "tokenizer.json").read_text())
    tokens["decoder"] = {
        "type": "Sequence",
        "decoders": [tokens["decoder"], {"type": "Replace", "pattern": {"String": "a"}, "content": "ä"}],
    }
    (odd / "tokenizer.json").write_text(json.dumps(tokens))
    call = [sys.executable, "-m", "macko_llm", "chat", str(odd), "-n", "9"]
    environment = {**_environment(), "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(call, input="Once upon\n", capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    assert ran.returncode == 1
    assert ran.stderr == f"{NOTICE}macko: The output's encoding ascii has no '\\xe4'; set PYTHONIOENCODING=utf-8.\n"


class Terminal:
    """The user's end of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, text: str, again: str = "") -> str:
        """What is shown until `text`, which is taken off; whoever waits long types `again`."""
        end, next_try = time.monotonic() + TIMEOUT, time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.descriptor], [], [], 1)[0]:
                self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
            elif again and time.monotonic() > next_try:
                self.type(again)
                next_try += PATIENCE
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def interrupt(self, text: str) -> None:
        """Ctrl-C, until `text` is shown.

        A busy machine may lose one: input() does between reading a key and waiting for the next, and terminals drop
        what is on its way to either side.
        """
        self.type("\x03")
        self.wait_for(text, again="\x03")


@contextmanager
def _at_terminal(*arguments: str) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    master, slave = pty.openpty()

    def as_foreground() -> None:
        os.setsid()
        import fcntl
        import termios

        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # Ctrl-C comes from the terminal
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, "-m", "macko_llm", "chat", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**_environment(), "TERM": "dumb"},
        preexec_fn=as_foreground,
    )
    os.close(slave)
    try:
        yield Terminal(master), process
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_conversation(tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(MODEL_FOLDER, endless)
    for name in ("generation_config.json", "config.json"):  # it never stops by itself
        content = (endless / name).read_text()
        (endless / name).write_text(
            content.replace('"eos_token_id": 2', '"eos_token_id": 2047').replace(
                '"max_position_embeddings": 512', '"max_position_embeddings": 100000'
            )
        )
    with _at_terminal(str(endless), "-n", "90000") as (terminal, process):
        assert "/reset forgets the conversation" in terminal.wait_for("> ")
        terminal.type("Once upon a time\n")
        terminal.wait_for("Mallowmere")  # it is on its way
        terminal.interrupt("> ")
        terminal.type("half a li")
        terminal.wait_for("half a li")
        terminal.interrupt("/exit or Ctrl-D ends the conversation")
        terminal.wait_for("> ")
        terminal.type("/reset\n")
        terminal.wait_for("The conversation is forgotten.", again="/reset\n")
        terminal.wait_for("> ")
        assert process.poll() is None
        terminal.type("\x04")
        assert process.wait(TIMEOUT) == 0


def test_bytes_that_are_no_text_are_no_end_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as where the locale is one of UTF-8
    with _at_terminal(str(MODEL_FOLDER), "-n", "3") as (terminal, process):
        terminal.wait_for("> ")
        os.write(terminal.descriptor, b"bad \xff\n")
        terminal.wait_for("What was typed is not utf-8 text; type it again.")
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert process.wait(TIMEOUT) == 0


def test_a_line_too_long_is_no_end_at_a_terminal() -> None:
    with _at_terminal(str(MODEL_FOLDER), "-n", "500") as (terminal, process):
        terminal.wait_for("> ")
        terminal.type("the fox and the owl and the hen and the cat\n")
        terminal.wait_for("say it shorter")
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert process.wait(TIMEOUT) == 0
