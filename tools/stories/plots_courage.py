"""Plots about trying hard: a contest, a riddle at a bridge, a slow seed, a light in the fog, a noise in the night."""

from .openings import CLOSING, OPENING, WITH_ELDER
from .teller import Teller

ANNOUNCED = """
    - Every {season} there was a race from the {tint} {spot} to the old {tree} tree, and the prize was a {colour}
      {prize}.
    - {Time} in {season} a notice was nailed to the {tree} tree: "Race across {setting.wild} on {day}. First prize, a
      {colour} {prize}."
    - The mayor of {town} announced a great race for {day}, {k} times round the town, and the winner was to receive a
      {colour} {prize}.
    - On {day} the {setting.folk} were to find out who was the fastest runner in {town}, and whoever won would get a
      {colour} {prize}.
"""
WANTS_PRIZE = """
    - {hero} had dreamed of a {colour} {prize} since {he} was {k}, and {he} practised for {n} days.
    - For {n} days {he} practised from sunrise to sunset, thinking of nothing but the {colour} {prize}.
    - "I will win it for {elder}," thought {hero}, and practised for {n} days without a rest.
    - {He} wanted it so badly that {he} saw {colour} whenever {he} closed {his} eyes. {N} days {he} trained.
"""
RIVAL_ENTERS = """
    - But {friend} entered as well, and {friend} had never been beaten.
    - There were {n} others, and the strongest of them was {friend}, {virtue} and sure of {friend.himself}.
    - "You may as well stay in bed," laughed {friend}, who had won the year before. {friend.His} coat was {shade}, and
      so was {friend.his} hat.
    - Among the {n} who put down their names was {friend}, in a splendid {shade} jacket.
"""
CONTEST_DAY = """
    - {Day} came. The {setting.folk} lined {setting.path}, {sign}, and a trumpet gave the signal.
    - On {day} the whole of {town} was on its feet. {stranger} the {stranger.kind} was the judge and raised a {tint}
      flag.
    - When {day} dawned, {hero} could not swallow {his} {food}. Then {stranger}, the {stranger.kind}, dropped a {tint}
      handkerchief, and it began.
    - The bells rang on {day}, drums rolled, and {stranger} the {stranger.kind} called out their names, {hero}'s last of
      all.
"""
AHEAD = """
    - {hero} did better than anyone had expected, and soon only {friend} was ahead of {him}.
    - At first {he} was the last of all, then the fourth, then the third, and then there was only {friend}.
    - To everyone's surprise {hero} and {friend} were soon far in front of all the others.
    - "Look at the {hero.kind}!" people shouted. "The {trait} one is catching up!"
"""
MISHAP = """
    - Then {friend} stumbled, fell and cried out; {friend.his} ankle was twisted.
    - Suddenly there was a crack and a cry. {friend} had been hit by a falling branch and could not get up.
    - All at once {friend} turned white and clutched {friend.his} knee. {friend.He} could not go on.
    - But just before the end a {animal} {animal.went} right in front of {friend}, who swerved and tumbled into the
      nettles.
"""
HELPS = """
    - {hero} saw the {colour} {prize} glittering ahead. {He} saw {friend}'s face as well, and {he} turned back.
    - It would have been easy to win now. Instead {hero} knelt down. "Lean on me," {he} said.
    - {He} did not think twice. "Take my arm," said {hero}. "We shall finish together."
    - For one moment {he} hesitated; then {he} ran to {friend} and bound up the hurt with {his} {tint} neckerchief.
"""
THIRD_WINS = """
    - Somebody else was first, a {stranger.kind}'s child in a {shade} cap, and nobody remembers the name.
    - So the others overtook them one by one, all {n} of them, and {hero} and {friend} came last, arm in arm.
    - The {colour} {prize} went to another, and {hero} clapped as loudly as anybody.
    - When the two of them arrived, the prize had been given away and the crowd was already eating {food}.
"""
HONOURED = """
    - But {stranger} said, "I have judged for {n} years, and today I saw the finest thing of all." And {hero} was given
      a {tint} {thing}.
    - That evening {friend} brought {him} a {tint} {thing}. "You won," {friend.he} said, "even if you came last."
    - Then the people of {town} lifted {hero} on their shoulders and carried {him} all the way along {setting.path}.
    - The next year {hero} and {friend} entered together, and {friend} saw to it that the {colour} {prize} came to
      {him}.
"""
CONTEST_MORAL = """
    - There are prizes that stand on a shelf and prizes that sit beside you at supper.
    - {hero} went home {happy}: {he} had lost a {colour} {prize} and won a friend.
    - To win is fine, but to be kind is finer.
    - Ask in {town} who won that year, and they will say: {hero}.
    - It is better to come last with a friend than first without one.
"""


