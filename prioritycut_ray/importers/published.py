"""What published checkpoints of all model families have in common.

They are pickled dicts of state dicts, one for each network. Our modules use the names of the
reference, so that a conversion only renames prefixes. What is dropped or filled in is noted.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prioritycut_ray.config import Config, LossConfig
from prioritycut_ray.errors import UserError
from prioritycut_ray.models.blocks import gaussian_kernel
from prioritycut_ray.runs.checkpoints import STEP_FORMAT
from prioritycut_ray.runs.locate import has_checkpoint
from prioritycut_ray.storage.tensors import not_finite, read_tensors
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import TrainState

_LISTED = 10
"""Number of wrong keys that an error message names; the others are counted."""


class Layout(NamedTuple):
    """The layout of a family's published checkpoints.

    Attributes:
        model: name of the published model.
        verb: the command that imports it.
        mark: the network that tells the family from the others.
        required: networks without which nothing can be animated.
        optional: other networks that are imported, and what it means if one is absent.
        ignored: networks that have no use here, and what they are for.
    """

    model: str
    verb: str
    mark: str
    required: tuple[str, ...]
    optional: Mapping[str, str]
    ignored: Mapping[str, str]

    @property
    def networks(self) -> tuple[str, ...]:
        """All networks that are imported."""
        return (*self.required, *self.optional)


FIRST_ORDER = Layout(
    model="First Order Motion",
    verb="import-fomm",
    mark="generator",
    required=("generator", "kp_detector"),
    optional={
        "discriminator": "it gets random weights, which matters only if you continue training"
    },
    ignored={},
)
THIN_PLATE = Layout(
    model="the Thin-Plate Spline Motion Model",
    verb="import-tpsmm",
    mark="inpainting_network",
    required=("inpainting_network", "kp_detector", "dense_motion_network"),
    optional={"bg_predictor": "training models no motion of the background"},
    ignored={"avd_network": "the animation mode avd, which is not supported"},
)
LAYOUTS = (FIRST_ORDER, THIN_PLATE)


class ImportReport(NamedTuple):
    """The result of an import.

    Attributes:
        checkpoint: directory of the new checkpoint, in the run's folder.
        config: configuration of the run.
        notes: what was assumed or omitted, in sentences.
    """

    checkpoint: Path
    config: Config
    notes: tuple[str, ...]


def check_new_run(out: Path) -> None:
    """Check that a folder holds no run yet.

    Raises:
        UserError: it does.
    """
    if has_checkpoint(out):
        raise UserError(f"{out}: this folder already holds a run; give a new one")


def save_run(state: TrainState, config: Config, out: Path, notes: Iterable[str]) -> ImportReport:
    """Write an imported animator as step 0 of a run, its own moving average."""
    state.ema.module.load_state_dict(state.animator.state_dict())
    directory = out / STEP_FORMAT.format(0)
    save_checkpoint(state, config, directory)
    fresh = "the optimisers start from scratch: Adam's moments are not imported"
    return ImportReport(directory, config, (*notes, fresh))


def perceptual_scales(size: int) -> list[float]:
    """Return the published scales of the perceptual loss that frames are large enough for.

    VGG-19 halves four times: at the published scale 1/8, nothing is left of a small frame.
    """
    return [scale for scale in LossConfig().perceptual.scales if size * scale >= 16]


def read_published(file: Path, layout: Layout) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read a checkpoint of a published layout, without running code of the pickle.

    Returns:
        Tensors by ``network.name`` in float32, without the prefixes of DataParallel; and notes on
        what was changed or omitted.

    Raises:
        UserError: the file is not such a checkpoint; it names the keys, or the verb of its family.
    """
    entries = read_tensors(file)
    check_family(entries, file, layout)
    present = {name for name in layout.networks if entries.get(name) is not None}
    check_keys(
        str(file),
        layout,
        missing=[name for name in layout.required if name not in present],
        unknown=[str(name) for name in entries if not _is_known(str(name), layout)],
        misshapen=[
            f"{name} (not a dict of tensors)"
            for name in layout.networks
            if name in present and not isinstance(entries[name], Mapping)
        ],
    )
    weights = {
        f"{network}.{name}": value
        for network in layout.networks
        if network in present
        for name, value in entries[network].items()
    }
    not_tensors = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    check_keys(str(file), layout, unknown=not_tensors)
    left = [
        f"omitted the {name}: it is for {purpose}"
        for name, purpose in layout.ignored.items()
        if name in entries
    ]
    weights, notes = as_today(weights, layout)
    return weights, (*left, *notes)


