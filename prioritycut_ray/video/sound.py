"""The sound of a video: surveyed, and resampled in step with its pictures."""

import itertools
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import av
import numpy as np
from av.audio import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from prioritycut_ray.video.decoding import open_video
from prioritycut_ray.video.images import is_picture_file
from prioritycut_ray.video.source import Source

SOUND_RATE = 48_000
"""Samples per second."""
_SOUND_SLACK = SOUND_RATE // 50


class Sound(NamedTuple):
    """The sound of a video.

    Attributes:
        source: a file in which :func:`survey_sound` finds sound.
        offset: time of the first picture in seconds; earlier sound is left out.
        seconds: duration of the pictures; later sound is left out.
    """

    source: Source
    offset: float
    seconds: float


class SoundInfo(NamedTuple):
    """A sound track after one pass over it.

    Attributes:
        codec: name of the codec; empty if it is unknown.
        pieces: number of pieces that can be decoded.
        lost: number of pieces that cannot be decoded.
    """

    codec: str
    pieces: int
    lost: int


def survey_sound(source: Source) -> SoundInfo | None:
    """Decode the sound of a video once; None if the video has no sound."""
    if is_picture_file(source):
        return None
    with open_video(source) as (container, _):
        if not container.streams.audio:
            return None
        stream = _sound_stream(container)
        codec = stream.codec_context.name if stream is not None else ""
    pieces = Counter(piece is not None for piece in _resampled(source))
    return SoundInfo(codec, pieces[True], pieces[False])


def sound_in_step(sound: Sound) -> Iterator[NDArray[np.float32]]:
    """Decode a sound from the first picture to the last, ``[2, N]``; gaps become silence."""
    place, end = 0, round(sound.seconds * SOUND_RATE)
    for piece in _resampled(sound.source):
        if piece is None:
            continue
        start = place if piece.time is None else round((piece.time - sound.offset) * SOUND_RATE)
        samples = np.asarray(piece.to_ndarray(), np.float32)
        # Times are rounded, so small differences are neither gaps nor overlaps.
        if abs(start - place) > (_SOUND_SLACK if place else 0):
            samples = samples[:, max(0, place - start) :]
            while place < min(start, end):
                silence = min(start, end, place + SOUND_RATE) - place
                yield np.zeros((2, silence), np.float32)
                place += silence
        samples = samples[:, : end - place]
        if samples.shape[1]:
            yield samples
        place += samples.shape[1]
        if place >= end:
            return


def _resampled(source: Source) -> Iterator[av.AudioFrame | None]:
    """Decode a sound to stereo float samples at 48 kHz; None for each damaged piece."""
    # A track may change its layout or rate; a resampler handles only one.
    for form, group in itertools.groupby(_sound_frames(source), _sound_form):
        if form is None:
            yield from (None for _ in group)
            continue
        resampler = av.AudioResampler("fltp", "stereo", SOUND_RATE)
        for frame in chain(group, [None]):  # None flushes the resampler.
            try:
                yield from resampler.resample(frame)
            except Exception:  # This form cannot be converted.
                yield None


def _sound_form(frame: av.AudioFrame | None) -> tuple[str, str, int] | None:
    if frame is None:
        return None
    return frame.format.name, frame.layout.name, frame.sample_rate


def _sound_frames(source: Source) -> Iterator[av.AudioFrame | None]:
    """Decode a sound; None for each damaged piece."""
    with open_video(source) as (container, _):
        stream = _sound_stream(container)
        if stream is None:
            return
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except Exception:  # Libraries raise anything for a strange packet.
                yield None
                continue
            if packet is None:
                return
            yield from (None if frame.is_corrupt else frame for frame in frames)


def _sound_stream(container: InputContainer) -> AudioStream | None:
    """Return the first sound that can be decoded."""
    known = (stream for stream in container.streams.audio if stream.codec_context is not None)
    return next(known, None)
