"""Word pools of the demo stories: plain tuples, so that a seed picks the same word on every Python and machine."""


def _words(text: str) -> tuple[str, ...]:
    """Split a block of words at white space."""
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    """Split a block of phrases at commas."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Split a table: a record a line, its fields between bars."""
    return tuple(tuple(field.strip() for field in line.split("|")) for line in text.strip().splitlines())


GIRLS = _words("""
    Ada Alma Anna Bea Bettina Cecily Clara Cora Daisy Dora Edith Effie Elsa Emma Esme Fern Flora Freya Greta Hanna
    Hazel Hetty Ida Imogen Ines Iris Ivy Jana Josie June Kira Lena Lila Lotte Lucy Mabel Maren Martha Maya Mina Mira
    Molly Nadia Nell Nina Nora Olive Petra Phoebe Poppy Rosa Ruth Sanna Signe Sylvie Tamsin Thea Tilda Vera Wanda
    Willa Yara Zelda Zoe
""")
BOYS = _words("""
    Aaron Adam Alfie Anton Arlo Axel Basil Ben Bruno Caleb Carl Colin David Dario Edgar Eli Emil Erik Ezra Felix Finn
    Frank Fritz George Gus Hal Hans Harry Henry Hugo Ian Igor Isaac Ivan Jack Jacob Jonas Julian Karim Kaspar Lars Leo
    Linus Lorenz Luca Marcus Martin Max Milo Nico Noah Olaf Oliver Omar Oscar Otto Owen Pablo Paul Peter Robin Samuel
    Simon Stefan Theo Thomas Tim Victor Walter Will
""")
WOMEN = _words("""
    Agatha Beatrix Constance Dorothea Eleanor Frederica Gertrude Henrietta Hester Isolde Josephine Katrin Leonora Magda
    Matilda Minerva Octavia Ottilie Philippa Prudence Rosalind Sabina Theodora Ursula Winifred
""")
MEN = _words("""
    Ambrose Anselm Barnaby Bartholomew Benedict Casimir Cornelius Edmund Ferdinand Gideon Gregory Horatio Ignatius
    Jasper Konrad Leopold Magnus Mortimer Nathaniel Oswald Percival Quentin Reuben Rufus Sebastian Silas Thaddeus
    Tobias Valentin Wendell
""")
PETS = _words("""
    Bandit Biscuit Bramble Bristle Bumble Cinder Clover Cobweb Comet Crumpet Dapple Domino Dusty Fidget Flicker Freckle
    Fudge Ginger Hopper Inky Juniper Marigold Misty Moss Muffin Nettle Nibbles Nutmeg Pebble Pepper Pippin Pickle
    Quill Rumble Saffron Scamp Shadow Sorrel Sprout Tansy Thimble Thistle Tinker Treacle Truffle Twig Velvet Whisper
""")
PET_KINDS = _words("""
    cat dog parrot tortoise rabbit canary hamster spaniel kitten ferret terrier dachshund jackdaw poodle
""")
TOWNS = _words("""
    Alderwick Applegarth Ashcombe Barleymow Birchwater Bluebell Brackenridge Cloverhill Copperfield Cranmere Dunmarrow
    Eastering Elderwick Fernhollow Foxdale Gannetstone Goosegreen Harrowby Hazelmere Heronsgate Honeywell Inglewood
    Kestrelby Larkfield Lindenau Mallowmere Marshwood Merrydown Millbrook Netherby Oakhampton Otterbourne Pendlebury
    Plumstead Quarrington Ravensby Rookhope Rushwater Saltmarsh Silverdale Stonebridge Swallowfield Thornbury Underhill
    Wexcombe Whitcliff Willowbrook Yarrowdale
""")

# the place | the way through it | the wild country beyond | the people
SETTINGS = _rows("""
    a fishing village by the sea | the harbour road | the sand dunes | fishermen
    a farm at the foot of the hills | the cart track | the upper pasture | farmers
    a small town with crooked chimneys | the cobbled lane | the overgrown park | shopkeepers
    a hamlet at the edge of the forest | the loggers' path | the deep forest | woodcutters
    a valley full of orchards | the orchard lane | the beech woods | fruit growers
    a mill village on a quick little river | the towpath | the reed beds | millers
    a snowy village high in the mountains | the mule track | the pine slopes | goatherds
    an island with a white lighthouse | the cliff path | the rocky coves | sailors
    a wide green plain where sheep grazed | the drovers' road | the open heath | shepherds
    a town of bridges and canals | the canal walk | the water meadows | bargemen
    an oasis at the rim of the desert | the caravan trail | the red canyon | traders
    a lonely settlement on the moor | the peat track | the misty bog | peat cutters
    a castle town on a steep hill | the winding stairs | the royal hunting grounds | guards
    a village among rice fields | the raised footpath | the bamboo grove | rice growers
    a lakeside village of wooden houses | the long jetty | the birch woods | boatbuilders
    a quarry town of dusty streets | the wagon road | the thorny gullies | stonecutters
""")

