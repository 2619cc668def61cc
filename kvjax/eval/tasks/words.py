"""English words for needles and word lists.

RULER draws from the lists of the `wonderwords` package, which are longer (about 7,000 nouns); here
words are fewer, and adjective-noun pairs go on where single words do not suffice.
"""

from collections.abc import Iterator
from uuid import UUID

import numpy as np

_ADJECTIVES = """
able absent actual agile alert alive ample amused ancient angry annual ashamed aware awkward bald
bare basic bitter blank bleak blind blunt bold brave brief bright brisk broad broken bulky busy
calm careful casual cheap cheerful chief chilly civic civil clean clear clever clumsy coarse cold
common complex cool costly cosy crisp crooked crowded cruel curious curly daily damp daring dark
dear decent deep dense direct distant dizzy double doubtful drowsy dry dull dusty eager early easy
elegant empty endless equal even exact exotic faint fair faithful famous fancy fast feeble fertile
fierce final fine firm flat fluffy fond foolish formal fragile frank free frequent fresh friendly
frosty frozen full funny gentle giant glad global gloomy golden good graceful grand grateful grave
great greedy grim handsome handy happy harsh hasty healthy heavy helpful hidden high hollow holy
honest hopeful hostile huge humble hungry icy ideal idle ill immense innocent jealous jolly juicy
keen kind large lasting late lazy lean legal light likely lively local lonely long loose lost loud
lovely loyal lucky mad major manual massive mature mellow merry mighty mild minor modern modest
moist muddy mute mutual naive narrow nasty native neat nervous new nimble noble noisy normal numb
obvious odd official open ordinary outer oval pale partial patient perfect plain pleasant polite
poor popular precious precise pretty prime prompt proper proud pure quaint quick quiet radical
rapid rare raw ready real recent regular rich rigid ripe rocky rotten rough round royal rude rural
rusty sacred sad safe salty scarce secret secure sharp shiny short shy silent silly simple sincere
single sleepy slender slim slow smart smooth sober solar solid sour spare special spicy spiral
square stable stale steady steep sticky stiff still strange strict strong sturdy subtle sudden
sunny super sweet swift tall tame tart tender tense thick thin thirsty tidy tight timid tiny tired
total tough tranquil true typical ugly unique upper urban urgent useful usual vacant vague valid
vast vital vivid warm wary wasteful watery weak wealthy weary weekly weird wet wide wild willing
windy wise witty wooden worthy young zealous
"""

_NOUNS = """
accent account acorn actor advice airport album alley almond anchor angle ankle answer ant anthem
antler apple apron arch arena armour army arrow artist ash atlas attic aunt author autumn avenue
axe badge bag bakery balcony ball balloon bamboo banana band bank banner barber barley barn barrel
basin basket bat bath battery bay beach bead beak beam bean bear beard beast bed bee beetle bell
belt bench berry bicycle bill bird biscuit blade blanket blossom board boat body bone bonnet book
boot border bottle bowl box boy bracelet brain branch bread breeze brick bride bridge broom
brother brush bubble bucket buckle bud building bulb bull bus bush butcher butter button cabin
cabinet cable cactus cage cake calendar camel camera camp canal candle candy cannon canoe canvas
canyon cap captain car card cargo carpet carriage carrot cart castle cat cattle cave ceiling
cellar cement chain chair chalk chapel chapter charcoal cheek cheese chef cherry chest chicken
child chimney chin church cider cinema circle circus city class clay cliff clock cloth cloud
clover coach coal coast coat cobweb coconut coffee coin collar colony comb comet compass cook
copper coral cork corn corner cotton couch country cousin cow crab cradle crane crater crayon
cream creek crew cricket crop crow crown crystal cub cup cupboard curtain cushion customer dairy
daisy dam dancer daughter dawn deck deer dentist desert desk dessert diamond diary dinner dish
ditch doctor dog doll dolphin donkey door dragon drawer dress drum duck dune dust eagle ear earth
echo editor eel egg elbow elephant elm emperor engine envelope eye fabric face factory falcon
family farm farmer father feather fence fern ferry festival field finger fire fish fist flag flame
flock floor flour flower flute fog foot forest fork fort fountain fox frame friend frog fruit
garage garden garlic gate giraffe girl glacier glass glove glue goat goblet goose gorge grain
grape grass grove guard guest guitar gulf habit hail hair hall hammer hammock hand harbour harp
harvest hat hawk hay hazel head heart hedge heel helmet hen herb herd hero hill hinge hockey honey
hood hook horizon horn horse hospital hotel hour house hunter hut ice idea igloo ink inn insect
iron island ivory ivy jacket jar jaw jewel jockey journal journey judge jug juice jungle jury
kettle key king kitchen kite kitten knee knife knight knot lace ladder lake lamb lamp lantern lark
lawn lawyer leaf leather lemon lens leopard lesson letter library lid lily lime lion lip lizard
loaf lobster lock locket log lumber lunch lung machine magnet maid mansion map maple marble market
mask mast mat mayor meadow meal medal melon melody metal mile milk mill mineral mint mirror mitten
monk monkey month moon moose morning mosque moss moth mother motor mountain mouse mouth mud mule
muscle museum music mustard nail napkin neck necklace needle nephew nest net nickel niece night
noon north nose notebook novel nurse nut oak oasis oar ocean office oil olive onion opera orange
orchard organ ostrich otter oven owl oyster paddle page pail paint palace palm pan panda panel
paper parade parcel parent park parrot party pasture path patrol peach peacock peanut pear pearl
pebble pelican pen pencil penny people pepper perfume petal phone photo piano picnic picture pie
pier pig pigeon pillow pilot pine pipe pirate planet plank plant plate player plaza plough plum
pocket poem poet pond pony porch port post pot potato powder prairie priest prince prize pump
pumpkin pupil puppet puppy purse puzzle quarry queen quilt quiz rabbit radio raft rail rain rake
ram ranch rat raven razor recipe reef ribbon rice rider ring river road robin robot rock rocket
roof room root rope rose ruby rug ruler sack saddle sail sailor salad salmon salt sand sandal
satin sauce sausage scarf school science scissors scooter scout sea seal season seat seed shadow
shark shed sheep shelf shell shepherd ship shirt shoe shop shore shoulder shovel sign silk silver
singer sister skate sketch skirt sky slate sled sleeve slipper smoke snail snake snow soap sock
sofa soil soldier son song soup spade spider spinach sponge spoon spring spruce squirrel stadium
stage stair stamp star statue steam steel stem stone stool storm story stove straw stream street
string student suit sugar suitcase summer sun swan sweater sword table tail tailor tank tea
teacher team temple tennis tent theatre thimble thread throne thumb thunder tide tiger timber tin
toad tobacco toe tomato tongue tool tooth torch tower town toy track tractor train tray treasure
tree tribe truck trumpet trunk tube tulip tunnel turkey turnip turtle tutor twig umbrella uncle
uniform valley van vase vault veil velvet vessel vest village vine vinegar violet violin voice
volcano voyage wagon waist waiter wall wallet walnut walrus warrior watch water wave wax weaver
wedding week well whale wheat wheel whip whistle widow wife willow window wing winter wire wizard
wolf woman wood wool word world worm wren wrist writer yacht yard year zebra zipper
"""

