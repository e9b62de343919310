"""The checker of manifests: it finds mistakes, and nothing in correct manifests."""

import copy
import csv
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import Problem, Severity, check_file, check_text, errors_of
from prioritycut_ray.kubernetes.syntax import FORMATS, parse_quantity
from tests.places import ROOT

DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared" / "kube"
Object = dict[str, Any]

_GROUP = "spec.rayClusterSpec.workerGroupSpecs[0]"
_WORKER = f"{_GROUP}.template.spec"
_SHORT = {
    "HEAD": "spec.rayClusterSpec.headGroupSpec",
    "GROUP": _GROUP,
    "WORKER^": f"{_GROUP}.template.",
    "WORKER": _WORKER,
    "RAY": f"{_WORKER}.containers[0]",
    "SUBMITTER": "spec.submitterPodTemplate.spec",
    "ZONE": f"{_WORKER}.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"
    ".nodeSelectorTerms[0].matchExpressions[0]",
}


def full(path: str) -> str:
    """A path without its short form."""
    for short, long in _SHORT.items():
        if path.startswith(short):
            return long + path.removeprefix(short)
    return path


def keys_of(path: str) -> list[Any]:
    found = re.findall(r"\[([^\]]+)\]|([^.\[\]]+)", full(path))
    words = [bracketed or plain for bracketed, plain in found]
    return [int(word) if word.isdigit() else word for word in words]


@cache
def _correct() -> dict[str, Object]:
    documents = yaml.safe_load_all((DATA / "manifests.yaml").read_text())
    return {document["kind"]: document for document in documents}


def correct(kind: str) -> Object:
    return copy.deepcopy(_correct()[kind])


def change(document: Object, path: str, value: Any) -> None:
    *keys, last = keys_of(path.removesuffix("+"))
    for key in keys:
        is_there = isinstance(document, list) or key in document
        document = document[key] if is_there else document.setdefault(key, {})
    if path.endswith("+"):
        document[last].append(value)
    else:
        document[last] = value


def drop(document: Object, path: str) -> None:
    *keys, last = keys_of(path)
    for key in keys:
        document = document[key]
    del document[last]


def broken(case: Object) -> Object:
    document = correct(case.get("of", "RayJob"))
    for path, value in case.get("set", {}).items():
        change(document, path, value)
    for path in case.get("drop", []):
        drop(document, path)
    return document


def check(document: Object) -> list[Problem]:
    return check_text(json.dumps(document))  # JSON is YAML, and quick to write


def text_of(problems: list[Problem]) -> str:
    return "\n".join(str(problem) for problem in problems)


CASES = yaml.safe_load((DATA / "mistakes.yaml").read_text())
MISTAKES = [case for case in CASES if case["says"] != "nothing"]


def name_of(case: Object) -> str:
    severity, path, words = case["says"] if case["says"] != "nothing" else ("right", "", "")
    changed = ",".join([*case.get("set", {}), *case.get("drop", [])])
    return f"{severity}-{path or changed}-{words}"[:90]


@pytest.mark.parametrize("kind", _correct())
def test_nothing_is_wrong_with_the_correct_objects(kind: str) -> None:
    expected = ["kind"] if kind == "RayCronJob" else []  # its feature gate
    assert [problem.where.split()[-1] for problem in check(correct(kind))] == expected


@pytest.mark.parametrize("case", MISTAKES, ids=name_of)
def test_a_mistake_is_named_with_its_place(case: Object) -> None:
    severity, path, words = case["says"]
    problems = check(broken(case))
    places = [problem for problem in problems if problem.where.split(" ", 1)[1:] == [full(path)]]
    assert any(problem.severity == severity and words in problem.message for problem in places), (
        text_of(problems)
    )


@pytest.mark.parametrize("case", [case for case in CASES if case["says"] == "nothing"], ids=name_of)
def test_correct_objects_have_no_findings(case: Object) -> None:
    assert text_of(check(broken(case))) == ""


# Whole files.


def test_samples_of_kuberay_are_valid() -> None:
    samples = DATA / "kuberay_samples.yaml"
    assert len(list(yaml.safe_load_all(samples.read_text()))) == 34
    problems = check_file(samples)
    assert errors_of(problems) == []
    assert all("needs the feature gate" in problem.message for problem in problems)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "cluster").glob("*.yaml")), ids=lambda path: path.name
)
def test_committed_files_have_only_placeholders_to_fill_in(path: Path) -> None:
    for problem in check_file(path):
        assert problem.severity is Severity.WARNING, problem
        assert re.search("is a placeholder|needs the feature gate", problem.message), problem


