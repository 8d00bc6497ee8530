"""Turns sentence pools and the facts of a world into the text of a story.

A pool is a block of paraphrases, each beginning with "- " on its own line (a long one may wrap). In a paraphrase,
`[quiet|silent]` is a choice of words and `{hero}` a fact of the world; `{Hero}` is the same fact with a capital letter.
Pools write "a" before every noun; the teller makes it "an" where English wants it.
"""

import random
import re
from functools import cache

from .world import World, draw_world

_CHOICE = re.compile(r"\[([^\]]*)\]")
# These are written with a vowel and spoken with a consonant, or the other way round.
_A_BEFORE_VOWEL = ("one", "once", "unicorn", "use", "usual", "uni")
_AN_BEFORE_CONSONANT = ("hour", "honest", "honour")
_ARTICLE = re.compile(r"\b([Aa]) (?=(\w+))")


@cache
def split_pool(pool: str) -> tuple[str, ...]:
    """The paraphrases of a pool, each on one line."""
    return tuple(" ".join(variant.split()) for variant in re.split(r"^\s*- ", pool, flags=re.MULTILINE)[1:])


def _article(match: re.Match[str]) -> str:
    word = match[2].lower()
    vowel = (word[0] in "aeiou" and not word.startswith(_A_BEFORE_VOWEL)) or word.startswith(_AN_BEFORE_CONSONANT)
    return f"{match[1]}n " if vowel else match[0]


class Facts(dict[str, object]):
    """The world's facts by name; a name with a capital letter gives the fact with a capital letter."""

    def __missing__(self, key: str) -> str:
        value = str(self[key.lower()]) if key[0].isupper() else ""
        if not value:
            raise KeyError(key)
        return value[0].upper() + value[1:]


class Teller:
    """Collects the sentences of one story; a plot calls it once a sentence pool."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.world: World = draw_world(rng)
        self._facts = Facts(vars(self.world))
        hero = self.world.hero
        for pronoun in ("he", "him", "his", "himself"):
            self._facts[pronoun] = getattr(hero, pronoun)
        self._sentences: list[str] = []

    def __call__(self, pool: str) -> None:
        """Say one paraphrase of the pool."""
        rng = self.rng
        sentence = rng.choice(split_pool(pool))
        sentence = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), sentence)
        self._sentences.append(sentence.format_map(self._facts))

    def maybe(self, pool: str, chance: float = 0.5) -> None:
        """Say one paraphrase of the pool, or nothing."""
        if self.rng.random() < chance:
            self(pool)

    def flip(self, chance: float = 0.5) -> bool:
        """Decide between two branches of a plot."""
        return self.rng.random() < chance

    def text(self) -> str:
        """Everything said so far, as one paragraph."""
        return _ARTICLE.sub(_article, " ".join(self._sentences))
