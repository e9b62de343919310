"""``prioritycut evaluate``."""

from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from prioritycut_ray.evaluation import Evaluation, evaluate_run
from prioritycut_ray.inference import default_device
from prioritycut_ray.progress import ProgressBar


def evaluate(run: Path, data: str, *, split: str, out: Path | None, console: Console) -> Evaluation:
    """Score a run on held-out clips; writes ``evaluation.json`` and ``columns.png``."""
    with ProgressBar("evaluating", 1.0) as bar:
        evaluation, columns = evaluate_run(
            run,
            data,
            split=split,
            device=default_device(),
            on_clip=lambda done, total, key: bar.update(done / total, f"{done}/{total} {key}"),
        )
    folder = out or run / "evaluation" / split
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(evaluation.model_dump_json(indent=1))
    Image.fromarray(columns.permute(1, 2, 0).numpy()).save(folder / "columns.png")
    for key, reason in evaluation.skipped.items():
        console.print(f"skipped: {key}: {reason}")
    console.print(score_table(evaluation))
    console.print(f"Written: {folder}/evaluation.json, {folder}/columns.png")
    return evaluation


def score_table(evaluation: Evaluation) -> Table:
    """The scores clip by clip, the model beside the baseline."""
    table = Table(title=f"Video reconstruction, split {evaluation.split}, {evaluation.size}²")
    table.add_column("clip")
    for metric in ("L1 ↓", "PSNR dB ↑", "SSIM ↑"):
        table.add_column(f"{metric}\nmodel", justify="right")
        table.add_column(f"{metric}\ncopy source", justify="right")
    rows = [(clip.key, clip.model, clip.copy_source) for clip in evaluation.clips]
    for key, model, copy in [*rows, ("mean", evaluation.model, evaluation.copy_source)]:
        formats = {"l1": ".4f", "psnr": ".2f", "ssim": ".3f"}
        cells = [format(s[name], spec) for name, spec in formats.items() for s in (model, copy)]
        table.add_row(key, *cells, end_section=key != "mean" and key == rows[-1][0])
    return table
