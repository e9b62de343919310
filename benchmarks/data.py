"""The stream beside other ways of feeding a training, on the same clips; in Markdown.

    python benchmarks/data.py                      # synthetic puppets, rendered first
    python benchmarks/data.py speed --data DATA    # your own shards; so take presets and sizing
    python benchmarks/data.py start memory encoding
    python benchmarks/data.py presets              # presets of `shard` beside PNG files, by decoder
    python benchmarks/data.py sizing               # what VoxCeleb2 takes, by rates measured here
    python benchmarks/data.py scale                # indexes of 10⁴ to 10⁷ clips, in minutes

The ways alternate, and the best turn of each counts. Unless stated otherwise, seconds are CPU
seconds of this process and its loader workers, which other work on the machine hardly changes. One
sample is one pair of frames.
"""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import av
import decord
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import typer
import webdataset
from command_line import run_command
from numpy.typing import NDArray
from PIL import Image
from puppet_shards import pack_puppets

from prioritycut_ray.config import DEFAULT_DECODER
from prioritycut_ray.data.index import (
    INDEX_NAME,
    PLAIN_SCHEMA,
    clips_of,
    index_of_table,
    read_index,
    write_index,
)
from prioritycut_ray.data.old_index import OLD_INDEX_NAME, read_old_clips
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.data.stream import Batch, FramePairs, batches, two_frames
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.clips import Recipe, make_part
from prioritycut_ray.packing.entries import Entry
from prioritycut_ray.packing.inspection import summarise
from prioritycut_ray.video.encoding import PRESETS, write_video
from prioritycut_ray.video.images import resize
from prioritycut_ray.video.random_access import (
    DECODERS,
    check_decoder,
    read_all,
)
from prioritycut_ray.video.source import Frame

PARTS = ("speed", "start", "memory", "encoding", "presets", "sizing", "scale")
SIZES = (64, 128, 256, 512)
ROWS = (10**4, 10**5, 10**6, 10**7)
OLD_ROWS = 200_000
"""Most clips for which the index of version 0.1 is measured: it takes a gigabyte."""
BATCH = 8
RSS_UNIT = os.sysconf("SC_PAGE_SIZE") / 2**20


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="Some of: " + ", ".join(PARTS))] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of shards; synthetic puppets by default.")
    ] = None,
    size: int = 256,
    clips: int = 8,
    frames: int = 64,
    samples: int = 48,
    turns: int = 2,
    sizes: Annotated[
        list[int] | None, typer.Option(help="Frame sizes of the encoding table.")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="Numbers of clips of the scale table.")
    ] = None,
    rate: Annotated[
        float, typer.Option(help="Samples per second of the training in the sizing table.")
    ] = 128.0,
) -> None:
    """Measure the named parts, or all of them."""
    torch.set_num_threads(1)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"Load average at the start: {load}, on {os.cpu_count()} cores.")
    with tempfile.TemporaryDirectory() as folder:
        chosen = parts or PARTS
        url = data or ""
        if not data and {"speed", "start"} & set(chosen):
            url = pack_puppets(f"{folder}/puppets", clips, frames, size)
        if "speed" in chosen:
            _print_speed(url, size, samples, turns, Path(folder))
        if "start" in chosen:
            _print_start(url, size, turns)
        if "memory" in chosen:
            _print_memory(pack_puppets(f"{folder}/small", 8, 32, 64))
        if "encoding" in chosen:
            _print_encoding(sizes or SIZES, turns)
        if "presets" in chosen:
            originals = _originals(url, size, clips, frames)
            _print_presets(originals, size, samples, turns, Path(folder))
        if "sizing" in chosen:
            originals = _originals(url, size, 2, VOXCELEB2.frames_per_clip)
            _print_sizing(originals, size, samples, turns, rate, Path(folder))
        if "scale" in chosen:
            _print_scale(Path(folder), rows or ROWS)


# ---------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A sample of the stream: which frames of which clip."""

    clip: Clip
    indices: tuple[int, int]


