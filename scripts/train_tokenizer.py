"""Train a small byte-level BPE in CLIP's format, on the emoji captions and on the names of all emoji.

CLIP's tokenizer is a list of merges (`merges.txt`) and a dictionary (`vocab.json`) whose order is fixed:
the 256 byte symbols, the same 256 as they look at the end of a word (`a</w>`), one entry per merge, and the
two special tokens. The files load in `minisd.tokenizer` and in transformers' CLIPTokenizer and give the
same ids.

    python scripts/train_tokenizer.py --out runs/tokenizer
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from emoji_data import FULL, caption, draw_scene, fail, vocabulary
from emoji_model import CONTEXT_LENGTH, VOCABULARY_SIZE
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from minisd.checkpoint.tokenizer_files import write_folder
from minisd.tokenizer import END, WORDS, CLIPTokenizer, vocabulary_of

COMMON = (
    "a an the of in on at and with two three big small large little tiny huge left right top bottom "
    "middle next to above below behind beside between background picture drawing icon emoji white black "
    "grey gray red orange yellow green blue purple violet pink brown gold golden silver cyan magenta "
    "turquoise beige dark light bright pale round square circle triangle happy sad angry cute old new man "
    "woman boy girl child person animal food fruit plant flower weather"
)


def texts(captions: int) -> Iterator[str]:
    """What the merges are counted on: captions as in training, then emoji names and common words."""
    for i in range(captions):
        yield caption(draw_scene(seed=0, index=i, variety=FULL), random.Random(i))
    for _ in range(10):
        yield from vocabulary()
        yield COMMON
        for code_point in range(0x1F300, 0x1FB00):
            yield unicodedata.name(chr(code_point), "").lower()


def learn_merges(captions: int, count: int) -> list[tuple[str, str]]:
    """The `count` most useful merges, in order."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=count + 512, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(texts(captions), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the emoji model's tokenizer.")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizer"), metavar="FOLDER")
    parser.add_argument("--captions", type=int, default=20_000, help="captions to count on (default 20000)")
    arguments = parser.parse_args()
    merges = learn_merges(arguments.captions, VOCABULARY_SIZE - 514)
    vocabulary = vocabulary_of(merges)
    if len(vocabulary) != VOCABULARY_SIZE:
        sys.exit(fail(f"{len(vocabulary)} ids instead of {VOCABULARY_SIZE}: too few different words"))
    tokenizer = CLIPTokenizer(vocabulary, merges, pad_token=END, context_length=CONTEXT_LENGTH)
    write_folder(tokenizer, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
