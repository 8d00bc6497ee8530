"""`macko doctor`."""

import importlib.metadata
import platform
import sys
from typing import Any

import macko_llm
from macko_llm.cli.console import plain_errors, print_json
from macko_llm.cli.options import JsonOption
from macko_llm.defaults import NO_KERNELS_REMEDY
from macko_llm.errors import NativeError

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "typer", "safetensors", "rich")


@plain_errors
def doctor(as_json: JsonOption = False) -> None:
    """Say what macko found on this machine, what is missing, and how to get it.

    Examples:
        macko doctor
    """
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    print(f"macko {facts['macko']}, Python {facts['python']}, {facts['platform']}")
    for package, version in facts["packages"].items():
        print(f"  {package:<13} {version or 'missing'}")
    print(f"native library  {facts['native_library'] or 'missing'}")
    print(f"kernels         {', '.join(facts['kernels']) or 'none'}")
    print(f"CPU             {facts['cpu_threads']} threads")
    for gpu in facts["gpus"]:
        print(f"GPU             {gpu['name']}, {gpu['memory_bytes'] / 1e9:.0f} GB, sm_{gpu['capability']}")
    for advice in facts["advice"]:
        print(f"! {advice}")
    if not facts["advice"]:
        print("Nothing is missing.")


def _facts() -> dict[str, Any]:
    versions = {package: _version(package) for package in PACKAGES}
    missing = [package for package, version in versions.items() if version is None]
    advice = [f"Install what is missing: pip install {' '.join(missing)}"] if missing else []
    facts: dict[str, Any] = {
        "macko": macko_llm.__version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "native_library": None,
        "kernels": [],
        "cpu_threads": None,
        "gpus": [],
        "advice": advice,
    }
    if "torch" in missing:
        return facts
    import torch

    from macko_llm import native

    versions["torch"] = torch.__version__  # says more than the package's: +cpu, +cu130
    facts["cpu_threads"] = torch.get_num_threads()
    try:
        native.library()
        facts["native_library"] = str(native.library_path())
        facts["kernels"] = ["cpu", "cuda"] if native.has_cuda() else ["cpu"]
    except NativeError as error:
        advice.append(str(error))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}{properties.minor}"
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability}
        gpu["kernels_fail"] = native.why_not_on(index) if facts["kernels"] else None
        facts["gpus"].append(gpu)
    advice += gpu_advice(facts["gpus"], facts["kernels"])
    return facts


def gpu_advice(gpus: list[dict[str, Any]], kernels: list[str]) -> list[str]:
    """What to do for GPUs, given what is known of each and which kernels the native library has."""
    if not gpus or not kernels:
        return []
    if "cuda" not in kernels:
        return [
            "The native library was built without CUDA kernels, so packed models run on GPUs in plain torch, right but slow; "
            "build it with `MACKO_CUDA=on pip install .` in the project's folder."
        ]
    return [
        f"The CUDA kernels do not run on {gpu['name']} ({gpu['kernels_fail']}), so packed models run there in plain torch, "
        f"right but slow; {NO_KERNELS_REMEDY}."
        for gpu in gpus
        if gpu["kernels_fail"]
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
