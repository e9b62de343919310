"""Packing of the working directory for a remote job: a zip file, like Ray's own.

Like Ray, it follows links to folders and reads ``.gitignore`` and ``.rayignore`` in every folder;
like git, the deepest file that mentions a path decides. Unlike Ray, it lists what it leaves out.
"""

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from prioritycut_ray.config import NAMED_WEIGHTS, Config, shipped_configs
from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.paths import is_url

EXCLUDED = (
    ".git/",
    ".venv/",
    "__pycache__/",
    ".*_cache/",
    "runs/",
    "data/",
    "*.tar",
    "*.mp4",
    "*.safetensors",
)
"""What a job does not need from a working directory, in .gitignore's notation."""
_IGNORE_FILES = (".gitignore", ".rayignore")
_LARGEST_BYTES = 100 * 2**20
"""Ray rejects larger packages."""
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Package(NamedTuple):
    """A packed working directory.

    Attributes:
        file: the zip file.
        files: number of files in it.
        size_bytes: of the zip file.
        left_out: paths that cannot be packed, as ``NAME (reason)``; without ignored files.
    """

    file: Path
    files: int
    size_bytes: int
    left_out: tuple[str, ...]


def required_files(source: str, config: Config, here: Path) -> list[str]:
    """Return the files that the job reads from its working directory, relative to it.

    Raises:
        UserError: the job could not find a file that the command line or the configuration names.
    """
    found_anywhere = source in shipped_configs() or is_url(source)
    files = [] if found_anywhere else [_within(source, source, here)]
    data = config.data
    places = [("storage", config.storage), ("data.url", data.url)]
    optional = [("data.index", data.index), ("data.known", data.known)]
    for key, location in [*places, *optional]:
        if location and not is_url(location) and not Path(location).is_absolute():
            raise UserError(
                f"{key}={location}: is a relative path, which would be in the job's own folder; "
                "use a URL, or an absolute path on a disk that all nodes share"
            )
    weights = config.loss.perceptual.weights
    if weights not in NAMED_WEIGHTS and not Path(weights).is_absolute():
        files.append(_within(weights, f"loss.perceptual.weights={weights}", here))
    return files


def _within(name: str, shown: str, here: Path) -> str:
    """Return the relative path of a file in the working directory.

    Raises:
        UserError: the file does not exist, or is elsewhere.
    """
    if Path(name).is_absolute():
        raise UserError(f"{shown}: is an absolute path; use a path relative to {here}")
    relative = os.path.normpath(name)
    if relative.startswith(os.pardir):
        raise UserError(
            f"{shown}: is outside {here}, the folder that is sent to the cluster; submit from a "
            "folder that contains it"
        )
    if not (here / relative).is_file():
        raise UserError(f"{shown}: there is no such file in {here}; check the name")
    return relative


def pack(
    folder: Path,
    out: Path,
    excludes: Sequence[str] = (),
    required: Sequence[str] = (),
    *,
    limit: int | None = None,
) -> Package:
    """Zip a working directory, without the files that .gitignore, .rayignore or ``excludes`` match.

    Args:
        folder: the working directory.
        out: the .zip file to write, outside of ``folder``.
        excludes: patterns in .gitignore's notation, in addition to :data:`EXCLUDED`.
        required: files, relative to ``folder``, that are packed even if a pattern matches them.
        limit: size of the largest accepted package, in bytes; defaults to Ray's limit.

    Raises:
        UserError: a file cannot be read, a pattern is invalid, or the package is too large.
    """
    limit = _LARGEST_BYTES if limit is None else limit
    files = {os.path.normpath(name): folder / name for name in required}
    left_out: list[str] = []
    largest, largest_bytes = "", -1
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, path in _in_turn(files, _included(folder, excludes, left_out)):
            _add(archive, name, path)
            size = archive.getinfo(Path(name).as_posix()).compress_size
            if size > largest_bytes:
                largest, largest_bytes = name, size
            if out.stat().st_size > limit:
                raise _too_large(folder, limit, largest, is_required=largest in files)
        names = archive.namelist()
        if _has_one_folder_at_most(names):
            # Ray rejects a package without entries, and drops the name of an only folder when it
            # downloads the package.
            archive.writestr(".empty", "")
    size = out.stat().st_size  # with the archive's table of contents
    if size > limit:
        raise _too_large(folder, limit, largest, is_required=largest in files)
    return Package(out, len(names), size, tuple(left_out))


