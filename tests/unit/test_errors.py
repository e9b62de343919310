"""One table of exit codes, and the words for any error."""

import errno
import pickle
import re

import pytest

from prioritycut_ray.errors import ExitCode, UserError, describe, is_disk_full, reason_of
from tests.places import ROOT


def test_the_documented_exit_codes_are_the_ones_in_use() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    documented = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.M)
    assert documented == [(str(code.value), code.title) for code in ExitCode]


def test_an_exit_code_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(ExitCode.LEASE_HELD)) is ExitCode.LEASE_HELD


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a.mp4: is empty; remove it"), "a.mp4: is empty; remove it"),
        (ValueError("bad magic\nnumber  7"), "ValueError: number 7"),
        (TypeError("got a list\n========"), "TypeError: got a list"),
        (KeyError(), "KeyError"),
        (
            RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"),
            "RuntimeError: CUDA error: an illegal memory access",
        ),
        (
            OSError("404 Client Error. (Request ID: 7)\n\nRepository Not Found.\nPlease log in."),
            "OSError: 404 Client Error. (Request ID: 7)",
        ),
        (
            RuntimeError("failed finding central directory\nException raised from valid at c.cc"),
            "RuntimeError: failed finding central directory",
        ),
    ],
)
def test_an_error_is_described_on_one_line(error: Exception, line: str) -> None:
    assert describe(error) == line


def test_the_reason_of_an_error_leaves_out_its_path_and_its_type() -> None:
    assert reason_of(FileNotFoundError(errno.ENOENT, "No such file", "/a")) == "No such file"
    assert reason_of(ValueError("bad")) == "bad"
    assert reason_of(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("PytorchStreamReader failed"), False),
    ],
)
def test_a_full_disk_is_recognised(error: Exception, full: bool) -> None:
    assert is_disk_full(error) is full
