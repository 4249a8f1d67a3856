"""Word lists and prose of our own, for contexts that may be shipped anywhere."""

from __future__ import annotations

import random
import uuid

ADJECTIVES = """amber ancient ample arctic autumn azure bashful bitter blazing bold brass brave breezy bright brittle broad
bronze calm careful cedar cheerful chilly civil clever cloudy coastal cobalt copper coral cosmic crimson crisp curious
damp daring dashing dawning deep delicate distant dusky eager early earnest eastern easy ebony elegant elder emerald
endless even fabled faint fair faithful famous fearless feathered fertile fiery fleeting flint floral fluent foggy fond
formal frosty frugal gentle gilded glad glassy gleaming golden graceful grand granite grassy grave green hardy hasty
hazel hearty hidden hollow honest humble hushed icy idle indigo inland iron ivory jade jolly jovial keen kind lasting
lavish leafy level light lilac limber lively lofty lone loyal lucid lunar marble mellow merry mighty mild misty modest
molten mossy muted narrow native neat nimble noble northern novel oaken odd olive opal orderly pale patient peaceful
pearly placid plain pleasant plucky polar polished proper proud quaint quick quiet radiant rapid rare ready rich robust
rosy rugged rustic salty sandy scarlet secret sepia serene shady sharp shy silent silken silver simple sincere sleek
slender smoky smooth snowy sober solar solemn solid southern sparse spirited spring stately steady steep still stony
stout subtle sudden sunny supple sure swift tame tawny tender tidy timid tiny tranquil true umber upland upright
valiant vast velvet verdant vivid warm wary western whole wild willing windy winter wise wooden woven young zesty""".split()  # noqa: SIM905 - a list of words reads better as words

NOUNS = """acorn almanac anchor anvil apple apron arbor archway atlas attic badge bakery balcony ballad banner barge barley
barrel basin basket beacon beaver bellows bench bicycle biscuit blanket blossom boat bonfire bookcase border bottle
boulder bramble bridge brook broom bucket buckle button cabin cable camera canal candle canopy canvas canyon caravan
carpet cart castle cellar chapel cherry chimney cider circle clarinet clay cliff clock cloister clover coach cobbler
comet compass copse cottage cradle crane crater crayon creek cricket crown cupboard curtain cushion dairy dial dock
domino donkey doorway drawer drum dune easel echo elbow elm engine envelope estuary fabric factory falcon farm feather
fence fern ferry fiddle field flagstone flask fleet flute forest forge fossil fountain fox furnace gable gallery garden
garnet gate glacier glove goblet gorge granary grove guitar gull hammer hammock harbor harp harvest hatch hearth hedge
helmet heron hillside hinge horizon hostel inkwell inlet island jacket jar jetty journal kettle keyhole kiln kite
knapsack knot ladder lagoon lantern lark laundry lemon lens letter library lighthouse linen lock locket loom lute
magnet mallet mandolin manor mantle maple market marsh mast meadow medal melon mill mirror mitten moat monument moor
mosaic mural museum napkin needle nest notebook oar oasis orchard organ otter oven paddle painting palace parcel
parlor passage pasture path pavilion pebble pelican pencil pendulum pepper piano pier pigeon pillar pillow pine pitcher
plank plateau plough pocket pond porch portal postcard pottery prairie prism pulley pump quarry quilt quiver rafter
railway raven reef reservoir ribbon ridge river robin rocket rope rowboat rudder saddle sail sandal satchel scarf
school shelf shepherd shield shore shovel shutter signal skate sketch sledge sloop sparrow spindle spire spoon stable
staircase stamp station steeple stirrup stove stream studio summit sundial swallow table tapestry tavern teapot
telescope temple tent terrace thicket thimble thistle timber tower trail tram trellis trumpet tugboat tunnel turbine
turret umbrella vault veranda vessel viaduct village vineyard violin wagon walnut warehouse waterfall weaver wharf
wheel whistle willow window windmill wren yarn zither""".split()  # noqa: SIM905 - a list of words reads better as words

PLACES = """Aldermoor Ashby Belfrey Birchwold Bramford Calder Corvane Dalehurst Dunmere Eastley Elmstead Fairholt
Farnwick Garrow Glenhaven Hallow Harrowgate Ivybridge Kestrel Kingsferry Larkfield Lindow Marrowby Millhaven Netherby
Northam Oakhanger Ormley Pellworth Quarley Redmarsh Rosthwaite Sandrock Selwick Thornbury Tilden Underhill Vantry
Westmere Wexcombe Wyndale Yarrow""".split()  # noqa: SIM905 - a list of words reads better as words

