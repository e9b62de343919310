"""Who is in each video, where no manifest says it."""

from collections import defaultdict
from collections.abc import Sequence

from prioritycut_ray.packing.entries import Entry, printable
from prioritycut_ray.packing.folders import common_parts, path_parts


def name_identities(entries: Sequence[Entry]) -> list[Entry]:
    """Name each missing identity after its file.

    The name is the file's path below the input folder. If that is ambiguous, it is the path below
    the common folder of the files in question, with the extension.
    """
    taken = {entry.identity for entry in entries if entry.identity}
    files: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if not entry.identity:
            files[entry.name].add(entry.path)

    def named(entry: Entry) -> Entry:
        alike = files[entry.name]
        identity = printable(entry.name)
        if len(alike) > 1 or identity in taken:
            parts = path_parts(entry.path)
            above = len(common_parts(path.rpartition("/")[0] for path in alike))
            above = min(above, len(parts) - len(path_parts(entry.name)))
            identity = printable("/".join(parts[above:]))
        return entry._replace(identity=identity, by_name=True)

    return [entry if entry.identity else named(entry) for entry in entries]
