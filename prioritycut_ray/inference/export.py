"""The inference path as a graph that runs without this project (torch.export)."""

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
"""Largest difference between graph and model, of pixels in [0, 1]: below what 8 bits show."""


class RelativeMotion(nn.Module):
    """Source and driving frames to pictures, by relative motion (method §6)."""

    def __init__(self, animator: Animator) -> None:
        super().__init__()
        self.animator = animator

    def forward(
        self,
        source: Float[Tensor, "1 3 S S"],
        initial: Float[Tensor, "1 3 S S"],
        driving: Float[Tensor, "B 3 S S"],
    ) -> Float[Tensor, "B 3 S S"]:
        """Move a source by the change from the initial driving frame; all in [0, 1]."""
        detect, still = self.animator.detect, self.animator.encode(source)
        moved = relative_keypoints(still.keypoints, detect(driving), detect(initial))
        return self.animator.render(still, moved).prediction


def export_graph(animator: Animator, size: int, path: Path) -> float:
    """Write the inference path as a ``.pt2`` file, read it again, and compare it with the model.

    The graph takes ``source [1, 3, S, S]``, ``initial [1, 3, S, S]`` and ``driving [B, 3, S, S]``,
    float32 in [0, 1], for any B, and gives the animated frames ``[B, 3, S, S]``. It was traced on
    the CPU.

    Args:
        animator: in evaluation mode, on the CPU.
        size: S in pixels.
        path: of the file.

    Returns:
        The largest difference of any pixel between the file and the model, over random pictures
        in batches of several sizes.

    Raises:
        UserError: the two differ by more than :data:`TOLERANCE`.
    """
    # Its writer warns of weights in any other layout.
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
            f"{path}: the exported graph differs from the model by {difference:.2g} (at most "
            f"{TOLERANCE:g}); export without --torch-export and report it"
        )
    return difference


@torch.no_grad()
def largest_difference(program: ExportedProgram, module: nn.Module, size: int) -> float:
    """Between the pictures of a graph and of a model; NaN if those of the graph are.

    Raises:
        UserError: those of the model are NaN or infinite.
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
