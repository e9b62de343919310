"""Why the rows of the ablation differ: what masks, discriminators and gradients do; in Markdown.

    prioritycut train quickstart name=cutmix data.url=data/puppets train.keep_every=125 ...
    python benchmarks/ablation_why.py runs/unet runs/cutmix runs/prioritycut   # + pictures

For every checkpoint that a run with the U-Net discriminator has kept, on pairs of frames of unseen
puppets whose dis-occluded pixels are known: how much of the cut area is dis-occluded, for both
kinds of mask, and how large that area is; how often the discriminator is right about a pixel, there
and elsewhere, and in mixed images inside and outside of the mask; how well its logits tell real
from generated pixels by whatever threshold, as the area under the ROC curve (a discriminator that
calls every pixel real is right about half of them, and yet may rank them well); and how large the
gradient of its losses is that reaches the generated image there. Each stands beside what chance or
the other region gives.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from command_line import run_command
from matplotlib.figure import Figure
from priority_cut import puppet_pairs
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from prioritycut_ray import losses, priority_cut
from prioritycut_ray.config import Config, PriorityCutConfig
from prioritycut_ray.errors import UserError
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.runs.checkpoints import STEP_FORMAT, steps
from prioritycut_ray.runs.locate import read_config
from prioritycut_ray.storage.atomic import write_atomically
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import load_checkpoint
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import discriminate_frozen, draw_mask

CPU = torch.device("cpu")
PICTURES = {
    "masks": {
        "priority mask": "PriorityCut's mask",
        "cutmix mask": "CutMix's mask",
        "chance": "any pixel",
    },
    "accuracy": {
        "accuracy, dis-occluded": "real and generated, dis-occluded pixels",
        "accuracy, elsewhere": "real and generated, elsewhere",
        "accuracy, inside": "mixed, inside of the mask",
        "accuracy, outside": "mixed, outside of the mask",
    },
    "ranking": {
        "AUROC, dis-occluded": "real and generated, dis-occluded pixels",
        "AUROC, elsewhere": "real and generated, elsewhere",
        "AUROC, mixed": "mixed, outside and inside of the mask",
    },
    "gradients": {
        "gradient, dis-occluded": "dis-occluded pixels",
        "gradient, elsewhere": "elsewhere",
    },
}
"""By file name: the columns of a picture, and what they show."""
TITLES = {
    "masks": "share of the cut area that is dis-occluded",
    "accuracy": "share of pixels that the discriminator gets right",
    "ranking": "area under the ROC curve of the pixels' logits",
    "gradients": "gradient of the discriminator's losses, mean |g| of a pixel",
}


def main(
    runs: Annotated[list[Path], typer.Argument(help="Trained runs with the U-Net discriminator.")],
    out: Annotated[Path, typer.Option(help="Folder of the table and the pictures.")] = Path(
        "docs/ablation/why"
    ),
    clips: Annotated[int, typer.Option(min=1, help="Number of unseen puppets, 4 pairs each.")] = 25,
) -> None:
    """Measure every checkpoint of some runs, and draw one picture of each question."""
    table = pd.DataFrame([line for run in runs for line in measured(run, clips)])
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.csv", table.to_csv(index=False, float_format="%.5g").encode())
    for name, columns in PICTURES.items():
        draw(table, columns, TITLES[name], out / f"{name}.png")
    print("| " + " | ".join(table.columns) + " |")
    print("| --- " * len(table.columns) + "|")
    for line in table.itertuples(index=False):
        cells = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line)
        print("| " + " | ".join(cells) + " |")


def measured(run: Path, clips: int) -> Iterator[dict[str, str | float]]:
    """Yield what is measured of every checkpoint of a run.

    Raises:
        UserError: the run has no checkpoint, or no U-Net discriminator.
    """
    found = steps(Folder(str(run)))
    if not found:
        raise UserError(f"{run}: has no checkpoint; give the folder of a trained run")
    config = read_config(run / STEP_FORMAT.format(found[0]))
    if config.discriminator.kind != "unet":
        raise UserError(
            f"{run}: has no U-Net discriminator, which judges every pixel; give a run with one"
        )
    pair, hidden = unseen_pairs(clips, config.data.size)
    for step in found:
        state = new_state(config, CPU)
        load_checkpoint(state, run / STEP_FORMAT.format(step))
        yield {"run": run.name, "samples": state.samples} | measure(state, config, pair, hidden)


def unseen_pairs(clips: int, size: int) -> tuple[FramePair, Tensor]:
    """Return pairs of frames, and which pixels of the driving frames are dis-occluded."""
    pairs = list(puppet_pairs(clips, size, seed=0))
    frames = FramePair(*(torch.cat(side) for side in zip(*(p.pair for p in pairs), strict=True)))
    return frames, torch.cat([pair.disoccluded for pair in pairs])


def measure(state: TrainState, config: Config, pair: FramePair, hidden: Tensor) -> dict[str, float]:
    """Measure one state; the networks as they are trained, not their averages, judge each other."""
    assert state.discriminator is not None
    state.animator.eval()
    with torch.no_grad():
        animation = state.animator(pair).animation
    mixing = config.priority_cut or PriorityCutConfig()
    uniform = torch.rand(len(hidden), 5, generator=torch.Generator().manual_seed(0))
    masks = {
        kind: draw_mask(animation, uniform, mixing.model_copy(update={"mask": kind})) == 0
        for kind in ("priority", "cutmix")
    }
    cut = masks[mixing.mask]
    real, fake = pair.driving, animation.prediction
    mixed = priority_cut.mix(real, fake, (~cut).float())
    state.discriminator.eval()
    with torch.no_grad():
        keypoints = animation.driving_keypoints.value.repeat(3, 1, 1)
        logits = state.discriminator(torch.cat([real, fake, mixed]), keypoints).pixel_logits
    assert logits is not None
    of_real, of_fake, of_mixed = logits.chunk(3)
    right = ((of_real > 0).float() + (of_fake < 0).float()) / 2
    right_in_mix = ((of_mixed < 0) == cut).float()
    gradient = image_gradient(state, config, pair, fake)
    return {
        **{f"{kind} mask": mean_over(hidden, mask) for kind, mask in masks.items()},
        "chance": hidden.float().mean().item(),
        "cut area": cut.float().mean().item(),
        "accuracy, dis-occluded": mean_over(right, hidden),
        "accuracy, elsewhere": mean_over(right, ~hidden),
        "accuracy, inside": mean_over(right_in_mix, cut),
        "accuracy, outside": mean_over(right_in_mix, ~cut),
        "AUROC, dis-occluded": auroc(of_real[hidden], of_fake[hidden]),
        "AUROC, elsewhere": auroc(of_real[~hidden], of_fake[~hidden]),
        "AUROC, mixed": auroc(of_mixed[~cut], of_mixed[cut]),
        "gradient, dis-occluded": mean_over(gradient, hidden),
        "gradient, elsewhere": mean_over(gradient, ~hidden),
    }


def auroc(real: Tensor, generated: Tensor) -> float:
    """Return the area under the ROC curve of pixels' logits: 1 if all real ones are higher."""
    targets = torch.cat([torch.ones_like(real), torch.zeros_like(generated)]).int()
    # In [0, 1]: torchmetrics would apply a sigmoid, which rounds high logits to 1.
    _, ranks = torch.cat([real, generated]).unique(return_inverse=True)
    return binary_auroc(ranks / max(int(ranks.max()), 1), targets).item()


