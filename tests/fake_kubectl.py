"""A stand-in for kubectl and the API server: objects are files, every service is one address.

It knows the verbs and flags that the project uses and refuses all others. No controller acts on the
objects: a test plays the operator by writing a RayJob's status.
"""

import argparse
import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]


class ApiServer:
    """The state of the stand-in in a folder, for tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        program = folder / "bin" / "kubectl"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} "$@"\n')
        program.chmod(0o755)

    @property
    def path(self) -> str:
        """A PATH whose kubectl is the stand-in."""
        return f"{self.folder / 'bin'}:{os.environ['PATH']}"

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call, oldest first."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def forward_to(self, address: str) -> None:
        """Set the address of all services, HOST:PORT."""
        (self.folder / "head").write_text(address)

    def forbid(self, what: str) -> None:
        """Refuse to create objects of a kind, or refuse a verb."""
        (self.folder / "forbidden").write_text(what)

    def put(self, document: Object) -> None:
        """Create or replace an object."""
        _write(self.folder, document)

    def get(self, kind: str, name: str, namespace: str = "prioritycut") -> Object | None:
        """Return an object, or None."""
        file = _file(self.folder, namespace, kind, name)
        return json.loads(file.read_text()) if file.exists() else None

    def all(self, kind: str, namespace: str = "prioritycut") -> list[Object]:
        """Return all objects of a kind."""
        return list(_all(self.folder, namespace, kind))

    @property
    def forwards(self) -> list[int]:
        """Processes that are forwarding a port."""
        return [int(file.name) for file in (self.folder / "forwards").glob("*") if _lives(file)]


def _lives(file: Path) -> bool:
    return Path(f"/proc/{file.name}").exists()


def _file(state: Path, namespace: str, kind: str, name: str) -> Path:
    return state / "objects" / namespace / kind.lower().removesuffix("s") / f"{name}.json"


def _write(state: Path, document: Object) -> None:
    metadata = document["metadata"]
    file = _file(state, metadata["namespace"], document["kind"], metadata["name"])
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{uuid.uuid4().hex}")
    new.write_text(json.dumps(document))
    new.replace(file)


def _all(state: Path, namespace: str, kind: str) -> Iterator[Object]:
    for file in sorted(_file(state, namespace, kind, "x").parent.glob("*.json")):
        yield json.loads(file.read_text())


def main(state: Path, words: list[str]) -> None:
    with (state / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    common = argparse.ArgumentParser(allow_abbrev=False)
    common.add_argument("--namespace", required=True)
    common.add_argument("--context")
    verbs = common.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create")
    create.add_argument("--filename", choices=["-"], required=True)
    get = verbs.add_parser("get")
    get.add_argument("--output", choices=["json"], required=True)
    get.add_argument("--selector")
    patch = verbs.add_parser("patch")
    patch.add_argument("--type", choices=["merge"], required=True)
    patch.add_argument("--patch", type=json.loads, required=True)
    delete = verbs.add_parser("delete")
    delete.add_argument("--wait")
    forward = verbs.add_parser("port-forward")
    forward.add_argument("service")
    forward.add_argument("port")
    forward.add_argument("--address", choices=["127.0.0.1"], required=True)
    for verb in (get, patch, delete):
        verb.add_argument("kind")
        verb.add_argument("name", nargs="?")
    for verb in (get, delete):
        verb.add_argument("--ignore-not-found", action="store_true")
    arguments = common.parse_args(words)
    if _is_forbidden(state, arguments.verb):
        _refuse("Forbidden", f"no right to {arguments.verb}")
    _VERBS[arguments.verb](state, arguments)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _is_forbidden(state: Path, what: str) -> bool:
    file = state / "forbidden"
    return file.exists() and file.read_text() == what


def _refuse(reason: str, message: str) -> None:
    sys.exit(f"Error from server ({reason}): {message}")


def _create(state: Path, arguments: argparse.Namespace) -> None:
    failed = False
    for document in yaml.safe_load_all(sys.stdin.read()):
        kind, metadata = document["kind"], document["metadata"]
        if metadata["namespace"] != arguments.namespace:
            sys.exit("error: the namespace does not match the namespace of the request")
        if _is_forbidden(state, kind):
            sys.stderr.write(f"Error from server (Forbidden): {kind} is forbidden: no right\n")
            failed = True
        elif _file(state, arguments.namespace, kind, metadata["name"]).exists():
            sys.stderr.write(f"Error from server (AlreadyExists): {metadata['name']} exists\n")
            failed = True
        else:
            metadata["uid"] = str(uuid.uuid4())
            _write(state, document)
            _say(f"{kind.lower()}/{metadata['name']} created")
    sys.exit(failed)


def _found(state: Path, arguments: argparse.Namespace) -> Object:
    file = _file(state, arguments.namespace, arguments.kind, arguments.name)
    if not file.exists():
        if getattr(arguments, "ignore_not_found", False):
            sys.exit(0)
        _refuse("NotFound", f'{arguments.kind} "{arguments.name}" not found')
    return json.loads(file.read_text())


def _get(state: Path, arguments: argparse.Namespace) -> None:
    if arguments.name:
        _say(json.dumps(_found(state, arguments)))
        return
    key, _, value = (arguments.selector or "=").partition("=")
    items = [
        item
        for item in _all(state, arguments.namespace, arguments.kind)
        if not arguments.selector or item["metadata"].get("labels", {}).get(key) == value
    ]
    _say(json.dumps({"kind": "List", "items": items}))


def _patch(state: Path, arguments: argparse.Namespace) -> None:
    def merge(into: Any, change: Any) -> Any:
        if not isinstance(into, dict) or not isinstance(change, dict):
            return change
        return {**into, **{key: merge(into.get(key), value) for key, value in change.items()}}

    _write(state, merge(_found(state, arguments), arguments.patch))


def _delete(state: Path, arguments: argparse.Namespace) -> None:
    uid = _found(state, arguments)["metadata"]["uid"]
    _file(state, arguments.namespace, arguments.kind, arguments.name).unlink()
    for file in (state / "objects" / arguments.namespace).glob("*/*.json"):  # garbage collection
        owners = json.loads(file.read_text())["metadata"].get("ownerReferences", [])
        if owners and all(owner["uid"] == uid for owner in owners):
            file.unlink()


def _port_forward(state: Path, arguments: argparse.Namespace) -> None:
    head = state / "head"
    if not head.exists():
        _refuse("NotFound", f'services "{arguments.service}" not found')
    host, _, port = head.read_text().partition(":")
    (state / "forwards").mkdir(exist_ok=True)
    (state / "forwards" / str(os.getpid())).touch()
    listener = socket.create_server(("127.0.0.1", 0))
    local = listener.getsockname()[1]
    _say(f"Forwarding from 127.0.0.1:{local} -> {arguments.port.lstrip(':')}")
    while True:
        client, _ = listener.accept()
        _say(f"Handling connection for {local}")
        server = socket.create_connection((host, int(port)))
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=_relay, args=(source, target), daemon=True).start()


def _relay(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other direction has closed both


_VERBS = {
    "create": _create,
    "get": _get,
    "patch": _patch,
    "delete": _delete,
    "port-forward": _port_forward,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
