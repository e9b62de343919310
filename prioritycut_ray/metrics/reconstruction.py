"""Low-level similarity of rebuilt frames: L1, PSNR, SSIM (method §5), by torchmetrics."""

from jaxtyping import Float
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

HIGHEST_PSNR = 100.0
"""In dB; stands for the infinite value of identical images, so that averages stay finite."""


class ReconstructionMetrics:
    """Accumulates the similarity of predicted and true frames in [0, 1] over a clip.

    L1 is the mean absolute difference; PSNR (dB) comes from the squared error pooled over the
    clip; SSIM is averaged over frames.
    """

    def __init__(self) -> None:
        self._metrics = MetricCollection(
            {
                "l1": MeanAbsoluteError(),
                "psnr": PeakSignalNoiseRatio(data_range=(0.0, 1.0)),
                "ssim": StructuralSimilarityIndexMeasure(data_range=(0.0, 1.0)),
            }
        )

    def update(self, predicted: Float[Tensor, "B 3 H W"], true: Float[Tensor, "B 3 H W"]) -> None:
        """Add some frames."""
        self._metrics.to(predicted.device).update(predicted.contiguous(), true.contiguous())

    def compute(self) -> dict[str, float]:
        """The metrics of all frames added so far, by name."""
        values = {name: float(value) for name, value in self._metrics.compute().items()}
        return values | {"psnr": min(values["psnr"], HIGHEST_PSNR)}
