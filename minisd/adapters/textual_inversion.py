"""Textual inversion: new words for a model that stays as it is.

A word is one or a few rows for the text encoder's table (Gal et al. 2022, arXiv:2208.01618), learnt from a handful of
pictures. `open_embedding` reads a file in any of its forms; `Plain.with_words` makes the tokenizer and the table that
know the words. Only safetensors are read: `minisd convert --from-pickle` makes one out of a `.pt` or `.bin`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.checkpoint.header import Files, open_files
from minisd.checkpoint.naming import stranger
from minisd.checkpoint.values import DTYPES, read_tensor
from minisd.files import CheckpointError
from minisd.tokenizer import END, START, CLIPTokenizer

Words = Mapping[str, Tensor]  # a word -> its vectors (n, width)

NAMELESS = ("emb_params", "*", "embedding", "clip_l")  # names of tensors that say nothing about the word
PICKLES = (".pt", ".bin", ".ckpt", ".pth")
WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's second text encoder"}
MOST = 75  # vectors: more have no place in a prompt


def open_embedding(
    source: str | os.PathLike[str] | Tensor, token: str | None, width: int | Sequence[int]
) -> dict[str, Tensor]:
    """The words in `source`, with their vectors (n, width), float32. `width`: the text encoder's, or those of two.

    For SDXL's two text encoders a file holds `clip_l` and `clip_g`, which are concatenated. For one it may hold
    `emb_params` (the word is `token`, or the file's name without its ending), or one tensor for each word under the
    word's name. A tensor (n, width) is taken as it is and needs a `token`. Raises FileNotFoundError for a path that is
    not there, CheckpointError for what is no embedding or one for another model, ValueError for a `token` that is
    missing or is one name for several words.
    """
    widths = (width,) if isinstance(width, int) else width
    if isinstance(source, Tensor):
        if token is None:
            raise ValueError("a tensor has no name: give token=")
        return {token: shaped(source, sum(widths), "the tensor")}
    path = Path(os.path.expanduser(source))
    files = open_file(path, two=len(widths) > 1)
    if len(widths) > 1:
        named = {"clip_l": both_vectors(files, widths)}
    else:
        named = {name: read_vectors(files, name, widths[0]) for name in files.tensors}
    if token is not None and len(named) > 1:
        raise ValueError(f"{path}: holds {len(named)} words ({', '.join(sorted(named)[:4])}): token= can name only one")
    own = {name: path.stem if name in NAMELESS else name for name in named}
    return {own[name] if token is None else token: vectors for name, vectors in named.items()}


def both_vectors(files: Files, widths: Sequence[int]) -> Tensor:
    """The vectors (n, sum of `widths`) of a word for SDXL. Raises CheckpointError for one that is for another model."""
    names = ("clip_l", "clip_g")
    if absent := [name for name in names if name not in files.tensors]:
        raise CheckpointError(f"{files.path}: has no {absent[0]}: SDXL has two text encoders (clip_l and clip_g)")
    halves = [read_vectors(files, name, width) for name, width in zip(names, widths, strict=True)]
    if len(halves[0]) != len(halves[1]):
        raise CheckpointError(
            f"{files.path}: has {len(halves[0])} vectors for one text encoder, {len(halves[1])} for the other"
        )
    return torch.cat(halves, dim=1)


def open_file(path: Path, *, two: bool) -> Files:
    """The header of an embedding's file for one text encoder or `two`; what is no embedding is refused by name."""
    try:
        files = open_files([path], path)
    except CheckpointError as error:
        if path.suffix not in PICKLES and "pickle" not in str(error):
            raise
        way = f"`minisd convert --from-pickle {path.name} {path.stem}.safetensors` makes one of it"
        raise CheckpointError(f"{error}; {way}") from None
    if not files.tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if "clip_g" in files.tensors and not two:
        raise CheckpointError(f"{path}: is an embedding for SDXL (clip_l and clip_g): SD 1.x has one text encoder")
    kind = stranger(files.tensors)
    if kind and "embedding" not in kind:
        raise CheckpointError(f"{path}: is {kind}; an embedding was expected")
    return files


def read_vectors(files: Files, name: str, width: int) -> Tensor:
    """The vectors (n, width) of one word, float32. Raises CheckpointError for a tensor that is none."""
    info = files.tensors[name]
    label = f"{files.path}: the tensor {name!r}"
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{label} has the dtype {info.dtype}: vectors are floating point")
    check_shape(info.shape, width, label)
    return shaped(read_tensor(files, name), width, label)


def shaped(tensor: Tensor, width: int, label: str) -> Tensor:
    """One vector (width,) or several (n, width) -> (n, width), float32. Raises CheckpointError for anything else."""
    check_shape(tuple(tensor.shape), width, label)
    vectors = tensor.detach().reshape(-1, width).float().cpu()
    if not vectors.isfinite().all():
        raise CheckpointError(f"{label} holds NaN or infinite numbers: its training went wrong")
    return vectors


def check_shape(shape: tuple[int, ...], width: int, label: str) -> None:
    if len(shape) not in (1, 2) or 0 in shape or (len(shape) == 2 and shape[0] > MOST):
        raise CheckpointError(f"{label} ({list(shape)}) is not an embedding: 1 to {MOST} vectors were expected")
    if shape[-1] != width:
        whose = f" (it is for {WIDTHS[shape[-1]]})" if shape[-1] in WIDTHS else ""
        raise CheckpointError(f"{label} is {shape[-1]} wide{whose}: this model's text encoder is {width} wide")


# ---- a model that knows them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """What a model was before it learnt words: its tokenizer and its text encoders' tables (rows, width)."""

    tokenizer: CLIPTokenizer
    tables: Sequence[Tensor]  # Parameters

    def with_words(self, words: Words) -> tuple[CLIPTokenizer, Sequence[Tensor]]:
        """A tokenizer and tables that know `words` too. Without words: the very objects that were there before.

        A word of several vectors becomes the tokens "word", "word_1", "word_2", ... as in diffusers. Raises ValueError
        for a word that is known already, or that no prompt can contain.
        """
        if not words:
            return self.tokenizer, self.tables
        old = self.tokenizer
        first = max(len(self.tables[0]), 1 + max(old.vocabulary.values()))
        tokens = [token for word, vectors in words.items() for token in spelling(word, len(vectors))]
        check_names(tokens, old)
        ids = {token: first + number for number, token in enumerate(tokens)}
        tokenizer = CLIPTokenizer(
            {**old.vocabulary, **ids},
            old.merges,
            pad_token=old.pad_token,
            context_length=old.context_length,
            added=(*old.added, *tokens),
        )
        check_apart(words, old, tokenizer)
        widths = [table.shape[1] for table in self.tables]
        halves = zip(*(vectors.split(widths, dim=1) for vectors in words.values()), strict=True)
        return tokenizer, [longer(table, vectors) for table, vectors in zip(self.tables, halves, strict=True)]


def longer(table: Tensor, vectors: Iterable[Tensor]) -> Tensor:
    """The same Parameter with more rows."""
    rows = torch.cat([table.detach(), *(some.to(table) for some in vectors)])
    return nn.Parameter(rows, requires_grad=table.requires_grad)


def spelling(word: str, vectors: int) -> list[str]:
    """The tokens that a word consists of."""
    return [word, *(f"{word}_{number}" for number in range(1, vectors))]


def check_apart(words: Words, old: CLIPTokenizer, new: CLIPTokenizer) -> None:
    """A prompt with one word must not mean the next one too: "cat" with one vector, beside another word "cat_1".

    In files, minisd's and diffusers', only the names tell which tokens belong together. Raises ValueError.
    """
    meant = {word: spelling(word, len(vectors)) for word, vectors in words.items()}
    meant |= {token: old.spelt_out(token).split() for token in old.added}
    for word, tokens in meant.items():
        more = [token for token in new.spelt_out(word).split() if token not in tokens]
        if more:
            raise ValueError(
                f"token={word!r}: in prompts it would mean {more[0]!r} too, which is another word; "
                "choose another name for one of them with token="
            )


def check_names(tokens: list[str], tokenizer: CLIPTokenizer) -> None:
    """Every token must be new, whatever its case, and something that a prompt can contain."""
    known = {token.lower() for token in (*tokenizer.added, START, END)}
    for token in tokens:
        if fault := misspelt(token):
            raise ValueError(f"token={token!r}: {fault}; choose a name with token=, such as '<cat>'")
        if token in tokenizer.vocabulary or token.lower() in known:
            raise ValueError(f"token={token!r}: is in the vocabulary already; choose another name with token=")
        known.add(token.lower())


def misspelt(token: str) -> str | None:
    """Why no prompt can contain this word, or None."""
    if not token:
        return "a word cannot be empty"
    if any("\ud800" <= character <= "\udfff" for character in token):
        return "is not valid Unicode text"
    if token.split() != [token]:
        return "a word cannot have spaces around it or in it"
    if token.endswith("</w>"):
        return "'</w>' marks the end of a word in the vocabulary"
    return None
