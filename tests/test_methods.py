"""Pruning methods, each against definitions that share no code with it."""

from macko_llm import recipe
from macko_llm.pruning.methods import METHODS


def test_recipes_know_the_methods_and_which_of_them_calibrate() -> None:
    assert tuple(METHODS) == recipe.METHODS
    assert {name for name, method in METHODS.items() if not method.needs_calibration} == {*recipe.WITHOUT_CALIBRATION}
