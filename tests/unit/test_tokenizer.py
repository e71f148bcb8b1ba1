"""Text -> ids: CLIP's own, what is cut and what is padded, and the ways to keep a tokenizer."""

import json
import os
import random

import pytest
import torch

from minisd.checkpoint.load import load_tokenizer
from minisd.checkpoint.tokenizer_files import from_json, to_json, write_folder
from minisd.files import CheckpointError
from minisd.tokenizer import END, START, CLIPTokenizer, vocabulary_of
from tests.unit.tiny import MERGES, TOKENIZER

START_ID, END_ID = 49406, 49407

# Between start and end, as transformers 5.23 gives them for the vocabulary of openai/clip-vit-large-patch14.
GOLDEN = {
    "": [],
    "a photograph of an astronaut riding a horse": [320, 8853, 539, 550, 18376, 6765, 320, 4558],
    "  Hello,\n\tWORLD!! it's 2024": [3306, 267, 1002, 748, 585, 568, 273, 271, 273, 275],
    "naïve café 😀 中文": [1097, 35689, 563, 15304, 7334, 19759, 255, 29032, 485],
    "cafe\u0301": [15304],  # composed first: the same as café
    "don't we'll I'M": [847, 713, 649, 1342, 328, 880],
    "(masterpiece:1.3), [blurry] #1_000": [
        *[263, 12066, 281, 272, 269, 274, 2361, 314, 21977, 316, 258, 272, 318, 271, 271, 271]
    ],
    "<|endoftext|>a<|startoftext|>": [49407, 320, 49406],
    "İstanbul Å": [328, 16384, 11231, 127, 354],
    "supercalifragilistic": [1642, 2857, 13093, 2076, 1561],
}


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer.clip()


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(clip, text):
    padding = [END_ID] * (76 - len(GOLDEN[text]))
    assert clip(text).tolist() == [[START_ID, *GOLDEN[text], *padding]]


def test_the_vocabulary_is_complete(clip):
    assert len(clip.vocabulary) == 49408 and len(clip.merges) == 48894
    assert sorted(clip.vocabulary.values()) == list(range(49408))
    assert (clip.vocabulary[START], clip.vocabulary[END]) == (START_ID, END_ID)
    assert clip.vocabulary["photograph</w>"] == 8853


def test_one_text_or_several(clip):
    texts = ["a cat", "", "two dogs"]
    ids = clip(texts)
    assert ids.shape == (3, 77) and ids.dtype == torch.int64
    assert all(torch.equal(clip(text), ids[index : index + 1]) for index, text in enumerate(texts))


@pytest.mark.parametrize("words", (74, 75, 76, 77, 400))
def test_truncation_keeps_start_and_end(clip, words):
    ids = clip("horse " * words)[0].tolist()
    kept = min(words, 75)
    assert ids == [START_ID, *[4558] * kept, *[END_ID] * (76 - kept)]


@pytest.mark.parametrize("text", ("\ud800", "a cat \udcff", "\udfff\ud800"))
def test_lone_surrogates_are_refused(clip, text):
    for call in (lambda: clip(text), lambda: clip(["fine", text]), lambda: clip.tokens(text)):
        with pytest.raises(ValueError, match="not valid Unicode"):
            call()


def test_surrogates_that_are_a_pair_are_refused_too(clip):
    """In Python, U+1F600 is one character; two surrogates are two characters that mean nothing."""
    with pytest.raises(ValueError, match="not valid Unicode"):
        clip("\ud83d\ude00")


def test_tokens(clip):
    assert clip.tokens("A photograph, 1") == [START, "a</w>", "photograph</w>", ",</w>", "1</w>", END]
    assert clip.tokens("") == [START, END]
    assert len(clip.tokens("horse " * 400)) == 77


def test_tokens_and_ids_agree(clip):
    for text in GOLDEN:
        tokens = clip.tokens(text)
        assert [clip.vocabulary[token] for token in tokens] == clip(text)[0, : len(tokens)].tolist()


