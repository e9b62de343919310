"""The manifests' own command lines on a Ray cluster of several hosts, with S3 for storage.

Hosts are network namespaces on this machine (tests/network.py). The test does with a manifest what
KubeRay would do: `ray start` with its parameters on one host per pod, with its environment, and its
entrypoint as a Ray job. Only options of the manifests make the training tiny.
"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.kubernetes.options import ManifestOptions
from prioritycut_ray.kubernetes.render import render
from prioritycut_ray.video.encoding import write_video
from tests import network
from tests.hosts import BIN, ROOT, TOKEN, Node, environment
from tests.network import Host, Network
from tests.runs import await_truth
from tests.s3_server import s3_server

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.timeout(1800)]

BUCKET = "prioritycut"
SIZE = 64
STEPS = 40
TINY = [
    f"train.samples={4 * STEPS}",
    "train.batch_size=4",
    "train.log_every=5",
    "train.image_every=1000",
    "train.checkpoint_every=5",
]
WEIGHTS = ("animator.safetensors", "animator_ema.safetensors", "discriminator.safetensors")
JOB_SECONDS = 600.0
AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}
"""What Ray's autoscaler needs in the head's environment when nodes are processes."""
AUTOSCALER_LISTS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "initialization_commands",
    "cluster_synced_files",
)
"""Keys that its configuration requires."""
Object = dict[str, Any]


class Bucket(NamedTuple):
    """Contents of the storage, read over HTTP from a host of its network."""

    host: Host
    url: str

    def request(self, path: str, method: str = "GET") -> bytes:
        return self.host.request(f"{self.url}/{BUCKET}{path}", method, token="any")

    def keys(self, prefix: str) -> list[str]:
        listing = ElementTree.fromstring(self.request(f"?list-type=2&prefix={prefix}"))
        names = [element.text or "" for element in listing.iter() if element.tag.endswith("}Key")]
        assert len(names) < 1000, "one page"
        return names

    def steps(self, run: str) -> list[int]:
        """Return the steps of the complete checkpoints of a run."""
        pattern = re.compile(rf"runs/{re.escape(run)}/step_(\d+)/manifest\.json")
        matches = map(pattern.fullmatch, self.keys(f"runs/{run}/step_"))
        return [int(match[1]) for match in matches if match]

    def weights(self, run: str) -> dict[str, str]:
        """Return the checksums of the networks in the last checkpoint."""
        step = self.steps(run)[-1]
        manifest = json.loads(self.request(f"/runs/{run}/step_{step:07d}/manifest.json"))
        return {name: manifest[name] for name in WEIGHTS}


class Stage(NamedTuple):
    """The network, the storage with a data set, and the manifests.

    Attributes:
        network: network that every cluster adds its hosts to.
        client: the host of the user and of the operator's submitter.
        home: contents of the image's working directory.
        environ: environment of every container.
        manifests: objects by file.
    """

    folder: Path
    network: Network
    client: Host
    bucket: Bucket
    home: Path
    environ: dict[str, str]
    manifests: dict[str, list[Object]]

    def run(self, *words: str) -> str:
        """Run a command line as a user whose machine reaches the cluster and the storage."""
        result = subprocess.run(
            [*self.client.prefix, str(BIN / "prioritycut"), *words],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def write_videos(self, kind: str, splits: Sequence[str]) -> Path:
        """Write puppets of separate identities; returns the table with the split of each."""
        table = self.folder / f"{kind}.csv"
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "identity", "split"])
            for number, split in enumerate(splits):
                video = self.folder / f"{kind}{number}.mp4"
                seed = sum(kind.encode()) + number
                write_video(video, render_clip(seed, size=SIZE, frames=12).frames, 12.0)
                rows.writerow([video.name, video.stem, split])
        return table

    def ray_job(self, verb: str) -> Object:
        """Return the RayJob of a manifest."""
        if verb == "retrain":
            config_map = self.manifests["cronjob-retrain.yaml"][0]
            return dict(yaml.safe_load(config_map["data"]["rayjob.yaml"]))
        return self.manifests[f"rayjob-{verb}.yaml"][0]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    reason = network.why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with Network() as net:
        storage, client = net.add("storage"), net.add("client")
        with s3_server(storage.address, storage.prefix) as s3:
            files = render(options(s3.url))
            manifests = {name: list(yaml.safe_load_all(text)) for name, text in files.items()}
            stage = Stage(
                folder,
                net,
                client,
                Bucket(client, s3.url),
                home_of_image(folder / "home"),
                variables(manifests),
                manifests,
            )
            stage.bucket.request("", "PUT")
            videos = stage.write_videos("first", ["train", "train", "train", "val", "test"])
            data = f"s3://{BUCKET}/data"
            stage.run("shard", str(videos), "--out", data, "--size", str(SIZE))
            yield stage


def options(endpoint: str) -> ManifestOptions:
    """Small pods without GPUs and a small training; defaults otherwise."""
    pod = {"cpus": 1, "memory_gib": 4, "shm_gib": 1}
    return ManifestOptions.model_validate(
        {
            "image": "prioritycut-ray:0.1.0-ray2.60.0-cpu",
            "storage": f"s3://{BUCKET}",
            "storage_endpoint": endpoint,
            "train": {"config": "quickstart", "overrides": TINY},
            "head": pod,
            "worker": {**pod, "gpus": 0},
            "max_workers": 2,
        }
    )


def home_of_image(folder: Path) -> Path:
    """Copy what the Dockerfile copies to the working directory."""
    folder.mkdir()
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) /home/ray/(\S*)$", dockerfile, re.MULTILINE)
    assert copied
    for source, target in copied:
        place = folder / (target or source)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place)
        else:
            shutil.copy(ROOT / source, place)
    return folder


def variables(manifests: dict[str, list[Object]]) -> dict[str, str]:
    """Return the environment of the head's container; the operator adds the token."""
    cluster = manifests["rayjob-train.yaml"][0]["spec"]["rayClusterSpec"]
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    secret = manifests["storage-secret.yaml"][0]["stringData"]
    given = {item["name"]: item["value"] for item in container["env"]}
    return environment(**given, **secret, NO_PROXY="*")


