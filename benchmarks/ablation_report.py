"""Tables and pictures of the ablation of docs/ablation.md, from its scores."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from paired import Differences, Effect, effect, holm, seeds_for

COPY = "copied source"
FIRST_ORDER = "ablation_puppets"
BRANCHES = "ablation_puppets_branches"
"""The search of the primary comparison."""
THIN_PLATE = "ablation_puppets_tps_branches"
CURVES = "ablation_puppets_curves"
CLIPS = "ablation_clips_branches"
SEEDS = {BRANCHES: 17, THIN_PLATE: 6, CURVES: 6, CLIPS: 6}
"""Number of seeds that the design asks for."""
ROWS = {
    COPY: COPY,
    "no_discriminator": "no discriminator",
    "baseline": "baseline",
    "unet": "+ U-Net",
    "cutmix": "+ CutMix",
    "prioritycut": "+ PriorityCut",
    "cutmix_additive": "+ CutMix, additive",
    "prioritycut_additive": "+ PriorityCut, additive",
}
"""Names of rows in tables, in their order."""
COMPARED = {"cutmix", "prioritycut"}
"""Rows without which a search, or a seed of it, is not compared."""
METRICS = {
    "disoccluded": "dis-occluded",
    "rim": "rim",
    "elsewhere": "elsewhere",
    "l1": "L1",
    "ssim": "SSIM",
    "proxy_efficientnet_lite0": "proxy",
}
HIGHER_IS_BETTER = ("ssim",)
TASKS = ("reconstruction", "relative")
CURVE_OF = {
    "k (% of the foreground)": {5: "k5", 10: "k10", 20: "prioritycut", 40: "k40", 80: "k80"},
    "probability of mixing": {0.25: "p025", 0.5: "prioritycut", 1.0: "p100"},
}
GOAL = 0.015
"""Half-width of the primary interval, as a share of the mean of CutMix."""
MARGIN = 0.025
"""An effect smaller than this share of the mean of CutMix is excluded as one of interest."""


class Comparison(NamedTuple):
    """A paired comparison of two rows.

    Attributes:
        first: name of the row ...
        second: ... and of the one that it is compared with.
        task: of the puppet benchmark.
        metric: key of the metric.
        most_hidden: only the half of the puppets with the largest dis-occluded area.
    """

    first: str
    second: str
    task: str
    metric: str
    most_hidden: bool = False

    def __str__(self) -> str:
        """Return the text in tables."""
        names = " − ".join(ROWS.get(row, row).removeprefix("+ ") for row in self[:2])
        half = ", most hidden half" if self.most_hidden else ""
        return f"{names} | {self.task}{half} | {METRICS[self.metric]}"


PRIMARY = Comparison("prioritycut", "cutmix", "reconstruction", "disoccluded")
PROXY = "proxy_efficientnet_lite0"
SECONDARY = [
    *(
        Comparison("cutmix", "unet", "reconstruction", metric)
        for metric in ("l1", "ssim", PROXY, "disoccluded")
    ),
    Comparison("prioritycut", "cutmix", "relative", "disoccluded"),
    Comparison("prioritycut", "cutmix", "relative", "disoccluded", most_hidden=True),
    Comparison("prioritycut", "cutmix", "relative", PROXY, most_hidden=True),
    *(
        Comparison("prioritycut", "cutmix", "reconstruction", metric)
        for metric in ("l1", PROXY, "rim", "elsewhere")
    ),
    *(
        Comparison(*rows, "reconstruction", "disoccluded")
        for rows in (("prioritycut", "unet"), ("unet", "baseline"), ("prioritycut", "baseline"))
    ),
]
"""In the order of docs/ablation.md; the primary comparison joins them where it is not primary."""
ADDITIVE = [
    Comparison("prioritycut_additive", "cutmix_additive", "reconstruction", metric)
    for metric in ("disoccluded", "l1", PROXY)
]
"""The two masks where mixing adds to the ordinary losses, corrected together."""


class Compared(NamedTuple):
    """A comparison and its result.

    Attributes:
        comparison: which rows.
        effect: of the differences, first − second.
        reference: mean of the second row.
        deviation: standard deviation over seeds of the mean difference; NaN with one seed.
    """

    comparison: Comparison
    effect: Effect
    reference: float
    deviation: float

    def percent(self, value: float) -> float:
        """Return a difference in per cent of the second row's mean."""
        return 100 * value / self.reference