def image_gradient(state: TrainState, config: Config, pair: FramePair, fake: Tensor) -> Tensor:
    """Return |gradient| of the discriminator's losses by the generated image, `[B, 1, H, W]`."""
    assert state.discriminator is not None
    image = fake.clone().requires_grad_()
    with torch.no_grad():
        animation = state.animator(pair).animation
    real, critique = discriminate_frozen(
        state.discriminator, pair, animation._replace(prediction=image)
    )
    weights = config.loss
    loss = weights.adversarial * losses.generator_adversarial(critique)
    loss = loss + weights.feature_matching * losses.feature_distance(critique.features, real)
    (gradient,) = torch.autograd.grad(loss, image)
    return gradient.abs().mean(dim=1, keepdim=True)


def mean_over(values: Tensor, mask: Tensor) -> float:
    """Return the mean over the pixels of a mask; NaN without any."""
    return values[mask].float().mean().item()


def draw(table: pd.DataFrame, columns: dict[str, str], title: str, path: Path) -> None:
    """Draw columns of the table against the samples seen, with one panel for each run."""
    runs = list(dict.fromkeys(table["run"]))
    figure = Figure(figsize=(3.4 * len(runs), 3.4), layout="constrained")
    for axes, run in zip(
        figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], runs, strict=True
    ):
        of_run = table[table["run"] == run]
        for column, label in columns.items():
            axes.plot(of_run["samples"], of_run[column], "o-", ms=4, label=label)
        axes.set_title(run, fontsize="medium")
        axes.set_xlabel("samples")
    axes.legend(frameon=False, fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
