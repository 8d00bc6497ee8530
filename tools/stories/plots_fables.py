"""Plots whose heroes are animals, and one about a wise judge."""

from .openings import FABLE_NEIGHBOUR, FABLE_OPENING, OPENING
from .teller import Teller

BOASTS = """
    - {rival} was the proudest {other} in the land. "Look at my {colour} {thing}," {rival.he} {other.said}. "Nobody has
      anything so fine."
    - Every day {rival} {other.went} up and down and {other.said}, "I am the fastest, the strongest and the cleverest of
      all {other.plural}."
    - "A {animal} is a poor sort of creature," {rival} used to say. "Now a {other}, a {other} is something grand!"
    - {rival} wore a {colour} {thing} on {rival.his} head and would not speak to anyone who did not admire it.
"""
MODEST = """
    - {beast} said nothing. {beast.He} gathered {fruit} and minded {beast.his} own business.
    - "That may be so," {animal.said} {beast} politely, and went on sweeping {beast.his} doorstep.
    - {beast} only smiled, for {beast.he} knew that every {other} has a heart somewhere.
    - It made {beast} {sad}, but a {trait} {animal} does not answer back.
"""
CHALLENGE = """
    - {Time}, while {sign}, {rival} said, "Let us race from the {tint} {spot} to the {tree} tree, {k} times round and
      back."
    - "I bet {n} {fruit}," {other.said} {rival} {time}, "that you cannot reach the {tint} {spot} before me." {beast}
      agreed.
    - {Time} {rival} shouted, "Whoever crosses {setting.wild} first shall be called king! We meet at the {tint} {spot}."
    - So a contest was arranged for {day}: first to the {tint} {spot}, then {k} times round it, then home.
"""
OVERCONFIDENT = """
    - {rival} {other.went} off like an arrow. Halfway there {rival.he} stopped to look at {rival.himself} in a puddle.
    - At once {rival} was far ahead. "There is time for a nap," {rival.he} thought, "and for some {food} before it."
    - {rival} laughed so much at {beast} that {rival.he} did not look where {rival.he} was going.
    - Soon {rival} could not see {beast} any more, and {rival.he} sat down to sing {rival.his} own praises.
"""
TRAPPED = """
    - Then a net fell from the {tree} tree, and {rival} was caught, {colour} {thing} and all.
    - All of a sudden the ground gave way, and {rival} was stuck up to the neck in a bog.
    - Snap! A hunter's trap closed on {rival.his} left {other.limb}.
    - A thorn bush took hold of {rival.his} left {other.limb} and would not let go, however hard {rival.he} pulled.
"""
SAVES = """
    - {beast} came along, slowly and steadily. {beast.He} could have passed by. Instead {beast.he} worked for {k} hours
      until {rival} was free.
    - "Help!" {other.said} {rival} in a very small voice. {beast} called {k} friends, and together they pulled.
    - "Hold still," {animal.said} {beast}, and {beast.he} gnawed and tugged and pushed until {rival} could move again.
    - {beast} had long passed the {tint} {spot} when {beast.he} heard the cry. {beast.He} turned round at once and set
      {rival} free.
"""
HUMBLED = """
    - "Why did you help me?" asked {rival}. "Because you needed it," {animal.said} {beast}.
    - {rival} hung {rival.his} head. "I have called you a poor sort of creature, and you are the best of us."
    - Then they went to the {tint} {spot} together and touched it at the same moment.
    - {rival} took {rival.his} {colour} {thing} and laid it at {beast}'s feet without a word.
"""
BOAST_MORAL = """
    - Pride {other.went} first and fell first.
    - Ever since then the {animal.plural} and the {other.plural} have been friends.
    - The loudest voice is not the strongest arm.
    - And when the young ones boast, they are told the story of {rival} the {other} and {beast} the {animal}.
    - {rival} never boasted again, or at any rate not before breakfast.
"""


def boaster(say: Teller) -> None:
    """A proud animal is rescued by the one it despised."""
    say(FABLE_OPENING)
    say(FABLE_NEIGHBOUR)
    say(BOASTS)
    say(MODEST)
    say(CHALLENGE)
    say(OVERCONFIDENT)
    say(TRAPPED)
    say(SAVES)
    say.maybe(HUMBLED, 0.8)
    say(BOAST_MORAL)


