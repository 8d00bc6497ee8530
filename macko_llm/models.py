"""Transformers models: loading them with plain errors, and finding the linear layers that pruning is about."""

import copy
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from macko_llm import checkpoint, refusals
from macko_llm.dtypes import MODEL_DTYPES
from macko_llm.errors import CheckpointError, MackoError, UsageError

_OTHER_TASKS = ("ForMaskedLM", "ForPreTraining", "Classification", "ForQuestionAnswering", "ForMultipleChoice")
"""Ends of architecture names that AutoModelForCausalLM would load, although they were not trained to continue text."""
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""What model families call the linear layers of one module that read the same input, in the order of a group."""
_CPU_IS_FULL = ("allocate memory", "not enough memory")
"""Words of torch's CPU allocator and of the system, in an error of any kind, for lack of memory."""
_GPU_IS_FULL = "out of memory"
_OF_FILES = ("size mismatch", "loading state_dict", "unable to open file", "unable to mmap", "required mapping size")
"""Words of the RuntimeErrors by which torch and transformers complain of files, or of what these hold."""
# What constructors of models make of a config.json that makes no sense.
_BUILD_ERRORS = (
    ValueError, LookupError, ImportError, AttributeError, TypeError, ArithmeticError, AssertionError, RuntimeError,
)  # fmt: skip
_COUNTS = (
    "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.vocab", "*.tiktoken", "*.model", "tekken.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"  # enough for a tokenizer of bytes
_TOKENIZER_SETTINGS = ("tokenizer.json", _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_REASON_LENGTH = 200


def resolve_device(device: str) -> torch.device:
    """The device of a --device flag: "auto" is the first GPU where there is one, else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise refusals.no_device(device) from error
    if resolved.type == "meta":  # holds no data
        raise refusals.no_device(device)
    return resolved


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """The torch dtype of a --dtype flag, or "auto".

    Raises:
        UsageError: it is not one of auto, float16, bfloat16, float32.
    """
    refusals.check_dtype(dtype)
    if dtype == "auto":
        return dtype
    return MODEL_DTYPES[dtype]


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model in `folder`.

    Raises:
        CheckpointError: it cannot be understood.
    """
    checkpoint.read_config(folder)  # a file that is no JSON gets a plainer error here
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, AttributeError, TypeError, ArithmeticError, IndexError) as error:
        raise _makes_no_sense(folder, _reason(error)) from error
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise CheckpointError(
            f"The config.json of {folder} is not understood ({_reason(error)}); "
            "update transformers, or add --trust-remote-code if you trust the model's own code."
        ) from error
    if not all(isinstance(name, str) for name in config.architectures or ()):
        raise _makes_no_sense(folder, f"architectures is {config.architectures}")
    text_config: object = config.get_text_config()
    if not isinstance(text_config, PretrainedConfig):
        raise _makes_no_sense(folder, f"the config of the text model is {text_config!r}")
    for name in _COUNTS:  # of nothing transformers makes a model of nothing
        count = getattr(text_config, name, None)
        if isinstance(count, int) and count < 1:
            raise _makes_no_sense(folder, f"{name} is {count}")
    return config


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights, on the meta device.

    Raises:
        CheckpointError: it is not a causal language model.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    _require_causal(folder, config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _BUILD_ERRORS as error:
        raise _cannot_build(folder, error) from error


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantization_config: object | None = None,
) -> PreTrainedModel:
    """Load a causal language model the way transformers does; `loading.load` takes less time and memory.

    Args:
        folder: a local checkpoint (`checkpoint.locate` finds it).
        dtype: "auto" (the checkpoint's), "float16", "bfloat16" or "float32".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        trust_remote_code: run Python code that lies in the folder.
        quantization_config: of a quantized checkpoint, as `from_pretrained` takes it.

    Raises:
        CheckpointError: the model is missing, incomplete, corrupt, or not a causal language model.
        UsageError: unknown dtype or device.
    """
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    return _from_pretrained(folder, torch_dtype, torch_device, trust_remote_code, quantization_config)


def load_empty(
    folder: Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization_config: object | None = None,
) -> PreTrainedModel:
    """What `load_model` gives, checked as it checks, but with every stored tensor on the meta device.

    Buffers that no file holds, such as the frequencies of rotary embeddings, are real, on the CPU, except where a model's own
    code makes that impossible.

    Raises:
        CheckpointError: the model is missing, incomplete, corrupt, or not a causal language model.
        UsageError: unknown dtype.
    """
    model = _from_pretrained(folder, resolve_dtype(dtype), torch.device("meta"), trust_remote_code, quantization_config)
    computed = {name for name, buffer in model.named_buffers() if buffer.is_meta} - set(model.state_dict())
    if not computed:
        return model
    # Constructors compute them, but not on the meta device: a second model of which only the parameters are meta has them.
    try:
        with init_empty_weights(include_buffers=False):
            twin = AutoModelForCausalLM.from_config(
                copy.deepcopy(model.config), dtype=model.config.dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, ImportError):  # a model that only from_pretrained can make
        return model
    buffers = dict(twin.named_buffers())
    for name in computed & set(buffers):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, buffers[name])
    return model


