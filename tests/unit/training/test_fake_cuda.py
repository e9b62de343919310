"""Whole training steps on a GPU that does not exist, and the checks seen to fail."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import NotFiniteError
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.evaluation.scoring import load_extractors, score_frames
from prioritycut_ray.inference import animate as inference
from prioritycut_ray.inference.animate import animate, find_best_frame, to_tensor
from prioritycut_ray.losses import feature_distance
from prioritycut_ray.networks import build_animator
from prioritycut_ray.precision import Precision
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.manifest import verify
from prioritycut_ray.runs.retention import Retention
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.visualize import to_uint8
from tests.fake_cuda import CUDA, SAMPLES, Activation, FakeGpu, MixedDevicesError, fake_cuda, train
from tests.places import ALONE, FAMILIES, TINY, TINY_TPS

WORDS = [
    f"train.batch_size={2 * SAMPLES}",
    "train.samples=1000",
    "train.workers=1",
    "train.log_every=1000",
]
PATCH = ["discriminator.kind=patch", "discriminator.patch_num_blocks=2", "priority_cut=null"]
STEPS = {
    "mixing": ["priority_cut.mix_prob=1"],
    "not mixing": ["priority_cut.mix_prob=0"],
    "patch": PATCH,
    "accumulated": ["priority_cut.mix_prob=1", "train.accumulate=2"],
    "checkpointed": ["priority_cut.mix_prob=1", "train.activation_checkpointing=true"],
    "frozen detector": ["priority_cut.mix_prob=1", "optim.detector_lr=0"],
    "deterministic": ["priority_cut.mix_prob=0", "train.deterministic=true"],
    "additive cutmix": ["priority_cut.mask=cutmix", "priority_cut.variant=additive"],
    "without a discriminator": [*ALONE],
}
OF_THIN_PLATE = {
    "mixing": ["priority_cut.mix_prob=1"],
    "without a discriminator": [*ALONE, "train.accumulate=2", "optim.detector_lr=0"],
}


IMAGES = {
    "data/augment.py _blend",
    "data/augment.py _gray",
    "data/augment.py _swapped",
    "data/augment.py _turn_hue",
    "data/augment.py augment",
    "equivariance.py transform_frame",
    "inference/animate.py require_finite",
    "inference/animate.py to_tensor",
    "losses.py _FeatureDistance.forward",  # of images themselves, a level of EfficientNet's
    "losses.py feature_distance",
    "models/blocks.py AntiAliasDownsample.forward",
    "models/blocks.py channels_last",
    "models/first_order/generator.py Generator.decode",
    "models/thin_plate/dense_motion.py DenseMotionNetwork._occlusion_maps",
    "models/thin_plate/inpainting.py InpaintingNetwork.decode",
    "models/thin_plate/inpainting.py _VisibleDistance.forward",  # occlusion maps
    "models/thin_plate/inpainting.py warp_distance",
    "models/perceptual.py PerceptualFeatures.forward",
    "models/perceptual.py _EfficientNetLevels.forward",
    "priority_cut.py cutmix_mask",
    "priority_cut.py mix",
    "priority_cut.py priority_mask",
    "priority_cut.py swap_roles",
    "training/steps.py _interleaved",
    "training/steps.py discriminate",
    "training/trainer.py prepare",
    "visualize.py to_uint8",
}
"""May compute in float32 what has at most three channels: features have 20 times as many."""
EXACT = {
    # Coordinates, and what yields them or is differentiated with respect to them: bfloat16 knows
    # the place in a frame of 256 pixels to half a pixel.
    "equivariance.py _offsets",
    "equivariance.py jacobian",
    "equivariance.py transform_points",
    "models/blocks.py in_conv_format",  # their gradients, come back from convolutions
    "models/blocks.py warp",  # features are sampled in the format of coordinates
    "models/first_order/dense_motion.py DenseMotionNetwork.forward",
    "models/first_order/dense_motion.py sparse_motions",
    "models/first_order/detector.py KeypointDetector.forward",
    "models/first_order/detector.py _expected_map",
    "models/first_order/detector.py _expected_position",
    "models/keypoints.py heatmap_difference",
    "models/keypoints.py keypoint_heatmaps",
    "models/sampling.py between_edges",
    "models/sampling.py grid_sample",
    "models/sampling.py warp_by_each",
    "models/sampling.py DeterministicSample.backward",
    "models/sampling.py DeterministicSample.forward",
    "models/sampling.py _in_pixels",
    "models/sampling.py _rows",
    "models/thin_plate/dense_motion.py DenseMotionNetwork.forward",
    "models/thin_plate/dense_motion.py all_motions",
    "models/thin_plate/dense_motion.py softmax_of_kept",  # weights of coordinates
    "models/thin_plate/dense_motion.py warp",  # as in models/blocks.py
    "models/thin_plate/resnet.py _numbers",  # the last map, of 1/32 of the frame's side
    "models/thin_plate/spline.py _radial",
    "models/thin_plate/spline.py evaluate_splines",
    # Logits of one channel, and losses of them.
    "losses.py bce",
    "losses.py consistency",
    "losses.py discriminator_adversarial",
    "losses.py generator_adversarial",
    "losses.py mixed_adversarial",
    "models/discriminators.py DiscriminatorOutput.rows",
    "models/discriminators.py PatchDiscriminator.forward",
    "models/discriminators.py UNetDiscriminator.forward",
}
"""May compute in float32."""


def may_be_float32(activation: Activation) -> bool:
    function, shape = activation.place.named(), activation.shape
    return function in EXACT or (function in IMAGES and (len(shape) < 4 or shape[1] <= 3))


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_cuda() as gpu:
        yield gpu


def configured(*words: str, source: Path = TINY) -> Config:
    # The background is on and motions are left out.
    own = ["model.background_start=0"] if source == TINY_TPS else []
    return load_config(str(source), [*WORDS, *own, *words])


@pytest.mark.parametrize(
    ("source", "words", "precision"),
    [
        *(pytest.param(TINY, words, "bfloat16", id=kind) for kind, words in STEPS.items()),
        pytest.param(TINY, STEPS["mixing"], "float32", id="float32"),
        *(
            pytest.param(TINY_TPS, words, "bfloat16", id=f"thin plate {kind}")
            for kind, words in OF_THIN_PLATE.items()
        ),
    ],
)
def test_a_training_step_is_right_for_a_gpu(
    gpu: FakeGpu, source: Path, words: list[str], precision: str
) -> None:
    words = [*words, f"train.precision={precision}"]
    seen = train(gpu, configured(*words, source=source), steps=1)[1]
    in_bfloat16 = may_be_float32 if precision == "bfloat16" else None
    assert seen.complaints(may_be_float32=in_bfloat16) == []
    assert [place.named() for place in seen.waits] == ["training/gradients.py _agree"]
    assert seen.uploads
    assert seen.convolutions > 100


@pytest.mark.parametrize(
    ("words", "pictures"),
    [((), 3), (ALONE, 2)],  # Without a discriminator there is no judgement of pixels.
    ids=["with", "without a discriminator"],
)
def test_a_step_that_logs_shows_and_saves_and_one_from_what_was_saved(
    gpu: FakeGpu, tmp_path: Path, words: tuple[str, ...], pictures: int
) -> None:
    """The host reads losses, each picture and the state, all of them in one place."""
    folder, storage = tmp_path / "saved", Folder(str(tmp_path / "run"))
    config = configured(*words, "train.image_every=1", "train.checkpoint_every=1")

    def save(scalars: Mapping[str, float], state: TrainState | None) -> None:
        if state is not None:
            save_checkpoint(state, config, folder)

    claim = claim_run(storage, "a launch", first=True)
    with RunWriter(claim, start=0, retention=Retention(2, 0, 0), metric="loss") as writer:
        seen = train(gpu, config, steps=1, writer=writer, report=save)[1]
    assert Counter(place.named() for place in seen.waits if "_copied" not in str(place)) == {
        "training/gradients.py _agree": 1,
        "training/meter.py Meter.summarise": 1,
        "visualize.py to_uint8": pictures,
    }
    assert seen.blocking == []
    verify(folder)
    begin, step = train(gpu, configured(*words), steps=1, checkpoint=folder)[:2]
    assert begin.operations
    assert step.complaints() == []


# What is read of the GPU in the middle of a step: whether either network's update is finite, and
# whether all ranks go on.


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(gpu: FakeGpu) -> None:
    gpu.answer = lambda out: out.copy_(torch.arange(out.numel()).view_as(out) == 2)
    with pytest.raises(NotFiniteError, match="2 updates in a row of the animator"):
        train(gpu, configured("optim.max_skipped_in_a_row=2"), steps=3)


def test_a_run_that_is_asked_to_stop_saves_at_that_step(gpu: FakeGpu) -> None:
    gpu.answer = lambda out: out.copy_(torch.arange(out.numel()).view_as(out) != 2)
    saved: list[bool] = []
    train(
        gpu,
        configured(),
        steps=3,
        report=lambda scalars, state: saved.append(state is not None),
    )
    assert saved == [True]


@pytest.mark.parametrize(
    ("source_of_model", "precision"),
    [(TINY, "float32"), (TINY, "bfloat16"), (TINY_TPS, "bfloat16")],
    ids=["float32", "bfloat16", "thin_plate"],
)
def test_animation_waits_once_a_batch_at_most(
    gpu: FakeGpu, precision: Precision, source_of_model: Path
) -> None:
    animator = build_animator(configured(source=source_of_model).model).eval().to(CUDA)
    driving = np.zeros((2 * SAMPLES, 32, 32, 3), dtype=np.uint8)
    source = to_tensor(driving[:1], CUDA)
    for relative in (True, False):
        batches = animate(
            animator, source, driving, relative=relative, adapt_scale=True, precision=precision
        )
        with patch.object(inference, "BATCH", SAMPLES):
            next(batches)
            gpu.restart()
            to_uint8(next(batches).animation.prediction)
        seen = gpu.restart()
        places = [place.named() for place in seen.waits]
        assert places == ["inference/animate.py require_finite", "visualize.py to_uint8"]
        seen.waits.pop()  # The caller's, of the result.
        in_bfloat16 = may_be_float32 if precision == "bfloat16" else None
        assert seen.complaints(may_be_float32=in_bfloat16) == []
    with patch.object(inference, "BATCH", SAMPLES):
        assert 0 <= find_best_frame(animator, source, driving) < len(driving)
    # The source's keypoints, and those of either batch.
    seen = gpu.restart()
    assert [place.named() for place in seen.waits] == [
        "inference/animate.py find_best_frame",
        *["models/keypoints.py pose_distance"] * 2,
    ]
    assert seen.blocking == []


@pytest.mark.parametrize("source", FAMILIES.values(), ids=FAMILIES)
def test_evaluation_reads_nothing_but_scores(gpu: FakeGpu, source: Path) -> None:
    frames = np.zeros((SAMPLES, 32, 32, 3), dtype=np.uint8)
    animator = build_animator(configured(source=source).model).eval().to(CUDA)
    extractors = load_extractors(Measures(), CUDA)
    with patch.object(inference, "BATCH", SAMPLES):
        baseline, model = score_frames(frames, [animator], extractors)
    assert baseline.keys() == model.keys()
    assert {place.named() for place in gpu.seen.waits} == {
        "evaluation/scoring.py score_frames",
        "metrics/aggregate.py every_frame",
    }
    # The windows of torchmetrics' SSIM go over planes.
    planes = [a for a in gpu.seen.planes if a.place.file != "metrics/reconstruction.py"]
    assert planes == []


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, device=CUDA, dtype=dtype)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: torch.stack([on_gpu(), torch.zeros(())]),
        lambda: torch.cat([on_gpu(2), torch.zeros(2)]),
        lambda: on_gpu(2) + torch.zeros(2),
        lambda: on_gpu(2) @ torch.zeros(2),
        lambda: torch.zeros(4)[on_gpu(2, dtype=torch.int64)],
        lambda: torch._foreach_add([on_gpu(2)], [torch.zeros(2)]),
    ],
)
def test_tensors_of_two_devices_are_refused(gpu: FakeGpu, mistake: Callable[[], object]) -> None:
    with pytest.raises(MixedDevicesError):
        mistake()


def test_scalars_of_the_cpu_go_into_pointwise_operations_as_on_a_gpu(gpu: FakeGpu) -> None:
    assert (on_gpu(2) * torch.ones(())).device == CUDA
    assert gpu.seen.complaints() == []


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda: [bool(on_gpu()), bool(on_gpu())], "the host waits"),
        (lambda: [on_gpu().item(), on_gpu(3).cpu()], "the host waits"),
        (lambda: [torch.cuda.synchronize(), on_gpu(3).tolist()], "the host waits"),
        (lambda: torch.zeros(3).to(CUDA), "stops for a copy"),
        (lambda: torch.zeros(3).to(CUDA, non_blocking=True), "stops for a copy"),
        (lambda: torch.zeros(3, pin_memory=True).to(CUDA), "stops for a copy"),
        (lambda: torch.tensor([1.0, 2.0], device=CUDA), "stops for a copy"),
        (lambda: on_gpu(8)[torch.tensor([1, 2])], "stops for a copy"),
        (lambda: F.conv2d(on_gpu(SAMPLES, 8, 32, 32), on_gpu(8, 8, 3, 3)), "not channels last"),
        (lambda: on_gpu(SAMPLES, 8, 32, 32) + 1, "float32"),
    ],
)
def test_mistakes_are_seen(gpu: FakeGpu, mistake: Callable[[], object], complaint: str) -> None:
    mistake()
    seen = gpu.restart()
    assert complaint in " ".join(seen.complaints(may_be_float32=lambda activation: False))
    assert "test_fake_cuda.py" in " ".join(seen.complaints(may_be_float32=lambda activation: False))


def test_what_is_right_is_not_complained_of(gpu: FakeGpu) -> None:
    pinned = torch.zeros(SAMPLES, 8, 32, 32).pin_memory()
    images = pinned.to(CUDA, torch.bfloat16, non_blocking=True)
    images = images.contiguous(memory_format=torch.channels_last)
    weight = on_gpu(8, 8, 3, 3, dtype=torch.bfloat16).requires_grad_()
    loss = feature_distance([F.conv2d(images, weight)], [on_gpu(dtype=torch.bfloat16)])
    loss.backward()
    loss.item()
    assert gpu.seen.convolutions == 2
    assert gpu.seen.complaints(may_be_float32=lambda activation: False) == []
