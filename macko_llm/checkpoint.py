"""Hugging Face checkpoints as folders of files: finding them, reading them shard by shard, writing them atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from macko_llm.errors import CheckpointError, UsageError
from macko_llm.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PROVENANCE_FILE = "macko.json"
CARD_FILE = "README.md"
QUANT_METHOD = "macko"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
LENGTH_BYTES = 8
"""Of the header's length, at the start of a safetensors file."""
_WEIGHT_FILES = ["*.safetensors"]
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"]
_UNNEEDED_FILES = ["original/*", "onnx/*", "consolidated*"]  # the same weights in other forms


def expanded_path(text: str | Path) -> Path:
    """A path as the shell would have written it: a tilde becomes a home folder, unless nobody has that name."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib's raises an error instead


def locate(model: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: the folder itself, or the download of a hub id.

    Args:
        model: a folder, or owner/name with @ and a branch, a tag or a commit behind it where it is not the newest that is
            wanted. HF_TOKEN and HF_HUB_CACHE are what they are to the hub's own tools.
        weights: download these too; without them, only the config, the tokenizer, the index and the model's own code.

    Raises:
        CheckpointError: there is no such model, or the folder holds none.
        UsageError: a folder with a revision.
    """
    folder = expanded_path(model)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG_FILE}; name the folder of a Hugging Face model.")
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; name the folder that holds it, {folder.absolute().parent}.")
    name, _, revision = str(model).partition("@")
    if revision and expanded_path(name).exists():
        raise UsageError(f"{name} is a folder, which has no revision {revision}; leave the revision out.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(f"There is no model {name}; name an existing folder or a hub id such as owner/name.")
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                cache_dir=os.environ.get("HF_HUB_CACHE"),
                local_files_only=is_offline_mode(),  # before 2.0 it would ask for the files of a commit all the same
                allow_patterns=_SIDE_FILES + _WEIGHT_FILES if weights else _SIDE_FILES,
                ignore_patterns=_UNNEEDED_FILES,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"There is no folder {model}, and the hub did not give a model of that name ({type(error).__name__}); "
            "check the spelling, the network, and `hf auth login` for gated models."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _cannot_read(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download or write the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download or write the model again.")
    return content


def _cannot_read(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}); check its rights and the disk.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, keys in the order given."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    return read_json(folder / CONFIG_FILE)


def quantization_method(folder: Path) -> str | None:
    """How the weights in the folder are stored: "macko", "gptq", ..., or None for an ordinary dense checkpoint."""
    quantization = read_config(folder).get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(method or "an unknown method")


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a checkpoint in the MACKO format."""
    return quantization_method(folder) == QUANT_METHOD


def read_provenance(folder: Path) -> dict[str, Any]:
    """macko.json: how the checkpoint was made; empty for a model that macko has not touched."""
    path = folder / PROVENANCE_FILE
    return read_json(path) if path.is_file() else {}


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write macko.json, stamped with this package's version."""
    history = {key: value for key, value in provenance.items() if key != "macko_version"}
    write_json(folder / PROVENANCE_FILE, {"macko_version": __version__, **history})


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what surrounds the weights: tokenizer, generation config, chat template, custom code, licence."""
    for path in sorted(source.iterdir()):
        skipped = path.name in (CONFIG_FILE, PROVENANCE_FILE, CARD_FILE) or path.name.startswith(".")
        if path.is_file() and not skipped and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Where in the file its bytes begin."""


def weight_files(folder: Path, named: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint that transformers reads, in order.

    Args:
        folder: of the checkpoint.
        named: `transformers_weights` of the model's config: a file or an index in place of those of the usual names.

    Raises:
        CheckpointError: there are none, the index names a file that is not there or lies elsewhere, or is one that
            transformers does not read, or `named` is no safetensors file here.
    """
    if named is not None and not _is_usable(folder, named):
        raise CheckpointError(
            f"The config.json of {folder} says that its weights are in {named}, which is no safetensors file of that folder; "
            "take its transformers_weights out, or download the model again."
        )
    # Where there are both, transformers reads the file and not the index.
    first = named or (WEIGHTS_FILE if (folder / WEIGHTS_FILE).is_file() else INDEX_FILE)
    if first.endswith(".index.json") and (folder / first).is_file():
        index = read_json(folder / first)
        weight_map = index.get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        outside = [name for name in names if not _is_inside(folder, name)]
        if outside:
            raise CheckpointError(
                f"{folder / first} names {outside[0]}, which is outside of its folder; download the model again."
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(f"{folder} lacks {', '.join(missing) or 'its shards'}; download the model again.")
        if not isinstance(index.get("metadata"), dict):
            raise CheckpointError(
                f'{folder / first} has no metadata, without which transformers reads no index; add "metadata": {{}} to it, '
                "or download the model again."
            )
        return [folder / name for name in names]
    if (folder / first).is_file():
        return [folder / first]
    raise CheckpointError(f"{folder} has no safetensors weights; save the model with save_pretrained first.")


def forget_named_weights(config: dict[str, Any]) -> None:
    """Take out of a config what its weights were called: the new ones have the usual names."""
    for part in (config, *config.values()):
        if isinstance(part, dict):
            part.pop("transformers_weights", None)


def _is_usable(folder: Path, named: object) -> bool:
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        return False
    return (folder / named).is_file() and _is_inside(folder, named)


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name leads to a place in the folder; links are not followed, which the hub's cache consists of."""
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(folder / name)).parents  # noqa: PTH100


def tensor_infos(files: list[Path]) -> dict[str, TensorInfo]:
    """The headers of safetensors files, name -> info, without reading any weights.

    Raises:
        CheckpointError: a file is corrupt or truncated.
    """
    infos: dict[str, TensorInfo] = {}
    for file in files:
        with open_tensors(file), file.open("rb") as stream:  # opening as safetensors checks all that is relied on here
            size = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = LENGTH_BYTES + size + entry["data_offsets"][0]
            infos[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), offset)
    return infos


def tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """All tensors, one file open at a time."""
    files: dict[Path, list[str]] = {}
    for name, info in infos.items():
        files.setdefault(info.file, []).append(name)
    for file, names in files.items():
        with open_tensors(file) as reader:
            for name in names:
                yield name, reader.get_tensor(name)


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A key to sort tensors by name, block 2 before block 10, as transformers puts them into shards."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Safetensors' `safe_open`, memory-mapped, with a plain error for a damaged file."""
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except PermissionError as error:
        raise _cannot_read(file, error) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is corrupt or truncated ({error}); download or write the model again."
        ) from error


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB or 1GiB (decimal units are powers of 1000, as in transformers).

    Raises:
        UsageError: it is not such a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE)
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size <= 0:
        raise UsageError(f"{text!r} is not a size; write for example 5GB or 500MB.")
    return size
