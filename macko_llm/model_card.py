"""README.md of a packed checkpoint: what it is, how to run it, and how it was made, ready for the hub."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from macko_llm.errors import UsageError
from macko_llm.recipe import PruneRecipe, title, to_toml


def model_card(provenance: Mapping[str, Any]) -> str:
    """The card of the checkpoint that has this macko.json, with what packing has put into it."""
    pack, pruned = provenance["pack"], provenance.get("prune", {})
    origin = str(pruned.get("model") or "MODEL")
    of_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(@.+)?", origin)  # a folder is recorded by its last name only
    base_model = f"base_model: {of_hub[1]}\n" if of_hub else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags: [macko, pruned, sparse]
---
# A pruned model in the MACKO sparse format

{pack["sparsity"]:.0%} of the weights of its decoder blocks are zero (pruned by {title(pruned)}); the model takes
{pack["bytes_packed"] / 1e6:.1f} MB instead of {pack["bytes_dense"] / 1e6:.1f} MB. `macko.json` says exactly how it was made.

## Use

macko is installed from its source: in its folder,

```sh
pip install .
```

Then this is a model like any other of transformers, with `PATH` its folder or its name on the hub:

```python
import macko_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
```

or `macko generate PATH --prompt "Once upon a time"`. Where macko is not installed, transformers does not know the format
and starts from random weights.

## How it was made

{_made(provenance, origin)}"""


def _made(provenance: Mapping[str, Any], origin: str) -> str:
    commands, source, recipe = [], "MODEL", None
    if "prune" in provenance:
        recipe = _recipe(provenance["prune"])
        commands.append(f"macko prune {shlex.quote(origin)} -o pruned" + (" --recipe recipe.toml" if recipe else ""))
        source = "pruned"
    for number, run in enumerate(provenance.get("tune", []), start=1):
        tuned = "tuned" if number == 1 else f"tuned-{number}"
        commands.append(f"macko tune {source} -o {tuned} --dataset {shlex.quote(str(run.get('dataset')))}")
        source = tuned
    commands.append(f"macko pack {source} -o packed --dtype {provenance['pack']['value_dtype']}")
    text = "```sh\n" + "".join(f"{command}\n" for command in commands) + "```\n"
    if recipe:
        text += f"\nwhere `recipe.toml` holds\n\n```toml\n{to_toml(recipe)}```\n"
    if "tune" in provenance:
        text += "\nThe settings of `macko tune` are in `macko.json`.\n"
    return text


def _recipe(pruned: Mapping[str, Any]) -> PruneRecipe | None:
    """The recipe behind a record of pruning, None where this version knows none like it."""
    known = {field.name for field in fields(PruneRecipe)} - {"layers"}  # in a record, what became of each layer
    values = {name: value for name, value in pruned.items() if name in known}
    try:
        return PruneRecipe(**values, layers=pruned.get("layer_sparsities", {}))
    except UsageError:
        return None
