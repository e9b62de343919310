"""Joining or starting Ray, the same way for every job."""

import hashlib
import os
import socket
import tempfile
from contextlib import suppress
from typing import Any

import ray
from ray._private import worker
from ray.exceptions import AuthenticationError

from prioritycut_ray.errors import UserError

_print_to_stdstream = worker.print_to_stdstream
_OBJECT_STORE_BYTES = 200_000_000
"""Small: frames travel through the data loader's shared memory, not through Ray's store."""
_LONGEST_TEMPORARY_FOLDER = 35
"""Bytes of its path: Ray adds about 70, for the session's name and that of a socket."""
_SHORT_FOLDER = "/tmp"
_KNOCK_SECONDS = 15.0


def start_ray(address: str | None = None) -> None:
    """Join a cluster, or start one on this machine.

    Args:
        address: HOST:PORT of the cluster's head; what ``RAY_ADDRESS`` says unless given, and where
            neither is, Ray is started here.

    Raises:
        UserError: nothing answers there, it is not the address of a head, or the cluster rejects
            this process.
    """
    if ray.is_initialized():
        return
    worker.print_to_stdstream = _print_to_stderr
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {}
    if address:
        knock(address)
    else:
        options = {"object_store_memory": _OBJECT_STORE_BYTES}
        shorten_temporary_folder()
    try:
        # What workers have to say reaches the driver by our own queue; Ray's logs stay in its
        # folder.
        ray.init(address, logging_level="ERROR", log_to_driver=False, **options)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster {address or 'on this machine'} rejected the authentication token "
            f"({_first_sentence(error)}); if it asks for its token, set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head; if it asks for none, "
            "unset both"
        ) from error
    except (ConnectionError, SystemExit) as error:  # Ray exits where something else listens
        if address == "auto":
            raise UserError(
                "RAY_ADDRESS=auto: no Ray cluster runs on this machine; unset it to start one "
                "here, or give HOST:PORT of a cluster's head"
            ) from error
        raise UserError(
            f"{address or 'Ray on this machine'}: does not answer as the head of a Ray cluster "
            f"({_first_sentence(error)}); give HOST:PORT as `ray start --head` printed it (port "
            "6379 unless chosen otherwise; 8265 is its dashboard)"
        ) from error
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type for it
            raise
        raise UserError(
            "Ray did not start on this machine within 30 s, as it does where other programs keep "
            "all cores busy; try again later, or see /tmp/ray/session_latest/logs"
        ) from error


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split(". ")[0].split())


def shorten_temporary_folder() -> None:
    """Refer to a temporary folder with a long path by a short link, in this process and its own.

    Ray and torch make Unix sockets there, whose whole path the system limits to about 100 bytes.
    The link stays: Ray's processes write there until after this one has ended.

    Raises:
        UserError: the link cannot be made.
    """
    for name in ("TMPDIR", "RAY_TMPDIR"):
        folder = os.environ.get(name, "")
        if len(os.fsencode(folder)) > _LONGEST_TEMPORARY_FOLDER:
            os.environ[name] = _short_link(name, folder)
    tempfile.tempdir = None  # Read the variables again.


def _short_link(name: str, folder: str) -> str:
    digest = hashlib.sha256(f"{os.getuid()}:{folder}".encode()).hexdigest()[:12]
    link = f"{_SHORT_FOLDER}/prioritycut-{digest}"
    try:
        os.makedirs(folder, exist_ok=True)
        with suppress(FileExistsError):
            os.symlink(folder, link)
        if os.readlink(link) == folder:
            return link
        reason = f"{link} leads elsewhere"
    except OSError as error:
        reason = str(error)
    raise UserError(
        f"{name}={folder}: the path is too long for Ray's sockets, and a link to it cannot be made "
        f"({reason}); set {name} to a folder of at most {_LONGEST_TEMPORARY_FOLDER} characters"
    )


def _print_to_stderr(data: dict[str, Any], *, ignore_prefix: bool) -> None:
    """Print what Ray's nodes have to say: stdout is for the result of a command."""
    _print_to_stdstream({**data, "is_err": True}, ignore_prefix=ignore_prefix)


def knock(address: str) -> None:
    """Ask whether anybody listens: Ray itself would try for minutes.

    Raises:
        UserError: nobody does, or the address is not one of a head.
    """
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise UserError(
            f"{address}: is for Ray's client, which cannot drive a training; give HOST:PORT of the "
            "head (port 6379 unless chosen otherwise) on a machine of the cluster, or submit from "
            "anywhere with `prioritycut submit --address http://HOST:8265`"
        )
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address}: is the address of a dashboard; submit there with `prioritycut submit "
            f"--address {address}`, or give HOST:PORT of the head (port 6379 unless chosen "
            "otherwise)"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or "/" in host:
        raise UserError(
            f"{address}: is not the address of a Ray cluster; give HOST:PORT of its head, or auto "
            "for the one on this machine"
        )
    try:
        knock = socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS)
        knock.close()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{address}: no Ray cluster answers ({error}); give HOST:PORT of its head as "
            "`ray start --head` printed it (port 6379 unless chosen otherwise)"
        ) from error
