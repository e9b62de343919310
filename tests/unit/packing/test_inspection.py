"""What ``data verify``, ``info`` and ``preview`` show of intact and of damaged data sets."""

import io
import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from typer.testing import CliRunner

from prioritycut_ray.cli import app
from prioritycut_ray.data.index import build_index, read_index, write_index
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.inspection import clip_problems, preview, summarise, verify
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.source import Frame


def write_set(url: str, folder: Path, clips: int = 3) -> None:
    with ShardWriter(url, shard_bytes=1) as writer:
        for number in range(clips):
            path = folder / "clip.mp4"
            write_video(path, render_clip(number, size=32, frames=8).frames, 16.0)
            writer.add(
                Member(
                    key=f"c{number}",
                    data=path.read_bytes(),
                    frames=8,
                    fps=16.0,
                    width=32,
                    height=32,
                    identity=f"<{number}>",
                    original="clip.mp4",
                    variable_rate=False,
                )
            )
        writer.finish({f"c{n}": "test" if n == 0 else "train" for n in range(clips)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_set(str(folder / "set"), folder)
    return folder / "set"


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def edit_index(folder: Path, **changes: object) -> None:
    """Change the facts of the clip ``c0``, and let the fingerprint agree."""
    clips = read_index(str(folder)).clips
    changed = [clip._replace(**changes) if clip.key == "c0" else clip for clip in clips]
    write_index(build_index(changed), str(folder))


def test_intact_data_set_has_no_problem(data: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(str(data), on_progress=lambda n, of: seen.append((n, of))) == (3, 3, [], [])
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_sample_is_checked_alone(data: Path) -> None:
    assert verify(str(data), sample=2) == (2, 3, [], [])
    assert verify(str(data), sample=9) == (3, 3, [], [])
    for shard in data.glob("*.tar"):
        shard.unlink()
    problems = verify(str(data), sample=2).problems
    assert len(problems) == 2
    assert problems == verify(str(data), sample=2).problems


def test_every_damage_is_named(data: Path) -> None:
    clip = read_index(str(data)).clips[1]
    shard = bytearray((data / clip.shard).read_bytes())
    shard[clip.offset + clip.size // 2] ^= 1
    (data / clip.shard).write_bytes(shard)
    os.truncate(data / "shard-000000.tar", 700)
    (data / "shard-000002.tar").unlink()
    problems = verify(str(data)).problems
    text = "\n".join(problems)
    assert "clip 'c1': the checksum does not match" in text
    assert "clip 'c0': cut off after" in text
    assert "shard-000000.tar: " in text
    assert "shard-000002.tar: is missing" in text
    assert not any("shard-000001.tar: has" in problem for problem in problems)


def test_a_damaged_header_is_named(data: Path) -> None:
    clip = read_index(str(data)).clips[1]
    shard = bytearray((data / clip.shard).read_bytes())
    place = clip.offset + -(-clip.size // 512) * 512
    shard[place : place + 100] = b"\xff" * 100
    (data / clip.shard).write_bytes(shard)
    problems = verify(str(data)).problems
    assert f"{clip.shard}: is damaged, or several tars joined: nothing after" in problems[0]
    assert problems[1:] == [f"{clip.shard}: member 'c1.mp4' has no JSON beside it"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"frames": 9}, "clip 'c0': has 8 frames, but not number 8"),
        ({"frames": 7}, "has 8 frames of 32x32; the index says 7 of 32x32"),
        ({"width": 64, "height": 64}, "the index says 8 of 64x64"),
        ({"key": "other"}, "has no member 'other.mp4', which the index lists"),
    ],
)
def test_an_index_that_disagrees_is_named(
    changes: dict[str, object], problem: str, data: Path
) -> None:
    edit_index(data, **changes)
    assert problem in "\n".join(verify(str(data)).problems)


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_decoder_that_dies_is_a_problem_of_its_clip(data: Path, how: str) -> None:
    """It dies of a real signal, in the process that decodes."""
    index = read_index(str(data))
    deadly = read_clip(str(data), index.clips[1])

    def decode(source: io.BytesIO) -> Iterator[Frame]:
        if source.getvalue() == deadly:
            if how == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            threading.Event().wait()
        yield from frames_upright(source)

    patience_s = 300 if how == "crash" else 1
    name = "SIGSEGV" if how == "crash" else "SIGALRM"
    assert list(clip_problems(str(data), index, decode=decode, patience_s=patience_s)) == [
        *("", f"shard-000001.tar: clip 'c1': its decoder dies ({name})", "")
    ]


def test_shard_without_its_json_is_named(data: Path) -> None:
    path = data / "shard-000000.tar"
    with tarfile.open(path) as tar:
        [video, _] = tar.getmembers()
        end = video.offset_data + (video.size + 511) // 512 * 512
    path.write_bytes(path.read_bytes()[:end] + b"\0" * 1024)
    assert verify(str(data)).problems == ["shard-000000.tar: member 'c0.mp4' has no JSON beside it"]


def test_harmless_oddities_are_noted(data: Path) -> None:
    (data / "shard-000003.tar").write_bytes(b"left over")
    (data / ".packing").mkdir()
    edit_index(data, identity="<1>")
    found = verify(str(data))
    assert found.problems == []
    assert [note.partition(":")[0] for note in found.notes] == [
        "identity '<1>' is in several splits",
        ".packing",
        "shard-000003.tar",
    ]


def test_numbers_add_up(data: Path) -> None:
    index = read_index(str(data))
    summary = summarise(index)
    assert (summary.shards, summary.sizes) == (3, ["32x32"])
    assert list(summary.splits) == ["test", "train"]
    assert summary.splits["train"][:4] == (2, 2, 16, 1.0)
    assert sum(split.size_bytes for split in summary.splits.values()) == sum(
        clip.size for clip in index.clips
    )


def test_preview_shows_frames_and_plays_clips(data: Path, tmp_path: Path) -> None:
    assert preview(str(data), tmp_path / "p.png", clips=24) == 3
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    assert sheet.shape == (3 * 96, 6 * 96, 3)
    assert sheet.std() > 10
    assert preview(str(data), tmp_path / "p.html", clips=2) == 2
    page = (tmp_path / "p.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2
    assert "&lt;0&gt;" in page
    assert "<0>" not in page
    with pytest.raises(UserError, match=r"p\.gif: is neither"):
        preview(str(data), tmp_path / "p.gif", clips=2)


def test_any_file_system_works(tmp_path: Path) -> None:
    MemoryFileSystem.store.clear()
    write_set("memory://bucket/set", tmp_path, clips=2)
    assert verify("memory://bucket/set") == (2, 2, [], [])
    assert preview("memory://bucket/set", tmp_path / "p.png", clips=1) == 1
    MemoryFileSystem.store.clear()


def test_commands_report_and_fail(data: Path, tmp_path: Path) -> None:
    run = CliRunner()
    assert "3 clips, all intact" in run.invoke(app, ["data", "verify", str(data)]).output
    sampled = run.invoke(app, ["data", "verify", str(data), "--sample", "2"]).output
    assert "2 clips, all intact, of 3; the others were not checked" in sampled.replace("\n", "")
    output = run.invoke(app, ["data", "info", str(data)]).output
    assert read_index(str(data)).fingerprint in output
    out = str(tmp_path / "page.html")
    assert run.invoke(app, ["data", "preview", str(data), "--out", out]).exit_code == 0
    (data / "shard-000001.tar").unlink()
    failed = run.invoke(app, ["data", "verify", str(data)])
    assert failed.exit_code != 0
    assert "problem: shard-000001.tar: is missing" in failed.output
    assert isinstance(failed.exception, UserError)
