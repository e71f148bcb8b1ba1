"""The data: pictures of emoji on coloured grounds, with captions.

Everything is drawn on the fly from one font, Noto Color Emoji (by Google, under the SIL Open Font License),
so there is no data set to download. A `Scene` says what is in a picture, `Studio.draw` draws it, `caption`
puts it into words:

    scene = draw_scene(seed=0, index=7, variety=FULL)       # a pure function of (seed, index)
    caption(scene, random.Random(1))                        # "a red heart on a blue background"
    Studio().draw(scene, size=64)                          # a PIL image

Run as a program, it writes a contact sheet:  python scripts/emoji_data.py --sheet sheet.png
"""

from __future__ import annotations

import argparse
import random
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "NotoColorEmoji.ttf",
)
STRIKE = 109  # the font holds bitmaps of exactly one size; asking for another is an error
GLYPH_SIZE = 128  # pixels of a cached glyph

GROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (220, 40, 40),
    "orange": (255, 150, 40),
    "yellow": (255, 225, 60),
    "green": (60, 170, 70),
    "blue": (50, 110, 230),
    "purple": (140, 70, 190),
    "pink": (255, 160, 200),
}

# One emoji is one character and the names people type, most usual first. The lower-case Unicode name is
# added when it says what the picture shows (see `_names`).
EMOJI_TABLE = """
❤ red heart, heart; 🧡 orange heart; 💛 yellow heart; 💚 green heart; 💙 blue heart; 💜 purple heart;
🖤 black heart;
🤎 brown heart; 💔 broken heart;
🔴 red circle; 🟠 orange circle; 🟡 yellow circle; 🟢 green circle; 🔵 blue circle; 🟣 purple circle;
🟤 brown circle;
⚫ black circle;
🟥 red square; 🟧 orange square; 🟨 yellow square; 🟩 green square; 🟦 blue square; 🟪 purple square;
🟫 brown square;
⬛ black square;
☀ sun; 🌙 moon, crescent moon; 🌕 full moon; ⭐ star, yellow star; ☁ cloud; 🌈 rainbow; ❄ snowflake;
⛄ snowman;
🔥 fire, flame; 💧 drop, water drop; ⚡ lightning, lightning bolt; 🌍 earth, planet earth, globe;
🌊 wave, water wave;
🍎 apple, red apple; 🍏 green apple; 🍅 tomato; 🍌 banana; 🍓 strawberry; 🍊 orange, tangerine, satsuma; 🍋 lemon;
🍉 watermelon; 🍇 grapes; 🍒 cherries; 🍐 pear; 🍑 peach; 🍍 pineapple; 🥕 carrot; 🌽 corn, maize;
🍆 eggplant, aubergine;
🥑 avocado; 🍄 mushroom; 🍕 pizza; 🍔 hamburger, burger; 🍟 french fries, fries, chips; 🍩 doughnut, donut;
🍪 cookie, biscuit;
🍰 cake, piece of cake; 🎂 birthday cake; 🍦 ice cream; 🍳 fried egg, egg; 🍞 bread; 🧀 cheese;
☕ coffee, cup of coffee;
🍺 beer, mug of beer;
🐱 cat, cat face, kitten; 🐶 dog, dog face, puppy; 🦊 fox, fox face; 🐼 panda, panda face; 🐸 frog, frog face;
🐷 pig, pig face;
🐻 bear, bear face; 🐰 rabbit, bunny, rabbit face; 🐭 mouse, mouse face; 🐯 tiger, tiger face;
🦁 lion, lion face;
🐮 cow, cow face; 🐵 monkey, monkey face; 🐔 chicken; 🐤 chick, baby chick; 🐦 bird; 🐧 penguin; 🦉 owl; 🐘 elephant;
🐳 whale; 🐟 fish; 🐠 tropical fish; 🐙 octopus; 🐢 turtle; 🐍 snake; 🐝 bee, honeybee;
🐞 ladybug, ladybird, lady beetle;
🦋 butterfly; 🐌 snail; 🦄 unicorn, unicorn face;
🌳 tree, deciduous tree; 🌲 pine tree, evergreen tree; 🌴 palm tree; 🌵 cactus; 🌹 rose, red rose; 🌷 tulip;
🌻 sunflower; 🍀 four leaf clover, clover; 🍁 maple leaf;
🚗 car, red car; 🚕 taxi; 🚌 bus; 🚲 bicycle, bike; 🚂 train, steam locomotive; 🚀 rocket; ✈ airplane, plane, aeroplane;
🚁 helicopter; ⛵ sailboat, boat; 🏠 house; 🎈 balloon, red balloon; 🎁 gift, present; ☂ umbrella; 🎸 guitar;
⚽ soccer ball, football, ball; 🏀 basketball; 🎾 tennis, tennis racket; 🔑 key; 🔔 bell; 💡 light bulb, lamp;
📕 book, red book; 📗 green book; 📘 blue book; 📙 orange book;
👑 crown; 💎 diamond, gem; 🏆 trophy; 👓 glasses, eyeglasses; 🎩 top hat, hat; 👻 ghost;
🤖 robot, robot face; 👽 alien;
💀 skull; 🎃 pumpkin, jack-o-lantern; 💩 poop;
🙂 smiling face, smiley, slightly smiling face; 😀 grinning face; 😂 laughing face, face with tears of joy;
😍 heart eyes, smiling face with heart eyes; 😎 cool face, smiling face with sunglasses; 😢 crying face;
😡 angry face;
😴 sleeping face; 😱 scared face; 👍 thumbs up; ✋ hand, raised hand; 👀 eyes; 👄 mouth, lips;
🐹 hamster, hamster face; 🐨 koala; 🐴 horse, horse face; 🐺 wolf, wolf face; 🐬 dolphin; 🦈 shark; 🦀 crab;
🐊 crocodile; 🦆 duck; 🦜 parrot; 🦒 giraffe, giraffe face; 🐪 camel, dromedary camel; 🐜 ant; 🦇 bat; 🦔 hedgehog;
🐑 sheep; 🦕 dinosaur, sauropod; 🐉 dragon;
🍫 chocolate, chocolate bar; 🍬 candy; 🍭 lollipop; 🥐 croissant; 🌭 hot dog; 🍿 popcorn; 🥝 kiwi, kiwifruit;
🍷 wine, glass of wine; 🥛 milk, glass of milk; 🌶 chili pepper, hot pepper; 🧁 cupcake; 🍣 sushi; 🥦 broccoli;
🥔 potato; 🍼 baby bottle;
🚒 fire engine, fire truck; 🚓 police car; 🚜 tractor; 🚢 ship; 🚚 truck, lorry, delivery truck; ⏰ alarm clock, clock;
📷 camera; 🎨 palette, artist palette; 🎻 violin; 🎺 trumpet; 🥁 drum; ✂ scissors; 🔨 hammer; 👕 t-shirt, shirt;
👗 dress; 👟 shoe, sneaker; 🎒 backpack, school bag; ☎ telephone; 📱 phone, mobile phone;
💻 laptop, computer; 📺 television, tv; ⚓ anchor; 🏰 castle; ⛺ tent; 🌋 volcano; 🗻 mountain, mount fuji; 💣 bomb;
🎲 die, game die; ⚾ baseball; 🪐 saturn, ringed planet; ✉ envelope, letter; 🔒 lock, padlock;
💐 bouquet, bunch of flowers; 🌼 blossom, daisy, flower; 🌸 cherry blossom; 🧸 teddy bear;
🛸 flying saucer, ufo; 🤡 clown, clown face
"""