def test_merges_apply_in_their_order():
    assert TOKENIZER.tokens("cat red car") == [START, "cat</w>", "red</w>", "ca", "r</w>", END]
    other = [("c", "a"), ("a", "t</w>"), ("c", "at</w>")]  # "ca" comes first, so "at" never does
    tokenizer = CLIPTokenizer(vocabulary_of(other), other, pad_token=END, context_length=77)
    assert tokenizer.tokens("cat") == [START, "ca", "t</w>", END]


# ------------------------------------------------ kept and read again


def same(one: CLIPTokenizer, other: CLIPTokenizer) -> bool:
    texts = list(GOLDEN)
    return (
        one.vocabulary == other.vocabulary
        and one.merges == other.merges
        and (one.pad_token, one.context_length) == (other.pad_token, other.context_length)
        and torch.equal(one(texts), other(texts))
    )


def unusual() -> CLIPTokenizer:
    return CLIPTokenizer(vocabulary_of(MERGES), MERGES, pad_token="!", context_length=9)


def test_another_padding_and_length():
    ids = unusual()("cat")
    assert ids.shape == (1, 9) and ids[0, 3:].tolist() == [TOKENIZER.vocabulary["!"]] * 6


@pytest.mark.parametrize("make", (CLIPTokenizer.clip, lambda: TOKENIZER, unusual))
def test_folder_round_trip(make, tmp_path):
    write_folder(make(), tmp_path / "some" / "where")
    assert same(load_tokenizer(tmp_path / "some" / "where"), make())


@pytest.mark.parametrize("merges", ([], MERGES), ids=len)
def test_transformers_reads_the_folder(merges, tmp_path):
    """Without a single merge too: a tokenizer of bytes. An empty line in merges.txt would be an error there."""
    from transformers import CLIPTokenizer as Theirs

    ours = CLIPTokenizer(vocabulary_of(merges), merges, pad_token=END, context_length=16)
    write_folder(ours, tmp_path)
    assert same(load_tokenizer(tmp_path), ours)
    theirs = Theirs.from_pretrained(tmp_path)
    for text in ("a cat", "", "red car 2024!"):
        ids = theirs(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ours(text), ids)


@pytest.mark.parametrize("make", (CLIPTokenizer.clip, lambda: TOKENIZER, unusual))
def test_json_round_trip(make):
    assert same(CLIPTokenizer(**vars(from_json(to_json(make())))), make())


@pytest.mark.parametrize(
    "change",
    (
        {"vocabulary": 3},
        {"vocabulary": {"a": 0}},
        {"vocabulary": {START: 0, END: "one", "!": 2}},
        {"vocabulary": {START: 0, END: -1, "!": 2}},
        {"merges": 3},
        {"merges": ["zz yy"]},
        {"merges": [3]},
        {"pad_token": 3},
        {"pad_token": None},
        {"pad_token": "[PAD]"},
        {"context_length": "77"},
        {"context_length": -1},
        {"context_length": 0},
        {"context_length": 10**30},
        {"context_length": None},
    ),
    ids=str,
)
def test_broken_json(change):
    """`to_json` ends up in files, and files come from strangers."""
    text = json.dumps(json.loads(to_json(TOKENIZER)) | change)
    with pytest.raises(CheckpointError):
        from_json(text)


@pytest.mark.parametrize("text", ("", "{", "[]", "3", "null", "{}", "[" * 100_000), ids=lambda text: text[:3])
def test_not_even_json(text):
    with pytest.raises(CheckpointError):
        from_json(text)


def test_absent_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        load_tokenizer(tmp_path / "nowhere")


# ------------------------------------------------ byte-pair encoding in Python, and in the library


def vectors_added() -> CLIPTokenizer:
    """With added tokens, as after textual inversion: one of them two vectors, one of another alphabet."""
    added = ["<cat>", "<cat>_1", "My-Word", "ÉTOILE"]
    vocabulary = vocabulary_of(MERGES)
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(added)}
    return CLIPTokenizer(vocabulary, MERGES, pad_token=END, context_length=77, added=added)


