"""Plots about being good to somebody: sharing, rescuing, keeping one's word, telling the truth."""

from .openings import CLOSING, OPENING, WITH_ELDER
from .teller import Teller

FULL_BASKET = """
    - {Time} {elder} gave {him} a {colour} basket with {n} {fruit} to carry to {friend}'s house.
    - {Time} in {season}, while {sign}, {hero} was on {his} way to market with {n} {fruit} in a {colour} basket.
    - {Time} {he} picked {n} {fruit}, laid them in a {colour} basket and set off along {setting.path}.
    - "Take these {n} {fruit} to {friend}," said {elder} {time}, "and bring my {colour} basket back in one piece."
"""
FIRST_BEGGAR = """
    - On the road sat {stranger}, a {stranger.kind} who had not eaten since {day}. {hero} gave {stranger.him} {k}
      {fruit}, and that left {rest}.
    - Soon {he} met a weary {stranger.kind} named {stranger}. "Could you spare a bite?" {stranger.he} asked. {hero}
      handed over {k} {fruit} and still had {rest}.
    - By the {tree} tree leaned a {stranger.kind}, thin as a rake. "I am {stranger}," {stranger.he} said, "and I am
      starving." {K} of the {n} {fruit} were soon eaten, and {rest} remained.
    - A {stranger.kind} called {stranger} was sitting on a milestone, [pale|faint] with hunger. "Have {k} of mine," said
      {hero}, who now had {rest} {fruit}.
"""
SECOND_BEGGAR = """
    - A little farther on {beast} the {animal} {animal.went} up and begged for {beast.his} children, so {hero} gave away
      {j} more. Now there were {last}.
    - Next came {beast}, a {animal} with a hungry family in {animal.home}. {J} {fruit} went to {beast.him}, and {last}
      were left.
    - Then a {animal} {animal.went} across the path. "{J} little ones are waiting for me," {animal.said} {beast}. {hero}
      gave one for each of them and was left with {last}.
    - Near {setting.wild} {he} found {beast} the {animal} weeping. "There is nothing to eat in {animal.home},"
      {beast.he} {animal.said}. So {j} {fruit} changed hands, and {last} stayed in the basket.
"""
WORRIES = """
    - "{N} there were, and {last} there are," thought {hero}. "What will {elder} say?"
    - The {colour} basket felt light now, and {his} heart felt a little heavy.
    - {He} counted them again, but counting did not make {last} into {n}.
    - {hero} walked more and more slowly, for {elder} had trusted {him} with all {n}.
"""
CONFESSES = """
    - "I gave away {k}, and then {j}," {he} told {friend}, "so there are only {last}." {friend} took one, sniffed at it
      and grinned. "Then these {last} will taste the better."
    - {friend} counted {last} {fruit} and looked puzzled. When {hero} had explained about the {stranger.kind} and the
      {animal}, {friend} fetched {food} from the {room} to share as well.
    - At the end of the road {friend} peered into the basket. "{Last}?" "{Last}," said {hero}, and told the whole tale.
    - "Only {last} {fruit}?" asked {friend}. "{K} are inside a {stranger.kind}," said {hero}, "and {j} are in
      {animal.home}."
"""
REPAID = """
    - The next morning the {colour} basket stood on the doorstep, full to the brim with {goods}, and on top lay a
      {shade} {prize}. {stranger} had not forgotten.
    - A week later {stranger} the {stranger.kind} knocked at the door with {goods} for the whole family, and {beast} the
      {animal} brought {n} {flower} bulbs.
    - When {hero} came home, {stranger} was sitting at the table. "So this is the child who fed me," said the
      {stranger.kind}, and gave {him} a {shade} {prize}.
    - And when winter came and {hero} had nothing to eat, {beast} the {animal} led {him} to a hidden store of
      {treasure}, and {stranger} paid for them in {goods}.
"""
SHARING_MORAL = """
    - Nobody ever became poor by sharing.
    - What you give away is the only thing that cannot be stolen from you.
    - {elder} only nodded. "A basket is for carrying," {elder} said, "but a heart is for giving."
    - {hero} was {happy}, and the {fruit} in the garden grew [sweeter|bigger] every year.
    - Kindness travels in a circle, and it always finds its way home.
"""


def sharing(say: Teller) -> None:
    """So many fruits, given away a few at a time; the sums are right."""
    say(OPENING)
    say(FULL_BASKET)
    say(FIRST_BEGGAR)
    say(SECOND_BEGGAR)
    say.maybe(WORRIES, 0.6)
    say(CONFESSES)
    say.maybe(REPAID, 0.8)
    say(SHARING_MORAL)


