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
from minisd.batch.shards import read_samples, status
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


class Sets:
    """FID and KID to one reference, whose features are computed once for all that is compared with it."""

    def __init__(self, others: Pictures, features: str, metrics: set[str]) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        feature, self.others = network(features), others
        self.metrics: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the memory for features
            if "fid" in metrics:
                self.metrics["fid"] = FrechetInceptionDistance(feature, reset_real_features=False)
            if "kid" in metrics:
                self.metrics["kid"] = KernelInceptionDistance(feature, subsets=SUBSETS, reset_real_features=False)
        self.count = self.update(others, real=True)

    def update(self, pictures: Pictures, real: bool) -> int:
        """Take in some pictures; returns how many. Raises ValueError for too few."""
        count = 0
        for part, _ in pictures.batches():
            count += len(part)
            for metric in self.metrics.values():
                metric.update(part, real=real)
        if count < 2:
            raise ValueError(f"{pictures.folder}: has {count} pictures, too few to compare")
        return count

    def compare(self, pictures: Pictures) -> dict[str, float]:
        """FID, and KID with its standard deviation over subsets."""
        for metric in self.metrics.values():
            metric.reset()  # all but the reference
        fewest = min(self.count, self.update(pictures, real=False))
        found: dict[str, float] = {}
        if fid := self.metrics.get("fid"):
            if fewest <= (features := fid.real_features_sum.numel()):
                warn(f"FID of {fewest} pictures with {features} features: take more pictures")
            found["fid"] = float(fid.compute())
        if kid := self.metrics.get("kid"):
            kid.subset_size = min(SUBSET, fewest // 2)
            torch.manual_seed(0)  # it draws its subsets
            mean, deviation = kid.compute()
            found |= {"kid": float(mean), "kid_std": float(deviation)}
        return found


@torch.no_grad()
def score(folders: list[Path], reference: Path | None, features: str, metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each folder. Raises ValueError for a metric that these pictures do not have."""
    others, of_sets = Pictures(reference) if reference else None, {"fid", "kid"} & set(metrics)
    if others is None and (needy := [name for name in metrics if name in PAIRED or name in of_sets]):
        raise ValueError(f"{', '.join(needy)}: need a --reference to compare with")
    sets = Sets(others, features, of_sets) if others is not None and of_sets else None
    rows = []
    for pictures in map(Pictures, folders):
        row: dict[str, Any] = {"n": status(pictures.folder)["pictures"]}
        row |= sets.compare(pictures) if sets else {}
        if others is not None:
            row |= {name: compare_pairs(pictures, others, name) for name in metrics if name in PAIRED}
        row |= {name: ALONE[name](pictures) for name in metrics if name in ALONE}
        rows.append(row)
    return rows


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


ALONE: dict[str, Callable[[Pictures], float]] = {"clip": compare_prompts, "recognised": share_recognised}


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
