"""The studio's page: Gradio, on the loopback address, with nothing from elsewhere.

In: a `Bench`. Out: a running page. Handlers are short: what they do is in `bench.py`.
"""

import functools
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: it reports at its import
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from PIL import Image

from minisd.metadata.reading import read_settings
from minisd.schedulers.names import NAMES
from minisd.studio import bench as work
from minisd.studio.bench import Bench

HOST = "127.0.0.1"
FONT = ["system-ui", "sans-serif"]  # of the machine: none is fetched
ONE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # one model: one at a time, the others wait
UPLOAD = "20mb"
EDITS = {"image to image": "image", "inpaint what is drawn over": "inpaint", "rewrite the prompt": "rewrite"}
SHOWN: dict[str, Any] = {"format": "png", "buttons": ["download", "fullscreen"]}  # and no button that shares


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose ValueErrors are messages on the page."""

    @functools.wraps(handler)
    def wrapper(*values: Any) -> Iterator[Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                yield from handler(*values)
        except (ValueError, OSError, MemoryError) as error:
            raise gr.Error(" ".join(str(error).split())[:500], print_exception=False) from None

    return wrapper


def build(bench: Bench) -> gr.Blocks:
    """The page with its five tabs."""
    advice = bench.model(bench.models[0]).generation  # loaded now, so that the first picture does not wait for it
    with gr.Blocks(title="minisd studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        info = "also a folder, a file, a hub id" if bench.allow_paths else None
        typed = bench.allow_paths
        model = gr.Dropdown(bench.models, value=bench.models[0], label="Model", allow_custom_value=typed, info=info)
        recent = gr.State()  # the settings of the picture that was made last
        with gr.Tab("Generate"):
            inputs = generate_tab(bench, model, recent, advice)
        with gr.Tab("Edit"):
            edit_tab(bench, model)
        with gr.Tab("Look inside"):
            look_tab(bench, model, recent)
        with gr.Tab("Weights"):
            weights_tab(bench, model)
        with gr.Tab("PNG"):
            png_tab(bench, inputs)
    return page


def settings_of(
    negative: str, guidance: float, steps: int, seed: float, scheduler: str, *size: float
) -> dict[str, Any]:
    """The values of the settings' components, by name."""
    found = {"negative_prompt": negative, "guidance_scale": guidance, "steps": steps, "seed": seed}
    return {**found, "scheduler": scheduler, **dict(zip(("width", "height"), size, strict=False))}


def sliders(steps: int, scale: float) -> list[Any]:
    """Negative prompt, guidance, steps, seed and scheduler."""
    negative = gr.Textbox(label="Negative prompt", max_length=2000)
    with gr.Row():
        guidance = gr.Slider(1, 20, scale, step=0.5, label="Guidance")
        count = gr.Slider(1, work.MOST_STEPS, steps, step=1, label="Steps")
    with gr.Row():
        seed = gr.Number(-1, label="Seed (-1: drawn)", precision=0)
        scheduler = gr.Dropdown(list(NAMES), value="ddim", label="Scheduler")
    return [negative, guidance, count, seed, scheduler]


def generate_tab(bench: Bench, model: Any, recent: Any, advice: Mapping[str, Any]) -> list[Any]:
    """Text to image with a preview of every step; returns the components that hold the settings."""
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", value="a red heart on a blue background", max_length=4000)
            common = sliders(advice.get("steps", 30), advice.get("guidance_scale", 7.5))
            with gr.Row():
                names = ("Width (0: the model's)", "Height (0: the model's)")
                size = [gr.Slider(0, work.MOST_SIDE, 0, step=8, label=name) for name in names]
            with gr.Accordion("LoRA", open=False):
                lora = gr.File(label="LoRA", file_types=[".safetensors"], type="filepath")
                scale = gr.Slider(-2, 2, 1, step=0.05, label="LoRA scale")
        with gr.Column():
            picture = gr.Image(label="Picture", type="filepath", interactive=False, height=400, **SHOWN)
            said, made = gr.Markdown(), gr.State([])
            with gr.Row():
                start, stop = gr.Button("Generate", variant="primary"), gr.Button("Cancel")
            gallery = gr.Gallery(label="Made so far", columns=4, fit_columns=False, height=240, **SHOWN)

    @told
    def handler(model: str, prompt: str, lora: str | None, scale: float, made: Any, *values: Any) -> Iterator[Any]:
        for frame in bench.generate(model, prompt, settings_of(*values), lora, scale):
            if frame.path is None:
                yield frame.picture, frame.said, gr.skip(), gr.skip(), gr.skip()
            else:
                made = [*made, (frame.path, f"{prompt} · {frame.said}")][-24:]
                yield frame.path, frame.said, made, made, frame.settings

    inputs = [prompt, *common, *size]
    outputs = [picture, said, made, gallery, recent]
    running = start.click(
        handler, [model, prompt, lora, scale, made, *common, *size], outputs, api_name="generate", **ONE
    )
    scale.release(handler, [model, prompt, lora, scale, made, *common, *size], outputs, api_visibility="private", **ONE)
    stop.click(None, cancels=[running])
    return inputs


