"""RayJobs and RayCronJobs: ``ValidateRayJobSpec`` and what breaks when the job is submitted."""

import json
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise

from prioritycut_ray.kubernetes.check import clusters, entrypoints, parts, runtime_env, schedules
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.options import image_ray_version

_SELECTOR = "ray.io/cluster"
_DELETES_CLUSTER = ("DeleteCluster", "DeleteWorkers")
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_TO_END = ("Never", "OnFailure")


def check_cron(spec: Object) -> Findings:
    """Check the spec of a RayCronJob."""
    yield from schedules.check(spec)
    if spec.get("suspend"):
        yield warning(
            "spec.suspend",
            "on resume, the operator starts all missed runs at once; delete the RayCronJob and "
            "create it again later",
        )
    # The operator checks the template without the metadata of the RayCronJob.
    yield from check(spec["jobTemplate"], "spec.jobTemplate", None)


def check(spec: Object, path: str, metadata: Object | None) -> Findings:
    """Check the spec of a RayJob.

    Args:
        spec: a RayJobSpec.
        path: path of the spec.
        metadata: metadata of the RayJob.
    """
    cluster = spec.get("rayClusterSpec")
    if not cluster and not spec.get("clusterSelector"):
        yield error(path, "needs rayClusterSpec, or clusterSelector for an existing cluster")
    yield from _mode_rules(spec, path)
    yield from _selector_rules(spec, path)
    yield from _end_rules(spec, path)
    yield from _deletion_rules(spec, path)
    yield from _submitter_rules(spec, path)
    yield from runtime_env.check(spec, path)
    if spec.get("metadata") and cluster and cluster.get("rayVersion"):
        yield from parts.needs_ray(cluster, "metadata", f"{path}.metadata")
    yield from _reservation_rules(spec, path)
    if cluster:
        yield from clusters.check(cluster, f"{path}.rayClusterSpec", metadata, "RayJob")
        if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield error(
                f"{path}.rayClusterSpec.authOptions",
                "enableK8sTokenAuth is not for a RayJob: remove it",
            )
    yield from entrypoints.check(spec, path)


def mode_of(spec: Object) -> str:
    """Return the submission mode."""
    return spec.get("submissionMode") or "K8sJobMode"


def _mode_rules(spec: Object, path: str) -> Findings:
    mode = mode_of(spec)
    if not (spec.get("entrypoint") or "").strip() and not _needs_no_entrypoint(spec):
        yield error(f"{path}.entrypoint", "is missing: there is nothing to run")
    if mode == "InteractiveMode":
        if spec.get("backoffLimit"):
            yield error(f"{path}.backoffLimit", "is not supported in InteractiveMode: remove it")
        if spec.get("entrypoint"):
            yield warning(
                f"{path}.entrypoint", "has no effect in InteractiveMode: submit it yourself"
            )
    if mode == "SidecarMode":
        yield from _sidecar_rules(spec, path)


def _needs_no_entrypoint(spec: Object) -> bool:
    return mode_of(spec) == "InteractiveMode" or bool(_submitter(spec).get("command"))


def _submitter(spec: Object) -> Object:
    """Return the container of the job's own submitter pod, or an empty mapping."""
    template = spec.get("submitterPodTemplate") or {}
    found = (template.get("spec") or {}).get("containers") or [{}]
    return found[0] or {}


def _sidecar_rules(spec: Object, path: str) -> Findings:
    for field in ("submitterPodTemplate", "clusterSelector"):
        if spec.get(field):
            yield error(f"{path}.{field}", "is not supported in SidecarMode: remove it")
    if spec.get("submitterConfig"):
        yield warning(
            f"{path}.submitterConfig",
            "needs the feature gate SidecarSubmitterRestart in SidecarMode, or the operator "
            "rejects it: remove it, or enable the gate",
        )
    cluster = spec.get("rayClusterSpec")
    if cluster:
        template = cluster["headGroupSpec"]["template"] or {}
        policy = (template.get("spec") or {}).get("restartPolicy") or "Never"
        if policy != "Never":
            yield error(
                f"{path}.rayClusterSpec.headGroupSpec.template.spec.restartPolicy",
                f"is {policy}; in SidecarMode it must be Never",
            )


def _selector_rules(spec: Object, path: str) -> Findings:
    selector, place = spec.get("clusterSelector"), f"{path}.clusterSelector"
    if not selector:
        return
    if spec.get("rayClusterSpec"):
        yield warning(f"{path}.rayClusterSpec", "has no effect with clusterSelector: remove one")
    if not selector.get(_SELECTOR):
        yield error(place, f"must name the cluster under {_SELECTOR}")
    if spec.get("backoffLimit"):
        yield error(f"{path}.backoffLimit", "is not supported with clusterSelector: remove it")
    if spec.get("suspend"):
        yield error(f"{path}.suspend", "is not supported with clusterSelector: remove it")


# The end of a job.


def _end_rules(spec: Object, path: str) -> Findings:
    start, whole = spec.get("preRunningDeadlineSeconds"), spec.get("activeDeadlineSeconds")
    if start and whole and start >= whole:
        yield warning(
            f"{path}.preRunningDeadlineSeconds",
            f"is {start}, but activeDeadlineSeconds ends the job after {whole}: decrease it",
        )
    ends = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("ttlSecondsAfterFinished") and not ends:
        yield error(f"{path}.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true")
    if spec.get("suspend") and not ends:
        yield error(f"{path}.suspend", "needs shutdownAfterJobFinishes: true")


