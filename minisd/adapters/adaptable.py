"""What a model can be given on top of its weights: LoRAs and learnt words. `StableDiffusion` inherits this.

In: files. Out: the same model, changed until they are unloaded; no weight of its own is ever written to. The work is
done in `lora.py` and `embeddings.py`, which are imported when they are first needed.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from minisd.adapters.lora import Loaded, LoRA
    from minisd.adapters.textual_inversion import Plain
    from minisd.config import ModelConfig
    from minisd.text_encoder import TextEncoder
    from minisd.tokenizer import CLIPTokenizer
    from minisd.unet import UNet


class Adaptable:
    """A model's methods for LoRAs (Hu et al. 2021, arXiv:2106.09685) and textual inversion (Gal et al. 2022)."""

    text_encoder: "TextEncoder"
    unet: "UNet"
    tokenizer: "CLIPTokenizer"
    config: "ModelConfig"

    def __init__(self) -> None:
        self.loras: list[Loaded] = []
        self.embeddings: dict[str, Tensor] = {}  # the words that were loaded, with their vectors (n, D)
        self._plain: Plain | None = None  # tokenizer and table without them

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> "LoRA":
        """Let the LoRA at `path` change the model, `scale` times as much as it was trained to; again for more of them.

        No weight is touched: each change stands beside its layer until `unload_lora`. Returns what was loaded. Raises
        FileNotFoundError for a path that is not there, `minisd.CheckpointError` for what is no LoRA or does not fit
        (it says which layers, and why), ValueError for a scale that is no number; the model is as before then.
        """
        from minisd.adapters.lora import attach, open_lora

        lora = open_lora(path, self.config)
        self.loras.append(attach(lora, {"unet": self.unet, "text_encoder": self.text_encoder}, scale))
        return lora

    def unload_lora(self, path: str | os.PathLike[str] | None = None) -> None:
        """Take the LoRA of this path away again, or all of them. Raises ValueError for one that is not loaded."""
        leaving = [one for one in self.loras if path is None or one.lora.path == Path(os.path.expanduser(path))]
        if path is not None and not leaving:
            raise ValueError(f"{path}: is not loaded ({', '.join(str(one.lora.path) for one in self.loras) or 'none'})")
        for one in leaving:
            one.remove()
            self.loras.remove(one)

    def load_embedding(self, path: str | os.PathLike[str] | Tensor, token: str | None = None) -> list[str]:
        """Teach the model the words in the textual-inversion file at `path`; returns them, for use in prompts.

        `token` names the word; otherwise the file does, by what is in it or by its own name. A tensor (n, D) will do
        in the place of a path. Raises FileNotFoundError for a path that is not there, `minisd.CheckpointError` for
        what is no embedding or one for another model, ValueError for a word that the vocabulary has already or that no
        prompt can contain (an empty one, one with spaces).
        """
        from minisd.adapters.textual_inversion import Plain, open_embedding

        found = open_embedding(path, token, self.config.text_encoder.width)
        for word in found.keys() & self.embeddings.keys():
            raise ValueError(f"token={word!r}: is loaded already; choose another name with token=")
        plain = self._plain or Plain(self.tokenizer, self.text_encoder.token_embedding.weight)
        self._speak(plain, {**self.embeddings, **found})
        return list(found)

    def unload_embedding(self, token: str | None = None) -> None:
        """Forget one loaded word, or all. Raises ValueError for a word that is not loaded."""
        if token is not None and token not in self.embeddings:
            raise ValueError(f"token={token!r}: is not loaded ({', '.join(self.embeddings) or 'none'})")
        if self._plain is not None:
            left = {word: vectors for word, vectors in self.embeddings.items() if token not in (None, word)}
            self._speak(self._plain, left)

    def _speak(self, plain: "Plain", words: dict[str, Tensor]) -> None:
        """Take the tokenizer and the table that know these words, and no others, in the place of the present ones."""
        self.tokenizer, table = plain.with_words(words)
        self.text_encoder.take_table(table)
        self.config = replace(self.config, text_encoder=self.text_encoder.config)
        self.embeddings, self._plain = words, plain if words else None

    def baked(self, states: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """State dicts by component with the loaded LoRAs worked into them, as they are to be saved."""
        if not self.loras:
            return states
        from minisd.adapters.lora import bake

        return bake(states, self.loras)
