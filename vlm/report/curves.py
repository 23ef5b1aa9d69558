"""Curves as SVG, written by hand: a page then needs no plotting library to make and no script to read.

Letters of the drawing: x and y in the units of the data; everything named `_px` in the SVG's own units.
"""

import html
import itertools
import math

__all__ = ["curves_svg", "nice_ticks", "thin_points"]

WIDTH_PX, HEIGHT_PX = 960, 340
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 64, 28, 14, 46
MOST_POINTS = 800  # of one curve; more than the plot has columns
CURVE_COLOURS = 8

# Colours by hue, light and dark page; neighbours differ in lightness too. After the eighth curve they repeat, dashed.
STYLE = """
svg.curves{--ink:#3f4650;--line:#dfe3e8;--page:#fff;--c0:#2563c9;--c1:#d9650b;--c2:#14875a;
--c3:#b3338c;--c4:#7a5af0;--c5:#8a6d1b;--c6:#1793a5;--c7:#c4323f;
font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
@media(prefers-color-scheme:dark){svg.curves{--ink:#b9c1cc;--line:#333a44;--page:#171b21;--c0:#6ea8ff;--c1:#ff9d4d;
--c2:#4fcf98;--c3:#ef7fcc;--c4:#ab97ff;
--c5:#d9bd5c;--c6:#55cfe0;--c7:#ff7b86}}
svg.curves .page{fill:var(--page)}svg.curves text{fill:var(--ink)}svg.curves .grid{stroke:var(--line);stroke-width:1}
svg.curves .axis{stroke:var(--ink);stroke-width:1}svg.curves path{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg.curves .raw{stroke-width:1;opacity:.3}
""" + "".join(f"svg.curves .s{n}{{stroke:var(--c{n})}}svg.curves .f{n}{{fill:var(--c{n})}}" for n in range(CURVE_COLOURS))


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    ticks = [factor * 10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    tens = [tick for tick in ticks if math.isclose(math.log10(tick), round(math.log10(tick)), abs_tol=1e-9)]
    return tens if len(tens) >= 4 else ticks or [low]


def thin_points(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points with the same outline: of each stretch its lowest and its highest point, in order."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept += sorted({min(part, key=lambda place: points[place][1]), max(part, key=lambda place: points[place][1])})
    return [points[place] for place in kept]


def _running_mean(points, window: int):
    """Each y as the mean of the `window` points around it (fewer at both ends), so that the curve does not lag."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    result = []
    for place, (x, _) in enumerate(points):
        half = min((window - 1) // 2, place, len(points) - 1 - place)
        result.append((x, (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)))
    return result


def _label(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.10g}"


def curves_svg(curves: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, *, log_y: bool = False, smooth: int = 1) -> str:
    """One SVG with axes, ticks, grid and a legend. curves: name -> [(x, y), ...] in drawing order; points that are not finite are left out
    and counted in the legend, so are those at or below 0 under `log_y`. smooth: points in a centred running mean, drawn over the pale
    raw curve.

    Raises ValueError when there is nothing to draw or `smooth` is below 1.
    """
    if smooth < 1:
        raise ValueError(f"{smooth = }; expected at least 1 point")
    drawn, names = [], []
    for name, points in curves.items():
        good = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
        left_out = len(points) - len(good)
        drawn.append(good)
        names.append(f"{name} (left out: {left_out:,})" if left_out else str(name))
    if not any(drawn):
        listed = ", ".join(map(str, curves)) or "no names"
        raise ValueError(f"found no finite point in {len(curves)} curves ({listed}); expected [(x, y), ...] for each name")

    # 1. Ranges. The y axis starts at zero where that costs little of the plot.
    xs, ys = [x for points in drawn for x, _ in points], [y for points in drawn for _, y in points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if log_y:
        y_low, y_high = (y_low / 1.1, y_high * 1.1)
    else:
        if 0 < y_low < 0.4 * y_high:
            y_low = 0.0
        room = 0.05 * ((y_high - y_low) or abs(y_high) or 1.0)
        y_high, y_low = y_high + room, y_low if y_low == 0 else y_low - room
    y_of = math.log10 if log_y else float

    # 2. Legend rows above the plot, as wide as their words need.
    legend, row, across_px = [], 0, float(LEFT_PX)
    for number, name in enumerate(names):
        width_px = 42 + 7.4 * len(name)
        if len(names) > 1 and across_px > LEFT_PX and across_px + width_px > WIDTH_PX - RIGHT_PX:
            row, across_px = row + 1, float(LEFT_PX)
        legend.append((number, name, across_px, TOP_PX + 6 + 20 * row))
        across_px += width_px
    top_px = TOP_PX + 20 * (row + 1) + 4
    height_px = HEIGHT_PX + 20 * row
    bottom_px, right_px = height_px - BOTTOM_PX, WIDTH_PX - RIGHT_PX

    def x_px(x: float) -> float:
        return LEFT_PX + (x - x_low) / (x_high - x_low) * (right_px - LEFT_PX)

    def y_px(y: float) -> float:
        return bottom_px - (y_of(y) - y_of(y_low)) / (y_of(y_high) - y_of(y_low)) * (bottom_px - top_px)

    def path(points, kind: str, name: str) -> str:
        if len(points) == 1:
            x, y = points[0]
            return f'<circle class="f{kind[1:]}" cx="{x_px(x):.1f}" cy="{y_px(y):.1f}" r="3.5"><title>{name}</title></circle>'
        steps = "L".join(f"{x_px(x):.1f} {y_px(y):.1f}" for x, y in thin_points(points))
        return f'<path class="{kind}" d="M{steps}"><title>{name}</title></path>'

    # 3. Draw: page, grid with ticks, axis, curves, legend, names of the axes.
    what = html.escape(f"{y_label} over {x_label}: {', '.join(names)}", quote=True)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" class="curves" viewBox="0 0 {WIDTH_PX} {height_px}" role="img" aria-label="{what}">']
    out += [f"<style>{STYLE}</style>", f'<rect class="page" width="{WIDTH_PX}" height="{height_px}" rx="8"/>']
    for tick in _log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high):
        out.append(f'<line class="grid" x1="{LEFT_PX}" x2="{right_px}" y1="{y_px(tick):.1f}" y2="{y_px(tick):.1f}"/>')
        out.append(f'<text x="{LEFT_PX - 8}" y="{y_px(tick) + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in nice_ticks(x_low, x_high, 9):
        out.append(f'<line class="axis" x1="{x_px(tick):.1f}" x2="{x_px(tick):.1f}" y1="{bottom_px}" y2="{bottom_px + 5}"/>')
        out.append(f'<text x="{x_px(tick):.1f}" y="{bottom_px + 19}" text-anchor="middle">{_label(tick)}</text>')
    out.append(f'<line class="axis" x1="{LEFT_PX}" x2="{right_px}" y1="{bottom_px}" y2="{bottom_px}"/>')
    for number, (name, points) in enumerate(zip(names, drawn, strict=True)):
        colour, dashed, title = f"s{number % CURVE_COLOURS}", number >= CURVE_COLOURS, html.escape(name)
        if points and smooth > 1 and len(points) > smooth:
            out.append(path(points, f"{colour} raw", title))
            points = _running_mean(points, smooth)
        if points:
            drawing = path(points, colour, title)
            out.append(drawing.replace("<path ", '<path stroke-dasharray="7 5" ') if dashed else drawing)
    for number, name, across_px, down_px in legend:
        dash = ' stroke-dasharray="7 5"' if number >= CURVE_COLOURS else ""
        out.append(f'<path class="s{number % CURVE_COLOURS}"{dash} d="M{across_px:.1f} {down_px}h18"/>')
        out.append(f'<text x="{across_px + 24:.1f}" y="{down_px + 4}">{html.escape(name)}</text>')
    out.append(f'<text x="{(LEFT_PX + right_px) / 2:.0f}" y="{height_px - 8}" text-anchor="middle">{html.escape(str(x_label))}</text>')
    middle_px = (top_px + bottom_px) / 2
    out.append(f'<text transform="translate(14 {middle_px:.0f}) rotate(-90)" text-anchor="middle">{html.escape(str(y_label))}</text></svg>')
    return "\n".join(out)
