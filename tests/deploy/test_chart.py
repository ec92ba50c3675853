"""The Helm chart: what it refuses, what it makes, and that deploy/kubernetes was made by it."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cli.processes import kvferry
from deploy.test_manifests import CUSTOM, DEPLOY, POD_IP, TOP, containers, with_keys
from kvferry_daemon.config import Config

CHART = DEPLOY / "helm" / "kvferry"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
MADE = {"daemonset": "kvferry", "sidecar": "decode"}  # plain manifests, and their release
HELM = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed: make installs it")
WORKER = {"image": "engine:1", "ports": [{"name": "http", "containerPort": 8000}]}
KEYS = {"secretName": "kvferry-keys"}
CASES: dict[str, dict[str, Any]] = {
    "daemonset, keys": {"keys": KEYS, "config": {"window_tokens": 2_000_000, "checksum": False}},
    "daemonset, insecure": {"insecure": True, "podMonitor": {"enabled": True}},
    "daemonset, GPU": {
        "keys": KEYS,
        "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "nodeSelector": {"gpu": "yes"},
    },
    "sidecar, keys": {
        "mode": "sidecar",
        "keys": KEYS,
        "worker": {**WORKER, "command": ["vllm"], "args": ["serve"], "resources": {"limits": {}}},
        "config": {"stall_s": 1.5, "copy_cpus": "0"},
        "imagePullSecrets": [{"name": "registry"}],
        "supplementalGroups": [20001, 1000660000],
    },
    "sidecar, GPU": {"mode": "sidecar", "keys": KEYS, "worker": WORKER, "gpu": {"enabled": True}},
}


def helm(*args: object, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm with values of a file on stdin."""
    assert HELM is not None
    with_values = ["--values", "-"] if values is not None else []
    return subprocess.run(
        [HELM, *map(str, args), *with_values],
        input=yaml.safe_dump(values or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def made(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the chart makes of values, by kind."""
    done = helm("template", "decode", CHART, values=values)
    assert done.returncode == 0, done.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


def pod_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The pod that a DaemonSet or a Deployment starts."""
    (one,) = [objects[kind] for kind in ("DaemonSet", "Deployment") if kind in objects]
    return dict(one["spec"]["template"]["spec"])


@needs_helm
@pytest.mark.parametrize("name", MADE)
def test_the_plain_manifests_are_what_the_chart_makes(name: str) -> None:
    values = DEPLOY / "helm" / f"{name}.values.yaml"
    done = helm("template", MADE[name], CHART, "-f", values)
    path = DEPLOY / "kubernetes" / f"{name}.yaml"
    header, _, manifest = path.read_text().partition("\n")
    assert "make manifests" in header
    assert manifest == done.stdout


@needs_helm
@pytest.mark.parametrize("name", MADE)
def test_helm_finds_nothing_to_complain_about(name: str) -> None:
    values = DEPLOY / "helm" / f"{name}.values.yaml"
    done = helm("lint", "--strict", CHART, "-f", values)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout + done.stderr


@needs_helm
@pytest.mark.parametrize("name", CASES)
def test_what_it_makes_is_what_kubernetes_takes(name: str) -> None:
    objects = made(CASES[name])
    is_scaled = "Deployment" in objects  # of others no controller counts the pods that may go
    assert ("NetworkPolicy" in objects, "PodDisruptionBudget" in objects) == (True, is_scaled)
    for kind in objects.keys() - CUSTOM:
        version = kubernetes_validate.latest_version()
        kubernetes_validate.validate(objects[kind], version, strict=True)


@needs_helm
@pytest.mark.parametrize("name", CASES)
def test_a_daemon_gets_the_settings_that_were_given(name: str, tmp_path: Path) -> None:
    (container,) = containers(made(CASES[name]))
    given = {one["name"]: one.get("value", POD_IP) for one in container["env"]}
    env = {name: value for name, value in given.items() if name.startswith("KVFERRY_")}
    answer = kvferry("config", "check", "--json", env=with_keys(env, tmp_path))
    assert answer.returncode == 0, answer
    settings = json.loads(answer.stdout)["settings"]
    asked = {**CASES[name].get("config", {}), "budget_bytes": 64 << 30}
    assert {setting: settings[setting] for setting in asked} == asked
    has_keys = any(mount["name"] == "keys" for mount in container["volumeMounts"])
    assert (settings["keys_dir"] is not None) == has_keys == (not settings["insecure"])


@needs_helm
def test_keys_can_be_read_by_the_daemon_alone() -> None:
    pod = pod_of(made(CASES["sidecar, keys"]))
    (keys,) = [one["secret"] for one in pod["volumes"] if one["name"] == "keys"]
    assert keys == {"secretName": "kvferry-keys", "defaultMode": 0o440}
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]


@needs_helm
def test_an_operators_own_user_and_labels_are_written_as_they_are() -> None:
    """A large number would be 1.00066e+09 otherwise; and an operator of Prometheus asks for labels."""
    asked = {"enabled": True, "labels": {"release": "prometheus"}}
    objects = made({"insecure": True, "uid": 1_000_660_000, "podMonitor": asked})
    assert pod_of(objects)["securityContext"]["runAsUser"] == 1_000_660_000
    assert objects["PodMonitor"]["metadata"]["labels"]["release"] == "prometheus"
    assert objects["PodMonitor"]["metadata"]["labels"]["app.kubernetes.io/name"] == "kvferry"


@needs_helm
def test_a_worker_starts_after_its_daemon_and_sees_its_directory() -> None:
    pod = pod_of(made(CASES["sidecar, keys"]))
    (daemon,), (worker,) = pod["initContainers"], pod["containers"]
    assert daemon["restartPolicy"] == "Always"
    assert worker["volumeMounts"] == daemon["volumeMounts"][:1]
    assert worker["env"][0] == daemon["env"][0]


@needs_helm
@pytest.mark.parametrize(("config", "stop_s"), [({}, 30), ({"stop_s": 90.5}, 91)])
def test_a_pod_has_time_to_drain_and_then_to_stop(config: dict[str, Any], stop_s: int) -> None:
    """And some more, so that the daemon ends by itself."""
    assert Config.model_fields["stop_s"].default == 30
    pod = pod_of(made({**CASES["sidecar, keys"], "config": config, "drainS": 7}))
    assert pod["initContainers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1] == "7"
    assert pod["terminationGracePeriodSeconds"] == 7 + stop_s + 15


@needs_helm
def test_a_worker_goes_on_while_its_daemon_drains() -> None:
    """All hooks before a pod's end run at once, and the worker is told to end behind its own."""
    values = yaml.safe_load((DEPLOY / "helm" / "sidecar.values.yaml").read_text())
    ready = {"httpGet": {"path": "/health", "port": "http"}}
    pod = pod_of(made({**values, "worker": {**values["worker"], "readinessProbe": ready}}))
    (daemon,), (worker,) = pod["initContainers"], pod["containers"]
    drain, sleep = (one["lifecycle"]["preStop"]["exec"]["command"] for one in (daemon, worker))
    assert sleep == ["sleep", drain[-1]]
    assert worker["readinessProbe"] == ready


@needs_helm
def test_a_daemon_is_a_member_of_the_groups_that_were_given() -> None:
    groups = pod_of(made(CASES["sidecar, keys"]))["securityContext"]["supplementalGroups"]
    assert groups == [20001, 1000660000]
    assert "supplementalGroups" not in pod_of(made(CASES["daemonset, keys"]))["securityContext"]


@needs_helm
def test_daemon_and_workers_see_each_others_processes_where_pools_lie_in_a_gpu() -> None:
    assert pod_of(made(CASES["sidecar, GPU"]))["shareProcessNamespace"] is True
    node = pod_of(made(CASES["daemonset, GPU"]))
    assert (node["hostPID"], node["hostIPC"], node["runtimeClassName"]) == (True, True, "nvidia")
    assert "hostPID" not in pod_of(made(CASES["daemonset, keys"]))


@needs_helm
def test_the_network_policy_lets_in_peers_prometheus_and_who_asks_the_engine() -> None:
    policy = made(CASES["sidecar, keys"])["NetworkPolicy"]["spec"]
    ports = [[port["port"] for port in rule["ports"]] for rule in policy["ingress"]]
    assert ports == [[7000, 7001], [9464], [8000]]
    assert [("from" in rule) for rule in policy["ingress"]] == [True, True, False]


@needs_helm
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "set keys.secretName, or insecure=true"),
        ({"insecure": True, "mode": "sidecar"}, "worker.image: the image of your engine"),
        ({"insecure": True, "config": {"windows": 3}}, "additional properties 'windows'"),
        ({"insecure": True, "budgetBytes": "8Gi"}, "/budgetBytes"),
        ({"insecure": True, "mode": "daemon"}, "/mode"),
        ({"insecure": "yes"}, "/insecure"),
        ({"insecure": True, "ports": {"peer": 80}}, "/ports/peer"),
        ({"insecure": True, "gpu": {"device": "gpu0"}}, "/gpu/device"),
        ({"insecure": True, "supplementalGroups": ["kvferry"]}, "/supplementalGroups/0"),
        ({"insecure": True, "key": KEYS}, "additional properties 'key'"),
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, Any], words: str) -> None:
    done = helm("template", "kvferry", CHART, values=values)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr


