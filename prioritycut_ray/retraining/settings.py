"""The YAML file of ``prioritycut retrain``. Imports neither torch nor ray."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from prioritycut_ray.config import Count, NonNegative, Place, Section, load_section
from prioritycut_ray.storage.paths import resolved


class Gate(Section):
    """When a candidate is promoted.

    Attributes:
        target: the metric whose mean over all held-out clips must be better than the current
            model's.
        tolerances: how much worse a candidate may be, by metric: than the current model on each
            holdout, and than the anchor on all held-out clips. The far end of the interval of the
            difference counts, so that a larger regression is ruled out.
        slices: tolerances by metric for each slice of the held-out clips, by what the slices are
            made from: ``identity``, or a key of the clips' JSON. A slice that is worse by more than
            its tolerance, and by more than chance explains, refuses the candidate.
        alpha: probability that a candidate which breaks a rule is promoted; for the anchor, the
            probability that it happens on any night.
        time_factor: how many times the current model's time the candidate may take to animate.
        memory_factor: the same for memory.
    """

    target: str = "l1"
    tolerances: dict[str, NonNegative] = Field(
        default_factory=lambda: {"l1": 0.002, "psnr": 0.2, "ssim": 0.01}
    )
    slices: dict[str, dict[str, NonNegative]] = Field(default_factory=dict)
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    time_factor: Annotated[float, Field(ge=1)] = 1.5
    memory_factor: Annotated[float, Field(ge=1)] = 1.5


class DataGate(Section):
    """When a night is refused because its new clips differ from those seen before; None: never.

    Attributes:
        brightness: largest difference of the mean brightness, in 0..1.
        motion: largest factor between the mean differences of successive frames.
        size: largest factor between the mean widths in pixels.
        faces: largest difference of the share of frames with a face; needs ``faces``.
        rejected: largest share of the new videos that packing has rejected.
    """

    brightness: NonNegative | None = None
    motion: Annotated[float, Field(ge=1)] | None = None
    size: Annotated[float, Field(ge=1)] | None = None
    faces: NonNegative | None = None
    rejected: NonNegative | None = None


class RetrainSettings(Section):
    """A scheduled retraining.

    Attributes:
        models: the models folder: a path or an fsspec URL.
        data: the folder of shards, which grows with ``prioritycut data append``.
        holdout: the split that models are compared on; never trained on.
        budget: number of frame pairs that a candidate is trained for.
        replay: share of them that is drawn from clips the current model has seen.
        set: changes to the current model's configuration by dotted key; not to its networks.
        gate: see :class:`Gate`.
        data_gate: see :class:`DataGate`.
        lpips: as in ``evaluate --lpips``.
        faces: as in ``evaluate --faces``.
        transfer: as in ``evaluate --transfer``.
        lease_seconds: seconds after which the lease of a dead process expires.
        keep: number of refused candidates and of former models whose weights are kept.
        command: shell command that is run at the end, with the report as JSON on its stdin.
        webhook: URL to which the report is posted as JSON.
        metrics_file: file for the textfile collector of Prometheus' node exporter.
    """

    models: Place = "models"
    data: Place
    holdout: str = "val"
    budget: Count
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    set: dict[str, Any] = Field(default_factory=dict)
    gate: Gate = Gate()
    data_gate: DataGate = DataGate()
    lpips: Place = "proxy"
    faces: bool = False
    transfer: bool = False
    lease_seconds: Annotated[float, Field(gt=0)] = 60.0
    keep: Count = 3
    command: str | None = None
    webhook: Annotated[str, Field(pattern=r"^https?://")] | None = None
    metrics_file: Place | None = None


def load_settings(file: str | Path, overrides: list[str]) -> RetrainSettings:
    """Read the settings, with absolute paths.

    Args:
        file: path or fsspec URL of the YAML file.
        overrides: changes as ``key=value``.

    Raises:
        UserError: the file or a value is invalid.
    """
    settings = load_section(RetrainSettings, str(file), overrides)
    places = {key: resolved(getattr(settings, key)) for key in ("models", "data")}
    if settings.metrics_file:
        places["metrics_file"] = resolved(settings.metrics_file)
    return settings.model_copy(update=places)
