"""The list of all plots."""

from collections.abc import Callable

from .plots_courage import contest, lighthouse, night_noise, riddle, seed
from .plots_fables import boaster, judgement, party, winter_stores
from .plots_kindness import honesty, promise, sharing, storm_rescue
from .plots_quests import fair_swap, hidden_key, lost_thing, password
from .teller import Teller

# The order is part of what a seed means: append, never insert.
PLOTS: tuple[Callable[[Teller], None], ...] = (
    lost_thing,
    hidden_key,
    password,
    fair_swap,
    night_noise,
    sharing,
    storm_rescue,
    promise,
    honesty,
    contest,
    riddle,
    seed,
    lighthouse,
    boaster,
    winter_stores,
    judgement,
    party,
)