@contextmanager
def plain_errors(folder: Path, device: torch.device) -> Iterator[None]:
    """Turns what goes wrong while weights are loaded to a device into a CheckpointError.

    The files are blamed only for what comes from reading them or from comparing them with the model.
    """
    try:
        yield
    except MackoError:
        raise
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise _cannot_load(folder, device, error) from error
    except _BUILD_ERRORS as error:
        raise _cannot_build(folder, error) from error


def _from_pretrained(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device,
    trust_remote_code: bool,
    quantization_config: object | None,
) -> PreTrainedModel:
    config = load_config(folder, trust_remote_code=trust_remote_code)
    _require_causal(folder, config)
    # transformers stumbles over an index that is broken, without a word of it.
    checkpoint.weight_files(folder, getattr(config, "transformers_weights", None))
    # transformers takes a None for the config of a checkpoint that is not quantized.
    given = {} if quantization_config is None else {"quantization_config": quantization_config}
    with plain_errors(folder, device):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device} if device.type != "cpu" else None,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **given,
        )
    model, info = loaded
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{name} of {folder} is {list(found)}, but config.json makes it {list(expected)}; download the model again."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's weights, {missing[0]} first; download or write it again."
        )
    return cast(PreTrainedModel, model.eval())


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    return any(path.is_file() for name in (*_VOCABULARY_FILES, _TOKENIZER_CONFIG) for path in folder.glob(name))


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in `folder`.

    Raises:
        CheckpointError: there is none, or it is damaged or incomplete.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer (such as {' or '.join(_VOCABULARY_FILES[:2])}); "
            "copy the tokenizer files of the model into it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises Exception itself
        for file in (folder / name for name in _TOKENIZER_SETTINGS):
            if file.is_file():
                checkpoint.read_json(file)  # a file that is no JSON gets a plainer error here
        if not any(path.is_file() for name in _VOCABULARY_FILES for path in folder.glob(name)):
            raise _no_vocabulary(folder) from error
        raise CheckpointError(
            f"{folder} has no usable tokenizer ({_reason(error)}); copy the tokenizer files of the model into it."
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what some classes make of no files
        raise _no_vocabulary(folder)
    return tokenizer


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest context in tokens that the model was made for, None where its config does not say."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def check_seqlen(seqlen: int, config: PretrainedConfig) -> None:
    """Refuse sequences that the model was not made for.

    Raises:
        UsageError: seqlen is above `max_positions`.
    """
    longest = max_positions(config)
    if longest is not None and seqlen > longest:
        raise UsageError(
            f"seqlen is {seqlen}, but the model takes at most {longest} tokens; use a seqlen of {longest}."
        )


def check_token_ids(ids: Sequence[int], config: PretrainedConfig, what: str) -> None:
    """Refuse tokens outside the model's vocabulary; `what` begins the error's sentence.

    Raises:
        CheckpointError: the tokenizer belongs to another model.
    """
    known = config.get_text_config().vocab_size
    unknown = next((token for token in ids if not 0 <= token < known), None)
    if unknown is not None:
        raise CheckpointError(
            f"{what} has the token {unknown}, but the model knows only {known}; "
            "use the tokenizer that belongs to the model."
        )


def cache_argument(module: nn.Module) -> str:
    """What the forward of a model or of a block calls its key/value cache.

    transformers renamed `past_key_values` to `cache` in 5.24 and warns of the old name; code that comes with a model
    may know only the old one.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder blocks, qualified name -> module, first to last.

    Raises:
        CheckpointError: the model does not keep its blocks in one nn.ModuleList.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside_decoder = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside_decoder:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise CheckpointError(
        f"{type(model).__name__} does not keep its decoder blocks in one nn.ModuleList; use a Llama-like causal model."
    )


def prunable_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers inside the decoder blocks, qualified name -> module.

    Embeddings, norms and the lm_head lie outside the blocks; only the lm_head can be pruned (`selection.asked_head`).

    Raises:
        CheckpointError: the blocks hold weights of a kind that cannot be pruned or packed (yet).
    """
    linears: dict[str, nn.Linear] = {}
    for block_name, block in decoder_blocks(model).items():
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, Conv1D):
                raise CheckpointError(
                    f"{name} is a Conv1D layer, as in GPT-2, which is not supported; use a model whose blocks hold nn.Linear."
                )
            if is_plain_linear(module):
                linears[name] = cast(nn.Linear, module)
        for name, parameter in block.named_parameters(prefix=block_name):
            if parameter.ndim > 2:
                raise CheckpointError(
                    f"{name} is {list(parameter.shape)}, several experts or a convolution in one tensor, which is not "
                    "supported; use a model whose blocks hold nn.Linear."
                )
    if not linears:
        raise CheckpointError(f"The decoder blocks of {type(model).__name__} hold no nn.Linear; use another model.")
    return linears


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a packed layer may take a module's place: a linear layer that does no more than its product."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def projection_groups(model: nn.Module) -> list[list[str]]:
    """Qualified names of linear layers that read the same input: q, k and v of an attention, gate and up of an MLP.

    They are found by their names and widths, whatever kind of linear layer they are.
    """
    groups = []
    for name, module in model.named_modules():
        for siblings in _SIBLINGS:
            widths = {getattr(getattr(module, sibling, None), "in_features", None) for sibling in siblings}
            if len(widths) == 1 and None not in widths:
                groups.append([f"{name}.{sibling}" if name else sibling for sibling in siblings])
    return groups


