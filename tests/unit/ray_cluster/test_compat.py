"""What ray_cluster/compat.py relies on is still in Ray, and no other module reaches into Ray."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.optuna import OptunaSearch

import prioritycut_ray
from prioritycut_ray.ray_cluster import compat

PACKAGE = Path(prioritycut_ray.__file__).parent
RAY = Path(ray.__file__).parent
CHANGED = (
    f"Ray {ray.__version__} lacks what prioritycut_ray/ray_cluster/compat.py relies on, which was "
    f"checked with Ray {compat.CHECKED_WITH}"
)
ALLOWED = ("_replace", "_asdict", "_fields", "_exit")
PUBLIC_VARIABLES = {
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_TMPDIR",
}


def others() -> Iterator[tuple[str, ast.Module]]:
    """All modules but compat, and kubernetes, which sets variables of Ray in manifests."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name != "ray_cluster/compat.py" and not name.startswith("kubernetes/"):
            yield name, ast.parse(path.read_text())


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Imports, attributes and environment variables of Ray that are private."""
    own = set(re.findall(r"\b_\w+", " ".join(names_defined_in(tree))))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "ray" and (
                    any(part.startswith("_") for part in parts)
                    or parts[1:2] in (["dashboard"], ["autoscaler"], ["core"])
                ):
                    yield f"line {node.lineno}: {name}"
        elif isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            if imports_ray(tree) and node.attr not in own and node.attr not in ALLOWED:
                yield f"line {node.lineno}: .{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_variable = re.fullmatch(r"(RAY|TUNE)_[A-Za-z_]+", node.value)
            if is_variable and node.value not in PUBLIC_VARIABLES:
                yield f"line {node.lineno}: {node.value}"


def names_defined_in(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def imports_ray(tree: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "ray" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray")
        for node in ast.walk(tree)
    )


def test_no_other_module_uses_private_parts_of_ray() -> None:
    trees = list(others())
    assert sum(imports_ray(tree) for _, tree in trees) > 10
    found = [f"{name}: {use}" for name, tree in trees for use in private_uses(tree)]
    assert found == [], "move these to ray_cluster/compat.py"


@pytest.mark.parametrize(
    "line",
    [
        "from ray._private import worker",
        "import ray.train.v2._internal.execution",
        "from ray.autoscaler.v2.sdk import get_cluster_status",
        "import ray\nray._private.state.state.nodes()",
        "import ray\nclass A(ray.B):\n    def f(self): return self._trial_state",
        "import ray, os\nos.environ['RAY_TRAIN_METRICS_ENABLED'] = '0'",
    ],
)
def test_private_uses_are_recognized(line: str) -> None:
    assert list(private_uses(ast.parse(line)))


def in_fresh_process(code: str) -> str:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{CHANGED}\n{result.stderr}"
    return result.stdout.strip()


def test_importing_the_package_leaves_the_environment_unchanged() -> None:
    code = (
        "import os, pkgutil, importlib; before = dict(os.environ)\n"
        "import prioritycut_ray\n"
        "assert dict(os.environ) == before, 'the package'\n"
        "for name in ('launch.driver', 'search.driver', 'ray_cluster.jobs', 'packing.pipeline'):\n"
        "    importlib.import_module(f'prioritycut_ray.{name}')\n"
        "ours = {n: v for n, v in os.environ.items() if n.startswith(('RAY_', 'TUNE_'))}\n"
        "assert ours == {n: v for n, v in before.items() if n in ours}, ours\n"
    )
    in_fresh_process(code)


def test_variables_are_read_when_ray_starts_something_not_when_it_is_imported() -> None:
    code = (
        "import os\n"
        "for name in list(os.environ):\n"
        "    if name.startswith(('RAY_', 'TUNE_')): del os.environ[name]\n"
        "import ray, ray.train.torch, ray.tune\n"
        "from ray._common.usage import usage_lib\n"
        "from ray.train.v2._internal.constants import get_env_vars_to_propagate\n"
        "from ray.tune.experimental.output import get_air_verbosity\n"
        "from prioritycut_ray.ray_cluster import compat\n"
        "assert get_air_verbosity(0) is not None\n"
        "compat.set_core_environment(local=True)\n"
        "compat.set_train_environment(660.0)\n"
        "compat.set_tune_environment()\n"
        "assert not usage_lib.usage_stats_enabled(), 'usage statistics'\n"
        "passed_on = get_env_vars_to_propagate()\n"
        "expected = {**compat.TRAIN_ENVIRONMENT, compat.HEALTH_CHECK_TIMEOUT: '660.0'}\n"
        "assert expected.items() <= passed_on.items(), passed_on\n"
        "assert get_air_verbosity(0) is None, 'output of Tune'\n"
    )
    in_fresh_process(code)


NAMES = [*compat.CORE_ENVIRONMENT, *compat.LOCAL_ENVIRONMENT, *compat.TRAIN_ENVIRONMENT]


def test_values_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv(compat.HEALTH_CHECK_TIMEOUT, "7")
    compat.set_core_environment(local=True)
    compat.set_train_environment(660.0)
    environ = compat.os.environ
    assert {environ[name] for name in NAMES} == {"7"}
    assert environ[compat.HEALTH_CHECK_TIMEOUT] == "660.0", "it follows from the configuration"


@pytest.mark.slow
def test_a_process_does_not_wait_long_for_a_local_ray_that_has_ended() -> None:
    """As after SIGTERM to the whole process group; Ray's own limit is 60 s."""
    code = (
        "import os, signal, ray\n"
        "from ray._private import worker\n"
        "from prioritycut_ray.ray_cluster.session import start_ray\n"
        "start_ray()\n"
        "kinds = worker.global_worker.node.all_processes.values()\n"
        "processes = [info.process for kind in kinds for info in kind]\n"
        "for process in processes: os.kill(process.pid, signal.SIGTERM)\n"
        "print('ended', flush=True)\n"
        "for process in processes: process.wait()\n"  # or it still answers
        "ray.nodes()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ended"
        try:
            assert process.wait(40) != 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, "train/v2/_internal/constants.py") for name in compat.TRAIN_ENVIRONMENT),
        (compat.HEALTH_CHECK_TIMEOUT, "train/v2/_internal/constants.py"),
        ("TUNE_PRINT_ALL_TRIAL_ERRORS", "tune/execution/tune_controller.py"),
        (compat.JOB_STOP_WAIT, "dashboard/modules/job/job_supervisor.py"),
        ("timed out during startup", "_private/node.py"),
        ("Request failed with status code {r.status_code}", "dashboard/modules/dashboard_sdk.py"),
        ("class _AutoscalingCoordinatorActor", "data/_internal/cluster_autoscaler"),
        ("getLogger(__name__)", "dashboard/modules/job/sdk.py"),
        ('experiment_state-{}.json"', "tune/execution/tune_controller.py"),
        ("node running low on memory", "core/src/ray/raylet/raylet"),
        ("its node has died", "core/src/ray/gcs/gcs_server"),
        ("node was terminated", "core/src/ray/gcs/gcs_server"),
    ],
)
def test_ray_still_has_this_name_or_text(name: str, file: str) -> None:
    path = RAY / file
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert any(name.encode() in file.read_bytes() for file in files), f"{CHANGED}: {name} in {file}"