def contest(say: Teller) -> None:
    """The hero could win, and helps the rival instead."""
    say(OPENING)
    say(ANNOUNCED)
    say(WANTS_PRIZE)
    say(RIVAL_ENTERS)
    say(CONTEST_DAY)
    say.maybe(AHEAD)
    say(MISHAP)
    say(HELPS)
    say(THIRD_WINS)
    say.maybe(HONOURED, 0.8)
    say(CONTEST_MORAL)


BRIDGE = """
    - To reach the {colour} mountain, where the healing {flower} grew, one had to cross a bridge, and on the bridge sat
      {rival} the {other}.
    - There was only one bridge out of {town}, and {time} in {season} a {other} called {rival} sat down in the middle of
      it and would not budge.
    - {hero} was taking {food} to {elder} {time}, while {sign}, when {rival}, a {other} as old as the hills, blocked the
      bridge.
    - {Time} {he} came to a narrow {colour} bridge. A {other} was guarding it. "I am {rival}," {rival.he} {other.said}.
"""
ASKS_RIDDLE = """
    - "Nobody passes who cannot answer me," {other.said} {rival}. "{riddle} You may guess {k} times."
    - "Here is my riddle," {other.said} the {other}. "{riddle} Answer by sunset on {day}, or turn back."
    - {rival} {other.said}, "{riddle} The clever may cross, and the others may swim."
    - The {other} looked at {him} for a long time and {other.said}, "{riddle} Think before you speak."
"""
WRONG_GUESS = """
    - "Is it a {animal}?" asked {hero}. "Wrong!" {other.said} {rival}, and yawned.
    - "A {fruit.one}!" said {hero} at once. "Wrong," {other.said} the {other}. "You did not think."
    - {hero} guessed a {thing}, and then a {flower}, and {rival} shook {rival.his} head both times.
    - {friend} had come along and cried, "A {tree} tree!" But the {other} only laughed.
"""
THINKS = """
    - {hero} sat down on a {tint} stone and thought until {his} head ached.
    - {He} walked up and down the bank, ate a piece of bread and walked up and down again.
    - "{riddle}" {he} murmured. "{riddle}" The river went by and gave no answer.
    - {He} shut {his} eyes and tried to see the thing in {his} mind.
"""
SEES = """
    - Then {he} remembered something in the {room} at home, and {his} face lit up.
    - {His} hand went to {his} pocket, where {he} kept a {shade} {thing}, and all of a sudden {he} laughed.
    - Just then the sun came out, and so did the idea.
    - What had {elder} always said? "Look at the words, not behind them." And {he} looked.
"""
ANSWERS = """
    - "I know!" called {hero}. "It is {answer}!"
    - "Could it be {answer}?" {he} asked. {rival} blinked. "It could, and it is."
    - {He} jumped up. "{Answer}! The answer is {answer}!"
    - "It is {answer}," said {hero} quietly, and the {other} bowed.
"""
CROSSES = """
    - {rival} {other.went} aside at once, and {hero} crossed the {colour} boards with {his} head held high.
    - "For {n} years nobody has guessed it," {other.said} {rival}, and let {him} pass.
    - The {other} moved over. "{N} came before you," {rival.he} {other.said}, "and all of them had to swim."
    - So the way was free. "Come again," {other.said} {rival}, who had been rather lonely. "I know {n} more."
"""
OWN_RIDDLE = """
    - On the way back {hero} asked {rival} a riddle in return: "What gets bigger the more you share it?" {rival} did not
      know. "Joy," said {hero}.
    - In the evening {he} told the riddle to {elder}, who guessed {k} times and never thought of {answer}.
    - Every {day} from then on {he} went to the bridge with {food}, and they asked each other riddles until dark.
    - The {other} gave {him} a {shade} {prize} for the journey, because a good answer deserves a good reward.
"""
RIDDLE_MORAL = """
    - A quick tongue guesses, but a quiet mind finds.
    - And if anybody asks you, "{riddle}" you will know what to say.
    - The hardest questions often have the plainest answers: {answer}, for instance.
    - {hero} came home {happy}, and wiser by one riddle.
"""