GATHERS = """
    - All through the summer {beast} gathered {fruit}, and by autumn there were {n} in {beast.his} larder.
    - {beast} worked from morning till night. {N} {fruit} {beast.he} stored, {spot.where} a {tint} {spot} where nobody
      would look.
    - While the sun shone, {beast} carried home {fruit}, one by one, until {beast.he} had {n}.
    - "Winter has a big mouth," {beast}'s mother used to say, and so {beast} put away {n} {fruit}.
"""
IDLES = """
    - {rival} lay in the grass and played a {colour} {thing}. "Why hurry?" {rival.he} {other.said}.
    - But {rival} danced, and {rival} sang, and {rival} dozed in the shade of the {tree} tree.
    - "You will wear out your {animal.limb}," {other.said} {rival}, who had not stored so much as a crumb.
    - {rival} spent the whole summer painting pictures of the {flower} in every shade of {colour}.
"""
WINTER = """
    - Then winter came in a single night, and {setting.wild} lay white and silent.
    - In December the snow was so deep that only the top of the {tree} tree showed.
    - The first frost killed the {flower}, the second froze the pond, and the third came in under the door.
    - One morning the world was gone, and there was only snow.
"""
KNOCKS = """
    - There was a knock at the door of {animal.home}. It was {rival}, thin and shivering. "I have not eaten since
      {day}."
    - {rival} came to the door with ice on {rival.his} {other.limb}. "May I have a {fruit.one}?" {rival.he} asked, and
      was ashamed.
    - On {day} somebody tapped at the window, so softly that {beast} nearly missed it. There stood {rival} the {other}.
    - In the middle of the night {beast} heard a sob outside. {rival} was sitting in the snow, too proud to knock.
"""
COUNTS = """
    - {beast} counted. There were {n}. If {beast.he} gave away {k}, {rest} would be left, and {rest} would do.
    - "{N} take away {k} is {rest}," thought {beast}, and put {k} {fruit} on a plate.
    - {beast} went to the larder, took {k} of the {n} {fruit} and looked for a moment at the {rest} that remained.
    - "I have {n}," {animal.said} {beast}. "{K} are yours. We shall have to be careful with the other {rest}."
"""
PAYS_BACK = """
    - {rival} could not pay, but {rival.he} had songs, and every evening {animal.home} was full of music.
    - In return {rival} told stories, and the long nights became short.
    - {rival} hung {rival.his} pictures on the walls, and it looked like summer in the middle of January.
    - "What did you do all summer?" asked {beast}. "I learned {n} tunes," {other.said} {rival}, and played them all.
"""
NEXT_YEAR = """
    - When spring returned, {rival} was the first to get up, and that year there were {n} {fruit} in {other.home} too.
    - The next summer they worked together in the mornings and sang together in the afternoons.
    - And when the snow had melted, {rival} planted a whole row of {fruit}, one for every {fruit.one} {rival.he} had
      eaten.
    - The following autumn {rival} brought back {k} {fruit} and {j} more for thanks.
"""
WINTER_MORAL = """
    - Work fills the larder, and song fills the heart, and a good house needs both.
    - It is wise to save and wiser to share.
    - {beast} was {happy}, for a full larder is a lonely thing with nobody to dine with.
    - Think of winter while the sun is shining, and of your neighbour when it is not.
"""


def winter_stores(say: Teller) -> None:
    """One animal stores for the winter and one sings; the sums are right."""
    say(FABLE_OPENING)
    say(FABLE_NEIGHBOUR)
    say(GATHERS)
    say(IDLES)
    say(WINTER)
    say(KNOCKS)
    say(COUNTS)
    say(PAYS_BACK)
    say.maybe(NEXT_YEAR, 0.8)
    say(WINTER_MORAL)


QUARREL = """
    - {Time} {hero} and {friend} found a {colour} {thing} on {setting.path}, and each of them said, "I saw it first."
    - {Time} in {season} there was shouting in {town}. {hero} and {friend} were tugging at a {colour} {thing}, one at
      each end.
    - {hero} said that {he} had found the {colour} {thing}; {friend} said that {friend.he} had lost it. They had
      quarrelled about it since {day}.
    - Both {hero} and {friend} claimed the same {colour} {thing}, and neither would let go of it.
"""
ANGRY = """
    - They shouted until {n} windows opened and {n} heads looked out.
    - {friend} called {hero} a {animal}, and {hero} called {friend} a {other}.
    - They had been friends for {n} years, and now they would not look at each other.
    - "Mine!" "No, mine!" Even the {animal.plural} ran away.
"""
TO_JUDGE = """
    - So they went to {stranger} the {stranger.kind}, who was known for good sense and {goods}.
    - "Let {stranger} decide," said the {setting.folk}. {stranger} was a {stranger.kind} and had never told a lie.
    - In the end they asked {stranger}, the oldest {stranger.kind} in {town}, to be the judge.
    - "Enough," said {elder}. "You shall go to {stranger} the {stranger.kind}, and what {stranger.he} says shall be
      done."
"""
JUDGE_ASKS = """
    - {stranger} laid the {thing} on a {tint} cloth and asked, "What does it look like underneath?" {hero} did not know.
      "There is a {shade} spot," said {friend}.
    - "If it is yours," said {stranger}, covering it with a {tint} cloth, "tell me its secret." {hero} was silent, but
      {friend} said, "It has a {shade} mark on the bottom, as small as a pea."
    - {stranger} hid it under a {tint} hat. "Describe it to me." "It is {colour}," said {hero}. "It is {colour}," said
      {friend}, "with a {shade} scratch on one side."
    - "Each of you may say one thing," said {stranger}, and threw a {tint} cloth over it. {hero} praised its {colour}
      colour. {friend} spoke of a tiny {shade} stain.
"""
JUDGE_LOOKS = """
    - The {stranger.kind} lifted the {tint} cover, turned the {thing} over, and there was something {shade}. "It belongs
      to {friend}," {stranger.he} said.
    - Away went the {tint} cover, and everyone leaned forward. It was {shade}, just as {friend} had said.
    - {stranger} looked, nodded and held it up for all to see: a little patch of {shade}. "{friend} spoke the truth."
    - Slowly {stranger} took the {tint} cover away. There it was, {shade} and plain as day, and {hero} turned red.
"""
SORRY = """
    - "I really thought that I had seen it first," said {hero}. "I am sorry."
    - {hero} was {sad} and ashamed and wanted to run away, but {he} held out {his} hand instead.
    - "I wanted it so much that I believed it was mine," whispered {hero}.
    - Nobody spoke. Then {hero} said, "I was wrong," and those are heavy words to lift.
"""
SHARES_ANYWAY = """
    - And {friend} said, "You may have it every {day}."
    - {friend} thought for a while. "It is more fun with two," {friend.he} said, and they carried it home together.
    - "Then take this," said {stranger}, and gave {hero} a {tint} {prize}, "because it is hard to be wrong and harder to
      say so."
    - {friend} put the {colour} {thing} into {hero}'s hands. "Keep it until {day}," {friend.he} said. "After that it is
      my turn."
"""
JUDGE_MORAL = """
    - To own a thing, it is not enough to want it.
    - The {thing} is broken now, but the friendship is as good as new.
    - The {stranger.kind} went back to {stranger.his} {goods}, and {town} was quiet once more.
    - They ate {dish} together that evening, {happy} and hoarse.
    - He who looks closely need not shout loudly.
"""


