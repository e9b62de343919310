"""What an evaluation measures and finds, as plain records that are written to JSON."""

import hashlib
import json
from importlib.metadata import version
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.metrics.aggregate import (
    Estimate,
    FrameScores,
    Metric,
)
from prioritycut_ray.metrics.identity import identity_metric
from prioritycut_ray.metrics.landmarks import (
    check_installed,
    landmark_metrics,
)
from prioritycut_ray.metrics.perceptual import (
    PROXY,
    perceptual_metric,
)

BASELINE = "copy source"
"""Predicts the first frame for every frame of a clip."""


FEW_IDENTITIES = 10
"""Below it the bootstrap has too little to resample, and the report says so."""


class Measures(NamedTuple):
    """What is measured beside L1, PSNR and SSIM.

    Attributes:
        perceptual: see :func:`prioritycut_ray.metrics.perceptual.perceptual_metric`.
        faces: also AKD, MKR and AED, by the extra ``faces``.
    """

    perceptual: str = PROXY
    faces: bool = False


class Protocol(BaseModel):
    """All that a number depends on but the model; two numbers compare if their hashes are equal.

    Attributes:
        task: what was asked of the model.
        data: fingerprint of the data set.
        split: of the data set.
        size: side of the frames in pixels.
        frames: which frames of a clip were scored.
        decode_path: how they were decoded.
        metrics: definition and extractor of each metric.
    """

    model_config = ConfigDict(frozen=True)

    task: str = "rebuild every frame of a clip from its first frame"
    data: str
    split: str
    size: int
    frames: str = "all, the first included"
    decode_path: str
    metrics: dict[str, str]

    def hash(self) -> str:
        """Twelve digits of the SHA-256 of the whole."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class ClipScores(BaseModel):
    """The scores of one model on one clip.

    Attributes:
        key: of the clip.
        identity: who or what is shown.
        frames: how many it has.
        values: by metric; None where it is defined on no frame.
        counted: by metric, how many frames it is defined on.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    key: str
    identity: str
    frames: int
    values: dict[str, float | None]
    counted: dict[str, int]


class IdentityScores(BaseModel):
    """The scores of one model on all clips of one identity; values are means over its clips."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    identity: str
    clips: int
    frames: int
    values: dict[str, float | None]


class ModelScores(BaseModel):
    """The scores of one model, or of the baseline.

    Attributes:
        name: for tables.
        checkpoint: what was evaluated; empty for the baseline.
        protocol: hash of its protocol.
        mean_over_clips: by metric, the mean of the clips' values.
        mean_over_frames: by metric, over all frames together, as First Order Motion reports it.
        identities: by identity, in alphabetical order.
        clips: in the order of the data set's index.
    """

    name: str
    checkpoint: str
    protocol: str
    mean_over_clips: dict[str, Estimate]
    mean_over_frames: dict[str, Estimate]
    identities: list[IdentityScores]
    clips: list[ClipScores]


class Difference(BaseModel):
    """Model − reference on the same clips and frames, with intervals of the difference itself."""

    model: str
    reference: str
    mean_over_clips: dict[str, Estimate]
    mean_over_frames: dict[str, Estimate]


class Evaluation(BaseModel):
    """Video reconstruction over a split, for one or more runs.

    Attributes:
        split: of the data set.
        metrics: what was measured, in the order of tables.
        protocols: by hash.
        models: the baseline and the runs of each protocol.
        differences: of each run to its baseline, and to the first run where protocols agree.
        skipped: clips that could not be decoded, with the reason.
        warnings: what a reader of the numbers must know, one line each.
    """

    split: str
    metrics: tuple[Metric, ...]
    protocols: dict[str, Protocol]
    models: list[ModelScores]
    differences: list[Difference]
    skipped: dict[str, str]
    warnings: list[str]

    def run(self, name: str) -> ModelScores:
        """The scores of a model by its name."""
        return next(model for model in self.models if model.name == name)


def metrics_of(measures: Measures) -> tuple[Metric, ...]:
    """The metrics that are measured, in the order of tables.

    Raises:
        UserError: the extra ``faces`` is asked for and not installed, or a file does not fit.
    """
    ssim = f"torchmetrics {version('torchmetrics')}, Gaussian window 11, σ 1.5, data range 1"
    basic = (
        Metric(
            key="l1",
            label="L1",
            definition="mean absolute difference of RGB values in [0, 1]",
            decimals=4,
        ),
        Metric(
            key="psnr",
            label="PSNR dB",
            definition="from the mean squared error over all pixels, at most 100",
            decimals=2,
            higher_is_better=True,
        ),
        Metric(key="ssim", label="SSIM", definition=ssim, decimals=4, higher_is_better=True),
        perceptual_metric(measures.perceptual),
    )
    if not measures.faces:
        return basic
    check_installed()
    return (*basic, *landmark_metrics(), identity_metric())


FrameTable = dict[str, dict[str, FrameScores]]
"""The tallies behind an evaluation: by the name of the model, then by the key of the clip."""
