"""Landmarks and identity, with and without the optional extra."""

import csv
import importlib.util

import numpy as np
import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.aggregate import value_of
from prioritycut_ray.metrics.identity import identity_scores
from prioritycut_ray.metrics.landmarks import Face, FaceFinder, landmark_scores, require_faces_extra
from prioritycut_ray.video.decoding import frames_upright
from tests.places import DEV

CLIPS = DEV
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("dlib", "face_recognition_models")),
    reason="needs the extra: pip install 'prioritycut_ray[faces]'",
)


def face(shift: float, who: float = 0.0) -> Face:
    return Face(np.full((68, 2), shift), np.full(128, who))


def test_distances_use_the_frames_with_a_face_in_both() -> None:
    true = [face(0.0), face(0.0), None, face(0.0)]
    predicted = [face(3.0, 0.1), None, face(9.0), face(0.0)]
    scores = landmark_scores(true, predicted) | identity_scores(true, predicted)
    assert value_of("akd", scores["akd"]) == pytest.approx(3 * 2**0.5 / 2)
    assert value_of("mkr", scores["mkr"]) == pytest.approx(1 / 3)
    assert value_of("aed", scores["aed"]) == pytest.approx(0.1 * 128**0.5 / 2)
    assert [scores[key].denominator.sum() for key in ("akd", "mkr", "aed")] == [2, 3, 2]


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--faces.*prioritycut_ray\[faces\]"):
        require_faces_extra()


@needs_extra
def test_no_face_in_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert FaceFinder().find(noise) is None


@needs_extra
@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs the real clips of ../shared")
def test_a_shifted_face_has_moved_by_the_shift_and_is_the_same_person() -> None:
    with (CLIPS / "MANIFEST.csv").open() as file:
        name = next(row["file"] for row in csv.DictReader(file) if row["category"] == "face")
    frame = next(frames_upright(CLIPS / name))
    finder = FaceFinder()
    here, there = finder.find(frame), finder.find(np.roll(frame, 5, axis=1))
    assert value_of("akd", landmark_scores([here], [there])["akd"]) == pytest.approx(5, abs=0.5)
    distance = value_of("aed", identity_scores([here], [there])["aed"])
    assert distance is not None
    assert distance < 0.3