def test_memory_is_rays_own_reading() -> None:
    used, total = compat.node_memory()
    assert 0 < used < total, CHANGED


def test_titles_of_idle_processes() -> None:
    expected = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    assert set(expected) <= set(compat.IDLE_PROCESSES), CHANGED


def test_messages_of_the_cluster_go_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = compat.worker
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    compat.print_cluster_messages_to_stderr()
    data = {"ip": "10.0.0.1", "pid": 7, "job": None, "is_err": False, "lines": ["added a node"]}
    worker.print_to_stdstream(data, ignore_prefix=True)
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "added a node"), CHANGED
    calls = re.findall(r"print_to_stdstream\b", inspect.getsource(worker))
    assert len(calls) > 2, f"{CHANGED}: nothing calls print_to_stdstream"


def test_errors_of_ray_train_are_recognized() -> None:
    from ray.train.v2._internal import exceptions

    for name in (
        "CollectiveTimeoutError",
        "BroadcastCollectiveTimeoutError",
        "WorkerHealthCheckTimeoutError",
    ):
        error_type = getattr(exceptions, name, None)
        assert error_type is not None, f"{CHANGED}: {name}"
        assert compat.is_train_timeout(error_type.__new__(error_type))
    cause = ValueError("cause")
    failed = exceptions.WorkerHealthCheckFailedError("failed", cause)
    assert compat.health_check_cause(failed) is cause, CHANGED
    assert compat.health_check_cause(cause) is cause
    assert not compat.is_train_timeout(failed)


