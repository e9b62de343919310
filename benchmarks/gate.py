"""Error rates of the promotion gate over simulated months, beside the former gate; in Markdown.

    python benchmarks/gate.py                     # all scenarios, minutes on one core
    python benchmarks/gate.py --histories 1 --only "2 % worse$"
    python benchmarks/gate.py components RUN_A RUN_B   # the variance components of two checkpoints

The package's own comparison, gate and registry run every night; only the scores are simulated. A
history begins with one model; each night brings a candidate whose true effect is known, and a
promoted candidate is where the next one starts from. "Former" is the gate without an anchor: the
far end of each 95 % bootstrap interval within its tolerance, and a point estimate of the target
that is no worse.

The scores of a clip are those of its identity and its own. With L = ln(L1 of the candidate / L1 of
the current model), on 24 unseen puppets of three clips each, `components` measured between
checkpoints of the configuration `quickstart` (64x64, synthetic puppets; steps 250 → 500 → 625, and
625 → 625 of another run):

    standard deviation of L      identities 0.020 to 0.031, clips of an identity 0.013 to 0.017
    PSNR                         -5 dB per unit of L, and 0.05 to 0.29 dB, 0.15 to 0.23 dB
    SSIM                         -0.3 per unit of L, and 0.004 to 0.010, 0.007 to 0.011
    correlation of the identities' L between two successive steps of training: 0.06

The simulation assumes about 1.5 times the largest of them, because real videos differ more than
puppets do.
"""

import itertools
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.evaluation.scoring import load_extractors, score_frames
from prioritycut_ray.metrics import aggregate
from prioritycut_ray.metrics.aggregate import FrameScores, Tally, value_of
from prioritycut_ray.retraining.comparison import (
    ALL,
    FIXED,
    NEW,
    Comparison,
    Models,
    compare_scores,
)
from prioritycut_ray.retraining.gate import judge
from prioritycut_ray.retraining.registry import count_comparison, promote, read_current
from prioritycut_ray.retraining.settings import Gate
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import Lease, leased
from prioritycut_ray.training.checkpoint import load_animator, save_checkpoint
from prioritycut_ray.training.state import new_state

Floats = NDArray[np.float64]

CLIPS = 3
"""Clips of an identity."""
L1, L1_OF_IDENTITIES, L1_OF_CLIPS = 0.04, 0.25, 0.15
"""L1 of the first model (about that of the paper's Table 1 on VoxCeleb), and the standard
deviations of its logarithm. Assumed."""
IDENTITIES, OF_CLIPS = 0.045, 0.025
"""Standard deviations of L."""
PSNR_PER_L, PSNR_IDENTITIES, PSNR_CLIPS = -5.0, 0.15, 0.30
SSIM_PER_L, SSIM_IDENTITIES, SSIM_CLIPS = -0.3, 0.008, 0.015
TRAITS = 3
"""Directions in which the identities of a holdout differ; see ``Scenario.persistent``."""
SOURCES = ("a", "b", "c")

METRICS = selected_metrics(Measures())[:3]
GATE = Gate(slices={"source": {"l1": 0.002}})
RESAMPLES = {"former": 400, "today's": 10}
"""Of the bootstrap intervals, which only the former gate decides on; 2000 in the package."""


class Scenario(NamedTuple):
    """What the nights are like.

    Attributes:
        name: what is true of every candidate.
        effect: its mean L, the relative change of L1; positive is worse.
        spread: standard deviation of the effect from night to night.
        identities: held-out identities on the first night.
        arriving: new held-out identities a night; they are old once a candidate was promoted.
        on_a_slice: additional effect on the clips of one of three sources, taken from the others.
        heavy: whether identities are Student's t with 2.5 degrees of freedom.
        persistent: share of the variance between identities that is due to fixed traits, so that
            candidates are selected for what suits this holdout.
    """

    name: str
    effect: float
    spread: float = 0.0
    identities: int = 30
    arriving: int = 0
    on_a_slice: float = 0.0
    heavy: bool = False
    persistent: float = 0.0


SCENARIOS = (
    Scenario("no change", 0.0),
    Scenario("1 % worse", 0.01),
    Scenario("2 % worse", 0.02),
    Scenario("5 % worse", 0.05),
    Scenario("1 % better", -0.01),
    Scenario("2 % better", -0.02),
    Scenario("5 % better", -0.05),
    *(
        Scenario(f"{name}, {count} identities", effect, identities=count)
        for count in (8, 100, 300)
        for name, effect in (("no change", 0.0), ("2 % worse", 0.02), ("5 % better", -0.05))
    ),
    Scenario("heavy tails, no change", 0.0, heavy=True),
    Scenario("heavy tails, 2 % worse", 0.02, heavy=True),
    Scenario("heavy tails, 5 % better", -0.05, heavy=True),
    Scenario("new identities arrive, 2 % worse", 0.02, arriving=1),
    Scenario("new identities arrive, 5 % better", -0.05, arriving=1),
    Scenario("fixed traits, no change", 0.0, persistent=0.7),
    Scenario("fixed traits, 1 % worse", 0.01, persistent=0.7),
    Scenario("fixed traits, 2 % worse", 0.02, persistent=0.7),
    Scenario("better or worse at random (SD 2 %)", 0.0, spread=0.02),
    Scenario("better or worse at random, fixed traits", 0.0, spread=0.02, persistent=0.7),
    Scenario("2 % better, but 10 % worse on a third", -0.02, on_a_slice=0.10),
)


