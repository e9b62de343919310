"""Notifications of a retraining: a command, a webhook, and Prometheus metrics."""

import os
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import requests
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from pydantic import BaseModel
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from prioritycut_ray.errors import last_line
from prioritycut_ray.metrics.aggregate import Estimate
from prioritycut_ray.retraining.comparison import Comparison
from prioritycut_ray.retraining.data_check import DataCheck
from prioritycut_ray.retraining.gate import Verdict
from prioritycut_ray.retraining.job import RetrainingJob

_TIMEOUT_S = 30.0
_RETRIES = 3


class RetrainReport(BaseModel):
    """The report of a retraining: the content of ``report.json``.

    Attributes:
        outcome: promoted, refused or abandoned.
        candidate: name of the candidate.
        current: name of the current model after the retraining.
        compared_with: the model that the candidate was compared with.
        reason: the reason for the outcome, in one line.
        new_clips: number of new clips that the candidate was trained on.
        samples: number of frame pairs that the candidate has seen in total.
        begun: when the retraining began, ISO 8601.
        verdict: the verdict of the gate; None if the candidate was not compared.
        comparison: the comparison behind the verdict.
        data: what was found in the data; None if the candidate was abandoned before.
    """

    outcome: str
    candidate: str
    current: str
    compared_with: str
    reason: str
    new_clips: int
    samples: int
    begun: datetime
    verdict: Verdict | None
    comparison: Comparison | None
    data: DataCheck | None = None


def make_report(
    job: RetrainingJob,
    current: str,
    reason: str,
    verdict: Verdict | None,
    comparison: Comparison | None,
    data: DataCheck | None,
) -> RetrainReport:
    """Return the report of a job.

    Args:
        job: the job.
        current: name of the current model after the retraining.
        reason: the reason for the outcome.
        verdict: the verdict of the gate, if there is one.
        comparison: the comparison, if there is one.
        data: what was found in the data, if it was checked.
    """
    refused = "refused" if verdict else "abandoned"
    return RetrainReport(
        outcome="promoted" if current == job.candidate else refused,
        candidate=job.candidate,
        current=current,
        compared_with=job.current,
        reason=reason,
        new_clips=job.new_clips,
        samples=job.samples,
        begun=job.begun,
        verdict=verdict,
        comparison=comparison,
        data=data,
    )


def run_command(command: str, report: RetrainReport) -> str:
    """Run a shell command with the report as JSON on its stdin.

    Returns:
        What went wrong; empty on success.
    """
    try:
        done = subprocess.run(
            command,
            shell=True,
            input=report.model_dump_json(),
            text=True,
            capture_output=True,
            timeout=_TIMEOUT_S,
            env=os.environ | {"PRIORITYCUT_OUTCOME": report.outcome},
        )
    except subprocess.TimeoutExpired:
        return f"command {command!r} did not end within {_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return ""
    last = last_line(done.stderr) or "no message"
    return f"command {command!r} failed with exit code {done.returncode}: {last}"


def post(url: str, report: RetrainReport, *, retries: int = _RETRIES) -> str:
    """Post the report as JSON, with retries if the server does not answer.

    Returns:
        What went wrong; empty on success.
    """
    retry = Retry(retries, backoff_factor=1, allowed_methods=None, status_forcelist=(502, 503, 504))
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=retry))
        session.mount("https://", HTTPAdapter(max_retries=retry))
        try:
            session.post(
                url, json=report.model_dump(mode="json"), timeout=_TIMEOUT_S
            ).raise_for_status()
        except requests.RequestException as error:
            return f"webhook {url}: {error}"
    return ""


def write_metrics(path: str, report: RetrainReport | None) -> None:
    """Write metrics for the textfile collector of Prometheus' node exporter, atomically.

    Args:
        path: a file that ends in ``.prom``.
        report: the report; None if there were no new clips.
    """
    registry = CollectorRegistry()

    def gauge(name: str, text: str, value: float) -> None:
        Gauge(f"prioritycut_retrain_{name}", text, registry=registry).set(value)

    gauge("last_run_timestamp_seconds", "Time of the last retraining.", time.time())
    gauge("new_clips", "Number of new clips.", report.new_clips if report else 0)
    if report:
        gauge("promoted", "1 if the candidate was promoted.", float(report.outcome == "promoted"))
        gauge("samples", "Frame pairs that the candidate has seen.", report.samples)
    if report and report.comparison:
        comparison = report.comparison
        _by_holdout(registry, "score", "Mean over clips, candidate.", comparison.candidate)
        _by_holdout(
            registry, "difference", "Candidate minus current model.", comparison.differences
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(path, registry)


def _by_holdout(
    registry: CollectorRegistry,
    name: str,
    text: str,
    estimates: Mapping[str, Mapping[str, Estimate]],
) -> None:
    gauge = Gauge(f"prioritycut_retrain_{name}", text, ["holdout", "metric"], registry=registry)
    for holdout, by_metric in estimates.items():
        for metric, estimate in by_metric.items():
            if estimate.value is not None:
                gauge.labels(holdout, metric).set(estimate.value)
