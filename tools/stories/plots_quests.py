"""Plots about looking for something: a lost thing, a hidden key, a password, a fair swap."""

from .openings import OPENING, WITH_ELDER
from .teller import Teller

CLUE = """
    - At the edge of {setting.wild} they met {beast}, a {animal} who lived in {animal.home}.
    - A {animal} called {beast} {animal.went} out of {animal.home} and looked them up and down.
    - Just then {beast} the {animal} {animal.went} by, on {beast.his} way back to {animal.home}.
    - Near {setting.wild} a {animal} was [resting|dozing] in the shade; {beast.his} name was {beast}, and {beast.he}
      missed very little.
"""

TREASURED = """
    - The thing {he} loved best in all the world was a {colour} {thing}: {he} {thing.joy}.
    - Of all {his} belongings {he} was fondest of a {colour} {thing}, and {he} {thing.joy}.
    - For {his} birthday {he} had been given a {colour} {thing}, and ever since {he} {thing.joy}.
    - {He} owned very little, but {he} did own a {colour} {thing}, and {he} {thing.joy}.
    - No [king|queen|emperor] was ever prouder of a crown than {hero} was of a {colour} {thing}; {he} {thing.joy}.
"""
VANISHED = """
    - But {time} in {season}, when {sign}, the {thing} was gone.
    - Then, {time}, {hero} reached for the {colour} {thing} and found [only an empty hook|nothing but dust].
    - {Time} in {season}, while {sign}, {he} noticed that the {thing} had [vanished|disappeared].
    - It was {season}, and {sign}, when {hero} discovered that the {colour} {thing} was missing.
"""
SEARCHED_HOME = """
    - {He} looked under the bed, behind the stove and in the {room}, but there was no {thing} anywhere.
    - {He} turned the whole house upside down, from the {room} to the chimney, and found [two lost socks|an old shoe]
      but no {thing}.
    - {He} searched the {room} first and the garden afterwards, until {his} knees were [muddy|black with dirt].
    - All morning {he} hunted through drawers, boxes and bags; even the {room} was swept from corner to corner.
"""
FRIEND_ASKS = """
    - {friend}, who lived next door, found {him} sitting on the step, looking {sad}. "What colour is your {thing}?"
      asked {friend}. "{Colour}," said {hero}.
    - "Why are you so {sad}?" asked {his} friend {friend}. "I have lost my {colour} {thing}," said {hero}, "and I cannot
      think where to look."
    - {hero} felt so {sad} that {he} could not eat {his} {food}, until {friend} came by and said, "Two pairs of eyes see
      more than one. Let us look together."
    - Soon {friend} came [skipping|whistling] along {setting.path}. "A {colour} {thing} cannot walk away on its own,"
      {friend} said. "Come, {sad} one, I will help you."
"""
CLUE_SPOT = """
    - "Something {colour} went past me this morning," {animal.said} {beast}. "Look {spot.where} the {tint} {spot}."
    - "If I were a lost {thing}," {animal.said} the {animal}, "I would lie {spot.where} the {tint} {spot} and wait."
    - {beast} {animal.said} that {beast.he} had seen something {colour} {spot.where} the {tint} {spot}, not far away.
    - "Do you know the {tint} {spot}?" {animal.said} {beast}. "You might do worse than to look {spot.where} it."
"""
NOT_THERE = """
    - On the way they saw a flash of {shade} in a {tree} tree, but it was only [a torn balloon|a paper bag|a rag].
    - First they came to a {shade} {spot} and found nothing there at all. "Wrong colour," said {friend}.
    - They asked the {setting.folk}, who shook their heads, and they asked a {stranger.kind}, who had seen nothing
      either.
    - "Let us not give up yet," said {friend}, though {setting.path} was steep and their feet were sore.
"""
FOUND = """
    - They hurried along {setting.path} to the {tint} {spot}, {spot.reveal} it together, and there lay the {colour}
      {thing}, [a little dusty|a little damp|quite unharmed].
    - Before long they stood in front of the {tint} {spot}. {hero} held {his} breath and {spot.reveal} it. There was the
      {thing}, as {colour} as ever.
    - "The {tint} {spot}!" cried {friend}. They {spot.reveal} it, and out of the shadows shone something {colour}: the
      lost {thing}.
    - And so it was: {friend} {spot.reveal} the {tint} {spot}, and {hero} pulled out the {colour} {thing} with a shout
      of joy.
"""
THIEF = """
    - A gust of wind must have carried it there, and nobody was to blame.
    - Beside it slept a magpie, who likes bright things and never asks [first|whose they are].
    - Then {hero} remembered: {he} had put it there {himself}, the week before, to keep it safe.
    - A puppy had dragged it there, for there were small tooth marks along the edge.
    - How it had got there, nobody ever found out.
"""
THANKS = """
    - {hero} shared a bowl of {dish} with {beast}, for a good {animal} should never go unthanked.
    - That evening {beast} the {animal} was given a whole bowl of {dish}, and {friend} had two.
    - "Thank you, {beast}," said {hero}, and ever after there was a bowl of {dish} waiting beside {animal.home}.
    - They carried some {dish} back to {animal.home}, and {beast} left not a drop.
"""
LOST_MORAL = """
    - From that day on {hero} kept the {colour} {thing} close, and {his} friends closer.
    - What is lost alone is often found together.
    - {He} was {happy} that night, and {he} knew that a friend who helps you look is worth more than any {thing}.
    - "Next time you lose something," said {friend}, "lose it somewhere nearer." And they both laughed.
    - So {hero} went home {happy}, with the {thing} in one hand and {friend}'s hand in the other.
"""