def report(tables: dict[str, pd.DataFrame]) -> str:
    """Return the comparison of all rows in Markdown.

    Args:
        tables: scores by the name of the search.
    """
    families = families_of(tables)
    parts = [family_report(name, tables[name]) for name in families]
    others = [name for name in tables if name not in families]
    parts += [
        f"### {name}: nothing to compare yet\n\n{rows_table(tables[name])}" for name in others
    ]
    if BRANCHES in families and CURVES in tables:
        parts.append(f"### Curves\n\n{curves_table(with_middle(tables))}")
        if additive := comparable(ADDITIVE, tables[CURVES]):
            parts.append(f"Additive mixing:\n\n{corrected_table(tables[CURVES], additive)}")
    return "\n\n".join(parts) or "nothing is scored yet; give the folder of a search"


def draw_all(tables: dict[str, pd.DataFrame], out: Path) -> None:
    """Draw the pictures of :func:`report` into a folder."""
    if BRANCHES in families_of(tables):
        draw_seeds(tables[BRANCHES], out / "seeds.png")
        if CURVES in tables:
            draw_curves(with_middle(tables), out / "curves.png")


def families_of(tables: dict[str, pd.DataFrame]) -> list[str]:
    """Return the names of the searches that have a seed with all rows to compare."""
    return [name for name in tables if complete_seeds(tables[name])]


def family_report(name: str, table: pd.DataFrame) -> str:
    """Report the rows of one family, and compare them if all pass the gate."""
    seeds = complete_seeds(table)
    planned = SEEDS.get(name, len(seeds))
    partial = "" if len(seeds) >= planned else ": **partial**, decides nothing yet"
    title = f"### {name}: {len(seeds)} of {planned} seeds with the rows to compare{partial}"
    table = table[table["seed"].isin(seeds) | (table["row"] == COPY)]
    parts = [title, rows_table(table)]
    gate = [
        compare(table, Comparison(row, COPY, "reconstruction", "l1")) for row in rows_of(table)[1:]
    ]
    failed = [ROWS[one.comparison.first] for one in gate if one.effect.high >= 0]
    parts.append("Gate: every row against the copied source, L1 of the whole frame.")
    parts.append(effects_table(gate, corrected=None))
    if failed:
        return "\n\n".join([*parts, f"Not compared: {', '.join(failed)} did not beat the copy."])
    if name == BRANCHES:
        parts.append(primary_text(compare(table, PRIMARY), seeds_planned=planned))
    others = SECONDARY if name == BRANCHES else [PRIMARY, *SECONDARY]
    parts.append(corrected_table(table, comparable(others, table)))
    return "\n\n".join(parts)


def rows_of(table: pd.DataFrame) -> list[str]:
    """Return the rows of a table, in the order of the ablation."""
    present = list(dict.fromkeys(table["row"]))
    order = {row: place for place, row in enumerate(ROWS)}
    return sorted(present, key=lambda row: (order.get(row, len(order)), row))


def complete_seeds(table: pd.DataFrame) -> list[int]:
    """Return the seeds that all rows to compare have been trained with."""
    rows = table[table["row"] != COPY].groupby("seed")["row"].agg(set)
    return [int(seed) for seed, present in rows.items() if present >= COMPARED]


def values(table: pd.DataFrame, row: str, task: str, metric: str) -> pd.DataFrame:
    """Return a metric of a row, `[seeds, puppets]`."""
    chosen = table[(table["row"] == row) & (table["task"] == task)]
    return chosen.pivot(index="seed", columns="puppet", values=metric)