@pytest.mark.skipif(not SHARED.exists(), reason="the collected mistakes are not here")
def test_collected_mistakes_are_found() -> None:
    left_as_rendered = re.compile("is a placeholder")
    for row in csv.DictReader((SHARED / "mistakes.csv").read_text().splitlines()):
        problems = check_file(SHARED / "mistakes" / row["file"])
        if row["file"] not in ("58.yaml", "59.yaml"):
            problems = [p for p in problems if not left_as_rendered.search(p.message)]
        assert problems, row
        if row["refused by"] == "the API server":
            assert errors_of(problems), row


def test_errors_come_before_warnings() -> None:
    job = correct("RayJob")
    job["spec"]["entrypoint"] = "a && b"
    job["spec"]["backoffLimit"] = -1
    # The rules about several fields rely on the shape of each.
    assert [problem.severity for problem in check(job)] == [Severity.ERROR]
    job["spec"]["backoffLimit"] = 2
    job["spec"]["suspend"] = True
    assert [str(problem.severity) for problem in check(job)] == ["error", "warning"]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "contains no object"),
        ("a: [", "is not valid YAML"),
        ("- 1", "must be a mapping, not list"),
        ("kind: Pod", "needs apiVersion and kind"),
        (
            "apiVersion: v1\nkind: Pod\nkind: Pod\n",
            "'kind' is given twice, on line 2 and",
        ),
        ("apiVersion: v1\n1: 2\n", "'1' is not a string"),
        ("apiVersion: v1\nkind: List\nitems: [{kind: Pod}]\n", "needs apiVersion and kind"),
    ],
)
def test_a_text_without_a_manifest_is_named(text: str, fragment: str) -> None:
    assert fragment in text_of(check_text(text))


def test_a_job_within_a_config_map_is_checked() -> None:
    manifest = correct("ConfigMap")
    manifest["data"]["rayjob.yaml"] += "  backoffLimit: 3\n"
    assert "data[rayjob.yaml] RayJob/nightly spec.backoffLimit: " in text_of(check(manifest))


# Objects of one file against each other.


def check_all(*documents: Object) -> str:
    return text_of(check_text(yaml.safe_dump_all(documents)))


def test_a_file_that_a_pod_reads_is_a_key_of_what_it_mounts() -> None:
    manifest, cron = correct("ConfigMap"), correct("CronJob")
    assert check_all(manifest, cron) == ""
    manifest["data"]["rayjob.yml"] = manifest["data"].pop("rayjob.yaml")
    assert "args[1]: reads /manifest/rayjob.yaml" in check_all(manifest, cron)
    assert "did you mean 'rayjob.yml'" in check_all(manifest, cron)


@pytest.mark.parametrize(
    ("path", "value", "fragment"),
    [
        ("volumes[0].configMap.items", [{"key": "x.yaml", "path": "x"}], "has no key 'x.yaml'"),
        ("containers[0].volumeMounts[0].subPath", "x.yaml", "has no key 'x.yaml' for subPath"),
        (
            "containers[0].env",
            [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "nightly", "key": "x"}}}],
            "has no key 'x'",
        ),
    ],
)
def test_a_key_that_a_pod_refers_to_exists(path: str, value: Any, fragment: str) -> None:
    cron = correct("CronJob")
    change(cron, f"spec.jobTemplate.spec.template.spec.{path}", value)
    assert fragment in check_all(correct("ConfigMap"), cron)


def test_two_objects_with_the_same_name_are_reported() -> None:
    assert "appears twice in this file" in check_all(correct("Secret"), correct("Secret"))


def test_a_binding_to_a_misspelt_role_is_named() -> None:
    binding = correct("RoleBinding")
    binding["roleRef"]["name"] = "heads"
    assert "roleRef.name: Role heads is not in this file; did you mean 'head'" in check_all(
        correct("Role"), binding
    )