def _print_speed(url: str, size: int, samples: int, turns: int, folder: Path) -> None:
    """Samples per second of one process, for each way."""
    pairs = _pairs_of(url, size)
    wanted = [_item_of(pairs, number) for number in range(samples)]
    stored = {clip.key: read_clip(url, clip) for clip in pairs.clips}
    used = {item.clip.key: item.clip for item in wanted}
    png = _write_png(folder / "png", {key: stored[key] for key in used}, size)
    by_decord = _pairs_of(url, size, decoder="decord")
    visits = _pairs_of(url, size, pairs_per_visit=4)
    of_visits = [
        [_item_of(visits, number) for number in range(first, first + 4)]
        for first in range(0, samples, 4)
    ]

    ways: dict[str, Callable[[], None]] = {
        "bare decord, bytes in memory": lambda: [
            _by_decord(stored[item.clip.key], item.indices, size) for item in wanted
        ],
        "stream": lambda: _drain(_batches_of(pairs, samples, 0)),
        "stream, 2 loader workers": lambda: _drain(_batches_of(pairs, samples, 2)),
        "stream, decord": lambda: _drain(_batches_of(by_decord, samples, 0)),
        "stock webdataset + decord": lambda: _by_webdataset(url, pairs.clips, samples, size),
        "PNG frames on local disk (Pillow)": lambda: [
            _by_png(png / item.clip.key, item.indices) for item in wanted
        ],
        "bare decord, 4 pairs per visit": lambda: [
            _by_decord(stored[visit[0].clip.key], [i for item in visit for i in item.indices], size)
            for visit in of_visits
        ],
        "stream, 4 pairs per visit": lambda: _drain(_batches_of(visits, samples, 0)),
    }
    seconds = _in_turns(ways, turns)
    base = {
        name: "bare decord, 4 pairs per visit" if "4 pairs" in name else next(iter(ways))
        for name in ways
    }
    print(f"\n{samples} samples of {size}x{size}, {len(pairs.clips)} clips.\n")
    print("| way | samples per CPU second | ÷ bare decord | ÷ PNG |\n|---|---|---|---|")
    of_png = seconds["PNG frames on local disk (Pillow)"]
    for name, spent in seconds.items():
        print(
            f"| {name} | {samples / spent:.0f} | {seconds[base[name]] / spent:.2f} "
            f"| {of_png / spent:.2f} |"
        )
    _print_bytes(stored, list(used.values()), png)
    hashing = _in_turns(
        {"": lambda: [hashlib.sha256(stored[i.clip.key]).hexdigest() for i in wanted]}, turns
    )[""]
    print(f"Checksums: {100 * hashing / seconds['stream']:.2f} % of the stream's CPU seconds.")


def _print_bytes(stored: dict[str, bytes], clips: Sequence[Clip], png: Path) -> None:
    frames = sum(clip.frames for clip in clips)
    video = sum(len(stored[clip.key]) for clip in clips) / frames
    images = sum(path.stat().st_size for path in png.glob("*/*.png")) / frames
    print(
        f"\nBytes per frame: {video:.0f} in shards, {images:.0f} as PNG "
        f"({images / video:.0f} times as many)."
    )


def _pairs_of(url: str, size: int, num_repeats: int = 75, **options: object) -> FramePairs:
    return FramePairs(
        url, read_index(url), "train", size=size, seed=0, num_repeats=num_repeats, **options
    )


def _item_of(pairs: FramePairs, number: int) -> _Item:
    draw = pairs.draw(number)
    clip = pairs.clips[draw.clip]
    return _Item(clip, two_frames(draw.places, clip.frames))


def _batches_of(pairs: FramePairs, samples: int, workers: int, start: int = 0) -> Iterator[Batch]:
    return batches(
        pairs,
        start=start,
        stop=start + samples,
        global_batch=BATCH,
        rank=0,
        world_size=1,
        loader_workers=workers,
    )


def _drain(given: Iterator[object]) -> None:
    for _ in given:
        pass


def _by_decord(data: bytes, indices: Sequence[int], size: int) -> Frame:
    reader = decord.VideoReader(io.BytesIO(data), decord.cpu(0), size, size, num_threads=1)
    return reader.get_batch(indices).asnumpy()


def _by_png(folder: Path, indices: Sequence[int]) -> Frame:
    return np.stack([np.asarray(Image.open(folder / f"{index:07d}.png")) for index in indices])


