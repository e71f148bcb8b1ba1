"""Settings by name as text, "guidance=1,4,7.5": what `minisd grid` varies, and `minisd explain` compares with.

In: texts. Out: names of `Sampling`, or prompt, model, replace, lora, and their values.
"""

from collections.abc import Iterable
from typing import Any

NAMES = {"guidance": "guidance_scale", "cfg": "guidance_scale", "negative": "negative_prompt", "sampler": "scheduler"}
KINDS: dict[str, Any] = {
    "guidance_scale": float, "guidance_rescale": float, "eta": float, "steps": int, "seed": int, "clip_skip": int,
    "scheduler": str, "prompt": str, "negative_prompt": str, "model": str, "replace": str, "lora": float,
}  # fmt: skip


def read_values(texts: Iterable[str]) -> dict[str, list[Any]]:
    """ "steps=5,10" -> {"steps": [5, 10]}. A comma in a value is written twice. Raises ValueError for what is none."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        own = NAMES.get(name.strip().lower(), name.strip().lower())
        if not equals or own not in KINDS:
            raise ValueError(f"{text!r}: must be NAME=VALUE,VALUE; the names are {', '.join([*NAMES, *KINDS])}")
        parts = [part.replace("\0", ",").strip() for part in values.replace(",,", "\0").split(",")]
        try:
            found[own] = [KINDS[own](part) for part in parts]
        except ValueError:
            raise ValueError(f"{text!r}: {name} takes numbers, as in {name}=1,2") from None
    return found
