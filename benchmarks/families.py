"""Both generator families on your clips, trained for the same CPU time; in Markdown.

    python benchmarks/families.py CLIPS --out families --minutes 20

CLIPS is a manifest of videos with a train and a test split, or a folder (docs/your-data.md). The
networks are those of ``quickstart`` and ``quickstart_tps`` at 64x64, trained in this process with
one thread. The seconds of a step are measured first, so both stop after about the same CPU time.
The test clips' scores are compared with each other and with the copied source frame, clip by clip,
with intervals over identities; ``--out`` keeps the runs, the report and the columns of pictures.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import time
from pathlib import Path
from typing import Annotated

import ray
import torch
import typer
from command_line import run_command

from prioritycut_ray import evaluate, load_config, train
from prioritycut_ray.config import Config
from prioritycut_ray.evaluation.tables import Table, summary_tables
from prioritycut_ray.packing.pipeline import pack_videos

CONFIGS = {"first_order": "quickstart", "thin_plate": "quickstart_tps"}
MEASURED_STEPS = 20


def main(
    clips: Annotated[list[str], typer.Argument(help="A manifest, or folders of videos.")],
    out: Annotated[Path, typer.Option(help="Folder of the data and the runs.")] = Path("families"),
    minutes: Annotated[float, typer.Option(help="CPU time of each training.")] = 20.0,
    workers: Annotated[int, typer.Option(help="Ray workers of the evaluation.")] = 2,
) -> None:
    """Pack the clips, train both families, and print their scores on the test clips."""
    torch.set_num_threads(1)
    out = out.absolute()
    data = out / "data"
    if not data.exists():
        pack_videos(clips, str(data), size=64)
        ray.shutdown()  # its processes would share the CPU with the training
    print(f"{minutes:g} minutes of CPU time for each family\n")
    print("| family | steps | samples | CPU s/step |\n|---|---|---|---|")
    runs = {}
    for family in CONFIGS:
        expected = _seconds_of_a_step(_config(family, out, "probe", MEASURED_STEPS))
        steps = round(60 * minutes / expected)
        config = _config(family, out, "run", steps)
        taken = _seconds_of_a_step(config)
        runs[family] = Path(config.run)
        print(f"| {family} | {steps} | {config.train.samples} | {taken:.3f} |", flush=True)
    first_order, thin_plate = runs.values()
    evaluation = evaluate(
        thin_plate, str(data), compare=[first_order], workers=workers, out=out / "evaluation"
    )
    for warning in evaluation.warnings:
        print(f"\nwarning: {warning}")
    for table in summary_tables(evaluation):
        print(_markdown(table))
    print(f"\nReport: {out}/evaluation/report.html")


def _config(family: str, out: Path, name: str, steps: int) -> Config:
    """Return the training of a family for so many steps of 8, its milestones at 7/8 of them."""
    samples = 8 * steps
    words = [f"data.url={out / 'data'}", f"storage={out / 'runs'}", f"name={family}-{name}"]
    words += [
        "train.workers=0",
        f"train.samples={samples}",
        f"optim.milestones=[{samples * 7 // 8}]",
    ]
    return load_config(CONFIGS[family], words)


def _seconds_of_a_step(config: Config) -> float:
    """Train, and return the CPU time of a step."""
    before = time.process_time()
    train(config)
    return (time.process_time() - before) / (config.train.samples // config.train.batch_size)


def _markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join([f"\n{table.title}\n", *("| " + " | ".join(line) + " |" for line in lines)])


if __name__ == "__main__":
    run_command(main)