def _deletion_rules(spec: Object, path: str) -> Findings:
    strategy, place = spec.get("deletionStrategy"), f"{path}.deletionStrategy"
    if strategy is None:
        return
    rules = strategy.get("deletionRules") or []
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield error(
            f"{place}.deletionRules", "cannot be combined with shutdownAfterJobFinishes: keep one"
        )
    policies = [
        (f"{place}.deletionRules[{index}].policy", rule["policy"])
        for index, rule in enumerate(rules)
    ]
    for side in ("onSuccess", "onFailure"):
        if strategy.get(side) is None:
            continue
        policy = strategy[side].get("policy")
        policies.append((f"{place}.{side}.policy", policy))
        if policy is None:
            yield error(f"{place}.{side}.policy", "is missing")
        if policy == "DeleteNone" and spec.get("shutdownAfterJobFinishes"):
            yield error(
                f"{place}.{side}.policy",
                "is DeleteNone, which contradicts shutdownAfterJobFinishes: true; remove one",
            )
    for spot, policy in policies:
        yield from _policy_rules(policy, spec, spot)
    yield from _order_rules(rules, f"{place}.deletionRules")


def _policy_rules(policy: str | None, spec: Object, spot: str) -> Findings:
    if spec.get("clusterSelector") and policy in _DELETES_CLUSTER:
        yield error(spot, f"is {policy}, which is not allowed with clusterSelector: use DeleteSelf")
    cluster = spec.get("rayClusterSpec") or {}
    if policy == "DeleteWorkers" and parts.autoscales(cluster):
        yield error(spot, "is DeleteWorkers, which an autoscaling cluster does not support")


def _order_rules(rules: list[Object], place: str) -> Findings:
    """Check that policies are unique per status, and ordered: workers, cluster, RayJob."""
    seen: dict[str, dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition, policy = rule["condition"], rule["policy"]
        status = condition.get("jobStatus") or condition.get("jobDeploymentStatus")
        earlier = seen.setdefault(str(status), {})
        if policy in earlier:
            yield error(f"{place}[{index}]", f"duplicates {policy} for {status}: remove one")
        earlier.setdefault(policy, condition.get("ttlSeconds") or 0)
    for status, delays in seen.items():
        given = [(policy, delays[policy]) for policy in _ORDER if policy in delays]
        for (first, before), (second, after) in pairwise(given):
            if after < before:
                yield error(
                    place,
                    f"for {status}, {second} ({after} s) comes before {first} ({before} s): "
                    f"increase the ttlSeconds of {second}",
                )


# The submitter.


def _submitter_rules(spec: Object, path: str) -> Findings:
    template, place = spec.get("submitterPodTemplate"), f"{path}.submitterPodTemplate"
    if template is None:
        return
    if mode_of(spec) in ("HTTPMode", "InteractiveMode"):
        yield warning(place, f"has no effect in {mode_of(spec)}: remove it")
    pod = template.get("spec") or {}
    if not pod.get("containers"):
        yield error(f"{place}.spec.containers", "is empty: a pod needs a container")
    policy = pod.get("restartPolicy")
    if policy not in _TO_END:
        yield error(
            f"{place}.spec.restartPolicy",
            f"is {policy or 'Always'}; for a Job it must be Never or OnFailure",
        )
    cluster = spec.get("rayClusterSpec")
    if cluster:
        image = _submitter(spec).get("image") or ""
        own = image_ray_version(image)
        head = parts.ray_container(cluster["headGroupSpec"]).get("image") or ""
        of_cluster = image_ray_version(head) or cluster.get("rayVersion")
        if not own and image and image != head and not _submitter(spec).get("command"):
            yield warning(
                f"{place}.spec.containers[0].image",
                f"{image} may not contain Ray {of_cluster or ''}".rstrip()
                + "; use the head's image, because the submitter runs `ray job submit`",
            )
        if own and of_cluster and own != of_cluster:
            yield error(
                f"{place}.spec.containers[0].image",
                f"{image} has Ray {own}, but the cluster has {of_cluster}; use the head's image",
            )


# Resources of the entrypoint.


def _reservation_rules(spec: Object, path: str) -> Findings:
    text = spec.get("entrypointResources")
    if text:
        resources = _as_json(text)
        if not isinstance(resources, dict):
            yield error(
                f"{path}.entrypointResources",
                f"""{text!r} is not a JSON object, such as '{{"fast-disk": 1}}'""",
            )
        elif not all(_is_number(amount) for amount in resources.values()):
            yield error(f"{path}.entrypointResources", f"{text!r}: amounts must be numbers")
    cluster = spec.get("rayClusterSpec")
    for field, resource, option in (
        ("entrypointNumCpus", "cpu", "num-cpus"),
        ("entrypointNumGpus", "nvidia.com/gpu", "num-gpus"),
    ):
        wanted = spec.get(field)
        if not wanted or not cluster:
            continue
        most = max(_offers(cluster, resource, option))
        if Decimal(str(wanted)) > most:
            yield warning(
                f"{path}.{field}",
                f"is {wanted}, but no pod has more than {most:f}: the job would wait forever",
            )


def _as_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _offers(cluster: Object, resource: str, option: str) -> Iterator[Decimal]:
    """Yield how much of a resource the pods of each group offer."""
    for _, group in parts.groups(cluster, ""):
        yield parts.offered(group, resource, option)