@pytest.mark.parametrize(
    ("recognizes", "error", "expected"),
    [
        (compat.killed_by_memory_monitor, OutOfMemoryError("low"), True),
        (compat.killed_by_memory_monitor, RayActorError(error_msg="The actor died"), False),
        (compat.was_terminated, RayActorError(error_msg="died", preempted=True), True),
        (compat.was_terminated, RayActorError(error_msg="received SIGTERM"), True),
        (compat.was_terminated, RayActorError(error_msg="The actor died"), False),
        (compat.lost_its_node, RayActorError(error_msg="because its node has died"), True),
        (compat.lost_its_node, RayActorError(error_msg="The actor died"), False),
        (compat.is_not_found, RuntimeError("Request failed with status code 404: x"), True),
        (compat.is_not_found, RuntimeError("Request failed with status code 500: x"), False),
    ],
)
def test_causes_are_told_apart(recognizes: Any, error: BaseException, expected: bool) -> None:
    assert recognizes(error) is expected, CHANGED


def _action() -> None:
    pass


def test_a_callback_for_workers_reaches_ray() -> None:
    from ray.train.v2._internal.execution import callback, worker_group

    called: list[int] = []
    made = compat.call_in_workers(lambda: called.append(1))
    assert isinstance(made, callback.WorkerCallback), CHANGED
    assert hasattr(callback.WorkerCallback, "after_init_train_context"), CHANGED
    assert isinstance(made, ray.train.RunConfig(callbacks=[made]).callbacks[0].__class__)
    made.after_init_train_context()
    assert called == [1]
    ray.cloudpickle.loads(ray.cloudpickle.dumps(compat.call_in_workers(_action)))
    source = Path(worker_group.__file__).with_name("worker.py").read_text()
    assert "callback.after_init_train_context()" in source, f"{CHANGED}: nothing calls it"


def test_the_state_of_a_population_is_where_it_was() -> None:
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        metric="objective",
        mode="min",
        perturbation_interval=1,
        hyperparam_mutations={"a": tune.uniform(0, 1)},
        synch=True,
    )
    trial = Trial("any", stub=True, config={"a": 0.5})
    state = type("Controller", (), {"search_alg": None})()
    scheduler.on_trial_add(state, trial)
    assert not compat.has_reported(scheduler, trial), CHANGED
    member = scheduler._trial_state[trial]
    member.last_train_time, member.last_result = 1, {"objective": 2.0}
    assert compat.has_reported(scheduler, trial), CHANGED
    assert compat.last_result(scheduler, trial) == {"objective": 2.0}, CHANGED


def test_the_trials_of_an_optuna_search_are_where_they_were() -> None:
    searcher = OptunaSearch(
        lambda trial: {"a": trial.suggest_float("a", 0, 1)}, metric="objective", mode="min"
    )
    first = searcher.suggest("one")
    assert [trial.params for trial in compat.optuna_study(searcher).trials] == [first], CHANGED
    compat.suggest_again(searcher, "two", 0)
    assert searcher.suggest("two") == first, CHANGED
    assert {n: t.number for n, t in compat.optuna_trials(searcher).items()} == {"one": 0, "two": 0}
    assert len(compat.optuna_study(searcher).trials) == 1, CHANGED


def test_names_that_need_a_cluster_exist() -> None:
    from ray.autoscaler.v2 import schema, sdk

    assert "autoscaler_version" in schema.Stats.__dataclass_fields__, CHANGED
    assert "gcs_address" in inspect.signature(sdk.get_cluster_status).parameters, CHANGED
    assert callable(ray._private.state.state.get_draining_nodes), CHANGED
    assert hasattr(ray._private.node.Node, "get_session_dir_path"), CHANGED
    assert compat.PlacementGroupID.from_random().hex(), CHANGED
    assert importlib.util.find_spec(compat.JOB_LOGGER), CHANGED
