"""A figure as an SVG element that stands in a page beside others: small, in names of its own, described in words."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from bgcbench.plots.style import styled

_COORDINATE = re.compile(r"-?\d+\.\d{3,}")  # in points, to more than anybody sees
_REFERENCE = re.compile(r"(?:(?<=url\(#)|(?<=^#))[^)]+")


def inline_svg(figure: Figure, prefix: str, metadata: dict[str, Any]) -> str:
    """``figure`` as an ``<svg>`` for HTML, with :func:`described` as its alternative text.

    Its ids and classes begin with ``prefix``. Texts are texts, whose font the page gives: outlines are twice the size.
    """
    image = io.BytesIO()
    with styled(), matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(image, format="svg", metadata=metadata)
    root = ElementTree.fromstring(image.getvalue())  # which drops comments and the document type
    used = {
        found for element in root.iter() for value in element.attrib.values() for found in _REFERENCE.findall(value)
    }
    short: dict[str, str] = {}  # of an id or a style

    def name_of(long: str) -> str:
        return short.setdefault(long, f"{prefix}-{len(short)}")

    styles = {}
    for element in root.iter():
        element.tag = _local(element.tag)  # HTML knows SVG without namespaces
        attributes = {_local(name): value for name, value in element.attrib.items() if name != "id" or value in used}
        for name, value in attributes.items():
            if name in ("d", "x", "y"):
                attributes[name] = _COORDINATE.sub(lambda found: f"{float(found[0]):.2f}", " ".join(value.split()))
            elif name == "id":
                attributes[name] = name_of(value)
            else:
                attributes[name] = _REFERENCE.sub(lambda found: name_of(found[0]), value)
        if style := attributes.pop("style", None):
            attributes["class"] = styles[style] = name_of(style)
        element.attrib = attributes
        element.text, element.tail = ((text or "").strip() for text in (element.text, element.tail))
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)  # its one style, of joins and caps, is every picture's: page.css has it
    ElementTree.SubElement(root, "style").text = "".join(f".{name}{{{style}}}" for style, name in styles.items())
    root.set("role", "img")
    root.set("aria-label", described(figure))
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def described(figure: Figure) -> str:
    """What a figure shows, in words: its titles, its panels, its axes, and what its legend names."""
    panels = [figure, *figure.subfigs]
    titles = [line for panel in panels for line in panel.get_suptitle().splitlines()]
    axes = [name for each in figure.axes for name in (each.get_xlabel(), each.get_ylabel())]
    legends = [text.get_text() for panel in panels for box in panel.legends for text in box.get_texts()]
    shown = {"": titles, "Panels: ": [each.get_title() for each in figure.axes], "Axes: ": axes, "Legend: ": legends}
    return " ".join(f"{what}{text}." for what, texts in shown.items() if (text := _joined(texts)))


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text.strip()))
