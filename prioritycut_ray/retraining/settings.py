"""The YAML file of ``prioritycut retrain``. Imports neither torch nor ray."""

from typing import Annotated, Any

from pydantic import Field

from prioritycut_ray.config import Count, NonNegative, Place, Section


class Gate(Section):
    """When a candidate is promoted.

    Attributes:
        target: metric whose mean over all held-out clips must be no worse than the current model's.
        tolerances: by metric, by how much a candidate may be worse on either holdout. The far end
            of the difference's 95 % interval counts: a regression beyond it must be ruled out.
    """

    target: str = "l1"
    tolerances: dict[str, NonNegative] = Field(
        default_factory=lambda: {"l1": 0.002, "psnr": 0.2, "ssim": 0.01}
    )


class RetrainSettings(Section):
    """A scheduled retraining.

    Attributes:
        models: folder of the models, a path or an fsspec URL.
        data: folder of shards that grows by ``prioritycut data append``.
        holdout: split that models are compared on; never trained on.
        budget: frame pairs that a candidate trains for.
        replay: share of them that is drawn from clips which the current model has seen.
        set: changes to the current model's configuration by dotted key; not of its networks.
        gate: see :class:`Gate`.
        lpips: as for ``evaluate --lpips``.
        faces: as for ``evaluate --faces``.
        lease_seconds: the lock of a process that died is free after so long.
        keep: refused candidates and former models whose weights are kept.
        command: run by the shell when a retraining has ended, with the report as JSON on its input.
        webhook: URL that the report is posted to as JSON.
        metrics_file: written for Prometheus' textfile collector.
    """

    models: Place = "models"
    data: Place
    holdout: str = "val"
    budget: Count
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    set: dict[str, Any] = Field(default_factory=dict)
    gate: Gate = Gate()
    lpips: Place = "proxy"
    faces: bool = False
    lease_seconds: Annotated[float, Field(gt=0)] = 60.0
    keep: Count = 3
    command: str | None = None
    webhook: Annotated[str, Field(pattern=r"^https?://")] | None = None
    metrics_file: Place | None = None
