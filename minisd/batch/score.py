"""What many pictures are worth: FID, KID, CLIPScore, LPIPS, PSNR and SSIM, by torchmetrics.

In: a folder that `minisd sample` made (or one of such folders, a grid), and a reference: pictures, or such a folder.
Out: a row for each, with the feature network, the number of pictures, seeds, sizes and versions beside the numbers.
"""

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minisd.batch.features import NETWORKS, network, recognised
from minisd.batch.plan import FILE
from minisd.batch.shards import read_samples
from minisd.files import read_json_object, write_whole
from minisd.warn import warn

BATCH = 50
SUBSETS, SUBSET = 100, 1000  # of KID: mean and standard deviation over so many subsets of so many pictures
# Metric -> what is fetched at its first use. The first two compare two sets, the next three pairs of pictures.
METRICS = {
    "fid": "",
    "kid": "",
    "psnr": "",
    "ssim": "",
    "lpips": "LPIPS' AlexNet, 233 MB",
    "clip": "openai/clip-vit-base-patch16, 600 MB",
    "recognised": "",
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Pictures:
    """Some pictures and, where `minisd sample` made them, their prompts."""

    folder: Path

    @property
    def sampled(self) -> bool:
        return (self.folder / FILE).is_file()

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        """(picture (3, H, W) uint8, prompt), in the order of their names."""
        if self.sampled:
            for _, sample in read_samples(self.folder):
                yield as_tensor(io.BytesIO(sample["png"])), sample["txt"].decode()
        else:
            for path in sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in PICTURES):
                yield as_tensor(path), ""

    def batches(self) -> Iterator[tuple[Tensor, list[str]]]:
        """The same, `BATCH` at a time. Raises ValueError for pictures of several sizes."""
        pictures = iter(self)
        while some := list(islice(pictures, BATCH)):
            try:
                yield torch.stack([picture for picture, _ in some]), [prompt for _, prompt in some]
            except RuntimeError:
                raise ValueError(f"{self.folder}: has pictures of several sizes") from None


def as_tensor(file: Any) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1)


def cells(folder: Path) -> list[Path]:
    """The folders to score: this one, or those in it. Raises ValueError where there are none."""
    found = [folder] if (folder / FILE).is_file() else sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    if not found:
        raise ValueError(f"{folder}: has no {FILE}; name a folder that minisd sample made")
    return found


@torch.no_grad()
def score(folder: Path, reference: Path | None, features: str, metrics: tuple[str, ...]) -> dict[str, Any]:
    """One folder's row. Raises ValueError for a metric that these pictures do not have."""
    pictures, others = Pictures(folder), Pictures(reference) if reference else None
    if others is None and (needy := [name for name in metrics if name in PAIRED or name in ("fid", "kid")]):
        raise ValueError(f"{', '.join(needy)}: need a --reference to compare with")
    row: dict[str, Any] = {"n": sum(len(part) for part, _ in pictures.batches())}
    if others is not None and set(metrics) & {"fid", "kid"}:
        row |= compare_sets(pictures, others, features, metrics, row["n"])
    for name in (name for name in metrics if name in PAIRED):
        assert others is not None
        row[name] = compare_pairs(pictures, others, name)
    if "clip" in metrics:
        row["clip"] = compare_prompts(pictures)
    if "recognised" in metrics:
        row["recognised"] = share_recognised(pictures)
    return row


