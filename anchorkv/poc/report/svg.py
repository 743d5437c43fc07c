"""From a matplotlib figure to SVG that belongs to a page: its colours are the theme's, its text the page's own.

matplotlib knows neither the reader's fonts nor dark mode. So it draws shapes and numbers; texts of a user stand in for
themselves as `label(0)`, `label(1)` … and are put in here, and every colour becomes a class of the page's style.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1d2127", "soft": "#5c6370", "line": "#dcd9d1", "good": "#e3f1e4", "full": "#4b5563", "off": "#c05621",
    "auto": "#1a56c4", "on": "#2b8a3e",
}
"""Names of the theme's colours; the style says what each is, in light and in dark."""

_CLASSES = {colour: name for name, colour in COLOURS.items()}
_KEPT = {
    "fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap", "stroke-linejoin",
    "opacity", "fill-opacity", "stroke-opacity", "text-anchor", "font-size", "font-weight",
}
_SETTINGS = {
    "svg.fonttype": "none", "font.size": 12, "axes.edgecolor": COLOURS["soft"], "axes.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["soft"], "ytick.color": COLOURS["soft"], "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"], "grid.color": COLOURS["line"], "text.color": COLOURS["ink"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none", "lines.linewidth": 2.5, "lines.markersize": 8,
}


def label(number: int) -> str:
    """What stands in for the text `number` while matplotlib draws."""
    return f"LABEL-{number}"


def svg(figure: Figure, name: str, title: str, description: str, labels: Sequence[str] = ()) -> Markup:
    """`figure` as inline SVG with a name and a description for who cannot see it. name: unique in the page."""
    buffer = io.StringIO()
    with rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        _tidy(element, name)
        if element.tag == "text" and (found := re.fullmatch(r"LABEL-(\d+)", element.text or "")):
            element.text = labels[int(found[1])]
    for unwanted in ("width", "height", "version"):
        root.attrib.pop(unwanted, None)
    root.attrib.update({"class": "plot", "role": "img", "aria-labelledby": f"{name}-title {name}-desc"})
    for at, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(at, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many CSS pixels, to be drawn into within the context."""
    with rc_context(_SETTINGS):
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def _tidy(element: ElementTree.Element, name: str) -> None:
    """No namespaces, no ids that two pictures could share, no style attributes: the page's policy forbids them."""
    element.tag = element.tag.split("}")[-1]
    attributes = {key.split("}")[-1]: value for key, value in element.attrib.items()}
    for part in attributes.pop("style", "").split(";"):
        key, _, value = part.partition(":")
        if key.strip() in _KEPT:
            attributes[key.strip()] = value.strip().removesuffix("px")
    classes = []
    for key, prefix in (("fill", "f"), ("stroke", "s")):
        if colour := _CLASSES.get(attributes.get(key, "")):
            classes.append(f"{prefix}-{colour}")
            del attributes[key]
    if classes:
        attributes["class"] = " ".join(classes)
    if "id" in attributes and element.tag == "g":
        del attributes["id"]
    for key in ("id", "href", "clip-path"):
        if key in attributes:
            attributes[key] = re.sub(r"^(url\(#|#)?", rf"\1{name}-", attributes[key])
    element.attrib.clear()
    element.attrib.update(attributes)
