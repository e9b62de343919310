"""One table of exit codes, and the words for any error."""

import pickle
import re

from prioritycut_ray.errors import ExitCode
from tests.places import ROOT


def test_the_documented_exit_codes_are_the_ones_in_use() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    documented = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.M)
    assert documented == [(str(code.value), code.title) for code in ExitCode]


def test_an_exit_code_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(ExitCode.LEASE_HELD)) is ExitCode.LEASE_HELD