def _write_png(folder: Path, stored: dict[str, bytes], size: int) -> Path:
    """Write each frame of the clips to a file, the layout of the reference's data sets."""
    for key, data in stored.items():
        (folder / key).mkdir(parents=True)
        for index, frame in enumerate(read_all(data, size)):
            Image.fromarray(frame).save(folder / key / f"{index:07d}.png")
    return folder


def _by_webdataset(url: str, clips: Sequence[Clip], samples: int, size: int) -> None:
    frames = {clip.key: clip.frames for clip in clips}
    rng = np.random.default_rng(0)
    for sample in itertools.islice(itertools.cycle(_shards_of(url, clips)), samples):
        _by_decord(sample["mp4"], rng.integers(frames[sample["__key__"]], size=2).tolist(), size)


def _shards_of(url: str, clips: Sequence[Clip]) -> webdataset.WebDataset:
    names = sorted({f"{url}/{clip.shard}" for clip in clips})
    known = {clip.key for clip in clips}
    whole = webdataset.WebDataset(names, shardshuffle=False)
    return whole.select(lambda sample: sample["__key__"] in known)


def _in_turns(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """CPU seconds of the best turn of each way, with child processes; the first turn warms up."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(turns + 1):
        for name, way in ways.items():
            before = _cpu_seconds()
            way()
            if turn > 0:
                best[name] = min(best[name], _cpu_seconds() - before)
    return best


def _cpu_seconds() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


# ---------------------------------------------------------------------------------------------
# Start, resume, memory
# ---------------------------------------------------------------------------------------------


def _print_start(url: str, size: int, turns: int) -> None:
    """Time to the first batch, at several positions in an epoch of 100,000 samples."""
    clips = clips_of(read_index(url), "train")
    repeats = -(-100_000 // len(clips))
    epoch = repeats * len(clips)
    places = {"start": 0, "10 %": epoch // 10, "90 %": epoch * 9 // 10}

    def first_batch(place: int, workers: int) -> None:
        given = _batches_of(_pairs_of(url, size, repeats), 10**6, workers, start=place)
        next(given)
        del given

    def webdataset_to(place: int) -> None:
        """A loader without state must read everything up to its position again."""
        samples = iter(itertools.cycle(_shards_of(url, clips)))
        first = next(itertools.islice(samples, place // BATCH * BATCH, None))
        for sample in itertools.chain([first], itertools.islice(samples, BATCH - 1)):
            _by_decord(sample["mp4"], [0, 1], size)

    ways: dict[str, Callable[[], None]] = {}
    for label, place in places.items():
        ways[f"stream, in the process, {label}"] = lambda place=place: first_batch(place, 0)
        ways[f"stream, 2 loader workers, {label}"] = lambda place=place: first_batch(place, 2)
        # Measured for a hundredth of the way and multiplied by a hundred: the whole takes long.
        ways[f"stock webdataset, {label}"] = lambda place=place: webdataset_to(place // 100)
    clock: dict[str, float] = dict.fromkeys(ways, float("inf"))

    def timed(name: str) -> None:
        before = time.perf_counter()
        ways[name]()
        clock[name] = min(clock[name], time.perf_counter() - before)

    seconds = _in_turns({name: lambda name=name: timed(name) for name in ways}, turns)
    print(
        f"\nFirst batch of {BATCH}, reading the index included; an epoch has {epoch:,} samples.\n"
    )
    print("| way | CPU seconds | seconds by the clock |\n|---|---|---|")
    for name in ways:
        base = f"stock webdataset, {'start'}"
        if name.startswith("stock") and name != base:
            spent = seconds[base] + 100 * max(0.0, seconds[name] - seconds[base])
            print(f"| {name} (extrapolated from a hundredth) | {spent:.2f} | |")
        else:
            print(f"| {name} | {seconds[name]:.3f} | {clock[name]:.3f} |")


def _print_memory(url: str, samples: int = 20_000) -> None:
    """Resident memory while samples are drawn and decoded in this process."""
    print(f"\nResident MB over {samples:,} samples of 64x64, decoded in this process.\n")
    print("| samples | MB |\n|---|---|")
    step = samples // 10 // BATCH
    given = _batches_of(_pairs_of(url, 64), samples, 0)
    for count in range(0, samples, step * BATCH):
        _drain(itertools.islice(given, step))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(f"| {count + step * BATCH:,} | {pages * RSS_UNIT:.1f} |")


# ---------------------------------------------------------------------------------------------
# Scale
# ---------------------------------------------------------------------------------------------


class _Opening(NamedTuple):
    """What a fresh process needs for a data set; times are seconds by the clock.

    Attributes:
        verified: opening the index for the first time on this machine.
        opened: opening it again.
        memory: bytes of private memory that opening and drawing have added.
        first: first batch at the start of a run, without opening.
        resumed: first batch at 90 % of an epoch, without opening.
        identity: first batch at the start, of visits by identity, without opening.
        known: setting up the stream with an equal index as ``data.known``, with opening both.
        info: what ``prioritycut data info`` computes, with opening.
    """

    verified: float
    opened: float
    memory: int
    first: float
    resumed: float
    identity: float
    known: float
    info: float


def _print_scale(folder: Path, rows: Sequence[int]) -> None:
    """Open indexes of synthetic rows, all of which show the same few clips."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    base = pack_puppets(str(folder / "puppets-64"), 8, 32, 64)
    print(
        f"\nFirst batch of {BATCH} at 64x64 in a fresh process; best of 5. Private memory is what "
        "opening and drawing add (Private_Dirty); mapped pages of the index are shared.\n"
    )
    print(
        "| clips | index MB | build s | verify once s | open s | private MB | first batch s "
        "| at 90 % | by identity | data.known s | info s "
        "| version 0.1: open s | private MB | shuffle s |"
    )
    print("|---|" + "---|" * 13)
    for count in rows:
        data = str(folder / f"rows-{count}")
        built = _in_child(_write_rows, base, data, count)
        size = Path(data, INDEX_NAME).stat().st_size
        now = _in_child(_open_rows, data)
        if count <= OLD_ROWS:
            _in_child(_write_old_rows, data)
            old = _in_child(_open_old_rows, data)
            before = f"{old[0]:.3f} | {old[1] / 1e6:.0f} | {old[2]:.4f}"
        else:
            before = "| |"
        print(
            f"| {count:,} | {size / 1e6:.0f} | {built:.1f} | {now.verified:.3f} | {now.opened:.3f} "
            f"| {now.memory / 1e6:.0f} | {now.first:.4f} | {now.resumed:.4f} | {now.identity:.4f} "
            f"| {now.known:.2f} | {now.info:.2f} | {before} |",
            flush=True,
        )
        shutil.rmtree(data)


def _in_child(function: Callable[..., Any], *arguments: object) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _write_rows(base: str, data: str, count: int) -> float:
    """Write an index of ``count`` rows, of a hundred clips per identity; return the seconds."""
    before = time.perf_counter()
    real = [clip._replace(shard=f"{base}/{clip.shard}") for clip in read_index(base).clips]
    numbers = np.arange(count)
    names = pc.utf8_lpad(pa.array(numbers).cast(pa.large_string()), 8, "0")
    columns: dict[str, pa.Array] = {}
    for field in PLAIN_SCHEMA:
        values = [getattr(clip, field.name) for clip in real]
        if field.name == "sha256":
            values = [bytes.fromhex(value) for value in values]
        columns[field.name] = pa.array(values, field.type).take(pa.array(numbers % len(real)))
    prefix, separator = (pa.scalar(text, pa.large_string()) for text in ("clip", ""))
    columns["key"] = pc.binary_join_element_wise(prefix, names, separator)
    columns["identity"] = pa.array(numbers // 100).cast(pa.large_string())
    columns["split"] = pa.array(["train"], pa.large_string()).take(pa.array(np.zeros(count, int)))
    table = pa.table([columns[name] for name in PLAIN_SCHEMA.names], schema=PLAIN_SCHEMA)
    write_index(index_of_table(table), data)
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]), ignore_errors=True)
    return time.perf_counter() - before