def edit_tab(bench: Bench, model: Any) -> None:
    """Image to image, inpainting under a drawn mask, and inversion with prompt-to-prompt."""
    with gr.Row():
        with gr.Column():
            editor = gr.ImageEditor(label="Picture", type="pil", sources=["upload"], transforms=[], **SHOWN)
            how = gr.Radio(list(EDITS), value=next(iter(EDITS)), label="How")
            prompt = gr.Textbox(label="Prompt", max_length=4000)
            new = gr.Textbox(label="New prompt, to rewrite; the prompt says what the picture shows", max_length=4000)
        with gr.Column():
            result = gr.Image(label="Result", type="filepath", interactive=False, height=400, **SHOWN)
            said, start = gr.Markdown(), gr.Button("Edit", variant="primary")
            strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength")
            common = sliders(20, 2.0)

    @told
    def handler(
        model: str, how: str, prompt: str, new: str, strength: float, drawn: Any, *values: Any
    ) -> Iterator[Any]:
        if not drawn or drawn.get("background") is None:
            raise ValueError("no picture: upload one first")
        picture, settings = work.as_picture(drawn["background"]), settings_of(*values)
        if EDITS[how] == "image":
            frames = bench.image_to_image(model, prompt, settings, picture, strength)
        elif EDITS[how] == "inpaint":
            frames = bench.inpaint(model, prompt, settings, picture, work.painted(drawn["layers"]), strength)
        else:
            frames = bench.rewrite(model, prompt, new, settings, picture)
        for frame in frames:
            yield frame.path or frame.picture, frame.said

    start.click(handler, [model, how, prompt, new, strength, editor, *common], [result, said], api_name="edit", **ONE)


def look_tab(bench: Bench, model: Any, recent: Any) -> None:
    """The explain page of the picture that was made last; the slider makes it anew with other guidance."""
    with gr.Row():
        start, guidance = (
            gr.Button("Look inside the last picture", variant="primary"),
            gr.Slider(1, 20, 4, label="Guidance"),
        )
    page = gr.HTML()

    @told
    def handler(model: str, recent: Any, guidance: float | None = None) -> Iterator[Any]:
        if not recent:
            raise ValueError("there is no picture yet: make one in Generate first")
        settings = {**recent, **({"guidance_scale": guidance} if guidance else {})}
        yield bench.explain(model, settings.pop("prompt"), settings)

    start.click(handler, [model, recent], page, api_name="explain", **ONE)
    guidance.release(handler, [model, recent, guidance], page, api_visibility="private", **ONE)


def weights_tab(bench: Bench, model: Any) -> None:
    """What is in the model's files, and what differs from another's."""
    other = gr.Dropdown(
        bench.models, value=bench.models[0], label="Another model", allow_custom_value=bench.allow_paths
    )
    with gr.Row():
        look, compare = gr.Button("Inspect"), gr.Button("Compare")
    said = gr.Textbox(label="Found", lines=20)

    @told
    def inspect(model: str) -> Iterator[Any]:
        yield bench.inspect(model)

    @told
    def diff(model: str, other: str) -> Iterator[Any]:
        yield bench.diff(model, other)

    look.click(inspect, model, said, api_name="inspect", **ONE)
    compare.click(diff, [model, other], said, api_name="diff", **ONE)


def png_tab(bench: Bench, inputs: list[Any]) -> None:
    """A dropped picture: its settings, into the Generate tab, or the picture once more."""
    file = gr.File(label="Picture", type="filepath", file_types=["image"])
    with gr.Row():
        load, again = gr.Button("Load into Generate"), gr.Button("Replay", variant="primary")
    found, said = gr.JSON(label="Settings"), gr.Markdown()
    picture = gr.Image(label="Made again", type="pil", interactive=False, **SHOWN)

    @told
    def show(path: str | None) -> Iterator[Any]:
        if path:
            work.opened(path)
        yield work.shown(read_settings(path)) if path else None

    @told
    def fill(path: str | None) -> Iterator[Any]:
        if not path:
            raise ValueError("no picture: drop one first")
        settings = read_settings(path).settings
        names = ("prompt", "negative_prompt", "guidance_scale", "steps", "seed", "scheduler", "width", "height")
        yield [settings.get(name, gr.skip()) for name in names]

    @told
    def replay(path: str | None) -> Iterator[Any]:
        if not path:
            raise ValueError("no picture: drop one first")
        yield bench.replay(path)

    file.change(show, file, found, api_name="show")
    load.click(fill, file, inputs, api_visibility="private")
    again.click(replay, file, [picture, said], api_name="replay", **ONE)


def serve(models: list[str], port: int, *, allow_paths: bool, waiting: int, browser: bool, block: bool = True) -> Any:
    """Open the page on the loopback address; blocks until it is stopped. Raises ValueError for a port in use."""
    check_port(port)
    folder = Path(tempfile.mkdtemp(prefix="minisd-studio-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    Image.MAX_IMAGE_PIXELS = work.MOST_PIXELS // 2  # Pillow refuses twice as many, also where Gradio opens a file
    page = build(Bench(models, folder, allow_paths)).queue(max_size=waiting, default_concurrency_limit=4)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=browser,
        prevent_thread_lock=not block,
        show_error=True,
        quiet=True,
        max_file_size=UPLOAD,
        footer_links=[],
        theme=gr.themes.Base(font=FONT, font_mono=["ui-monospace", "monospace"]),
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
    )
    return page


def check_port(port: int) -> None:
    """Raise ValueError for a port that somebody listens on."""
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise ValueError(f"port {port}: is in use; choose another with --port, or stop what listens there")
