"""`macko --version` and `macko doctor`: what is installed, and what a GPU lacks."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from cli_helpers import macko, macko_json
from helpers import quiet_transformers

import macko_llm
from macko_llm import native
from macko_llm.cli.doctor import gpu_advice


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def test_version_and_doctor() -> None:
    assert macko("--version").stdout == f"macko {macko_llm.__version__}\n"
    content = macko_json("doctor")
    assert content["macko"] == macko_llm.__version__
    assert content["packages"]["torch"] == torch.__version__
    assert content["packages"]["transformers"] == transformers.__version__
    assert content["kernels"] == (["cpu", "cuda"] if native.has_cuda() else ["cpu"])
    assert Path(content["native_library"]).is_file()
    said = macko("doctor").stdout
    assert content["native_library"] in said
    assert all(package in said for package in content["packages"])
    assert f"kernels         {', '.join(content['kernels'])}\n" in said


def test_the_doctor_says_how_to_get_cuda_kernels() -> None:
    gpu = {"name": "Tesla M1", "kernels_fail": None}
    (advice,) = gpu_advice([gpu], ["cpu"])
    assert "built without CUDA kernels" in advice
    assert "MACKO_CUDA=on pip install" in advice
    assert gpu_advice([gpu], ["cpu", "cuda"]) == []
    assert gpu_advice([], ["cpu"]) == []
    assert gpu_advice([gpu], []) == []  # a missing library is advice enough


def test_the_doctor_says_what_to_do_about_an_old_driver() -> None:
    reason = "its driver knows CUDA up to 12.4, and macko was built with CUDA 13.0"
    (advice,) = gpu_advice([{"name": "Tesla M1", "kernels_fail": reason}], ["cpu", "cuda"])
    assert advice == (
        f"The CUDA kernels do not run on Tesla M1 ({reason}), so packed models run there in plain torch, right but slow; "
        "update the GPU's driver, or build macko with a CUDA toolkit that suits driver and GPU: "
        "`CUDA_HOME=/usr/local/cuda-12.8 MACKO_CUDA=on pip install .` in the project's folder."
    )


@pytest.mark.parametrize(
    ("kernels", "reason", "words"),
    [
        (True, None, None),
        (False, None, "built without CUDA kernels"),
        (True, "no kernel image is available", r"do not run on NVIDIA Imaginary \(no kernel image is available\)"),
    ],
    ids=["kernels that run", "no kernels", "kernels that do not run"],
)
def test_the_doctor_sees_gpus_and_what_they_lack(
    kernels: bool, reason: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(name="NVIDIA Imaginary", total_memory=48 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: gpu)
    monkeypatch.setattr(native, "has_cuda", lambda: kernels)
    monkeypatch.setattr(native, "why_not_on", lambda _index: reason)
    said = macko("doctor").stdout.splitlines()
    assert "GPU             NVIDIA Imaginary, 48 GB, sm_90" in said
    if words is None:
        assert said[-1] == "Nothing is missing."
        assert macko_json("doctor")["advice"] == []
    else:
        (advice,) = macko_json("doctor")["advice"]
        assert said[-1] == f"! {advice}"
        assert re.search(words, advice)
        assert "MACKO_CUDA=on pip install" in advice