def _open_rows(data: str) -> _Opening:
    torch.set_num_threads(1)
    before = _private_bytes()
    verified = _clock(lambda: read_index(data))
    opened = min(_clock(lambda: read_index(data)) for _ in range(5))
    index = read_index(data)
    pairs = FramePairs(data, index, "train", size=64, seed=0)
    by_identity = FramePairs(data, index, "train", size=64, seed=0, visit="identity")
    places = [(pairs, 0), (pairs, pairs.epoch_length * 9 // 10), (by_identity, 0)]

    def first_batch(stream: FramePairs, place: int) -> None:
        next(_batches_of(stream, BATCH, 0, start=place))

    times = [
        min(_clock(lambda: first_batch(stream, place)) for _ in range(5))  # noqa: B023
        for stream, place in places
    ]
    memory = _private_bytes() - before

    def with_known() -> None:
        FramePairs(data, read_index(data), "train", size=64, seed=0, known=read_index(data))

    info = _clock(lambda: summarise(read_index(data)))
    return _Opening(verified, opened, memory, *times, _clock(with_known), info)


def _write_old_rows(data: str) -> None:
    """Write the rows as version 0.1 did."""
    rows = [
        clip._replace(shard="shard-000000.tar")._asdict() | {"extra": None}
        for clip in read_index(data).clips
    ]
    for row in rows:
        del row["extra"]
    facts = sorted((r["key"], r["sha256"], r["frames"], r["identity"], r["split"]) for r in rows)
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    index = {"format": 1, "fingerprint": fingerprint, "clips": rows}
    Path(data, OLD_INDEX_NAME).write_text(json.dumps(index))


def _open_old_rows(data: str) -> tuple[float, int, float]:
    """Return the seconds and bytes that the index takes, and the seconds that an epoch takes."""
    before, started = _private_bytes(), time.perf_counter()
    clips = list(read_old_clips(Path(data, OLD_INDEX_NAME).read_bytes(), data))
    opened = time.perf_counter() - started
    memory = _private_bytes() - before
    return opened, memory, _clock(lambda: np.random.default_rng(0).permutation(75 * len(clips)))


def _clock(action: Callable[[], object]) -> float:
    before = time.perf_counter()
    action()
    return time.perf_counter() - before


def _private_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"Private_Dirty:\s+(\d+) kB", text)[1])


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------


