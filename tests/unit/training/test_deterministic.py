"""``train.deterministic``: the operations of a step, on a fake GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.launch.worker import worker_environment
from tests.fake_cuda import SAMPLES, Seen, fake_cuda, train
from tests.places import ALONE, TINY, TINY_TPS

NONDETERMINISTIC = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_embedding_bag_dense_backward",
    "_ctc_loss_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "cudnn_grid_sampler_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "histc",
    "kthvalue",
    "max_unpool2d",
    "max_unpool3d",
    "median",
    "nll_loss2d_forward",
    "nll_loss_forward",
    "put_",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "replication_pad1d_backward",
    "replication_pad2d_backward",
    "replication_pad3d_backward",
    "resize_",
    "scatter_reduce",
    "scatter_reduce_",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
    "_upsample_bicubic2d_aa_backward",
    "_upsample_bilinear2d_aa_backward",
}
"""Operations without a deterministic form on CUDA, by torch's ``use_deterministic_algorithms``, and
one of cuDNN that its documentation names.

Operations that become deterministic on request, such as convolutions, scatter and index_put, are
not listed, nor is padding that replicates edges, which then has another implementation.
"""
WORDS = [
    f"train.batch_size={2 * SAMPLES}",
    "train.samples=1000",
    "train.workers=1",
    "train.log_every=1000",
]
# The occlusion map is enlarged, too.
SMALL = ["model.dense_motion.scale_factor=0.25", "model.dense_motion.num_blocks=1"]
KINDS = {
    "mixing": [*SMALL, "priority_cut.mix_prob=1", "train.precision=bfloat16"],
    "patch": [
        "discriminator.kind=patch",
        "discriminator.patch_num_blocks=2",
        "discriminator.patch_spectral_norm=true",
        "priority_cut=null",
    ],
    "without a discriminator": [*ALONE],
    "cutmix, accumulated, clipped, checkpointed, VGG": [
        *SMALL,
        "priority_cut.mask=cutmix",
        "priority_cut.mix_prob=1",
        "train.accumulate=2",
        "optim.max_grad_norm=1",
        "train.activation_checkpointing=true",
        "loss.perceptual.weights=random",
        "loss.perceptual.scales=[1.0]",
    ],
}


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Restores torch's settings."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def one_step(*words: str, source: Path = TINY) -> Seen:
    config = load_config(str(source), [*WORDS, *words])
    with fake_cuda() as gpu:
        seen = train(gpu, config, steps=1)[1]
        assert torch.are_deterministic_algorithms_enabled() == config.train.deterministic
        assert torch.backends.cudnn.benchmark != config.train.deterministic
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_a_step_is_nondeterministic(kind: str) -> None:
    seen = one_step(*KINDS[kind], "train.deterministic=true")
    found = NONDETERMINISTIC & set(seen.by_name())
    assert found == set()
    assert seen.by_name()["index_put_"] > 0, "features are warped by gathering"
    assert len(seen.waits) == 1
    assert seen.blocking == []


def test_no_operation_of_the_thin_plate_family_is_nondeterministic() -> None:
    words = ["model.background_start=0", "train.precision=bfloat16", "train.deterministic=true"]
    seen = one_step("priority_cut.mix_prob=1", *words, source=TINY_TPS)
    assert NONDETERMINISTIC & set(seen.by_name()) == set()
    assert seen.by_name()["index_put_"] > 0
    assert len(seen.waits) == 1
    assert seen.blocking == []


@pytest.mark.parametrize(
    ("source", "words", "sampler"),
    [
        (TINY, SMALL, "grid_sampler_2d_backward"),
        (TINY_TPS, [], "cudnn_grid_sampler_backward"),
    ],
)
def test_nondeterministic_operations_would_be_detected(
    source: Path, words: list[str], sampler: str
) -> None:
    found = NONDETERMINISTIC & set(one_step(*words, source=source).by_name())
    assert found == {sampler, "upsample_bilinear2d_backward"}


def test_workers_get_the_workspace_setting_of_cublas() -> None:
    config = load_config(str(TINY))
    assert "CUBLAS_WORKSPACE_CONFIG" not in worker_environment(config)
    config = load_config(str(TINY), ["train.deterministic=true"])
    assert worker_environment(config)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