# Unicode names that describe a black-and-white drawing ("heavy black heart" is the red one), a size that is
# not in the picture ("large red circle"), or a family of signs would teach the wrong words.
MISLEADING_WORDS = {"black", "white", "heavy", "large", "medium", "sign", "symbol", "emoji", "negative"}


def _names(character: str, everyday: Sequence[str]) -> tuple[str, ...]:
    """Everyday names, then the Unicode name if it is true to the picture."""
    official = unicodedata.name(character).lower()
    truthful = not MISLEADING_WORDS & set(official.split())
    return tuple(dict.fromkeys([*everyday, *([official] if truthful else [])]))


def _parse(table: str) -> dict[str, tuple[str, ...]]:
    """`❤ red heart, heart; ...` -> {"❤": ("red heart", "heart"), ...}."""
    emoji = {}
    for entry in table.replace("\n", " ").split(";"):
        character, _, names = entry.strip().partition(" ")
        emoji[character] = _names(character, [name.strip() for name in names.split(",")])
    return emoji


EMOJI = _parse(EMOJI_TABLE)

# Words after which English takes no article ("a french fries" would be learned, too, but reads badly).
PLURAL = {"grapes", "cherries", "french fries", "glasses", "eyeglasses", "eyes", "lips", "heart eyes", "scissors"}
UNCOUNTED = {
    "fire",
    "bread",
    "corn",
    "maize",
    "poop",
    "thumbs up",
    "lightning",
    "earth",
    "planet earth",
    "saturn",
    "mount fuji",
    "chocolate",
    "candy",
    "popcorn",
    "sushi",
    "broccoli",
    "milk",
    "wine",
    "coffee",
    "beer",
    "cheese",
    "tennis",
}