def _print_encoding(sizes: Sequence[int], turns: int, frames: int = 48, samples: int = 12) -> None:
    """Bytes and speed by key-frame distance (GOP) and size, and with x264's default settings."""
    print(
        f"\n{frames} frames of a synthetic puppet, CRF 18; pairs per CPU second by decoder, "
        "including opening the clip.\n"
    )
    decoders = _usable_decoders()
    print(f"| size | GOP | bytes per frame | PSNR dB | {' | '.join(decoders)} | PNG |")
    print("|---|---|---|---|---|" + "---|" * len(decoders))
    rng = np.random.default_rng(0)
    wanted = [rng.choice(frames, 2, replace=False).tolist() for _ in range(samples)]
    for size in sizes:
        original = np.stack(list(render_clip(1, size=size, frames=frames).frames))
        pictures = [_as_png(frame) for frame in original]
        png = _in_turns({"": partial(_decode_png, pictures, wanted)}, turns)[""]
        clips = {str(gop): _encoded(original, gop) for gop in (1, 4, 8, 12, 25)}
        clips["12, x264's defaults"] = _encoded_by_defaults(original, 12)
        for label, clip in clips.items():
            ways = {name: partial(_decode_all, name, clip, wanted, size) for name in decoders}
            seconds = _in_turns(ways, turns)
            print(
                f"| {size} | {label} | {len(clip) / frames:.0f} "
                f"| {_psnr(original, read_all(clip, size)):.1f} "
                + "".join(f"| {samples / seconds[name]:.0f} " for name in decoders)
                + f"| {samples / png:.0f} |"
            )


def _usable_decoders() -> list[str]:
    usable = []
    for name in DECODERS:
        try:
            check_decoder(name)
        except UserError as error:
            print(f"Not measured: {error}")
        else:
            usable.append(name)
    return usable


def _psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def _decode_all(decoder: str, clip: bytes, wanted: Sequence[Sequence[int]], size: int) -> None:
    for indices in wanted:
        DECODERS[decoder](clip, indices, size)


def _as_png(frame: Frame) -> bytes:
    target = io.BytesIO()
    Image.fromarray(frame).save(target, "PNG")
    return target.getvalue()