def riddle(say: Teller) -> None:
    """A guardian asks a riddle; the answer is recalled more than once."""
    say(OPENING)
    say.maybe(WITH_ELDER, 0.4)
    say(BRIDGE)
    say(ASKS_RIDDLE)
    say(WRONG_GUESS)
    say.maybe(THINKS, 0.7)
    say.maybe(SEES, 0.7)
    say(ANSWERS)
    say(CROSSES)
    say.maybe(OWN_RIDDLE, 0.7)
    say(RIDDLE_MORAL)


SEED = """
    - {Time} {stranger} the {stranger.kind} gave {him} a seed. "Plant it," said {stranger}, "and in {n} weeks you will
      have a {colour} {flower}."
    - {hero} found a striped seed in a bag of {goods}. "That will be a {colour} {flower}," said {elder}, "if you can
      wait {n} weeks."
    - In a letter from {elder} lay a single seed and a note: "A {colour} {flower}. Give it {n} weeks."
    - {He} swapped {k} {fruit} for a seed with {friend}, who swore that a {colour} {flower} would grow from it within
      {n} weeks.
"""
PLANTS = """
    - {He} planted it in a {tint} pot, set the pot on the windowsill and watered it every morning.
    - So {he} filled a {tint} pot with earth, made a hole with {his} thumb and tucked the seed in like a baby.
    - In the sunniest corner, next to a {tint} fence, {hero} dug a hole as deep as {his} finger.
    - {He} carried soil from {setting.wild}, put it in a {tint} bucket and laid the seed in the middle.
"""
NOTHING = """
    - One week went by, and there was nothing to see. Two weeks went by, and there was nothing still.
    - After {k} weeks there was only earth, black and bare.
    - Every day {he} looked, and every day the earth looked back.
    - A {animal} named {beast} {animal.went} past and {animal.said}, "You are watering mud."
"""
MOCKED = """
    - "It is dead," said {friend}. "Throw it away and come and play."
    - {friend} laughed at {him}. "Why do you not dig it up and look?"
    - "I had a seed once," {animal.said} {beast} the {animal}. "I ate it."
    - The {setting.folk} shook their heads. "Nothing ever grew in that corner," they said.
"""
KEEPS_ON = """
    - But {hero} went on watering, and {he} sang to the pot, because nobody had told {him} that seeds cannot hear.
    - {hero} was {sad}, yet {he} did not give up. "It promised," {he} said.
    - "{N} weeks are {n} weeks," said {hero}, and made a mark on the wall for every day.
    - "Waiting is work as well," said {elder}, and {hero} worked hard at it.
"""
SPROUTS = """
    - In the week before the last, a green tip no longer than an eyelash pushed up out of the earth.
    - Then, one night, the soil cracked, and in the morning there were two round leaves.
    - {Time} a pale shoot was standing there, with the husk of the seed on its head like a hat.
    - At last there was a sprout, so small that only {beast} the {animal}, who was smaller than most, saw it first.
"""
BLOOMS = """
    - And exactly {n} weeks after the planting, the bud opened, and there it was: a {colour} {flower}, brighter than
      anything in {town}.
    - When {n} weeks had passed, a {colour} {flower} stood in the morning light, and {hero} danced round it {k} times.
    - It grew and grew, and at the end of {n} weeks a {colour} {flower} nodded over the {tint} rim.
    - {N} weeks to the day, {he} woke to a sweet scent, and the {flower} was open and as {colour} as {he} had hoped.
"""
SHARES_SEEDS = """
    - In autumn it had {total} seeds. {hero} gave {k} of them to {friend} and kept {n}.
    - {friend} said nothing for a while and then asked in a small voice, "May I have a seed?" There were {n}, and {hero}
      gave {friend.him} {k}.
    - {hero} counted {total} new seeds, sent {k} to {stranger} and planted the other {n} along {setting.path}.
    - The next year there were {n} of them, all {colour}, and {town} was famous for its {flower} garden.
"""
SEED_MORAL = """
    - Good things take their time, and they do not like to be dug up.
    - Patience is a plant with bitter roots and sweet fruit.
    - And {hero}, {happy} and muddy, began to wait for the next one.
    - Those who pull at the grass do not make it grow any faster.
    - "Mud, was it?" said {hero}, and smiled.
"""


