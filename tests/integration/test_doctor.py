"""``prioritycut doctor`` on this machine's own Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from prioritycut_ray.launch.node_checks import CheckResult
from tests.conftest import Prioritycut, Result

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

Checks = dict[tuple[str, str], CheckResult]


def checked(prioritycut: Prioritycut, *words: Any) -> tuple[Result, Checks]:
    """Run doctor with any exit code: this machine itself may be short of disk or memory."""
    result = prioritycut("doctor", "--json", *map(str, words))
    checks = [CheckResult(**row) for row in json.loads(result.stdout)]
    assert result.returncode == (0 if all(check.ok for check in checks) else 1)
    places = {"driver": "driver"} | {c.place: "node" for c in checks if c.place != "driver"}
    return result, {(places[check.place], check.name): check for check in checks}


def test_driver_and_node_are_checked(
    prioritycut: Prioritycut, shards: Path, tmp_path: Path
) -> None:
    _, checks = checked(prioritycut, "--storage", tmp_path / "runs", "--data", shards)
    names = {"torch", "decoder", "/dev/shm", "disk", "memory", "CPUs", "storage", "data"}
    assert {name for place, name in checks if place == "driver"} == names
    assert {name for place, name in checks if place == "node"} == {*names, "versions", "clock"}
    for (_, name), check in checks.items():
        assert check.found
        assert check.ok or check.fix
        if name in ("torch", "decoder", "storage", "data", "versions", "clock"):
            assert check.ok, check
    assert list((tmp_path / "runs").iterdir()) == [], "nothing is left in the storage"


def test_each_finding_comes_with_its_fix(
    prioritycut: Prioritycut, shards_copy: Path, tmp_path: Path
) -> None:
    for shard in shards_copy.glob("*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    (tmp_path / "file").touch()
    words = ["--storage", tmp_path / "file" / "runs", "--data", shards_copy]
    result, checks = checked(prioritycut, *words)
    assert result.returncode == 1
    assert "storage (driver)" in result.stderr
    for place in ("driver", "node"):
        assert not checks[place, "storage"].ok
        assert "credentials" in checks[place, "storage"].fix
        assert "checksum" in checks[place, "data"].found
    printed = prioritycut("doctor", *map(str, words)).stdout
    assert "FINDING  driver                storage" in printed
    assert "fix: check the path or URL" in printed
