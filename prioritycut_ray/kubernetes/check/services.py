"""RayServices: ``ValidateRayServiceSpec``."""

import yaml

from prioritycut_ray.kubernetes.check import clusters, parts
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error
from prioritycut_ray.kubernetes.syntax import is_duration

_TIMEOUT = "ray.io/initializing-timeout"
_INCREMENTAL = "NewClusterWithIncrementalUpgrade"


def check(spec: Object, metadata: Object) -> Findings:
    """Check the spec of a RayService."""
    cluster, path = spec["rayClusterConfig"], "spec.rayClusterConfig"
    yield from clusters.check(cluster, path, metadata, "RayService")
    if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield error(
            f"{path}.authOptions.enableK8sTokenAuth", "is not supported for a RayService: remove it"
        )
    service = cluster["headGroupSpec"].get("headService") or {}
    if (service.get("metadata") or {}).get("name"):
        yield error(
            f"{path}.headGroupSpec.headService.metadata.name",
            "is set by the operator for a RayService: remove it",
        )
    yield from _upgrade_rules(spec, cluster)
    yield from _timeout_rules(metadata.get("annotations") or {})
    yield from _serve_rules(spec)


def _upgrade_rules(spec: Object, cluster: Object) -> Findings:
    strategy, place = spec.get("upgradeStrategy") or {}, "spec.upgradeStrategy"
    if strategy.get("type") != _INCREMENTAL:
        return
    if not parts.autoscales(cluster):
        yield error(
            "spec.rayClusterConfig.enableInTreeAutoscaling", f"must be true for {_INCREMENTAL}"
        )
    options = strategy.get("clusterUpgradeOptions")
    if options is None:
        yield error(f"{place}.clusterUpgradeOptions", f"is missing: {_INCREMENTAL} needs it")
        return
    step, surge = options["stepSizePercent"], options.get("maxSurgePercent", 100)
    if step > surge:
        yield error(
            f"{place}.clusterUpgradeOptions.stepSizePercent",
            f"is {step}, greater than maxSurgePercent: {surge}",
        )


def _timeout_rules(annotations: Object) -> Findings:
    text = annotations.get(_TIMEOUT)
    if text and not is_duration(text) and not (text.isdigit() and int(text) > 0):
        yield error(
            f"metadata.annotations[{_TIMEOUT}]",
            f"{text!r} is neither a duration, such as 30m, nor a number of seconds",
        )


def _serve_rules(spec: Object) -> Findings:
    text = spec.get("serveConfigV2") or ""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as reason:
        yield error("spec.serveConfigV2", f"is not valid YAML: {' '.join(str(reason).split())}")
        return
    if config is not None and not (isinstance(config, dict) and config.get("applications")):
        yield error("spec.serveConfigV2", "must be a mapping with a list of applications")
