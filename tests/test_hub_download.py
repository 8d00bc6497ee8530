"""Models of the hub, downloaded by the hub's own client from a small server: what is fetched, as whom, and what is shown."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from families import FAMILIES, make_tokenizer, save_model
from helpers import quiet_transformers
from typer.testing import CliRunner

from macko_llm.cli.main import app
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

COMMIT = "c" * 40
OTHER_FORMS = ["original/model.safetensors", "onnx/config.json", "consolidated.00.safetensors", "pytorch_model.bin"]


@dataclass
class Hub:
    url: str
    sent: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)
    revisions: list[str] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """The packed model that `_serve` serves."""
    save_model(tmp_path / "dense", "llama")
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(tmp_path / "pruned", tmp_path / "model")
    with _serve(tmp_path / "model") as served:
        yield served


@pytest.fixture
def dense_hub(tmp_path: Path) -> Iterator[Hub]:
    """The dense model in two shards that `_serve` serves."""
    FAMILIES["llama"]().save_pretrained(tmp_path / "model", max_shard_size="300KB")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with _serve(tmp_path / "model") as served:
        yield served


@contextmanager
def _serve(folder: Path) -> Iterator[Hub]:
    """A folder as the model owner/name, whose one branch is "branch", with its weights in other forms besides."""
    for name in OTHER_FORMS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not needed")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if "/owner/name/" in path:  # the client asks for more, which is nobody's
                served.tokens.add(self.headers["Authorization"])
            if path.startswith("/api/models/owner/name/revision/"):
                served.revisions.append(path.rpartition("/")[2])
            name = re.sub(f"^/owner/name/resolve/(?:{COMMIT}|branch)/", "", path)
            if path == "/api/models/owner/name/revision/branch":
                self._send(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
            elif path == f"/api/models/owner/name/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self._send(json.dumps(entries).encode())
            elif name in files:
                served.sent.add(name)
                self._send(files[name])
            else:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def _send(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def _environment(hub: Hub, cache: Path) -> dict[str, str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TQDM_"))}
    return settings | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}


def _inspect(hub: Hub, cache: Path, *options: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    settings = _environment(hub, cache)
    call = [sys.executable, "-m", "macko_llm", "inspect", "owner/name", "--revision", "branch", "--json", *options]
    return subprocess.Popen(call, env=settings, stdout=subprocess.PIPE, stderr=stderr, text=True)


def _macko(hub: Hub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "macko_llm", *arguments]
    return subprocess.run(call, env=_environment(hub, cache), capture_output=True, text=True, timeout=120)


def test_what_is_needed_is_fetched_with_the_token(hub: Hub, tmp_path: Path) -> None:
    job = _inspect(hub, tmp_path / "home", "--token", "secret", "--cache-dir", str(tmp_path / "cache"))
    stdout, stderr = job.communicate()
    assert job.returncode == 0, stderr
    assert json.loads(stdout)["valid"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "macko.json"} <= hub.sent
    assert not hub.sent & set(OTHER_FORMS)
    assert hub.tokens == {"Bearer secret"}
    assert "secret" not in stdout + stderr
    assert (tmp_path / "cache" / "models--owner--name" / "snapshots" / COMMIT / "config.json").is_file()
    assert "Downloading" not in stderr  # bars are for terminals


def test_a_terminal_shows_how_far_a_download_is(hub: Hub, tmp_path: Path) -> None:
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))  # Windows has none
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a bar takes the width that there is
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        job = _inspect(hub, tmp_path / "home", stderr=end)
        os.close(end)
        shown = b""
        try:
            while part := screen.read(4096):
                shown += part
        except OSError:  # what Linux says when nobody holds the other end any more
            pass
        stdout, _ = job.communicate()
    assert job.returncode == 0, shown
    assert json.loads(stdout)["valid"]
    assert b"Downloading" in shown


FROM_PRETRAINED = """
import macko_llm, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("owner/name", revision="branch")
tokens = AutoTokenizer.from_pretrained("owner/name", revision="branch")("The fox", return_tensors="pt").input_ids
print(sum(type(module).__name__ == "MackoLinear" for module in model.modules()))
with torch.no_grad():
    for name in ("owner/name@branch", sys.argv[1]):
        print(torch.equal(model(tokens).logits, macko_llm.load(name, device="cpu")(tokens).logits))
