"""Benchmarks with a progress bar, in Ray tasks: ``prioritycut benchmark``."""

from pathlib import Path

from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import short_names
from prioritycut_ray.evaluation.puppets import PuppetBenchmark, benchmark_on_puppets
from prioritycut_ray.evaluation.showcase import png_bytes
from prioritycut_ray.inference.pretrained import pinned_model
from prioritycut_ray.launch.evaluate import report_folder, task_mapper
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.storage.atomic import write_atomically

SCORES_NAME = "puppets.json"
COLUMNS_NAME = "columns.png"


def benchmark_puppets(
    run: str | Path,
    *,
    identities: int = 20,
    frames: int = 32,
    workers: int | None = None,
    out: str | Path | None = None,
) -> tuple[PuppetBenchmark, Path]:
    """Score a model on synthetic puppets, and write the scores; see docs/evaluation.md.

    Args:
        run: a run, one of its checkpoints, ``RUN/best``, an export, or a model on the Hugging Face
            Hub.
        identities: number of puppets.
        frames: number of frames of each clip.
        workers: number of Ray tasks at a time; by default as many as the cluster has room for. 0
            runs in this process, without Ray. The scores are the same for any number.
        out: folder of the results; ``RUN/benchmark/puppets`` by default.

    Returns:
        The scores, and the folder.

    Raises:
        UserError: the model does not exist or is damaged, or the results would be written to a URL
            or into a model on the Hub.
    """
    model, (name,) = pinned_model(run), short_names([str(run)])
    folder = report_folder(run, out, "benchmark", "puppets")
    if out is None and not Path(model).exists():
        raise UserError(f"{run}: is a model on the Hub; set --out to a folder for the results")
    folder.mkdir(parents=True, exist_ok=True)
    with ProgressBar("scoring puppets", identities) as bar:
        benchmark, columns = benchmark_on_puppets(
            model,
            name,
            identities=identities,
            frames=frames,
            mapper=task_mapper(workers),
            on_puppet=lambda done: bar.update(done, f"{done}/{identities}"),
        )
    write_atomically(folder / COLUMNS_NAME, png_bytes(columns))
    write_atomically(folder / SCORES_NAME, benchmark.model_dump_json(indent=1).encode())
    return benchmark, folder
