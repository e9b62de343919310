"""The data of a night before it is trained on: held-out clips that leak, and new clips that differ.

::

    probes.json    what was seen of each clip, by its checksum; a later night reuses it
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, RootModel

from prioritycut_ray.data.index import ClipIndex, Clips, were_seen
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.evaluation.scoring import Mapper
from prioritycut_ray.packing.workspace import REJECTED_NAME
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.retraining.probes import ClipProbe, ProbeTask, nearly_same, probe_clip
from prioritycut_ray.retraining.settings import DataGate
from prioritycut_ray.storage.folder import Folder

MOST_SEEN = 100_000
"""Of larger data sets, as many clips that were seen before are looked at, chosen at random."""
_LEAST = 1 / 255
"""Motion below a grey level is none."""


class Figure(BaseModel):
    """One property of the new clips beside that of the clips which the current model has seen.

    Attributes:
        name: of the property, as in ``data_gate``.
        new: its mean over the new clips.
        seen: over the others; None if there are none to compare with.
        passed: whether it is within the limit, or there is none.
        text: all of that, in one line.
    """

    name: str
    new: float
    seen: float | None
    passed: bool
    text: str


class DataCheck(BaseModel):
    """What was found in the data of a night: the content of ``data.json``.

    Attributes:
        leaks: held-out clips that are left out, with the reason.
        figures: the properties of the new clips.
    """

    leaks: dict[str, str]
    figures: list[Figure]

    @property
    def problems(self) -> list[str]:
        """The figures beyond a limit."""
        return [figure.text for figure in self.figures if not figure.passed]


class Night(NamedTuple):
    """The clips of a night.

    Attributes:
        seen: training clips that the current model has seen, at most :data:`MOST_SEEN` of them.
        new: training clips that it has not.
        held_out: the clips that models are compared on.
        same_bytes: training clips with the bytes of a held-out clip, by the key of that.
        rejected: videos that were rejected since the current model; None if that is not known.
    """

    seen: list[Clip]
    new: list[Clip]
    held_out: list[Clip]
    same_bytes: dict[str, str]
    rejected: int | None = None

    @property
    def clips(self) -> list[Clip]:
        """All clips to look at."""
        return [*self.held_out, *self.new, *self.seen]


def sort_clips(trained: Clips, held_out: Clips, earlier: ClipIndex) -> Night:
    """Sort the clips of a night.

    Args:
        trained: the training split.
        held_out: the holdout.
        earlier: index of the data set that the current model was trained on.
    """
    is_old = were_seen(trained, earlier)
    old = np.flatnonzero(is_old)
    if len(old) > MOST_SEEN:
        old = np.sort(np.random.default_rng(0).choice(old, MOST_SEEN, replace=False))
    checksums = {clip.sha256 for clip in held_out if clip.sha256}
    copies = [trained[place] for place in _rows_with(trained, checksums)]
    by_bytes = {clip.sha256: clip.key for clip in copies}
    return Night(
        seen=[trained[place] for place in old.tolist()],
        new=[trained[place] for place in np.flatnonzero(~is_old).tolist()],
        held_out=[*held_out],
        same_bytes={
            clip.key: by_bytes[clip.sha256] for clip in held_out if clip.sha256 in by_bytes
        },
    )


def _rows_with(clips: Clips, checksums: Iterable[str]) -> list[int]:
    """Return the places of clips that have one of these checksums."""
    wanted = np.array([[*bytes.fromhex(text)] for text in checksums], np.uint8).reshape(-1, 32)
    whole = np.dtype((np.void, 32))
    own = np.ascontiguousarray(clips.values("sha256")).view(whole).ravel()
    return np.flatnonzero(np.isin(own, wanted.view(whole).ravel())).tolist()


class Probes(RootModel[dict[str, ClipProbe]]):
    """What was seen of clips, by checksum."""


def probe_clips(
    data: str, clips: Iterable[Clip], faces: bool, known: Probes, mapper: Mapper
) -> Probes:
    """Look at all clips that are not known yet; those that cannot be decoded are left out.

    Args:
        data: folder of shards, an absolute path or an fsspec URL.
        clips: the clips.
        faces: whether to look for faces.
        known: from an earlier night.
        mapper: ``map``, or one that uses other processes.
    """
    there = {identity_of(clip): clip for clip in clips}
    probes = {
        name: probe
        for name, probe in known.root.items()
        if name in there and (probe.faces is not None) == faces
    }
    names = [name for name in there if name not in probes]
    tasks = [ProbeTask(data, there[name], faces) for name in names]
    if not tasks:
        return Probes(probes)
    with ProgressBar("looking at clips", len(tasks)) as bar:
        for number, probe in enumerate(mapper(probe_clip, tasks)):
            if probe is not None:
                probes[names[number]] = probe
            bar.update(number + 1, there[names[number]].key)
    return Probes(probes)


def identity_of(clip: Clip) -> str:
    """Return what a clip is known by: its checksum, or its key if that is not known."""
    return clip.sha256 or clip.key


def check_data(night: Night, probes: Probes, gate: DataGate) -> DataCheck:
    """Find leaks and shifts.

    Args:
        night: the clips.
        probes: of all of them that can be decoded.
        gate: the limits.
    """
    return DataCheck(
        leaks=find_leaks(night, probes),
        figures=[*_figures(night, probes, gate)],
    )


def find_leaks(night: Night, probes: Probes) -> dict[str, str]:
    """Return the held-out clips that training shows too, with the reason, by key."""
    same = {key: f"has the same bytes as {other}" for key, other in night.same_bytes.items()}
    near = nearly_same(
        _by_key([clip for clip in night.held_out if clip.key not in same], probes),
        _by_key([*night.seen, *night.new], probes),
    )
    return same | {key: f"shows nearly the same frames as {other}" for key, other in near.items()}


def _by_key(clips: Sequence[Clip], probes: Probes) -> dict[str, ClipProbe]:
    known = probes.root
    return {clip.key: known[name] for clip in clips if (name := identity_of(clip)) in known}


def _figures(night: Night, probes: Probes, gate: DataGate) -> Iterable[Figure]:
    if not night.new:
        return
    new = [*_by_key(night.new, probes).values()]
    seen = [*_by_key(night.seen, probes).values()]
    if new:
        yield _difference(
            "brightness",
            [probe.brightness for probe in new],
            [probe.brightness for probe in seen],
            gate.brightness,
        )
        yield _ratio(
            "motion",
            [probe.motion + _LEAST for probe in new],
            [probe.motion + _LEAST for probe in seen],
            gate.motion,
        )
    yield _ratio("size", _widths(night.new), _widths(night.seen), gate.size)
    if any(probe.faces is not None for probe in new):
        yield _difference("faces", _faces(new), _faces(seen), gate.faces)
    if night.rejected is not None:
        share = night.rejected / (night.rejected + len(night.new))
        yield Figure(
            name="rejected",
            new=share,
            seen=None,
            passed=gate.rejected is None or share <= gate.rejected,
            text=f"{share:.0%} of the new videos were rejected" + _limit(gate.rejected, "{:.0%}"),
        )


def _widths(clips: Sequence[Clip]) -> list[float]:
    return [float(clip.width) for clip in clips]


def _faces(probes: Sequence[ClipProbe]) -> list[float]:
    return [probe.faces for probe in probes if probe.faces is not None]


def _difference(
    name: str, new: Sequence[float], seen: Sequence[float], limit: float | None
) -> Figure:
    def beyond(now: float, before: float) -> bool:
        return limit is not None and abs(now - before) > limit

    return _figure(name, new, seen, beyond, _limit(limit, "a difference of {:g}"))


def _ratio(name: str, new: Sequence[float], seen: Sequence[float], limit: float | None) -> Figure:
    def beyond(now: float, before: float) -> bool:
        return limit is not None and max(now / before, before / now) > limit

    return _figure(name, new, seen, beyond, _limit(limit, "a factor of {:g}"))


def _figure(
    name: str,
    new: Sequence[float],
    seen: Sequence[float],
    beyond: Callable[[float, float], bool],
    limit: str,
) -> Figure:
    now = float(np.mean(new))
    before = float(np.mean(seen)) if seen else None
    return Figure(
        name=name,
        new=now,
        seen=before,
        passed=before is None or not beyond(now, before),
        text=f"{name} of the new clips is {now:.3g}"
        + ("" if before is None else f", of those seen before {before:.3g}")
        + limit,
    )


def _limit(limit: float | None, text: str) -> str:
    return "" if limit is None else f" (limit: {text.format(limit)})"


def rejected_files(data: str) -> list[str] | None:
    """Return the videos that packing has rejected, as a ``rejected.csv`` lists them.

    Args:
        data: the folder of a data set, or of a model that was trained on one.

    Returns:
        Their names; None without the file.
    """
    folder = Folder(data)
    if not folder.exists(REJECTED_NAME):
        return None
    text = folder.read(REJECTED_NAME).decode()
    return sorted({row["file"] for row in csv.DictReader(io.StringIO(text, newline=""))})
