"""AED: whether the generated face is still the same person, by dlib's face embedding."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from prioritycut_ray.metrics.aggregate import FrameScores, Metric
from prioritycut_ray.metrics.landmarks import Face, dlib_version, over_faces


def identity_metric() -> Metric:
    """Describe AED."""
    return Metric(
        key="aed",
        label="AED (dlib)",
        definition="Euclidean distance between 128-d face embeddings, over the frames with a face "
        f"in both (dlib_face_recognition_resnet_model_v1, dlib {dlib_version()}, "
        f"face_recognition_models {version('face_recognition_models')}); beyond 0.6 dlib calls it "
        "another person",
        decimals=4,
    )


def identity_scores(true: Sequence[Face | None], predicted: Sequence[Face | None]) -> FrameScores:
    """Return AED for each frame."""
    return {"aed": over_faces(true, predicted, _embedding_distance)}


def _embedding_distance(first: Face, second: Face) -> float:
    return float(np.linalg.norm(first.embedding - second.embedding))
