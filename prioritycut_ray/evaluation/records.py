"""The result of an evaluation, as plain records that are written to JSON."""

import hashlib
import json

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.metrics.aggregate import Estimate, FrameScores, Metric

BASELINE = "copy source"
"""Predicts the first frame for every frame of a clip."""

FrameTable = dict[str, dict[str, FrameScores]]
"""The tallies behind an evaluation, by model name, then by clip key."""


class Protocol(BaseModel):
    """Everything that a score depends on except the model.

    Scores are comparable only if the hashes of their protocols are equal.

    Attributes:
        task: what the model has to do.
        data: fingerprint of the data set.
        split: of the data set.
        size: side of the frames in pixels.
        frames: which frames of a clip are scored.
        decode_path: how frames are decoded.
        metrics: definition and extractor of each metric, by key.
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
        """Return the first twelve hex digits of the SHA-256 of all fields."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class ClipScores(BaseModel):
    """The scores of one model on one clip.

    Attributes:
        key: of the clip.
        identity: who or what the clip shows.
        frames: number of frames in the clip.
        values: by metric; None where the metric is defined on no frame.
        counted: by metric, the number of frames that it is defined on.
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
        name: as shown in tables.
        checkpoint: what was evaluated; empty for the baseline.
        protocol: hash of the protocol.
        mean_over_clips: by metric, the mean of the clips' values.
        mean_over_frames: by metric, over all frames together, as First Order Motion reports it.
        identities: one entry an identity, in alphabetical order.
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
        warnings: what a reader of the scores must know, one line each.
    """

    split: str
    metrics: tuple[Metric, ...]
    protocols: dict[str, Protocol]
    models: list[ModelScores]
    differences: list[Difference]
    skipped: dict[str, str]
    warnings: list[str]

    @property
    def runs(self) -> list[ModelScores]:
        """All models except the baselines; the first run comes first."""
        return [model for model in self.models if model.checkpoint]

    def model(self, name: str) -> ModelScores:
        """Return the scores of a run or baseline by its name."""
        return next(model for model in self.models if model.name == name)
