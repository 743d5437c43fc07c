"""What lies in deploy/ and what docs/operations.md says: metrics, commands, options and settings that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
import typer.main
import yaml
from fake_engine import FakeEngine

from anchorkv.cli import app
from anchorkv.serve.metrics import Metrics
from anchorkv.serve.safeguard import Safeguard
from anchorkv.serve.settings import ServeSettings
from anchorkv.serve.settings_groups import CanarySettings, FallbackSettings, WatchSettings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY, DOCS = ROOT / "deploy", ROOT / "docs"
MANUALS = (DOCS / "operations.md", DOCS / "operations.ja.md")
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
_METRIC = re.compile(r"\banchorkv:[a-z0-9_]+|\bprocess_[a-z_]+")
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Every metric that a server can tell, and the labels that it may have."""
    served = serving.service(tmp_path_factory.mktemp("served"), FakeEngine())
    guard = Safeguard.of(served.scheduler, served.policies, WatchSettings(), FallbackSettings(), CanarySettings())
    metrics = Metrics(served, safeguard=guard)
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        known = set(getattr(family, "_labelnames", ())) | {name for s in family.samples for name in s.labels}
        for suffix in _SUFFIXES[family.type]:
            found[family.name + suffix] = known | {"instance", "job"}
    for metric in metrics.registry._names_to_collectors.values():  # those without samples yet
        for suffix in ("", *_SUFFIXES["counter"], *_SUFFIXES["histogram"]):
            if (name := f"{getattr(metric, '_name', '')}{suffix}") in found:
                found[name] |= set(getattr(metric, "_labelnames", ()))
    yield found
    served.scheduler.stop(False)
    served.trail.close()


def check_expression(expression: str, labels: dict[str, set[str]]) -> None:
    names = _METRIC.findall(expression)
    assert names, f"no metric in: {expression}"
    for name in names:
        assert name in labels, f"there is no metric {name}, in: {expression}"
    for name, selector in re.findall(r"(\banchorkv:[a-z0-9_]+)\{([^}]*)\}", expression):
        used = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector))
        assert used <= labels[name], f"{name} has no label {used - labels[name]}"
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        known = set.union(*(labels[name] for name in names)) | {"le"}
        assert {part.strip() for part in grouped.split(",")} <= known, expression


# --- alert rules ---------------------------------------------------------------------------------------------------


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def test_alert_rules_ask_for_metrics_and_labels_that_exist(labels: dict[str, set[str]]) -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) > 12
    for rule in found:
        if rule["alert"] != "AnchorkvDown":
            check_expression(rule["expr"], labels)
        assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: path.name)
def test_every_alert_is_in_the_manual_and_leads_to_a_part_of_it(manual: Path) -> None:
    text = manual.read_text(encoding="utf-8")
    headings = set(re.findall(r"^#+ (.*)$", MANUALS[0].read_text(encoding="utf-8"), re.MULTILINE))
    for rule in rules():
        assert rule["alert"] in text, rule["alert"]
        assert rule["annotations"]["runbook"].removeprefix("docs/operations.md: ") in headings


def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    return found


