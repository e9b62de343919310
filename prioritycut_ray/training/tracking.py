"""Logs of a run, written by rank 0: TensorBoard, and rows of scalars."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from prioritycut_ray.config import Config
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.training.steps import DiscriminatorBatch, StepOutcome, display_mask
from prioritycut_ray.visualize import Panel, draw_keypoints, grid, method_columns

ROWS = slice(4)
"""Samples of a batch that pictures show."""
_EVENT_FILE_BYTES = 4_000_000


class Tracker:
    """Writes scalars and pictures of a run: TensorBoard event files, and rows of the log.

    Everything logged is on storage before the next checkpoint is. If the run's folder is remote,
    event files are written on this machine and copied; a new one starts before they get large.

    Args:
        run: writer of the run's folder.
        start: step that this attempt starts from, or 0; TensorBoard drops later steps that an
            earlier attempt wrote.
    """

    def __init__(self, run: RunWriter, *, start: int) -> None:
        self._run = run
        self._remove_scratch: Callable[[], object] | None = None
        folder = run.folder.local
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="prioritycut-"))
            # Removed even if an attempt fails and never closes its tracker.
            self._remove_scratch = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._folder = folder / "tensorboard"
        self._writer = SummaryWriter(str(self._folder), purge_step=start + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the scalars of a step by name."""
        self._run.submit(partial(self._write_scalars, dict(values), step))
        self._run.log({"step": step} | dict(values))

    def pictures(self, pictures: Mapping[str, Tensor], step: int) -> None:
        """Log uint8 pictures `[3, H, W]` of a step by name."""
        self._run.submit(partial(self._write_pictures, dict(pictures), step))

    def close(self) -> None:
        """Write what is pending."""
        self._run.submit(self._close)

    def _write_scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._copy()

    def _write_pictures(self, pictures: Mapping[str, Tensor], step: int) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step)

    def _close(self) -> None:
        self._writer.close()
        self._copy()
        if self._remove_scratch is not None:
            self._remove_scratch()

    def _copy(self) -> None:
        """Copy event files to the run's folder; a large one is closed and removed here."""
        if self._remove_scratch is None:
            return
        for path in self._folder.iterdir():
            full = path.stat().st_size > _EVENT_FILE_BYTES
            if full:
                self._writer.close()  # the next event starts another file
            self._run.folder.write(f"tensorboard/{path.name}", path.read_bytes())
            if full:
                path.unlink()


@torch.no_grad()
def training_pictures(pair: FramePair, outcome: StepOutcome, config: Config) -> dict[str, Tensor]:
    """Return the pictures of a step: the method's columns, keypoints and per-pixel verdicts.

    Args:
        pair: frames of the first micro-batch.
        outcome: outcome of the step.
        config: the run's configuration.
    """
    animation = outcome.animations[0]
    pictures = {
        "columns": method_columns(pair, animation, display_mask(animation, config), rows=ROWS),
        "keypoints": grid(
            [
                draw_keypoints(pair.source, animation.source_keypoints.value)[ROWS],
                draw_keypoints(pair.driving, animation.driving_keypoints.value)[ROWS],
            ]
        ),
    }
    if outcome.discriminator_batches and config.discriminator.kind == "unet":
        pictures["pixel_judgement"] = _judgement(
            pair.driving, animation.prediction, outcome.discriminator_batches[0]
        )
    return pictures


def _judgement(
    real: Float[Tensor, "B 3 H W"], fake: Float[Tensor, "B 3 H W"], judged: DiscriminatorBatch
) -> Panel:
    """Draw images beside the U-Net discriminator's verdict on each pixel."""
    assert judged.output.pixel_logits is not None
    images = [real, fake] if judged.mixed is None else [real, fake, judged.mixed]
    verdicts = torch.sigmoid(judged.output.pixel_logits).split(len(real))
    return grid([item[ROWS] for both in zip(images, verdicts, strict=True) for item in both])
