"""What the small model is measured by: it must tell good pictures from bad ones."""

from dataclasses import replace
from pathlib import Path

import pytest
from emoji_data import EMOJI, GROUNDS, SIZES, Figure, Scene
from emoji_measures import Edit, Pair, crispness, draw_edits, draw_pairs, kid, sheet_prompts
from PIL import Image, ImageFilter
from recognition import THUMBNAIL, Gallery

SHEET = Path(__file__).parents[1] / "data" / "emoji.png"
PAIR = Pair(("🐱", "🐶"), "left of", "white")


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery.read(SHEET)


def draw(*figures: tuple[str, int, int, int], ground: str = "white") -> Image.Image:
    """Figures (character, side, left, top) on a ground of 128 x 128 pixels, without a font."""
    sheet, picture = Image.open(SHEET).convert("RGB"), Image.new("RGB", (128, 128), GROUNDS[ground])
    for character, side, left, top in figures:
        row, column = divmod(list(EMOJI).index(character), sheet.width // THUMBNAIL)
        corner = (column * THUMBNAIL, row * THUMBNAIL)
        cut = sheet.crop((*corner, corner[0] + THUMBNAIL, corner[1] + THUMBNAIL)).resize((side, side))
        mask = cut.convert("L").point(lambda value: 255 * (value < 250))
        picture.paste(cut, (left, top), mask)
    return picture


def test_both_things_of_a_pair_are_asked_for_in_their_places(gallery):
    right = draw(("🐱", 60, 2, 32), ("🐶", 60, 66, 32))
    assert PAIR.is_in(right, gallery, 1)
    assert replace(PAIR, relation="and").is_in(right, gallery, 1)
    assert not replace(PAIR, relation="right of").is_in(right, gallery, 1)
    assert not replace(PAIR, characters=("🐱", "🐼")).is_in(right, gallery, 1)
    above = draw(("🐱", 60, 32, 2), ("🐶", 60, 32, 66))
    assert replace(PAIR, relation="above").is_in(above, gallery, 1)
    assert not replace(PAIR, relation="below").is_in(above, gallery, 1) and not PAIR.is_in(above, gallery, 1)


def test_an_edit_is_what_was_asked_and_what_was_not_stays(gallery):
    source, cat = draw(("🐱", 100, 14, 14), ground="blue"), Figure(character="🐱", height=SIZES[""], x=0.5, y=0.5)
    before = Scene(figures=(cat,), ground="blue")
    ground = Edit(before, replace(before, ground="yellow"))
    done = draw(("🐱", 100, 14, 14), ground="yellow")
    assert ground.is_done(source, done, gallery) and ground.kept(source, done) > 25
    assert not ground.is_done(source, source, gallery)
    moved = draw(("🐱", 60, 60, 60), ground="yellow")
    assert ground.is_done(source, moved, gallery) and ground.kept(source, moved) < 16
    small = Edit(before, replace(before, figures=(replace(cat, size="small"),)))
    assert small.is_done(source, draw(("🐱", 50, 40, 40), ground="blue"), gallery)
    assert not small.is_done(source, source, gallery)
    thing = Edit(before, replace(before, figures=(replace(cat, character="🐶"),)))
    assert thing.is_done(source, draw(("🐶", 100, 14, 14), ground="blue"), gallery)
    assert thing.kept(source, draw(("🐶", 100, 14, 14), ground="red")) < 16
    assert not thing.is_done(source, source, gallery)


def test_likeness_and_crispness():
    some = [draw((character, 100, 14, 14)) for character in list(EMOJI)[:40]]
    others = [draw((character, 100, 14, 14)) for character in list(EMOJI)[40:80]]
    blurred = [picture.filter(ImageFilter.GaussianBlur(3)) for picture in some]
    assert crispness(blurred) < 0.9 * crispness(some)
    assert kid(some, some)[0] < 0 < kid(some, others)[0]


def test_what_is_asked():
    assert len(sheet_prompts()) == 60
    assert len({pair.prompt for pair in draw_pairs(200)}) == 200
    changed = [edit.prompts() for edit in draw_edits(6)]
    assert all(before != after for before, after in changed)
