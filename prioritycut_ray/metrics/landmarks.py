"""AKD and MKR: whether generated faces have the pose and expression of the true ones.

AKD is the average distance between facial landmarks, MKR the share of faces that are missing from
the generated frames. The optional extra ``faces`` installs the extractor, dlib.
"""

import importlib.util
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.aggregate import FrameScores, Metric, Tally

SMALLEST_SIDE = 256
"""Smaller frames are enlarged to this side: dlib does not find faces below 80 pixels."""


class Face(NamedTuple):
    """The largest face of a frame.

    Attributes:
        landmarks: float64 `[68, 2]`, (x, y) in pixels of the original frame.
        embedding: float64 `[128]`; see :mod:`prioritycut_ray.metrics.identity`.
    """

    landmarks: NDArray[np.float64]
    embedding: NDArray[np.float64]


def landmark_metrics() -> tuple[Metric, Metric]:
    """Describe AKD and MKR."""
    extractor = f"largest face and 68 landmarks by dlib {dlib_version()}"
    return (
        Metric(
            key="akd",
            label="AKD px (dlib)",
            definition="mean Euclidean distance in pixels between landmarks, over the frames with "
            f"a face in both; {extractor}; frames below {SMALLEST_SIDE} pixels are enlarged to it",
            decimals=3,
        ),
        Metric(
            key="mkr",
            label="MKR (dlib)",
            definition="share of the frames with a face in the true frame that have none in the "
            f"generated one; {extractor}",
            decimals=4,
        ),
    )


class FaceFinder:
    """dlib's detector, landmark predictor and embedding network.

    Raises:
        UserError: the extra ``faces`` is not installed.
    """

    def __init__(self) -> None:
        require_faces_extra()
        import dlib

        spec = importlib.util.find_spec("face_recognition_models")
        assert spec is not None
        assert spec.origin is not None
        # The package itself is not imported: it needs a setuptools that still has pkg_resources.
        models = Path(spec.origin).parent / "models"
        self._dlib: Any = dlib
        self._detector = dlib.get_frontal_face_detector()
        self._predictor = dlib.shape_predictor(
            str(models / "shape_predictor_68_face_landmarks.dat")
        )
        self._embedder = dlib.face_recognition_model_v1(
            str(models / "dlib_face_recognition_resnet_model_v1.dat")
        )

    def find(self, frame: NDArray[np.uint8]) -> Face | None:
        """Return the largest face of an RGB frame `[H, W, 3]`, or None."""
        scale = max(1.0, SMALLEST_SIDE / min(frame.shape[:2]))
        if scale > 1:
            height, width = (round(side * scale) for side in frame.shape[:2])
            enlarged = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
            frame = np.asarray(enlarged)
        frame = np.ascontiguousarray(frame)
        found = self._detector(frame, 0)
        if not found:
            return None
        shape = self._predictor(frame, max(found, key=lambda box: box.area()))
        points = [(part.x, part.y) for part in shape.parts()]
        embedding = self._embedder.compute_face_descriptor(frame, shape)
        return Face(np.array(points, np.float64) / scale, np.array(embedding, np.float64))


def dlib_version() -> str:
    """Return the version of dlib, whichever distribution installed it."""
    return str(import_module("dlib").__version__)


def require_faces_extra() -> None:
    """Check that the extra ``faces`` is installed.

    Raises:
        UserError: it is not.
    """
    for module in ("dlib", "face_recognition_models"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"--faces requires the package {module}: install the extra with "
                "`pip install 'prioritycut_ray[faces]'`"
            )


def landmark_scores(true: Sequence[Face | None], predicted: Sequence[Face | None]) -> FrameScores:
    """Return AKD and MKR for each frame."""
    there = np.array([face is not None for face in true], np.float64)
    missing = np.array(
        [t is not None and p is None for t, p in zip(true, predicted, strict=True)], np.float64
    )
    return {
        "akd": over_faces(true, predicted, _landmark_distance),
        "mkr": Tally(missing, there),
    }


def over_faces(
    true: Sequence[Face | None],
    predicted: Sequence[Face | None],
    distance: Callable[[Face, Face], float],
) -> Tally:
    """Tally a distance over the frames that have a face in both."""
    values = [
        None if t is None or p is None else distance(t, p)
        for t, p in zip(true, predicted, strict=True)
    ]
    return Tally(
        np.array([value or 0.0 for value in values], np.float64),
        np.array([value is not None for value in values], np.float64),
    )


def _landmark_distance(first: Face, second: Face) -> float:
    return float(np.linalg.norm(first.landmarks - second.landmarks, axis=1).mean())
