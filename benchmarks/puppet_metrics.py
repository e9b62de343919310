"""How well metrics without ground truth rank models, measured on puppets; in Markdown.

    python benchmarks/puppet_metrics.py runs/a runs/b ...   # trained models, at least 20
    python benchmarks/puppet_metrics.py --train 20          # trains small ones first

Identity distance, pose transfer and estimated flicker are what is left where the right picture is
unknown. `prioritycut benchmark puppets` knows it, so that each can be compared with the true error
that it stands in for, as Spearman's rank correlation over models. The baselines beside them are
errors that need the truth of the model's own clip alone, which any real clip provides. Models that
have been trained or scored are not trained or scored again. The correlations of the three belong
into `prioritycut_ray/metrics/transfer.py::CORRELATIONS`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from command_line import run_command
from puppet_shards import packed_puppets
from scipy.stats import bootstrap, spearmanr

from prioritycut_ray.config import load_config
from prioritycut_ray.evaluation.evaluate import short_names
from prioritycut_ray.evaluation.puppets import PuppetBenchmark
from prioritycut_ray.inference.pretrained import locate_model, pinned_model, read_model_config
from prioritycut_ray.launch.benchmark import SCORES_NAME, benchmark_puppets
from prioritycut_ray.launch.train import train
from prioritycut_ray.metrics.transfer import FEWEST_MODELS, LOWEST_CORRELATION, TRUE_ERRORS

TASK = "relative"
BASELINES = ("l1", "flicker")
"""Errors of reconstruction, beside the metrics that stand in for the same errors of the task."""
PUPPETS = 40
"""Training puppets; none is scored."""
SAMPLES = (200, 600, 1600, 4000)
WIDTHS = (8, 16)
SECTIONS = ("detector", "dense_motion", "generator")
FEWEST_FOR_INTERVAL = 10


class Ranking(NamedTuple):
    """How well a metric ranks models.

    Attributes:
        name: of the metric.
        truth: of the true error, in the task.
        models: number of models; those with values that are not finite do not count.
        correlation: Spearman's; NaN if the metric or the error is equal for all models.
        interval: 95 %, over models; None with few of them.
    """

    name: str
    truth: str
    models: int
    correlation: float
    interval: tuple[float, float] | None

    def verdict(self) -> str:
        """Say whether the metric may do without its label."""
        if self.models < FEWEST_MODELS:
            return f"unvalidated: {self.models} of {FEWEST_MODELS} models"
        return "validated" if self.correlation >= LOWEST_CORRELATION else "unvalidated"


def main(
    runs: Annotated[list[str] | None, typer.Argument(help="Trained models.")] = None,
    train: Annotated[int, typer.Option(help="Number of small models to train first.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of models and scores.")] = Path(
        "puppet_metrics"
    ),
    identities: Annotated[int, typer.Option(min=1, help="Number of puppets.")] = 20,
    frames: Annotated[int, typer.Option(min=2, help="Number of frames of each clip.")] = 32,
    override: Annotated[
        list[str] | None, typer.Option(help="`dotted.key=value`, for the models to train.")
    ] = None,
) -> None:
    """Score models, and print how well each metric ranks them."""
    models = [*(runs or []), *(train_model(out, n, override or []) for n in range(train))]
    if not models:
        print("Give the folders of trained runs, or --train 20; see --help.")
        return
    names = short_names(models)
    scores = [
        scored(model, out / "scores" / name.replace("/", "-"), identities, frames)
        for name, model in zip(names, models, strict=True)
    ]
    print_models(names, scores)
    print_rankings(rankings(scores))
    print_equally_trained(models, scores)


def train_model(out: Path, number: int, words: Sequence[str]) -> str:
    """Train one small model on puppets, or resume it; seeds, lengths and widths differ."""
    data = packed_puppets(out / "data", PUPPETS, 32, 64)
    width = WIDTHS[number // len(SAMPLES) % len(WIDTHS)]
    config = load_config(
        "quickstart",
        [
            f"name=model{number:02d}",
            f"storage={out / 'runs'}",
            f"data.url={data}",
            f"train.seed={number}",
            f"train.samples={SAMPLES[number % len(SAMPLES)]}",
            "train.workers=0",
            *(f"model.{section}.block_expansion={width}" for section in SECTIONS),
            *words,
        ],
    )
    return train(config)


def scored(model: str, folder: Path, identities: int, frames: int) -> PuppetBenchmark:
    """Score a model on puppets, unless that has been done."""
    file = folder / SCORES_NAME
    if file.exists():
        known = PuppetBenchmark.model_validate_json(file.read_bytes())
        if (known.model, known.identities, known.frames) == (
            pinned_model(model),
            identities,
            frames,
        ):
            return known
    return benchmark_puppets(model, identities=identities, frames=frames, workers=0, out=folder)[0]


def mean(scores: PuppetBenchmark, task: str, metric: str) -> float:
    """Return the mean of the model over puppets; NaN if it is undefined."""
    (run,) = scores.tasks[task].runs
    value = run.mean_over_clips[metric].value
    return np.nan if value is None else value


def rankings(scores: Sequence[PuppetBenchmark]) -> list[Ranking]:
    """Correlate each metric, and each baseline, with the true error that it stands in for."""
    pairs = [(metric, TASK, metric, truth) for metric, truth in TRUE_ERRORS.items()]
    pairs += [(f"{key} of reconstruction", "reconstruction", key, key) for key in BASELINES]
    return [
        ranking(
            name,
            truth,
            [mean(each, task, metric) for each in scores],
            [mean(each, TASK, truth) for each in scores],
        )
        for name, task, metric, truth in pairs
    ]


def ranking(name: str, truth: str, guessed: Sequence[float], true: Sequence[float]) -> Ranking:
    """Correlate the values of a metric with the true errors of the same models."""
    values = np.array([guessed, true])
    x, y = values[:, np.isfinite(values).all(axis=0)]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Ranking(name, truth, len(x), np.nan, None)
    return Ranking(name, truth, len(x), spearman(x, y), interval(x, y))


def spearman(x: Any, y: Any) -> float:
    """Return Spearman's rank correlation."""
    return float(spearmanr(x, y).statistic)


