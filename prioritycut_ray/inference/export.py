"""Export the inference path with torch.export, as a graph that runs without this project."""

from copy import deepcopy
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.animate import require_finite
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.keypoints import relative_keypoints

TOLERANCE = 1e-4
"""Largest accepted difference between graph and model, of pixels in [0, 1]; 8 bits hide it."""


class RelativeMotion(nn.Module):
    """Animate a source with driving frames by relative motion (method §6)."""

    def __init__(self, animator: Animator) -> None:
        super().__init__()
        self.animator = animator

    def forward(
        self,
        source: Float[Tensor, "1 3 S S"],
        initial: Float[Tensor, "1 3 S S"],
        driving: Float[Tensor, "B 3 S S"],
    ) -> Float[Tensor, "B 3 S S"]:
        """Animate a source by the motion since the initial driving frame; all values in [0, 1]."""
        detect, still = self.animator.detect, self.animator.encode(source)
        moved = relative_keypoints(still.keypoints, detect(driving), detect(initial))
        return self.animator.render(still, moved).prediction


def export_graph(animator: Animator, size: int, path: Path) -> float:
    """Export the inference path to a ``.pt2`` file, load it, and compare it with the model.

    The graph takes ``source [1, 3, S, S]``, ``initial [1, 3, S, S]`` and ``driving [B, 3, S, S]``,
    float32 in [0, 1], for any B, and returns the animated frames ``[B, 3, S, S]``. It is traced on
    the CPU.

    Args:
        animator: in evaluation mode, on the CPU.
        size: S in pixels.
        path: the file to write.

    Returns:
        The largest difference of any pixel between graph and model, on random images in batches
        of several sizes.

    Raises:
        UserError: they differ by more than :data:`TOLERANCE`.
    """
    # The writer warns of weights in any other memory format.
    planes = deepcopy(animator).to(memory_format=torch.contiguous_format)
    module = RelativeMotion(planes).eval()
    with torch.no_grad():
        program = torch.export.export(
            module,
            _pictures(size, batch=2),
            dynamic_shapes={"source": None, "initial": None, "driving": {0: Dim("batch")}},
        )
    torch.export.save(program, path)
    model = RelativeMotion(animator).eval()
    difference = largest_difference(torch.export.load(path), model, size)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path}: the exported graph differs from the model by {difference:.2g} (limit "
            f"{TOLERANCE:g}); export without --torch-export, and report this"
        )
    return difference


@torch.no_grad()
def largest_difference(program: ExportedProgram, module: nn.Module, size: int) -> float:
    """Return the largest difference between a graph and a model; NaN if the graph outputs NaN.

    Raises:
        UserError: the model outputs NaN or infinite values.
    """
    graph = program.module()
    differences = []
    for batch in (1, 2, 5):
        pictures = _pictures(size, batch=batch)
        expected = module(*pictures)
        require_finite(expected)
        differences.append((graph(*pictures) - expected).abs().max())
    return float(torch.stack(differences).max())


def _pictures(size: int, *, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    source, initial, driving = (
        torch.rand(count, 3, size, size, generator=generator) for count in (1, 1, batch)
    )
    return source, initial, driving