def _has_one_folder_at_most(names: Sequence[str]) -> bool:
    return all("/" in name for name in names) and len({name.split("/")[0] for name in names}) < 2


def _too_large(folder: Path, limit: int, largest: str, *, is_required: bool) -> UserError:
    way_out = (
        "the job needs it: put it where all nodes can read it, and give its absolute path or URL"
        if is_required
        else "exclude it with --exclude (--exclude '*' leaves only the configuration), or submit "
        "from a smaller folder"
    )
    return UserError(
        f"{folder}: the packed working directory exceeds the limit of {limit / 2**20:g} MiB; the "
        f"largest file so far is {largest}: {way_out}"
    )


def _in_turn(
    first: dict[str, Path], rest: Iterator[tuple[str, Path]]
) -> Iterator[tuple[str, Path]]:
    """Yield the required files, then all others."""
    yield from first.items()
    yield from ((name, path) for name, path in rest if name not in first)


def _add(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    try:
        archive.write(path, name)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or exclude it with "
            "--exclude"
        ) from error
    except UnicodeEncodeError as error:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise UserError(
            f"{shown}: the file name is not UTF-8; rename the file, or exclude it with --exclude"
        ) from error


def _included(
    folder: Path, excludes: Sequence[str], left_out: list[str]
) -> Iterator[tuple[str, Path]]:
    """Yield names and paths of the files to pack; adds to ``left_out`` what cannot be packed."""
    always, usual = _spec(excludes, "--exclude"), _spec(EXCLUDED, "EXCLUDED")
    root = _Ignores(usual, "", None)

    def walk(name: str, outer: _Ignores, ancestors: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
        here = folder / name
        ignores = _with_files_of(here, name, outer)
        for entry in _entries(here):
            inner = os.path.join(name, entry)
            path = folder / inner
            is_folder = path.is_dir()
            compared = _bytewise(f"{inner}/" if is_folder else inner)
            if always.match_file(compared) or ignores.excludes(compared):
                continue
            if not is_folder:
                reason = _obstacle(path)
                if reason:
                    left_out.append(f"{inner} ({reason})")
                else:
                    yield inner, path
                continue
            real = os.path.realpath(path)
            if real in ancestors:
                left_out.append(f"{inner} (a link to a folder that contains it)")
            else:
                yield from walk(inner, ignores, (*ancestors, real))

    yield from walk("", root, (os.path.realpath(folder),))


class _Ignores(NamedTuple):
    """Patterns of one folder and of its parents.

    Attributes:
        spec: the patterns.
        base: name of the folder that the patterns are relative to.
        outer: patterns of the parent, for paths that these do not mention.
    """

    spec: GitIgnoreSpec
    base: str
    outer: "_Ignores | None"

    def excludes(self, name: str) -> bool:
        """Return whether a path is ignored; folders end in a slash."""
        inside = name[len(self.base) :].lstrip("/")
        verdict = self.spec.check_file(inside).include
        if verdict is None and self.outer is not None:
            return self.outer.excludes(name)
        return bool(verdict)


def _with_files_of(folder: Path, name: str, outer: _Ignores) -> _Ignores:
    """Return the patterns for a folder: its own ignore files take precedence over its parents'."""
    ignores = outer
    for file in _IGNORE_FILES:
        path = folder / file
        if path.is_file():
            patterns = path.read_bytes().splitlines()
            ignores = _Ignores(_spec(patterns, str(path)), _bytewise(name), ignores)
    return ignores


def _spec(patterns: Sequence[str | bytes], source: str) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(map(_bytewise, patterns))
    except ValueError as error:
        raise UserError(f"{source}: {error}; correct or remove it") from error


def _bytewise(text: str | bytes) -> str:
    """Decode so that names and patterns are compared byte by byte, as git does."""
    return os.fsencode(text).decode("latin-1")


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}); make it readable, or exclude it "
            "with --exclude"
        ) from error


def _obstacle(path: Path) -> str | None:
    """Return why a path is not packed; None for a regular file or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a broken link"
    return None if stat.S_ISREG(mode) else _SPECIAL.get(stat.S_IFMT(mode), "not a regular file")
