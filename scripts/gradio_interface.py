"""The exercise of the course: a page around the pipeline with a prompt, a guidance slider and a picture to start from.

python scripts/gradio_interface.py     # needs Gradio: pip install "minisd[studio]"; `minisd studio` is the larger page
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing leaves this machine

import gradio as gr
from PIL import Image

import minisd
from minisd.tasks import finish, image_to_image

sd = minisd.StableDiffusion.load()


def generate(prompt: str, guidance: float, picture: Image.Image | None) -> Image.Image:
    """Text to image; from a picture, image to image."""
    if picture is None:
        return sd.text_to_image(prompt, guidance_scale=guidance, steps=20, seed=1)[0]
    picture = picture.resize((128, 128))
    return finish(sd, image_to_image(sd, prompt, picture, strength=0.7, guidance_scale=guidance, seed=1))[0]


page = gr.Interface(
    generate,
    [gr.Textbox("a red heart", label="Prompt"), gr.Slider(1, 15, 4, label="Guidance"), gr.Image(type="pil")],
    gr.Image(format="png"),
    title="minisd",
)

if __name__ == "__main__":
    page.launch(server_name="127.0.0.1", theme=gr.themes.Base(font=["system-ui"], font_mono=["monospace"]))