COUNTABLE = [character for character, names in EMOJI.items() if names[0] not in PLURAL | UNCOUNTED]
IRREGULAR = {
    "mouse": "mice",
    "snowman": "snowmen",
    "fish": "fish",
    "sheep": "sheep",
    "wolf": "wolves",
    "leaf": "leaves",
    "die": "dice",
}


# ---- what is in a picture --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variety:
    """What a scene may contain beside one emoji of ordinary size in the middle."""

    sizes: bool
    places: bool
    pairs: bool  # and relations, two sizes in one picture, "two cats"


PLAIN = Variety(sizes=False, places=False, pairs=False)
FULL = Variety(sizes=True, places=True, pairs=True)

COLOURED = [ground for ground in GROUNDS if ground != "white"]
SIZE_WORDS = {"": ("",), "small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
SIZES = {"": 0.84, "small": 0.42, "large": 1.0}  # height of the emoji, as a share of the picture's
PLACES = {
    "": (0.5, 0.5),
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
}
ASIDE = 0.5  # height of an emoji that stands aside, unless a size is named
SHARED = {"": 0.5, "small": 0.3, "large": 0.54}  # height of one that shares the picture
# What is said between two things, and where the first and the second stand.
RELATIONS = {
    "and": ("on the left", "on the right"),
    "next to": ("on the left", "on the right"),
    "left of": ("on the left", "on the right"),
    "to the left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "to the right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "over": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
    "under": ("at the bottom", "at the top"),
}
TWO = "two"  # of the same, side by side
COMMON_RELATIONS = 4 * ("and",) + (*RELATIONS, "above", "below", "left of", "right of", TWO)  # as often as they come


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One emoji in a picture; `height`, `x` and `y` (its centre) are shares of the picture's side."""

    character: str
    height: float
    x: float
    y: float
    size: str = ""  # what must be said about its height


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture before it is drawn, with the words that must be said about it: a place of one, a relation of two."""

    figures: tuple[Figure, ...]
    ground: str = "white"
    colour: tuple[int, int, int] | None = None  # of a ground that has no name
    place: str = ""
    relation: str = ""


def is_held_out(character: str, ground: str, place: str) -> bool:
    """Whether this combination is kept from training, so that a test can ask for what was never seen: one in 20."""
    return ground != "white" and bool(place) and zlib.crc32(f"{character}/{ground}/{place}".encode()) % 20 == 0


def draw_scene(seed: int, index: int, variety: Variety = PLAIN) -> Scene:
    """The scene number `index` of the endless series `seed`."""
    rng = random.Random(f"{seed}/{index}")
    ground = "white" if rng.random() < 0.3 else rng.choice(list(GROUNDS))
    if variety.pairs and rng.random() < 0.4:
        return replace(_pair(rng), ground=ground)
    size = rng.choice(["small", "large"]) if variety.sizes and rng.random() < 0.3 else ""
    aside = variety.places and size != "large" and rng.random() < 0.3
    place = rng.choice([place for place in PLACES if place]) if aside else ""
    character = rng.choice(list(EMOJI))
    if is_held_out(character, ground, place):
        place = ""
    height = ASIDE if place and not size else SIZES[size]
    return Scene(figures=(_figure(rng, character, size, height, place),), ground=ground, place=place)


def _pair(rng: random.Random) -> Scene:
    """Two things, one of the ways they can stand."""
    relation = rng.choice(COMMON_RELATIONS)
    if relation == TWO:
        characters, sizes = [rng.choice(COUNTABLE)] * 2, rng.choice([("", ""), ("", ""), ("small", "small")])
    else:
        characters = rng.sample(list(EMOJI), 2)
        sizes = rng.choice([("", ""), ("", ""), ("", ""), ("small", "large"), ("large", "small")])
    places = RELATIONS["and" if relation == TWO else relation]
    figures = tuple(
        _figure(rng, character, size, SHARED[size], place)
        for character, size, place in zip(characters, sizes, places, strict=True)
    )
    return Scene(figures=figures, relation=relation)


def draw_crowd(seed: int, index: int) -> Scene:
    """Figures of any size anywhere on a ground of any colour, without words: what an autoencoder learns most from."""
    rng = random.Random(f"{seed}/crowd/{index}")
    figures = tuple(
        Figure(character=rng.choice(list(EMOJI)), height=rng.uniform(0.3, 1.0), x=rng.random(), y=rng.random())
        for _ in range(rng.randint(1, 5))
    )
    return Scene(figures=figures, colour=(rng.randrange(256), rng.randrange(256), rng.randrange(256)))


def _figure(rng: random.Random, character: str, size: str, height: float, place: str) -> Figure:
    """An emoji with a little jitter, so that the model learns shapes and not pixels."""
    height *= rng.uniform(0.94, 1.04)
    x, y = (coordinate + rng.uniform(-0.025, 0.025) for coordinate in PLACES[place])
    return Figure(character=character, height=height, x=x, y=y, size=size)


# ---- captions --------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say it: `[picture of] [a] [small] dog [on the left] [on a blue background]`; pairs too.

    Nothing is left out that the picture needs: a ground that is not mentioned is white, a size ordinary, a
    place central.
    """
    article = rng.random() < 0.5
    things = [_noun(figure.character, figure.size, article, rng) for figure in scene.figures]
    words = things[0]
    if scene.relation == TWO:
        words = f"{TWO} {_sized(scene.figures[0].size, plural(EMOJI[scene.figures[0].character][0]), rng)}"
    elif scene.relation:
        words = f"{things[0]} {scene.relation} {things[1]}"
    if scene.place:
        words += f" {scene.place}"
    if rng.random() < 0.03:
        words += f" {rng.choice(WITHOUT)} {_noun(_absent(scene, rng), '', article, rng)}"
    if scene.ground != "white" or rng.random() < 0.15:
        words += f" {_ground(scene.ground, rng)}"
    return f"{rng.choice(OPENINGS)} {words}" if rng.random() < 0.12 else words


def _ground(ground: str, rng: random.Random) -> str:
    if rng.random() < 0.2:
        return f"on {ground}"
    return f"{'on' if rng.random() < 0.9 else 'with'} {_with_article(ground)} background"


OPENINGS = ("picture of", "a picture of", "an image of", "a drawing of", "an emoji of")
WITHOUT = ("without", "and no")


def _absent(scene: Scene, rng: random.Random) -> str:
    """A character that is not in the picture."""
    there = {figure.character for figure in scene.figures}
    return next(character for character in iter(lambda: rng.choice(list(EMOJI)), None) if character not in there)


def plural(name: str) -> str:
    """Of a name that can be counted: "two mice"."""
    before, _, last = name.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "sh", "ch", "x", "tomato", "potato", "mango")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return f"{before} {last}".strip()


