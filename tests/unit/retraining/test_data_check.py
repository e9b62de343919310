"""Held-out clips that training shows too are named, and shifted clips are measured."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from prioritycut_ray.data.index import ClipIndex, build_index
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.retraining.data_check import (
    DataCheck,
    Probes,
    check_data,
    probe_clips,
    rejected_files,
    sort_clips,
)
from prioritycut_ray.retraining.settings import DataGate
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.source import Frame

SIZE = 64
LIMITS = DataGate(brightness=0.15, motion=3, size=1.5, rejected=0.5)


class Video(NamedTuple):
    """Frames under a name; ``crf`` is how coarsely they are encoded."""

    key: str
    split: str
    frames: Sequence[Frame]
    crf: int = 18


def puppet(seed: int, frames: int = 12) -> list[Frame]:
    return [*render_clip(seed, size=SIZE, frames=frames).frames]


def pack(url: str, videos: Sequence[Video]) -> ClipIndex:
    with ShardWriter(url) as writer:
        for video in videos:
            encoded = io.BytesIO()
            write_video(encoded, video.frames, 25.0, crf=video.crf)
            writer.add(
                Member(
                    key=video.key,
                    data=encoded.getvalue(),
                    frames=len(video.frames),
                    fps=25.0,
                    width=SIZE,
                    height=SIZE,
                    identity=video.key,
                    original="",
                    variable_rate=False,
                )
            )
        return writer.finish({video.key: video.split for video in videos})


def checked(
    url: str, videos: Sequence[Video], new: Sequence[str] = (), rejected: int | None = None
) -> DataCheck:
    """Check a data set of which some training clips are new."""
    index = pack(url, videos)
    earlier = build_index([clip for clip in index.clips if clip.key not in new])
    night = sort_clips(index.clips_of("train"), index.clips_of("val"), earlier)
    assert [clip.key for clip in night.new] == sorted(new)
    probes = probe_clips(url, night.clips, faces=False, known=Probes({}), mapper=map)
    night = night._replace(rejected=rejected)
    return check_data(night, probes, LIMITS)


def test_leaks_are_found_by_bytes_and_by_their_frames(tmp_path: Path) -> None:
    first, second = puppet(1, 16), puppet(2)
    flat = [np.full((SIZE, SIZE, 3), 90, np.uint8)] * 8
    found = checked(
        f"{tmp_path}/data",
        [
            Video("first", "train", first),
            Video("second", "train", second),
            Video("grey", "train", flat),
            Video("same_bytes", "val", first),
            Video("encoded_again", "val", second, crf=30),
            Video("trimmed", "val", first[1:-1], crf=23),
            Video("another", "val", puppet(3)),
            # A flat frame resembles every other flat frame; it proves nothing.
            Video("grey_too", "val", [frame + 20 for frame in flat]),
        ],
    )
    assert found.leaks == {
        "same_bytes": "has the same bytes as first",
        "encoded_again": "shows nearly the same frames as second",
        "trimmed": "shows nearly the same frames as first",
    }


@pytest.mark.parametrize(
    ("change", "rejected", "problem"),
    [
        (lambda frames: frames, 1, ""),
        (lambda frames: [frame // 2 + 127 for frame in frames], 0, "brightness of the new clips"),
        (lambda frames: [frames[0]] * len(frames), 0, "motion of the new clips is 0"),
        (lambda frames: frames, 9, "75% of the new videos were rejected (limit: 50%)"),
    ],
)
def test_a_shift_is_stated_with_figures_and_refused_beyond_the_limit(
    tmp_path: Path, change: Callable[[list[Frame]], list[Frame]], rejected: int, problem: str
) -> None:
    old = [Video(f"old{seed}", "train", puppet(seed)) for seed in range(4)]
    new = [Video(f"new{seed}", "train", change(puppet(10 + seed))) for seed in range(3)]
    found = checked(f"{tmp_path}/data", old + new, [video.key for video in new], rejected)
    assert [figure.name for figure in found.figures] == ["brightness", "motion", "size", "rejected"]
    assert len(found.problems) == (problem != "")
    assert problem in "".join(found.problems)
    if problem.startswith("brightness"):
        assert "of those seen before 0." in found.problems[0]
        assert "(limit: a difference of 0.15)" in found.problems[0]


def test_clips_are_looked_at_once(tmp_path: Path) -> None:
    url = f"{tmp_path}/data"
    clips = pack(url, [Video("a", "train", puppet(1)), Video("b", "train", puppet(2))]).clips
    known = probe_clips(url, clips[:1], faces=False, known=Probes({}), mapper=map)
    looked: list[str] = []

    def noting(function: Callable[[object], object], tasks: Sequence[object]) -> object:
        looked.extend(task.clip.key for task in tasks)  # type: ignore[attr-defined]
        return map(function, tasks)

    again = probe_clips(url, clips, faces=False, known=known, mapper=noting)
    assert looked == ["b"]
    assert set(again.root) == {clip.sha256 for clip in clips}


def test_rejected_videos_are_those_that_packing_has_listed(tmp_path: Path) -> None:
    assert rejected_files(str(tmp_path)) is None
    (tmp_path / "rejected.csv").write_text("file,reason\nb.mp4,is cut off\na.mp4,is empty\n")
    assert rejected_files(str(tmp_path)) == ["a.mp4", "b.mp4"]
