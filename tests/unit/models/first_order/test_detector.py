"""The keypoint detector of the first-order motion model (method §1)."""

import pytest
import torch

from prioritycut_ray.models.first_order.detector import KeypointDetector


@pytest.mark.parametrize("single", [True, False])
def test_fresh_detector_gives_identity_jacobians_inside_the_frame(single: bool) -> None:
    detector = KeypointDetector(
        num_keypoints=3,
        block_expansion=4,
        max_features=8,
        num_blocks=2,
        scale_factor=0.5,
        temperature=0.1,
        single_jacobian_map=single,
    )
    found = detector.eval()(torch.rand(2, 3, 32, 32))
    assert (found.value.abs() <= 1).all()
    torch.testing.assert_close(found.jacobian, torch.eye(2).expand(2, 3, 2, 2))
    assert detector.jacobian.out_channels == (4 if single else 12)