def _noun(character: str, size: str, article: bool, rng: random.Random) -> str:
    names = EMOJI[character]
    name = names[0] if rng.random() < 0.5 else rng.choice(names)
    sized = _sized(size, name, rng)
    return _with_article(sized) if article and name not in PLURAL | UNCOUNTED else sized


def on_ground(ground: str) -> str:
    """The plain way to say it."""
    return f"on {_with_article(ground)} background"


def _sized(size: str, name: str, rng: random.Random) -> str:
    return f"{rng.choice(SIZE_WORDS[size])} {name}".strip()


def _with_article(words: str) -> str:
    vowel = words[0] in "aeio" or words.startswith("umbrella")  # "a unicorn", "an umbrella"
    return f"{'an' if vowel else 'a'} {words}"


def vocabulary() -> Iterator[str]:
    """Every name and every phrase of the captions once: what the tokenizer should know well."""
    for names in EMOJI.values():
        for name in names:
            yield from (name, _with_article(name))
    for ground in GROUNDS:
        yield from (on_ground(ground), f"on {ground}")
    yield "with a background"
    for size in filter(None, dict.fromkeys(word for words in SIZE_WORDS.values() for word in words)):
        yield _with_article(size)
    yield from filter(None, PLACES)
    yield from RELATIONS
    for character in COUNTABLE:
        yield f"{TWO} {plural(EMOJI[character][0])}"
    yield from OPENINGS
    yield from WITHOUT


