"""The Dockerfile, really built and run as its pods are: uid 1000, a root that cannot be written.

Pods are processes in the image's files, each on a host of its own (tests/network.py), with the
environment, the parameters and the entrypoint of the rendered manifests.
"""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.kubernetes.options import ManifestOptions
from prioritycut_ray.kubernetes.render import render
from prioritycut_ray.video.encoding import write_video
from tests import container, network
from tests.container import Builder, Container, package_index
from tests.hosts import ROOT, TOKEN
from tests.network import Host, Network
from tests.runs import await_truth
from tests.s3_server import s3_server

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

TAG = "prioritycut-ray:0.1.0-ray2.60.0-cpu"
BUCKET = "prioritycut"
SIZE = 64
TINY = ["train.samples=16", "train.batch_size=4", "train.image_every=1000"]
Object = dict[str, Any]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The image of the Dockerfile, unchanged, with torch from the package index."""
    reason = container.why_not() or network.why_not()
    if reason:
        pytest.skip(reason)
    with Builder(tmp_path_factory.mktemp("images")) as builder:
        builder.make_base()
        builder.build(ROOT, TAG, TORCH_INDEX=package_index())
        yield builder.container(TAG)


class Stage(NamedTuple):
    """The image, a network with storage, and what the training job's manifest says."""

    image: Container
    network: Network
    environ: dict[str, str]
    job: Object

    def command(self, host: Host, *words: str) -> list[str]:
        """A command line in a pod on a host."""
        return [*host.prefix, *self.image.command(words, self.environ)]

    def run(self, host: Host, *words: str) -> str:
        """What a command prints in a pod on a host."""
        done = subprocess.run(
            self.command(host, *words), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def stage(image: Container) -> Iterator[Stage]:
    with Network() as net:
        storage = net.add("storage")
        with s3_server(storage.address, storage.prefix) as s3:
            pod = {"cpus": 1, "memory_gib": 4, "shm_gib": 1}
            options = ManifestOptions.model_validate(
                {
                    "image": TAG,
                    "storage": f"s3://{BUCKET}",
                    "storage_endpoint": s3.url,
                    "train": {"config": "quickstart", "overrides": TINY},
                    "head": pod,
                    "worker": {**pod, "gpus": 0},
                    "max_workers": 1,
                }
            )
            job = yaml.safe_load(render(options)["rayjob-train.yaml"])
            storage.request(f"{s3.url}/{BUCKET}", "PUT", token="any")
            yield Stage(image, net, {**_environment(job), **s3.variables, "NO_PROXY": "*"}, job)


def _environment(job: Object) -> dict[str, str]:
    """Of the head's container; the operator adds the token."""
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    given = template["spec"]["containers"][0]["env"]
    named = {item["name"]: item["value"] for item in given if "value" in item}
    return {**named, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def test_doctor_finds_nothing_wrong(stage: Stage) -> None:
    host = stage.network.add("doctor")
    storage = f"s3://{BUCKET}/runs"
    assert "failed" not in stage.run(host, "prioritycut", "doctor", "--storage", storage)


def test_what_a_pod_needs_is_there(stage: Stage) -> None:
    host = stage.network.add("look")
    assert stage.run(host, "id", "-u").strip() == "1000"
    assert stage.run(host, "wget", "--version")
    assert stage.run(host, "ls").split() == ["retrain.yaml", "tune_configs"]
    with pytest.raises(AssertionError, match="Read-only file system"):
        stage.run(host, "touch", "/home/ray/written")


def test_the_training_job_succeeds(stage: Stage, tmp_path: Path) -> None:
    client, head, worker = (stage.network.add(name) for name in ("client", "head", "worker"))
    _shard(stage, client)
    cluster = stage.job["spec"]["rayClusterSpec"]
    with ExitStack() as stack:
        _start(stack, stage, head, cluster["headGroupSpec"], "--head", "--port=6379")
        url = f"http://{head.address}:8265"
        await_truth(lambda: _answers(client, url), "the head answers", 180)
        group = cluster["workerGroupSpecs"][0]
        _start(stack, stage, worker, group, f"--address={head.address}:6379")
        entrypoint = shlex.split(stage.job["spec"]["entrypoint"])
        said = stage.run(client, "ray", "job", "submit", "--address", url, "--", *entrypoint)
    assert "succeeded" in said
    assert stage.run(
        client, "prioritycut", "export", f"s3://{BUCKET}/runs/quickstart", "--out", "/tmp/m"
    )


def _shard(stage: Stage, host: Host) -> None:
    """Pack puppets in the image: its video libraries work."""
    videos = stage.image.root / "videos"
    videos.mkdir()
    for seed in range(3):
        write_video(videos / f"{seed}.mp4", render_clip(seed, size=SIZE, frames=12).frames, 12.0)
    words = ["/videos", "--out", f"s3://{BUCKET}/data", "--size", str(SIZE)]
    stage.run(host, "prioritycut", "shard", *words)


def _start(stack: ExitStack, stage: Stage, host: Host, group: Object, *words: str) -> None:
    """`ray start` as the operator calls it."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters = {"num-cpus": limits["cpu"], **group["rayStartParams"]}
    given = [f"--{key}={value}" for key, value in parameters.items()]
    command = ["ray", "start", *words, *given, f"--node-ip-address={host.address}", "--block"]
    process = subprocess.Popen(
        stage.command(host, *command),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    stack.callback(process.wait, 60)
    # Among them the first process of the pod's namespace, with which all others end.
    stack.callback(os.killpg, process.pid, signal.SIGKILL)


def _answers(client: Host, url: str) -> bool:
    try:
        return bool(client.request(f"{url}/api/version", token=TOKEN))
    except subprocess.CalledProcessError:
        return False