def compare(table: pd.DataFrame, comparison: Comparison) -> Compared:
    """Compare two rows on the seeds and puppets that both have."""
    differences, reference = paired_differences(table, comparison)
    by_seed = differences.mean(axis=1)
    deviation = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else math.nan
    return Compared(comparison, effect(differences), reference, deviation)


def paired_differences(table: pd.DataFrame, comparison: Comparison) -> tuple[Differences, float]:
    """Return first − second, `[seeds, puppets]`, and the mean of the second row.

    A puppet without a single pixel of a region is left out.

    Raises:
        ValueError: an error is infinite: a prediction was not finite.
    """
    first, second = (
        values(table, row, comparison.task, comparison.metric) for row in comparison[:2]
    )
    for row, errors in zip(comparison[:2], (first, second), strict=True):
        if not (wrong := errors.index[np.isinf(errors).any(axis=1)]).empty:
            raise ValueError(f"{row}: predictions of seed {wrong[0]} are not finite: it diverged")
    if comparison.second == COPY:
        second = pd.DataFrame(
            np.repeat(second.to_numpy(), len(first), axis=0), first.index, second.columns
        )
    if comparison.most_hidden:
        share = values(table, COPY, comparison.task, "share").iloc[0]
        first = first[share.nlargest(len(share) // 2).index]
    difference = (first - second).dropna(how="all").dropna(axis="columns")
    return difference.to_numpy(), float(
        second.loc[difference.index, difference.columns].mean().mean()
    )


def rows_table(table: pd.DataFrame) -> str:
    """Return the mean of every metric over seeds and puppets, with the deviation over seeds."""
    metrics = [metric for metric in METRICS if metric in table]
    names = [f"{METRICS[key]} {'↑' if key in HIGHER_IS_BETTER else '↓'}" for key in metrics]
    lines = []
    for task in (each for each in TASKS if each in set(table["task"])):
        lines += [
            f"\n{task}:\n",
            f"| row | seeds | {' | '.join(names)} |",
            "| --- " * (len(names) + 2) + "|",
        ]
        for row in rows_of(table):
            cells = []
            for metric in metrics:
                by_seed = values(table, row, task, metric).mean(axis=1)
                spread = f" ± {by_seed.std(ddof=1):.4f}" if len(by_seed) > 1 else ""
                cells.append(f"{by_seed.mean():.4f}{spread}")
            seeds = "" if row == COPY else len(by_seed)
            lines.append(f"| {ROWS.get(row, row)} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def effects_table(found: Sequence[Compared], corrected: Sequence[float] | None) -> str:
    """Return the results of comparisons, relative to the second row."""
    lines = [
        "| comparison | task | metric | difference (%), 95 % interval | probability of improvement "
        "| seeds | p, corrected |",
        "| --- " * 7 + "|",
    ]
    for place, one in enumerate(found):
        p = "" if corrected is None or math.isnan(corrected[place]) else f"{corrected[place]:.3f}"
        lines.append(
            f"| {one.comparison} | {interval_text(one)} | {improvement_text(one)} "
            f"| {one.effect.seeds} | {p} |"
        )
    return "\n".join(lines)


def corrected_table(table: pd.DataFrame, comparisons: Sequence[Comparison]) -> str:
    """Compare rows, and correct the p values together by Holm's procedure."""
    found = [compare(table, one) for one in comparisons]
    return effects_table(found, corrected=holm([one.effect.p for one in found]))


def interval_text(one: Compared) -> str:
    """Return a difference and its interval in per cent."""
    mean, low, high = (one.percent(value) for value in one.effect[:3])
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")


def improvement_text(one: Compared) -> str:
    """Return the probability that the first row is better, with its interval."""
    shares = (one.effect.improved, one.effect.improved_low, one.effect.improved_high)
    if one.comparison.metric in HIGHER_IS_BETTER:
        shares = (1 - shares[0], 1 - shares[2], 1 - shares[1])
    return "{:.2f} [{:.2f}, {:.2f}]".format(*shares)


def verdict(one: Compared) -> str:
    """Return what the primary comparison says, by the rule of docs/ablation.md."""
    low, high = (value / one.reference for value in (one.effect.low, one.effect.high))
    if high < 0:
        return "PriorityCut lowers the error"
    if low > 0:
        return "PriorityCut raises the error"
    if max(-low, high) <= MARGIN:
        return f"an effect of {100 * MARGIN:g} % or more is excluded"
    return "undecided"


def primary_text(one: Compared, seeds_planned: int) -> str:
    """Return the result of the primary comparison in words."""
    result = verdict(one)
    if one.effect.seeds < seeds_planned:
        result = f"{one.effect.seeds} of {seeds_planned} seeds do not decide"
    width = one.percent(one.effect.half_width)
    deviation = one.deviation / one.reference
    needed = (
        f"; by the deviation over seeds so far ({100 * deviation:.2f} %), a half-width over seeds "
        f"of {100 * GOAL:g} % takes {seeds_for(GOAL, deviation)} seeds"
        if math.isfinite(deviation)
        else ""
    )
    name = str(one.comparison).replace(" | ", ", ")
    return (
        f"Primary comparison ({name}): {interval_text(one)} %, probability of improvement "
        f"{improvement_text(one)}. **{result[:1].upper()}{result[1:]}.** "
        f"Half-width {width:.2f} % (goal {100 * GOAL:g} %){needed}."
    )


def with_middle(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Add the rows of the branches that the curves share, with the seeds of the curves."""
    curves, family = tables[CURVES], tables[BRANCHES]
    shared = family["row"].isin(["prioritycut", "cutmix"]) & family["seed"].isin(curves["seed"])
    return pd.concat([curves[curves["row"] != COPY], family[shared]])


def curves_table(table: pd.DataFrame) -> str:
    """Return the differences of each point of the curves to CutMix."""
    found = [
        compare(table, Comparison(row, "cutmix", "reconstruction", "disoccluded"))
        for row in rows_of(table)
        if any(row in curve.values() for curve in CURVE_OF.values())
    ]
    return effects_table(found, corrected=None)


def comparable(comparisons: Sequence[Comparison], table: pd.DataFrame) -> list[Comparison]:
    """Return the comparisons whose rows, task and metric are in a table."""
    rows, tasks = set(table["row"]), set(table["task"])
    return [
        one
        for one in comparisons
        if rows.issuperset(one[:2]) and one.task in tasks and one.metric in table
    ]


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Draw the difference to CutMix against k and against the probability of mixing."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    present = set(table["row"])
    for axes, (label, points) in zip(
        figure.subplots(1, len(CURVE_OF), sharey=True), CURVE_OF.items(), strict=True
    ):
        shown = {
            x: compare(table, Comparison(row, "cutmix", "reconstruction", "disoccluded"))
            for x, row in points.items()
            if row in present
        }
        ends = [[one.percent(value) for value in one.effect[:3]] for one in shown.values()]
        mean, low, high = np.array(ends).T
        axes.errorbar(list(shown), mean, yerr=[mean - low, high - mean], fmt="o-", capsize=3)
        axes.axhline(0, color="grey", lw=0.8)
        axes.set_xlabel(label)
        axes.set_ylabel("error in dis-occluded pixels\nrelative to CutMix (%)")
    figure.savefig(path, dpi=120)


def draw_seeds(table: pd.DataFrame, path: Path) -> None:
    """Draw the error in dis-occluded pixels of every row, with a line for each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = [row for row in rows_of(table) if row != COPY]
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        columns = {row: values(table, row, task, "disoccluded").mean(axis=1) for row in rows}
        frame = pd.DataFrame(columns)
        for seed in frame.index:
            axes.plot(range(len(rows)), frame.loc[seed], "o-", color="#3b82f6", alpha=0.35, ms=3)
        axes.plot(range(len(rows)), frame.mean(), "k_", ms=24, mew=2, label="mean")
        axes.set_xticks(range(len(rows)), [ROWS.get(row, row) for row in rows])
        axes.set_title(task, fontsize="medium")
        axes.set_ylabel("L1 in dis-occluded pixels")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