def lost_thing(say: Teller) -> None:
    """A beloved thing is lost, and found where an animal said."""
    say(OPENING)
    say(TREASURED)
    say(VANISHED)
    say.maybe(SEARCHED_HOME)
    say(FRIEND_ASKS)
    say(CLUE)
    say(CLUE_SPOT)
    say.maybe(NOT_THERE, 0.4)
    say(FOUND)
    say.maybe(THIEF)
    say(THANKS)
    say(LOST_MORAL)


ELDER_TELLS = """
    - {Time} {elder} drew {him} near and whispered, "When I was young I hid a {colour} key {spot.where} the {tint}
      {spot}. It opens the {shade} box in the {room}."
    - "Listen well," said {elder} {time}, while {sign}. "In the {room} stands a {shade} box, and its {colour} key lies
      {spot.where} the {tint} {spot}."
    - On the first day of {season} {elder} told {him} a secret: {spot.where} the {tint} {spot} lay a {colour} key, and
      the key belonged to a {shade} box in the {room}.
    - "I am too old to bend down," {elder} said {time}, "but you are not. {spot.Where} the {tint} {spot} there is a
      {colour} key, and in the {room} there is a {shade} box."
"""
BOX_HOLDS = """
    - "There are {n} {treasure} in the box," {elder} added, "and I have counted them twice."
    - "What is in it?" asked {hero}. "{N} {treasure}," said {elder}, "unless somebody has been there before you."
    - Inside, {elder} promised, {he} would find {n} {treasure}, no more and no fewer.
    - {hero} begged to know what the box held, and at last {elder} held up fingers: {n} {treasure}.
"""
REPEATS = """
    - All the way there {hero} said to {himself}, "{Tint} {spot}, {colour} key, {shade} box."
    - {He} wrote it on {his} hand, so as not to forget: {tint} {spot}, {colour} key.
    - {hero} forgot {his} hat and {his} shoes, but {he} did not forget about the {tint} {spot}.
    - "A {tint} {spot}, a {colour} key," {he} sang, marching along {setting.path}.
"""
GUARD = """
    - Before the {spot} sat {beast}, a large {animal}. "Nobody passes," {animal.said} {beast}, "who brings me nothing."
      Luckily {hero} had some {food} in {his} pocket.
    - But a {animal} named {beast} lay right in the way, fast asleep, and {hero} had to wait until {beast.he}
      {animal.went} home to {animal.home}.
    - At the garden gate a {animal} {animal.went} up to {him}. "I am {beast}," {beast.he} {animal.said}, "and I have
      guarded this place for {n} years. Did {elder} send you?" {hero} nodded.
    - Halfway there {he} met {beast} the {animal}, who had lost {beast.his} way, and only when {beast} was safely back
      in {animal.home} did {hero} go on.
"""
KEY_FOUND = """
    - At last {he} {spot.reveal} the {tint} {spot}, and there was the key, small and {colour}.
    - The {tint} {spot} was just where {elder} had said. {hero} {spot.reveal} it with trembling fingers and saw the
      {colour} key.
    - {He} {spot.reveal} the {tint} {spot}. A beetle ran off, a spider blinked, and between them gleamed a {colour} key.
    - It took all {his} courage, but {he} {spot.reveal} the {tint} {spot} and closed {his} hand round the {colour} key.
"""
BOX_OPENED = """
    - In the {room} the {shade} box was waiting under a sheet of cobwebs. The key turned with a click. {hero} counted:
      {n} {treasure}.
    - Back {he} ran to the {room}. The {shade} box creaked open, and {he} counted the {treasure} one by one until {he}
      came to {n}.
    - The {colour} key fitted the {shade} box as a foot fits an old slipper, and inside lay {n} {treasure}.
    - Up and down the {room} {he} searched until {he} found the {shade} box; the lid sprang open, and there were the {n}
      {treasure}.
"""
GIVES_SOME = """
    - {He} gave {k} of them to {friend}, who had always wanted some, and kept {rest}.
    - "{K} are for you," said {elder}, "and {rest} are for the poor of {town}." And so it was done.
    - {K} of the {n} went to {friend} as a present, so that {rest} were left in the box.
    - {friend} was allowed to choose {k}, and the other {rest} went back into the box for another day.
"""
ELDER_SMILES = """
    - {elder} smiled. "The best thing I ever hid," said the old {elder.kind}, "was the look on your face."
    - "Now you must hide something yourself," said {elder}, "for somebody who is not born yet."
    - {elder} laughed until the spectacles fell off. "I was not sure that I remembered the right {spot}!"
    - "You listened to every word," said {elder}, "and that is a rarer gift than {n} {treasure}."
"""
KEY_MORAL = """
    - {hero} hung the {colour} key round {his} neck, and it hangs there still.
    - A good memory opens more doors than a strong arm.
    - Whoever listens carefully need not search for long.
    - That night {he} put the {colour} key back {spot.where} the {tint} {spot}, for secrets should be passed on.
    - And whenever {hero} saw anything {tint}, {he} felt {happy} and thought of that day.
"""


