"""The ablation of docs/ablation.md: score trained trials, and compare their rows.

    prioritycut tune tune_configs/ablation_puppets.yaml data.url=data/puppets storage=runs
    python benchmarks/ablation.py runs/ablation_puppets    # score what has finished; compare
    python benchmarks/ablation.py --clips data/clips runs/ablation_clips_branches   # real clips
    python benchmarks/ablation.py                          # compare what is scored
    python benchmarks/ablation.py --branches FILE runs/ablation_puppets > branches.yaml

Scores are kept for each trial and puppet (or clip) in ``OUT/NAME.csv``, where NAME is that of the
search. Trials that have been scored are not scored again, and their checkpoints may be lost. The
last command writes a search whose trials start from the finished runs of another one.
"""

import hashlib
import json
import math
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
import yaml
from ablation_report import CLIPS, COPY, THIN_PLATE, draw_all, report
from command_line import run_command
from numpy.typing import NDArray

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.evaluation.puppets import Scene, scenes
from prioritycut_ray.evaluation.scoring import cached_extractors, move, similarity
from prioritycut_ray.inference.animate import to_tensor
from prioritycut_ray.metrics.aggregate import mask_not_finite, value_of
from prioritycut_ray.metrics.truth import region_errors
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.precision import float32_products
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.runs.compatibility import MAY_CHANGE, flattened
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.search.results import collect
from prioritycut_ray.search.space import VARIANT, SearchConfig, describe, load_search
from prioritycut_ray.storage.atomic import write_atomically
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.paths import absolute
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.video.random_access import read_all

TASKS = ("reconstruction", "relative")
FRAMES = 32
SCORED = slice(3, None, 4)
"""Frames 3, 7, … of each clip: consecutive ones hardly differ, and the first is the source."""
SEED = "train.seed"
OF_SEED = ", seed "
"""Between the row and the seed in the name of a branch, which is a variant of its search."""
BRANCH_SEED = 200
"""Added to the seed of a branch: it sees other pairs than the run that it starts from."""
CPU = torch.device("cpu")


class Shown(NamedTuple):
    """The frames of one task that are scored; the attributes are those of :class:`Scene`.

    Attributes:
        source: `[S, S, 3]`.
        driving: `[1 + T, S, S, 3]`, the first frame included, which relative motion needs.
        true: `[T, S, S, 3]`.
        masks: the regions of the true frames; empty where they are not known.
        relative: whether the motion is applied relative to the first driving frame.
    """

    source: NDArray[np.uint8]
    driving: NDArray[np.uint8]
    true: NDArray[np.uint8]
    masks: dict[str, NDArray[np.bool_]]
    relative: bool


HeldOut = Callable[[int], list[dict[str, Shown]]]
"""Returns, for a size of the frames, the tasks of every held-out puppet or clip."""


def main(
    searches: Annotated[list[str] | None, typer.Argument(help="Folders STORAGE/NAME.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the scores and pictures.")] = Path(
        "docs/ablation"
    ),
    puppets: Annotated[int, typer.Option(min=2, help="Number of held-out puppets.")] = 50,
    clips: Annotated[
        str | None, typer.Option(help="Data set whose test clips are scored instead of puppets.")
    ] = None,
    branches: Annotated[
        Path | None,
        typer.Option(help="Search file to print with the runs of SEARCHES to start from."),
    ] = None,
) -> None:
    """Score the finished trials of searches, and print the comparison of all that is scored."""
    if branches is not None:
        print(branched(branches, searches or [], out), end="")
        return
    held_out = partial(held_out_clips, clips) if clips else partial(held_out_puppets, puppets)
    for search in searches or []:
        score_search(Folder(search.rstrip("/")), out, held_out)
    tables = {path.stem: read_scores(path) for path in sorted(out.glob("*.csv"))}
    print(report(tables))
    draw_all(tables, out)