def seed(say: Teller) -> None:
    """A seed needs exactly so many weeks, and a hero who can wait."""
    say(OPENING)
    say.maybe(WITH_ELDER, 0.4)
    say(SEED)
    say(PLANTS)
    say(NOTHING)
    say.maybe(MOCKED, 0.7)
    say(KEEPS_ON)
    say(SPROUTS)
    say(BLOOMS)
    say.maybe(SHARES_SEEDS, 0.8)
    say(SEED_MORAL)


COAST_OPENING = """
    - On the stormy coast near {town} there lived a {trait} {hero.kind} named {hero}.
    - {hero} was a {hero.kind} who had grown up by the sea, {trait}, {virtue} and brown from the wind.
    - Once upon a time a {trait} {hero.kind} called {hero} lived where the land ends and the sea begins.
    - The waves knew {hero} well, for this {trait} {hero.kind} lived on the cliffs of {town}.
    - In {town}, where every street leads down to the harbour, there lived a {hero.kind} named {hero}, {trait} and
      {virtue}.
"""
LIGHT = """
    - On the headland beyond {town} stood a lighthouse with a {colour} door, and {elder} was its keeper.
    - {elder} kept the lighthouse, where {n} times {n} steps wound up to a lamp as big as a {other}.
    - {elder} kept the lamp in a tower by the water; its light was {colour} and could be seen for {n} miles.
    - Above the rocks there was a tower with a {colour} stripe, and in it lived {hero}, {elder} and a {animal} named
      {beast}.
"""
FOG = """
    - {Time} in {season} a fog rolled in, so thick that the gulls went on foot.
    - {Time} the sky came down, and one could not see from the doorstep to the gate.
    - That {season} a storm blew up from the west and brought the fog along with it.
    - {Time} the clouds swallowed the moon, and the waves began to climb the rocks.
"""
SHIPS = """
    - Out there were {n} fishing boats, and {friend}'s father was in one of them, the one with the {tint} sail.
    - "{N} boats went out this morning," said {friend} with white lips, "and my mother is in the one with the {tint}
      sail."
    - Somewhere in the darkness {n} boats were looking for the harbour, the smallest of them with a {tint} sail.
    - {hero} knew that {n} boats had not come home; {stranger} the {stranger.kind} was in the one with the {tint} sail.
"""
LAMP_OUT = """
    - And just then the great lamp flickered and went out.
    - {He} looked up at the tower. The lamp was dark.
    - But the wind had broken a pane, and the flame was gone.
    - Then {elder} slipped on the stairs and could not climb any farther. "The lamp!" {elder} cried. "You must light
      it."
"""
CLIMBS = """
    - {hero} took a box with {k} matches and ran up the stairs. {He} had never been up there alone.
    - There were {k} matches left. {hero} put them in {his} pocket and climbed, and the tower shook.
    - {Trait} as {he} was, {he} snatched up {k} matches and began to climb, counting the steps aloud.
    - Up and up went {hero}, with {k} matches in {his} fist and {his} heart in {his} mouth.
"""
LAST_MATCH = """
    - The first match broke, and the others were damp; only the very last of the {k} caught, and the lamp blazed up.
    - One after the other went out in the draught, until there was one match left of {k}. {He} cupped {his} hands, and
      it burned.
    - {He} sheltered them with a {shade} {thing}. All but one of the {k} matches failed, and that one was enough.
    - {K} matches, and all of them wet but the last! When it flared, {hero} wept with relief, and the light swept out
      over the water.
"""
BELL_TOO = """
    - {friend} rang the bell {k} times, waited and rang it {k} times again.
    - Down below {friend} beat on a {shade} saucepan to help them find the way.
    - {beast} the {animal} {animal.said} as loudly as {beast.he} could, and that helped as well.
    - All the fishermen's families hurried to the shore with torches and blankets.
"""
BOATS_HOME = """
    - One by one the boats came in: {k} first, then the others, and last of all the {tint} sail. {N} had gone out, and
      {n} came home.
    - Out of the fog came a mast, and another, until there were {rest}; then {k} more, and the last had a {tint} sail.
      {N} in all.
    - {hero} counted them from above. When {he} saw the {tint} sail, {he} knew that all {n} were safe.
    - Before dawn {n} boats lay in the harbour, side by side, and the {tint} sail was among them.
"""
LIGHT_END = """
    - The fishermen gave {him} a {shade} {prize}, and {elder} gave {him} the key to the tower.
    - There was hot soup for everyone, and {hero} fell asleep over {his} plate, {happy} and black with soot.
    - "It was only a match," said {hero}. "It was the right one," said {elder}.
    - One small flame, held up high, is stronger than a whole night of darkness.
    - And {friend} said, "I shall never again call a tower boring."
"""


