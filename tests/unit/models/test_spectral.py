from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from prioritycut_ray.models.spectral import normalised_weights, spectral_norm

Layers = nn.Sequential


def layers(normalise: Callable[[nn.Module], nn.Module]) -> Layers:
    """A small network with normalised weights, the same for every implementation."""
    torch.manual_seed(0)
    network = nn.Sequential(
        normalise(nn.Conv2d(5, 8, 3, padding=1)),
        nn.ReLU(),
        normalise(nn.Conv2d(8, 6, 1)),
        nn.Flatten(),
        normalise(nn.Linear(96, 3)),
    )
    return network.to(memory_format=torch.channels_last)


@pytest.fixture
def networks() -> tuple[Layers, Layers]:
    """Torch's implementation, layer by layer, and ours."""
    return layers(parametrizations.spectral_norm), layers(spectral_norm)


def images() -> Tensor:
    return torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1))


def differences(theirs: Layers, ours: Layers) -> dict[str, float]:
    """The largest difference of every named tensor and gradient."""
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(expected) == list(found)
    largest = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None
            largest[f"gradient of {name}"] = ((a.grad - b.grad).norm() / a.grad.norm()).item()
    return largest


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_weights_gradients_and_vectors_match_torch(
    networks: tuple[Layers, Layers], together: bool, training: bool
) -> None:
    theirs, ours = networks
    assert max(differences(theirs, ours).values()) < 1e-6, "at the start"
    for network in networks:
        network.train(training)
    for _ in range(3):
        expected = theirs(images())
        if together:
            with normalised_weights(ours):
                found = ours(images())
        else:
            found = ours(images())
        assert torch.allclose(found, expected, atol=1e-6)
        expected.square().sum().backward()
        found.square().sum().backward()
        worst = differences(theirs, ours)
        assert max(worst.values()) < 1e-6, worst


def vectors(network: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in network.buffers()]


def test_passes_together_take_one_power_iteration() -> None:
    once, twice = layers(spectral_norm), layers(spectral_norm)
    once(images())
    with normalised_weights(twice):
        first = twice(images())
        with normalised_weights(twice):
            assert torch.equal(twice(images()), first)
    assert all(torch.equal(a, b) for a, b in zip(vectors(once), vectors(twice), strict=True))
    twice(images())
    assert not all(torch.equal(a, b) for a, b in zip(vectors(once), vectors(twice), strict=True))


def test_a_failing_pass_leaves_no_computed_weights() -> None:
    network = layers(spectral_norm).eval()
    with pytest.raises(RuntimeError), normalised_weights(network):
        network(images()[:, :1])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert parametrize.is_parametrized(network[0], "weight")
    largest = torch.linalg.svdvals(network[0].weight.detach().flatten(1))[0]
    assert largest < 1.5, "computed from the new weight"