class Pods:
    """A RayJob's cluster, one host per pod, started as by the operator; a context manager."""

    def __init__(self, stage: Stage, verb: str) -> None:
        self._stage = stage
        self.job = stage.ray_job(verb)
        self.spec = self.job["spec"]["rayClusterSpec"]
        self._nodes: dict[str, Node] = {}
        self._hosts: dict[str, Host] = {}

    def __enter__(self) -> "Pods":
        try:
            self.start_head()
            if not self.spec["enableInTreeAutoscaling"]:
                self.start_workers("worker1", "worker2")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for node in self._nodes.values():  # all at once, then one by one until they have ended
            node.process.terminate()
        for node in self._nodes.values():
            node.end()

    @property
    def url(self) -> str:
        """URL of the head's dashboard."""
        return f"http://{self.host('head').address}:8265"

    def node(self, name: str) -> Node:
        """Return a node: head, worker1, ..."""
        return self._nodes[name]

    def host(self, name: str) -> Host:
        """Return the host of a node."""
        return self._hosts[name]

    def start_head(self) -> None:
        words, variables = ["--head", "--port=6379"], {}
        if self.spec["enableInTreeAutoscaling"]:
            words.append(f"--autoscaling-config={self._autoscaling_config()}")
            variables = AUTOSCALER
        self._start("head", self.spec["headGroupSpec"], words, **variables)
        self._await_node("head")

    def _autoscaling_config(self) -> Path:
        """Write the manifest's groups for Ray's autoscaler; nodes are processes of the head."""
        options, groups = self.spec["autoscalerOptions"], self.spec["workerGroupSpecs"]
        assert options["version"] == "v2"
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        types: Object = {FAKE_HEAD_NODE_TYPE: head}
        for group in groups:
            types[group["groupName"]] = {
                "resources": {"CPU": int(_limits(group)["cpu"]), "object_store_memory": 10**8},
                "node_config": {},
                "min_workers": group["minReplicas"],
                "max_workers": group["maxReplicas"],
            }
        file = self._stage.folder / "autoscaling.json"
        config = {
            "cluster_name": "test",
            "max_workers": sum(group["maxReplicas"] for group in groups),
            "idle_timeout_minutes": options["idleTimeoutSeconds"] / 60,
            "upscaling_speed": 1.0,
            "provider": {
                "type": "external",  # the wheel lacks the defaults of "fake_multinode"
                "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "available_node_types": types,
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            **{key: [] for key in AUTOSCALER_LISTS},
        }
        file.write_text(json.dumps(config))
        return file

    def start_workers(self, *names: str) -> None:
        address = f"--address={self.host('head').address}:6379"
        for name in names:  # one by one: hosts share the session's folder, and two would collide
            self._start(name, self.spec["workerGroupSpecs"][0], [address])
            self._await_node(name)

    def _await_node(self, name: str) -> None:
        """Wait until the head reports it alive: the operator submits to a complete cluster."""
        client, address, node = self._stage.client, self.host(name).address, self.node(name)

        def alive() -> bool:
            assert node.process.poll() is None, node.output()
            try:
                answer = json.loads(client.request(f"{self.url}/nodes?view=summary", token=TOKEN))
            except subprocess.CalledProcessError:
                return False
            known = answer["data"]["summary"]
            return any(
                n.get("ip") == address and n["raylet"].get("state") == "ALIVE" for n in known
            )

        await_truth(alive, f"{name} joins", 180)

    def _start(self, name: str, group: Object, words: list[str], **variables: str) -> None:
        host = self._hosts[name] = self._stage.network.add(name)
        parameters = {"num-cpus": _limits(group)["cpu"], **group["rayStartParams"]}
        words += [f"--{key}={value}" for key, value in parameters.items()]
        words += [f"--node-ip-address={host.address}"]
        environ = self._stage.environ | variables
        node = Node(words, environ, host.prefix, self._stage.home)
        self._nodes[name] = node

    def submit(self, job_id: str, *more: str) -> "Job":
        """Run the manifest's entrypoint like the operator's submitter."""
        return Job(self._stage, self.url, job_id, self.job["spec"]["entrypoint"], more)


def _limits(group: Object) -> dict[str, str]:
    return dict(group["template"]["spec"]["containers"][0]["resources"]["limits"])


class Job:
    """A Ray job, and the submitter that follows it.

    Args:
        stage: the stage that it runs on.
        url: URL of the head's dashboard.
        job_id: its submission id.
        entrypoint: entrypoint of the manifest.
        more: words to append to it.
    """

    def __init__(
        self, stage: Stage, url: str, job_id: str, entrypoint: str, more: Sequence[str]
    ) -> None:
        self.id, self._stage, self._url = job_id, stage, url
        self._file = stage.folder / f"{job_id}.txt"
        words = ["job", "submit", "--address", url, "--submission-id", job_id, "--"]
        words += [*shlex.split(entrypoint), *more]
        with self._file.open("wb") as output:
            self.process = subprocess.Popen(
                [*stage.client.prefix, str(BIN / "ray"), *words],
                cwd=stage.folder,
                env=stage.environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self._file.read_text(errors="replace")

    def end(self, seconds: float = JOB_SECONDS) -> int:
        """Wait for the submitter's exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.id} is still running\n{self.output()}") from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def await_step(self, run: str, step: int) -> None:
        """Wait until the run has a checkpoint of this step or later."""

        def there() -> bool:
            assert self.process.poll() is None, self.output()
            return any(found >= step for found in self._stage.bucket.steps(run))

        try:
            await_truth(there, f"step {step}", 300)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None


@pytest.fixture(scope="module")
def trained(stage: Stage) -> str:
    """The run of an undisturbed training job."""
    with Pods(stage, "train") as pods:
        job = pods.submit("train")
        assert job.end() == 0, job.output()
        listed = stage.run("jobs", "status", "train", "--address", pods.url)
        assert "SUCCEEDED" in listed
    return "quickstart"


def test_train(stage: Stage, trained: str) -> None:
    assert stage.bucket.steps(trained)[-1] == STEPS
    keys = stage.bucket.keys(f"runs/{trained}/")
    assert any("tfevents" in key for key in keys)
    assert any(key.startswith(f"runs/{trained}/metrics/") for key in keys)


def test_a_job_that_cannot_continue_fails_with_its_reason(stage: Stage) -> None:
    with Pods(stage, "train") as pods:
        job = pods.submit("wrong", "name=wrong", f"data.url=s3://{BUCKET}/none")
        assert job.end() == 1
        assert f"s3://{BUCKET}/none" in job.output()
        assert "Traceback" not in job.output()


def test_tune(stage: Stage) -> None:
    with Pods(stage, "tune") as pods:
        job = pods.submit("tune", "--smoke", "train.samples=16")
        assert job.end() == 0, job.output()
    assert_search_finished(stage, "runs/ablation-smoke")


def test_a_search_makes_a_cluster_without_workers_grow(stage: Stage) -> None:
    with Pods(stage, "retrain") as pods:
        assert pods.spec["enableInTreeAutoscaling"]
        entrypoint = stage.ray_job("tune")["spec"]["entrypoint"]
        words = ["--smoke", "train.samples=16", f"storage=s3://{BUCKET}/grown"]
        job = Job(stage, pods.url, "tune-grows", entrypoint, words)
        assert job.end() == 0, job.output()
    assert_search_finished(stage, "grown/ablation-smoke")


def assert_search_finished(stage: Stage, folder: str) -> None:
    keys = stage.bucket.keys(f"{folder}/")
    for name in ("best.yaml", "trials.csv", "search.html"):
        assert f"{folder}/{name}" in keys
    table = stage.bucket.request(f"/{folder}/trials.csv").decode()
    trials = list(csv.DictReader(table.splitlines()))
    assert {trial["variant"] for trial in trials} == {"baseline", "unet", "cutmix", "prioritycut"}
    assert {trial["status"] for trial in trials} == {"finished"}


def test_a_node_dies(stage: Stage, trained: str) -> None:
    with Pods(stage, "train") as pods:
        job = pods.submit("node-dies", "name=node-dies")
        job.await_step("node-dies", 10)
        pods.node("worker2").kill()
        pods.start_workers("worker3")  # as the operator replaces a pod
        assert job.end() == 0, job.output()
        assert f"node {pods.host('worker2').address}" in job.output()
    assert stage.bucket.weights("node-dies") == stage.bucket.weights(trained)


def test_a_link_is_cut_for_20_s(stage: Stage, trained: str) -> None:
    with Pods(stage, "train") as pods:
        job = pods.submit("link-cut", "name=link-cut")
        job.await_step("link-cut", 10)
        host = pods.host("worker2")
        host.cut()
        time.sleep(20)
        during = stage.bucket.steps("link-cut")
        host.mend()
        assert during[-1] < STEPS, "the link was cut too late"
        assert job.end() == 0, job.output()
    assert stage.bucket.weights("link-cut") == stage.bucket.weights(trained)


def test_the_head_dies_and_a_new_cluster_resumes_the_run(stage: Stage, trained: str) -> None:
    """Test this while the workers of the old one are still training.

    The new cluster is that of the RayJob that replaces the failed one (`kubectl replace --force`),
    or of SidecarMode's next attempt: the operator does not retry a job of K8sJobMode whose head is
    lost.
    """
    with Pods(stage, "train") as old:
        first = old.submit("head-dies-0", "name=head-dies")
        first.await_step("head-dies", 10)
        old.node("head").kill()
        assert first.end() != 0
        with Pods(stage, "train") as new:
            second = new.submit("head-dies-1", "name=head-dies")
            assert second.end() == 0, second.output()
    assert stage.bucket.weights("head-dies") == stage.bucket.weights(trained)


def test_retrain(stage: Stage, trained: str) -> None:
    """The last test: it appends clips to the data that the other runs were compared on."""
    models = f"s3://{BUCKET}/models"
    stage.run("models", "promote", f"s3://{BUCKET}/runs/{trained}", "--models", models)
    videos = stage.write_videos("second", ["train", "train", "val"])
    stage.run("data", "append", f"s3://{BUCKET}/data", str(videos))
    with Pods(stage, "retrain") as pods:
        job = pods.submit("retrain", "budget=64")
        assert job.end() == 0, job.output()
        again = pods.submit("retrain-again", "budget=64")
        assert again.end() == 0, again.output()
    assert "[6/6] reporting" in job.output()
    assert re.search("nothing new: .* (has seen|was made from)", again.output())
    assert any(key.endswith("/report.html") for key in stage.bucket.keys("models/"))
    history = json.loads(stage.bucket.request("/models/current.json"))["history"]
    assert history[0]["model"] == trained