def hidden_key(say: Teller) -> None:
    """An old person's secret: a key, a box, and so many treasures."""
    say(OPENING)
    say(WITH_ELDER)
    say(ELDER_TELLS)
    say(BOX_HOLDS)
    say.maybe(REPEATS, 0.6)
    say.maybe(GUARD)
    say(KEY_FOUND)
    say(BOX_OPENED)
    say.maybe(GIVES_SOME, 0.7)
    say.maybe(ELDER_SMILES, 0.7)
    say(KEY_MORAL)


ERRAND = """
    - {Time} {elder} fell ill, and only {stranger} the {stranger.kind} could mix the right medicine.
    - {Time} in {season}, while {sign}, {elder} needed somebody to carry a letter to {stranger}, the old
      {stranger.kind}.
    - {Time} the well ran dry, and the only one who knew why was {stranger}, a {stranger.kind} who lived behind high
      walls.
    - On {day} a message had to be brought to {stranger}, a {stranger.kind} who never opened the door to
      [anybody|strangers].
"""
PASSWORD = """
    - "The {stranger.kind} will open," said {elder}, "only if you say these words: {saying}."
    - "Knock {k} times," {elder} told {him}, "and then say: {saying}. Forget a single word, and the door stays shut."
    - {elder} made {him} learn the password by heart. It was this: {saying}. And {he} was to knock {k} times.
    - "{K} knocks," said {elder}, "and then the password, which is: {saying}."
"""
ON_THE_WAY = """
    - So {hero} set out along {setting.path}, with {food} in {his} bag and the words on {his} tongue.
    - {He} packed some {food}, kissed {elder} goodbye and walked through {setting.wild} until the roofs of {town} were
      no bigger than [crumbs|thimbles].
    - The road led through {setting.wild}, over {k} bridges and past a lonely {tree} tree.
    - For {k} hours {he} followed {setting.path}, and nobody met {him} but the wind.
"""
DISTRACTION = """
    - Halfway there a {animal} {animal.went} beside {him}. "Say something funny," {animal.said} {beast}, for that was
      {beast.his} name, and {hero} laughed so much that {he} nearly forgot what {he} had to say.
    - By a {tree} tree {beast} the {animal} asked {him} the way to {animal.home}, and {hero} had to stop and think.
    - Then thunder cracked, {beast} the {animal} {animal.went} for shelter, and for one dreadful moment {hero}'s head
      was as empty as a drum.
    - {He} met a {animal} named {beast}, who asked so many questions that the words in {his} head began to jumble.
"""
AT_THE_DOOR = """
    - At last {he} stood before a {colour} door and knocked {k} times. "What is the word?" called {stranger}.
      "{Saying}," said {hero}, and the {colour} door swung open.
    - The {colour} door of the {stranger.kind} was shut. {hero} knocked {k} times, took a deep breath and said,
      "{Saying}." Somewhere a bolt slid back.
    - {K} times {hero} knocked at the {colour} door. "Well?" growled a voice. "{Saying}," said {hero} without a mistake.
      "Come in, then," said {stranger}.
    - There was a {colour} door with no handle. {He} knocked {k} times and whispered, "{Saying}," and the {colour} door
      opened as if by itself.
"""
STRANGER_KIND = """
    - {stranger} turned out to be a {virtue} {stranger.kind}, and gave {him} {food} and a {shade} bottle for {elder}.
    - The {stranger.kind} was not fierce at all. "Nobody has visited me for {n} years," said {stranger}, and gave {him}
      a bowl of {dish}.
    - "You have a good head on your shoulders," said {stranger}, and filled {hero}'s bag with {treasure}.
    - {stranger} read the [note|message] twice, wiped {stranger.his} eyes and promised to come to {town} on {day}.
"""
PASSWORD_MORAL = """
    - When {elder} heard all about it, {he} was hugged so hard that {he} squeaked. A promise of words is a promise too.
    - Ever since then, when {hero} is {sad}, {he} says to {himself}, "{Saying}," and feels better.
    - And if you should ever come to a {colour} door, knock {k} times. You know what to say.
    - {hero} came home {happy} before dark. Small words, well kept, open great doors.
"""


