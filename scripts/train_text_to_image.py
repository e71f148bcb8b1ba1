"""Train the emoji model's UNet and text encoder: predict the noise in a latent, given its caption.

    python scripts/train_text_to_image.py --vae runs/vae/vae.pt --tokenizer runs/tokenizer --steps 12000
    torchrun --nproc-per-node 8 scripts/train_text_to_image.py ...     # the same run on eight GPUs, or CPU sockets

`--batch` is the whole team's: the loss curve does not depend on the number of processes. Run it again to go on from
the last checkpoint. The end writes a folder that `minisd generate --model runs/text-to-image/model` takes; `--steps 0`
writes the state of the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from emoji_data import FULL, PLAIN, Studio, contact_sheet, draw_scene, fail, vocabulary
from emoji_model import EMOJI_TEXT_ENCODER, EMOJI_UNET
from latent_bank import Bank, Batch, Shards, draw_batch, open_bank, read_shards
from PIL import Image
from torch import Tensor, nn
from train_vae import load_vae
from training import (
    Progress,
    Team,
    follow,
    gather_team,
    learning_rate,
    load_checkpoint,
    mixed_precision,
    save_checkpoint,
)

from minisd.checkpoint.load import load_tokenizer
from minisd.config import SD15
from minisd.pipeline import StableDiffusion
from minisd.schedulers import DDPMScheduler
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer
from minisd.unet import UNet
from minisd.vae import VAE

SNR_LIMIT = 5.0  # Hang et al. 2023, arXiv:2303.09556: low-noise steps would otherwise dominate the gradient
WARMUP = 200  # steps
SEED = 0
GENERATION = {"steps": 30, "guidance_scale": 4.0}
PROMPTS = (
    "red heart",
    "sun",
    "tomato",
    "blue circle",
    "cat",
    "pizza",
    "rocket",
    "a red heart on a blue background",
    "a dog",
    "a fox",
    "a panda on a pink background",
    "mushroom",
    "umbrella",
    "house",
    "a car on a yellow background",
    "green square",
    "star",
    "sunflower",
    "a ghost on a black background",
    "robot",
    "fish",
    "rainbow",
    "smiling face",
    "a tree on an orange background",
)


class Denoiser(nn.Module):
    """The two networks that train together, as one."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(EMOJI_TEXT_ENCODER)
        self.unet = UNet(EMOJI_UNET)
        # Positions whisper at first, so that the words are heard above them.
        nn.init.normal_(self.text_encoder.position_embedding.weight, std=0.1)

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Noise in `noisy` (B, 4, h, w) at `timesteps` (B,) under token ids (B, 77)."""
        return self.unet(noisy, timesteps, self.text_encoder(ids))


# ---- training --------------------------------------------------------------------------------------------


def weights(scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor:
    """min(SNR, limit) / SNR for each timestep: the weight of its squared error in the noise; / (SNR + 1) in v."""
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=SNR_LIMIT) / (snr + 1 if scheduler.prediction_type == "v_prediction" else snr)


def learn(model: nn.Module, batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    """The loss of a batch: how badly the noise (or v) was guessed. Sets the gradients."""
    target = batch.noise
    if scheduler.prediction_type == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    with mixed_precision(noisy.device):
        predicted = model(noisy, batch.timesteps, batch.ids)
    error = F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
    loss = (weights(scheduler, batch.timesteps) * error).mean()
    loss.backward()
    return loss


def train(
    team: Team,
    folder: Path,
    bank: Bank,
    tokenizer: CLIPTokenizer,
    denoiser: Denoiser,
    *,
    schedule: Mapping[str, Any] = SD15.scheduler,
    steps: int,
    batch: int,
    peak: float,
    save_every: int,
    show: Callable[[Denoiser, int], None],
) -> Denoiser:
    """Train up to step `steps`, going on from the folder's checkpoint if there is one; return the average.

    `show(average, step)` is called after each checkpoint, in the leading process.
    """
    denoiser = denoiser.to(team.device)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": denoiser, "average": average, "optimizer": optimizer}
    first = load_checkpoint(folder / "train.pt", parts)
    model, scheduler = team.join(denoiser), DDPMScheduler.from_config(schedule)
    progress = Progress(folder, team, range(first, max(first, steps)), batch)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, warmup=WARMUP, total=steps)
        optimizer.zero_grad()
        loss = learn(model, draw_batch(bank, tokenizer, batch, step).share(team), scheduler)
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        follow(average, denoiser, step)
        progress.note(step, team.mean(loss))
        if team.leads and ((step + 1) % save_every == 0 or step + 1 == steps):
            save_checkpoint(folder / "train.pt", parts, step + 1)
            show(average, step + 1)
    return average


# ---- looking at it ---------------------------------------------------------------------------------------


def assemble(
    denoiser: Denoiser, vae: VAE, tokenizer: CLIPTokenizer, schedule: Mapping[str, Any] = SD15.scheduler
) -> StableDiffusion:
    """The whole model, with the settings that suit it."""
    return StableDiffusion(
        denoiser.text_encoder, denoiser.unet, vae, tokenizer, scheduler=schedule, generation=GENERATION
    )


def chosen_schedule(prediction: str, zero_snr: bool) -> dict[str, Any]:
    """SD 1.5's noise schedule with what the options change. Raises ValueError for zero SNR with noise prediction.

    Zero terminal SNR needs v, since pure noise says nothing of the picture, and sampling that starts at the last
    timestep (Lin et al. 2023, arXiv:2305.08891).
    """
    if zero_snr and prediction != "v_prediction":
        raise ValueError("--rescale-betas-zero-snr needs --prediction v_prediction: noise prediction divides by zero")
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    return {**SD15.scheduler, "prediction_type": prediction, **zero}


def grid(sd: StableDiffusion, columns: int = 8) -> Image.Image:
    """A picture for each of PROMPTS, always from the same noise."""
    pictures = sd.text_to_image(list(PROMPTS), seed=SEED)  # steps and guidance: the model's own
    return contact_sheet(pictures, PROMPTS, columns)


def new_denoiser(start: str | None) -> Denoiser:
    """Fresh weights, or those of a model that learned before (from smaller pictures, say)."""
    torch.manual_seed(SEED)
    denoiser = Denoiser()
    if start:
        model = StableDiffusion.load(start)
        denoiser.text_encoder.load_state_dict(model.text_encoder.state_dict())
        denoiser.unet.load_state_dict(model.unet.state_dict())
    return denoiser


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train UNet and text encoder of the emoji model; run again to resume.")
    parser.add_argument("--out", type=Path, default=Path("runs/text-to-image"), metavar="FOLDER")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae.pt"), metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer"), metavar="FOLDER")
    parser.add_argument(
        "--from", dest="start", metavar="MODEL", help="begin with the weights of this model (folder or 'emoji')"
    )
    parser.add_argument("--steps", type=int, default=12_000, help="length of the whole run (default 12000)")
    parser.add_argument("--batch", type=int, default=64, help="scenes a step, of all processes together (default 64)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bank", type=int, default=10_240, metavar="SCENES", help="pictures to encode beforehand")
    parser.add_argument(
        "--shards", type=Path, metavar="FOLDER", help="learn from what `minisd sample` made, in the place of scenes"
    )
    parser.add_argument("--plain", action="store_true", help="one thing in the middle: no sizes, places and pairs")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon", help="what to predict")
    parser.add_argument("--rescale-betas-zero-snr", action="store_true", help="zero terminal SNR, with v_prediction")
    parser.add_argument("--save-every", type=int, default=300, metavar="STEPS", help="checkpoint and samples")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    try:
        arguments.schedule = chosen_schedule(arguments.prediction, arguments.rescale_betas_zero_snr)
    except ValueError as error:
        sys.exit(fail(str(error)))
    for path in (arguments.vae, arguments.tokenizer / "vocab.json"):
        if not path.exists():
            sys.exit(fail(f"{path}: no such file; run train_vae.py and train_tokenizer.py first"))
    return arguments


def main() -> None:
    arguments = read_arguments()
    run = arguments.out
    run.mkdir(parents=True, exist_ok=True)
    vae, tokenizer = load_vae(arguments.vae), load_tokenizer(arguments.tokenizer)
    variety, schedule = PLAIN if arguments.plain else FULL, arguments.schedule

    def show(average: Denoiser, step: int) -> None:
        sd = assemble(average, vae.to(average.unet.conv_in.weight.device), tokenizer, schedule)
        grid(sd).save(run / f"step-{step:06}.png")

    with gather_team() as team:
        team.check_batch(arguments.batch)
        if arguments.shards:
            bank = open_bank(run / "bank.pt", vae, team, read_shards(arguments.shards), Shards)
        else:
            scenes = [draw_scene(SEED, index, variety) for index in range(arguments.bank)]
            bank = open_bank(run / "bank.pt", vae, team, scenes, lambda: Studio(arguments.font))
        model = train(
            team,
            run,
            bank,
            tokenizer,
            new_denoiser(arguments.start),
            schedule=schedule,
            steps=arguments.steps,
            batch=arguments.batch,
            peak=arguments.lr,
            save_every=arguments.save_every,
            show=show,
        )
        if team.leads:
            assemble(model.cpu(), vae.cpu(), tokenizer, schedule).save(run / "model", dtype=torch.float16)
            (run / "model" / "words.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
            print(run / "model")


if __name__ == "__main__":
    main()
