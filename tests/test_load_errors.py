"""What loading says went wrong: the memory, the GPU, the files, or something that it does not know."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import save_model
from helpers import assert_plain
from safetensors import SafetensorError, safe_open
from torch import nn

from macko_llm import loading, models
from macko_llm.errors import CheckpointError, UsageError

FOLDER = Path("some-model")
CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
CUDA_ADVICE = (
    "\nSearch for `cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/ for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call.\n"
)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
accelerator_error = getattr(torch, "AcceleratorError", RuntimeError)


def _raised_by(work: Callable[[], object]) -> Exception:
    """The error that torch or safetensors itself raises."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("it worked")


def _said(error: Exception, device: torch.device) -> str:
    with pytest.raises(CheckpointError) as caught, models.plain_errors(FOLDER, device):
        raise error
    assert caught.value.__cause__ is error
    assert_plain(str(caught.value))
    assert str(FOLDER) in str(caught.value)
    return str(caught.value)


def _too_large() -> torch.Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


def _file_too_short(folder: Path) -> Exception:
    (folder / "short").write_bytes(b"abc")
    return _raised_by(lambda: torch.UntypedStorage.from_file(str(folder / "short"), False, 2**20))


def _of_another_shape() -> Exception:
    return _raised_by(lambda: nn.Linear(2, 3).load_state_dict(nn.Linear(3, 2).state_dict()))


# Memory

CPU_IS_FULL = {
    "torch": _raised_by(_too_large),
    "torch on Windows": RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 1099511627776 bytes."
    ),
    "Python": MemoryError(),
    "the system": OSError(12, "Cannot allocate memory"),
    "a mapping": RuntimeError("unable to mmap 1000 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
}


@pytest.mark.parametrize("error", CPU_IS_FULL.values(), ids=list(CPU_IS_FULL))
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_full_cpu_is_told_so_and_not_sent_to_the_cpu(error: Exception, device: torch.device) -> None:
    said = _said(copy.copy(error), device)
    assert "does not fit in the CPU's memory" in said
    assert not re.search("--device|corrupt|download", said)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        accelerator_error("CUDA error: out of memory" + CUDA_ADVICE),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)."),
    ],
    ids=["torch", "the driver", "mps"],
)
def test_a_full_gpu_is_told_so_and_sent_to_the_cpu(error: Exception) -> None:
    assert _said(error, GPU) == "some-model does not fit on cuda:1; use --device cpu."


# CUDA


@pytest.mark.parametrize("kind", [accelerator_error, RuntimeError])
def test_an_error_of_cuda_names_the_gpu_and_doctor(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Tesla M{device.index}")
    assert _said(kind(NO_KERNEL + CUDA_ADVICE), GPU) == (
        f"Tesla M1 (cuda:1) failed while some-model was loaded ({NO_KERNEL}); see `macko doctor`."
    )


def test_a_gpu_that_cannot_say_its_name_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> str:
        raise accelerator_error(f"CUDA error: the launch on {device} timed out")

    monkeypatch.setattr(torch.cuda, "get_device_name", lost)
    assert _said(RuntimeError(NO_KERNEL), GPU).startswith("cuda:1 failed while some-model was loaded")


# Files


def test_errors_of_files_blame_the_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    damaged = _raised_by(lambda: safe_open(tmp_path / "model.safetensors", framework="pt"))
    assert isinstance(damaged, SafetensorError)
    absent = _raised_by(lambda: torch.UntypedStorage.from_file(str(tmp_path / "absent"), False, 4))
    errors = [damaged, absent, _file_too_short(tmp_path), _of_another_shape(), OSError(5, "Input/output error")]
    for error in errors:
        assert "some-model are missing, corrupt or truncated (" in _said(error, CPU)


def test_files_that_may_not_be_read_are_not_called_damaged() -> None:
    assert _said(PermissionError(13, "Permission denied"), CPU) == (
        "The weights of some-model may not be read ([Errno 13] Permission denied); check their rights."
    )


# Anything else


def test_an_unknown_error_is_quoted_and_the_files_are_not_blamed() -> None:
    said = _said(RuntimeError("Tensor.item() cannot be called on meta tensors"), GPU)
    assert "some-model cannot be loaded to cuda:1 (Tensor.item() cannot be called on meta tensors)" in said
    assert not re.search("corrupt|download", said)


def test_a_model_that_is_only_looked_at_is_loaded_nowhere() -> None:
    assert _said(RuntimeError("no such thing"), torch.device("meta")).startswith(
        "some-model cannot be loaded (no such thing);"
    )


def test_an_error_of_macko_passes_as_it_is() -> None:
    with pytest.raises(UsageError, match=r"^as it is$"), models.plain_errors(FOLDER, CPU):
        raise UsageError("as it is")


# Where it happens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "dense", "llama")


def test_streamed_weights_that_the_cpu_cannot_hold(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> torch.Tensor:
        return _too_large()

    monkeypatch.setattr(torch, "empty_like", too_large)
    with pytest.raises(CheckpointError, match="does not fit in the CPU's memory"):
        loading.load(llama, device="cpu")


def test_a_cuda_error_of_a_thread_that_reads_is_none_of_the_files(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise accelerator_error(NO_KERNEL + CUDA_ADVICE)

    monkeypatch.setattr("macko_llm.streaming._read", fail)
    with pytest.raises(CheckpointError, match=r"no kernel image .*; see `macko doctor`"):
        loading.load(llama, device="cpu")


def test_weights_that_transformers_cannot_place(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        _too_large()

    monkeypatch.setattr("transformers.core_model_loading.set_param_for_module", fail)
    with pytest.raises(CheckpointError, match="does not fit in the CPU's memory"):
        models.load_model(llama, device="cpu")
