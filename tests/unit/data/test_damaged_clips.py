"""Clips that are damaged but have a valid checksum: loader workers read or name every one."""

import io
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.loader import Decoding, load
from prioritycut_ray.data.stream import FramePairs, batches
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.random_access import read_frames
from prioritycut_ray.video.source import VideoError
from tests.clip_sets import clip_member, write_members
from tests.mutants import mutants
from tests.video_files import encoded, moving_square

# torch warns of more workers than cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
FRAMES = 24
NAMED = re.compile(r"(clip|video): (cannot be decoded:|has|is not) .+$|its decoder dies \(SIG")


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    return [encoded(moving_square(FRAMES), gop=gop) for gop in (8, 1)]


def read_mutant(
    found: Sequence[bytes],
    decoder: str,
    numbers: Sequence[int],
    avoid: Mapping[int, str],
    decoding: Decoding,
) -> Any:
    """Read one mutant as a loader worker reads a clip: the shape of its frames, or the reason."""
    [number] = numbers
    if number in avoid:
        return avoid[number]
    try:
        with decoding(number):
            return read_frames(found[number], [17, 0, 3], 64, decoder).shape
    except VideoError as error:
        return str(error)


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_each_mutant_gives_frames_or_a_named_error(
    count: int, decoder: str, clips: list[bytes]
) -> None:
    read = partial(read_mutant, mutants(clips, count), decoder)
    results = list(load(read, [[number] for number in range(count)], 2, str, patience_s=20))
    assert len(results) == count
    shown = [result for result in results if result == (3, 64, 64, 3)]
    named = [result for result in results if isinstance(result, str) and NAMED.match(result)]
    assert len(shown) + len(named) == count
    assert min(len(shown), len(named)) > count / 5  # There are both kinds.
    if decoder != "decord":  # which crashes at a few of 600
        assert not any("dies" in reason for reason in named)


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_packing_reads_each_mutant_or_names_it(count: int, clips: list[bytes]) -> None:
    refused: list[str] = []
    for data in mutants(clips, count):
        try:
            assert all(frame.ndim == 3 for frame in frames_upright(io.BytesIO(data)))
        except VideoError as error:
            refused.append(str(error))
    assert count / 5 < len(refused) < count
    assert all(len(message.splitlines()) == 1 for message in refused)


@pytest.mark.slow
def test_training_reads_an_epoch_in_which_half_the_clips_are_damaged(
    decoder: str, clips: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = [
        clip_member(0)._replace(key=f"mutant{number:03d}", data=data, frames=FRAMES)
        for number, data in enumerate(mutants(clips, 600))
    ]
    whole = [
        clip_member(0)._replace(key=f"whole{number:03d}", data=clips[0], frames=FRAMES)
        for number in range(600)
    ]
    url = write_members(str(tmp_path / "set"), [*damaged, *whole])
    pairs = FramePairs(url, read_index(url), "train", size=64, seed=0, decoder=decoder)
    with caplog.at_level(logging.WARNING):
        epoch = list(
            batches(
                pairs,
                start=0,
                stop=pairs.epoch_length,
                global_batch=10,
                rank=0,
                world_size=1,
                loader_workers=2,
            )
        )
    assert len(epoch) == pairs.epoch_length // 10
    assert "is replaced by another one: clip: cannot be decoded" in caplog.text
