"""Export a model as two ONNX graphs, for a web page, a phone, or a server without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.export import (
    TOLERANCE,
    Detector,
    RelativeMotion,
    Renderer,
    difference_of,
    in_planes,
    pictures,
)
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.keypoints import Keypoints

DETECTOR_NAME = "detector.onnx"
RENDERER_NAME = "renderer.onnx"
OPSET = 18
"""Version of ONNX's operators; GridSample exists since 16."""


class OnnxGraphs(NamedTuple):
    """What was exported.

    Attributes:
        keypoints: name of each output of the detector.
        num_keypoints: K.
        difference: largest difference of any pixel between the graphs and the model.
    """

    keypoints: list[str]
    num_keypoints: int
    difference: float


def require_onnx() -> None:
    """Check that the optional dependencies are installed.

    Raises:
        UserError: one of them is not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--onnx requires {error.name}: install it with `pip install 'prioritycut_ray[onnx]'`"
        ) from error


@torch.no_grad()
def export_onnx(animator: Animator, size: int, folder: Path) -> OnnxGraphs:
    """Write ``detector.onnx`` and ``renderer.onnx``, and compare them with the model.

    They are the graphs of :class:`~prioritycut_ray.inference.export.Detector` and
    :class:`~prioritycut_ray.inference.export.Renderer`, in float32 and for any number of driving
    frames. ONNX Runtime runs both on random pictures in batches of several sizes.

    Args:
        animator: in evaluation mode, on the CPU.
        size: S in pixels.
        folder: where to write them.

    Raises:
        UserError: a pixel differs by more than :data:`TOLERANCE`.
    """
    planes = in_planes(animator)
    detector, renderer = Detector(planes).eval(), Renderer(planes).eval()
    source, initial, driving = pictures(size, batch=2)
    still, start, moving = (detector(frames) for frames in (source, initial, driving))
    names = list(Keypoints._fields[: len(still)])
    inputs = [
        "source",
        *(f"{role}_{name}" for role in ("source", "initial", "driving") for name in names),
    ]
    fixed, batch = (None,) * len(names), {0: Dim("batch")}
    _write(
        torch.export.export(detector, (driving,), dynamic_shapes=(batch,)),
        folder / DETECTOR_NAME,
        ["frames"],
        names,
    )
    _write(
        torch.export.export(
            renderer,
            (source, still, start, moving),
            dynamic_shapes=(None, fixed, fixed, (batch,) * len(names)),
        ),
        folder / RENDERER_NAME,
        inputs,
        ["pictures"],
    )
    graphs = _Graphs(folder, inputs)
    difference = difference_of(graphs, RelativeMotion(animator).eval(), size)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{folder}: the ONNX graphs differ from the model by {difference:.2g} (limit "
            f"{TOLERANCE:g}); export without --onnx, and report this"
        )
    return OnnxGraphs(names, still[0].shape[1], difference)


def _write(program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str]) -> None:
    torch.onnx.export(
        program,
        f=path,
        input_names=inputs,
        output_names=outputs,
        # One name for all sides of this length; torch warns of a second.
        dynamic_shapes=[
            {0: "batch"} if name in ("frames", "driving_value") else {} for name in inputs
        ],
        opset_version=OPSET,
        # The optimizer takes x + 1e-9 for x, and a spline's log(r² + 1e-9) becomes infinite.
        optimize=False,
        external_data=False,
        verbose=False,
    )


class _Graphs:
    """Both graphs by ONNX Runtime, in place of :class:`RelativeMotion`."""

    def __init__(self, folder: Path, inputs: Sequence[str]) -> None:
        from onnxruntime import InferenceSession

        self._detector, self._renderer = (
            InferenceSession(folder / name, providers=["CPUExecutionProvider"])
            for name in (DETECTOR_NAME, RENDERER_NAME)
        )
        self._inputs = inputs

    def __call__(self, source: Tensor, initial: Tensor, driving: Tensor) -> Tensor:
        values = [source.numpy()]
        for frames in (source, initial, driving):
            values += self._detector.run(None, {"frames": frames.numpy()})
        (animated,) = self._renderer.run(None, dict(zip(self._inputs, values, strict=True)))
        return torch.from_numpy(animated)
