"""Curves as SVG: text and lines keep their size at any width, since places are percentages of the drawing area.

The same drawing stands inline in a page and in a file by itself; its colours are the variables of :mod:`style`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from qsharded.report.curves import Scale, smoothed, thinned, tick_text
from qsharded.report.run_files import Point
from qsharded.report.style import COLOURS, SVG_STYLE

_SIDE = 1000  # units of the inner drawing, which is stretched to the area
_FILE_WIDTH, _FILE_HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 960, 420, 64, 44, 24, 40


@dataclass(frozen=True)
class Curve:
    """A line of a plot, and its name for the legend.

    Attributes:
        noisy: a mean is drawn over it.
        dashed: it is a limit.
        dots: its points are few and far from each other, and are marked.
    """

    name: str
    points: Sequence[Point]
    noisy: bool = False
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over steps on one scale.

    Attributes:
        from_zero: so that heights can be compared.
        magnitudes: the scale goes by powers of ten where the values do.
        marks: (step, what is said of it) of vertical lines.
    """

    title: str
    curves: Sequence[Curve]
    from_zero: bool = False
    magnitudes: bool = False
    marks: Sequence[tuple[float, str]] = ()

    def figure(self, *, wide: bool = False, legend: bool = True) -> str:
        """The plot as part of a page."""
        entries = "".join(_legend_entry(number, curve.name) for number, curve in enumerate(self.curves))
        shown = f'<span class="legend">{entries}</span>' if legend and len(self.curves) > 1 else ""
        kind = "plot wide" if wide else "plot"
        label = escape(f"{self.title} by step", quote=True)
        return (
            f'<figure class="{kind}"><figcaption><b>{escape(self.title)}</b>{shown}</figcaption>'
            f'<div class="area"><svg role="img" aria-label="{label}">{"".join(self._drawing())}</svg></div></figure>\n'
        )

    def file(self) -> str:
        """The plot as an SVG file."""
        width, height = _FILE_WIDTH - _LEFT - _RIGHT, _FILE_HEIGHT - _TOP - _BOTTOM
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_FILE_WIDTH} {_FILE_HEIGHT}" '
            f'width="{_FILE_WIDTH}" height="{_FILE_HEIGHT}"><style>{SVG_STYLE}</style>'
            f'<rect class="paper" width="100%" height="100%"/>'
            f'<text class="title" x="{_LEFT}" y="24">{escape(self.title)}</text>{"".join(self._file_legend())}'
            f'<svg x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" overflow="visible">'
            f"{''.join(self._drawing())}</svg></svg>\n"
        )

    def _file_legend(self) -> Iterator[str]:
        right = _FILE_WIDTH - _RIGHT
        for number, curve in reversed(list(enumerate(self.curves))):
            yield f'<text x="{right}" y="24" text-anchor="end">{escape(curve.name)}</text>'
            right -= round(6.4 * len(curve.name)) + 14
            yield f'<line class="{_colour(number)}" x1="{right}" x2="{right + 10}" y1="20" y2="20" stroke-width="3"/>'
            right -= 14

    def scales(self) -> tuple[Scale, Scale] | None:
        """Those of the steps and of the values; None where there is no point yet."""
        points = [point for curve in self.curves for point in curve.points]
        if not points:
            return None
        across = Scale.of([step for step, _ in points], from_zero=True, ticks=6)
        across = Scale(across.low, max(step for step, _ in points) or 1, across.ticks)
        values = [value for _, value in points]
        return across, Scale.of_magnitudes(values) if self.magnitudes else Scale.of(values, from_zero=self.from_zero)

    def _drawing(self) -> Iterator[str]:
        scales = self.scales()
        if scales is None:
            yield '<text x="50%" y="50%" text-anchor="middle">not measured yet</text>'
            return
        across, up = scales
        yield from _axes(across, up)
        yield from (_mark(across.place(step), text) for step, text in self.marks)
        for number, curve in enumerate(self.curves):
            yield from _curve(number, curve, across, up)


def _axes(across: Scale, up: Scale) -> Iterator[str]:
    for tick in up.ticks:
        at = f"{100 * (1 - up.place(tick)):.2f}%"
        yield f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
        yield f'<text x="-8" y="{at}" dy="4" text-anchor="end">{tick_text(tick, up)}</text>'
    for tick in across.ticks:
        if tick == int(tick) and tick <= across.high:
            place = across.place(tick)
            anchor = "end" if place > 0.97 else "middle"
            yield f'<text x="{100 * place:.2f}%" y="100%" dy="20" text-anchor="{anchor}">{int(tick):,}</text>'


def _mark(place: float, text: str) -> str:
    at = f"{100 * place:.2f}%"
    anchor, shift = ("end", -6) if place > 0.5 else ("start", 6)
    return (
        f'<line class="mark" x1="{at}" x2="{at}" y1="0" y2="100%"/>'
        f'<text x="{at}" dx="{shift}" y="12" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _curve(number: int, curve: Curve, across: Scale, up: Scale) -> Iterator[str]:
    mean = smoothed(curve.points) if curve.noisy else []
    colour = _colour(number) + (" dashed" if curve.dashed else "")
    title = f"<title>{escape(curve.name)}</title>"
    lines = [(curve.points, f"{colour} faint" if mean else colour)] + ([(mean, colour)] if mean else [])
    paths = "".join(f'<path class="{kind}" d="{_path(points, across, up)}"/>' for points, kind in lines)
    if curve.points:
        yield f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" width="100%" height="100%">'
        yield f"{title}{paths}</svg>"
    if curve.dots or len(curve.points) == 1:
        yield from (_dot(colour, curve.name, point, across, up) for point in thinned(curve.points, 60))


def _path(points: Sequence[Point], across: Scale, up: Scale) -> str:
    places = (
        f"{_SIDE * across.place(step):.1f} {_SIDE * (1 - up.place(value)):.1f}" for step, value in thinned(points)
    )
    return "M" + "L".join(places)


def _dot(colour: str, name: str, point: Point, across: Scale, up: Scale) -> str:
    step, value = point
    x, y = 100 * across.place(step), 100 * (1 - up.place(value))
    said = escape(f"{name} {value:.4g} at step {step:,}")
    return f'<circle class="{colour}" cx="{x:.2f}%" cy="{y:.2f}%" r="3.5"><title>{said}</title></circle>'


def _colour(number: int) -> str:
    return f"c{number % COLOURS}" + (" second" if number >= COLOURS else "")


def _legend_entry(number: int, name: str) -> str:
    return f'<span><i class="{_colour(number)}"></i>{escape(name)}</span>'
