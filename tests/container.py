"""Images without a daemon: built by buildah in a chroot, run with a read-only root.

debootstrap makes the base image under the name that the Dockerfile uses, so no image registry is
needed; package indexes are.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BASE = "docker.io/library/python:3.11-slim-bookworm"
_PYTHON = "python3,python3-venv,python3-pip,ca-certificates"
_PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "/etc/ssl/certs")
"""The files through which this machine's pip reaches its index; its local folders are added."""
_RUN = r"""
set -eu
root=$1; shift
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
touch "$root/etc/hosts"
mount --bind /etc/hosts "$root/etc/hosts"
for folder in /dev/shm /tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root$folder"; done
mount -o remount,bind,ro "$root"
exec chroot --userspec=1000:1000 "$root" "$@"
"""


def why_not() -> str:
    """Return why this machine cannot build images; empty if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "building an image needs root"
    for program in ("buildah", "debootstrap", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return ""


class Builder:
    """An image store below a folder; a context manager that removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buildah = [
            "buildah",
            "--root",
            str(folder / "store"),
            "--runroot",
            str(folder / "run"),
        ]

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_: object) -> None:
        self.run("rm", "--all")
        self.run("rmi", "--all", "--force")

    def run(self, *words: str) -> str:
        """Run a buildah command and return its output."""
        environ = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}
        done = subprocess.run(
            [*self._buildah, *words], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout.strip()

    def make_base(self) -> None:
        """Make the Dockerfile's base image: Debian 12 with its Python 3.11."""
        root = self._folder / "base"
        words = ["--variant=minbase", f"--include={_PYTHON}", "bookworm", str(root), _mirror()]
        subprocess.run(["debootstrap", *words], check=True, capture_output=True)
        for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()  # The image's own Python belongs to pip.
        (root / "usr/bin/python").symlink_to("python3")
        container = self.run("from", "scratch")
        self.run("add", container, str(root), "/")
        self.run("commit", "--rm", container, _BASE)
        shutil.rmtree(root)

    def build(self, context: Path, tag: str, **arguments: str) -> None:
        """Build the unchanged Dockerfile of a folder on :meth:`make_base`."""
        words = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        for path in (*_PIP_FILES, *_local_indexes()):
            if Path(path).exists():
                words.append(f"--volume={path}:{path}:ro")
        self.run("bud", "--pull=never", *words, "--tag", tag, str(context))

    def container(self, tag: str) -> "Container":
        """Return a container of an image."""
        name = self.run("from", "--pull-never", tag)
        config = json.loads(self.run("inspect", "--type", "image", tag))["OCIv1"]["config"]
        return Container(Path(self.run("mount", name)), config)


class Container:
    """The files of an image, and how to run them.

    Attributes:
        root: folder of the files on this machine.
    """

    def __init__(self, root: Path, config: Mapping[str, Any]) -> None:
        self.root, self._config = root, config

    def command(self, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
        """A command line that runs ``words`` in it as uid 1000; only /tmp is writable.

        It has its own mounts and processes, and the network of its caller.
        """
        variables = dict(item.split("=", 1) for item in self._config["Env"]) | dict(environ)
        pairs = [f"{key}={value}" for key, value in variables.items()]
        inside = ["/usr/bin/env", "-i", "-C", self._config["WorkingDir"], "HOME=/home/ray", *pairs]
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*namespaces, "sh", "-c", _RUN, "sh", str(self.root), *inside, *words]


def _mirror() -> str:
    """The Debian mirror that this machine uses."""
    sources = Path("/etc/apt").glob("sources.list*/**/*.sources")
    for line in (line for file in sources for line in file.read_text().splitlines()):
        if line.startswith("URIs:") and "security" not in line:
            return line.split()[1]
    return "http://deb.debian.org/debian"


def package_index() -> str:
    """The package index that this machine's pip uses."""
    found = _pip_config().get("global.index-url")
    return found or "https://pypi.org/simple"


def _local_indexes() -> list[str]:
    """Local folders in which this machine's pip also looks for packages."""
    words = " ".join(_pip_config().values()).split()
    local = (word.removeprefix("file://") for word in words if word.startswith("file://"))
    return sorted({path.removesuffix("/simple") for path in local})


def _pip_config() -> dict[str, str]:
    listed = subprocess.run(
        ["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = (line.partition("=") for line in listed.splitlines())
    return {key.replace(":env:.", "global."): value.strip("'\"") for key, _, value in pairs}
