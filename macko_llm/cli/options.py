"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id, dense or packed.")]
DenseArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id of a dense model.")]
PackedArgument = Annotated[str, typer.Argument(metavar="PACKED", help="A folder or a hub id of a packed model.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a model that lies in the output folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's), float16, bfloat16 or float32.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
ShardSizeOption = Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 500MB.")]
