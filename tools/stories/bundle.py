"""Writes the texts that the demo calibrates and evaluates on, compressed, as they lie beside the bundled model.

    python -m tools.stories.bundle macko_llm/demo

The bundled model knows the stories as they were when it was trained; other texts would make other figures.
"""

import argparse
import lzma
from pathlib import Path

from .stories import CALIBRATION_SEED, HELD_OUT_SEED, story_text

TEXTS = {
    "calibration.txt": (CALIBRATION_SEED, 400_000),
    "held-out.txt": (HELD_OUT_SEED, 60_000),
}
"""Seed and least number of characters by name; the figures in docs/benchmarks.md were measured on these."""


def write(folder: Path) -> list[Path]:
    """Write every text into an existing folder, and return the files."""
    files = []
    for name, (seed, characters) in TEXTS.items():
        file = folder / f"{name}.xz"
        file.write_bytes(lzma.compress(story_text(seed, characters).encode(), preset=9 | lzma.PRESET_EXTREME))
        files.append(file)
    return files


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.stories.bundle", description="Write the demo's texts.")
    parser.add_argument("folder", type=Path, help="existing folder to write them to")
    for file in write(parser.parse_args().folder):
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
