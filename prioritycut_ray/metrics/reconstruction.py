"""Low-level similarity of rebuilt frames: L1, PSNR, SSIM (method §5)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from prioritycut_ray.metrics.aggregate import FrameScores, every_frame


def reconstruction_scores(
    predicted: Float[Tensor, "T 3 H W"], true: Float[Tensor, "T 3 H W"]
) -> FrameScores:
    """Return L1, PSNR and SSIM for each frame, of values in [0, 1].

    L1 is the mean absolute difference; ``psnr`` is tallied as the mean squared error; SSIM is that
    of torchmetrics (Gaussian window 11, σ 1.5, data range 1).
    """
    predicted, true = predicted.contiguous(), true.contiguous()
    ssim = structural_similarity_index_measure(
        predicted, true, data_range=(0.0, 1.0), reduction="none"
    )
    assert isinstance(ssim, Tensor)
    return {
        "l1": every_frame(F.l1_loss(predicted, true, reduction="none").mean((1, 2, 3))),
        "psnr": every_frame(F.mse_loss(predicted, true, reduction="none").mean((1, 2, 3))),
        "ssim": every_frame(ssim),
    }
