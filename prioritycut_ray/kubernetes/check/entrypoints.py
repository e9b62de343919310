"""The entrypoint of a RayJob, in the submitter's shell and on its cluster."""

import re
import shlex

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.check import parts
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.storage.paths import is_url

_OPERATORS = (";", "&&", "||", "|", "&", ">", ">>", "<", "\n")
_VERBS = ("train", "tune", "retrain")


def check(spec: Object, path: str) -> Findings:
    """Check the entrypoint of a RayJob's spec."""
    entrypoint, place = (spec.get("entrypoint") or "").strip(), f"{path}.entrypoint"
    template = spec.get("submitterPodTemplate") or {}
    containers = (template.get("spec") or {}).get("containers") or [{}]
    mode = spec.get("submissionMode") or "K8sJobMode"
    if not entrypoint or mode == "InteractiveMode" or (containers[0] or {}).get("command"):
        return
    try:
        words = shlex.split(entrypoint)
    except ValueError as reason:
        yield error(place, f"is not a valid command line: {reason}")
        return
    if len(words) == 1 and " " in words[0]:
        yield error(
            place,
            "is quoted twice, so the whole line is the name of one program: remove the inner "
            "quotes",
        )
        return
    if mode in ("K8sJobMode", "SidecarMode"):
        yield from _shell_rules(entrypoint, place)
    if words[:1] == ["prioritycut"]:
        yield from _program_rules(words, spec.get("rayClusterSpec"), place)


def _shell_rules(entrypoint: str, place: str) -> Findings:
    """Check for what the submitter's shell interprets before ``ray job submit``."""
    bare, expanded = _unquoted(entrypoint)
    operators = sorted({word for word in _operators(bare) if word in _OPERATORS})
    if "\n" in operators:
        yield error(
            place,
            "has several lines, and all but the first run in the submitter pod, not on the "
            "cluster; use one line, or bash -c '...'",
        )
    elif re.search(r"(^|\s)#", bare):
        yield error(
            place,
            "has # outside quotes, which makes the rest of the submitter's command a comment; "
            "remove it, or use bash -c '...'",
        )
    elif operators:
        yield warning(
            place,
            f"has {' '.join(operators)} outside quotes: what follows runs in the submitter pod, "
            "not on the cluster; use bash -c '...'",
        )
    variables = re.findall(r"\$(?:\w+|\{\w+\}|\()|`", expanded)
    if variables:
        yield warning(
            place,
            f"has {variables[0]}, which is expanded in the submitter pod, not on the cluster; use "
            "the value, or bash -c '...' in single quotes",
        )


def _unquoted(line: str) -> tuple[str, str]:
    """Return the text outside all quotes, and the text outside single quotes.

    A backslash escapes the next character, including the end of a line.
    """
    bare, expanded, quote, skip = [], [], "", False
    for character in line:
        if skip:
            skip = False
        elif character == "\\" and quote != "'":
            skip = True
        elif quote:
            if quote == '"':
                expanded.append(character)
            if character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        else:
            bare.append(character)
            expanded.append(character)
    return "".join(bare), "".join(expanded)


def _operators(bare: str) -> list[str]:
    return re.findall(r"\n|&&|\|\||>>|[;|&<>]", re.sub(r"\$\{[^}]*\}", "", bare))


# The command line of prioritycut itself, compared with the cluster.


def _program_rules(words: list[str], cluster: Object | None, place: str) -> Findings:
    if len(words) < 3 or words[1] not in _VERBS:
        yield error(place, "must be prioritycut train CONFIG, tune SEARCH or retrain SETTINGS")
        return
    if words[1] != "train":
        return
    try:
        config = load_config(words[2], [word for word in words[3:] if not word.startswith("-")])
    except UserError as reason:
        yield error(place, str(reason))
        return
    if cluster:
        yield from _storage_rules(config, cluster, place)
        yield from _capacity_rules(config, cluster, place)


def _storage_rules(config: Config, cluster: Object, place: str) -> Findings:
    mounts = [
        {mount["mountPath"] for mount in parts.ray_container(group).get("volumeMounts") or []}
        for _, group in parts.groups(cluster, "")
    ]
    for key, location in (("storage", config.storage), ("data.url", config.data.url)):
        shared = all(any(location.startswith(mount) for mount in paths) for paths in mounts)
        if not is_url(location) and not shared:
            yield error(
                place, f"{key}={location} is a path in each pod: use a URL, or mount a volume there"
            )


def _capacity_rules(config: Config, cluster: Object, place: str) -> Findings:
    train = config.train
    if train.workers == 0:
        yield error(
            place, "train.workers=0 trains on the head, without Ray: set train.workers=1 or more"
        )
        return
    places, gpus = 0, train.use_gpu == "yes"
    for _, group in parts.worker_groups(cluster, ""):
        fit = [parts.offered(group, "cpu", "num-cpus") // train.cpus_per_worker]
        fit += [parts.offered(group, "nvidia.com/gpu", "num-gpus")] if gpus else []
        most = group.get("maxReplicas")
        room = min(fit)
        if most is None or not room.is_finite():
            return
        places += int(room) * most
    if places < train.worker_range[0]:
        each = f"{train.cpus_per_worker} CPU{' and a GPU' if gpus else ''}"
        yield error(
            place,
            f"train.workers={train.workers} with {each} each: the worker groups have room for "
            f"{places}; decrease train.workers or train.cpus_per_worker, or enlarge the groups",
        )
