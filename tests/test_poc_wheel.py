"""What is installed: the wheel has every file of the package, and a proof of concept finds its own ones there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LOOK = """
from pathlib import Path

import poc_example

import anchorkv
from anchorkv import samples, shipped
from anchorkv.poc import shapes, suitability
from anchorkv.poc.report.html import render

for lang in ("en", "ja"):
    assert len(render(poc_example.report(lang))) > 100_000
assert suitability.packaged().kinds > 2
assert len(list(samples.folder().rglob("*.txt"))) > 3 and samples.questions().is_file()
assert shapes.known() and any(shipped.FOLDER.rglob("*.safetensors"))
print(Path(anchorkv.__file__).parent)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from: a build leaves something behind."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "anchorkv", source / "anchorkv", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def unpacked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content."""
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check", "-w", out, source],
        capture_output=True, text=True, check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("anchorkv-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel(source: Path, unpacked: Path) -> None:
    def files(root: Path) -> dict[str, bytes]:
        return {
            path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "anchorkv").rglob("*")
            if path.is_file()
        }

    here, there = files(source), files(unpacked)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


@pytest.mark.slow
def test_samples_fit_words_and_templates_are_found_where_they_are_installed(unpacked: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _LOOK], capture_output=True, text=True, check=False, cwd=unpacked,
        env={"PYTHONPATH": f"{unpacked}:{ROOT / 'tests'}", "PATH": ""},
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == unpacked / "anchorkv"
