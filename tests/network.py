"""Hosts on this machine, each with a network namespace, a host name, and a cable to one switch.

The switch is a bridge in its own namespace. No address of this machine changes, and there is no
route to the outside.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

_RESOLVER = Path("/etc/netns")
"""`ip netns exec NAME` mounts the files of the folder NAME over those in /etc."""


class Host:
    """A host of a :class:`Network`.

    Attributes:
        name: its host name, which it resolves to its own address, as a pod does.
        address: IPv4.
        prefix: prefix of a command line that runs on it.
    """

    def __init__(self, name: str, address: str, namespace: str, switch: str, port: str) -> None:
        self.name, self.address = name, address
        self._namespace, self._switch, self._port = namespace, switch, port
        rename = f'hostname {name} && exec "$@"'
        self.prefix = ["ip", "netns", "exec", namespace, "unshare", "--uts"]
        self.prefix += ["sh", "-c", rename, "sh"]

    def request(self, url: str, method: str = "GET", token: str = "") -> bytes:
        """Return the response to an HTTP request from this host.

        Raises:
            subprocess.CalledProcessError: there is no response, or its status is an error.
        """
        code = (
            "import sys, urllib.request as r;"
            "h = dict([sys.argv[3:]]) if sys.argv[3:] else {};"
            "q = r.Request(sys.argv[1], method=sys.argv[2], headers=h);"
            "sys.stdout.buffer.write(r.urlopen(q, timeout=30).read())"
        )
        headers = ["Authorization", f"Bearer {token}"] if token else []
        command = [*self.prefix, sys.executable, "-I", "-c", code, url, method, *headers]
        return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout

    def cut(self) -> None:
        """Disconnect the cable of this host."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Reconnect the cable."""
        _ip("-n", self._switch, "link", "set", self._port, "up")


class Network:
    """A switch and its hosts; a context manager that removes them."""

    def __init__(self) -> None:
        self._prefix = f"pc{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._namespaces: list[str] = []

    def __enter__(self) -> "Network":
        self._namespaces.append(self._switch)
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in reversed(self._namespaces):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)
            shutil.rmtree(_RESOLVER / namespace, ignore_errors=True)

    def add(self, name: str) -> Host:
        """Add a host."""
        number = len(self._namespaces)
        namespace, port = f"{self._prefix}-{number}", f"port{number}"
        address = f"10.203.0.{number}"
        self._namespaces.append(namespace)
        _ip("netns", "add", namespace)
        cable = ["type", "veth", "peer", "name", port, "netns", self._switch]
        _ip("link", "add", "eth0", "netns", namespace, *cable)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("-n", namespace, "route", "add", "default", "dev", "eth0")
        folder = _RESOLVER / namespace
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        return Host(name, address, namespace, self._switch, port)


def why_not() -> str:
    """Return why this machine cannot have such a network; empty if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "unshare") if shutil.which(program) is None]
    if missing:
        return f"{missing[0]} is not installed (iproute2, util-linux)"
    try:
        with Network() as network:
            host = network.add("try")
            subprocess.run([*host.prefix, "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr!r}"
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