def score_search(search: Folder, out: Path, held_out: HeldOut) -> None:
    """Score the finished trials of a search that have not been scored yet."""
    name = search.url.rpartition("/")[2]
    trials = finished_trials(search)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.csv"
    known = read_scores(path).to_dict("records") if path.exists() else []
    with ProgressBar(f"scoring {name}", len(trials)) as bar:
        for done, (row, seed, run) in enumerate(trials, start=1):
            if (row, seed) not in {(line["row"], line["seed"]) for line in known}:
                known += score_trial(run, row, seed, held_out, known)
                write_scores(known, path)
            bar.update(done, f"{done}/{len(trials)}")


def finished_trials(search: Folder) -> list[tuple[str, int, str]]:
    """Return the row, the seed and the run's folder of every finished trial of a search."""
    samples = json.loads(search.read("search.json"))["train"]["samples"]
    return [
        (*row_and_seed(trial.parameters), f"{search.url}/runs/{trial.key}")
        for trial in collect(Folder(f"{search.url}/tune"), samples)
        if trial.status == "finished"
    ]


def row_and_seed(parameters: dict[str, Any]) -> tuple[str, int]:
    """Name a trial by its parameters without the seed, and a variant by its name alone."""
    row, _, branch = str(parameters.get(VARIANT, "")).partition(OF_SEED)
    others = {key: value for key, value in parameters.items() if key not in (SEED, VARIANT)}
    seed = int(branch or parameters[SEED])
    return ", ".join(filter(None, [row, describe(others)])), seed