class Holdout:
    """Held-out identities, and what every model scores on their clips."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self._scenario, self._rng = scenario, rng
        self.clips: list[Clip] = []
        self.scores: dict[str, Floats] = {"first": np.empty((0, 3))}
        """L1, PSNR and SSIM of each clip, by model."""
        self._traits = np.empty((0, TRAITS))
        self._on_slice = np.empty(0)
        self._seen = 0
        self.add(scenario.identities)
        self.see_all()

    def add(self, identities: int) -> None:
        """Add identities that every model scores like others, up to its own identity effects."""
        rng, first = self._rng, len(self._traits)
        for number in range(first, first + identities):
            source = SOURCES[number % len(SOURCES)]
            self.clips += [_clip(number, clip, source) for clip in range(CLIPS)]
        base = rng.normal(0, L1_OF_IDENTITIES, (identities, 1))
        base = base + rng.normal(0, L1_OF_CLIPS, (identities, CLIPS))
        error = L1 * np.exp(base).ravel()
        level = {name: np.log(scores[:, 0]).mean() for name, scores in self.scores.items() if first}
        for name, known in self.scores.items():
            shift = level[name] - level["first"] if first else 0.0
            added = np.stack(
                [
                    error * np.exp(shift),
                    24 + PSNR_PER_L * (base.ravel() + shift),
                    0.75 + SSIM_PER_L * (base.ravel() + shift),
                ],
                axis=1,
            )
            self.scores[name] = np.concatenate([known, added])
        self._traits = np.concatenate([self._traits, rng.normal(size=(identities, TRAITS))])
        slices = [float(n % len(SOURCES) == 0) for n in range(first, first + identities)]
        self._on_slice = np.concatenate([self._on_slice, slices])

    def see_all(self) -> None:
        """All clips of today belong to the fixed holdout from now on."""
        self._seen = len(self.clips)

    @property
    def fixed(self) -> list[bool]:
        """Whether the current model was evaluated on each clip."""
        return [number < self._seen for number in range(len(self.clips))]

    @property
    def slices(self) -> list[dict[str, str]]:
        """The source of each clip, which its identity begins with."""
        return [{"source": clip.identity[0]} for clip in self.clips]

    def train(self, candidate: str, current: str, effect: float) -> None:
        """Draw the scores of a candidate that starts from the current model."""
        change = self._change(effect)
        l1, psnr, ssim = self.scores[current].T
        self.scores[candidate] = np.stack(
            [
                l1 * np.exp(change),
                psnr + PSNR_PER_L * change + self._noise(PSNR_IDENTITIES, PSNR_CLIPS),
                ssim + SSIM_PER_L * change + self._noise(SSIM_IDENTITIES, SSIM_CLIPS),
            ],
            axis=1,
        )

    def _change(self, effect: float) -> Floats:
        """Return L of each clip; the mean of its exponential over all identities is exp(effect)."""
        scenario, rng, count = self._scenario, self._rng, len(self._traits)
        direction = rng.normal(size=TRAITS)
        suits = self._traits @ direction / np.linalg.norm(direction)
        own = rng.normal(size=count)
        if scenario.heavy:
            own = rng.standard_t(2.5, count) / np.sqrt(2.5 / 0.5)
        share = scenario.persistent
        identities = IDENTITIES * (np.sqrt(1 - share) * own + np.sqrt(share) * suits)
        others = scenario.on_a_slice / (len(SOURCES) - 1)
        sliced = np.where(self._on_slice > 0, scenario.on_a_slice, -others)
        drawn = np.repeat(identities + sliced, CLIPS) + rng.normal(0, OF_CLIPS, count * CLIPS)
        return effect + drawn - (IDENTITIES**2 + OF_CLIPS**2) / 2

    def _noise(self, identities: float, clips: float) -> Floats:
        count = len(self._traits)
        own = np.repeat(self._rng.normal(0, identities, count), CLIPS)
        return own + self._rng.normal(0, clips, count * CLIPS)

    def table(self, models: Models) -> dict[str, dict[str, FrameScores]]:
        """Return the scores as an evaluation does."""
        return {
            name: {
                clip.key: _frame_scores(row)
                for clip, row in zip(self.clips, self.scores[name], strict=True)
            }
            for name in set(models)
        }


def _clip(identity: int, number: int, source: str) -> Clip:
    return Clip(
        key=f"i{identity}-{number}",
        shard="shard-000000.tar",
        offset=0,
        size=1,
        sha256="0" * 64,
        frames=1,
        fps=25,
        width=256,
        height=256,
        identity=f"{source}{identity}",
        split="val",
    )


def _frame_scores(row: Floats) -> FrameScores:
    """Return one frame with these scores; a PSNR is tallied as its mean squared error."""
    values = (row[0], 10 ** (-row[1] / 10), row[2])
    return {
        metric.key: Tally(np.array([value]), np.ones(1))
        for metric, value in zip(METRICS, values, strict=True)
    }


Decide = Callable[[Comparison, Folder, Lease, str], bool]
"""Whether a candidate of this name is promoted."""


def former_gate(comparison: Comparison, models: Folder, lease: Lease, candidate: str) -> bool:
    """Decide without an anchor, by bootstrap intervals and a point estimate of the target."""
    higher = {metric.key: metric.higher_is_better for metric in comparison.metrics}

    def worse(holdout: str, key: str) -> tuple[float, float]:
        found = comparison.differences[holdout][key]
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        return (-found.value, -found.low) if higher[key] else (found.value, found.high)

    return worse(ALL, GATE.target)[0] <= 0 and all(
        worse(holdout, key)[1] <= tolerance
        for holdout in (FIXED, NEW)
        if holdout in comparison.differences and comparison.clips[holdout] > CLIPS
        for key, tolerance in GATE.tolerances.items()
    )


def gate(comparison: Comparison, models: Folder, lease: Lease, candidate: str) -> bool:
    """Decide as `prioritycut retrain` does."""
    night = count_comparison(models, lease, candidate)
    return judge(comparison.changes, comparison.metrics, GATE, night).promote


class Night(NamedTuple):
    """One night.

    Attributes:
        effect: true L of the candidate.
        promoted: whether it became the current model.
        loss: true change of L1 since the first model, in tolerances.
    """

    effect: float
    promoted: bool
    loss: float


def history(scenario: Scenario, decide: Decide, seed: int, nights: int) -> list[Night]:
    """Simulate nights in a row, in a models folder of their own."""
    rng = np.random.default_rng(seed)
    holdout = Holdout(scenario, rng)
    total, passed = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        models = Folder(folder)
        _add_model(folder, "first")
        with leased(models, 600) as lease:
            promote(models, lease, "first", "by hand")
            for number in range(1, nights + 1):
                holdout.add(scenario.arriving)
                effect = rng.normal(scenario.effect, scenario.spread)
                pointer = read_current(models)
                assert pointer is not None
                names = Models(pointer.model, f"night-{number}", pointer.anchor.model)
                holdout.train(names.candidate, names.current, effect)
                comparison = compare_scores(
                    names,
                    holdout.clips,
                    holdout.fixed,
                    holdout.slices,
                    holdout.table(names),
                    METRICS,
                )
                promoted = decide(comparison, models, lease, names.candidate)
                if promoted:
                    _add_model(folder, names.candidate)
                    promote(models, lease, names.candidate, "passed")
                    holdout.see_all()
                    total += effect
                passed.append(Night(effect, promoted, L1 * np.expm1(total) / GATE.tolerances["l1"]))
    return passed


def _add_model(models: str, name: str) -> None:
    """Add a model of random weights; its files are links to those of one checkpoint."""
    folder = Path(models) / name / "run" / "step_0000001"
    folder.mkdir(parents=True)
    for file in _checkpoint().iterdir():
        os.link(file, folder / file.name)


class _Made:
    checkpoint: Path | None = None


def _checkpoint() -> Path:
    """Return a checkpoint of the smallest networks, made once."""
    if _Made.checkpoint is None:
        _Made.checkpoint = Path(tempfile.mkdtemp()) / "checkpoint"
        small = {"block_expansion": 4, "max_features": 8, "num_blocks": 1}
        words = [
            f"model.{part}.{key}={value}"
            for part in ("detector", "dense_motion")
            for key, value in small.items()
        ]
        words += ["model.generator.block_expansion=4", "model.generator.max_features=8"]
        config = load_config("quickstart", [*words, "data.url=none"])
        save_checkpoint(new_state(config, torch.device("cpu")), config, _Made.checkpoint)
    return _Made.checkpoint


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    histories: Annotated[int, typer.Option(help="Histories for each scenario and gate.")] = 3,
    nights: Annotated[int, typer.Option(help="Nights of a history.")] = 90,
    only: Annotated[str, typer.Option(help="Only scenarios whose name matches this pattern.")] = "",
    seed: int = 0,
) -> None:
    """Simulate all scenarios, and check the goals at 30 identities and more."""
    if context.invoked_subcommand:
        return
    print(
        f"{histories} histories of {nights} nights for each scenario and gate, 30 held-out "
        f"identities of {CLIPS} clips unless stated; tolerances "
        f"{', '.join(f'{key} {value:g}' for key, value in GATE.tolerances.items())}; L1 of the "
        f"first model {L1}, so one tolerance is {GATE.tolerances['l1'] / L1:.0%} of it. Losses "
        "are true changes of L1 in tolerances, mean and highest of the histories; negative is a "
        "gain.\n"
    )
    print(
        "| every candidate is | gate | promoted | false promotions | false refusals | power "
        "| loss after 30 nights | after 90 nights |\n|---|---|---|---|---|---|---|---|"
    )
    failed: list[str] = []
    for scenario in SCENARIOS:
        if not re.search(only, scenario.name):
            continue
        for name, decide in (("former", former_gate), ("today's", gate)):
            aggregate.RESAMPLES = RESAMPLES[name]
            done = [history(scenario, decide, seed + n, nights) for n in range(histories)]
            print(_row(scenario, name, done), flush=True)
            if name != "former" and scenario.identities >= 30:
                failed += _missed_goals(scenario, done)
    print("\nGoals: " + ("; ".join(failed) if failed else "all met."))
    raise typer.Exit(bool(failed))


def _row(scenario: Scenario, gate: str, histories: Sequence[Sequence[Night]]) -> str:
    every = [*itertools.chain(*histories)]
    worse = [night for night in every if night.effect > 0 or scenario.on_a_slice]
    better = [night for night in every if night.effect < 0 and not scenario.on_a_slice]
    cells = [
        scenario.name,
        gate,
        _share(every, True),
        _share(worse, True),
        _share(better, False),
        _share(better, True),
        _losses(histories, 30),
        _losses(histories, 90),
    ]
    return f"| {' | '.join(cells)} |"


def _share(nights: Sequence[Night], promoted: bool) -> str:
    if not nights:
        return ""
    count = sum(night.promoted == promoted for night in nights)
    return f"{count / len(nights):.1%} of {len(nights)}"


def _losses(histories: Sequence[Sequence[Night]], nights: int) -> str:
    losses = [own[min(nights, len(own)) - 1].loss for own in histories]
    return f"{np.mean(losses):+.2f}, {max(losses):+.2f}"


def _missed_goals(scenario: Scenario, histories: Sequence[Sequence[Night]]) -> Iterator[str]:
    """Yield the goals that a scenario misses."""
    every = [*itertools.chain(*histories)]
    promoted = np.mean([night.promoted for night in every])
    if scenario.effect >= 0.02 and promoted > 0.05:
        yield f"{scenario.name}: {promoted:.1%} promoted"
    if scenario.effect <= -0.05 and promoted < 0.8:
        yield f"{scenario.name}: power {promoted:.1%}"
    highest = max(night.loss for night in every)
    if highest > 1:
        yield f"{scenario.name}: a loss of {highest:.2f} tolerances"


@app.command()
def components(runs: list[str], identities: int = 24, frames: int = 12, size: int = 64) -> None:
    """Measure the variance components between successive checkpoints on unseen puppets."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    animators = [load_animator(run, device)[0] for run in runs]
    extractors = load_extractors(Measures(), device)
    values: dict[str, list[list[list[float]]]] = defaultdict(list)
    for identity in range(identities):
        video = np.asarray(render_clip(1000 + identity, size=size, frames=CLIPS * frames).frames)
        clips = [video[n * frames : (n + 1) * frames] for n in range(CLIPS)]
        scored = [score_frames(clip, animators, extractors)[1:] for clip in clips]
        for metric in METRICS:
            values[metric.key].append(
                [[value_of(metric.key, model[metric.key]) or 0.0 for model in s] for s in scored]
            )
    print("| from → to | metric | mean change | SD of identities | SD of clips of an identity |")
    print("|---|---|---|---|---|")
    for before, after in itertools.pairwise(range(len(runs))):
        for metric in METRICS:
            scores = np.array(values[metric.key])
            scores = np.log(scores) if metric.key == "l1" else scores
            change = scores[:, :, after] - scores[:, :, before]
            clips_variance = change.var(axis=1, ddof=1).mean()
            variance = change.mean(axis=1).var(ddof=1) - clips_variance / CLIPS
            print(
                f"| {before} → {after} | {'ln L1' if metric.key == 'l1' else metric.label} "
                f"| {change.mean():+.4f} | {max(variance, 0) ** 0.5:.4f} "
                f"| {clips_variance**0.5:.4f} |"
            )


if __name__ == "__main__":
    app()