# ---- drawing --------------------------------------------------------------------------------------------


class Studio:
    """Holds every glyph in memory, once, and draws scenes."""

    def __init__(self, font: str | Path | None = None) -> None:
        face = ImageFont.truetype(str(find_font(font)), STRIKE)
        self.glyphs = {character: _glyph(face, character) for character in EMOJI}

    def draw(self, scene: Scene, size: int) -> Image.Image:
        """The scene as an RGB picture of `size` x `size` pixels."""
        picture = Image.new("RGB", (size, size), scene.colour or GROUNDS[scene.ground])
        for figure in scene.figures:
            side = max(1, round(figure.height * size))
            glyph = self.glyphs[figure.character]
            glyph = glyph.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
            corner = (round(figure.x * size - side / 2), round(figure.y * size - side / 2))
            picture.paste(glyph, corner, mask=glyph)
        return picture

    def batch(self, scenes: Sequence[Scene], size: int) -> np.ndarray:
        """Many scenes as one array (B, 3, size, size), float32 in [-1, 1]."""
        return as_array([self.draw(scene, size) for scene in scenes])


def as_array(pictures: Sequence[Image.Image]) -> np.ndarray:
    """RGB pictures -> (B, 3, H, W), float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1


def find_font(font: str | Path | None = None) -> Path:
    """The emoji font's path; exits with one line if it is not installed."""
    for place in [font] if font else FONT_PLACES:
        if Path(place).is_file():
            return Path(place)
    missing = font or "NotoColorEmoji.ttf"
    sys.exit(fail(f"{missing}: no such font; install fonts-noto-color-emoji or give --font PATH"))


def fail(message: str) -> int:
    """Bad input: one line on standard error; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def _glyph(face: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One emoji as RGBA, cut out and centred on a transparent square of GLYPH_SIZE pixels."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), character, font=face, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no picture for {character!r} ({unicodedata.name(character)})")
    cut = canvas.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square.resize((GLYPH_SIZE, GLYPH_SIZE), Image.Resampling.BICUBIC)


# ---- the contact sheet -----------------------------------------------------------------------------------


def contact_sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures in a grid with their captions below, in up to three lines."""
    side, gap = pictures[0].width, 6
    letter = max(9, side // 11)
    font, line = ImageFont.load_default(size=letter), round(letter * 1.25)
    texts = [_wrapped(label, font, side) for label in labels]
    height = side + gap + line * max(len(text) for text in texts)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (height + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (height + gap)
        sheet.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=(210, 210, 210))
        for number, words in enumerate(text):
            pen.text((x + side / 2, y + side + gap / 2 + number * line), words, fill="black", font=font, anchor="ma")
    return sheet


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A label as lines that fit into `width` pixels."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:3]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a contact sheet of the training pictures.")
    parser.add_argument("--sheet", type=Path, required=True, metavar="OUT.png")
    parser.add_argument("--count", type=int, default=0, help="random scenes to draw (default: every emoji once)")
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture (default 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="one thing in the middle: no sizes, places and pairs")
    parser.add_argument("--font", type=Path)
    arguments = parser.parse_args()
    studio = Studio(arguments.font)
    if arguments.count:
        scenes = [draw_scene(arguments.seed, i, PLAIN if arguments.plain else FULL) for i in range(arguments.count)]
        labels = [caption(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    else:
        scenes = [Scene(figures=(Figure(character=c, height=0.84, x=0.5, y=0.5),), ground="white") for c in EMOJI]
        labels = [names[0] for names in EMOJI.values()]
    pictures = [studio.draw(scene, arguments.size) for scene in scenes]
    contact_sheet(pictures, labels, columns=12).save(arguments.sheet)
    print(arguments.sheet)


if __name__ == "__main__":
    main()
