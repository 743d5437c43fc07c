"""Settings: where they come from, which goes before which, and one sentence for what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from anchorkv.config import AnchorConfig, preset
from anchorkv.errors import ConfigError
from anchorkv.poc.results import Thresholds
from anchorkv.poc.rollout import Rollout, Step
from anchorkv.poc.rules import watch
from anchorkv.serve.audit.store import default_database
from anchorkv.serve.keys import KeyFile, make_key
from anchorkv.serve.settings import ENVIRONMENT, LOOPBACK_HOSTS, ServeSettings
from anchorkv.serve.settings_groups import OPERATOR

PASSWORD = "hunter2"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    with KeyFile(path).changing(create=True) as found:
        key, _ = make_key("bank")
        found[key.id] = key
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default data folder, an empty one."""
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / "home" / name)
    return tmp_path / "home" / "anchorkv"


def load(path: Path | None = None, text: str | None = None, /, **given: Any) -> ServeSettings:
    if path is not None and text is not None:
        path.write_text(text)
    return ServeSettings.load(path, {name.replace("__", "."): value for name, value in given.items()}, {})


def wrong(path: Path, text: str, **given: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, text, **given)
    said = str(error.value)
    assert "\n" not in said
    assert said[-1] in ".?"
    return said


def test_defaults(home: Path) -> None:
    found = load()
    assert (found.host, found.port, found.audit.text, found.watch.share) == ("127.0.0.1", 8080, False, 0.02)
    assert found.keys_file is None
    assert found.hosts == LOOPBACK_HOSTS
    assert found.audit_database == str(default_database()) == str(home / "audit.db")
    assert found.documents_folder == home / "documents"
    assert found.chosen_policy() is None
    assert found.limits.requests_per_minute is None
    assert found.bounds.reductions == (2, 32)


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(file: Path) -> None:
    file.write_text("data: here\nport: 1\naudit: {database: one.db, text: true}\nwatch: {share: 0.1}\n")
    environment = {"ANCHORKV_DATA": "/there", "ANCHORKV_AUDIT_DATABASE": "two.db", "ANCHORKV_KEYS": ""}
    found = ServeSettings.load(file, {"audit.database": "three.db", "port": 2, "watch.share": None}, environment)
    assert (found.audit_database, found.audit.text, found.port) == ("three.db", True, 2)
    assert found.data == Path("/there")
    assert found.watch.share == 0.1
    assert ServeSettings.load(file, {}, environment).audit_database == "two.db"
    assert ServeSettings.load(file, {}, {}).data == file.parent / "here"


def test_the_processes_own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANCHORKV_DATA", str(tmp_path / "env"))
    assert ServeSettings.load().data == tmp_path / "env"


def test_no_variable_is_one_that_kubernetes_sets() -> None:
    """It sets these for a service called anchorkv, to addresses such as tcp://10.0.0.1:80."""
    assert not {name for name in ENVIRONMENT if name in ("ANCHORKV_PORT", "ANCHORKV_HOST")
                or name.startswith(("ANCHORKV_SERVICE_", "ANCHORKV_PORT_"))}


def test_paths_of_a_file_are_relative_to_it(file: Path, monkeypatch: pytest.MonkeyPatch, keys: Path) -> None:
    (file.parent / "model.gguf").touch()
    (file.parent / "policy.json").write_text(preset("default").to_json())
    found = load(file, "keys: keys.json\nmodel: model.gguf\npolicy: policy.json\ncanary: {file: questions.csv}\n")
    assert found.keys_file == keys
    assert found.model == str(file.parent / "model.gguf")
    assert found.canary.file == file.parent / "questions.csv"
    assert found.chosen_policy() == preset("default")
    other = load(file, "model: owner/model\npolicy: default\n", data="elsewhere")
    assert (other.model, other.policy, other.data) == ("owner/model", "default", Path("elsewhere"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "anchors.example.com"])