STORM = """
    - {Time} in {season} a storm broke over {town}: tiles flew, trees bent, and rain fell as if from buckets.
    - That {season} brought the wildest storm that anyone could remember; it tore a {tree} tree out by the roots.
    - {Time} the sky turned the colour of slate, and a dreadful wind came howling over {setting.wild}.
    - It began with a rumble {time}, and by nightfall lightning was dancing along {setting.path}.
"""
FINDS_HURT = """
    - When it was over, {hero} found a {animal} lying under a broken branch, with {beast.his} left {animal.limb} badly
      hurt.
    - Under the {tint} {spot} {hero} heard a faint cry. There lay a {animal}, soaked to the skin, and {beast.his} left
      {animal.limb} was bleeding.
    - In the ditch beside {setting.path} {he} discovered a {animal}, too weak to move, with a wounded left
      {animal.limb}.
    - {hero} ran out to close the shutters and nearly stepped on a {animal}, who was trembling and could not use
      {beast.his} left {animal.limb}.
"""
BANDAGES = """
    - {He} carried {beast.him} home, washed the {animal.limb} and bound it with a {colour} ribbon.
    - {He} tore a strip from {his} {colour} shirt, tied it round the {animal.limb} and said, "You shall be called
      {beast}."
    - {elder} knew what to do: warm water, clean straw, and a {colour} cloth wound round the poor {animal.limb}.
    - Very gently {hero} wrapped the {animal.limb} in a {colour} handkerchief and carried the {animal} into the {room}.
"""
NURSES = """
    - {He} named {beast.him} {beast} and fed {beast.him} {dish} from a spoon for {n} days.
    - For {n} days and nights {hero} sat by the stove with {beast}, as {he} called {beast.him}, and gave {beast.him}
      {dish}.
    - {beast}, for that became {beast.his} name, ate nothing but {dish} and slept for most of {n} days.
    - "Eat, {beast}," {he} would say, and little by little {beast} ate the {dish}. This went on for {n} days.
"""
SETS_FREE = """
    - On the morning after that, {beast} {animal.went} to the door. {hero} opened it with tears in {his} eyes, and
      {beast} was gone, the {colour} bandage still on {beast.his} {animal.limb}.
    - Then {beast} grew strong again and longed for {animal.home}, and {hero} was {trait} enough to let {beast.him} go.
    - After that the {animal} could stand again. "Go home," said {hero}, "your family is waiting in {animal.home}."
    - At last the {animal.limb} was healed. {beast} looked back once, {animal.said} something and {animal.went} away
      towards {setting.wild}.
"""
IN_DANGER = """
    - Months later {hero} lost {his} way in {setting.wild}. Fog came down, night came on, and every path looked the
      same.
    - The following year {hero} went to look for mushrooms and fell into a deep pit; {he} called, but nobody heard.
    - When {he} was out with {friend} one evening, the ice cracked, the lamp went out, and they could not find the
      shore.
    - A long time afterwards {hero} and {friend} strayed so far into {setting.wild} that they could not see the chimneys
      of {town} any more.
"""
COMES_BACK = """
    - Then something {animal.went} out of the dark: a {animal}, and round {beast.his} left {animal.limb} was a scrap of
      {colour} cloth. "{beast}!" cried {hero}.
    - All at once {he} saw two bright eyes and a strip of {colour} on a left {animal.limb}. It could only be {beast} the
      {animal}.
    - "Is anybody there?" {he} shouted. "I am," {animal.said} a voice, and {hero} knew the {colour} rag on the
      {animal.limb} before {he} knew the face. It was {beast}.
    - Just when all hope was gone, a {animal} {animal.went} up. There was something {colour} about {beast.his} left
      {animal.limb}, and {hero} whispered, "{beast}, is it you?"
"""
LEADS_HOME = """
    - {beast} {animal.said} and {animal.went} ahead, and the {colour} spot showed the way until the lights of {town}
      appeared.
    - Step by step {beast} led the way past {animal.home} and back to {setting.path}.
    - The {animal} fetched {n} others, and together the {animal.plural} brought {him} safely home.
    - "{N} days you watched over me," {animal.said} {beast}. "Now let me watch over you." And by dawn they were home.
"""
RESCUE_MORAL = """
    - Nobody is too small to say thank you.
    - {elder} hung the kettle over the fire and said, "You bound up a {animal.limb}, and it has brought you home."
    - A good deed may sleep for a long time, but it wakes up when it is needed.
    - Ever since, there has been a bowl of {dish} on {hero}'s doorstep, and in the morning it is always empty.
    - {hero} was {happy} to be alive, and happier still to have such a friend.
"""