def password(say: Teller) -> None:
    """A phrase must be carried a long way and said at a door, word for word."""
    say(OPENING)
    say.maybe(WITH_ELDER, 0.4)
    say(ERRAND)
    say(PASSWORD)
    say(ON_THE_WAY)
    say.maybe(DISTRACTION, 0.6)
    say(AT_THE_DOOR)
    say(STRANGER_KIND)
    say(PASSWORD_MORAL)


NO_MONEY = """
    - {Time} {he} wanted to buy a {shade} {prize} for {elder}, but all {he} owned was a {colour} {thing}.
    - {elder}'s birthday was on {day}, and {hero} longed to give {elder} a {shade} {prize}; {he} had nothing to pay with
      except a {colour} {thing}.
    - In the shop window at {town} stood a {shade} {prize}, just right for {elder}. "No money, no {prize}," said the
      shopkeeper. {hero} had only a {colour} {thing}.
    - {hero} had promised {elder} a {shade} {prize} before {day}, yet {his} pockets held nothing at all, and {his} whole
      fortune was a {colour} {thing}.
"""
FIRST_SWAP = """
    - So {he} went to market and met {friend}, who gave {him} {n} {fruit} for the {colour} {thing}.
    - On {setting.path} {he} met {friend}. "I will give you {n} {fruit} for that {colour} {thing}," said {friend}, and
      they shook hands.
    - {friend} had {n} {fruit} and no {thing}; {hero} had a {thing} and no {fruit}. The bargain was quickly struck.
    - First {he} swapped the {colour} {thing} with {friend} for {n} {fruit}, [fresh|ripe|sweet] and [heavy|shiny|fat].
"""
SECOND_SWAP = """
    - A hungry {stranger.kind} called {stranger} wanted the {fruit} so badly that {stranger.he} gave a {tint} bag of
      {goods} for all {n} of them.
    - Next came {stranger} the {stranger.kind}. "{N} {fruit}! Take this {tint} bag of {goods} for them," {stranger.he}
      said.
    - Then the {n} {fruit} went to {stranger}, a {stranger.kind}, who paid with [whatever was left|what would fit] in a
      {tint} bag: {goods}.
    - {stranger} the {stranger.kind} looked at the {n} {fruit}, and {stranger.his} mouth watered. Soon {hero} was
      carrying a {tint} bag of {goods} instead.
"""
THIRD_SWAP = """
    - The shopkeeper had been looking for {goods} all {season} long, and took the {tint} bag gladly in exchange for the
      {shade} {prize}.
    - "A {tint} bag of {goods}!" cried the shopkeeper. "For that you may have the {shade} {prize}, and some {food} too."
    - And what did the shopkeeper need more than anything? {Goods}! So the {tint} bag crossed the counter one way, and
      the {shade} {prize} the other.
    - At the shop {hero} laid the {tint} bag on the counter, and the shopkeeper, who needed {goods}, wrapped up the
      {shade} {prize} at once.
"""
SWAP_SUM = """
    - So the {colour} {thing} had turned into {n} {fruit}, the {fruit} into a {tint} bag, and the bag into a {shade}
      {prize}.
    - "First a {thing}, then {n} {fruit}, then a {tint} bag, and now a {prize}!" laughed {friend}.
    - {hero} counted on {his} fingers: one {colour} {thing}, {n} {fruit}, one {tint} bag of {goods}, one {shade}
      {prize}.
    - It was a long way from a {colour} {thing} to a {shade} {prize}, and every step of it had been fair.
"""
SWAP_END = """
    - {elder} unwrapped the {shade} {prize} and [wept|sang] for joy, and nobody in {town} was as {happy} as {hero}.
    - When {elder} heard how it had come about, {he} was given the biggest helping of {dish}. A fair trade leaves two
      people smiling.
    - {elder} {prize.joy}, or so the neighbours say. Those who have little can still give much.
    - "You gave away your {thing} for me?" said {elder}. "Then I shall love this {prize} [twice|ten times] as much."
    - And on {elder}'s next birthday {friend} brought back the {colour} {thing}, tied up with string.
"""


def fair_swap(say: Teller) -> None:
    """A chain of trades, from what one has to what one wants to give."""
    say(OPENING)
    say.maybe(WITH_ELDER, 0.4)
    say(NO_MONEY)
    say(FIRST_SWAP)
    say(SECOND_SWAP)
    say(THIRD_SWAP)
    say.maybe(SWAP_SUM, 0.7)
    say(SWAP_END)
