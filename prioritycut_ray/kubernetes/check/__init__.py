"""Check manifests without a cluster.

There are three layers: closed schemas, KubeRay's CEL rules, and everything else that the operator,
the API server or a failing job would report. Errors are what one of them rejects or what cannot
run. Warnings may be intended, or are correct on some clusters only.
"""

from prioritycut_ray.kubernetes.check.documents import check_file, check_text
from prioritycut_ray.kubernetes.check.findings import Problem, Severity, errors_of

__all__ = ["Problem", "Severity", "check_file", "check_text", "errors_of"]