def storm_rescue(say: Teller) -> None:
    """A hurt animal is nursed, and known again by its bandage when it comes to help."""
    say(OPENING)
    say.maybe(WITH_ELDER, 0.4)
    say(STORM)
    say(FINDS_HURT)
    say(BANDAGES)
    say(NURSES)
    say(SETS_FREE)
    say(IN_DANGER)
    say(COMES_BACK)
    say(LEADS_HOME)
    say.maybe(RESCUE_MORAL, 0.8)


PROMISES = """
    - {Time} {elder} had to travel to the city. "Promise me," said {elder}, "to water the {colour} {flower} every day
      until I return on {day}." "I promise," said {hero}.
    - "I shall be back on {day}," said {elder}, tying up a bundle. "Will you feed the {k} {animal.plural} and water the
      {colour} {flower}?" {hero} gave {his} word.
    - Before leaving {town}, {elder} made {him} promise one thing: the {colour} {flower} in the window must never go
      thirsty before {day}.
    - {elder} owned a single {colour} {flower}, the only one of its kind in {town}. "Guard it until {day}," said
      {elder}, and {hero} promised.
"""
TEMPTATION = """
    - But the very next day {friend} came running. "The fair is in town! There are {n} {animal.plural} that can dance,
      and everyone is going."
    - Hardly had {elder} gone when {friend} knocked. "Come to {setting.wild}! We are building a raft, and we stay until
      [{day}|the food runs out]."
    - Then {friend} had an idea. "Let us walk to the end of {setting.path} and see what is there. It takes only {k}
      days."
    - Two days went well. On the third, {friend} shouted over the wall, "I have {n} {fruit} and a tent! Come out and
      camp with me!"
"""
HESITATES = """
    - {hero} looked at {friend} and looked at the {flower}. Its {colour} petals were drooping in the heat.
    - How {he} longed to go! {He} already had one foot outside the door.
    - "Nobody would ever know," said a small voice inside {him}. "You would," said another.
    - {He} had never wanted anything so much, and {he} was {sad} enough to cry.
"""
STAYS = """
    - "I cannot," {he} said at last. "I gave my word until {day}." And {he} went to fill the {tint} jug.
    - {He} shook {his} head. "Tell me about it afterwards," {he} said, and {his} voice hardly trembled. "I must stay
      with the {flower} until {day}."
    - "A promise is a promise," said {hero}, and picked up the {tint} jug. "It is a long time until {day}, but not for
      ever."
    - Slowly {he} took off {his} cap again. "Go without me. {elder} trusts me, and {day} will come."
"""
LONG_DAYS = """
    - Every morning {he} filled the {tint} jug at the pump, and every evening {he} counted the days.
    - It was dull at home. {He} read a book with {n} chapters to the {flower}, and the {flower} listened politely.
    - {He} drew {k} pictures, learned a song about {animal.plural} and ate nothing but {food}.
    - One night there was a frost, and {hero} wrapped the pot in {his} own {shade} scarf.
"""
RETURNS = """
    - On {day} {elder} came through the gate, and the {flower} stood in the window as {colour} as a flame.
    - And on {day}, just as the clock struck {k}, there was {elder}. "My {colour} {flower}!" {elder} cried. "It has
      opened!"
    - When {day} came at last, the {flower} had {k} new buds, all of them {colour}.
    - {Day} dawned, and with it came {elder}, dusty from the road, who went to the {colour} {flower} first and hugged
      {hero} next.
"""
PROMISE_REWARD = """
    - Out of the bundle {elder} took a {shade} {prize}. "This is for somebody who keeps promises."
    - "I knew that I could count on you," said {elder}, "and so I have brought you a {shade} {prize}."
    - {friend} came home with a cold and wet feet, and the two of them warmed themselves with {dish} by the stove.
    - {elder} said nothing, but the next week {hero} was taken to the city, and {friend} was invited too.
"""
PROMISE_MORAL = """
    - A word once given is like a seed: look after it, and it will flower.
    - It is easy to promise and hard to keep, and that is why a kept promise shines.
    - {hero} felt {happy} and a little taller than before.
    - People in {town} still say, "As sure as {hero}'s word."
    - There will be other fairs, but trust, once lost, is hard to find again.
"""


def promise(say: Teller) -> None:
    """A promise until a certain day, a temptation, and the day itself."""
    say(OPENING)
    say.maybe(WITH_ELDER, 0.6)
    say(PROMISES)
    say(TEMPTATION)
    say.maybe(HESITATES, 0.7)
    say(STAYS)
    say.maybe(LONG_DAYS, 0.6)
    say(RETURNS)
    say(PROMISE_REWARD)
    say(PROMISE_MORAL)