def test_other_machines_need_keys(host: str, keys: Path, home: Path) -> None:
    with pytest.raises(ConfigError, match="without API keys; make some with `anchorkv keys add TENANT`"):
        load(host=host)
    assert load(host=host, keys=keys).hosts == ("*",)
    home.mkdir(parents=True)
    keys.rename(home / "keys.json")
    assert load(host=host).keys_file == home / "keys.json"


def test_memory(file: Path) -> None:
    assert load(cells=1000).cells_of(10) == 1000
    assert load(kv_bytes="1MiB").cells_of(1024) == 1024
    assert load().cells_of(2**10) == 2**20
    with pytest.raises(ConfigError, match=r"holds 1 KV cells of this model .* give at least 257MiB"):
        load(kv_bytes="2MiB").cells_of(2**20 + 1)
    assert "not both" in wrong(file, "cells: 1000\nkv_bytes: 1GiB")
    assert load(file, "kv_bytes: 1GiB", cells=512).cells_of(1) == 512  # the command line goes before the file
    with pytest.raises(ConfigError, match="not both"):
        load(cells=512, kv_bytes="1GiB")


def test_tenants(file: Path, keys: Path) -> None:
    found = load(file, "keys: keys.json\nlimits: {concurrent: 2, document_bytes: 1MiB}\n"
                 "tenants: {bank: {concurrent: 9}}")
    assert found.tenants["bank"].over(found.limits).document_bytes == 2**20
    assert "no tenant but 'local'" in wrong(file, "tenants: {bank: {concurrent: 9}}")
    assert load(file, "tenants: {local: {concurrent: 9}}").tenants["local"].concurrent == 9


def test_words_that_yaml_takes_for_others(file: Path) -> None:
    assert load(file, "bounds: {recall: [off, on]}").bounds.recall == ("off", "on")


def test_rules(file: Path) -> None:
    found = load(file, "fallback: {rules: [{when: 'features.tables > 0.2', then: recall}]}")
    assert (found.fallback.rules[0].because, found.fallback.rules[0].then) == (OPERATOR, "recall")


def test_policies(file: Path, tmp_path: Path) -> None:
    plan = Rollout(
        anchorkv_version="0", created="now", model="m", fingerprint="f", verdict="adopt", policy="default",
        recall="auto", policies={"default": AnchorConfig()}, areas={}, watch=watch(None, Thresholds()),
        ladder=(Step(policy="default", recall="auto"),), rules=(),
    )
    plan.save(tmp_path / "rollout.yaml")
    assert load(file, "policy: rollout.yaml").chosen_policy() == plan
    assert load(policy="sepllm").chosen_policy() == preset("sepllm")
    assert load(policy="default:reduction=24").chosen_policy() == preset("default").replace(reduction=24)
    unknown = ("nothing", "no policy 'nothing'.*rollout.yaml")
    for name, said in (unknown, ("none.yaml", "cannot be read"), ("none.json", "cannot be")):
        with pytest.raises(ConfigError, match=said):
            load(policy=name).chosen_policy()


