"""What `save_pretrained` of a packed model adds to its folder: macko.json and README.md of the checkpoint it was loaded from.

transformers writes the config and the weights, and tells the quantizer nothing of where. So two methods of its models are
extended: the one that saves, and the one that uploads what was saved.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from macko_llm import checkpoint, outputs
from macko_llm.checkpoint import CARD_FILE, PROVENANCE_FILE
from macko_llm.errors import CheckpointError

_OF_THE_HUB = re.compile(r"(.+)/models--([^/]+)/snapshots/([^/]+)(?:/(.+))?")
_CARD_OF_TRANSFORMERS = "This model card has been automatically generated"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was loaded from, as it was then.

    Attributes:
        folder: of its weights.
        dtypes: of its dense and of its packed weights, as config.json says; None if it does not.
        provenance: its macko.json; empty if it has none that can be read.
        card: its README.md; None without that, or without a macko.json.
    """

    folder: Path
    dtypes: tuple[str, str] | None
    provenance: Mapping[str, Any]
    card: str | None

    @classmethod
    def read(cls, folder: Path) -> "Origin":
        """What lies in the folder."""
        provenance, card = _read_provenance(folder), folder / CARD_FILE
        known = bool(provenance) and card.is_file()
        text = card.read_bytes().decode(errors="replace") if known else None
        return cls(folder, _dtypes(folder), provenance, text)

    def complete(self) -> "Origin":
        """With what transformers does not download, where the folder is one of the hub's cache and the hub gives it."""
        place = _OF_THE_HUB.fullmatch(self.folder.absolute().as_posix())
        if self.provenance or place is None:
            return self
        cache, repository, commit, inside = place.groups()
        for name in (PROVENANCE_FILE, CARD_FILE):
            with suppress(HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
                hf_hub_download(repository.replace("--", "/"), name, subfolder=inside, revision=commit, cache_dir=cache)
        return Origin.read(self.folder)

    def write(self, folder: Path, *, for_upload: bool = False) -> None:
        """Put macko.json and the card beside the model that was saved there, if there is a macko.json.

        Args:
            folder: of the model. A README.md stays that neither macko nor transformers wrote.
            for_upload: transformers has put a README.md there already: the one of the hub, which stays, or one that says
                nothing but tags.
        """
        if not self.provenance:
            return
        if not _read_provenance(folder):  # none, or one that cannot be read, which lists nothing
            (folder / PROVENANCE_FILE).unlink(missing_ok=True)
        saved, file = self._cast_to(_dtypes(folder)), folder / CARD_FILE
        files = outputs.replaceable(folder) | {PROVENANCE_FILE}
        card = saved.card
        if card is not None and file.exists():
            if for_upload:
                card = _with_tags_of(file.read_text(encoding="utf-8"), card)
            elif CARD_FILE not in files:
                card = None
        if card is not None:
            file.write_bytes(card.encode())
            files.add(CARD_FILE)
        checkpoint.write_provenance(folder, {**saved.provenance, outputs.FILES: sorted(files)})

    def _cast_to(self, dtypes: tuple[str, str] | None) -> "Origin":
        """The same, and that the model was cast since, if it was."""
        if dtypes is None or self.dtypes is None or dtypes == self.dtypes:
            return self
        dense, packed = dtypes
        pack = self.provenance.get("pack", {})
        casts = [*pack.get("cast", []), {"dtype": dense, "value_dtype": packed}]
        card = self.card and (
            f"{self.card}\nThen it was cast and saved again, dense weights as {dense} and packed ones as {packed}; "
            "the sizes above are those before.\n"
        )
        return Origin(self.folder, dtypes, {**self.provenance, "pack": {**pack, "cast": casts}}, card)


def extend(cls: Any) -> None:
    """Have `save_pretrained` and `push_to_hub` of a class of models write macko.json and README.md as well.

    A model cannot have such methods of its own: with a strong reference to it memory would not be freed with the last other
    one, with a weak one `from_pretrained(...).save_pretrained(...)` would find it gone.

    Args:
        cls: `PreTrainedModel`.
    """
    save_pretrained = cls.save_pretrained

    @wraps(save_pretrained)
    def save(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        *arguments: Any,
        **options: Any,
    ) -> None:
        save_pretrained(self, save_directory, is_main_process, state_dict, push_to_hub, *arguments, **options)
        origin, folder = _origin_of(self), Path(save_directory)
        if origin is not None and is_main_process and not push_to_hub and folder.is_dir():
            origin.complete().write(folder)

    cls.save_pretrained = save
    upload = getattr(cls, "_upload_modified_files", None)
    if upload is None:  # it is transformers' own affair, and may go
        return

    @wraps(upload)
    def upload_all(self: Any, working_dir: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        origin = _origin_of(self)
        if origin is not None:
            origin.complete().write(Path(working_dir), for_upload=True)
        return upload(self, working_dir, *arguments, **options)

    cls._upload_modified_files = upload_all


def _origin_of(model: Any) -> Origin | None:
    """What a packed model was loaded from; None where transformers saves only the adapters that it has put into it."""
    origin = getattr(getattr(model, "hf_quantizer", None), "origin", None)
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    return origin if isinstance(origin, Origin) and not adapted else None


def _read_provenance(folder: Path) -> dict[str, Any]:
    """macko.json, without which all is as well: no model is refused for it."""
    with suppress(CheckpointError):
        return checkpoint.read_provenance(folder)
    return {}


def _dtypes(folder: Path) -> tuple[str, str] | None:
    """What config.json says of the dense and of the packed weights; None without one that can be read."""
    with suppress(CheckpointError, KeyError, TypeError):
        config = checkpoint.read_config(folder)
        return str(config["dtype"]), str(config["quantization_config"]["value_dtype"])
    return None


def _with_tags_of(there: str, card: str) -> str | None:
    """The card with the tags of the one that transformers has made; None for one that it has not."""
    if _CARD_OF_TRANSFORMERS not in there:
        return None
    ours, more = ModelCard(card), ModelCard(there).data.get("tags") or []
    if not more:
        return card
    ours.data["tags"] = list(dict.fromkeys([*(ours.data.get("tags") or []), *more]))
    return str(ours)
