"""``prioritycut export``."""

from pathlib import Path

from rich.console import Console

from prioritycut_ray.evaluation.model_card import card_scores, model_card
from prioritycut_ray.inference.export import export_graph
from prioritycut_ray.inference.onnx_export import (
    DETECTOR_NAME,
    RENDERER_NAME,
    export_onnx,
    require_onnx,
)
from prioritycut_ray.inference.output import check_new_folder, new_folder
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.runs.locate import find_checkpoint

GRAPH_NAME = "animator.pt2"
CARD_NAME = "README.md"


def export(
    run: str | Path, out: Path, *, graph: bool, onnx: bool = False, console: Console
) -> None:
    """Export a checkpoint as a self-contained folder; see docs/animation.md.

    Args:
        run: a run, for its newest checkpoint, a checkpoint or ``RUN/best``; a folder or an fsspec
            URL.
        out: new folder.
        graph: also export the inference path with torch.export, and compare it with the model.
        onnx: also export detector and renderer to ONNX, and compare them with the model.
        console: where to print the result.

    Raises:
        UserError: the run does not exist, the folder is in use, a graph differs, or the extra
            ``onnx`` is not installed.
    """
    if onnx:
        require_onnx()
    check_new_folder(out)
    checkpoint = find_checkpoint(run)
    animator = Animator.from_pretrained(checkpoint, device="cpu")
    scores = list(card_scores(checkpoint))
    with new_folder(out) as folder:
        animator.save_pretrained(folder)
        difference = None
        if graph:
            difference = export_graph(animator.network, animator.size, folder / GRAPH_NAME)
        graphs = export_onnx(animator.network, animator.size, folder) if onnx else None
        card = model_card(animator, checkpoint, scores, difference, graphs)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
    if difference is not None:
        console.print(f"Graph: {GRAPH_NAME} matches the model to within {difference:.1e}")
    if graphs is not None:
        console.print(
            f"ONNX:  {DETECTOR_NAME} and {RENDERER_NAME} match the model to within "
            f"{graphs.difference:.1e}"
        )
    if not scores:
        console.print(
            "note: the model card has no scores; run `prioritycut evaluate` on this checkpoint "
            "first to include them"
        )
    console.print(f"Model: {out}", markup=False)