# --- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "said"), [
    ("prot: 1", "There is no setting 'prot'; did you mean 'port'?"),
    ("watch: {sahre: 1}", "'watch.sahre'; did you mean 'share'?"),
    ("tenants: {local: {concurent: 1}}", "did you mean 'concurrent'?"),
    ("zzz: 1", "those there are: model, "),
    ("port: 99999", "'port' cannot be 99999"), ("lang: de", "'lang' cannot be 'de'"), ("watch: 3", "group of settings"),
    ("watch: {share: 0.5}", "most_share (0.25) is below share (0.5)"), ("watch: {share: .nan}", "finite"),
    ("bounds: {smallest_reduction: 40}", "smallest_reduction (40) is above largest_reduction (32)"),
    ("bounds: {smallest_reduction: null}", "give both"), ("bounds: {recall: []}", "'bounds.recall'"),
    ("bounds: {recall: [maybe]}", "'maybe'"), ("bounds: {policies: [none-such]}", "there is no preset 'none-such'"),
    ("requests: {tokens: 100}", "an answer may have 4096 tokens"), ("requests: {max_tokens: 100}", "default_tokens"),
    ("fallback: {rules: [{when: x, then: full}]}", "is no condition of a rule"),
    ("fallback: {rules: [{when: 'tokens < 9', then: fly}]}", "'fly'"),
    ("fallback: {enabled: false, dry_run: true}", "dry_run needs"), ("max_sessions: 500", "'max_sessions' cannot be"),
    ("tenants: {'*': {}}", "belongs under limits"), ("tenants: {'a/b': {}}", "No tenant can be called 'a/b'"),
    ("allowed_hosts: ['http://x']", "without http://"), ("kv_bytes: much", "'kv_bytes' cannot be 'much'"),
    ("audit: {retention_days: 0}", "retention_days"), ("cells: 3", "'cells' cannot be 3"),
    ("- 1", "holds no settings"), ("{", "is not YAML"), ("1: 2", "holds no settings"), ("a: !!x y", "not YAML"),
])
def test_one_sentence(file: Path, text: str, said: str) -> None:
    found = wrong(file, text)
    assert said in found
    assert str(file) in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    for name, said in (("none.yaml", "no settings at"), ("binary.yaml", "not UTF-8"), (".", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / name)


def test_a_group_that_is_none_is_told_where_the_command_line_sets_it(file: Path) -> None:
    assert "write it as a group" in wrong(file, "audit: 3", audit__text=True)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["share", "rules", "recall", "database", "local", "concurrent", "bytes", "x"]), inner,
        max_size=3),
), st.sampled_from(sorted(ServeSettings.model_fields)))
def test_no_value_gives_more_than_a_sentence(value: Any, name: str) -> None:
    said = ""
    try:
        ServeSettings.load(None, {name: value}, {})
    except ConfigError as error:  # and nothing else
        said = str(error)
    assert "\n" not in said


# --- secrets and the written file ----------------------------------------------------------------------------------


def test_the_databases_password_is_never_shown(file: Path) -> None:
    url = f"postgresql://me:{PASSWORD}@host/db"
    found = ServeSettings.load(None, {}, {"ANCHORKV_AUDIT_DATABASE": url})
    assert found.audit_database == url
    for shown in (repr(found), str(found), found.to_yaml(), str(found.model_dump()), found.model_dump_json()):
        assert PASSWORD not in shown
    for text in (f"audit: '{url}'", f"audit: {{database: ['{url}']}}", f"audit: {{database: '{url}', x: 1}}"):
        assert PASSWORD not in wrong(file, text)
    assert "31337" not in wrong(file, "audit: {database: 31337}")  # a password may be a number


def test_what_is_written_is_read_again(file: Path, keys: Path) -> None:
    text = """
        keys: keys.json
        kv_bytes: 3GiB
        policy: default
        bounds: {recall: [off], smallest_reduction: null, largest_reduction: null}
        tenants: {bank: {concurrent: 3, document_bytes: 1000}}
        fallback: {rules: [{when: 'area == "法律"', then: full}], least_logprob: -1.5}
        canary: {file: q.csv}
    """
    found = load(file, text)
    written = found.to_yaml()
    assert load(file, written) == found
    assert "kv_bytes: 3GiB" in written
    lines = written.splitlines()
    assert "`anchorkv serve --config FILE`" in lines[0]
    for name, field in ServeSettings.model_fields.items():
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert lines[at - 1].startswith("# ") or not field.description
    assert yaml.safe_load(written)["requests"]["bytes"] == "8MiB"


def test_no_torch_and_no_database_on_this_path() -> None:
    code = (
        "import sys; import anchorkv.serve.settings, anchorkv.cli.keys; "
        "print([name for name in ('torch', 'transformers', 'sqlalchemy', 'fastapi') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