"""


def test_plain_transformers_loads_a_branch_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    """A packed model by its hub id: that of the folder that was uploaded, and that of `macko_llm.load`."""
    run = subprocess.run(
        [sys.executable, "-c", FROM_PRETRAINED, str(tmp_path / "model")],
        env=_environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.split() == ["14", "True", "True"], run.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.sent
    assert not hub.sent & set(OTHER_FORMS)


SAVE = """
import macko_llm, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("owner/name", revision="branch")
model.save_pretrained(sys.argv[1])
"""


def test_a_model_of_the_hub_is_saved_with_what_transformers_did_not_download(hub: Hub, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SAVE, str(tmp_path / "saved")],
        env=_environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    for name in ("README.md", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    packed, saved = (json.loads((tmp_path / name / "macko.json").read_text()) for name in ("model", "saved"))
    assert saved.pop("files") == sorted(path.name for path in (tmp_path / "saved").iterdir())
    del packed["files"]
    assert saved == packed


def test_a_dry_run_of_pruning_fetches_no_weights(dense_hub: Hub, tmp_path: Path) -> None:
    options = ["--method", "magnitude", "-o", str(tmp_path / "out")]
    call = ["prune", "owner/name", "--revision", "branch", *options]
    planned = _macko(dense_hub, tmp_path / "home", *call, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= dense_hub.sent
    assert not {name for name in dense_hub.sent if name.endswith((".safetensors", ".bin"))}
    assert not (tmp_path / "out").exists()
    of_folder = _macko(dense_hub, tmp_path / "home", "prune", str(tmp_path / "model"), *options, "--dry-run")
    assert planned.stdout == of_folder.stdout
    assert "14 layers to 50.0% sparsity" in planned.stdout

    pruned = _macko(dense_hub, tmp_path / "home", *call, "--device", "cpu")  # what the dry run left out of the cache
    assert pruned.returncode == 0, pruned.stderr
    shards = {path.name for path in (tmp_path / "model").glob("*.safetensors")} - set(OTHER_FORMS)
    assert len(shards) == 2
    assert shards <= dense_hub.sent
    assert not dense_hub.sent & set(OTHER_FORMS)
    prune_checkpoint(tmp_path / "model", tmp_path / "local", PruneRecipe(method="magnitude"), device="cpu")
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "call",
    [
        "prune owner/name -o out",
        "prune owner/name -o out --dry-run",
        "tune owner/name -o out",
        "pack owner/name -o out",
        "unpack owner/name -o out",
        "generate owner/name -p hello",
        "chat owner/name",
        "eval-perplexity owner/name",
        pytest.param("eval owner/name --tasks arc_easy", marks=pytest.mark.lm_eval),
        "compare owner/name@branch owner/name@absent",
    ],
)
def test_each_command_asks_the_hub_for_the_revision(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, since it is about what a command asks for; those above show that the environment names the hub."""
    command, *arguments = call.split()
    if command != "compare":  # which takes a revision a model
        arguments += ["--revision", "absent"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    arguments = [str(tmp_path / word) if word == "out" else word for word in arguments]
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with _serve(tmp_path / "model") as hub, quiet_transformers():
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        run = CliRunner().invoke(app, [command, *arguments])
    assert set(hub.revisions) == ({"branch", "absent"} if command == "compare" else {"absent"})
    assert run.exit_code == 1
    assert "owner/name@absent, and the hub did not give a model" in run.stderr
