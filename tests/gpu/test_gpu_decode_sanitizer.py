"""Memcheck on whole decoded tokens: kernels that start early, one behind the other, over one set of buffers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("kernels")

# Without a graph: a capture needs the caching allocator, which would hide where a tensor ends.
TOKENS = """
import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from macko_llm import models
from macko_llm.layouts import canonical
from macko_llm.engines.decoder import Decoder
from macko_llm.linear import MackoLinear, arrange_group, group_of

torch.manual_seed(0)
config = LlamaConfig(
    **{"vocab_size": 323, "hidden_size": 1024, "intermediate_size": 1032, "num_hidden_layers": 1},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True},
)
model = AutoModelForCausalLM.from_config(config).eval()
with torch.inference_mode():
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=0.1).add_(1)
        else:
            least = parameter.normal_(std=0.04).abs().topk(parameter.shape[1] // 2, largest=False).indices
            parameter.scatter_(1, least, 0)
    model.half()
    reference = copy.deepcopy(model).float()
    dense, packed = (copy.deepcopy(model).cuda() for _ in range(2))
    linears = {**models.prunable_linears(packed), "lm_head": packed.lm_head}
    for names in models.in_groups(linears, packed):
        layers = []
        for name in names:
            layers.append(MackoLinear.from_matrix(canonical.pack(linears[name].weight), linears[name].bias))
            packed.set_submodule(name, layers[-1])
        arrange_group(layers)
        assert len(names) == 1 or group_of(layers) is not None
    for used, texts, capacity in ((packed, 1, 600), (packed, 3, 9), (dense, 1, 9), (dense, 3, 600)):
        keys, values = (torch.randn(texts, 2, capacity, 128, device="cuda").half() for _ in "kv")
        decoder = Decoder(used, [keys], [values])
        assert (decoder._splits > 1) == (capacity > 512)
        tokens = torch.randint(5, 323, (texts, 4))
        exact = reference(input_ids=tokens).logits
        decoder.slot.fill_(-1)
        for step in range(4):
            decoder.token.copy_(tokens[:, step])
            for launch in decoder.launches:
                launch.run()
            decoder.greedy()
            torch.cuda.synchronize()
            logits = decoder.logits.cpu()
            assert (logits - exact[:, step]).norm() < 0.02 * exact[:, step].norm()
            chosen = logits.gather(1, decoder.token.cpu()[:, None])
            assert torch.equal(chosen, logits.amax(dim=-1, keepdim=True))
        # Texts that begin at different slots, up to the last one of the cache.
        decoder.first.copy_(torch.arange(texts) * 2)
        decoder.slot.fill_(capacity - 3)
        for _ in range(2):
            for launch in decoder.launches:
                launch.run()
            decoder.greedy()
        torch.cuda.synchronize()
        assert decoder.slot.item() == capacity - 1
        assert decoder.logits.isfinite().all()
        assert not decoder._tickets.any()
print("all tokens are right")
"""


def test_compute_sanitizer_finds_nothing_in_whole_tokens(tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on PATH")
    file = tmp_path / "tokens.py"
    file.write_text(TOKENS)
    # Torch asks CUDA things that it may refuse, so only what kernels do counts.
    options = ["--tool", "memcheck", "--error-exitcode", "99", "--report-api-errors", "no"]
    command = [sanitizer, *options, sys.executable, str(file)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all tokens are right" in run.stdout
