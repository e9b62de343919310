"""Tiny networks, eager and compiled, in a process without pytest's checks of shapes.

``python -m tests.compiled_steps BACKEND FAMILY`` prints the results of two training steps as one
line of JSON; only the second one mixes. ``python -m tests.compiled_steps BACKEND block`` prints
those of one block for batches of two sizes.
"""

import json
import sys
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.blocks import DownBlock
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.compilation import compile_networks
from prioritycut_ray.training.state import new_state, set_learning_rates
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.trainer import distribute
from prioritycut_ray.training.worker import Worker
from tests.places import FAMILIES

OF_FAMILY = {
    "first_order": ["model.detector.num_blocks=1", "model.dense_motion.num_blocks=1"],
    "thin_plate": ["model.background_start=0"],
}
SMALLEST = [
    "loss.perceptual.scales=[1.0]",
    "priority_cut.mix_prob=1",
    "priority_cut.warmup_samples=100",
    # The networks hardly change: any difference comes from a single step.
    "optim.lr=1e-12",
    "optim.detector_lr=1e-12",
    "optim.discriminator_lr=1e-12",
]


def steps(config: Config, backend: str, worker: Worker) -> list[dict[str, float]]:
    """Losses and gradient norms of a step without mixing and of one with mixing."""
    state, perceptual = new_state(config, worker.device), build_perceptual(config)
    networks = distribute(state, worker)
    if backend:
        compile_networks(state.animator, state.discriminator, perceptual, backend=backend)
    set_learning_rates(state, config)
    results = []
    for step, state.samples in enumerate((0, 100)):
        shape = (2, config.train.batch_size // worker.world_size, 3, *[config.data.size] * 2)
        frames = torch.rand(shape, generator=torch.Generator().manual_seed(step))
        randomness = draw_randomness(config, step, worker)
        parts = micro_batches(FramePair(*frames), randomness, config.train.accumulate)
        losses = training_step(state, *networks, perceptual, parts, config).losses
        of_animator, of_critic = map(_gradient_norm, (state.animator, state.discriminator))
        results.append(
            {name: loss.item() for name, loss in losses.items()}
            | {"animator": of_animator, "discriminator": of_critic, "graphs": _graphs()}
        )
    return results


def block(backend: str) -> list[dict[str, float]]:
    """The results of a block for batches of two sizes."""
    torch.manual_seed(0)
    network = DownBlock(3, 4)
    if backend:
        compile_networks(network, backend=backend)
    results = []
    for batch in (4, 6):
        network.zero_grad()
        out = network(torch.rand(batch, 3, 16, 16).contiguous(memory_format=torch.channels_last))
        out.square().sum().backward()
        results.append(
            {
                "out": out.square().sum().item(),
                "gradient": _gradient_norm(network),
                "variance": network.norm.running_var.sum().item(),
                "graphs": _graphs(),
            }
        )
    return results


def _gradient_norm(network: nn.Module) -> float:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def main(backend: str, part: str) -> None:
    """Print the results of both ways."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, way in {"plain": "", "compiled": backend}.items():
        if part == "block":
            results[name] = block(way)
        else:
            config = load_config(str(FAMILIES[part]), [*OF_FAMILY[part], *SMALLEST])
            results[name] = steps(config, way, Worker(0, 1, torch.device("cpu")))
    sys.stdout.write(json.dumps(results | {"breaks": dict(counters["graph_break"])}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