def _is_known(name: str, layout: Layout) -> bool:
    return name in (*layout.networks, *layout.ignored, "epoch") or name.startswith("optimizer")


def check_family(entries: Iterable[Any], file: Path, layout: Layout) -> None:
    """Check that a file is not a checkpoint of another family.

    Args:
        entries: names of its networks, or of their tensors, which begin with them.
        file: the file.
        layout: the layout of the expected family.

    Raises:
        UserError: it is; names the verb that imports it.
    """
    names = {str(entry).removeprefix("weights/").partition(".")[0] for entry in entries}
    if layout.mark in names:
        return
    for other in LAYOUTS:
        if other.mark in names:
            raise UserError(
                f"{file}: is a checkpoint of {other.model}, not of {layout.model}; import it with "
                f"`prioritycut {other.verb}`"
            )


def as_today(
    weights: dict[str, Tensor], layout: Layout
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Remove the prefixes of DataParallel, and convert weights to float32.

    Returns:
        The weights, and notes on what was changed and on absent networks.
    """
    notes = []
    for network in layout.networks:
        own = {key for key in weights if key.startswith(f"{network}.")}
        prefix = f"{network}.module."
        if own and all(key.startswith(prefix) for key in own):
            notes.append(f"removed the prefix module. of DataParallel from the {network}")
            weights = {
                f"{network}.{key.removeprefix(prefix)}" if key in own else key: value
                for key, value in weights.items()
            }
        if not own and network in layout.optional:
            notes.append(f"the file has no {network}: {layout.optional[network]}")
    kinds = {value.dtype for value in weights.values() if value.is_floating_point()}
    if others := sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}):
        notes.append(f"converted weights in {' and '.join(others)} to float32")
    weights = {
        key: value.float() if value.is_floating_point() else value for key, value in weights.items()
    }
    return weights, tuple(notes)


class Shapes(NamedTuple):
    """The shapes of published weights, which give the sizes of the networks.

    Attributes:
        weights: tensors by ``network.name``.
        layout: the layout of the family.
        source: the file, for errors.
    """

    weights: Mapping[str, Tensor]
    layout: Layout
    source: str

    def channels(self, key: str) -> int:
        """Return the number of output channels of a layer.

        Raises:
            UserError: the layer's weight ``key`` is missing, or cannot be one.
        """
        if key not in self.weights:
            check_keys(self.source, self.layout, missing=[key])
        weight = self.weights[key]
        if weight.ndim < 2 or not weight.numel():
            check_keys(self.source, self.layout, misshapen=[f"{key} {list(weight.shape)}"])
        return len(weight)

    def count(self, prefix: str) -> int:
        """Count the different numbers that follow a prefix."""
        own = (key for key in self.weights if key.startswith(prefix))
        return len({key[len(prefix) :].split(".")[0] for key in own})

    def widest(self, prefix: str) -> int:
        """Return the most output channels below a prefix; as max_features, it gives the layers."""
        biases = [
            bias.numel()
            for key, bias in self.weights.items()
            if key.startswith(prefix) and key.endswith(".conv.bias")
        ]
        return max(biases, default=1)

    def hourglass(self, prefix: str) -> dict[str, int]:
        """Return the sizes of an hourglass."""
        count = self.count(f"{prefix}.encoder.down_blocks.")
        last = f"{prefix}.decoder.up_blocks.{max(count, 1) - 1}.conv.weight"
        return {
            "block_expansion": self.channels(last),
            "max_features": self.widest(f"{prefix}.encoder.down_blocks."),
            "num_blocks": count,
        }

    def scale(self, network: str) -> float | None:
        """Return the scale s of a network's anti-alias kernel, or None if it has none.

        The kernel has N = 2·round(4σ) + 1 taps, σ = (1/s − 1)/2.
        """
        kernel = self.weights.get(f"{network}.down.weight")
        return 4 / (kernel.shape[-1] + 3) if kernel is not None and kernel.ndim == 4 else None


def load_networks(
    shapes: Shapes,
    networks: Sequence[tuple[nn.Module, Callable[[str], str]]],
    *,
    scales: Mapping[str, float],
    fresh: Collection[str] = (),
) -> None:
    """Load published weights into fresh networks of the same sizes.

    Anti-alias kernels are constants: they are compared with ours, then omitted. Batch counts, which
    are not used, may be missing.

    Args:
        shapes: the weights.
        networks: our modules, each with a function from its names to the reference's keys.
        scales: scale factors of the networks that have an anti-alias kernel, by network.
        fresh: keys that the file does not have; these tensors keep their values.

    Raises:
        UserError: keys are missing or unknown, or have wrong shapes, NaN or infinite values; names
            the file and the keys.
    """
    weights, _, source = shapes
    expected = {
        rename(name): tensor
        for module, rename in networks
        for name, tensor in module.state_dict().items()
    }
    expected = {key: tensor for key, tensor in expected.items() if key not in fresh}
    kernels = _kernels(scales)
    _check_shapes(shapes, expected | kernels)
    if wrong := not_finite(weights):
        raise UserError(
            f"{source}: these weights are NaN or infinite: {wrong}; download the file again or use "
            "another one"
        )
    for key, kernel in kernels.items():
        # To the accuracy of half precision.
        if not torch.allclose(weights[key], kernel, rtol=4e-3, atol=1e-6):
            raise UserError(f"{source}: {key} is not the Gaussian of its scale_factor")
    for module, rename in networks:
        own = module.state_dict()
        module.load_state_dict(
            {name: weights.get(rename(name), tensor) for name, tensor in own.items()}
        )


def _kernels(scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the anti-alias kernels that the reference stores as buffers, by its keys."""
    kernels = {name: gaussian_kernel(scale) for name, scale in scales.items() if scale != 1}
    return {
        f"{name}.down.weight": torch.outer(kernel, kernel).expand(3, 1, -1, -1)
        for name, kernel in kernels.items()
    }


def _check_shapes(shapes: Shapes, expected: Mapping[str, Tensor]) -> None:
    """Compare keys and shapes.

    Raises:
        UserError: they differ; names the keys.
    """
    weights, layout, source = shapes
    optional = ".num_batches_tracked"
    check_keys(
        source,
        layout,
        missing=[key for key in expected if key not in weights and not key.endswith(optional)],
        unknown=[key for key in weights if key not in expected],
        misshapen=[
            f"{key} {list(weights[key].shape)} (not {list(tensor.shape)})"
            for key, tensor in expected.items()
            if key in weights and weights[key].shape != tensor.shape
        ],
    )


def check_keys(
    source: str,
    layout: Layout,
    *,
    missing: Sequence[str] = (),
    unknown: Sequence[str] = (),
    misshapen: Sequence[str] = (),
) -> None:
    """Reject keys that do not match.

    Raises:
        UserError: there are any; names the first ones and counts all.
    """
    problems = [
        f"{kind} {key}"
        for kind, keys in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        for key in keys
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(
            f"{source}: is not a supported model of {layout.model}: {len(problems)} keys "
            f"differ: {', '.join(problems[:_LISTED])}{more}"
        )
