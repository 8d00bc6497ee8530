"""vLLM's engine generates from a packed checkpoint, in processes that never import macko by name, and transformers agrees."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("vllm.version", reason="needs vLLM: make test-vllm")

from transformers import AutoModelForCausalLM

GPUS = torch.cuda.device_count()
if not GPUS and importlib.util.find_spec("vllm._C") is None:
    pytest.skip("needs a GPU, or vLLM's build for CPUs", allow_module_level=True)

PROMPTS = ["Once upon a time", "The little dog", "One day, Tom"]
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    llm = LLM(model=sys.argv[1], max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=2**27, **arguments)
    settings = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    answers = llm.generate(json.loads(sys.argv[3]), settings)
    print("answers", json.dumps([
        [answer.prompt_token_ids, [[t, p[t].logprob] for t, p in zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs)]]
        for answer in answers
    ]))
"""


@pytest.mark.parametrize(
    ("ranks", "eager"), [(1, True), (2, True), (1, False)], ids=["one rank", "two ranks", "compiled"]
)
def test_the_engine_gives_the_tokens_and_probabilities_of_the_dense_model(
    ranks: int, eager: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    if 0 < GPUS < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    dense, packed = folders
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    arguments = {
        "tensor_parallel_size": ranks,
        "enforce_eager": eager,
        "dtype": "float16" if GPUS else "float32",
        "seed": 0,
    }
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    if not GPUS and ranks == 2:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # which vLLM asks for where there is one NUMA node
    run = subprocess.run(
        [sys.executable, str(script), str(packed), json.dumps(arguments), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("answers ")]
    assert lines, run.stdout[-3000:] + run.stderr[-3000:]

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tolerance = 0.05 if GPUS else 1e-3
    for prompt, generated in json.loads(lines[0].removeprefix("answers ")):
        tokens = [token for token, _ in generated]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        of_all = F.log_softmax(logits, dim=-1)
        of_tokens = of_all[torch.arange(len(tokens)), tokens]
        assert len(tokens) == 24
        torch.testing.assert_close(torch.tensor([p for _, p in generated]), of_tokens, rtol=0, atol=tolerance)
        assert (of_all.max(dim=-1).values - of_tokens).max() <= tolerance
