"""The file system of any URL that fsspec knows, with errors that are one line.

A local file system is used as it is. Every other one is wrapped, so that whatever its driver raises
becomes a :class:`StorageError` that names the URL, the reason, and the way out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from prioritycut_ray.errors import UserError, describe

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Raised if a file does not exist or is of another kind; a missing bucket is another error."""
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "r2", "b2"}
"""fsspec protocols without folders: making one there would create the bucket."""
_NETWORK_MOUNTS = {
    *("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs"),
    *("ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs"),
}
_UNCHANGED = (
    *(*ABSENT, FileExistsError, UserError),  # answers to a query
    *(TypeError, AttributeError, LookupError, AssertionError, MemoryError),  # programming errors
)

# Class names, because the drivers may not be installed.
_NO_CREDENTIALS = {
    "NoCredentialsError",  # botocore's
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "SSOError",
    "DefaultCredentialsError",  # google.auth's
    "RefreshError",
    "ClientAuthenticationError",  # azure.core's
}
_SETTINGS = {"BotoCoreError", "GoogleAuthError", "InvalidURL", "ValueError", "NotImplementedError"}
_NETWORK = {"HTTPClientError", "ConnectionError", "TransportError", "OSError"}
_DENIED_STATUS = (401, 403)


class StorageError(UserError, OSError):
    """Raised if a storage refuses access or does not answer.

    Attributes:
        final: whether a retry would fail in the same way.
    """

    final = False


class RemoteFileSystem:
    """A remote file system that raises :class:`StorageError` and never creates a bucket."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs = fs

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFileSystem, (self._fs,)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._fs, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any, **options: Any) -> Any:
            with translated(self._url(name, arguments)):
                return attribute(*arguments, **options)

        return call

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        """Open a file as a :class:`RemoteFile`, whose methods raise the same errors."""
        url = self._url("open", (path,))
        with translated(url):
            return RemoteFile(self._fs.open(path, *arguments, **options), url)

    def mkdir(self, path: str, create_parents: bool = True) -> None:
        """Make a folder, unless the storage has no folders."""
        if not self._is_object_store():
            self.__getattr__("mkdir")(path, create_parents)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder and its parents, unless the storage has no folders."""
        if not self._is_object_store():
            self.__getattr__("makedirs")(path, exist_ok)

    def _is_object_store(self) -> bool:
        protocol = self._fs.protocol
        return not _OBJECT_STORES.isdisjoint({protocol} if isinstance(protocol, str) else protocol)

    def _url(self, method: str, arguments: tuple[Any, ...]) -> str:
        path = arguments[1 if method.startswith("put") else 0] if arguments else ""
        return str(self._fs.unstrip_protocol(path)) if isinstance(path, str) else str(path)


class RemoteFile:
    """An open file of a remote file system."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._file, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any) -> Any:
            with translated(self._url):
                return attribute(*arguments)

        return call

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


FileSystem: TypeAlias = AbstractFileSystem | RemoteFileSystem


def filesystem(url: str) -> tuple[FileSystem, str]:
    """Return the file system of a folder, and the folder's path on it.

    Cheap enough to be called for every read, and safe after a fork, unlike a stored file system.

    Raises:
        UserError: if the URL's scheme is unknown, or its fsspec driver is not installed.
    """
    try:
        fs, root = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: cannot be reached ({error})") from None
    if not isinstance(fs, LocalFileSystem):
        fs = RemoteFileSystem(fs)
    return fs, root.rstrip("/")


def is_local(url: str) -> bool:
    """Return whether a folder is on a disk of this machine, or mounted like one."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def is_network_mount(path: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """Return whether a local path is on a mount of another machine's disk (NFS, CIFS, FUSE, ...).

    Args:
        path: of an existing file.
        mounts: Linux's list of mounts; without one, the answer is no.
    """
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return False
    real = Path(os.path.realpath(path))
    kind, longest = "", -1
    for line in lines:
        # proc(5): six fields with the mount point as the fifth, optional ones, a hyphen, the type.
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4].encode().decode("unicode_escape"))
        if real.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = rest.split()[0], len(point.parts)
    return kind in _NETWORK_MOUNTS or kind.startswith("fuse.")


def is_transient(error: BaseException) -> bool:
    """Return whether a retry of the request may succeed."""
    if isinstance(error, StorageError):
        return not error.final
    return isinstance(error, OSError) and not isinstance(error, (*ABSENT, PermissionError))


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Convert what a storage driver raises in the body to a :class:`StorageError`.

    Args:
        url: the URL that the body reads or writes, for the message.

    Raises:
        StorageError: for any error of the driver, except that a file is absent or exists already.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _UNCHANGED) and not _lacks_bucket(error):
            raise
        raise _storage_error(url, error) from error


def _storage_error(url: str, error: Exception) -> StorageError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "range requests" in str(error):  # fsspec's words
        return final_error(url, *WITHOUT_RANGES)
    if _lacks_bucket(error):
        reason, way_out = "the bucket does not exist", "create it, or correct its name"
    elif not kinds.isdisjoint(_NO_CREDENTIALS):
        reason = "no valid credentials"
        way_out = (
            "set them on this machine and on every node of the cluster (S3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    elif isinstance(error, PermissionError) or getattr(error, "status", None) in _DENIED_STATUS:
        reason = "access denied"
        way_out = "set credentials that allow it on this machine and on every node of the cluster"
    elif kinds.isdisjoint(_NETWORK) and not kinds.isdisjoint(_SETTINGS):
        reason = "the storage client cannot use this URL or its settings"
        way_out = "correct the URL or the settings (S3: AWS_PROFILE, AWS_ENDPOINT_URL=http://...)"
    else:
        reason, way_out = "the storage does not answer", "check the storage and the network to it"
        return StorageError(f"{url}: {reason} ({describe(error)}); {way_out}")
    return final_error(url, f"{reason} ({describe(error)})", way_out)


def final_error(url: str, reason: str, way_out: str) -> StorageError:
    """Return an error that a retry would not change."""
    error = StorageError(f"{url}: {reason}; {way_out}")
    error.final = True
    return error


WITHOUT_RANGES = (
    "the HTTP server does not support range requests, which are needed to read parts of a file",
    "use a server that does (nginx, Apache or an object store, but not python -m http.server), or "
    "copy the files to a disk",
)


def _lacks_bucket(error: BaseException) -> bool:
    """Return whether a file is absent because its whole bucket is."""
    if not isinstance(error, FileNotFoundError):
        return False
    return "bucket does not exist" in str(error) or type(error.__cause__).__name__ == "NoSuchBucket"
