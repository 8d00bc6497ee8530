"""The generator of the demo's stories: deterministic, correct English as far as a machine can tell, and rich enough."""

import hashlib
import lzma
import random
import re
from pathlib import Path

import pytest

from macko_llm.demo import run as demo
from tools.stories import bundle, openings, plots_courage, plots_fables, plots_kindness, plots_quests, words
from tools.stories.plots import PLOTS
from tools.stories.stories import (
    CALIBRATION_SEED,
    HELD_OUT_SEED,
    TRAIN_SEED,
    generate_story,
    stories,
    story_text,
)
from tools.stories.teller import Facts, Teller, split_pool
from tools.stories.world import Character, draw_world

POOLS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": pool
    for module in (openings, plots_courage, plots_fables, plots_kindness, plots_quests)
    for name, pool in vars(module).items()
    if name.isupper()
}


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return list(stories(HELD_OUT_SEED, 4000))


def test_same_text_on_every_python_and_machine() -> None:
    text = story_text(0, 20_000)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "31e8a6913ed651b9d83d4fe439d594474abf5b0b80276b881fba9c7f61b2f86e"
    )


def test_a_story_depends_on_its_seed_and_number_only() -> None:
    assert list(stories(7, 3, start=2)) == list(stories(7, 5))[2:]
    assert generate_story(random.Random(11)) == generate_story(random.Random(11))


def test_the_bundled_texts_are_the_generators(tmp_path: Path) -> None:
    """Byte for byte, as the demo writes them; compressed they may differ with the release of liblzma."""
    texts = demo.write_texts(tmp_path)
    written = {file.name: file.read_bytes() for file in (texts.calibration, texts.held_out)}
    assert written == {file.stem: lzma.decompress(file.read_bytes()) for file in bundle.write(tmp_path)}


def test_seeds_differ() -> None:
    assert len({TRAIN_SEED, CALIBRATION_SEED, HELD_OUT_SEED}) == 3
    assert not set(stories(0, 200)) & set(stories(1, 200))


@pytest.mark.parametrize("characters", [1, 1000, 50_000])
def test_story_text_is_just_long_enough(characters: int) -> None:
    text = story_text(4, characters)
    head, _, last = text.rpartition("\n\n")
    assert len(text) >= characters
    assert len(head) + 2 < characters or not head
    assert text.split("\n\n") == list(stories(4, text.count("\n\n") + 1))
    assert last


def test_length_and_shape(sample: list[str]) -> None:
    for story in sample:
        assert 80 <= len(story.split()) <= 250, story
        assert "\n" not in story
        assert story.isascii()
        assert story[0].isupper()
        assert re.search(r'[.!?]"?$', story), story


def test_nothing_is_left_unfilled(sample: list[str]) -> None:
    for story in sample:
        assert not re.search(r"[{}\[\]|<>]|  | [.,;:!?]|\.\.|,,|\bNone\b", story), story


def test_sentences_begin_with_capitals_and_quotes_close(sample: list[str]) -> None:
    for story in sample:
        assert not re.search(r"[.] \"?[a-z]", story), story
        assert story.count('"') % 2 == 0, story


def test_articles(sample: list[str]) -> None:
    # "one" and "use..." sound like consonants, and the h of "honest" and "hour" is silent.
    wrong = re.compile(
        r"\b[Aa] (?!one\b|use|uni)[aeiou]\w*|\b[Aa] (?:hour|honest)\w*|\b[Aa]n (?!hour|honest)[^aeiouAEIOU\W]\w*"
    )
    for text in ("a apple", "an pear", "a honest man", "An house", "an 8"):
        assert wrong.search(text), text
    for story in sample:
        assert not wrong.search(story), wrong.search(story)


def test_numbers_stand_before_plurals(sample: list[str]) -> None:
    numbers = "|".join(words.NUMBERS[2:])
    # "fifteen orange cups" is right, so a colour says nothing about its number.
    singular = [one for one, _ in words.COUNTABLES if one not in words.COLOURS]
    singular += ["boat", "day", "week", "piece", "year", "match", "time", "hour", "seed", "plate", "guest"]
    singular += [animal[0] for animal in words.ANIMALS if animal[0] != animal[1]]
    wrong = re.compile(rf"\b(?:{numbers}) (?:{'|'.join(singular)})\b", re.IGNORECASE)
    assert wrong.search("seven apple")
    for story in sample:
        assert not wrong.search(story), wrong.search(story)


