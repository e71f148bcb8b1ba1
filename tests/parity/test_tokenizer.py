"""The tokenizer against transformers' CLIPTokenizer, id for id."""

import pytest
import torch
from transformers import CLIPTokenizer as ReferenceTokenizer

from minisd.checkpoint import tokenizer_files
from minisd.checkpoint.load import load_tokenizer
from minisd.tokenizer import CLIPTokenizer

TEXTS = [
    "",
    " ",
    "a photograph of an astronaut riding a horse",
    "  Hello,\n\tWORLD!! it's 2024's naïve café",
    "😀👨‍👩‍👧 🇫🇷 中文 日本語 العربية Ελληνικά",
    "<|endoftext|> a <|startoftext|> b",
    "a photo<|endoftext|>of",
    "İstanbul ǅ ﬁ ß Å é",
    "don't we'll I'M they'Ve",
    "\u00a0\u200b\ufeff\u3000x",
    "...!!!??? (a:1.3) [b] {c} #1_000 100%",
    "\x00\x01\x7f",
    "x " * 200,
    "supercalifragilisticexpialidocious" * 5,
    "\ud7ff\ue000\U0010ffff",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer_files.write_folder(CLIPTokenizer.clip(), folder)
    return ReferenceTokenizer.from_pretrained(folder)


def test_same_ids(reference):
    theirs = reference(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(CLIPTokenizer.clip()(TEXTS), theirs)


def test_random_text(reference):
    """Random strings from all over Unicode, and from the characters that have rules."""
    import random

    dice = random.Random(0)
    planes = [range(32, 127), range(0xA0, 0x250), range(0x300, 0x370), range(0x2000, 0x2070), range(0x1F300, 0x1F700)]
    texts = ["".join(chr(dice.choice(dice.choice(planes))) for _ in range(dice.randrange(1, 40))) for _ in range(500)]
    theirs = reference(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(CLIPTokenizer.clip()(texts), theirs)


def test_reads_what_transformers_writes(reference, tmp_path):
    """transformers 5 writes tokenizer.json, not vocab.json and merges.txt."""
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "vocab.json").exists()
    assert torch.equal(load_tokenizer(tmp_path)(TEXTS), CLIPTokenizer.clip()(TEXTS))


def test_another_padding_token(reference, tmp_path):
    """SD 2.x pads with "!" (id 0)."""
    reference.save_pretrained(tmp_path)
    other = ReferenceTokenizer.from_pretrained(tmp_path, pad_token="!")
    other.save_pretrained(tmp_path)
    theirs = other(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(load_tokenizer(tmp_path)(TEXTS), theirs)
