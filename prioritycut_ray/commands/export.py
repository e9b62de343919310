"""``prioritycut export``."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from rich.console import Console

from prioritycut_ray.evaluation.records import Evaluation, ModelScores, Protocol
from prioritycut_ray.evaluation.report import difference_text, estimate_text, render
from prioritycut_ray.inference.export import export_graph
from prioritycut_ray.inference.output import check_new_folder, new_folder
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.runs.locate import find_checkpoint, read_progress

GRAPH_NAME = "animator.pt2"
CARD_NAME = "README.md"


class Scores(NamedTuple):
    """What a model card says of one evaluation.

    Attributes:
        protocol_hash: of the protocol.
        protocol: under which the numbers were measured.
        clips: how many were scored.
        frames: of these clips.
        rows: metric, this model, the baseline, their difference.
        warnings: of the evaluation.
    """

    protocol_hash: str
    protocol: Protocol
    clips: int
    frames: int
    rows: list[list[str]]
    warnings: list[str]


def export(run: str | Path, out: Path, *, graph: bool, console: Console) -> None:
    """Write a run's newest model as a folder of its own; see docs/animation.md.

    Args:
        run: a run or one of its checkpoints, a folder or an fsspec URL.
        out: new folder.
        graph: also write the inference path by torch.export, and compare it with the model.
        console: where the result is told.

    Raises:
        UserError: there is no such run, the folder is in use, or the graph differs.
    """
    check_new_folder(out)
    checkpoint = find_checkpoint(run)
    animator = Animator.from_pretrained(checkpoint, device="cpu")
    scores = list(scores_of(checkpoint))
    with new_folder(out) as folder:
        animator.save_pretrained(folder)
        difference = None
        if graph:
            difference = export_graph(animator.network, animator.size, folder / GRAPH_NAME)
        card = model_card(animator, checkpoint, scores, difference)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
    if difference is not None:
        console.print(f"Graph: {GRAPH_NAME} equals the model to {difference:.1e} of 1")
    if not scores:
        console.print("note: no evaluation of this checkpoint; the model card has no numbers")
    console.print(f"Model: {out}", markup=False)


def model_card(
    animator: Animator, checkpoint: Path, scores: list[Scores], difference: float | None
) -> str:
    """README.md of an exported model, from what the run knows of itself."""
    progress = read_progress(checkpoint)
    fingerprints = {score.protocol.data for score in scores}
    return render(
        "model_card.md.j2",
        config=animator.config,
        parameters=sum(parameter.numel() for parameter in animator.network.parameters()),
        progress=progress,
        fingerprint=progress.data or " or ".join(sorted(fingerprints)),
        scores=scores,
        difference=difference,
    )


def scores_of(checkpoint: Path) -> Iterator[Scores]:
    """The evaluations of exactly this checkpoint that lie in its run's folder."""
    for path in sorted(checkpoint.parent.glob("evaluation/*/evaluation.json")):
        try:
            evaluation = Evaluation.model_validate_json(path.read_bytes())
        except ValidationError:  # of another version of this project
            continue
        for model in evaluation.models:
            if model.checkpoint and Path(model.checkpoint).resolve() == checkpoint.resolve():
                yield _scores(evaluation, model)


def _scores(evaluation: Evaluation, model: ModelScores) -> Scores:
    baseline = next(
        other
        for other in evaluation.models
        if not other.checkpoint and other.protocol == model.protocol
    )
    difference = next(
        pair
        for pair in evaluation.differences
        if (pair.model, pair.reference) == (model.name, baseline.name)
    )
    frames = sum(clip.frames for clip in model.clips)
    return Scores(
        protocol_hash=model.protocol,
        protocol=evaluation.protocols[model.protocol],
        clips=len(model.clips),
        frames=frames,
        rows=[
            [
                f"{metric.label} {'↑' if metric.higher_is_better else '↓'}",
                estimate_text(metric, model.mean_over_clips[metric.key], frames),
                estimate_text(metric, baseline.mean_over_clips[metric.key], frames),
                difference_text(metric, difference.mean_over_clips[metric.key]),
            ]
            for metric in evaluation.metrics
        ],
        warnings=evaluation.warnings,
    )