PEOPLE = """Ada Agnes Albin Amara Anton Beatrix Bruno Carys Casper Clara Conrad Dalia Edda Edwin Elias Esme Felix Flora
Gideon Greta Hanna Henrik Imogen Ines Ivo Jonas Judith Kamil Lena Leopold Livia Magnus Maren Milo Nadia Nils Noor Olga
Oskar Paula Petra Quentin Ravi Rosalind Samir Selma Silas Tamar Theo Ursula Viktor Wanda Wilma Xenia Yusuf Zora""".split()  # noqa: SIM905 - a list of words reads better as words

SUBJECTS = """the work|a small town|a good tool|the harvest|an old map|the first draft|a long walk|the river trade|a careful
habit|the night shift|a common language|the village council|a broken clock|the winter market|a clear question|the
apprentice|a quiet room|the ferry timetable|a public library|the second attempt|a shared kitchen|the mountain road|an
honest ledger|the repair shop|a borrowed book|the morning fog|a simple rule|the weather station|a narrow street|the
town archive|a patient teacher|the school orchestra|a rough estimate|the new bridge|a row of lime trees|the mill
pond""".replace("\n", " ").split("|")

CLAIMS = """rewards those who return to it|changes more slowly than people expect|is easier to praise than to keep up|costs
little and lasts for years|teaches what no manual says|needs somebody who notices small things|looks different from the
other side|was never planned in one piece|depends on people who are seldom named|is best judged after the third
season|outlives most of the plans made for it|makes neighbours out of strangers|gets better when it is explained to a
child|hides its difficulty in plain sight|asks for attention rather than talent|suffers when nobody is in charge of
it|carries the marks of every hand that used it|turns a loss into a lesson|keeps its promise in bad weather|moves at the
pace of the slowest cart""".replace("\n", " ").split("|")

REASONS = """because habits are stronger than intentions|although few would say so aloud|and that is reason enough to begin
early|which is why the records are worth reading|as anyone who has waited there will tell you|even if the numbers say
otherwise|so the old arguments come back every spring|and nobody can say exactly when it started|for the details decide
more than the design|while the talk goes on about larger things|since a mistake there is noticed at once|and the rest
follows from it|but only when there is time to finish it|as long as the door stays open|provided that the first step is
small enough|and the difference is felt only later""".replace("\n", " ").split("|")

OPENINGS = """In {place}, |Years ago in {place}, |As {person} used to say, |According to a letter from {person}, |On most
days, |Seen from {place}, |For {person} and {other}, |After the flood at {place}, |Before the railway came, |In the
notebooks of {person}, |At the end of the week, |When {person} moved to {place}, |Without much ceremony, |||||""".replace(
    "\n", " "
).split("|")

ASIDES = """{person} wrote this down twice.|{other} disagreed, and said so.|It took {place} a decade to admit it.|There are
exceptions, of course.|The point is not a new one.|Nobody in {place} was surprised.|{person} kept the receipts.|That was
before the new bridge.|A second look changed the picture.|The evidence is thin but consistent.|It is a matter of
patience.|{other} called it the long way round.""".replace("\n", " ").split("|")


def sentence(rng: random.Random) -> str:
    """One sentence of prose."""
    people = {
        "person": rng.choice(PEOPLE),
        "other": rng.choice(PEOPLE),
        "place": rng.choice(PLACES),
    }
    if rng.random() < 0.2:
        return rng.choice(ASIDES).format(**people)
    opening = rng.choice(OPENINGS).format(**people)
    subject = rng.choice(SUBJECTS)
    reason = rng.choice(REASONS) if rng.random() < 0.6 else ""
    said = (
        f"{opening}{subject if opening else subject[0].upper() + subject[1:]} {rng.choice(CLAIMS)}"
    )
    return f"{said}{', ' + reason if reason else ''}."


def paragraph(rng: random.Random, sentences: int) -> str:
    return " ".join(sentence(rng) for _ in range(sentences))


def phrase(rng: random.Random) -> str:
    """An adjective-noun pair, as RULER's keys are."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
