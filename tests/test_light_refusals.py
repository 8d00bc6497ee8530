"""Refusals that need no model's numbers come before torch and transformers are imported, which takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from macko_llm import defaults, dtypes, refusals
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.errors import UsageError

HEAVY = ("torch", "transformers", "datasets", "accelerate")
# Every call in a fork of one process that was refused a call itself, since starting Python for each takes longer.
EVERY_CALL = f"""
import contextlib, json, os, sys
from macko_llm.cli.main import app

with contextlib.suppress(SystemExit):
    app(["inspect", "nowhere"])  # imports what any call does
assert not {{*{HEAVY}}} & sys.modules.keys()

codes = []
for number, call in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{{number}}.{{stream}}", os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(sys.argv[2])
        try:
            sys.exit(app(call.split()))
        finally:
            print(*({{*{HEAVY}}} & sys.modules.keys()))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""

PACKED = {"quantization_config": {"quant_method": "macko"}}
GPTQ = {"quantization_config": {"quant_method": "gptq"}}
WRONG_CALL, FAILED_JOB = 2, 1

CALLS = [
    # the model
    ("pack nowhere -o out", FAILED_JOB, "There is no model nowhere; name an existing folder or a hub id"),
    ("generate nowhere --prompt A", FAILED_JOB, "There is no model nowhere"),
    ("inspect nowhere", FAILED_JOB, "There is no model nowhere"),
    ("unpack ./nowhere/at/all -o out", FAILED_JOB, "There is no model ./nowhere/at/all"),
    ("prune empty -o out", FAILED_JOB, "empty has no config.json"),
    ("eval-perplexity empty", FAILED_JOB, "empty has no config.json"),
    ("bench quality empty", FAILED_JOB, "empty has no config.json"),
    ("generate broken --prompt A", FAILED_JOB, "config.json cannot be read as JSON"),
    ("eval-perplexity broken", FAILED_JOB, "config.json cannot be read as JSON"),
    ("prune broken -o out", FAILED_JOB, "config.json cannot be read as JSON"),
    ("pack broken -o out", FAILED_JOB, "config.json cannot be read as JSON"),
    ("inspect broken", FAILED_JOB, "config.json cannot be read as JSON"),
    ("bench decode broken", FAILED_JOB, "config.json cannot be read as JSON"),
    ("bench quality broken", FAILED_JOB, "config.json cannot be read as JSON"),
    ("prune packed -o out", WRONG_CALL, "packed is packed; unpack it first"),
    ("pack packed -o out", WRONG_CALL, "packed is packed; give"),
    ("pack gptq -o out", WRONG_CALL, "gptq is quantized with gptq"),
    ("prune gptq -o out", WRONG_CALL, "gptq is quantized with gptq"),
    ("unpack dense -o out", WRONG_CALL, "dense is not packed"),
    ("inspect dense", WRONG_CALL, "dense is not packed"),
    ("bench decode packed --sparsity 0.5", WRONG_CALL, "packed is packed and keeps its sparsity"),
    ("tune nowhere -o out --dataset file", FAILED_JOB, "There is no model nowhere"),
    ("tune packed -o out --dataset file", WRONG_CALL, "packed is packed; unpack it first"),
    ("tune gptq -o out --dataset file", WRONG_CALL, "gptq is quantized with gptq"),
    # the output
    ("tune dense -o full --dataset file", WRONG_CALL, "full is not empty"),
    ("tune dense -o dense --dataset file --overwrite", WRONG_CALL, "dense holds the input model"),
    ("prune dense -o dense", WRONG_CALL, "dense"),
    ("pack dense -o full", WRONG_CALL, "full is not empty"),
    ("pack dense -o full --overwrite", WRONG_CALL, "full is not a model folder"),
    ("unpack packed -o full", WRONG_CALL, "full is not empty"),
    ("unpack packed -o file", WRONG_CALL, "file is a file"),
    # values
    ("prune dense -o out --sparsity 1.5", WRONG_CALL, "The sparsity 1.5 is outside"),
    ("prune dense -o out --recipe nowhere.toml", WRONG_CALL, "nowhere.toml cannot be read"),
    ("prune dense -o out --pattern 4:2", WRONG_CALL, "There is no pattern '4:2'"),
    ("prune dense -o out --method random", WRONG_CALL, "There is no pruning method 'random'; use wanda, magnitude"),
    ("prune dense -o out --pattern 2:4 --allocation owl", WRONG_CALL, "2:4 fixes the sparsity of every layer"),
    ("prune dense -o out --method magnitude --update admm --calibration no.txt", FAILED_JOB, "no.txt"),
    ("prune dense -o out --dtype float8", WRONG_CALL, "The dtype float8 is not supported"),
    ("prune dense -o out --device 0", WRONG_CALL, "The device '0' is not available"),
    ("prune dense -o out --pack --dtype float32", WRONG_CALL, "The dtype float32 cannot be packed"),
    ("prune dense -o out --hidden-states moon", WRONG_CALL, "There is no place 'moon' for hidden states"),
    ("tune dense -o out --steps 0", WRONG_CALL, "steps is 0; use 1 or more"),
    ("tune dense -o out --learning-rate -1", WRONG_CALL, "learning_rate is -1.0"),
    ("tune dense -o out --learning-rate nan", WRONG_CALL, "learning_rate is nan"),
    ("tune dense -o out --warmup 1", WRONG_CALL, "warmup is 1"),
    ("tune dense -o out --dataset no.txt", FAILED_JOB, "no.txt"),
    ("tune dense -o out --dataset c4 --split test", WRONG_CALL, "c4 is read by its published rule"),
    ("tune dense -o out --dataset file --dtype float8", WRONG_CALL, "The dtype float8 is not supported"),
    ("tune dense -o out --dataset file --device 0", WRONG_CALL, "The device '0' is not available"),
    ("pack dense -o out --dtype float32", WRONG_CALL, "The dtype float32 cannot be packed"),
    ("pack dense -o out --max-shard-size big", WRONG_CALL, "'big' is not a size"),
    ("unpack packed -o out --max-shard-size 0", WRONG_CALL, "'0' is not a size"),
    ("generate dense --prompt A --max-new-tokens 0", WRONG_CALL, "0 new tokens were asked for"),
    ("generate dense --prompt A --temperature -1", WRONG_CALL, "The temperature -1.0 is not possible"),
    ("generate dense --prompt A --dtype int8", WRONG_CALL, "The dtype int8 is not supported"),
    ("generate dense --prompt A --device cuda:x", WRONG_CALL, "The device 'cuda:x' is not available"),
    ("generate dense --prompt A --layout spiral", WRONG_CALL, "There is no layout 'spiral'; use auto, sliced or tiled"),
    ("generate dense --prompt A --layout tiled", WRONG_CALL, "dense is not packed; make a packed checkpoint"),
    ("generate packed --prompt A --tensor-parallel 0", WRONG_CALL, "0 processes can do nothing"),
    ("generate packed --prompt A --tensor-parallel 4", WRONG_CALL, "widths evenly; use 1 or 2 processes"),
    ("generate packed --prompt A --tensor-parallel 2 --device cuda:1", WRONG_CALL, "a device of its own, and cuda:1"),
    ("chat nowhere", FAILED_JOB, "There is no model nowhere"),
    ("chat dense -n 0", WRONG_CALL, "0 new tokens were asked for"),
    ("chat dense --temperature -1", WRONG_CALL, "The temperature -1.0 is not possible"),
    ("chat dense --layout tiled", WRONG_CALL, "dense is not packed; make a packed checkpoint"),
    ("eval-perplexity dense --seqlen 1", WRONG_CALL, "Windows of length 1 predict nothing; use --seqlen 2"),
    ("eval-perplexity dense --seqlen 8 --stride 9", WRONG_CALL, "use --stride from 1 to 8"),
    ("eval-perplexity dense --limit 0", WRONG_CALL, "A limit of 0 windows"),
    ("eval-perplexity dense --dtype int8", WRONG_CALL, "The dtype int8 is not supported"),
    ("eval dense --tasks arc_easy,", WRONG_CALL, "A task has no name"),
    ("eval dense --tasks arc_easy --num-fewshot -1", WRONG_CALL, "use --num-fewshot 0 or more"),
    ("eval dense --tasks arc_easy --limit 0", WRONG_CALL, "A limit of 0 is no number of examples"),
    ("eval dense --tasks arc_easy --limit 1.5", WRONG_CALL, "use --limit 1 or more, or a share below 1"),
    ("eval dense --tasks arc_easy --limit nan", WRONG_CALL, "A limit of nan is no number of examples"),
    ("eval dense --tasks arc_easy --batch-size 0", WRONG_CALL, "Batches of 0 texts evaluate nothing"),
    (
        "eval dense --tasks arc_easy --include-path nowhere",
        WRONG_CALL,
        "There is no folder nowhere; name one with YAML",
    ),
    ("eval dense --tasks arc_easy --dtype int8", WRONG_CALL, "The dtype int8 is not supported"),
    ("eval dense --tasks arc_easy --device 0", WRONG_CALL, "The device '0' is not available"),
    ("eval dense", WRONG_CALL, "Missing option '--tasks'"),
    ("eval-perplexity dense --reference nowhere", FAILED_JOB, "There is no model nowhere"),
    ("compare dense", WRONG_CALL, "One model compares to nothing; name two or more"),
    (
        "compare dense packed --dataset file --new-tokens 1",
        WRONG_CALL,
        "takes two new tokens, not 1; use --new-tokens 2",
    ),
    ("compare dense packed --dataset no.txt", FAILED_JOB, "no.txt"),
    ("compare dense nowhere", FAILED_JOB, "There is no model nowhere"),
    ("compare dense packed --limit 0", WRONG_CALL, "A limit of 0 windows"),
    ("compare dense packed --plot speed.pdf", WRONG_CALL, "speed.pdf is not a PNG file"),
    ("bench decode", WRONG_CALL, "Give either a MODEL or the name of a shape"),
    ("bench decode --config huge", WRONG_CALL, "There is no shape 'huge'"),
    ("bench decode --config tiny --sparsity 2", WRONG_CALL, "The sparsity 2 is outside"),
    ("bench decode --config tiny --batch 0", WRONG_CALL, "There is nothing to measure with --batch 0"),
    ("bench spmv --shape 4096", WRONG_CALL, "'4096' is not a shape"),
    ("bench spmv --shape 99999x99999", WRONG_CALL, "use a smaller --shape"),
    ("bench spmv --tokens 0", WRONG_CALL, "'0' is not a number of tokens"),
    ("bench spmv --layout spiral", WRONG_CALL, "There is no layout 'spiral'; use auto, sliced or tiled"),
    ("bench spmv --dtype float32", WRONG_CALL, "There is no benchmark in float32"),
    ("bench quality --sparsity 1", WRONG_CALL, "The sparsity 1.0 is outside"),
    ("bench quality --nsamples 0", WRONG_CALL, "nsamples is 0"),
    ("bench prune", WRONG_CALL, "Give either a MODEL or the name of a shape"),
    ("bench prune --random-weights", WRONG_CALL, "Give either a MODEL or the name of a shape"),
    ("bench prune dense --config tiny", WRONG_CALL, "Give either a MODEL or the name of a shape"),
    ("bench prune packed", WRONG_CALL, "packed is packed; unpack it first"),
    ("bench prune --config huge --blocks 2", WRONG_CALL, "There is no shape 'huge'"),
    (
        "bench prune --config tiny --blocks 1",
        WRONG_CALL,
        "1 blocks do not tell what 2 would take; use --blocks from 2 to 2",
    ),
    ("bench prune --config llama2-70b --blocks 81", WRONG_CALL, "use --blocks from 2 to 80"),
    ("bench prune dense --random-weights --blocks 2", WRONG_CALL, "Only a shape can do with fewer blocks"),
    ("bench prune --config tiny --method random", WRONG_CALL, "There is no pruning method 'random'"),
    ("bench prune --config tiny --hidden-states here", WRONG_CALL, "There is no place 'here' for hidden states"),
    ("bench prune --config tiny --device 0", WRONG_CALL, "The device '0' is not available"),
    (
        "bench prune --config tiny --folder nowhere",
        WRONG_CALL,
        "There is no folder nowhere; make it, or leave --folder out",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of a config.json each, under the names that the calls use: nothing else of them is looked at."""
    folder = tmp_path_factory.mktemp("models")
    dense = json.loads((MODEL_FOLDER / "config.json").read_text())
    for name, more in {"dense": {}, "packed": PACKED, "gptq": GPTQ}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**dense, **more}))
    for name in ("empty", "full", "broken"):
        (folder / name).mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "broken" / "config.json").write_text("{")
    (folder / "file").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """The exit code of each call, and what it wrote to stdout and stderr."""
    said, calls = tmp_path_factory.mktemp("said"), [call for call, *_ in CALLS]
    command = [sys.executable, "-c", EVERY_CALL, json.dumps(calls), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=said)
    return {
        call: (code, *((said / f"{number}.{stream}").read_text() for stream in (1, 2)))
        for number, (call, code) in enumerate(zip(calls, json.loads(run.stdout), strict=True))
    }


@pytest.mark.parametrize(("call", "code", "sentence"), CALLS)
def test_a_refusal_comes_before_torch_is_imported(
    call: str, code: int, sentence: str, folder: Path, answers: dict[str, tuple[int, str, str]]
) -> None:
    exit_code, stdout, stderr = answers[call]
    assert (exit_code, len(stderr.splitlines())) == (code, 1), stderr
    assert sentence in stderr
    assert stdout.split() == []
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["auto", *defaults.MODEL_DTYPE_NAMES])
def test_dtypes_that_are_not_refused_can_be_loaded(name: str) -> None:
    refusals.check_dtype(name)
    assert name == "auto" or str(dtypes.MODEL_DTYPES[name]) == f"torch.{name}"


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps", "xpu:0"])
def test_a_device_that_some_machine_has_is_left_to_torch(name: str) -> None:
    refusals.check_device(name)


@pytest.mark.parametrize("name", ["", "cuda:", "cuda:-1", "cuda 1", "CUDA", "cuda:1:2"])
def test_a_name_that_no_device_has_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not available; use cpu"):
        refusals.check_device(name)


@pytest.mark.parametrize("names", [[], [""], ["arc_easy", ""]])
def test_tasks_without_a_name_are_refused(names: list[str]) -> None:
    with pytest.raises(UsageError, match="use --tasks with names"):
        refusals.check_tasks(names, None)
