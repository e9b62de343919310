"""Connecting to a Ray cluster, or starting Ray on this machine."""

import hashlib
import os
import socket
import tempfile
from contextlib import suppress
from typing import Any

import ray

from prioritycut_ray.errors import UserError, one_line
from prioritycut_ray.ray_cluster.compat import (
    failed_to_start,
    print_cluster_messages_to_stderr,
    set_core_environment,
    token_rejection,
)

_OBJECT_STORE_BYTES = 200_000_000
"""Small, because frames travel through the data loader's shared memory, not Ray's store."""
_LONGEST_TEMPORARY_FOLDER = 35
"""Bytes of its path; Ray appends about 70 for the names of the session and of a socket."""
_KNOCK_SECONDS = 15.0


def start_ray(address: str | None = None) -> None:
    """Connect to a cluster, or start Ray on this machine; does nothing if already connected.

    Args:
        address: HOST:PORT of the cluster's head; defaults to ``RAY_ADDRESS``. Ray is started here
            if neither is given.

    Raises:
        UserError: nothing answers there, it is not the address of a head, or the cluster rejects
            this process.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    set_core_environment(local=not address)
    print_cluster_messages_to_stderr()
    options: dict[str, Any] = {}
    if address:
        knock(address)
    else:
        options = {"object_store_memory": _OBJECT_STORE_BYTES}
        shorten_temporary_folder()
    try:
        # Warnings of workers reach the driver through our monitor; Ray's logs stay in its folder.
        ray.init(address, logging_level="ERROR", log_to_driver=False, **options)
    except (Exception, SystemExit) as error:  # Ray exits where something else listens
        explained = explain_init_error(address, error)
        if explained is None:
            raise
        raise explained from error


def explain_init_error(address: str | None, error: BaseException) -> UserError | None:
    """Return what an error of ``ray.init`` means for the user; None if the error is a bug.

    Args:
        address: of the cluster; None if Ray was to be started on this machine.
        error: the exception, or Ray's ``SystemExit``.
    """
    if rejection := token_rejection(error):
        return UserError(
            f"the Ray cluster {address or 'on this machine'} rejected the authentication token "
            f"({_first_sentence(rejection)}); if the cluster requires a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its "
            "head; if not, unset both"
        )
    if isinstance(error, ConnectionError | SystemExit):
        if address == "auto":
            return UserError(
                "RAY_ADDRESS=auto: no Ray cluster runs on this machine; unset it to start one "
                "here, or give HOST:PORT of a cluster's head"
            )
        return UserError(
            f"{address or 'Ray on this machine'}: does not answer as the head of a Ray cluster "
            f"({_first_sentence(str(error))}); give HOST:PORT as printed by `ray start --head` "
            "(port 6379 by default; 8265 is its dashboard)"
        )
    if failed_to_start(error):
        return UserError(
            "Ray did not start on this machine within 30 s, which happens when other programs keep "
            "all cores busy; try again later, or see /tmp/ray/session_latest/logs"
        )
    return None


def _first_sentence(text: str) -> str:
    return one_line(text.split(". ")[0])


def shorten_temporary_folder(links: str = "/tmp") -> None:
    """Replace a long ``TMPDIR`` or ``RAY_TMPDIR`` by a short link to it, for child processes too.

    Ray and torch create Unix sockets there, whose paths the system limits to about 100 bytes. The
    link is kept, because Ray's processes write there until after this one has ended.

    Args:
        links: folder for the link.

    Raises:
        UserError: the link cannot be made.
    """
    for name in ("TMPDIR", "RAY_TMPDIR"):
        folder = os.environ.get(name, "")
        if len(os.fsencode(folder)) > _LONGEST_TEMPORARY_FOLDER:
            os.environ[name] = _short_link(name, folder, links)
    tempfile.tempdir = None  # makes tempfile read the variables again


def _short_link(name: str, folder: str, links: str) -> str:
    digest = hashlib.sha256(f"{os.getuid()}:{folder}".encode()).hexdigest()[:12]
    link = f"{links}/prioritycut-{digest}"
    try:
        os.makedirs(folder, exist_ok=True)
        with suppress(FileExistsError):
            os.symlink(folder, link)
        if os.readlink(link) == folder:
            return link
        reason = f"{link} points elsewhere"
    except OSError as error:
        reason = str(error)
    raise UserError(
        f"{name}={folder}: the path is too long for Ray's sockets, and a link to it cannot be made "
        f"({reason}); set {name} to a folder of at most {_LONGEST_TEMPORARY_FOLDER} characters"
    )


def knock(address: str) -> None:
    """Check that something listens at an address; Ray itself would retry for minutes.

    Raises:
        UserError: nothing does, or it is not the address of a head.
    """
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise UserError(
            f"{address}: is an address for Ray Client, which cannot drive a training; on a machine "
            "of the cluster give HOST:PORT of the head (port 6379 by default), or submit from "
            "anywhere with `prioritycut submit --address http://HOST:8265`"
        )
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address}: is the address of a dashboard; submit there with `prioritycut submit "
            f"--address {address}`, or give HOST:PORT of the head (port 6379 by default)"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or "/" in host:
        raise UserError(
            f"{address}: is not the address of a Ray cluster; give HOST:PORT of its head, or auto "
            "for the one on this machine"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{address}: no Ray cluster answers ({error}); give HOST:PORT of its head as printed "
            "by `ray start --head` (port 6379 by default)"
        ) from error
