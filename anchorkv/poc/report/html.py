"""report.json as one page, report.html: everything inside, nothing from any other place, every text escaped.

The page's policy (Content-Security-Policy) allows its own style and scripts by their hashes and nothing else, so that a
document with a script in it could not run it even if it were taken for HTML.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from anchorkv.errors import SavedStateError
from anchorkv.poc.report.pictures import pictures
from anchorkv.poc.report.place import Place
from anchorkv.poc.report.shown import Shown
from anchorkv.poc.report.words import Words
from anchorkv.poc.results import PocReport
from anchorkv.poc.rollout import rollout

STYLES = ("report.css", "calculator.css")
SCRIPTS = ("report.js", "calculator.js")


def write(report: PocReport, out: Path) -> Path:
    """The page of `report` as the file `out`. Raises SavedStateError when it cannot be written."""
    page = render(report)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise SavedStateError(
            f"{out} cannot be written ({error.strerror}); free some space or choose another --out."
        ) from None
    return out


def render(report: PocReport, words: Words | None = None) -> str:
    """The page. words: those of the report's language unless others are given."""
    w = words or Words(report.lang)
    place = Place(report.model_dump(mode="json"))
    style = Markup("\n".join(map(_source, STYLES)))
    scripts = [Markup(_source(name)) for name in SCRIPTS]
    environment = Environment(
        loader=PackageLoader("anchorkv.poc.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        report=place, w=w, rollout=Place(rollout(report).model_dump(mode="json"), "rollout.yaml#"),
        pictures=pictures(place, w), capacity=report.capacity.model_dump(mode="json"), **Shown(place, w).names(),
    )
    return environment.get_template("templates/report.html.j2").render(
        style=style, scripts=scripts, policy=_policy(style, scripts)
    )


def _source(name: str) -> str:
    return files("anchorkv.poc.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, scripts: Sequence[str]) -> str:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {hashed(style)}; script-src {' '.join(map(hashed, scripts))}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
