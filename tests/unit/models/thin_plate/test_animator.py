"""The thin-plate animator: what changes in the course of training, and awkward keypoints."""

import math

import pytest
import torch

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.animate import animate, find_best_frame
from prioritycut_ray.models.animator import FramePair, TrainingInputs
from prioritycut_ray.models.keypoints import Keypoints, movement_scale
from prioritycut_ray.models.thin_plate.animator import Schedule, ThinPlateAnimator
from prioritycut_ray.models.thin_plate.dense_motion import Dropout, softmax_of_kept
from prioritycut_ray.networks import build_animator
from tests.places import TINY_TPS


def built(*words: str) -> ThinPlateAnimator:
    torch.manual_seed(0)
    animator = build_animator(configured(*words).model)
    assert isinstance(animator, ThinPlateAnimator)
    return animator


def configured(*words: str) -> Config:
    return load_config(str(TINY_TPS), words)


def a_pair(batch: int = 2) -> FramePair:
    return FramePair(*torch.rand(2, batch, 3, 32, 32))


def inputs(pair: FramePair, samples: int, uniform: float = 0.99) -> TrainingInputs:
    return TrainingInputs(pair.driving.flip(3), torch.full((len(pair.source), 3), uniform), samples)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [(0, 0.1), (250, 0.15), (500, 0.2), (1000, 0.3), (3499, 0.3), (3500, 0.0), (10**9, 0.0)],
)
def test_the_share_of_motions_left_out_rises_and_ends(samples: int, rate: float) -> None:
    schedule = Schedule(0, 0.1, 0.3, dropout_ramp=1000, dropout_end=3500)
    assert schedule.dropout_rate(samples) == pytest.approx(rate)


def test_a_ramp_may_be_longer_than_the_dropout_or_absent() -> None:
    assert Schedule(0, 0.1, 0.3, 1000, 500).dropout_rate(499) == pytest.approx(0.1998)
    assert Schedule(0, 0.1, 0.3, 0, 500).dropout_rate(0) == pytest.approx(0.3)
    assert Schedule().dropout_rate(0) == 0.0


def test_left_out_motions_have_no_weight_and_the_background_stays() -> None:
    # The 1e-6 below weighs more where the kept motions are far less likely than the one left out.
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([[0.99, 0.1, 0.71], [0.99, 0.99, 0.99]])
    mask = softmax_of_kept(logits, Dropout(uniform, rate=0.3))
    assert (mask[0, 2] == 0).all()
    assert (mask[1, 1:] == 0).all()
    torch.testing.assert_close(mask[0, :2], torch.softmax(logits[0, :2], dim=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(mask[1, 0], torch.ones(4, 4), rtol=1e-4, atol=0)


def test_motions_are_left_out_in_training_alone_and_until_the_end() -> None:
    animator, pair = built("model.background=false").eval(), a_pair()
    with torch.no_grad():
        plain = animator(pair).animation.background_mask
        during, after = (animator(pair, inputs(pair, n)).animation.background_mask for n in (0, 16))
    torch.testing.assert_close(during, torch.ones_like(during), rtol=1e-3, atol=0)
    assert torch.equal(after, plain)
    assert plain.max() < 0.9


def test_the_background_moves_from_its_start_in_training_alone() -> None:
    animator, pair = built("model.background_start=8"), a_pair()
    assert animator.parts_change
    assert not built("model.background_start=0").parts_change
    assert not built("model.background=false").parts_change
    with torch.no_grad():
        torch.nn.init.constant_(animator.background.bg_encoder.fc.bias, 0.3)
    animator.train()
    before, after = (animator(pair, inputs(pair, samples)) for samples in (7, 8))
    assert before.losses.keys() == {"warp"}
    assert after.losses.keys() == {"background", "warp"}
    assert after.losses["background"] > 0.1
    assert animator.eval()(pair).losses == {}
    after.losses["background"].backward()
    assert all(p.grad is not None for p in animator.background.parameters())


def test_the_part_of_training_that_animation_uses_gives_the_same_frames() -> None:
    animator, pair = built().eval(), a_pair()
    with torch.no_grad():
        whole = animator(pair).animation
        parts = animator.render(animator.encode(pair.source), animator.detect(pair.driving))
    torch.testing.assert_close(parts.prediction, whole.prediction)
    assert parts.occlusion_map.shape == parts.background_mask.shape == (2, 1, 16, 16)


def test_keypoints_in_one_place_give_finite_frames_and_gradients() -> None:
    animator, pair = built(), a_pair()
    torch.nn.init.zeros_(animator.detector.fg_encoder.fc.weight)
    torch.nn.init.zeros_(animator.detector.fg_encoder.fc.bias)
    result = animator(pair, inputs(pair, 8))
    assert (result.animation.driving_keypoints.value == 0).all()
    torch.stack([result.animation.prediction.mean(), *result.losses.values()]).sum().backward()
    gradients = [p.grad for p in animator.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_keypoints_in_one_place_animate_and_give_no_scale() -> None:
    animator = built("model.background=false").eval()
    torch.nn.init.zeros_(animator.detector.fg_encoder.fc.weight)
    source = torch.rand(1, 3, 32, 32)
    frames = list(torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8).numpy())
    torch.nn.init.zeros_(animator.detector.fg_encoder.fc.bias)
    for relative in (True, False):
        (batch,) = animate(animator, source, frames, relative=relative, adapt_scale=False)
        assert batch.animation.prediction.isfinite().all()
    with pytest.raises(UserError, match="the 10 keypoints of the source frame lie on one line"):
        next(animate(animator, source, frames, relative=True, adapt_scale=True))
    with pytest.raises(UserError, match="the 10 keypoints of the source frame lie on one line"):
        find_best_frame(animator, source, frames)


def test_the_scale_is_that_of_the_hull_of_all_groups() -> None:
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    inner = 0.1 * torch.rand(6, 2)
    spread = torch.cat([inner[:3], corners[:2], inner[3:], corners[2:]])  # two in either group
    assert spread.shape == (10, 2)
    source, driving = Keypoints(0.5 * spread[None]), Keypoints(spread[None])
    assert math.isclose(movement_scale(source, driving), 0.5, rel_tol=1e-6)
