"""The word lists of the miniature world: ordinary English words, written down by hand."""

KINDS: dict[str, str] = {
    "tool": "hammer saw chisel file drill rake spade sickle anvil plough shears trowel"
    " wrench needle",
    "vessel": "cup bowl jug pot kettle flask barrel basket bucket vase goblet crate pan tray",
    "garment": "coat hat glove scarf boot cloak belt apron shirt sock veil vest gown hood",
    "instrument": "drum flute harp bell horn fiddle lute gong whistle pipe cymbal organ"
    " rattle chime",
    "furniture": "table chair bench stool shelf chest cradle desk mirror cupboard ladder"
    " screen bed rack",
    "vehicle": "cart sled boat canoe wagon raft barge chariot coach ferry ship carriage skiff tram",
    "toy": "doll kite top puppet marble hoop puzzle swing dice ball skittle mask balloon spinner",
    "light": "lamp lantern candle torch beacon lighthouse taper brazier sconce chandelier wick"
    " mantle flare ember",
}

THING_VALUES: dict[str, str] = {
    "colour": "red blue green yellow black white brown purple orange grey",
    "material": "oak iron clay glass wool silver copper leather stone paper",
    "maker": "Aldo Brenna Corvin Delpha Edric Fenna Goran Hilda Ivo Jessa",
    "shape": "round square flat curved pointed hollow twisted narrow oval crooked",
}

PERSON_VALUES: dict[str, str] = {
    "craft": "baker smith weaver fisher miller tailor potter painter farmer hunter mason singer",
    "town": "Arvel Bromley Castor Dunmere Elsing Farrow Galdon Harwick Istra Jorvale Kelmar Lorne",
    "food": "bread cheese soup honey rice beans plums apples fish nuts porridge cake",
    "pet": "cat dog goat raven mouse rabbit goose turtle pony parrot ferret owl",
}

LABELS = """
matter topic entry item note value line field mark page key sign record column wanted given noted
written seen beside thus there part case
"""

OPPOSITES = """
hot cold, big little, wet dry, old new, high low, fast slow, hard soft, light heavy, open shut,
full empty, rich poor, loud quiet, thick thin, near far, early late, sweet bitter, rough smooth,
sharp blunt, deep shallow, strong weak, clean dirty, bright dim, happy sad, brave timid, wild tame,
tight loose, true false, up down, in out, left right, north south, east west, day night, give take,
push pull, buy sell, rise fall, win lose, find hide, begin end, love hate, laugh cry, come go,
above below, before after, inside outside, always never, many few, more less, front back,
friend enemy, peace war, truth lie, question answer, summer winter, morning evening, sun moon,
king queen, master servant, youth age
"""

PAST = """
walk walked, talk talked, jump jumped, look looked, help helped, play played, work worked,
call called, wash washed, cook cooked, climb climbed, clean cleaned, open opened, carry carried,
study studied, hurry hurried, try tried, stop stopped, plan planned, drop dropped, beg begged,
bake baked, dance danced, love loved, move moved, use used, live lived, hope hoped, save saved,
go went, come came, see saw, take took, give gave, get got, make made, know knew, think thought,
find found, tell told, feel felt, leave left, keep kept, begin began, bring brought, write wrote,
sit sat, stand stood, lose lost, pay paid, meet met, run ran, hold held, say said, eat ate,
drink drank, sing sang, ring rang, swim swam, fly flew, grow grew, throw threw, draw drew,
blow blew, drive drove, ride rode, rise rose, speak spoke, break broke, steal stole, freeze froze,
wake woke, wear wore, tear tore, swear swore, catch caught, teach taught, buy bought, fight fought,
seek sought, sell sold, build built, send sent, spend spent, lend lent, bend bent, sleep slept,
weep wept, sweep swept, creep crept, hear heard, lead led, feed fed, read read, hide hid,
bite bit, shake shook, forget forgot, win won, shine shone, dig dug, stick stuck, hang hung
"""

IRREGULAR_PLURALS = """
mouse mice, goose geese, man men, woman women, child children, foot feet, tooth teeth, ox oxen,
leaf leaves, wolf wolves, knife knives, wife wives, loaf loaves, half halves, calf calves,
city cities, berry berries, lady ladies, story stories, fly flies, pony ponies, box boxes,
fox foxes, church churches, dish dishes, glass glasses, bus buses, hero heroes, potato potatoes,
sheep sheep, deer deer, fish fish, shelf shelves, scarf scarves, bench benches, torch torches,
ferry ferries, brush brushes, thief thieves, person people
"""


def pairs(text: str) -> list[tuple[str, str]]:
    """Split ``"a b, c d"`` into ``[("a", "b"), ("c", "d")]``."""
    rows = (row.split() for row in text.replace("\n", " ").split(",") if row.strip())
    return [(row[0], row[1]) for row in rows]
