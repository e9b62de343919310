"""Export the inference path with torch.export, as a graph that runs without this project."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.animate import require_finite
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.keypoints import Keypoints, relative_keypoints

TOLERANCE = 1e-4
"""Largest accepted difference between graph and model, of pixels in [0, 1]; 8 bits hide it."""


class Detector(nn.Module):
    """Find keypoints; see :meth:`~prioritycut_ray.models.animator.Animator.detect`."""

    def __init__(self, animator: Animator) -> None:
        super().__init__()
        self.animator = animator

    def forward(self, frames: Float[Tensor, "B 3 S S"]) -> tuple[Tensor, ...]:
        """Return positions `[B, K, 2]`; and jacobians `[B, K, 2, 2]`, if the family has them."""
        return tuple(part for part in self.animator.detect(frames) if part is not None)


class Renderer(nn.Module):
    """Animate a source by relative motion, given the keypoints of all frames (method §6)."""

    def __init__(self, animator: Animator) -> None:
        super().__init__()
        self.animator = animator

    def forward(
        self,
        source: Float[Tensor, "1 3 S S"],
        still: tuple[Tensor, ...],
        initial: tuple[Tensor, ...],
        driving: tuple[Tensor, ...],
    ) -> Float[Tensor, "B 3 S S"]:
        """Animate a source by the motion since the initial driving frame; pictures in [0, 1].

        Args:
            source: the source frame.
            still: what :class:`Detector` returns for the source.
            initial: the same for the initial driving frame; that of the source itself for absolute
                motion.
            driving: the same for B driving frames.
        """
        keypoints = Keypoints(*still)
        moved = relative_keypoints(keypoints, Keypoints(*driving), Keypoints(*initial))
        encoded = self.animator.encode(source)._replace(keypoints=keypoints)
        return self.animator.render(encoded, moved).prediction


class RelativeMotion(nn.Module):
    """Animate a source with driving frames by relative motion (method §6)."""

    def __init__(self, animator: Animator) -> None:
        super().__init__()
        self.detect, self.render = Detector(animator), Renderer(animator)

    def forward(
        self,
        source: Float[Tensor, "1 3 S S"],
        initial: Float[Tensor, "1 3 S S"],
        driving: Float[Tensor, "B 3 S S"],
    ) -> Float[Tensor, "B 3 S S"]:
        """Animate a source by the motion since the initial driving frame; all values in [0, 1]."""
        detect = self.detect
        animated: Tensor = self.render(source, detect(source), detect(initial), detect(driving))
        return animated


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
    module = RelativeMotion(in_planes(animator)).eval()
    with torch.no_grad():
        program = torch.export.export(
            module,
            pictures(size, batch=2),
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


def largest_difference(program: ExportedProgram, module: nn.Module, size: int) -> float:
    """Return the largest difference between a graph and a model; NaN if the graph outputs NaN.

    Raises:
        UserError: the model outputs NaN or infinite values.
    """
    return difference_of(program.module(), module, size)


@torch.no_grad()
def difference_of(graph: Callable[..., Tensor], module: nn.Module, size: int) -> float:
    """Return the largest difference between what a graph and a model make of random pictures.

    Args:
        graph: maps source, initial and driving frames to pictures, as :class:`RelativeMotion` does.
        module: the model.
        size: of the pictures.

    Raises:
        UserError: the model outputs NaN or infinite values.
    """
    differences = []
    for batch in (1, 2, 5):
        inputs = pictures(size, batch=batch)
        expected = module(*inputs)
        require_finite(expected)
        differences.append((graph(*inputs) - expected).abs().max())
    return float(torch.stack(differences).max())


def in_planes(animator: Animator) -> Animator:
    """Return a copy whose weights are contiguous; writers warn of any other memory format."""
    return deepcopy(animator).to(memory_format=torch.contiguous_format)


def pictures(size: int, *, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random pictures as the inputs of :class:`RelativeMotion`."""
    generator = torch.Generator().manual_seed(batch)
    source, initial, driving = (
        torch.rand(count, 3, size, size, generator=generator) for count in (1, 1, batch)
    )
    return source, initial, driving
