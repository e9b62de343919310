"""Every GPU measurement in one command, the most valuable first.

    python benchmarks/gpu.py                          # everything, in about ten minutes
    python benchmarks/gpu.py --only steps,profile     # some stages
    python benchmarks/gpu.py --config vox256_tps      # the networks of another configuration
    python benchmarks/gpu.py --dry                    # a small rehearsal on a CPU
    python benchmarks/gpu.py --pack gpu_pack          # for a machine without a package index

Each stage runs in its own process with a time limit. If it fails or runs out of time, the others
still run. Its output is written to OUT/results.txt as it is printed. gpu_stages.py describes the
stages. The figures of `--dry` mean nothing.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated

import torch
import typer
from gpu_pack import pack_for_bare_machine
from gpu_stages import STAGES, Setup

SHORTEST = 10.0
"""Seconds; with less time left, a stage is not started."""
DRY_LIMIT = 900.0
"""Time limit in seconds of a rehearsed stage, on a busy CPU."""
GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL for a stage that exceeds its limit."""
SHOWN = 30
"""Lines of a stage's output that are shown when it has ended."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("gpu_results"),
    data: Annotated[str, typer.Option(help="Folder of shards; synthetic puppets by default.")] = "",
    seconds: Annotated[float, typer.Option(help="Time limit of all stages together.")] = 600,
    only: Annotated[str, typer.Option(help="Stages, separated by commas.")] = ",".join(STAGES),
    config: Annotated[str, typer.Option(help="Whose networks are measured.")] = "vox256",
    dry: Annotated[bool, typer.Option(help="Rehearse on a CPU.")] = False,
    pack: Annotated[Path | None, typer.Option(help="Pack for a bare machine and exit.")] = None,
) -> None:
    """Measure what a GPU does with this project."""
    if context.invoked_subcommand is not None:
        return
    if pack is not None:
        print(pack_for_bare_machine(pack))
        return
    names = only.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise typer.BadParameter(
            f"no such stage: {', '.join(unknown)}; the stages are {', '.join(STAGES)}"
        )
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no GPU found; --dry rehearses the stages on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.txt").unlink(missing_ok=True)
    with (out / "results.txt").open("a") as results:
        failed = run_stages(names, Setup(out.resolve(), data, dry, config), seconds, results)
    raise SystemExit(1 if failed else 0)


@app.command(hidden=True)
def stage(name: str, out: Path, data: str = "", config: str = "vox256", dry: bool = False) -> None:
    """Run one stage in this process."""
    STAGES[name].run(Setup(out, data, dry, config))


def run_stages(names: Sequence[str], setup: Setup, seconds: float, results: IO[str]) -> list[str]:
    """Run stages one after the other; return the names of those that failed."""
    deadline = time.monotonic() + seconds
    _report(results, describe_machine())
    failed = []
    for name in names:
        limit = min(STAGES[name].seconds, deadline - time.monotonic())
        if setup.dry:
            limit = DRY_LIMIT
        if limit < SHORTEST:
            _report(results, f"=== {name}: not started, the {seconds:g} s are used up")
            failed.append(name)
            continue
        words = ["stage", name, str(setup.out), "--data", setup.data, "--config", setup.config]
        words += ["--dry"] * setup.dry
        if not run_stage(name, [sys.executable, __file__, *words], limit, results):
            failed.append(name)
    return failed


def run_stage(name: str, command: Sequence[str], limit: float, results: IO[str]) -> bool:
    """Run a stage, append its output to the results, and return whether it succeeded."""
    results.write(f"=== {name}\n")
    results.flush()
    path = Path(results.name)
    began, offset = time.monotonic(), path.stat().st_size
    process = subprocess.Popen(
        command,
        stdout=results,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        end = f"exit code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        end = f"stopped at its limit of {limit:.0f} s"
    _end_group(process)
    _show(path, offset)
    _report(results, f"=== {name}: {end}, {time.monotonic() - began:.0f} s")
    return process.returncode == 0


def describe_machine() -> str:
    """The date, the software versions and the hardware."""
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} CPU cores"
    ]
    if torch.cuda.is_available():
        lines.append(f"cuDNN {torch.backends.cudnn.version()}, NCCL {torch.cuda.nccl.version()}")
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,ecc.mode.current"
        lines.append(_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
    if Path("/dev/shm").is_dir():
        lines.append(f"/dev/shm: {shutil.disk_usage('/dev/shm').free / 1e9:.1f} GB free")
    return "\n".join(lines)


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return (result.stdout or result.stderr).strip()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Terminate the processes that a stage has left running, then kill them."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _show(path: Path, offset: int) -> None:
    """Print the last lines of a file after an offset."""
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").splitlines()
    print("\n".join(lines[-SHOWN:]))


def _report(results: IO[str], text: str) -> None:
    results.write(text + "\n")
    results.flush()
    print(text, flush=True)


if __name__ == "__main__":
    app()