# kind | plural | home | how it moves | how it speaks | the limb it may hurt
SMALL_ANIMALS = _rows("""
    mouse | mice | the hole behind the mill | scurried | squeaked | paw
    hedgehog | hedgehogs | the leaf pile under the hedge | shuffled | snuffled | paw
    fox | foxes | the den among the roots | trotted | barked | paw
    hare | hares | the dip among the barley | bounded | whispered | foot
    squirrel | squirrels | the hollow oak | scampered | chattered | paw
    owl | owls | the church tower | glided | hooted | wing
    badger | badgers | the burrow beneath the hawthorn | lumbered | grumbled | paw
    otter | otters | the steep riverbank | slipped | whistled | paw
    frog | frogs | the lily pond | hopped | croaked | leg
    toad | toads | the gap under the steps | crawled | croaked | leg
    mole | moles | the tunnel below the cabbages | waddled | mumbled | paw
    tortoise | tortoises | the fig grove | plodded | wheezed | foot
    goose | geese | the pen beside the pond | strutted | honked | wing
    duck | ducks | the reeds by the ferry | paddled | quacked | wing
    lamb | lambs | the shepherd's fold | frisked | bleated | leg
    crow | crows | the dead elm | flapped | cawed | wing
    magpie | magpies | the thorn bush | fluttered | chattered | wing
    robin | robins | the ivy-covered wall | flitted | chirped | wing
    sparrow | sparrows | the eaves of the bakery | hopped | twittered | wing
    gull | gulls | the wrecked ship | swooped | shrieked | wing
    bat | bats | the rafters of the barn | darted | piped | wing
    beaver | beavers | the lodge below the dam | paddled | muttered | paw
    raven | ravens | the ruined watchtower | soared | croaked | wing
    rabbit | rabbits | the warren under the gorse | hopped | whispered | foot
    weasel | weasels | the crack in the garden wall | slunk | hissed | paw
    dormouse | dormice | the teapot in the hedge | tiptoed | yawned | paw
    lizard | lizards | the pile of warm stones | wriggled | lisped | leg
    snail | snails | the rhubarb patch | crept | sighed | horn
    cricket | crickets | the chink in the hearth | sprang | trilled | leg
    cat | cats | the loft above the cheese shop | padded | purred | paw
    dog | dogs | the kennel by the gate | bounded | barked | paw
    pigeon | pigeons | the belfry | fluttered | cooed | wing
    wren | wrens | the upturned flowerpot | flitted | twittered | wing
    kingfisher | kingfishers | the bank below the weir | flashed | piped | wing
    monkey | monkeys | the mango tree | swung | jabbered | foot
""")
# The large ones cannot be carried home.
ANIMALS = SMALL_ANIMALS + _rows("""
    goat | goats | the shed with the mossy roof | skipped | bleated | hoof
    donkey | donkeys | the stable behind the inn | ambled | brayed | hoof
    pony | ponies | the paddock near the chapel | cantered | snorted | hoof
    heron | herons | the quiet marsh | stalked | rasped | leg
    stork | storks | the nest on the chimney | paced | clattered | leg
    swan | swans | the bulrushes | sailed | hissed | wing
    deer | deer | the birch thicket | stepped | murmured | hoof
    camel | camels | the courtyard of the caravan house | swayed | groaned | foot
    bear | bears | the cave above the waterfall | ambled | rumbled | paw
    cow | cows | the byre | trudged | lowed | hoof
    wolf | wolves | the rocky ravine | prowled | howled | paw
    pig | pigs | the orchard sty | trotted | grunted | foot
    sheep | sheep | the stony hillside | strayed | bleated | leg
    seal | seals | the sheltered cove | flopped | barked | flipper
    pelican | pelicans | the pier | waddled | grumbled | wing
    peacock | peacocks | the palace garden | paraded | screeched | wing
    ox | oxen | the ploughed field | plodded | bellowed | hoof
""")

