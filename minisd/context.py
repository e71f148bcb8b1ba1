"""Prompts -> context, what the UNet's cross-attention reads: the tokenizer and the text encoder, one after the other.

In: texts, or context that is encoded already. Out: (B, 77, D); with `long_prompts` (B, 77 n, D): a prompt of more than
75 tokens is cut into n windows, each encoded with a start and an end token of its own, and concatenated along the
tokens. AUTOMATIC1111's web UI and ComfyUI do so too (they may move a cut to a comma or a word before it).
"""

from typing import Any

import torch
from torch import Tensor

from minisd.files import shown
from minisd.tokenizer import CLIPTokenizer
from minisd.warn import warn


def encode(sd: Any, texts: str | list[str] | Tensor, clip_skip: int, long_prompts: bool) -> Tensor:
    """Texts (B of them) -> context (B, 77 n, D), on the device of the model `sd`. Warns of words that are cut off."""
    if isinstance(texts, Tensor):
        return texts.to(sd.device)
    texts = [texts] if isinstance(texts, str) else texts
    ids = sd.tokenizer.windows(texts) if long_prompts else cut(sd.tokenizer, texts)[:, None]  # (B, n, 77)
    return sd.read(ids.to(sd.device), clip_skip)


def same_length(sd: Any, contexts: list[Tensor]) -> list[Tensor]:
    """Contexts (B, T, D) whose T differ -> all as long as the longest: windows of the empty prompt are put behind."""
    longest = max(context.shape[1] for context in contexts)
    if all(context.shape[1] == longest for context in contexts):
        return contexts
    empty = encode(sd, "", 0, False)  # (1, 77, D)
    return [torch.cat([context, *missing(context, longest, empty)], dim=1) for context in contexts]


def missing(context: Tensor, longest: int, empty: Tensor) -> list[Tensor]:
    """The empty windows behind one context. Raises ValueError where whole windows do not fill the gap."""
    windows, rest = divmod(longest - context.shape[1], empty.shape[1])
    if rest:
        raise ValueError(f"context of {context.shape[1]} tokens beside one of {longest}: must be equally long")
    return [empty.to(context).expand(len(context), -1, -1)] * windows


def cut(tokenizer: Any, texts: list[str]) -> Tensor:
    """Texts (B of them) -> ids (B, 77). Warns of the words that the text encoder will not see."""
    if not isinstance(tokenizer, CLIPTokenizer):  # any callable may stand in its place
        return tokenizer(texts)
    found = [tokenizer.ids(text) for text in texts]
    most = tokenizer.context_length - 2
    for ids in (ids for ids in found if len(ids) > most):
        words = shown(tokenizer.decode(ids[most:]), 60)
        warn(
            f"the prompt has {len(ids)} tokens, of which the model reads {most}; cut off: {words!r} "
            "(long_prompts=True, --long-prompts, reads all)"
        )
    return tokenizer.rows(found)
