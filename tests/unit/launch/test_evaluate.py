"""Where the report of an evaluation is written."""

from pathlib import Path

import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.launch.evaluate import report_folder


def test_a_report_is_below_its_run_unless_a_folder_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        report_folder("~/runs/mine", None, "evaluation", "val")
        == tmp_path / "runs" / "mine" / "evaluation" / "val"
    )
    assert report_folder("s3://bucket/runs/mine", "~/report", "evaluation") == tmp_path / "report"


def test_a_report_is_not_written_to_a_url() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/runs/mine: .*--out"):
        report_folder("s3://bucket/runs/mine", None, "evaluation")
    with pytest.raises(UserError, match=r"s3://bucket/report: .*--out"):
        report_folder("runs/mine", "s3://bucket/report", "evaluation")