def lighthouse(say: Teller) -> None:
    """A lamp goes out, so many boats are at sea, and all of them must come home."""
    say(COAST_OPENING)
    say(LIGHT)
    say(FOG)
    say(SHIPS)
    say(LAMP_OUT)
    say(CLIMBS)
    say(LAST_MATCH)
    say.maybe(BELL_TOO, 0.6)
    say(BOATS_HOME)
    say(LIGHT_END)
    say.maybe(CLOSING, 0.2)


NOISE = """
    - Late one night in {season} {hero} woke up and heard a noise in the {room}: scratch, scratch, thump.
    - Night after night something [rustled|tapped|creaked] in the {room}, and {hero} pulled the blanket over {his} ears.
    - When the lamps were out, a strange sound came from the {room}, as if somebody were [dragging a sack|counting
      bones].
    - "There is a monster in the {room}," {hero} told {elder}. "I have heard its [teeth|claws|chains]."
"""
FEARS = """
    - {He} thought of wolves, of ghosts, of giants with {n} eyes.
    - Perhaps it was a robber; perhaps it was a dragon no bigger than a dog, but with {n} teeth.
    - {His} heart thumped like a drum, and {he} counted to {n} and back again.
    - {friend}, who had come to stay, said that it must be a troll with {n} fingers on each hand.
"""
TAKES_LAMP = """
    - At last {he} took a candle in one hand and a {colour} {thing} in the other, and crept down the stairs.
    - {He} was frightened, but {he} was {trait} too, so {he} lit a lamp, picked up {his} {colour} {thing} and went to
      see.
    - Holding the {colour} {thing} before {him} like a shield, {hero} tiptoed to the door of the {room}.
    - "Being brave means going anyway," {elder} always said. So {hero} got up, clutching {his} {colour} {thing}.
"""
NO_MONSTER = """
    - There, {spot.where} a {tint} {spot}, sat no monster but a {animal}, shivering with fright, and {k} young ones.
    - Something moved. {He} {spot.reveal} the {tint} {spot} and saw a {animal} with {k} tiny babies.
    - The light fell on a {tint} {spot}. Very slowly {he} {spot.reveal} it, and {k} little {animal.plural} and their
      mother blinked at {him}.
    - "Please do not hurt us," {animal.said} a voice. {spot.Where} the {tint} {spot} crouched a {animal} and her {k}
      children.
"""
WHY_THERE = """
    - "Our home was {animal.home}," the {animal} explained, "but the rain washed it away."
    - The frost had driven them out of {animal.home}, and they had nowhere else to go.
    - They had been scratching about for crumbs, because the {season} had been hard and their bellies were empty.
    - "We were afraid of you," {animal.said} the mother. "We heard a monster breathing upstairs."
"""
FEEDS_THEM = """
    - {hero} laughed out loud, fetched some {food} and made them a bed of straw, with the {colour} {thing} at its foot.
    - {He} gave them {food} and laid the {colour} {thing} beside them, so that they should not be lonely.
    - Then {he} brought {k} saucers of warm milk, one for each of the little ones, and some {food} for their mother.
    - They shared {his} {food}, and the {k} small {animal.plural} fell asleep beside the {colour} {thing}.
"""
NOISE_END = """
    - Now, when there is a noise in the {room}, {hero} only smiles and turns over. Most monsters are smaller than they
      sound.
    - In the morning {he} told {elder}, "My monster has {k} children and likes {food}." What we know, we need not fear.
    - They stayed until the spring, and the {room} was never silent again, and {hero} was never again afraid of the
      dark.
    - Fear grows in the dark, but it shrinks in candlelight.
    - {friend} never believed a word of it, until {he} opened the {room} and showed {friend.him} all {k} of them.
"""


def night_noise(say: Teller) -> None:
    """What sounded like a monster is somebody small and frightened."""
    say(OPENING)
    say.maybe(WITH_ELDER, 0.6)
    say(NOISE)
    say.maybe(FEARS, 0.7)
    say(TAKES_LAMP)
    say(NO_MONSTER)
    say.maybe(WHY_THERE, 0.7)
    say(FEEDS_THEM)
    say(NOISE_END)
