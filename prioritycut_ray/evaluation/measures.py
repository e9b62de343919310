"""Which metrics an evaluation measures."""

from importlib.metadata import version
from typing import NamedTuple

from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.metrics.identity import identity_metric
from prioritycut_ray.metrics.landmarks import landmark_metrics, require_faces_extra
from prioritycut_ray.metrics.perceptual import PROXY, perceptual_metric
from prioritycut_ray.metrics.transfer import transfer_metrics


class Measures(NamedTuple):
    """What to measure in addition to L1, PSNR and SSIM.

    Attributes:
        perceptual: see :func:`prioritycut_ray.metrics.perceptual.perceptual_metric`.
        faces: whether to measure AKD, MKR and AED; needs the extra ``faces``.
        transfer: whether to animate another identity, and measure identity distance, pose transfer
            and flicker.
    """

    perceptual: str = PROXY
    faces: bool = False
    transfer: bool = False


def selected_metrics(measures: Measures) -> tuple[Metric, ...]:
    """Return the metrics to measure, in the order of tables.

    Raises:
        UserError: the extra ``faces`` is requested but not installed, or the weights of the
            perceptual metric do not fit.
    """
    ssim = f"torchmetrics {version('torchmetrics')}, Gaussian window 11, σ 1.5, data range 1"
    basic = (
        Metric(
            key="l1",
            label="L1",
            definition="mean absolute difference of RGB values in [0, 1]",
            decimals=4,
        ),
        Metric(
            key="psnr",
            label="PSNR dB",
            definition="from the mean squared error over all pixels, at most 100",
            decimals=2,
            higher_is_better=True,
        ),
        Metric(key="ssim", label="SSIM", definition=ssim, decimals=4, higher_is_better=True),
        perceptual_metric(measures.perceptual),
    )
    transfer = transfer_metrics() if measures.transfer else ()
    if not measures.faces:
        return (*basic, *transfer)
    require_faces_extra()
    return (*basic, *landmark_metrics(), identity_metric(), *transfer)