PRECIOUS = """
    - On the highest shelf in the {room} stood a {colour} vase that had belonged to {elder}'s mother.
    - {elder} treasured one thing above all, a {colour} vase painted with {n} tiny {animal.plural}.
    - "You may touch everything in this house," said {elder}, "except the {colour} vase in the {room}."
    - In the {room} there was a {colour} vase, {n} times older than {hero} and as thin as an eggshell.
"""
BREAKS = """
    - {Time}, while {sign}, {hero} was playing with a ball indoors. There was a crash, and the vase lay in {k} pieces.
    - {Time} {he} climbed up to look at it. {His} elbow slipped, and the vase fell and broke into {k} pieces.
    - Then, {time}, {friend} threw a {shade} cushion, {hero} ducked, and the vase burst into {k} pieces.
    - {Time} {hero} danced past with {his} arms spread wide like a windmill, and a moment later there were {k} pieces of
      {colour} china on the floor.
"""
EXCUSES = """
    - "Say that {pet} did it," whispered {friend}. {pet} the {pet.kind} was asleep under the table and could not object.
    - {hero} hid the pieces {spot.where} a {tint} {spot}. Then {he} saw {pet} the {pet.kind}. It would be so easy to
      blame {pet.him}!
    - On the windowsill sat {pet}, {elder}'s old {pet.kind}. Everybody would believe that it had been {pet}.
    - "It was the wind," {he} practised, "or the {pet.kind}. Yes, it was {pet} the {pet.kind}."
"""
ASKED = """
    - That evening {elder} asked, "Who has broken my {colour} vase?"
    - Before supper {elder} came out of the {room} with a pale face. "Where is the vase?"
    - "Something is missing from the shelf," said {elder} in the evening, and it became very quiet in the kitchen.
    - At table {elder} put down the spoon. "Does anybody know what has become of the {colour} vase?"
"""
INNER = """
    - {hero}'s ears grew hot. {pet} looked at {him} with round, trusting eyes.
    - The {food} stuck in {his} throat, and {his} cheeks burned like coals.
    - The lie was lying ready on {his} tongue, and it tasted of soap.
    - {He} glanced at {pet} and felt smaller than a {animal}.
"""
TELLS_TRUTH = """
    - "It was not {pet}," {he} burst out. "It was me, and I am so sorry." And {he} laid the {k} pieces on the table.
    - "I broke it," said {hero} in a very small voice, "and I was going to say that the {pet.kind} did it. Here are all
      {k} pieces."
    - Then {he} stood up. "I did it, {elder}. There are {k} pieces, and I have kept every one."
    - {hero} swallowed hard, fetched the {k} pieces and told the truth from beginning to end.
"""
FORGIVES = """
    - {elder} was silent for a long while. "A vase can be glued," {elder} said then, "but a lie cannot."
    - "I am sorry about the vase," said {elder}, "but I am proud of you. It took courage to say that."
    - {elder} sighed, and then smiled. "When I was your age, I broke its twin, and I blamed the {pet.kind}. I have been
      {sad} about it ever since."
    - "Come," said {elder}, "I have glue, and you have clever fingers."
"""
MENDS = """
    - Together they glued the {k} pieces, and a thin golden line ran between them like a river on a map.
    - It took until {day}, but in the end all {k} pieces were joined, and only a crack in the shape of a {flower} was
      left.
    - {stranger} the {stranger.kind} helped them to mend it, and asked for nothing but a bowl of {dish}.
    - They filled it with {fruit}, because it could not hold water any more.
"""
HONESTY_MORAL = """
    - The mended vase was dearer to them than the whole one had been.
    - {pet} got an extra helping of {dish} and never knew why.
    - The truth may shake, but it stands; a lie runs fast and stumbles.
    - {hero} slept soundly that night, for nothing is softer than a clear conscience.
    - And {friend}, who had listened at the door, came in and said, "It was a little bit me, too."
"""


def honesty(say: Teller) -> None:
    """Something precious breaks, and the truth is told after all."""
    say(OPENING)
    say.maybe(WITH_ELDER)
    say(PRECIOUS)
    say(BREAKS)
    say(EXCUSES)
    say(ASKED)
    say.maybe(INNER, 0.6)
    say(TELLS_TRUTH)
    say(FORGIVES)
    say(MENDS)
    say(HONESTY_MORAL)
    say.maybe(CLOSING, 0.2)
