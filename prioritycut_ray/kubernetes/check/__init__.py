"""What is wrong with a manifest, found without a cluster.

Three layers: the closed schemas, the CEL rules of KubeRay, and what only the operator, the API
server or a failing job would say otherwise. Errors are what one of them refuses or what cannot run;
warnings are what may be meant, or is only right on some clusters.
"""

from prioritycut_ray.kubernetes.check.documents import check_file, check_text
from prioritycut_ray.kubernetes.check.findings import Problem, Severity, errors_of

__all__ = ["Problem", "Severity", "check_file", "check_text", "errors_of"]