@needs_helm
def test_the_guides_commands_make_keys_and_install_the_chart(tmp_path: Path) -> None:
    """But for kubectl, whose Secret has the files that were made."""
    text = (DEPLOY / "README.md").read_text()
    new, trust = re.findall(r"^    kvferry (keys .*?) +#", text, re.MULTILINE)
    key = kvferry(*new.split(), cwd=tmp_path).stdout.strip()
    done = kvferry(*trust.replace("KEY", key).split(), cwd=tmp_path)
    assert done.returncode == 0, done
    (secret,) = re.findall(r"^    kubectl create secret (.*)$", text, re.MULTILINE)
    files = {tmp_path / name for name in re.findall(r"--from-file=(\S+)", secret)}
    assert files == set((tmp_path / "keys").iterdir())
    (install,) = re.findall(r"^    helm install (.*)$", text, re.MULTILINE)
    release, chart, *options = install.split()
    made = helm("template", release, TOP / chart, *options)
    assert made.returncode == 0, made.stderr
    assert KEYS["secretName"] in secret
    assert f"secretName: {KEYS['secretName']}" in made.stdout


@pytest.mark.parametrize("budget", ["8GiB", "8G", "1.5TiB", "12345", "8k", "8Gi", "x", "8KB"])
def test_the_schema_takes_the_budgets_that_a_daemon_takes(budget: str) -> None:
    checked = kvferry("config", "check", env={"KVFERRY_BUDGET_BYTES": budget})
    schema = {**SCHEMA, "required": []}
    assert jsonschema.Draft202012Validator(schema).is_valid({"budgetBytes": budget}) == (
        checked.returncode == 0
    )


def test_the_schema_knows_every_setting_but_those_that_the_chart_sets() -> None:
    template = (CHART / "templates" / "_helpers.tpl").read_text()
    by_chart = {name for name in Config.model_fields if f"KVFERRY_{name.upper()}" in template}
    assert set(SCHEMA["properties"]["config"]["properties"]) == set(Config.model_fields) - by_chart


def test_the_defaults_are_of_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(yaml.safe_load((CHART / "values.yaml").read_text()), SCHEMA)


def test_the_chart_is_of_the_projects_version() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["version"]