def _decode_png(pictures: Sequence[bytes], wanted: Sequence[Sequence[int]]) -> None:
    for index in itertools.chain.from_iterable(wanted):
        np.asarray(Image.open(io.BytesIO(pictures[index])))


def _encoded(frames: Sequence[Frame], gop: int) -> bytes:
    target = io.BytesIO()
    write_video(target, frames, 25.0, gop=gop)
    return target.getvalue()


def _encoded_by_defaults(frames: Sequence[Frame], gop: int) -> bytes:
    """Encode with x264's defaults: B-frames, CABAC, deblocking."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "18"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return target.getvalue()


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------


def _originals(url: str, size: int, clips: int, frames: int) -> dict[str, NDArray[np.uint8]]:
    """Return clips to encode, ``uint8 [T, size, size, 3]``: of a data set, or synthetic puppets."""
    if not url:
        made = (render_clip(seed, size=size, frames=frames).frames for seed in range(clips))
        return {f"puppet{seed}": np.stack(list(shown)) for seed, shown in enumerate(made)}
    chosen = itertools.islice(clips_of(read_index(url), "train"), clips)
    return {clip.key: read_all(read_clip(url, clip), size)[:frames] for clip in chosen}


def _write_set(url: str, originals: dict[str, NDArray[np.uint8]], preset: str) -> FramePairs:
    """Write a data set of clips that are encoded by a preset."""
    with ShardWriter(url) as writer:
        for key, frames in originals.items():
            encoded = io.BytesIO()
            write_video(encoded, frames, 25.0, **PRESETS[preset]._asdict())
            size, count = frames.shape[1], len(frames)
            data = encoded.getvalue()
            writer.add(Member(key, data, count, 25.0, size, size, key, key, False))
        writer.finish(dict.fromkeys(originals, "train"))
    return _pairs_of(url, originals[key].shape[1])


def _print_presets(
    originals: dict[str, NDArray[np.uint8]], size: int, samples: int, turns: int, folder: Path
) -> None:
    """The stream of each preset, by decoder, beside the same frames as PNG files."""
    for key, frames in originals.items():
        (folder / "originals" / key).mkdir(parents=True)
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / "originals" / key / f"{index:07d}.png")
    paths = [*(folder / "originals").glob("*/*.png")]
    png_bytes = sum(path.stat().st_size for path in paths) / len(paths)
    sets = {preset: _write_set(str(folder / preset), originals, preset) for preset in PRESETS}
    wanted = [_item_of(sets["default"], number) for number in range(samples)]
    decoders = _usable_decoders()
    ways: dict[str, Callable[[], object]] = {
        "PNG": lambda: [
            _by_png(folder / "originals" / item.clip.key, item.indices) for item in wanted
        ]
    }
    for preset, decoder in itertools.product(PRESETS, decoders):
        pairs = _pairs_of(sets[preset].url, size, decoder=decoder)
        ways[f"{preset} {decoder}"] = partial(_stream_all, pairs, samples)
    seconds = _in_turns(ways, turns)
    count = len(next(iter(originals.values())))
    print(
        f"\nThe stream in one process: {samples} samples of {size}x{size}, {len(originals)} clips "
        f"of {count} frames. PNG: {samples / seconds['PNG']:.0f} samples per CPU second, "
        f"{png_bytes:.0f} bytes per frame.\n"
    )
    titles = [f"{decoder}: samples per CPU second | ÷ PNG" for decoder in decoders]
    print(f"| preset | bytes per frame | PNG ÷ bytes | PSNR dB | {' | '.join(titles)} |")
    print("|---|---|---|---|" + "---|---|" * len(decoders))
    for preset, pairs in sets.items():
        size_bytes = sum(clip.size for clip in pairs.clips) / sum(c.frames for c in pairs.clips)
        likeness = [
            _psnr(originals[clip.key], read_all(read_clip(pairs.url, clip), size))
            for clip in pairs.clips
        ]
        print(
            f"| {preset} | {size_bytes:.0f} | {png_bytes / size_bytes:.1f} "
            f"| {np.mean(likeness):.1f} "
            + "".join(
                f"| {samples / seconds[f'{preset} {decoder}']:.0f} "
                f"| {seconds['PNG'] / seconds[f'{preset} {decoder}']:.2f} "
                for decoder in decoders
            )
            + "|"
        )


def _stream_all(pairs: FramePairs, samples: int) -> None:
    _drain(_batches_of(pairs, samples, 0))


# ---------------------------------------------------------------------------------------------
# Sizing
# ---------------------------------------------------------------------------------------------


class _Published(NamedTuple):
    """A data set, as its authors describe it."""

    clips: int
    hours: float
    fps: int
    size: int

    @property
    def frames(self) -> int:
        return round(self.hours * 3600 * self.fps)

    @property
    def frames_per_clip(self) -> int:
        return round(self.frames / self.clips)


VOXCELEB2 = _Published(clips=1_128_246, hours=2442, fps=25, size=224)
"""Chung, Nagrani and Zisserman, "VoxCeleb2: Deep Speaker Recognition", 2018, table 1."""
CPUS = (8, 64, 512)
INDEX_BYTES = 108
"""Of a clip, by the scale table."""


def _print_sizing(
    originals: dict[str, NDArray[np.uint8]],
    size: int,
    samples: int,
    turns: int,
    rate: float,
    folder: Path,
) -> None:
    """What VoxCeleb2 takes, at the rates and sizes of a few clips of its length and frame size."""
    whole = VOXCELEB2
    count = len(next(iter(originals.values())))
    published = [
        np.stack([resize(frame, whole.size) for frame in frames]) for frames in originals.values()
    ]
    entries = []
    for number, frames in enumerate(published):
        path = folder / f"published{number}.mp4"
        path.write_bytes(_encoded_by_defaults(frames, 250))
        entries.append(Entry(source=str(path), name=path.stem))
    recipes = {preset: Recipe(size, False, 1024, preset) for preset in PRESETS}
    sets = {
        preset: _write_set(str(folder / f"s-{preset}"), originals, preset) for preset in PRESETS
    }
    seconds = _in_turns(
        {
            **{f"pack {p}": partial(_pack_all, entries, recipe) for p, recipe in recipes.items()},
            **{f"read {p}": partial(_stream_all, pairs, samples) for p, pairs in sets.items()},
        },
        turns,
    )
    print(
        f"\nVoxCeleb2: {whole.clips:,} clips, {whole.hours:,} h at {whole.fps} fps, so "
        f"{whole.frames:,} frames, {whole.frames_per_clip} a clip, {whole.size}x{whole.size}, "
        f"packed at {size}x{size}.\nRates of {len(originals)} clips of {count} frames on one CPU "
        f"of this machine; decoder {DEFAULT_DECODER}, data.pairs_per_visit=1. Training: {rate:g} "
        "samples per second.\n"
    )
    print(
        "| preset | frames packed per CPU second | CPU hours "
        + "".join(f"| hours on {cpus} CPUs " for cpus in CPUS)
        + "| shards GB | KB per clip | training: samples per CPU second | CPUs that decode "
        "| requests per second | MB per second |"
    )
    print("|---|---|---|" + "---|" * len(CPUS) + "---|---|---|---|---|---|")
    for preset, pairs in sets.items():
        packed = count * len(originals) / seconds[f"pack {preset}"]
        hours = whole.frames / packed / 3600
        per_frame = sum(clip.size for clip in pairs.clips) / sum(c.frames for c in pairs.clips)
        clip_bytes = per_frame * whole.frames_per_clip
        read = samples / seconds[f"read {preset}"]
        print(
            f"| {preset} | {packed:.0f} | {hours:.0f} "
            + "".join(f"| {hours / cpus:.1f} " for cpus in CPUS)
            + f"| {per_frame * whole.frames / 1e9:.0f} | {clip_bytes / 1e3:.0f} | {read:.0f} "
            f"| {rate / read:.1f} | {rate:g} | {rate * clip_bytes / 1e6:.0f} |"
        )
    print(
        f"\nPacking reads each video with one request, and writes shards of 256 MiB. The index has "
        f"{whole.clips * INDEX_BYTES / 1e6:.0f} MB."
    )


def _pack_all(entries: Sequence[Entry], recipe: Recipe) -> None:
    for entry in entries:
        make_part(entry, recipe)


if __name__ == "__main__":
    run_command(main)
