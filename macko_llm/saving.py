"""What `save_pretrained` of a packed model adds to its folder: macko.json and README.md of the checkpoint it was loaded from.

transformers writes the config and the weights, and tells the quantizer nothing of where. So two methods of its models are
extended: the one that saves, and the one that uploads what was saved.
"""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
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

    def write(self, folder: Path, *, replace_card: bool = True) -> None:
        """Put macko.json and the card beside the model that was saved there, if there is a macko.json.

        Args:
            folder: of the model. A README.md stays that neither macko nor transformers wrote.
            replace_card: False has any README.md stay.
        """
        if not self.provenance:
            return
        if not _read_provenance(folder):  # none, or one that cannot be read, which lists nothing
            (folder / PROVENANCE_FILE).unlink(missing_ok=True)
        record, card = dict(self.provenance), self.card
        dtypes = _dtypes(folder)
        if dtypes and self.dtypes and dtypes != self.dtypes:
            dense, packed = dtypes
            pack = record.get("pack", {})
            record["pack"] = {**pack, "cast": [*pack.get("cast", []), {"dtype": dense, "value_dtype": packed}]}
            card = card and (
                f"{card}\nThen it was cast and saved again, dense weights as {dense} and packed ones as {packed}; "
                "the sizes above are those before.\n"
            )
        files = outputs.replaceable(folder) | {PROVENANCE_FILE}
        present = (folder / CARD_FILE).exists()
        if card is not None and (not present or (replace_card and CARD_FILE in files)):
            (folder / CARD_FILE).write_bytes(card.encode())
            files.add(CARD_FILE)
        record.pop(outputs.FILES, None)
        checkpoint.write_provenance(folder, {**record, outputs.FILES: sorted(files)})

    def write_for_upload(self, folder: Path) -> None:
        """The same where transformers has put a card already: that of the hub, which stays, or one that says nothing."""
        card = folder / CARD_FILE
        made = card.read_text(encoding="utf-8") if card.is_file() else ""
        origin = self
        if self.card is not None and _CARD_OF_TRANSFORMERS in made:
            origin = replace(self, card=_with_tags(self.card, made))
            card.unlink()
        origin.write(folder, replace_card=False)


def extend(cls: Any, origin_of: Callable[[Any], Origin | None]) -> None:
    """Have `save_pretrained` and `push_to_hub` of a class of models write macko.json and README.md as well.

    A model cannot have such methods of its own: with a strong reference to it memory would not be freed with the last other
    one, with a weak one `from_pretrained(...).save_pretrained(...)` would find it gone.

    Args:
        cls: `PreTrainedModel`.
        origin_of: what a model was loaded from; None for those that have nothing to add.
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
        origin, folder = origin_of(self), Path(save_directory)
        if origin is not None and is_main_process and not push_to_hub and folder.is_dir():
            origin.complete().write(folder)

    cls.save_pretrained = save
    upload = getattr(cls, "_upload_modified_files", None)
    if upload is None:  # it is transformers' own affair, and may go
        return

    @wraps(upload)
    def upload_all(self: Any, working_dir: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        origin = origin_of(self)
        if origin is not None:
            origin.complete().write_for_upload(Path(working_dir))
        return upload(self, working_dir, *arguments, **options)

    cls._upload_modified_files = upload_all


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


def _with_tags(card: str, others: str) -> str:
    """A card with the tags of another one, too."""
    ours, more = ModelCard(card), ModelCard(others).data.get("tags") or []
    if not more:
        return card
    ours.data["tags"] = list(dict.fromkeys([*(ours.data.get("tags") or []), *more]))
    return str(ours)