def judgement(say: Teller) -> None:
    """Two friends claim the same thing; a small mark decides."""
    say(OPENING)
    say(QUARREL)
    say.maybe(ANGRY, 0.7)
    say(TO_JUDGE)
    say(JUDGE_ASKS)
    say(JUDGE_LOOKS)
    say(SORRY)
    say(SHARES_ANYWAY)
    say(JUDGE_MORAL)


VISITORS = """
    - {Time} in {season}, while {sign}, {beast} gave a party. {K} {other.plural} came first, and then {n}
      {animal.plural}.
    - {beast} invited all the neighbours for {day}: {n} {animal.plural} and {k} {other.plural}.
    - On {day} it was {beast}'s birthday, and to {animal.home} came {k} {other.plural} and {n} {animal.plural}.
    - {Time} guests arrived at {animal.home}, {n} {animal.plural} from the east and {k} {other.plural} from the west.
"""
NOT_ENOUGH = """
    - There was food for {n}, but {n} and {k} make {total}, and {beast} grew pale.
    - {beast} had set out {n} plates. Now there were {total} guests, and somebody would have to go hungry.
    - "{N} and {k} is {total}," {beast} counted, "and I have only {n} {tint} cups!"
    - {beast.He} had {n} chairs. For {total} guests that was {k} too few.
"""
PANIC = """
    - {beast} hid {spot.where} a {tint} {spot} and wished that the day were over.
    - "I am the worst {animal} in the world," sobbed {beast}, and let {beast.his} {dish} burn.
    - {beast} was too {sad} to come out of the {room}.
    - "What shall I do? What shall I do?" {animal.said} {beast}, running in circles.
"""
RIVAL_HELPS = """
    - It was {rival}, the smallest {other}, who found {beast.him}. "Has nobody told you?" {rival.he} {other.said}. "We
      have all brought something."
    - Then {rival} the {other} {other.went} up to {beast.him}. "Open the {colour} basket that I left by the door,"
      {rival.he} {other.said}.
    - "A guest has two hands," {other.said} {rival}, an old {other}, "or at least a {other.limb}. Let us help."
    - {rival}, a {other} with a {colour} {thing}, {other.went} in and asked what was the matter. When {rival.he} had
      heard it, {rival.he} laughed.
"""
FEAST = """
    - Out of bags and pockets came {food} and {total} {fruit}, one for each of them.
    - They laid the table with leaves, sat on the floor, and they had enough {dish} for all {total}.
    - In no time {total} {fruit} were lying on the grass, and beside them a mountain of {food}.
    - They cut everything in half, and then there was more than enough: {total} helpings, and one for the {tree} tree.
"""
PARTY_END = """
    - They danced until the stars came out, {n} {animal.plural} and {k} {other.plural}, and {beast} in the middle.
    - A table does not grow larger by worrying, but it does by sharing.
    - "Next time," {animal.said} {beast}, "I shall count the friends and not the cups."
    - When the last guest had gone, {beast} was {happy} and tired, and slept until noon.
    - And {rival} stayed behind to wash up {total} plates, and that is how the two became friends.
"""


def party(say: Teller) -> None:
    """More guests than plates, and an addition that comes out right."""
    say(FABLE_OPENING)
    say(VISITORS)
    say(NOT_ENOUGH)
    say(PANIC)
    say(RIVAL_HELPS)
    say(FEAST)
    say(PARTY_END)
