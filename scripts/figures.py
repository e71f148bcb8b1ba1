"""Make the pictures that the model card shows, from the model that ships with minisd.

    python scripts/figures.py    # writes weights/emoji/samples.png

The README's first picture is what its first command writes.
"""

from emoji_data import contact_sheet
from train_text_to_image import PROMPTS

import minisd
from minisd.checkpoint.sources import embedded_model

SEED = 1


def main() -> None:
    sd = minisd.StableDiffusion.load()
    pictures = sd.text_to_image(list(PROMPTS), seed=SEED, **sd.generation)
    path = embedded_model() / "samples.png"
    contact_sheet(pictures, PROMPTS, columns=8).save(path)
    print(path)


if __name__ == "__main__":
    main()
