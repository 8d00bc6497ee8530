"""The facts of one story, drawn once: a name, a colour or a number is the same in its last sentence as in its first."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import words


class _Fact:
    """Lets a sentence begin with an attribute: `{hero.He}` is `{hero.he}` with a capital letter."""

    def __getattr__(self, name: str) -> str:
        if not name[:1].isupper():
            raise AttributeError(name)
        text = str(getattr(self, name.lower()))
        return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Character(_Fact):
    """Somebody with a name, a kind ("girl", "fox", "miller") and pronouns."""

    name: str
    kind: str
    female: bool

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"

    @property
    def himself(self) -> str:
        return "herself" if self.female else "himself"


@dataclass(frozen=True)
class Setting(_Fact):
    """A kind of place: prints as a phrase with its article."""

    phrase: str
    path: str
    wild: str
    folk: str

    def __str__(self) -> str:
        return self.phrase


@dataclass(frozen=True)
class Animal(_Fact):
    """A species: prints as its singular noun."""

    kind: str
    plural: str
    home: str
    went: str
    said: str
    limb: str

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Thing(_Fact):
    """An object one can own: prints as its noun. `joy` is what its owner did with it."""

    noun: str
    joy: str

    def __str__(self) -> str:
        return self.noun


@dataclass(frozen=True)
class Spot(_Fact):
    """A hiding place: prints as its noun. `reveal` is the verb that uncovers it."""

    where: str
    noun: str
    reveal: str

    def __str__(self) -> str:
        return self.noun


@dataclass(frozen=True)
class Countable(_Fact):
    """Something to be counted: prints as its plural."""

    one: str
    many: str

    def __str__(self) -> str:
        return self.many


@dataclass(frozen=True)
class World:
    """Every fact that a story may mention; the field names are the placeholders of the sentence pools."""

    hero: Character
    friend: Character
    elder: Character
    stranger: Character
    goods: str
    beast: Character
    animal: Animal
    rival: Character
    other: Animal
    pet: Character
    town: str
    setting: Setting
    season: str
    sign: str
    time: str
    day: str
    thing: Thing
    prize: Thing
    colour: str
    tint: str
    shade: str
    spot: Spot
    room: str
    fruit: Countable
    treasure: str
    food: str
    dish: str
    tree: str
    flower: str
    trait: str
    virtue: str
    sad: str
    happy: str
    riddle: str
    answer: str
    saying: str
    n: str
    k: str
    j: str
    rest: str
    """n - k"""
    last: str
    """n - k - j"""
    total: str
    """n + k"""


def _pick_two(rng: random.Random, pool: Sequence[str]) -> tuple[str, str]:
    """Two different members of a pool."""
    first = rng.choice(pool)
    second = rng.choice(pool)
    while second == first:
        second = rng.choice(pool)
    return first, second


def _child(rng: random.Random, *taken: str) -> Character:
    female = rng.random() < 0.5
    name = rng.choice(words.GIRLS if female else words.BOYS)
    while name in taken:
        name = rng.choice(words.GIRLS if female else words.BOYS)
    return Character(name, "girl" if female else "boy", female)


def _elder(rng: random.Random) -> Character:
    female = rng.random() < 0.5
    kind = rng.choice(("grandmother", "aunt") if female else ("grandfather", "uncle"))
    return Character(f"{kind.capitalize()} {rng.choice(words.WOMEN if female else words.MEN)}", kind, female)


def draw_world(rng: random.Random) -> World:
    """Draw all facts of one story."""
    hero = _child(rng)
    friend = _child(rng, hero.name)
    elder = _elder(rng)
    trade, goods = rng.choice(words.TRADES)
    woman = rng.random() < 0.5
    stranger = Character(rng.choice(words.WOMEN if woman else words.MEN), trade, woman)
    if trade == "ferryman" and woman:
        stranger = Character(stranger.name, "ferrywoman", True)
    beast_name, rival_name = _pick_two(rng, words.PETS)
    pet_name = rng.choice(words.PETS)
    while pet_name in (beast_name, rival_name):
        pet_name = rng.choice(words.PETS)
    animal = Animal(*rng.choice(words.SMALL_ANIMALS))
    other = Animal(*rng.choice(words.ANIMALS))
    while other == animal:
        other = Animal(*rng.choice(words.ANIMALS))
    season = rng.choice(("spring", "summer", "autumn", "winter"))
    thing, prize = Thing(*rng.choice(words.THINGS)), Thing(*rng.choice(words.THINGS))
    while prize == thing:
        prize = Thing(*rng.choice(words.THINGS))
    colour, tint = _pick_two(rng, words.COLOURS)
    shade = rng.choice(words.COLOURS)
    while shade in (colour, tint):
        shade = rng.choice(words.COLOURS)

    trait, virtue = _pick_two(rng, words.TRAITS)
    riddle, answer = rng.choice(words.RIDDLES)
    # So chosen, every number in a story is at least two, and so its noun is plural.
    n, k, j = rng.choice(range(11, 21)), rng.choice(range(3, 6)), rng.choice(range(2, 6))
    while j == k:
        j = rng.choice(range(2, 6))
    return World(
        hero=hero,
        friend=friend,
        elder=elder,
        stranger=stranger,
        goods=goods,
        beast=Character(beast_name, animal.kind, rng.random() < 0.5),
        animal=animal,
        rival=Character(rival_name, other.kind, rng.random() < 0.5),
        other=other,
        pet=Character(pet_name, rng.choice(words.PET_KINDS), rng.random() < 0.5),
        town=rng.choice(words.TOWNS),
        setting=Setting(*rng.choice(words.SETTINGS)),
        season=season,
        sign=rng.choice(words.SIGNS[season]),
        time=rng.choice(words.TIMES),
        day=rng.choice(words.DAYS),
        thing=thing,
        prize=prize,
        colour=colour,
        tint=tint,
        shade=shade,
        spot=Spot(*rng.choice(words.SPOTS)),
        room=rng.choice(words.ROOMS),
        fruit=Countable(*rng.choice(words.COUNTABLES)),
        treasure=rng.choice(words.TREASURES),
        food=rng.choice(words.FOODS),
        dish=rng.choice(words.DISHES),
        tree=rng.choice(words.TREES),
        flower=rng.choice(words.FLOWERS),
        trait=trait,
        virtue=virtue,
        sad=rng.choice(words.SAD),
        happy=rng.choice(words.HAPPY),
        riddle=riddle,
        answer=answer,
        saying=rng.choice(words.SAYINGS),
        n=words.NUMBERS[n],
        k=words.NUMBERS[k],
        j=words.NUMBERS[j],
        rest=words.NUMBERS[n - k],
        last=words.NUMBERS[n - k - j],
        total=words.NUMBERS[n + k],
    )