def interval(x: Any, y: Any) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval over models."""
    if len(x) < FEWEST_FOR_INTERVAL:
        return None
    found = bootstrap(
        (x, y),
        spearman,
        n_resamples=1000,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def print_models(names: Sequence[str], scores: Sequence[PuppetBenchmark]) -> None:
    """Print the values of every model."""
    truths = list(dict.fromkeys(TRUE_ERRORS.values()))
    print(f"{scores[0].identities} puppets, {scores[0].frames} frames each, {TASK} motion\n")
    print("| model |", " | ".join([*TRUE_ERRORS, *(f"true {key}" for key in truths)]), "|")
    print("| --- |" + " --- |" * (len(TRUE_ERRORS) + len(truths)))
    for name, each in zip(names, scores, strict=True):
        values = [f"{mean(each, TASK, key):.4f}" for key in (*TRUE_ERRORS, *truths)]
        print(f"| {name} |", " | ".join(values), "|")


def print_rankings(found: Sequence[Ranking]) -> None:
    """Print the correlations."""
    print("\n| metric | true error | Spearman | 95 % over models | models | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in found:
        ends = "none" if row.interval is None else "[{:+.2f}, {:+.2f}]".format(*row.interval)
        verdict = row.verdict() if row.name in TRUE_ERRORS else "baseline"
        print(
            f"| {row.name} | {row.truth} | {row.correlation:+.2f} | {ends} | {row.models} "
            f"| {verdict} |"
        )


def print_equally_trained(models: Sequence[str], scores: Sequence[PuppetBenchmark]) -> None:
    """Print the correlations among models that were trained for equally many samples."""
    groups = defaultdict(list)
    for model, each in zip(models, scores, strict=True):
        groups[read_model_config(locate_model(model)).train.samples].append(each)
    print("\nAmong models trained for equally many samples:\n")
    print("| samples | models |", " | ".join(TRUE_ERRORS), "|")
    print("| --- | --- |" + " --- |" * len(TRUE_ERRORS))
    for samples, group in sorted(groups.items()):
        found = [f"{row.correlation:+.2f}" for row in rankings(group) if row.name in TRUE_ERRORS]
        print(f"| {samples} | {len(group)} |", " | ".join(found), "|")


if __name__ == "__main__":
    run_command(main)
