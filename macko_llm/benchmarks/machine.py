"""What figures depend on: the machine, its software, and how fast it reads memory."""

import math
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

import macko_llm
from macko_llm.benchmarks.timing import measure

READ_BYTES = {"cuda": 2**30, "cpu": 512 * 2**20}
"""Buffer that the read bandwidth is measured on. A quarter of 128 MB would still be in a CPU's last cache of 32 MB."""


@dataclass(frozen=True)
class Machine:
    """Where and when something was measured.

    Attributes:
        device: the GPU's name, or "cpu".
        driver: version of the NVIDIA driver, where it can be found out.
        cuda: version of CUDA that torch was built for.
        torch: version.
        macko: version.
        threads: of torch, on the CPU.
        read_gigabytes_per_second: the fastest way found to read a large buffer, in this run.
        date: UTC, ISO 8601.
    """

    device: str
    driver: str | None
    cuda: str | None
    torch: str
    macko: str
    threads: int
    read_gigabytes_per_second: float
    date: str

    @property
    def title(self) -> str:
        """The device and the versions, for the head of a table."""
        device = self.device
        if self.driver:
            device += f", driver {self.driver}"
        if self.device == "cpu":
            device += f", {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{device}, torch {self.torch}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def describe_machine(device: torch.device) -> Machine:
    """The facts, the read bandwidth measured."""
    on_gpu = device.type == "cuda"
    return Machine(
        device=device_name(device),
        driver=_driver_version() if on_gpu else None,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        macko=macko_llm.__version__,
        threads=torch.get_num_threads(),
        read_gigabytes_per_second=read_bandwidth(device),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """GB/s of the fastest of several ways to read a buffer far larger than the caches, by their medians.

    On a CPU all of torch's threads read, memory that has been written before.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    elements = int(min(READ_BYTES[device.type], free // 4)) // 4
    cols = 8192
    if device.type == "cpu":  # where random numbers take long, and change nothing
        buffer = torch.ones(elements // cols, cols)
        return buffer.nbytes / min(measure([way], device).microseconds for way in (buffer.sum, buffer.amax)) / 1e3
    buffer = torch.randn(elements // cols, cols, device=device, generator=torch.Generator(device).manual_seed(0))
    vector = torch.ones(cols, device=device)
    ways = (buffer.amax, buffer.sum, lambda: buffer.amax(dim=1), lambda: buffer.sum(dim=1), lambda: buffer @ vector)
    fastest = min(measure([way], device).microseconds for way in ways)
    return buffer.nbytes / fastest / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it explains, means that a device has no room."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def _driver_version() -> str | None:
    """What nvidia-smi says, for torch does not know."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip().partition("\n")[0] or None