def agree(tokenizer: CLIPTokenizer, text: str) -> bool:
    return tokenizer.encode(text) == tokenizer.encode_fast(text)


@pytest.mark.parametrize("text", GOLDEN)
def test_both_ways_agree_on_golden_texts(clip, text):
    assert clip.encode(text) == clip.encode_fast(text) == GOLDEN[text]


# Characters that Unicode had before the oldest Python here: tables of later ones differ, and the library's count.
OLD = [range(0x20, 0x7F), range(0xA0, 0x250), range(0x300, 0x36F), range(0x391, 0x3A1), range(0x400, 0x450)]
OLD += [
    range(0x2010, 0x2030),
    range(0x2150, 0x2180),
    range(0x3041, 0x3090),
    range(0x4E00, 0x4F00),
    range(0x1F300, 0x1F500),
]
RULES = [
    "'s",
    "'T",
    "'re",
    "!'ll",
    END,
    START,
    START.upper(),
    "<cat>",
    "<CAT>_1",
    "my-word",
    "étoile",
    "\x1c",
    "\x0b",
    "İ",
    "Σ",
]


def random_texts(number: int, ascii_only: bool) -> list[str]:
    dice = random.Random(0)
    planes = [range(0x80)] if ascii_only else OLD
    parts = [part for part in RULES if part.isascii() or not ascii_only]

    def piece() -> str:
        return dice.choice(parts) if dice.random() < 0.2 else chr(dice.choice(dice.choice(planes)))

    return ["".join(piece() for _ in range(dice.randrange(1, 30))) for _ in range(number)]


@pytest.mark.parametrize("ascii_only", (True, False))
@pytest.mark.parametrize("make", (CLIPTokenizer.clip, lambda: TOKENIZER, unusual, vectors_added))
def test_both_ways_agree_on_random_texts(make, ascii_only):
    tokenizer = make()
    assert [text for text in random_texts(3000, ascii_only) if not agree(tokenizer, text)] == []


@pytest.mark.parametrize("character", [chr(n) for n in range(0x80)], ids=ascii)
def test_every_ascii_character_alone(clip, character):
    """Prompts in ASCII never reach the library."""
    assert all(agree(clip, text) for text in (character, f"x{character}y1{character}", f"'{character}"))


def test_long_texts_are_the_librarys(clip):
    """Pair by pair, a word of a million letters would take days."""
    assert clip("a" * 1_000_000).shape == (1, 77)


@pytest.mark.parametrize(
    ("text", "back"),
    (
        ("A photograph of an astronaut, 1969!", "a photograph of an astronaut , 1 9 6 9 !"),
        ("naïve café 😀 中文", "naïve café 😀 中文"),
        ("", ""),
    ),
)
def test_decode(clip, text, back):
    assert clip.decode(clip(text)[0]) == clip.decode(clip(text)[0].tolist()) == back


def test_decode_added_tokens():
    tokenizer = vectors_added()
    assert tokenizer.decode(tokenizer("red <cat> cat")[0]) == "red <cat> <cat>_1 cat"


# ------------------------------------------------ files from strangers


@pytest.mark.parametrize("kind", ("WordPiece", "Unigram", "WordLevel", 3))
def test_another_algorithm_is_refused(tmp_path, kind):
    stored = {"model": {"type": kind, "vocab": TOKENIZER.vocabulary, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="not a byte-pair tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"))
def test_a_named_pipe_does_not_block(tmp_path, name):
    write_folder(TOKENIZER, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_half_characters_is_refused(tmp_path):
    write_folder(TOKENIZER, tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(TOKENIZER.vocabulary | {"\ud800": 600}))
    with pytest.raises(CheckpointError, match="not valid Unicode"):
        load_tokenizer(tmp_path)