def score_trial(
    run: str, row: str, seed: int, held_out: HeldOut, known: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the scores of a trained run, and of the copied source unless they are known.

    Args:
        run: folder of the run.
        row: name of the run's row.
        seed: of the run.
        held_out: what is scored.
        known: lines of the same table.

    Raises:
        UserError: a run of the same row was trained with other values.
    """
    animator, config = load_animator(find_checkpoint(run), CPU)
    setting = setting_of(config)
    other = next((x for x in known if x["row"] == row and x["setting"] != setting), None)
    if other is not None:
        raise UserError(
            f"{run}: was trained with other values than {row} with seed {other['seed']}; choose "
            "another --out"
        )
    shown = held_out(config.data.size)
    lines = _lines({"row": row, "seed": seed, "setting": setting}, shown, animator)
    if not any(line["row"] == COPY for line in known):
        lines += _lines({"row": COPY, "seed": 0, "setting": ""}, shown, None)
    return lines


def setting_of(config: Config) -> str:
    """Return a digest of all that changes the scores of a run, but for its seed.

    Defaults are left out: a later version may have more of them. So is the run that a branch starts
    from, which differs by its seed.
    """
    hidden = {"name": True, "init": True, "train": {"seed"}}
    tree = config.model_dump(mode="json", exclude=hidden, exclude_defaults=True)
    values = {
        key: value
        for key, value in flattened(tree).items()
        if key == "train.samples" or not key.startswith(MAY_CHANGE)
    }
    values["scored"] = f"{SCORED} of {FRAMES}"
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@cache
def held_out_puppets(puppets: int, size: int) -> list[dict[str, Shown]]:
    """Render the scenes of the benchmark's puppets once, for all trials."""
    rendered: list[dict[str, Shown]] = []
    with ProgressBar("rendering puppets", puppets) as bar:
        for number in range(puppets):
            found = scenes(number, size, FRAMES)
            rendered.append({task: thinned(scene) for task, scene in found if task in TASKS})
            bar.update(number + 1, f"{number + 1}/{puppets}")
    return rendered


def thinned(scene: Scene) -> Shown:
    """Keep the frames that are scored."""
    return Shown(
        source=scene.source,
        driving=np.concatenate([scene.driving[:1], scene.driving[SCORED]]),
        true=scene.true[SCORED],
        masks={name: mask[SCORED] for name, mask in scene.masks.items()},
        relative=scene.relative,
    )


@cache
def held_out_clips(data: str, size: int) -> list[dict[str, Shown]]:
    """Decode the test clips of a data set once, to be rebuilt from their first frames."""
    data = absolute(data)
    shown = []
    for clip in clips_of(read_index(data), "test"):
        frames = read_all(read_clip(data, clip), size)
        driving = np.concatenate([frames[:1], frames[SCORED]])
        shown.append({"reconstruction": Shown(frames[0], driving, driving[1:], {}, relative=False)})
    return shown


def _lines(
    own: dict[str, Any], shown: Sequence[dict[str, Shown]], animator: Animator | None
) -> list[dict[str, Any]]:
    return [
        own | {"puppet": number, "task": task} | _share(scene) | score_scene(scene, animator)
        for number, found in enumerate(shown)
        for task, scene in found.items()
    ]


def _share(scene: Shown) -> dict[str, float]:
    return {"share": float(scene.masks["disoccluded"].mean())} if scene.masks else {}


@float32_products(convolutions="ieee")
@torch.inference_mode()
def score_scene(scene: Shown, animator: Animator | None) -> dict[str, float | None]:
    """Return the errors of an animator in a scene, by metric; without one, the source is copied.

    An error is None where it is not defined, and infinite where a prediction is not finite.
    """
    true = to_tensor(scene.true, CPU)
    if animator is None:
        frames = to_tensor(scene.source[None], CPU).expand_as(true)
        finite = np.ones(len(frames), dtype=bool)
    else:
        moved = move(animator, scene.source, scene.driving, relative=scene.relative)
        frames, finite = moved.frames[1:], moved.finite[1:]
    scores = similarity(frames, true, cached_extractors(Measures(), CPU))
    scores |= region_errors(frames, true, scene.masks)
    found = {key: value_of(key, tally) for key, tally in mask_not_finite(scores, finite).items()}
    return {key: math.inf if x is not None and math.isnan(x) else x for key, x in found.items()}


def read_scores(path: Path) -> pd.DataFrame:
    """Read a table of scores."""
    return pd.read_csv(path, dtype={"setting": str}, keep_default_na=False, na_values=[""])


def write_scores(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a table of scores, with five digits of each."""
    text = pd.DataFrame(lines).to_csv(index=False, float_format="%.5g", lineterminator="\n")
    write_atomically(path, text.encode())


def branched(file: Path, trunks: Sequence[str], out: Path) -> str:
    """Return a search file whose trials start from the finished runs of the same seed.

    Trials that are scored are left out, and so are those whose run to start from is missing.

    Args:
        file: the search file with rows and seeds.
        trunks: folders of the searches with the runs to start from.
        out: folder of the scores.

    Raises:
        UserError: no trial is left.
    """
    search = load_search(file, smoke=False)
    tree = yaml.safe_load(file.read_text())
    runs = {
        (row, seed): run
        for trunk in trunks
        for row, seed, run in finished_trials(Folder(absolute(trunk)))
    }
    scored = scored_trials(search, out)
    left = [
        (row, seed, runs[trunk])
        for seed in search.space[SEED].grid or ()
        for row in search.variants
        if (trunk := (trunk_of(row, search.name), seed)) in runs and (row, seed) not in scored
    ]
    if not left:
        raise UserError(
            f"{file}: no trial is left that has a finished run to start from; give the folders of "
            f"the searches with those runs, or another --out than {out} to train all trials again"
        )
    rows = tree["variants"]  # those of `search` have numbers that keep their spelling
    tree["variants"] = {
        f"{row}{OF_SEED}{seed}": {**rows[row], "init": run, SEED: seed + BRANCH_SEED}
        for row, seed, run in left
    }
    kept = {key: value for key, value in tree.items() if key not in ("space", "smoke")}
    return yaml.safe_dump(kept, sort_keys=False)


def trunk_of(row: str, search: str) -> str:
    """Return the row whose run a branch of a row starts from."""
    if search in (THIN_PLATE, CLIPS):
        return "no_discriminator"
    return "baseline" if row == "baseline" else "unet"


def scored_trials(search: SearchConfig, out: Path) -> set[tuple[str, int]]:
    """Return the row and the seed of every trial of a search that is scored."""
    path = out / f"{search.name}.csv"
    if not path.exists():
        return set()
    table = read_scores(path)
    return set(zip(table["row"], table["seed"], strict=True))


if __name__ == "__main__":
    run_command(main)
