"""What Prometheus and Grafana ask for is there: every metric and label of every query."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from http_daemon import metrics_of
from live import LAYOUT, LiveDaemon, RawWorker

TOP = Path(__file__).parent.parent.parent
RULES = TOP / "deploy" / "prometheus" / "kvferry.rules.yaml"
CASES = RULES.with_name("kvferry.test.yaml")
DASHBOARD = TOP / "deploy" / "grafana" / "kvferry.json"
PAGE = (TOP / "docs" / "operations.md").read_text()
NAME = re.compile(r"\bkvferry_\w+|\bup(?={)")
SELECTOR = re.compile(r"\b(kvferry_\w+|up)\{([^}]*)\}")
MATCH = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
OUTSIDE = {"instance"}  # labels that Prometheus adds
UP = {"job": "kvferry"}  # of the series that Prometheus makes of each target
SOME = [{"labels": "{}", "value": 1}]  # of a count: there is at least one
THRESHOLD = re.compile(r" (?:>|<|==) [\d.]+")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def queries() -> list[str]:
    """Of alerts and panels, and of the dashboard's variables."""
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return asked + [rule["expr"] for rule in rules()]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """The labels of every sample of a daemon with a pool, by its name."""
    directory = tmp_path_factory.mktemp("deploy") / "a"
    found: dict[str, list[dict[str, str]]] = {"up": [UP]}
    with LiveDaemon(directory, http_port=0) as daemon, RawWorker(daemon.directory, LAYOUT):
        for family in text_string_to_metric_families(metrics_of(daemon)):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_there_is(
    query: str, metrics: dict[str, list[dict[str, str]]]
) -> None:
    names = NAME.findall(query)
    assert names
    assert set(names) <= set(metrics)
    for name, matchers in SELECTOR.findall(query):
        for label, how, value in MATCH.findall(matchers):
            if label not in OUTSIDE:
                values = {labels[label] for labels in metrics[name]}
                wanted = value.split("|") if how in ("=~", "!~") else [value]
                assert set(wanted) <= values, (name, label, value)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    alerts = [rule["alert"] for rule in rules()]
    assert re.findall(r"^### (Kvferry\w+)$", PAGE, re.MULTILINE) == alerts
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_alert_is_seen_to_fire() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    tests = [one for case in cases for one in case["alert_rule_test"]]
    assert {one["alertname"] for one in tests if one["exp_alerts"]} == {
        rule["alert"] for rule in rules()
    }


def test_the_chart_names_the_job_as_the_rules_do() -> None:
    made = yaml.safe_load_all((TOP / "deploy" / "kubernetes" / "daemonset.yaml").read_text())
    objects = {one["kind"]: one for one in made}
    label = objects["PodMonitor"]["spec"]["jobLabel"]
    pod = objects["DaemonSet"]["spec"]["template"]["metadata"]
    assert pod["labels"][label] == UP["job"]


def test_every_metric_is_documented(metrics: dict[str, list[dict[str, str]]]) -> None:
    told = set()
    for line in PAGE.splitlines():
        names = re.findall(r"`(\w+)`", line.split("|")[1]) if line.startswith("| `kvferry_") else []
        stem = names[0].removesuffix("_opened_total") if names else ""
        told |= {name if name.startswith("kvferry_") else stem + name for name in names}
    histograms = {"_bucket", "_count", "_sum", "_created"}
    there = {name for name in metrics if not any(name.endswith(end) for end in histograms)}
    assert there - {"up"} <= told
    assert {name for name in told if name not in metrics} == {
        "kvferry_chunk_seconds",
        "kvferry_loop_turn_seconds",
        "kvferry_transfer_seconds",
    }


@needs_promtool
def test_promtool_finds_the_rules_good_and_sees_alerts_fire() -> None:
    promtool("check", "rules", RULES)
    promtool("test", "rules", CASES)


@needs_promtool
def test_what_a_query_brings_together_has_the_same_labels(
    metrics: dict[str, list[dict[str, str]]], tmp_path: Path
) -> None:
    """Of a division whose sides have no labels in common nothing is left, whatever the numbers."""
    asked = [query for query in queries() if not query.startswith("label_values")]
    seen = [
        {"expr": f"count({plain(query)}) > bool 0", "eval_time": "20m", "exp_samples": SOME}
        for query in asked
    ]
    series = [
        {"series": name + labelled({**labels, "instance": "a"}), "values": "0+1x20"}
        for name, samples in metrics.items()
        for labels in samples
    ]
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": seen}]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"tests": tests}))
    promtool("test", "rules", tmp_path / "all.yaml")


def plain(query: str) -> str:
    """Without thresholds and Grafana's variables."""
    query = query.replace("$instance", ".*").replace("$__rate_interval", "5m")
    return THRESHOLD.sub("", query)


def labelled(labels: dict[str, str]) -> str:
    return "{" + ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items()) + "}"


def promtool(*args: object) -> None:
    """Run it; what it finds is a failure."""
    done = subprocess.run(
        ["promtool", *map(str, args)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