_VERBS = """
accept achieve adapt admire admit adopt advise afford agree allow announce appear apply approve
argue arrange arrive attach attend avoid bake balance become beg begin behave believe belong bend
bless boil borrow bounce bow break breathe bring build burn bury buy carve catch celebrate chase
cheer choose clap climb close collect compare complain confess confuse connect consider contain
continue cough count crawl create cross cry dance decide decorate defend deliver depend describe
deserve destroy develop discover divide draw dream drink drive earn eat educate embrace employ
encourage enjoy enter escape examine exist expand expect explain explore fade fail fall feed feel
fetch find finish fit fix float flow fly fold follow forget forgive freeze gather give glow grab
greet grow guess hang happen hate hear hide hold hope hurry imagine improve include inform inspect
insist intend invent invite join juggle jump keep kick kneel knit know laugh lead learn leave lend
let lift listen live look lose love make marry measure meet melt mend mention move multiply obey
observe obtain offer order owe own pack paddle pause peel perform permit pick plan play polish
pour practise praise pray prepare pretend prevent protect provide pull push put reach read receive
recite recognise remember remind remove repair repeat reply rescue return ride rise roll rub run
save say scatter scrub search seek seem sell send settle sew shake share shave shine shout show
shrink sing sit sleep slide smile sneeze solve speak spell spend spill split stand stay stir
stretch study succeed suffer suggest surround swallow swim swing take talk taste teach tear tease
tell thank think throw tickle touch trace travel tremble try turn type understand unite untie use
vanish visit wait wake walk wander want warn wash weave weep weigh welcome win wink wish wonder
work worry wrap write yawn yell
"""

ADJECTIVES, NOUNS, VERBS = (tuple(some.split()) for some in (_ADJECTIVES, _NOUNS, _VERBS))
PLAIN = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


def pairs(rng: np.random.Generator) -> Iterator[str]:
    """Endless "adjective-noun" keys, none twice before a fifth of all pairs have been drawn."""
    seen: set[str] = set()
    most = len(ADJECTIVES) * len(NOUNS) // 5
    while True:
        adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))]
        word = f"{adjective}-{NOUNS[rng.integers(len(NOUNS))]}"
        if word in seen:
            continue
        seen.add(word)
        if len(seen) == most:
            seen.clear()
        yield word


def singles(rng: np.random.Generator) -> Iterator[str]:
    """All plain words in random order, then pairs."""
    yield from (PLAIN[place] for place in rng.permutation(len(PLAIN)))
    yield from pairs(rng)


def numbers(rng: np.random.Generator) -> Iterator[str]:
    """Endless numbers of seven digits, the first not 0."""
    while True:
        yield str(rng.integers(10**6, 10**7))


def uuids(rng: np.random.Generator) -> Iterator[str]:
    """Endless random UUIDs (version 4)."""
    while True:
        yield str(UUID(bytes=rng.bytes(16), version=4))