def test_a_misspelt_name_of_another_object_is_named() -> None:
    cron = correct("CronJob")
    change(cron, "spec.jobTemplate.spec.template.spec.volumes[0].configMap.name", "nihgtly")
    assert "ConfigMap nihgtly is not in this file; did you mean 'nightly'" in check_all(
        correct("ConfigMap"), cron
    )
    assert check_all(cron) == "", "what other files have is not known"


def test_kubectl_reads_what_is_mounted() -> None:
    cron = correct("CronJob")
    container = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    container["args"] = ["create", "--filename=/manifests/rayjob.yaml"]
    assert "args[1]: reads /manifests/rayjob.yaml" in check_all(cron)


def test_a_service_finds_its_pods_and_their_port() -> None:
    service, deployment = correct("Service"), correct("Deployment")
    assert check_all(service, deployment) == ""
    service["spec"]["ports"][0]["targetPort"] = "htp"
    assert "targetPort: its pods have no port 'htp'; did you mean 'http'" in check_all(
        service, deployment
    )
    for labels in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        labels["part-of"] = "lab"
    deployment["spec"]["template"]["metadata"]["labels"]["part-of"] = "lab"
    service["spec"]["selector"]["app"] = "tb"
    assert "spec.selector.app: is tb, but no pod" in check_all(service, deployment)


# Damage.

JUNK: list[Any] = [None, "", "x", -1, 10**30, 1.5, True, [], {}, [None], {"a": None}, [{}], [[]]]


@pytest.mark.parametrize("kind", _correct())
def test_random_damage_never_crashes_the_check(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(40):
        document = correct(kind)
        for tree, key in rng.sample(list(_places(document)), k=rng.randint(1, 3)):
            tree[key] = rng.choice(JUNK)
        check(document)


def test_most_damage_is_noticed() -> None:
    rng = random.Random(0)
    noticed = 0
    for _ in range(100):
        job = correct("RayJob")
        tree, key = rng.choice(list(_places(job)))
        tree[key] = rng.choice(JUNK)
        noticed += bool(check(job))
    assert noticed > 70


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def test_damaged_text_never_crashes_the_check() -> None:
    rng = random.Random(1)
    text = (DATA / "manifests.yaml").read_text()
    for _ in range(40):
        start = rng.randrange(len(text))
        damage = "".join(rng.choices("{}[]:-&*!|>'\"%@`#\t\n ~aé\x00", k=rng.randint(1, 4)))
        check_text(text[:start] + damage + text[start + rng.randint(0, 20) :])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml"):
        check_file(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: is not UTF-8"):
        check_file(tmp_path / "binary.yaml")


# The release of KubeRay, and syntax.


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("500m", 0.5),
        ("2", 2),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-1", -1),
        ("1Ki", 1024),
        ("1k", 1000),
        ("1e3", 1000),
        ("1E", 1e18),
    ],
)
def test_quantities(text: str, amount: float) -> None:
    parsed = parse_quantity(text)
    assert parsed is not None
    assert float(parsed) == amount


@pytest.mark.parametrize("text", ["", "1 Gi", "Gi", "1GB", "-", None, [], True, "1e99999"])
def test_invalid_quantities(text: Any) -> None:
    assert parse_quantity(text) is None


def test_every_type_of_kuberay_yaml_is_known() -> None:
    release = schema.kuberay()
    for fields in release.types.values():
        for kind in fields.values():
            name = kind.rstrip("*")
            assert (
                name.startswith("io.k8s.")
                or name in schema.SCALARS
                or name in release.schema["$defs"]
            ), name


def test_every_format_of_kuberay_yaml_is_known() -> None:
    for file in ("core.yaml", "kuberay.yaml"):
        text = (ROOT / "prioritycut_ray" / "kubernetes" / file).read_text()
        assert set(re.findall(r"format: ([\w-]+)", text)) <= set(FORMATS)


def test_the_options_of_ray_start_are_those_of_the_installed_ray() -> None:
    from ray.scripts.scripts import start

    options = schema.kuberay().tables["ray_start"]
    known = {name for kind, names in options.items() if kind != "retired" for name in names}
    own = {option.lstrip("-") for parameter in start.params for option in parameter.opts}
    assert own - {"v"} == known


def test_the_keys_of_a_runtime_environment_are_those_of_the_installed_ray() -> None:
    from ray.runtime_env import RuntimeEnv

    assert schema.kuberay().tables["runtime_env"].keys() == RuntimeEnv.known_fields
