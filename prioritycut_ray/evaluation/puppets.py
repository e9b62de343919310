"""Score a model on synthetic puppets, where the truth of every task is rendered.

A held-out puppet is rebuilt in its own motion, and moved as another one, by absolute and by
relative motion. What each frame should show is rendered from the puppet's own parameters, and so is
which pixels the source does not show, and where every surface point was in the previous frame.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from prioritycut_ray.data.puppet_poses import Motion, first_pose, joined, relative_to
from prioritycut_ray.data.puppets import PuppetClip, motion_of, render_motion, truth_between
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.evaluation.records import BASELINE, Evaluation, FrameTable, Protocol
from prioritycut_ray.evaluation.scoring import (
    Extractors,
    Mapper,
    cached_extractors,
    move,
    one_thread,
    similarity,
)
from prioritycut_ray.evaluation.summary import (
    difference,
    not_finite_warnings,
    summarise,
    summary_warnings,
)
from prioritycut_ray.inference.animate import BATCH, default_device, to_tensor, transfer
from prioritycut_ray.inference.mask import example_mask
from prioritycut_ray.inference.pretrained import Animator, locate_model, read_model_config
from prioritycut_ray.metrics.aggregate import (
    FrameScores,
    Metric,
    concatenate,
    mask_not_finite,
)
from prioritycut_ray.metrics.transfer import (
    transfer_metrics,
    transfer_scores,
    unvalidated_warnings,
)
from prioritycut_ray.metrics.truth import (
    FLICKER,
    MotionTruth,
    region_errors,
    regions,
    rim_width,
    truth_metrics,
    warping_error,
)
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.precision import float32_products
from prioritycut_ray.visualize import Panel, method_columns, stack

FIRST_LOOK = 1_000_000
"""Seed of the first held-out puppet; no training data of this project has a seed so high."""
FIRST_MOTION = 2_000_000
"""Seed of the first motion that puppets are moved by."""
TRUE_FRAMES = "true frames"
"""Their flicker is what remains of a perfect prediction: edges and bilinear sampling."""
MEASURES = Measures(transfer=True)
SHOWN = 3
"""Number of puppets whose columns are shown."""

TASKS = {
    "reconstruction": "rebuild every frame of a puppet's clip from its first frame",
    "absolute": "move a puppet to the poses of another one; true is the puppet in the other's "
    "motion",
    "relative": "move a puppet as another one moves since its first frame; true is the puppet's "
    "own first pose plus the other's changes of place and of every angle",
}
"""What a model has to do, by the names of the tasks."""
TITLES = {
    "reconstruction": "The same puppet, rebuilt from its first frame",
    "absolute": "Another identity, absolute motion",
    "relative": "Another identity, relative motion",
}


class PuppetTask(NamedTuple):
    """Everything that is needed to score one puppet, on any machine.

    Attributes:
        model: see :func:`~prioritycut_ray.inference.pretrained.pinned_model`.
        number: of the puppet, from 0.
        size: side of the frames in pixels.
        frames: number of frames of each clip.
    """

    model: str
    number: int
    size: int
    frames: int

    @property
    def key(self) -> str:
        """Name of the puppet and of its clips."""
        return f"puppet{FIRST_LOOK + self.number}"

    @property
    def identity(self) -> str:
        """The same: each puppet has one clip."""
        return self.key


class Scene(NamedTuple):
    """A source frame, a driving clip, and what should come of it.

    Attributes:
        source: `[S, S, 3]`.
        driving: `[T, S, S, 3]`.
        true: `[T, S, S, 3]`.
        masks: the regions of the true frames, see :func:`regions`.
        motion: of the true frames.
        relative: whether the motion is applied relative to the first driving frame.
    """

    source: NDArray[np.uint8]
    driving: NDArray[np.uint8]
    true: NDArray[np.uint8]
    masks: dict[str, NDArray[np.bool_]]
    motion: MotionTruth
    relative: bool


class SceneScores(NamedTuple):
    """The scores of one scene.

    Attributes:
        models: of the copied source, the model and the true frames (of the latter, only metrics
            that do not compare with the true frames).
        shares: share of the pixels in each region.
        columns: the six columns of the middle frame, with the true frame as the driving one; None
            if they are not shown.
    """

    models: tuple[FrameScores, FrameScores, FrameScores]
    shares: dict[str, float]
    columns: Panel | None


class PuppetBenchmark(BaseModel):
    """The scores of a model on puppets: the content of ``puppets.json``.

    Attributes:
        model: what was scored.
        identities: number of puppets.
        frames: number of frames of each clip.
        size: side of the frames in pixels.
        rim: width of the rim in pixels.
        first_look: seed of the first puppet; the others follow.
        first_motion: seed of the motion that the first puppet is moved by; the others follow.
        shares: by task, the share of the pixels in each region.
        tasks: the scores by task: of the copied source, the model and the true frames.
    """

    model: str
    identities: int
    frames: int
    size: int
    rim: int
    first_look: int = FIRST_LOOK
    first_motion: int = FIRST_MOTION
    shares: dict[str, dict[str, float]]
    tasks: dict[str, Evaluation]


def benchmark_on_puppets(
    model: str,
    name: str,
    *,
    identities: int,
    frames: int,
    mapper: Mapper,
    on_puppet: Callable[[int], None],
) -> tuple[PuppetBenchmark, Panel]:
    """Score a model on held-out puppets.

    Args:
        model: see :func:`~prioritycut_ray.inference.pretrained.pinned_model`.
        name: of the model in tables.
        identities: number of puppets.
        frames: number of frames of each clip.
        mapper: ``map``, or one that uses other processes.
        on_puppet: called with the number of puppets that are done, after each of them.

    Returns:
        The scores, and the six columns of some frames.

    Raises:
        UserError: the model is damaged.
    """
    size = read_model_config(locate_model(model)).data.size
    tasks = [PuppetTask(model, number, size, frames) for number in range(identities)]
    results: list[dict[str, SceneScores]] = []
    for result in mapper(score_puppet, tasks):
        results.append(result)
        on_puppet(len(results))
    scored = {task: [result[task] for result in results] for task in TASKS}
    panels = [scene.columns for result in results for scene in result.values()]
    benchmark = PuppetBenchmark(
        model=model,
        identities=identities,
        frames=frames,
        size=size,
        rim=rim_width(size),
        shares={task: _mean_shares(scenes) for task, scenes in scored.items()},
        tasks={task: _evaluation(task, name, tasks, scenes) for task, scenes in scored.items()},
    )
    return benchmark, stack([panel for panel in panels if panel is not None])


def score_puppet(task: PuppetTask) -> dict[str, SceneScores]:
    """Render one puppet, move it in all ways, and score the result; a pure function."""
    animator = _loaded(task.model)
    extractors = cached_extractors(MEASURES, animator.device)
    with one_thread():
        return {
            name: _score(scene, animator, extractors, shown=task.number < SHOWN)
            for name, scene in scenes(task.number, task.size, task.frames)
        }


def scenes(number: int, size: int, frames: int) -> Iterator[tuple[str, Scene]]:
    """Render what a puppet is scored on, by the names of :data:`TASKS`.

    Args:
        number: of the puppet, from 0.
        size: side of the frames in pixels.
        frames: number of frames of each clip.
    """
    look, other = FIRST_LOOK + number, FIRST_MOTION + number
    own, driving = motion_of(look, frames), motion_of(other, frames)
    rebuilt = _render(look, own, own, size)
    yield "reconstruction", _scene(rebuilt, rebuilt.frames[1:], relative=False)
    video = render_motion(other, driving, size=size).frames
    yield "absolute", _scene(_render(look, own, driving, size), video, relative=False)
    moved = _render(look, own, relative_to(own, driving), size)
    yield "relative", _scene(moved, video, relative=True)


def _render(look: int, own: Motion, motion: Motion, size: int) -> PuppetClip:
    """Render a puppet in its own first pose, and then in a motion."""
    return render_motion(look, joined(first_pose(own), motion), size=size)


def _scene(clip: PuppetClip, driving: NDArray[np.uint8], *, relative: bool) -> Scene:
    """Make a scene of a clip whose first frame is the source."""
    count = len(clip.frames)
    disoccluded = [truth_between(clip, 0, frame).disoccluded for frame in range(1, count)]
    steps = [truth_between(clip, max(1, frame - 1), frame) for frame in range(1, count)]
    visible = ~np.stack([step.disoccluded for step in steps])
    visible[0] = False  # There is no previous frame.
    flow = torch.from_numpy(np.stack([step.flow for step in steps]))
    return Scene(
        source=clip.frames[0],
        driving=driving,
        true=clip.frames[1:],
        masks=regions(np.stack(disoccluded)),
        motion=MotionTruth(flow, torch.from_numpy(visible)),
        relative=relative,
    )


@float32_products(convolutions="ieee")
@torch.inference_mode()
def _score(scene: Scene, animator: Animator, extractors: Extractors, *, shown: bool) -> SceneScores:
    device, network = animator.device, animator.network
    source, true = to_tensor(scene.source[None], device), to_tensor(scene.true, device)
    moved = move(network, scene.source, scene.driving, relative=scene.relative)

    def without_truth(frames: Tensor, poses: Tensor | None) -> FrameScores:
        assert extractors.features is not None
        return transfer_scores(source, frames, poses, extractors.features) if scene.relative else {}

    copied = source.expand_as(true)
    scores = _frame_scores(moved.frames, true, scene, extractors)
    scores |= without_truth(moved.frames, moved.poses)
    return SceneScores(
        models=(
            _frame_scores(copied, true, scene, extractors) | without_truth(copied, None),
            mask_not_finite(scores, moved.finite),
            {FLICKER: warping_error(true, scene.motion)} | without_truth(true, None),
        ),
        shares={name: float(mask.mean()) for name, mask in scene.masks.items()},
        columns=_columns(scene, animator) if shown else None,
    )


def _frame_scores(
    predicted: Float[Tensor, "T 3 H W"],
    true: Float[Tensor, "T 3 H W"],
    scene: Scene,
    extractors: Extractors,
) -> FrameScores:
    batches = zip(predicted.split(BATCH), true.split(BATCH), strict=True)
    likeness = concatenate([similarity(*pair, extractors) for pair in batches])
    where = region_errors(predicted, true, scene.masks)
    return likeness | where | {FLICKER: warping_error(predicted, scene.motion)}


def _columns(scene: Scene, animator: Animator) -> Panel:
    """Draw the six columns of the middle frame."""
    middle = len(scene.driving) // 2
    driving = scene.driving[[0, middle]]
    (moved,) = transfer(animator.network, scene.source, driving, relative=scene.relative)
    pair = FramePair(moved.pair.source, to_tensor(scene.true[[0, middle]], animator.device))
    mask = example_mask(moved.animation, animator.config)
    return method_columns(pair, moved.animation, mask, rows=slice(1, 2))


def _loaded(model: str) -> Animator:
    """Load a model again only if its files were replaced by others at the same path."""
    folder = locate_model(model)
    written = max(path.stat().st_mtime_ns for path in folder.iterdir())
    return _animator(folder, default_device(), written)


@lru_cache(maxsize=1)  # A process scores many puppets and loads the model once.
def _animator(folder: Path, device: torch.device, written: int) -> Animator:
    return Animator.from_pretrained(folder, device=device)


def _mean_shares(scenes: Sequence[SceneScores]) -> dict[str, float]:
    names = scenes[0].shares
    return {name: float(np.mean([scene.shares[name] for scene in scenes])) for name in names}


def _metrics(task: str, size: int) -> tuple[Metric, ...]:
    """Return what is measured in a task; metrics without truth stand beside the true errors."""
    without_truth = transfer_metrics() if task == "relative" else ()
    return (*selected_metrics(Measures()), *truth_metrics(size), *without_truth)


def _evaluation(
    task: str, run: str, puppets: Sequence[PuppetTask], scenes: Sequence[SceneScores]
) -> Evaluation:
    """Summarise the scores of all puppets in one task."""
    model, size, frames = puppets[0].model, puppets[0].size, puppets[0].frames
    protocol = Protocol(
        task=TASKS[task],
        data=f"synthetic puppets: looks {FIRST_LOOK} to {FIRST_LOOK + len(puppets) - 1}, "
        f"motions from {FIRST_MOTION}",
        split=task,
        size=size,
        frames=f"{frames}, the first included",
        decode_path="rendered, without a codec",
        metrics={metric.key: metric.definition for metric in _metrics(task, size)},
    )
    table: FrameTable = {
        which: {one.key: scene.models[place] for one, scene in zip(puppets, scenes, strict=True)}
        for place, which in enumerate((BASELINE, run, TRUE_FRAMES))
    }
    scored = {which: table[which] for which in (BASELINE, run)}
    return Evaluation(
        split=task,
        metrics=_metrics(task, size),
        protocols={protocol.hash(): protocol},
        models=[
            summarise(which, model if which == run else "", protocol.hash(), puppets, scores)
            for which, scores in table.items()
        ],
        differences=[difference(run, other, puppets, table) for other in (BASELINE, TRUE_FRAMES)],
        skipped={},
        warnings=[
            *summary_warnings({}, {}, puppets),
            *not_finite_warnings(scored),
            *unvalidated_warnings(_metrics(task, size)),
        ],
    )