def in_groups(names: Iterable[str], model: nn.Module) -> list[list[str]]:
    """The names of some linear layers in their order, those of a `projection_groups` together if all of it is named."""
    named = list(names)
    known = set(named)
    group_of = {name: group for group in projection_groups(model) if known >= set(group) for name in group}
    return [list(group) for group in dict.fromkeys(tuple(group_of.get(name, [name])) for name in named)]


def save_model(model: PreTrainedModel, source: Path, folder: Path, max_shard_size: str) -> None:
    """Write a changed model as an ordinary checkpoint, with what surrounds the weights in the folder it was loaded from.

    Args:
        model: as transformers loaded it from `source`; its generation config is not to be used afterwards.
        source: a local checkpoint.
        folder: exists.
        max_shard_size: of a weight file, such as "5GB".
    """
    if (source / "generation_config.json").is_file():
        # The model's own file is copied as it is; transformers refuses to write some that are published (Llama 2's).
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    checkpoint.copy_side_files(source, folder)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of torch or of Python says that the memory of a GPU or of the CPU is full."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in (_GPU_IS_FULL, *_CPU_IS_FULL))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _require_causal(folder: Path, config: PretrainedConfig) -> None:
    """Raise CheckpointError unless the model was made to continue text."""
    architectures = config.architectures or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    other_task = bool(architectures) and all(name.endswith(_OTHER_TASKS) for name in architectures)
    if other_task or not (known or own_code):
        raise CheckpointError(
            f"{folder} holds a {' or '.join(architectures) or config.model_type}, which is not a causal language model; "
            "use one that AutoModelForCausalLM can load."
        )


def _makes_no_sense(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"The config.json of {folder} makes no sense ({what}); download the model again.")


def _no_vocabulary(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer of {folder} has no vocabulary (such as {' or '.join(_VOCABULARY_FILES[:2])}); "
        "copy the tokenizer files of the model into it."
    )


def _cannot_build(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The model in {folder} cannot be built ({_reason(error)}); download it again, or install what it needs."
    )


def _cannot_load(folder: Path, device: torch.device, error: Exception) -> CheckpointError:
    text = str(error)
    gpu_is_full = isinstance(error, torch.OutOfMemoryError) or _GPU_IS_FULL in text
    if gpu_is_full and device.type != "cpu":
        return CheckpointError(f"{folder} does not fit on {device}; use --device cpu.")
    if lacks_memory(error):
        return CheckpointError(f"{folder} does not fit in the CPU's memory; free some of it, or use a smaller model.")
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or text.startswith("CUDA error"):
        reason = text.partition("\n")[0]  # the other lines advise who programs for CUDA
        return CheckpointError(f"{_gpu_name(device)} failed while {folder} was loaded ({reason}); see `macko doctor`.")
    if isinstance(error, PermissionError):
        return CheckpointError(f"The weights of {folder} may not be read ({_reason(error)}); check their rights.")
    if not isinstance(error, RuntimeError) or any(words in text for words in _OF_FILES):
        return CheckpointError(
            f"The weights of {folder} are missing, corrupt or truncated ({_reason(error)}); "
            "download or write the model again, as safetensors."
        )
    where = "" if device.type == "meta" else f" to {device}"
    return CheckpointError(
        f"{folder} cannot be loaded{where} ({_reason(error)}); see `macko doctor`, or the traceback with MACKO_DEBUG=1."
    )


def _gpu_name(device: torch.device) -> str:
    try:
        return f"{torch.cuda.get_device_name(device)} ({device})"
    except (RuntimeError, AssertionError, ValueError):  # no CUDA device, or one that answers nothing any more
        return str(device)


def _reason(error: Exception) -> str:
    """The first sentence of another library's error, on one line."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    if isinstance(error, KeyError):
        text = f"unknown {text}"
    if len(text) > _REASON_LENGTH:
        text = text[:_REASON_LENGTH].rsplit(" ", 1)[0] + " ..."
    return text or type(error).__name__
