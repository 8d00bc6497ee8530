"""Defaults that the library and the command line share; those of a pruning run are in recipe.py."""

MODEL_DTYPE_NAMES = ("float16", "bfloat16", "float32")
"""Dtypes that models are loaded in."""

VALUE_DTYPE_NAMES = ("float16", "bfloat16")
"""Dtypes of packed values."""

ENTRY_ALIGNMENT = 8
"""A packed matrix's arrays are padded to a multiple of this many entries, so that kernels may read 16 bytes at once."""

MAX_ENTRIES = 2**31 - 1 - ENTRY_ALIGNMENT
"""Of a packed matrix, whose row offsets are int32."""

MAX_NEW_TOKENS = 128
"""Tokens that a generation adds at most."""

CHAT_NEW_TOKENS = 512
"""Tokens of an answer in a conversation at most, where those are no more than half of the model's positions."""

TEMPERATURE = 0.0
"""Greedy."""

LAYOUT = "auto"
"""In which layout a GPU holds packed weights: the one that `layouts.choice` takes."""

LAYOUTS = (LAYOUT, "sliced", "tiled")
"""What may be asked for. "sliced" is the faster for one token, "tiled" for several."""

TOKENS_AT_A_TIME = 1
"""That packed weights are laid out for: one stream of text."""

CACHE_BUCKET = 512
"""Tokens in the smallest cache of fixed length; the next ones are twice as long each."""

RUN_AHEAD = 4
"""Steps that a GPU is given to do before the host reads the token of the one before them."""

CALIBRATION_SEQLEN = 2048
"""Tokens in a calibration sequence, where the model takes that many."""

EVALUATION_DATASET = "wikitext2"
"""What perplexity is measured on."""

EVALUATION_SEQLEN = 2048
"""Tokens in a window of perplexity, where the model takes that many."""

QUALITY_SEQLEN = 512
"""Tokens in a calibration sequence and a window of `macko bench quality`, where the model takes that many."""

HIDDEN_STATES = "auto"
"""Where the hidden states of calibration texts are between two blocks: on the first of these with room for them."""

HIDDEN_STATE_PLACES = (HIDDEN_STATES, "device", "host", "disk")

MAX_SHARD_SIZE = "5GB"
"""Largest weight file."""

BENCHMARK_PROMPT = "Once upon a time"
"""What the models of the demo, of `macko bench quality` and of `macko compare` continue."""

BENCHMARK_CONTEXT = 32
"""Tokens of the prompt behind which decoding is timed."""

NO_KERNELS_REMEDY = (
    "update the GPU's driver, or build macko with a CUDA toolkit that suits driver and GPU: "
    "`CUDA_HOME=/usr/local/cuda-12.8 MACKO_CUDA=on pip install .` in the project's folder"
)
"""What to do where the CUDA kernels do not run on a GPU."""
