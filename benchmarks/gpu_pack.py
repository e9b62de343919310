"""What gpu.py needs on a machine with a GPU and torch, but without a package index or ffmpeg.

Such a machine is assumed to have Python 3.12 on x86-64 Linux, torch, torchvision, timm,
torchmetrics, tensorboard, safetensors, jaxtyping, pandas, pyarrow, pytest, typer and their
dependencies. The rest is packed, in 64 MiB with the project itself: wheels, Ray without the files
that a run on one machine never opens, a stub for PyAV, and shards of synthetic puppets. The
efficientnet weights do not fit: the stages use random ones.
"""

import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from puppet_shards import pack_puppets

PYTHON = "3.12"
PLATFORMS = ("2_28", "2_17", "2014", "2010")
WHEELS = (
    *("annotated-types", "attrs", "beartype", "decord", "diskcache", "jsonschema"),
    *("jsonschema-specifications", "msgpack", "pillow-heif", "pydantic", "pydantic-core"),
    *("referencing", "rpds-py", "tenacity", "tensorboardX", "typing-inspection"),
)
MAX_BYTES = 64 << 20
"""Limit for the project and the pack together."""
UNUSED = re.compile(
    r"ray/(jars|rllib|llm|serve/(?!__init__)|dashboard/client|cpp|core/generated_java"
    r"|core/libjemalloc)|\.map$|\.pxd$|/(tests|benchmarks|examples)/"
)
"""Files in Ray's wheel that a run on one machine never opens."""
SECONDS = 540
"""Time limit of all stages, on a machine that allows ten minutes per command."""


def pack_for_bare_machine(folder: Path) -> str:
    """Fill a folder; return the command to run on the bare machine.

    Raises:
        SystemExit: a wheel cannot be downloaded, or the pack is too large.
    """
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "whl"
    wheels.mkdir(parents=True)
    for name in WHEELS:
        download(name, wheels)
    download("ray", folder)
    [ray] = folder.glob("ray-*.whl")
    slim(ray, folder / "ray-slim.tar.xz")
    ray.unlink()
    (folder / "stubs").mkdir()
    shutil.copy(Path(__file__).with_name("av_stub.py"), folder / "stubs" / "av.py")
    pack_puppets(str(folder / "data"), clips=6, frames=32, size=256)
    total = size_of(folder) + size_of_project()
    if total > MAX_BYTES:
        raise SystemExit(
            f"{total / 2**20:.1f} MiB with the project; the limit is {MAX_BYTES >> 20} MiB"
        )
    print(
        f"{size_of(folder) / 2**20:.1f} MiB in {folder}, {total / 2**20:.1f} MiB with the project"
    )
    return command_for(folder)


def download(name: str, folder: Path) -> None:
    """Download the wheel of the locally installed version, for the bare machine's Python."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)),
        *("--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"),
        *(
            word
            for name in PLATFORMS
            for word in ("--platform", f"manylinux{name_of(name)}_x86_64")
        ),
        f"{name}=={version(name)}",
    ]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"{name}: no wheel for Python {PYTHON} could be downloaded")


def name_of(policy: str) -> str:
    """The middle of a platform tag: manylinux_2_28, but manylinux2014."""
    return f"_{policy}" if "_" in policy else policy


def slim(wheel: Path, target: Path) -> None:
    """Write Ray's wheel as a compressed tar, without the unused files."""
    with zipfile.ZipFile(wheel) as source, tarfile.open(target, "w:xz", preset=6) as kept:
        for entry in source.infolist():
            if entry.is_dir() or UNUSED.search(entry.filename):
                continue
            member = tarfile.TarInfo(entry.filename)
            member.size = entry.file_size
            # As pip does: the wheel marks executable files.
            member.mode = 0o755 if (entry.external_attr >> 16) & 0o111 else 0o644
            kept.addfile(member, io.BytesIO(source.read(entry)))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size_of_project() -> int:
    """Bytes of the files that git tracks."""
    root = Path(__file__).parents[1]
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    paths = [root / name for name in listing.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def command_for(folder: Path) -> str:
    """The command to run on the bare machine, in the root of the project."""
    place = shlex.quote(str(folder))
    return (
        "export PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=/tmp/r; "
        f"(mkdir -p /tmp/ray-slim && tar xJf {place}/ray-slim.tar.xz -C /tmp/ray-slim) & "
        "python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir "
        f"--upgrade --target /tmp/site {place}/whl/*.whl || exit; wait; "
        f'export PYTHONPATH="/tmp/site:/tmp/ray-slim:$(realpath {place})/stubs:$PWD"; '
        f'python3 benchmarks/gpu.py --out "${{OUT:-gpu_results}}" --data {place}/data '
        f"--seconds {SECONDS}"
    )
