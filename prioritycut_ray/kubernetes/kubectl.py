"""The user's own kubectl, which knows the cluster, the context and the credentials."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.pods import Object

_ANSWER_S = 60
_FORWARDED = re.compile(r"Forwarding from (127\.0\.0\.1:\d+) ")


class KubectlError(UserError):
    """kubectl failed: the API server did not respond, or rejected the request."""


class Kubectl:
    """kubectl in one namespace.

    Args:
        namespace: namespace of all objects.
        context: context in the kubeconfig file; None for the current one.

    Raises:
        UserError: kubectl is not installed.
    """

    def __init__(self, namespace: str, context: str | None = None) -> None:
        program = shutil.which("kubectl")
        if program is None:
            raise UserError(
                "kubectl is not on the PATH; install it, or print the manifest with --dry-run and "
                "create it elsewhere"
            )
        self.namespace, self.context = namespace, context
        self._program = program

    @property
    def flags(self) -> list[str]:
        """The flags for namespace and context, the same for kubectl and ``prioritycut``."""
        context = ["--context", self.context] if self.context else []
        return ["--namespace", self.namespace, *context]

    def shown(self, *words: str) -> str:
        """Return a kubectl command for the user to copy."""
        return shlex.join(["kubectl", *self.flags, *words])

    def create(self, manifests: str) -> None:
        """Create the objects of YAML documents."""
        self._run("create", "--filename=-", text=manifests)

    def get(self, kind: str, name: str) -> Object | None:
        """Return an object, or None if it does not exist."""
        text = self._run("get", kind, name, "--ignore-not-found", "--output=json")
        return json.loads(text) if text.strip() else None

    def find(self, kind: str, labels: str) -> list[Object]:
        """Return the objects that match a label selector, ``key=value``."""
        found = json.loads(self._run("get", kind, f"--selector={labels}", "--output=json"))
        return list(found["items"])

    def secret(self, name: str, key: str) -> str | None:
        """Return a value of a secret, or None if it does not exist."""
        data = (self.get("secret", name) or {}).get("data") or {}
        return base64.b64decode(data[key]).decode() if key in data else None

    def patch(self, kind: str, name: str, change: Object) -> None:
        """Apply a merge patch to an object."""
        self._run("patch", kind, name, "--type=merge", f"--patch={json.dumps(change)}")

    def delete(self, kind: str, name: str) -> None:
        """Delete an object if it exists."""
        self._run("delete", kind, name, "--ignore-not-found", "--wait=false")

    @contextmanager
    def port_forward(self, service: str, port: int) -> Iterator[str]:
        """Forward a service's port to this machine while the body runs; yield HOST:PORT.

        Raises:
            KubectlError: the service has no running pod, or forwarding is not allowed.
        """
        words = ["port-forward", f"service/{service}", f":{port}", "--address=127.0.0.1"]
        with tempfile.TemporaryDirectory() as folder:
            # A file, because kubectl logs every connection and would block on a full pipe.
            output = Path(folder) / "output.txt"
            with output.open("wb") as stream:
                process = subprocess.Popen(
                    [self._program, *self.flags, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            try:
                yield _forwarded_port(process, output)
            finally:
                _end(process)

    def _run(self, *words: str, text: str = "") -> str:
        try:
            result = subprocess.run(
                [self._program, *self.flags, *words],
                input=text,
                capture_output=True,
                text=True,
                timeout=_ANSWER_S,
            )
        except subprocess.TimeoutExpired as error:
            raise KubectlError(
                f"kubectl {words[0]}: no response within {_ANSWER_S} s; see `kubectl cluster-info`"
            ) from error
        if result.returncode != 0:
            raise _failure(words[0], result.returncode, result.stderr)
        return result.stdout


def _failure(verb: str, code: int, output: str) -> KubectlError:
    lines = output.strip().splitlines() or [f"exit code {code}"]
    way_out = "see `kubectl cluster-info`"
    if "doesn't have a resource type" in output or "no matches for kind" in output:
        way_out = "install KubeRay's operator, which defines it"
    return KubectlError(f"kubectl {verb}: {lines[-1]}; {way_out}")


def _forwarded_port(process: "subprocess.Popen[bytes]", output: Path) -> str:
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline:
        code = process.poll()
        text = output.read_text(errors="replace")
        match = _FORWARDED.search(text)
        if match:
            return match[1]
        if code is not None:
            raise _failure("port-forward", code, text)
        time.sleep(0.1)
    raise KubectlError(
        f"kubectl port-forward: no port was forwarded within {_ANSWER_S} s; see `kubectl get pods`"
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
