"""compute-sanitizer on every kernel: memory errors and races."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiled_helpers import skip_without_tensor_cores

pytestmark = pytest.mark.usefixtures("kernels")

SMALL_SET = """
import torch
from macko_llm import native
from macko_llm.layouts import canonical
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.sliced_plan import _MAX_TRIES, DELTA_BITS, Shape, plan_rows

torch.manual_seed(0)
device = torch.device("cuda")
for rows, cols in ((1, 1), (33, 172), (61, 1031)):
    for dtype in (torch.float16, torch.bfloat16):
        weight = (torch.randint(1, 3, (rows, cols)) * (torch.rand(rows, cols) < 0.5)).to(dtype)
        x = torch.randint(-1, 2, (4, cols))
        exact = (x.double() @ weight.double().T).to(dtype)
        there, x = weight.to(device), x.to(device, dtype)
        members = [rows // 2, rows - rows // 2]  # a group; one row is two members, of which one has none
        stored = canonical.pack(there)
        canonical.validate(stored, "the matrix")
        assert torch.equal(canonical.unpack(stored).cpu(), weight)
        products = [native.cuda_spmv_rows(stored, x[:tokens].contiguous(), None) for tokens in (1, 2, 4)]
        for shape in (Shape(32, 32), Shape(8, 24), Shape(28, 16), Shape(24, 20), Shape(20, 12), Shape(5, 8)):
            for bits in DELTA_BITS:
                counts = torch.empty(rows, dtype=torch.int32, device=device)
                arguments = (there.data_ptr(), rows, cols, bits, counts.data_ptr())
                native.call_cuda("macko_cuda_sliced_entries", (there,), *arguments)
                planned = plan_rows({bits: counts}, members, cols, dtype, [shape], 1 << 40)
                matrix = SlicedMatrix(torch.zeros(planned.plan.nbytes, dtype=torch.uint8, device=device), planned.plan)
                for at, array in zip(planned.plan.array_offsets[-2:], (planned.unit_offsets, planned.row_order)):
                    matrix.data[at : at + array.nbytes] = array.view(torch.uint8)
                native.call_cuda("macko_cuda_sliced_pack", (there,), there.data_ptr(), matrix.address)
                torch.cuda.synchronize()
                assert torch.equal(native.cuda_sliced_unpack(matrix).cpu(), weight)
                products += [matrix.linear(x[:tokens], None) for tokens in (1, 2, 4)]
                parts = [native.cuda_sliced_unpack(member) for member in matrix.members]
                assert torch.equal(torch.cat(parts).cpu(), weight)
                parts = [member.linear(x[:2], None) for member in matrix.members]
                products.append(torch.cat(parts, dim=1))
        assert all(torch.equal(y.cpu(), exact[: len(y)]) for y in products)
torch.cuda.synchronize()
print("all products are right")
"""


TILED_SET = """
import torch
from macko_llm import native
from macko_llm.layouts import tiled

torch.manual_seed(0)
device = torch.device("cuda")
for rows, cols, density, cuts in (CASES):
    for dtype in (torch.float16, torch.bfloat16):
        weight = (torch.randint(1, 3, (rows, cols)) * (torch.rand(rows, cols) < density)).to(dtype)
        x, bias = torch.randint(-1, 2, (300, cols)), torch.randint(-1, 2, (rows,))
        exact = (x.double() @ weight.double().T + bias).to(dtype)
        there, x, bias = weight.to(device), x.to(device, dtype), bias.to(device, dtype)
        for strips in cuts:
            matrix = tiled.fill_records(there, *tiled.plan_records(there, strips))
            torch.cuda.synchronize()
            assert torch.equal(native.cuda_tiled_unpack(matrix).cpu(), weight)
            for tokens in TOKENS:
                y = x.new_empty(tokens, rows)
                native.cuda_tiled_spmm(matrix.address, 1, x[:tokens], bias, None, y)
                assert torch.equal(y.cpu(), exact[:tokens])
                y = x.new_zeros(tokens, 2 * rows)
                tiled.TiledGroup.of([matrix, matrix]).multiply(x[:tokens], bias.repeat(2), y, y)
                assert torch.equal(y.cpu(), exact[:tokens].repeat(1, 2))
print("all products are right")
"""

# Rows, columns, density and strips: few of them, one with records that fill their places to the last byte, and many.
CASES = (
    "(1, 1, 0.5, (1,)), (33, 172, 0.5, (1, 3, 5)), (61, 1032, 0.5, (1, 2, 4, 8)), (64, 256, 1.0, (1,)), "
    "(2200, 72, 0.5, (264, 275)), (3200, 136, 0.5, (396, 400)), (17000, 72, 0.5, (396,)), (10560, 512, 0.5, (1320,))"
)


DECODE_SET = """
import torch
from macko_llm import native_decode
from macko_llm.dtypes import CODES
from macko_llm.layouts import canonical
from macko_llm.linear import MackoLinear
from macko_llm.native_decode import Attention, Dense, Input

torch.manual_seed(0)
device = torch.device("cuda")
for dtype in (torch.float16, torch.bfloat16):
    def normal(*shape):
        return torch.randn(shape, device=device).to(dtype)

    cols, norm, bias = 1024, normal(1024), normal(65)
    weights = [normal(65, cols), normal(3, cols)]
    weights[0] *= torch.rand(weights[0].shape, device=device) < 0.5
    layer = MackoLinear.from_matrix(canonical.pack(weights[0]))
    layer.arrange()
    for transform in (Input.plain(), Input.rms_norm(norm, 1e-5), Input.silu_gate()):
        x, y = normal(1, 2 * cols), normal(1, 68)
        native_decode.dense_gemv(Dense.of(weights, [bias, None]), x, transform, y, y)
        if layer.is_arranged:
            native_decode.sliced_spmv(layer._arranged, x, transform, bias, y[:, :65].clone(), y[:, :65].clone())
        native_decode.apply_transform(transform, normal(3, 2 * cols), normal(3, cols))
    slot = torch.tensor([40], dtype=torch.int32, device=device)
    native_decode.begin_token(torch.tensor([2, -1], device=device), normal(5, 24), normal(2, 24), slot)
    scratch = torch.zeros(4, dtype=torch.int64, device=device)
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    native_decode.argmax(normal(2, 1001), tokens, scratch)
    for heads, kv_heads, head_dim, splits in ((2, 2, 128, 1), (6, 1, 32, 3)):
        qkv, keys, values = normal(2, heads + 2 * kv_heads, head_dim), *(normal(2, kv_heads, 43, head_dim) for _ in "kv")
        tables, y = [normal(43, head_dim) for _ in "cs"], normal(2, heads, head_dim)
        first = torch.tensor([0, 30], dtype=torch.int32, device=device)
        partial = torch.zeros(2 * heads * splits * (head_dim + 2), device=device)
        tickets = torch.zeros(2 * heads, dtype=torch.int32, device=device)
        arrays = (qkv, keys, values, *tables, norm, norm, slot, first, y, partial, tickets)
        sizes = 2, heads, kv_heads, head_dim, 43, 0, splits, CODES[dtype]
        attention = Attention(*(array.data_ptr() for array in arrays), 0.1, 1e-5, *sizes)
        native_decode.decode_attention(attention, y)
        torch.cuda.synchronize()
        assert y.isfinite().all() and not tickets.any() and not scratch.any() and slot.item() == 41
print("all products are right")
"""


@pytest.mark.parametrize("script", [SMALL_SET, TILED_SET, DECODE_SET], ids=["matrices", "tiles", "a decoded token"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, script: str, tmp_path: Path) -> None:
    if script is TILED_SET:
        skip_without_tensor_cores()
        # racecheck (2025.3) does not follow barriers of a part of a block, which there are on Hopper from 17 tokens on: it
        # reports sums that __syncthreads separates.
        tokens = "(1, 8, 9, 16)" if tool == "racecheck" else "(1, 8, 9, 17, 33, 70, 150, 300)"
        script = script.replace("CASES", CASES).replace("TOKENS", tokens)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on PATH")
    file = tmp_path / "small_set.py"
    file.write_text(script)
    # Torch asks CUDA things that it may refuse, so only what kernels do counts. Without a cache every tensor ends where
    # its memory does.
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        *(["--report-api-errors", "no"] * (tool == "memcheck")),
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, sys.executable, file], capture_output=True, text=True, timeout=90, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all products are right" in run.stdout