# noun | what its owner did with it
THINGS = _rows("""
    kite | flew it from the hill whenever the wind was strong
    scarf | wore it from the first frost until the last
    lantern | lit it every evening before supper
    ribbon | saved it for feast days and fairs
    cup | drank warm milk from it every night
    umbrella | carried it even under a cloudless sky
    ball | bounced it against the barn door for hours
    drum | beat it softly on rainy afternoons
    hat | never went out without it
    blanket | slept under it in summer and winter alike
    basket | filled it with berries on the way home
    whistle | blew it to call the hens
    wagon | pulled it up and down the lane
    paintbrush | painted birds with it on scraps of paper
    ring | turned it round and round when thinking
    marble | rolled it along the floorboards at bedtime
    purse | shook it now and then to hear it jingle
    comb | kept it in a box lined with moss
    spinning top | set it humming on the kitchen table
    doll | told it a secret every night
    music box | wound it up whenever the house felt too quiet
    feather | used it to mark the page of every book
    shawl | wrapped it close on cold nights
    teapot | polished it until it shone
    bell | rang it each morning to greet the sun
    flute | played three tunes on it, all of them sad
    sledge | waxed it with a candle stump
    watering can | watered the beans with it at dawn
    notebook | wrote the names of clouds in it
    compass | checked it at every crossroads
    apron | wore it when there was jam to be stirred
    chess piece | carried it everywhere for luck
    mitten | hung it by the stove to dry
    rocking horse | rode it to countries with no names
    toy boat | sailed it in every puddle
    hand mirror | caught the sunlight with it
    jug | filled it with wild flowers
    cushion | sat on it to listen to stories
    accordion | squeezed one slow waltz out of it
    egg timer | turned it over just to watch the sand
    inkwell | dipped an old quill in it on Sundays
    hourglass | measured the long afternoons with it
""")

# where | noun | how to uncover it
SPOTS = _rows("""
    under | stone | lifted
    behind | barrel | rolled aside
    behind | curtain | drew back
    inside | chest | opened
    beneath | rug | folded back
    under | flowerpot | tipped over
    under | rowing boat | turned over
    behind | door | pushed open
    under | basket | picked up
    inside | beehive | peered into
    behind | signpost | walked round
    beneath | bench | crawled under
    inside | mailbox | unlatched
    under | doormat | shook out
    behind | bookcase | shoved aside
    inside | cupboard | unlocked
    under | bucket | upturned
    behind | haystack | searched round
    beneath | floorboard | prised up
    inside | tent | crept into
    behind | gate | unbolted
    under | wheelbarrow | tilted
    inside | trunk | unbuckled
    beneath | statue | scrabbled under
""")

# singular | plural: what grows, and can be eaten
COUNTABLES = _rows("""
    apple | apples
    pear | pears
    plum | plums
    turnip | turnips
    pumpkin | pumpkins
    walnut | walnuts
    onion | onions
    peach | peaches
    fig | figs
    orange | oranges
    potato | potatoes
    carrot | carrots
    cabbage | cabbages
    lemon | lemons
    apricot | apricots
    chestnut | chestnuts
    quince | quinces
    radish | radishes
    melon | melons
    cherry | cherries
    strawberry | strawberries
    blackberry | blackberries
    mushroom | mushrooms
    hazelnut | hazelnuts
    olive | olives
    parsnip | parsnips
    beetroot | beetroots
    leek | leeks
    cucumber | cucumbers
    tomato | tomatoes
    date | dates
    almond | almonds
""")
TREASURES = _phrases("""
    silver coins, pearls, brass buttons, tin soldiers, glass beads, gold rings, painted marbles, old letters,
    packets of seeds, tiny mirrors, carved chessmen, sugar mice, postage stamps, coral earrings, polished shells,
    little keys, folded maps, wooden whistles, rubies, silk handkerchiefs
""")
# What fits in a bag, and what needs a bowl.
FOODS = _phrases("""
    honey cake, apple pie, barley bread, warm gingerbread, goat's cheese, cherry tart, plum cake, buttered toast,
    fresh waffles, cinnamon rolls, almond biscuits, walnut bread, roast chestnuts, oatcakes, poppy-seed cake,
    ham sandwiches, cheese straws, raisin buns, meat pasties, crusty rolls, shortbread, ginger snaps, apple turnovers
""")
DISHES = _phrases("""
    onion soup, pea soup, mushroom stew, rice pudding, oat porridge, lentil soup, dumpling soup, stewed rhubarb,
    chicken broth, tomato soup, baked beans, vanilla custard, noodle soup, buttered turnips,
    fish chowder, creamed spinach, semolina, potato mash, barley broth, apple sauce
""")
COLOURS = _words("""
    red blue green yellow white black brown grey purple orange pink silver golden scarlet violet crimson turquoise
    copper ivory amber
""")
NUMBERS = _words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four twenty-five
""")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TRAITS = _words("""
    curious gentle patient clever stubborn cheerful quiet brave thoughtful dreamy honest bold shy kind lively careful
    eager freckled hopeful inventive mischievous observant polite restless sensible tidy untidy adventurous
