"""Ray nodes as separate processes that tests start and end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.places import ROOT

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(**changes: str) -> dict[str, str]:
    """The environment of nodes, jobs and clients: this project, this interpreter, one token."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        **changes,
    }


class Node:
    """`ray start --block` in its own session.

    Args:
        words: arguments of `ray start`.
        environ: environment of the node and of everything that runs on it.
        prefix: a command that runs it elsewhere, such as `ip netns exec NAME`.
        cwd: working directory of the node, and of the jobs of a head.
    """

    def __init__(
        self,
        words: Sequence[str],
        environ: Mapping[str, str],
        prefix: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pc_ray_", dir="/tmp"))  # sockets: short paths
        common = ["--block", "--disable-usage-stats", "--object-store-memory", "100000000"]
        if "--head" in words:
            common += ["--temp-dir", str(self.folder / "ray")]
        command = [*prefix, str(BIN / "ray"), "start", *words, *common]
        with (self.folder / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(environ),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill all processes at once, as when a machine dies."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def end(self) -> None:
        """Terminate the node, which ends its children; then kill whatever is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")


@contextmanager
def head(cpus: int, environ: Mapping[str, str]) -> Iterator[str]:
    """Run a head on this machine; yield the address of its dashboard."""
    dashboard = free_port()
    node = Node(
        [
            "--head",
            "--port=0",
            f"--num-cpus={cpus}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}",
        ],
        environ,
    )
    try:
        await_port("127.0.0.1", dashboard, node)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        node.end()


class Cluster:
    """A head at 127.0.0.2 with one CPU, and nodes from 127.0.0.3 on; a context manager."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ, self._port = environ, free_port()
        self._nodes: list[Node] = []
        self.address = f"127.0.0.2:{self._port}"

    def __enter__(self) -> "Cluster":
        words = ["--head", f"--port={self._port}", "--include-dashboard=False"]
        head = self._start([*words, f"--ray-client-server-port={free_port()}"], self._environ, ())
        await_port("127.0.0.2", self._port, head)
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes):
            node.end()

    def add(self, prefix: Sequence[str] = (), **changes: str) -> Node:
        """Start another node with one CPU (see :class:`Node`) and wait until it has joined.

        Nodes that start at the same time collide: they share the session's folder.
        """
        node = self._start([f"--address={self.address}"], {**self._environ, **changes}, prefix)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in node.output():
            assert node.process.poll() is None, node.output()
            assert time.monotonic() < deadline, node.output()
            time.sleep(0.2)
        return node

    def node(self, address: str) -> Node:
        """The node at 127.0.0.N."""
        return self._nodes[int(address.rpartition(".")[2]) - 2]

    def _start(self, words: list[str], environ: Mapping[str, str], prefix: Sequence[str]) -> Node:
        words += [f"--node-ip-address=127.0.0.{2 + len(self._nodes)}", "--num-cpus=1"]
        words += [f"--dashboard-agent-listen-port={free_port()}"]
        self._nodes.append(Node(words, environ, prefix))
        return self._nodes[-1]


def await_port(host: str, port: int, node: Node, seconds: float = 90) -> None:
    """Wait until a node's port answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError:
            assert node.process.poll() is None, node.output()
            assert time.monotonic() < deadline, node.output()
            time.sleep(0.5)


def prioritycut(
    *words: str, cwd: Path, environ: Mapping[str, str], seconds: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Run the command line in its own process."""
    return subprocess.run(
        [str(BIN / "prioritycut"), *words],
        cwd=cwd,
        env=dict(environ),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