def test_promtool_takes_the_rules_and_they_fire_when_they_should() -> None:
    for arguments in (
        ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ):
        done = subprocess.run([promtool(), *arguments], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_server_tells_is_what_prometheus_takes(tmp_path: Path) -> None:
    served = serving.service(tmp_path, FakeEngine())
    try:
        done = subprocess.run(
            [promtool(), "check", "metrics"], input=Metrics(served).text(), capture_output=True, check=False
        )
        # Its style guide (exit code 3) has no colons in names; vLLM's and llama.cpp's have them.
        complaints = [line for line in done.stderr.decode().splitlines() if "should not contain ':'" not in line]
        assert done.returncode in (0, 3), complaints
    finally:
        served.scheduler.stop(False)
        served.trail.close()


# --- dashboard -----------------------------------------------------------------------------------------------------


def test_the_dashboard_shows_metrics_that_exist_and_panels_do_not_overlap(labels: dict[str, set[str]]) -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        spots = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert not spots & taken, panel["title"]
        assert max(x for x, _ in spots) < 24
        taken |= spots
        for target in panel.get("targets", ()):
            check_expression(target["expr"].replace("$__rate_interval", "5m"), labels)
    used = {name for panel in panels for t in panel.get("targets", ()) for name in _METRIC.findall(t["expr"])}
    used |= {name for rule in rules() for name in _METRIC.findall(rule["expr"])}
    unused = {name for name in labels if name.startswith("anchorkv:") and name not in used}
    unused = {name for name in unused if not name.endswith(("_sum", "_count", "_bucket"))}
    assert unused <= {
        "anchorkv:server_info", "anchorkv:draining", "anchorkv:num_requests_running", "anchorkv:breaker_state",
        "anchorkv:answer_tokens_total", "anchorkv:request_recalled_segments_total", "anchorkv:prompt_seconds_total",
        "anchorkv:breaker_transitions_total", "anchorkv:canary_runs_total", "anchorkv:watch_checks",
    }, f"nobody would see: {unused}"


# --- command lines -------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> None:
    """As the command line takes them, without doing it."""
    command: Any = typer.main.get_command(app)
    path, rest = "anchorkv", list(words)
    try:
        while True:
            context = command.make_context(path, rest)
            if not hasattr(command, "commands"):
                return
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            path = f"{path} {name}"
    except Exception as error:
        said = error.format_message() if hasattr(error, "format_message") else repr(error)
        raise AssertionError(f"anchorkv {shlex.join(words)}: {said}") from None


def blocks(path: Path, kind: str = r"\w*") -> list[str]:
    """The manual's code, without the indentation of the list that it stands in."""
    found = re.findall(rf"^ *```{kind}\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def commands(path: Path) -> Iterator[list[str]]:
    """What follows `anchorkv` in the manual's shell lines."""
    for line in "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines():
        for words in _simple(shlex.split(line, comments=True)):
            if words[:2] == ["podman", "run"]:
                words = words[len(words) - words[::-1].index("anchorkv") - 1 :]  # noqa: PLW2901
            if words[:1] == ["anchorkv"] and len(words) > 1:
                yield words[1:]


def _simple(words: list[str]) -> Iterator[list[str]]:
    """The simple commands of a line, without sudo."""
    found: list[str] = []
    for word in [*words, ";"]:
        if word in ("|", "&&", "||", ";"):
            yield re.sub(r"^sudo (-u \S+ )?", "", " ".join(found)).split(" ") if found[:1] == ["sudo"] else found
            found = []
        else:
            found.append(word)


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: path.name)
def test_every_command_line_of_the_manual_parses(manual: Path) -> None:
    found = list(commands(manual))
    assert {words[0] for words in found} == {"serve", "keys", "audit", "capacity", "poc"}
    assert len(found) > 15
    for words in found:
        parse(words)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for words in (["audit", "verfy"], ["audit", "verify", "--haed", "1:2"], ["nothing"], ["audit", "list", "-n", "0"]):
        with pytest.raises(AssertionError, match="anchorkv"):
            parse(words)


def test_both_manuals_give_the_same_commands_and_headings() -> None:
    english, japanese = ([re.sub(r" *# .*", "", block) for block in blocks(path)] for path in MANUALS)
    assert english == japanese
    levels = [re.findall(r"^(#+) ", path.read_text(encoding="utf-8"), re.MULTILINE) for path in MANUALS]
    assert levels[0] == levels[1]


def test_the_manuals_settings_exist(tmp_path: Path) -> None:
    for manual in MANUALS:
        for number, block in enumerate(blocks(manual, "yaml")):
            (path := tmp_path / f"{manual.stem}-{number}.yaml").write_text(block, encoding="utf-8")
            keys = tmp_path / "keys.json"
            serving.keys(tmp_path, ("ACME", "user"))
            ServeSettings.load(path, {"keys": str(keys)}, {})


def test_the_containers_command_line_parses() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    instructions = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    entry, command = (json.loads(re.findall(rf"^{name} (\[.*\])$", instructions, re.MULTILINE)[-1])
                      for name in ("ENTRYPOINT", "CMD"))
    assert entry == ["anchorkv"]
    parse(command)
    for line in re.findall(r"^#   (?:podman|docker) run .* anchorkv (keys .*?)(?:  #|$)", text, re.MULTILINE):
        parse(shlex.split(line))
    assert "/health/live" in text
    assert re.search(r"^USER 10001", instructions, re.MULTILINE)
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", instructions, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source


def test_the_systemd_unit(tmp_path: Path) -> None:
    unit = DEPLOY / "anchorkv.service"
    line = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)[0]
    parse(shlex.split(line)[1:])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    there = unit.read_text().replace("/opt/anchorkv/bin/anchorkv", "/bin/true")
    (copy := tmp_path / "anchorkv.service").write_text(there)
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if "anchorkv" in line]
    assert done.returncode == 0, done.stderr
    assert not told, told


# --- Kubernetes ----------------------------------------------------------------------------------------------------


def test_the_manifest_runs_the_command_with_settings_that_exist(tmp_path: Path) -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    spec = parts["StatefulSet"]["spec"]["template"]["spec"]
    container = spec["containers"][0]
    parse(container["args"])
    path = container["args"][container["args"].index("--config") + 1]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert path in mounts
    given = yaml.safe_load(parts["ConfigMap"]["data"]["config.yaml"])
    assert Path(given["keys"]).parent.as_posix() in mounts
    assert given["data"] in mounts
    volumes = {v["name"] for v in spec["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in parts["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for mount in mounts.values()} == volumes
    serving.keys(tmp_path, ("ACME", "user"))
    (settings := tmp_path / "config.yaml").write_text(yaml.safe_dump({**given, "keys": str(tmp_path / "keys.json")}))
    loaded = ServeSettings.load(settings, {}, {})
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > loaded.drain_seconds + pause + 5
    assert container["ports"][0]["containerPort"] == loaded.port
    for probe, place in (("livenessProbe", "/health/live"), ("readinessProbe", "/health/ready")):
        assert container[probe]["httpGet"] == {"path": place, "port": "http"}
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    selector = parts["StatefulSet"]["spec"]["selector"]["matchLabels"]
    assert selector.items() <= parts["StatefulSet"]["spec"]["template"]["metadata"]["labels"].items()
    assert parts["Service"]["spec"]["selector"] == selector


def test_paths_that_deployments_ask_for_answer(tmp_path: Path) -> None:
    served = serving.service(tmp_path, FakeEngine())
    served.metrics = Metrics(served)

    async def work() -> None:
        async with serving.client(served) as http:
            for path in ("/health/live", "/health/ready", "/metrics"):
                assert (await http.get(path)).status_code == 200, path

    serving.run(work())
