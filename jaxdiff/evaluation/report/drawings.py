"""The graphics of a report's page: bars with whiskers, as SVG, and thumbnails.

Sizes are attributes, not styles, so that the page's content security policy can forbid inline
styles.
"""

import base64
import io
from collections.abc import Callable
from html import escape

from PIL import Image

from jaxdiff.images import image_files

THUMBNAIL_PX = 128  # the longer side; smaller images are not resized
LARGEST_PIXELS = 64_000_000  # larger images are not decoded
COLORS = 6  # run colors in report.css


def bar(mean: dict, full: float, number: int) -> str:
    """Draws a bar from 0 to the mean, with its interval as whiskers; `full` fills the width."""
    if mean["value"] is None or not full:
        return ""
    return _svg(
        '<rect class="track" width="100%" height="16" rx="3"/>'
        f'<rect class="mean" width="{_percent(mean["value"] / full)}" height="16" rx="3"/>'
        + _whiskers(mean, lambda value: _percent(value / full)),
        number,
    )


def change_bar(change: dict, full: float, number: int) -> str:
    """Draws a bar from 0, the middle, to the difference; pale if the interval contains 0."""
    if change["value"] is None:
        return ""

    def place(value: float) -> float:
        return 0.5 + 0.5 * value / full if full else 0.5

    begin, end = sorted((0.5, place(change["value"])))
    sure = change["low"] is not None and (change["low"] > 0 or change["high"] < 0)
    return _svg(
        '<rect class="track" width="100%" height="16" rx="3"/>'
        f'<rect class="mean{"" if sure else " unsure"}" x="{_percent(begin)}"'
        f' width="{_percent(end - begin)}" height="16"/>'
        '<line class="zero" x1="50%" x2="50%" y1="-3" y2="19"/>'
        + _whiskers(change, lambda value: _percent(place(value))),
        number,
    )


def thumbnail(file: bytes | None, description: str) -> str:
    """Returns an <img> of at most THUMBNAIL_PX with a data: URI, or why there is none."""
    if file is None:
        return '<div class="none">not generated</div>'
    try:
        with Image.open(io.BytesIO(file), formats=tuple(image_files.SAVE)) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise ValueError("too large")
            small = max(image.size) <= THUMBNAIL_PX
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2.0)
            written = io.BytesIO()
            image.convert("RGB").save(written, "webp", lossless=small, quality=85)
    except Exception:  # Pillow's plugins raise errors of many kinds
        return '<div class="none">unreadable</div>'
    return (
        f'<img class="{"pixels" if small else ""}" alt="{escape(description)}"'
        f' title="{escape(description)}"'
        f' src="data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}">'
    )


def color(number: int) -> str:
    """Returns the CSS class of a run's color."""
    return f"r{number % COLORS}"


def _whiskers(of: dict, place: Callable[[float], str]) -> str:
    if of["low"] is None:
        return ""
    low, high = place(of["low"]), place(of["high"])
    return (
        f'<line class="interval" x1="{low}" x2="{high}" y1="8" y2="8"/>'
        f'<line x1="{low}" x2="{low}" y1="4" y2="12"/>'
        f'<line x1="{high}" x2="{high}" y1="4" y2="12"/>'
    )


def _svg(shapes: str, number: int) -> str:
    return f'<svg class="bar {color(number)}" aria-hidden="true">{shapes}</svg>'


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
