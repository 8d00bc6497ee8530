"""Little English stories from a grammar: text without a licence, a download or an end, the same on every machine.

The bundled model is trained on them, and the demo calibrates and evaluates on them. Facts given early in a
story (names, colours, numbers, passwords) are needed again at its end, so that a model has to remember to predict well.
"""

import random
from collections.abc import Iterator

from .plots import PLOTS
from .teller import Teller

TRAIN_SEED = 1
CALIBRATION_SEED = 2
HELD_OUT_SEED = 3


def generate_story(rng: random.Random) -> str:
    """One story of about 80 to 250 words, in one paragraph."""
    plot = rng.choice(PLOTS)
    teller = Teller(rng)
    plot(teller)
    return teller.text()


def stories(seed: int, count: int, start: int = 0) -> Iterator[str]:
    """Stories number `start` to `start + count - 1` of a seed; each depends on nothing but the seed and its number."""
    for index in range(start, start + count):
        # Seeding with text is specified (SHA-512) and, unlike seed + index, keeps the seeds' stories apart.
        yield generate_story(random.Random(f"{seed}/{index}"))


def story_text(seed: int, characters: int) -> str:
    """Stories joined by blank lines, as many as it takes to have at least so many characters."""
    parts: list[str] = []
    length, index = 0, 0
    while length < characters or not parts:
        parts.extend(stories(seed, 1, index))
        length += len(parts[-1]) + (2 if index else 0)
        index += 1
    return "\n\n".join(parts)
