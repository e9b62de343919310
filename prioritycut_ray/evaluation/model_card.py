"""The model card of an exported model: what it was trained on, its scores, how to use it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from prioritycut_ray.evaluation.records import Evaluation, ModelScores, Protocol
from prioritycut_ray.evaluation.tables import difference_text, estimate_text, metric_label
from prioritycut_ray.inference.onnx_export import OnnxGraphs
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.runs.locate import read_progress
from prioritycut_ray.templates import render


class CardScores(NamedTuple):
    """The scores of one evaluation, as a model card shows them.

    Attributes:
        protocol_hash: of the protocol.
        protocol: under which the scores were measured.
        clips: number of clips that were scored.
        frames: number of frames of these clips.
        rows: metric, this model, the baseline, their difference.
        warnings: of the evaluation.
    """

    protocol_hash: str
    protocol: Protocol
    clips: int
    frames: int
    rows: list[list[str]]
    warnings: list[str]


def model_card(
    animator: Animator,
    checkpoint: Path,
    scores: Sequence[CardScores],
    difference: float | None,
    graphs: OnnxGraphs | None,
) -> str:
    """Return the model card as Markdown, for the ``README.md`` of an export.

    Args:
        animator: the model.
        checkpoint: from which it was loaded.
        scores: see :func:`card_scores`.
        difference: largest difference between the exported graph and the model; None without one.
        graphs: the ONNX graphs in the export; None without them.
    """
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
        graphs=graphs,
    )


def card_scores(checkpoint: Path) -> Iterator[CardScores]:
    """Yield the evaluations in the run's folder that scored exactly this checkpoint."""
    for path in sorted(checkpoint.parent.glob("evaluation/*/evaluation.json")):
        try:
            evaluation = Evaluation.model_validate_json(path.read_bytes())
        except ValidationError:  # written by another version of this project
            continue
        for model in evaluation.runs:
            if Path(model.checkpoint).resolve() == checkpoint.resolve():
                yield _scores(evaluation, model)


def _scores(evaluation: Evaluation, model: ModelScores) -> CardScores:
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
    return CardScores(
        protocol_hash=model.protocol,
        protocol=evaluation.protocols[model.protocol],
        clips=len(model.clips),
        frames=frames,
        rows=[
            [
                metric_label(metric),
                estimate_text(metric, model.mean_over_clips[metric.key], frames),
                estimate_text(metric, baseline.mean_over_clips[metric.key], frames),
                difference_text(metric, difference.mean_over_clips[metric.key]),
            ]
            for metric in evaluation.metrics
        ],
        warnings=evaluation.warnings,
    )
