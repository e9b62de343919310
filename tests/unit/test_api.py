"""The public names of the package cost nothing until they are used."""

import subprocess
import sys

import prioritycut_ray


def fresh_process(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_importing_the_package_imports_no_other_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import prioritycut_ray; dir(prioritycut_ray); "
        "print(sorted({n.split('.')[0] for n in set(sys.modules) - before} "
        "- set(sys.stdlib_module_names)))"
    )
    assert fresh_process(code) == "['prioritycut_ray']"


def test_reading_a_config_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from prioritycut_ray import load_config; load_config('quickstart'); "
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    assert fresh_process(code) == "[]"


def test_every_public_name_resolves_and_others_do_not() -> None:
    for name in prioritycut_ray.__all__:
        assert getattr(prioritycut_ray, name).__name__ == name
        assert name in dir(prioritycut_ray)
    assert not hasattr(prioritycut_ray, "Animtor")