def test_vocabulary_is_rich(sample: list[str]) -> None:
    vocabulary = {word.lower() for story in sample for word in re.findall(r"[A-Za-z']+", story)}
    assert len(vocabulary) >= 2000


def test_held_out_stories_are_new(sample: list[str]) -> None:
    assert len(set(sample)) >= 0.999 * len(sample)
    assert len(set(sample) & set(stories(TRAIN_SEED, 20_000))) <= 4


def test_every_plot_is_told() -> None:
    assert len(PLOTS) >= 10
    told: dict[str, set[str]] = {plot.__name__: set() for plot in PLOTS}
    for plot in PLOTS:
        for seed in range(20):
            teller = Teller(random.Random(seed))
            plot(teller)
            told[plot.__name__].add(teller.text())
    assert all(len(texts) == 20 for texts in told.values())


@pytest.mark.parametrize("name", POOLS)
def test_every_paraphrase_can_be_told(name: str) -> None:
    variants = split_pool(POOLS[name])
    assert len(variants) >= 4
    assert len(set(variants)) == len(variants)
    facts = Facts(vars(draw_world(random.Random(0))), he="she", him="her", his="her", himself="herself")
    for variant in variants:
        assert variant.format_map(facts)
        assert re.search(r'[.!?]"?$', variant), variant


@pytest.mark.parametrize("seed", range(200))
def test_world_is_consistent(seed: int) -> None:
    world = draw_world(random.Random(seed))
    n, k, j, rest, last, total = (
        words.NUMBERS.index(getattr(world, name)) for name in ("n", "k", "j", "rest", "last", "total")
    )
    assert rest == n - k
    assert last == n - k - j
    assert total == n + k
    assert min(n, k, j, rest, last) >= 2
    assert k != j
    assert len({world.colour, world.tint, world.shade}) == 3
    assert world.hero.name != world.friend.name
    assert len({world.beast.name, world.rival.name, world.pet.name}) == 3
    assert world.animal != world.other
    assert world.thing != world.prize
    assert world.sign in words.SIGNS[world.season]


def test_pronouns() -> None:
    ada, otto = Character("Ada", "girl", True), Character("Otto", "boy", False)
    assert f"{ada.he} {ada.him} {ada.his} {ada.himself}" == "she her her herself"
    assert f"{otto} {otto.He} {otto.him} {otto.His} {otto.himself}" == "Otto He him His himself"
    with pytest.raises(AttributeError):
        _ = otto.hers


def test_the_hero_keeps_one_pronoun() -> None:
    """A password story has no other girl or boy, so the hero's name and pronouns must agree all through."""
    plot = next(plot for plot in PLOTS if plot.__name__ == "password")
    for seed in range(100):
        teller = Teller(random.Random(seed))
        plot(teller)
        hero, stranger, beast = teller.world.hero, teller.world.stranger, teller.world.beast
        if hero.female and stranger.female and beast.female:
            assert not re.search(r"\b(he|him|his|himself)\b", teller.text(), re.IGNORECASE), teller.text()
        if not hero.female and not stranger.female and not beast.female:
            assert not re.search(r"\b(she|her|herself)\b", teller.text(), re.IGNORECASE), teller.text()


@pytest.mark.parametrize(
    ("plot", "fact"),
    [
        ("lost_thing", "colour"),
        ("lost_thing", "tint"),
        ("hidden_key", "n"),
        ("hidden_key", "shade"),
        ("password", "saying"),
        ("fair_swap", "goods"),
        ("sharing", "last"),
        ("storm_rescue", "colour"),
        ("promise", "day"),
        ("honesty", "k"),
        ("contest", "friend"),
        ("seed", "n"),
        ("lighthouse", "tint"),
        ("winter_stores", "n"),
        ("judgement", "shade"),
        ("party", "total"),
    ],
)
def test_facts_are_recalled(plot: str, fact: str) -> None:
    """What a story says early it says again: this is what a model must remember."""
    tell = next(candidate for candidate in PLOTS if candidate.__name__ == plot)
    for seed in range(60):
        teller = Teller(random.Random(seed))
        tell(teller)
        value = re.escape(str(getattr(teller.world, fact)))
        assert len(re.findall(rf"\b{value}\b", teller.text(), re.IGNORECASE)) >= 2, teller.text()


def test_choices_and_unknown_facts() -> None:
    teller = Teller(random.Random(0))
    teller("- A [apple] for {hero}, a {hero.kind}.")
    assert teller.text() == f"An apple for {teller.world.hero}, a {teller.world.hero.kind}."
    with pytest.raises(KeyError):
        teller("- {nobody} was here.")