def compare_sets(
    pictures: Pictures, others: Pictures, features: str, metrics: tuple[str, ...], n: int
) -> dict[str, float]:
    """FID and KID to the reference."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    m = sum(len(part) for part, _ in others.batches())
    if min(n, m) < 2:
        raise ValueError(f"{others.folder if m < 2 else pictures.folder}: has {min(n, m)} pictures, too few to compare")
    feature = network(features)
    made: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the memory for features
        if "fid" in metrics:
            made["fid"] = FrechetInceptionDistance(feature)
        if "kid" in metrics:
            made["kid"] = KernelInceptionDistance(
                feature, subsets=SUBSETS, subset_size=min(SUBSET, min(n, m) // 2 or 1)
            )
    for real, side in ((True, others), (False, pictures)):
        for part, _ in side.batches():
            for metric in made.values():
                metric.update(part, real=real)
    if "fid" in made and min(n, m) <= made["fid"].real_features_sum.numel():
        warn(f"FID of {min(n, m)} pictures with {made['fid'].real_features_sum.numel()} features: take more pictures")
    torch.manual_seed(0)  # KID draws its subsets
    found = {"fid": float(made["fid"].compute())} if "fid" in made else {}
    if "kid" in made:
        mean, deviation = made["kid"].compute()
        found |= {"kid": float(mean), "kid_std": float(deviation)}
    return found


def psnr() -> Any:
    from torchmetrics.image import PeakSignalNoiseRatio

    return PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")


def ssim() -> Any:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    return StructuralSimilarityIndexMeasure(data_range=1.0)


def lpips() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity("alex", normalize=True)


PAIRED: dict[str, Callable[[], Any]] = {"psnr": psnr, "ssim": ssim, "lpips": lpips}


def compare_pairs(pictures: Pictures, others: Pictures, name: str) -> float:
    """The mean over pairs of pictures that stand at the same place. Raises ValueError where there are no pairs."""
    metric = PAIRED[name]()
    try:
        for (some, _), (same, _) in zip(pictures.batches(), others.batches(), strict=True):
            metric.update(some / 255, same / 255)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {pictures.folder} and {others.folder} do not pair up ({error})") from None
    return float(metric.compute())


def compare_prompts(pictures: Pictures) -> float:
    """CLIPScore of pictures and their prompts."""
    from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore(METRICS["clip"].partition(",")[0])
    for part, prompts in pictures.batches():
        metric.update(part, prompts)
    return float(metric.compute())


def share_recognised(pictures: Pictures) -> float:
    """The share that the fashion model's classifier takes for the class that was asked for."""
    from torchmetrics.classification import MulticlassAccuracy

    from minisd.checkpoint.hub import GENERATION_CONFIG, embedded_model

    names = read_json_object(embedded_model("fashion") / GENERATION_CONFIG)["classes"]
    metric = MulticlassAccuracy(len(names), average="micro")
    for part, prompts in pictures.batches():
        if strange := [prompt for prompt in prompts if prompt not in names]:
            raise ValueError(f"recognised: {strange[0]!r} is no class of the fashion model")
        metric.update(recognised(part), torch.tensor([names.index(prompt) for prompt in prompts]))
    return float(metric.compute())


def provenance(folder: Path, reference: Path | None, features: str) -> dict[str, Any]:
    """What a number is worth nothing without."""
    told = read_json_object(folder / FILE)
    return {
        "features": NETWORKS[features][0],
        "resize": "bilinear with antialiasing, to the network's size",
        "reference": str(reference) if reference else None,
        "seeds": f"{told['seed']} to {told['seed'] + told['prompts'] * told['per_prompt'] - 1}",
        "size": f"{told['width']}x{told['height']}",
        "kid": f"{SUBSETS} subsets of {SUBSET} pictures, or of half",
        "versions": {name: version(name) for name in ("torch", "torchmetrics")},
    }


def write_table(folder: Path, rows: list[dict[str, Any]], told: dict[str, Any]) -> str:
    """Write `scores.csv`, `scores.json` and `scores.md` into a folder; returns the last's text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        cells_ = (f"{row[name]:.4g}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in names)
        lines.append(f"| {' | '.join(cells_)} |")
    markdown = "\n".join(lines) + f"\n\nFeatures: {told['features']}. Reference: {told['reference']}.\n"
    write_whole(folder / "scores.csv", text.getvalue().encode())
    write_whole(folder / "scores.json", json.dumps({"rows": rows, **told}, indent=1).encode())
    write_whole(folder / "scores.md", markdown.encode())
    return markdown


def plot(folder: Path, rows: list[dict[str, Any]], x: str, metrics: tuple[str, ...]) -> None:
    """Each metric against the setting `x`, a line for each combination of the others, into `scores.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(metrics), figsize=(4.5 * len(metrics), 4), squeeze=False, layout="constrained"
    )
    scores = {"n", "kid_std", *METRICS}
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = ", ".join(f"{key} {value}" for key, value in row.items() if key not in scores and key != x)
        lines.setdefault(name, []).append(row)
    for panel, metric in zip(panels[0], metrics, strict=True):
        for name, points in lines.items():
            ordered = sorted(points, key=lambda row: row[x])
            errors = [row["kid_std"] for row in ordered] if metric == "kid" else None
            panel.errorbar([row[x] for row in ordered], [row[metric] for row in ordered], errors, fmt="o-", label=name)
        panel.set(xlabel=x, ylabel=metric)
        if all(isinstance(row[x], int | float) and row[x] > 0 for row in rows):
            panel.set_xscale("log")
    if "" not in lines:
        panels[0][0].legend()
    figure.savefig(folder / "scores.png", dpi=100)
