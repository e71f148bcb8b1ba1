"""Attention by plain matrix products: for small heads, and in bfloat16, faster on a CPU than torch's fused kernel.

In: queries (B, h, N, d), keys and values (B, h, M, d). Out: (B, h, N, d).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 20  # scores at once (2 MB in bfloat16): they stay in the cache between the two products
FEWEST_ROWS = 256
MOST_SCORES = 1 << 28  # 512 MB in float16


def plain(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all scores at once."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, h, N, M)
    if is_causal:
        scores = scores + torch.full_like(scores[0, 0], -torch.inf).triu(1)
    return scores.softmax(dim=-1) @ v


def by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for each head and `BLOCK` scores at a time: memory grows with N, not with its square."""
    rows = max(1, BLOCK // k.shape[2])
    heads = zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True)  # (N, d), (M, d), (M, d) each
    out = [torch.cat([plain(part, one_k, one_v) for part in one_q.split(rows)]) for one_q, one_k, one_v in heads]
    return torch.stack(out).unflatten(0, q.shape[:2])  # (B, h, N, d)


def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Attention by rows in bfloat16 on a CPU, where it is faster (256 positions and more); torch's elsewhere.

    Torch's memory grows with N on CPU and CUDA (measured: 5 MB where the scores would have 1 GB). On devices where it
    keeps all scores (mps), attention of more than `MOST_SCORES` goes by rows too.
    """
    if q.device.type == "cpu":
        rows = q.dtype == torch.bfloat16 and q.shape[2] >= FEWEST_ROWS
    else:
        rows = q.device.type != "cuda" and q.shape[:3].numel() * k.shape[2] > MOST_SCORES
    return by_rows(q, k, v) if rows and not is_causal else F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
