"""A trained model for use in programs: from a run, an exported folder or the Hugging Face Hub.

An exported folder contains ``model.safetensors`` (the averaged animator) and ``config.json`` (the
training configuration without the paths of data and runs).
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from prioritycut_ray.config import HUB_ID, Config, parse_config
from prioritycut_ray.errors import UserError, describe
from prioritycut_ray.inference.animate import (
    Rendered,
    animate,
    default_device,
    find_best_frame,
    to_tensor,
)
from prioritycut_ray.models.animator import Animator as Network
from prioritycut_ray.networks import build_animator
from prioritycut_ray.runs.locate import (
    find_checkpoint,
    locate_checkpoint,
    read_config,
    run_of_best,
)
from prioritycut_ray.storage.paths import expanded, is_url, resolved
from prioritycut_ray.training.checkpoint import load_animator, load_module
from prioritycut_ray.video.images import center_square, resize
from prioritycut_ray.video.source import Frame
from prioritycut_ray.visualize import tiles

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_PATHS: Any = {"storage": True, "init": True, "data": {"url"}}
"""Left out of an export: they mean nothing on other machines, and may be private."""


class Animator:
    """A trained model that animates pictures.

    ::

        animator = Animator.from_pretrained("runs/mine")
        frames = list(animator.animate(picture, driving_frames))

    Attributes:
        network: the generator side, in evaluation mode.
        config: the configuration that it was trained with.
        device: where it computes.
    """

    def __init__(self, network: Network, config: Config, device: torch.device) -> None:
        self.network = network.to(device).eval()
        self.config = config
        self.device = device

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
    ) -> "Animator":
        """Load a model.

        Args:
            model: a run, one of its checkpoints or ``RUN/best``, a folder written by ``prioritycut
                export``, or the id ``owner/name`` of a model on the Hugging Face Hub. A local
                folder of that name takes precedence.
            revision: branch, tag or commit on the Hub.
            device: where to compute; the first GPU by default, or the CPU if there is none.

        Raises:
            UserError: the model does not exist, cannot be downloaded, or is damaged.
        """
        place = torch.device(device) if device else default_device()
        folder = locate_model(model, revision)
        if (folder / CONFIG_NAME).is_file():
            return cls(*_read_export(folder), place)
        return cls(*load_animator(folder, place), place)

    @property
    def size(self) -> int:
        """Side of the square frames in pixels."""
        return self.config.data.size

    def animate(
        self,
        source: Frame,
        driving: Iterable[Frame],
        *,
        relative: bool = True,
        adapt_scale: bool = False,
        initial: Frame | None = None,
        smooth: int = 0,
    ) -> Iterator[Frame]:
        """Animate a source picture with the motion of a driving video.

        Pictures are RGB ``uint8 [H, W, 3]`` of any size; they are cut to their centred square. The
        networks compute in the precision of their training, ``train.precision``.

        Args:
            source: the picture.
            driving: the frames of the driving video, in order.
            relative: apply the motion since the initial driving frame; otherwise take over the
                driving pose itself.
            adapt_scale: scale relative motion to the size of the source.
            initial: the driving frame whose pose matches the source, such as the one that
                :meth:`best_frame` finds; the first one by default.
            smooth: smooth the driving keypoints over a window of this many frames, an odd number
                such as 9; by default they are used as they are.

        Yields:
            One frame ``uint8 [size, size, 3]`` for each driving frame.

        Raises:
            UserError: ``adapt_scale`` is set and the keypoints span no area, ``smooth`` is
                invalid, or the network outputs NaN or infinite values.
        """
        for rendered in self.render(
            self._square(source),
            map(self._square, driving),
            relative=relative,
            adapt_scale=adapt_scale,
            initial=None if initial is None else self._square(initial),
            smooth=smooth,
        ):
            yield from tiles([rendered.animation.prediction]).numpy()

    def best_frame(self, source: Frame, driving: Iterable[Frame]) -> int:
        """Return the index of the driving frame whose pose is nearest to that of the source.

        Raises:
            UserError: the keypoints of the source, or of every driving frame, span no area.
        """
        return find_best_frame(
            self.network, self._still(self._square(source)), map(self._square, driving)
        )

    def render(
        self,
        source: Frame,
        driving: Iterable[Frame],
        *,
        relative: bool,
        adapt_scale: bool,
        initial: Frame | None = None,
        smooth: int = 0,
    ) -> Iterator[Rendered]:
        """Like :meth:`animate`, for squares of the model's size; yield all intermediate results."""
        return animate(
            self.network,
            self._still(source),
            driving,
            relative=relative,
            adapt_scale=adapt_scale,
            initial=initial,
            smooth=smooth,
            precision=self.config.train.precision,
        )

    def save_pretrained(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder."""
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        tree: dict[str, Any] = {"model_type": "prioritycut"}
        tree |= self.config.model_dump(mode="json", exclude=_PATHS)
        (folder / CONFIG_NAME).write_text(json.dumps(tree, indent=1) + "\n")

    def _still(self, square: Frame) -> Float[Tensor, "1 3 S S"]:
        return to_tensor(square[None], self.device)

    def _square(self, picture: NDArray[np.uint8]) -> Frame:
        return resize(center_square(picture), self.size)


def locate_model(model: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an export, or a checkpoint, on this machine.

    Args:
        model: as for :meth:`Animator.from_pretrained`.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: the model does not exist, or cannot be downloaded.
    """
    folder = Path(model)
    is_here = is_url(str(model)) or folder.exists() or run_of_best(model) is not None
    if not is_here and re.fullmatch(HUB_ID, str(model)):
        folder = _from_hub(str(model), revision)
    return folder if (folder / CONFIG_NAME).is_file() else find_checkpoint(model)


def pinned_model(model: str | Path) -> str:
    """Return the checkpoint or export that a model is now, as every machine can find it.

    Args:
        model: as for :meth:`Animator.from_pretrained`.

    Raises:
        UserError: the model does not exist, or cannot be downloaded.
    """
    place = expanded(str(model))
    if not (locate_model(place) / CONFIG_NAME).is_file():
        return locate_checkpoint(resolved(place))
    return resolved(place) if Path(place).exists() else place


def read_model_config(folder: Path) -> Config:
    """Read the configuration that a model was trained with.

    Args:
        folder: of :func:`locate_model`.

    Raises:
        UserError: it is not a model of this project.
    """
    if not (folder / CONFIG_NAME).is_file():
        return read_config(folder)
    path = folder / CONFIG_NAME
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(tree, dict) or tree.pop("model_type", None) != "prioritycut":
        raise UserError(
            f"{path}: is not a model of this project (model_type is not prioritycut); give a "
            "folder written by `prioritycut export`"
        )
    return parse_config(tree, str(path))


def _read_export(folder: Path) -> tuple[Network, Config]:
    config = read_model_config(folder)
    network = build_animator(config.model)
    load_module(network, folder / WEIGHTS_NAME)
    return network, config


def _from_hub(name: str, revision: str | None) -> Path:
    """Download a model from the Hub, or use its copy in the Hub's cache."""
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS_NAME, CONFIG_NAME])
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: is not a folder, and the Hugging Face Hub does not provide it "
            f"({describe(error)}); give the folder of a run or of an export, or check the name "
            "and the network"
        ) from error
