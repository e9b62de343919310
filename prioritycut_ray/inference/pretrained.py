"""A trained model for programs: from a run, an exported folder or the Hugging Face hub.

An exported folder holds ``model.safetensors`` (the averaged animator) and ``config.json`` (the
training configuration, without the places of data and runs).
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

from prioritycut_ray.config import Config, parse_config
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
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.training.checkpoint import load_animator, load_module
from prioritycut_ray.video.images import center_square, resize
from prioritycut_ray.video.source import Frame
from prioritycut_ray.visualize import tiles

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PLACES: Any = {"storage": True, "data": {"url"}}
"""Of the configuration: they mean nothing elsewhere, and may tell what is nobody's business."""


class Animator:
    """A trained model, ready to animate pictures.

    ::

        animator = Animator.from_pretrained("runs/mine")
        frames = list(animator.animate(picture, driving_frames))

    Attributes:
        network: detector, dense motion and generator, in evaluation mode.
        config: that it was trained with.
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
            model: a run or one of its checkpoints, a folder of ``prioritycut export``, or the id
                ``owner/name`` of a model on the Hugging Face hub; what exists here comes first.
            revision: branch, tag or commit on the hub.
            device: where it computes; the first GPU or the CPU unless given.

        Raises:
            UserError: there is no such model, it cannot be fetched, or it is damaged.
        """
        place = torch.device(device) if device else default_device()
        folder = Path(model)
        if "://" not in str(model) and not folder.exists() and _HUB_ID.fullmatch(str(model)):
            folder = _from_hub(str(model), revision)
        if (folder / CONFIG_NAME).is_file():
            return cls(*_read_export(folder), place)
        return cls(*load_animator(find_checkpoint(model), place), place)

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
    ) -> Iterator[Frame]:
        """Move a source picture like a driving video.

        Pictures are RGB ``uint8 [H, W, 3]`` of any size; their centred square is taken. The
        networks compute in the precision of their training, ``train.precision``.

        Args:
            source: the picture.
            driving: frames that give the motion, in their order.
            relative: move by the change since the initial driving frame; or take the pose itself.
            adapt_scale: scale relative motion to the source's size.
            initial: the driving frame whose pose is that of the source (:meth:`best_frame` finds
                one); the first unless given.

        Yields:
            As many frames ``uint8 [size, size, 3]`` as there are driving frames.

        Raises:
            UserError: ``adapt_scale``, and keypoints span no area.
        """
        for rendered in self.render(
            self._square(source),
            map(self._square, driving),
            relative=relative,
            adapt_scale=adapt_scale,
            initial=None if initial is None else self._square(initial),
        ):
            yield from tiles([rendered.animation.prediction]).numpy()

    def best_frame(self, source: Frame, driving: Iterable[Frame]) -> int:
        """The number of the driving frame whose pose is nearest to that of the source.

        Raises:
            UserError: there is none, as keypoints span no area.
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
    ) -> Iterator[Rendered]:
        """As :meth:`animate`, with everything behind the pictures, for squares of the own size."""
        return animate(
            self.network,
            self._still(source),
            driving,
            relative=relative,
            adapt_scale=adapt_scale,
            initial=initial,
            precision=self.config.train.precision,
        )

    def save_pretrained(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder."""
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        tree: dict[str, Any] = {"model_type": "prioritycut"}
        tree |= self.config.model_dump(mode="json", exclude=_PLACES)
        (folder / CONFIG_NAME).write_text(json.dumps(tree, indent=1) + "\n")

    def _still(self, square: Frame) -> Float[Tensor, "1 3 S S"]:
        return to_tensor(square[None], self.device)

    def _square(self, picture: NDArray[np.uint8]) -> Frame:
        return resize(center_square(picture), self.size)


def _read_export(folder: Path) -> tuple[Network, Config]:
    path = folder / CONFIG_NAME
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})") from error
    if not isinstance(tree, dict) or tree.pop("model_type", None) != "prioritycut":
        raise UserError(f"{path}: no model of `prioritycut export` (model_type is not prioritycut)")
    config = parse_config(tree, str(path))
    network = build_animator(config.model)
    load_module(network, folder / WEIGHTS_NAME)
    return network, config


def _from_hub(name: str, revision: str | None) -> Path:
    """Fetch a model from the hub, or take its copy in the hub's cache."""
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS_NAME, CONFIG_NAME])
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no such folder, and it cannot be had from the Hugging Face hub "
            f"({describe(error)}); give the folder of a run or of an export, or check the "
            "name and the network"
        ) from error
