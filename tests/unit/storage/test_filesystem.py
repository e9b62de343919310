"""Errors of an S3 client become one line that names the URL, whatever uses the storage."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.packing.workspace import Workspace
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.storage.filesystem import StorageError, filesystem, is_network_mount
from prioritycut_ray.storage.folder import Folder
from tests.conftest import Prioritycut, assert_one_line
from tests.s3_server import S3

PROBLEMS = {
    "bucket": "the bucket does not exist",
    "credentials": "no valid credentials",
    "profile": "AWS_PROFILE",
    "endpoint": "AWS_ENDPOINT_URL",
    "denied": "access denied",
    "down": "the storage does not answer",
}


@pytest.fixture(params=PROBLEMS)
def problem(
    request: pytest.FixtureRequest, server: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """A bucket that cannot be used, and the reason that messages give."""
    kind = request.param
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    if kind == "bucket":
        bucket = "s3://missing-bucket"
    elif kind == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    elif kind == "profile":
        monkeypatch.setenv("AWS_PROFILE", "nowhere")
    elif kind == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    elif kind == "denied":
        server.fail_next(10**6, 403, "AccessDenied")
    elif kind == "down":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield bucket, PROBLEMS[kind]
    server.fail_next(0, 503, "SlowDown")
    s3fs.S3FileSystem.clear_instance_cache()


def write_shards(url: str) -> None:
    with ShardWriter(url) as writer:
        writer.add(Member("clip", b"x" * 5000, 5, 25.0, 64, 64, "ann", "clip.mp4", False))
        writer.finish({"clip": "train"})


def claim_workspace(url: str) -> None:
    with Workspace(url).claimed({"size": 64}, appending=False):
        pass


USES: dict[str, Callable[[str], object]] = {
    "names": lambda url: Folder(url).names(),
    "read": lambda url: Folder(url).read("a"),
    "write": lambda url: Folder(url).write("a", b""),
    "create": lambda url: Folder(url).create("a", b""),
    "claim": lambda url: claim_run(Folder(url), "launch", first=True),
    "find_checkpoint": find_checkpoint,
    "write_shards": write_shards,
    "workspace": claim_workspace,
}


def test_the_reason_is_one_line(problem: tuple[str, str]) -> None:
    bucket, reason = problem
    for name, use in USES.items():
        with pytest.raises(StorageError) as caught:
            use(f"{bucket}/runs/mine")
        message = str(caught.value)
        assert message.startswith(bucket), name
        assert reason in message, name
        assert "\n" not in message, name
        assert str(pickle.loads(pickle.dumps(caught.value))) == message, name


@pytest.mark.parametrize("problem", ["credentials"], indirect=True)
def test_commands_end_with_that_line(prioritycut: Prioritycut, problem: tuple[str, str]) -> None:
    bucket, reason = problem
    for words in (
        ["models", "list", "--models", f"{bucket}/models"],
        ["data", "info", f"{bucket}/data"],
        ["train", f"{bucket}/config.yaml"],
    ):
        assert_one_line(prioritycut(*words), bucket, reason)


def test_buckets_are_never_created(server: S3, bucket: str) -> None:
    fs, _ = filesystem("s3://never-created/data")
    fs.makedirs("never-created/data", exist_ok=True)
    fs.mkdir("never-created/data", create_parents=True)
    with pytest.raises(StorageError, match="the bucket does not exist"):
        write_shards("s3://never-created/data")
    fsspec.filesystem("s3").invalidate_cache()
    assert "never-created" not in fsspec.filesystem("s3").ls("")


def test_permanent_errors_are_not_retried(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StorageError):
        read_index("s3://missing-bucket/data")
    assert not caplog.records


def test_a_wrapped_file_system_survives_pickling(bucket: str) -> None:
    fs, root = pickle.loads(pickle.dumps(filesystem(f"{bucket}/data")))
    fs.pipe_file(f"{root}/a", b"content")
    with fs.open(f"{root}/a", "rb") as file:
        assert file.read() == b"content"
    with fs.open(f"{root}/b", "wb") as file:
        file.write(b"more")
    assert fs.cat_file(f"{root}/b") == b"more"
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{root}/c")


def test_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:1/.*cannot use this URL"):
        write_shards("http://127.0.0.1:1/data")


MOUNTS = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:40 / /data rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2
41 40 8:17 / /data/local\040disk rw - xfs /dev/sdb1 rw
42 22 0:50 / /mnt/bucket rw,nosuid - fuse.s3fs s3fs rw
43 22 0:51 / /database rw - ext4 /dev/sdc1 rw
"""


def test_network_mounts_are_recognised(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    for path, expected in {
        "/data": True,
        "/data/set/index.arrow": True,
        "/data/local disk/set": False,
        "/database/set": False,
        "/mnt/bucket/x": True,
        "/home": False,
    }.items():
        assert is_network_mount(path, str(mounts)) == expected, path
    assert not is_network_mount("/data", str(tmp_path / "nowhere"))
    assert isinstance(is_network_mount(str(tmp_path)), bool), "the real list is understood"