""")
SAD = _words("sad unhappy gloomy downhearted miserable wretched sorrowful lonely dejected heavy-hearted forlorn")
HAPPY = _words("happy glad cheerful delighted joyful merry contented proud radiant overjoyed light-hearted thankful")
TREES = _words("oak elm ash willow birch maple linden pine alder chestnut cedar poplar rowan yew hawthorn sycamore")
FLOWERS = _words("""
    rose tulip daisy foxglove sunflower poppy bluebell lily iris snowdrop marigold peony cornflower hollyhock primrose
    dahlia crocus lavender geranium anemone
""")
ROOMS = _words("attic cellar loft barn pantry stable tower washhouse library greenhouse workshop scullery")
TIMES = _phrases("""
    one morning, one evening, one afternoon, one Sunday, early one day, one breezy day, one Saturday,
    one market day, one grey dawn, one drowsy noon
""")
SIGNS = {
    "spring": _phrases("""
        lambs were jumping in the meadows, the first primroses were opening, cuckoos were calling from the wood,
        rain and sunshine were taking turns, swallows were coming home from the south,
        the hedges were turning green overnight
    """),
    "summer": _phrases("""
        bees were humming over the clover, the hay was drying in the sun, dragonflies were skimming the water,
        thunder was muttering far away, the strawberries were ripe, the days were long and golden
    """),
    "autumn": _phrases("""
        leaves were drifting down like copper coins, mist was lying in the hollows,
        geese were flying south in long lines, the smell of bonfires was in the air,
        acorns were pattering on the path, spiders were hanging webs on every gate
    """),
    "winter": _phrases("""
        snow was lying thick on every roof, icicles were growing from the gutters, the pond was frozen as hard as iron,
        smoke was rising straight from the chimneys, frost was painting ferns on the windows,
        the north wind was rattling the shutters
    """),
}

# trade | what is made or sold
TRADES = _rows("""
    baker | loaves
    potter | bowls
    weaver | tassels
    blacksmith | horseshoes
    tinker | spoons
    cobbler | slippers
    carpenter | pegs
    beekeeper | honeycombs
    tailor | waistcoats
    candlemaker | tapers
    clockmaker | cogwheels
    fiddler | strings
    gardener | tulip bulbs
    ferryman | fish hooks
    glassblower | bottles
    saddler | buckles
    basket maker | willow rods
    bookbinder | almanacs
    cook | pies
    toymaker | puppets
    cartwright | nails
    hatter | bonnets
    apothecary | dried herbs
    ropemaker | cords
    perfumer | soaps
    printer | picture cards
""")
RIDDLES = _rows("""
    What has teeth but never bites? | a comb
    What has hands but cannot clap? | a clock
    What grows shorter the longer it stands? | a candle
    What goes up when the rain comes down? | an umbrella
    What has an eye but cannot see? | a needle
    What runs all day and never leaves its bed? | a river
    What follows you at noon and hides at midnight? | your shadow
    What is full of holes and still holds water? | a sponge
    What gets wetter the more it dries? | a towel
    What has a neck but no head? | a bottle
    What can you break without touching it? | a promise
    What answers every call but never speaks first? | an echo
    What has four legs and cannot walk? | a table
    What has leaves but no branches? | a book
    What is lighter than a feather, yet no giant can hold it for an hour? | your breath
    What belongs to you, though others use it more? | your name
    What has a bark but no bite? | a tree
    What do we throw away when we need it and take back when we do not? | an anchor
    What house has neither door nor window? | an egg
    What flies without wings and weeps without eyes? | a cloud
""")
SAYINGS = _phrases("""
    silver fish swim slowly, the moon wears no shoes, seven geese make a winter, salt remembers the sea,
    old wells keep sweet water, a warm hearth has no enemies, the owl counts only stars, bread tastes best when broken,
    no river hurries home, the smallest bell is heard farthest, patient ants build castles, every door was once a tree,
    a borrowed coat is never cold, thunder is only the sky laughing, the fox pays for his own supper,
    even giants tie their laces, the last leaf dances longest, candles do not fear the night,
    honey comes to those who hum, a crooked path still climbs
""")
