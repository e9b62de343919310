"""How PBT perturbs the values that a trial clones."""

import random
from typing import Any

import pytest

from prioritycut_ray.search.pbt import Explore
from prioritycut_ray.search.space import Domain

LISTS: list[tuple[Any, ...]] = [
    ("priority", "cutmix", "none"),
    (0.9, 0.99, 0.999),
    (1, 2.5, "auto"),
    (16, None),
    (True, False),
    ((0.5, 0.9), (0.0, 0.99)),
    (1, True, 0, False),
    ("only",),
]


def changed(domain: Domain, value: Any, resample: float, times: int = 200) -> list[Any]:
    explore = Explore({"key": domain}, resample, random.Random(0))
    results = [explore({"key": value, "variant": "unet"}) for _ in range(times)]
    assert all(result["variant"] == "unet" for result in results)
    return [result["key"] for result in results]


@pytest.mark.parametrize("resample", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("choice", LISTS, ids=str)
def test_a_perturbed_choice_stays_in_its_list(choice: tuple[Any, ...], resample: float) -> None:
    for value in choice:
        for new in changed(Domain(choice=choice), value, resample):
            assert any(new is item for item in choice)


def test_without_resampling_a_choice_becomes_a_neighbour() -> None:
    domain = Domain(choice=("a", "b", "c", "d"))
    assert set(changed(domain, "b", 0.0)) == {"a", "c"}
    assert set(changed(domain, "a", 0.0)) == {"a", "b"}
    assert set(changed(domain, "a", 1.0)) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("resample", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "kind", [{"uniform": (-2.0, 1.0)}, {"loguniform": (1e-5, 1e-3)}, {"int": (-2, 3)}]
)
def test_a_number_stays_within_its_range(kind: dict[str, Any], resample: float) -> None:
    domain = Domain.model_validate(kind)
    assert domain.bounds is not None
    low, high = domain.bounds
    for value in (low, high):
        for new in changed(domain, value, resample):
            assert low <= new <= high
            assert isinstance(new, int) == (domain.whole is not None)


def test_a_number_changes_by_a_fifth_and_a_small_integer_by_one() -> None:
    assert set(changed(Domain(uniform=(0.0, 1.0)), 0.5, 0.0)) == {0.4, 0.6}
    assert set(changed(Domain.model_validate({"int": (1, 80)}), 50, 0.0)) == {40, 60}
    assert set(changed(Domain.model_validate({"int": (1, 80)}), 2, 0.0)) == {1, 3}
