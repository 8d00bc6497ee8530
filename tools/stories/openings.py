"""Sentence pools that many plots share: who the hero is, with whom the hero lives, how a story may close."""

OPENING = """
    - Once upon a time, in {town}, {setting}, there lived a {trait} {hero.kind} named {hero}.
    - In {town}, {setting}, there [once lived|lived] a {hero.kind} called {hero}, who was {trait} and {virtue}.
    - {hero} was a {trait} {hero.kind} who lived in {town}, {setting}.
    - Long ago a {trait} {hero.kind} by the name of {hero} lived in {town}, {setting}.
    - If you had come to {town}, {setting}, you would have met a {trait} {hero.kind} named {hero}.
    - There was once a {hero.kind} called {hero}, [as {trait} as could be|{trait} by nature], who grew up in {town},
      {setting}.
    - Everybody in {town}, {setting}, knew {hero}, the {trait} {hero.kind} with the [tangled hair|loud laugh|quick
      feet].
    - This is [the story|the tale] of {hero}, a {trait} {hero.kind} from {town}, {setting}.
"""
WITH_ELDER = """
    - {He} lived with {elder}, who [baked|cooked|made] the best {food} for miles around.
    - {elder} looked after {him} and told {him} a story every [night|evening].
    - {elder} had brought {him} up on {food} and [old songs|good advice|fairy tales].
    - {He} shared a [little|crooked|narrow] house under a {tree} tree with {elder}.
    - In the house lived only {hero}, {elder} and a clock that was always [slow|fast].
"""
FABLE_OPENING = """
    - In {setting.wild} near {town} lived a {animal} named {beast}, who was {trait} and {virtue}.
    - Once there was a {trait} {animal} called {beast}, who made {beast.his} home in {animal.home}.
    - {beast} was a {animal}, and {beast.his} home was {animal.home}, not far from {town}.
    - Long before {town} was built, a {trait} {animal} by the name of {beast} lived in {animal.home}.
    - The {animal.plural} of {town} still tell their children about {beast}, a {trait} {animal} from {animal.home}.
"""
FABLE_NEIGHBOUR = """
    - {beast.His} nearest neighbour was {rival} the {other}.
    - Next door, in {other.home}, lived a {other} named {rival}.
    - {beast.He} had one neighbour, a {other} by the name of {rival}, who came from {other.home}.
    - Not far away, in {other.home}, {rival} the {other} kept house.
"""
CLOSING = """
    - And that is the end of the story.
    - If they have not moved away, they are living there still.
    - And so it was, and so it may be again.
    - The rest you must dream yourself.
"""
