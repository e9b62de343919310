"""Video reconstruction on held-out clips, beside the naive baseline (method §5)."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from pydantic import BaseModel
from torch import Tensor

from prioritycut_ray.checkpoint import find_checkpoint, load_animator
from prioritycut_ray.config import Config
from prioritycut_ray.data.shards import Clip, clips_of, read_clip, read_index
from prioritycut_ray.data.video import read_all
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference import reconstruct, to_tensor
from prioritycut_ray.metrics.reconstruction import ReconstructionMetrics
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.steps import display_mask
from prioritycut_ray.visualize import method_columns, stack

Scores = dict[str, float]


class ClipScores(BaseModel):
    """How well one clip was rebuilt, and how well its first frame stands for all of it."""

    key: str
    identity: str
    frames: int
    model: Scores
    copy_source: Scores


class Evaluation(BaseModel):
    """Video reconstruction over a split; means are over clips.

    Attributes:
        checkpoint: what was evaluated.
        data: fingerprint of the data set.
        split: of the data set.
        size: side of the frames in pixels.
        decode_path: how frames were decoded; scores of other paths are not comparable.
        clips: scores clip by clip.
        skipped: clips that could not be decoded, with the reason.
        model: mean scores of the model.
        copy_source: mean scores of the baseline "copy the source frame".
    """

    checkpoint: str
    data: str
    split: str
    size: int
    decode_path: str
    clips: list[ClipScores]
    skipped: dict[str, str]
    model: Scores
    copy_source: Scores


COLUMN_ROWS = 6
"""Clips that the picture of the six columns shows."""


def evaluate_run(
    run: Path,
    data: str,
    *,
    split: str,
    device: torch.device,
    on_clip: Callable[[int, int, str], None],
) -> tuple[Evaluation, Tensor]:
    """Rebuild every clip of a split from its first frame and score it.

    Args:
        run: the folder of a run, or one of its checkpoints.
        data: folder of shards, a path or an fsspec URL.
        split: of the data set.
        device: where the network runs.
        on_clip: called after each clip with how many are done, of how many, and its key.

    Returns:
        The evaluation, and the six columns of the method `[3, H, W]` for the middle frame of some
        clips.

    Raises:
        UserError: no usable checkpoint, no such data or split, or no clip could be decoded.
    """
    directory = find_checkpoint(run)
    animator, config = load_animator(directory, device)
    index = read_index(data)
    clips = clips_of(index, split)
    scored: list[ClipScores] = []
    skipped: dict[str, str] = {}
    rows: list[Tensor] = []
    for done, clip in enumerate(clips, start=1):
        try:
            frames = read_all(read_clip(data, clip), config.data.size)
        except UserError as error:
            skipped[clip.key] = str(error)
        else:
            scores, row = score_clip(animator, config, clip, to_tensor(frames, device))
            scored.append(scores)
            rows.append(row)
        on_clip(done, len(clips), clip.key)
    if not scored:
        raise UserError(f"{data}: no clip of split {split!r} could be decoded: {skipped}")
    evaluation = Evaluation(
        checkpoint=str(directory),
        data=index.fingerprint,
        split=split,
        size=config.data.size,
        decode_path=f"h264 shards, decord, resized to {config.data.size} when decoded",
        clips=scored,
        skipped=skipped,
        model=_mean([clip.model for clip in scored]),
        copy_source=_mean([clip.copy_source for clip in scored]),
    )
    return evaluation, stack(rows[:COLUMN_ROWS])


def score_clip(
    animator: Animator, config: Config, clip: Clip, frames: Tensor
) -> tuple[ClipScores, Tensor]:
    """Score one clip; also draw the columns of its middle frame.

    Args:
        animator: in evaluation mode.
        config: of the run.
        clip: what the frames are of.
        frames: in [0, 1], `[T, 3, H, W]`.
    """
    model, copy_source = ReconstructionMetrics(), ReconstructionMetrics()
    middle, seen = len(frames) // 2, 0
    for rebuilt in reconstruct(animator, frames):
        model.update(rebuilt.animation.prediction, rebuilt.pair.driving)
        copy_source.update(rebuilt.pair.source, rebuilt.pair.driving)
        count = len(rebuilt.pair.driving)
        if seen <= middle < seen + count:
            mask = display_mask(rebuilt.animation, config)
            rows = slice(middle - seen, middle - seen + 1)
            picture = method_columns(*rebuilt, mask, rows=rows)
        seen += count
    scores = ClipScores(
        key=clip.key,
        identity=clip.identity,
        frames=len(frames),
        model=model.compute(),
        copy_source=copy_source.compute(),
    )
    return scores, picture


def _mean(scores: list[Scores]) -> Scores:
    return {name: fmean(clip[name] for clip in scores) for name in scores[0]}
