"""Arrays to figures: sheets of images, curves, maps.

    figure = sheet([[image, view, view]], "views", [("original", 1), ("query", 2)])
    write_file("views.png", png(figure))

Colours stay apart for colour-blind eyes: those of Okabe and Ito for runs, Paul Tol's muted ones for classes.
"""

import dataclasses
import importlib
import io
import itertools
import math
import textwrap

import numpy as np
import tensorflow as tf

from moco_tf.errors import UsageError


def installed(module):
    """A module of the `plots` extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError("`moco-tf show` needs matplotlib and scikit-learn: pip install 'moco_tf[plots]'. "
                         f"Received: {error}.") from None


matplotlib = installed("matplotlib")
Figure = installed("matplotlib.figure").Figure
Line2D = installed("matplotlib.lines").Line2D
Patch = installed("matplotlib.patches").Patch

HALO = installed("matplotlib.patheffects").withStroke(linewidth=2.5, foreground="white")    # behind text on curves
DPI = 128    # a power of two: sizes in pixels are exact in inches
INK, FAINT = "#222222", "#777777"
AGREES, DISAGREES, UNKNOWN = "#009e73", "#d55e00", "#bbbbbb"    # frames of neighbours
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
CLASS_COLOURS = ("#332288", "#ddaa33", "#117733", "#88ccee", "#882255", "#44aa99", "#cc6677", "#999933", "#aa4499",
                 "#777777")
CLASS_MARKERS = ("o", "^")
LEGEND_CLASSES = len(CLASS_COLOURS) * len(CLASS_MARKERS)    # more cannot be told apart, nor read
SMOOTHED = 200    # points above which a curve is drawn faint, with its running mean on top

CELL, GAP, GROUP_GAP, FRAME, MARGIN = 112, 10, 14, 4, 24    # pixels
LINE = 18                                                   # a line of text, pixels
MAP_INCHES = 4.6                                            # side of a map
STYLE = {"font.size": 8.5, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.grid": True,
         "grid.color": "#e6e6e6", "axes.axisbelow": True, "legend.frameon": False, "text.color": INK,
         "lines.linewidth": 1.4, "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1}


def png(figure):
    """A figure as the bytes of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------- sheets of images

def fit(image, cell):
    """An image (h, w, 3) uint8 for a square of `cell` pixels: enlarged by a whole factor, or reduced smoothly."""
    longer = max(image.shape[:2])
    if longer <= cell:
        return image.repeat(cell // longer, axis=0).repeat(cell // longer, axis=1)
    sides = [max(1, round(side * cell / longer)) for side in image.shape[:2]]
    reduced = tf.image.resize(tf.constant(image), sides, antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(reduced), 0, 255), tf.uint8).numpy()


def sheet(rows, title, columns, note="", captions=None, frames=None):
    """A sheet of images, pixel for pixel.

    Args:
        rows: lists of (h, w, 3) uint8 images, equally long. The last image sets the size of all cells.
        title, note: above the images; the note may be long.
        columns: (title, how many columns it stands over), in order.
        captions: for each row, a text for each image, its lines short; None for no text.
        frames: for each row, a colour or None for each image.

    Returns:
        A matplotlib Figure.
    """
    side = rows[0][-1].shape[0]
    cell = side * max(1, round(CELL / side)) if side <= CELL else side
    groups = np.repeat(np.arange(len(columns)), [count for _, count in columns])
    lefts = MARGIN + np.arange(len(groups)) * (cell + GAP) + groups * GROUP_GAP
    width = max(int(lefts[-1]) + cell + MARGIN, 4 * CELL)
    words = textwrap.wrap(note, (width - 2 * MARGIN) // 8)
    under = LINE * max(text.count("\n") + 1 for row in captions for text in row) if captions else 0
    top = MARGIN + LINE * (len(words) + 3)
    tops = top + np.arange(len(rows)) * (cell + under + GAP + 2 * FRAME)
    height = int(tops[-1]) + cell + under + MARGIN

    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def write(x, y, text, **style):
        figure.text(x / width, 1 - y / height, text, **{"fontsize": 8.5, "color": INK, "va": "baseline", **style})

    write(MARGIN, MARGIN + 10, title, fontsize=11, weight="bold")
    for line, text in enumerate(words):
        write(MARGIN, MARGIN + 12 + LINE * (line + 1), text, color=FAINT)
    for group, (name, _) in enumerate(columns):
        write(lefts[groups == group][0], top - 10, name, weight="bold")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            x, y = int(lefts[j]), int(tops[i])
            if frames and frames[i][j]:
                colour = np.round(255 * np.array(matplotlib.colors.to_rgb(frames[i][j])))
                canvas[y - FRAME:y + cell + FRAME, x - FRAME:x + cell + FRAME] = colour
            shown = fit(image[..., :3] if image.shape[-1] > 2 else image[..., :1], cell)    # of other channels the first
            dy, dx = (cell - shown.shape[0]) // 2, (cell - shown.shape[1]) // 2
            canvas[y + dy:y + dy + shown.shape[0], x + dx:x + dx + shown.shape[1]] = shown
            for line, text in enumerate(captions[i][j].split("\n") if captions else ()):
                write(x, y + cell + FRAME - 3 + LINE * (line + 1), shorten(text, cell // 7), fontsize=8)
    figure.figimage(canvas)
    return figure


def shorten(text, length):
    return text if len(text) <= length else text[:length - 1] + "…"


# ---------------------------------------------------------------------------------------------- curves

@dataclasses.dataclass
class Panel:
    """One plot of values over the step.

    Attributes:
        title: what is plotted.
        lines: of (run, key, steps, values).
        levels: of (height, what it means): drawn across.
        percent: values are shares of one.
        log: the scale is logarithmic.
        zero: the scale begins at 0.
    """

    title: str
    lines: list
    levels: tuple = ()
    percent: bool = False
    log: bool = False
    zero: bool = False


def curves(panels, runs):
    """A figure of `Panel`s; a colour for each of the `runs`, by name, and a style for each key of a panel."""
    colours = dict(zip(runs, RUN_COLOURS if len(runs) <= len(RUN_COLOURS) else
                       matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(runs)))))
    wide = min(3, len(panels))
    tall = math.ceil(len(panels) / wide)
    legend_rows = math.ceil(len(runs) / wide) if len(runs) > 1 else 0
    last = max(np.max(steps) for panel in panels for _, _, steps, _ in panel.lines)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.1 * wide, 2.5 * tall + 0.25 * legend_rows), dpi=DPI, layout="constrained")
        grid = figure.subplots(tall, wide, squeeze=False).ravel()
        for axes, panel in zip(grid, panels):
            draw_panel(axes, panel, colours)
            axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
        for axes in grid[len(panels):]:
            axes.remove()
        if legend_rows:
            figure.legend(handles=[Line2D([], [], color=colour, linewidth=3, label=name)
                                   for name, colour in colours.items()], loc="outside upper left", ncols=wide)
    return figure


def draw_panel(axes, panel, colours):
    keys = list(dict.fromkeys(key for _, key, _, _ in panel.lines))
    styles = dict(zip(keys, itertools.cycle(["-", "--", ":", "-."])))
    for run, key, steps, values in panel.lines:
        look = dict(color=colours[run], linestyle=styles[key])
        if len(values) > SMOOTHED:
            axes.plot(steps, values, color=colours[run], linewidth=0.6, alpha=0.3)
            axes.plot(*(running_mean(column, len(values) // 50) for column in (steps, values)), **look)
        else:
            axes.plot(steps, values, **look, marker="o" if len(values) < 20 else "", markersize=3)
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        labelled = "23456789" if high < 10 * low else "25" if high < 100 * low else ""    # else there may be one label
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in labelled else "")
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    for height, text in panel.levels:
        axes.axhline(height, color=FAINT, linestyle=(0, (1, 2)), linewidth=1.2)
        axes.annotate(text, (1, height), xytext=(0, 2), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      ha="right", va="bottom", fontsize=7.5, color=FAINT, path_effects=[HALO])
    if panel.zero:
        axes.set_ylim(bottom=0)
    if len(keys) > 1:
        axes.legend(handles=[Line2D([], [], color=INK, linestyle=styles[key], label=key) for key in keys], fontsize=7.5)
    axes.set_title(panel.title)
    axes.set_xlabel("step")


def running_mean(values, window):
    """Means of `window` neighbours each, (n - window + 1,)."""
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


# ---------------------------------------------------------------------------------------------- times

def step_times(parts, wholes, title, unit):
    """Times of a training step's parts: against the values of a sweep where these are numbers above 0, else in bars.

    Args:
        parts: {value of the sweep: {name of a part: time}}, the same names for all.
        wholes: {name: {value: time}} of what is no part: the whole step, a peer's.
        title: what was swept; "": nothing.
        unit: of the times.

    Returns:
        A matplotlib Figure.
    """
    names = list(next(iter(parts.values())))
    colours = dict(zip([*names, *wholes], [*CLASS_COLOURS[:len(names)], INK, FAINT]))
    try:
        values = [float(value) for value in parts]
    except ValueError:
        values = []
    if values and min(values) <= 0:      # which logarithmic axes cannot show
        values = []
    with matplotlib.rc_context(STYLE):
        tall = 3.8 if len(values) > 1 else 1.7 + 0.45 * len(parts)
        figure = Figure(figsize=(6.4, tall), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        if len(values) > 1:
            for name in names:
                axes.plot(values, [own[name] for own in parts.values()], color=colours[name], marker=".", label=name)
            for name, times in wholes.items():
                axes.plot(values, list(times.values()), color=colours[name], marker="o", linewidth=2, label=name)
            axes.set(xscale="log", yscale="log", xlabel=title, ylabel=unit, xticks=values)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.7g}")
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            ends = np.zeros(len(parts))
            for name in names:
                widths = np.array([own[name] for own in parts.values()])
                axes.barh(list(parts), widths, left=ends, color=colours[name], label=name, height=0.6)
                ends += widths
            for marker, (name, times) in zip("Dd", wholes.items()):
                axes.plot(list(times.values()), list(times), marker, color=colours[name], label=name)
            axes.set(xlabel=unit, ylabel=title)
            axes.invert_yaxis()
        axes.set_title("a training step and its parts, each measured alone")
        figure.legend(loc="outside right upper", fontsize=7.5)
    return figure


def pipeline_times(bars, limit, title):
    """CPU time of input pipelines, a bar each, made up of stages.

    Args:
        bars: {name of a pipeline: {name of a stage: ms}}; the first one's stages have colours of their own.
        limit: ms of decoding alone, drawn across.
        title: above all.

    Returns:
        A matplotlib Figure.
    """
    stages = list(dict.fromkeys(stage for own in bars.values() if len(own) > 1 for stage in own))
    colours = dict(zip(stages, CLASS_COLOURS))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.7 + 0.45 * len(bars)), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for bar, own in bars.items():
            end = 0.0
            for stage, width in own.items():
                axes.barh(bar, width, left=end, color=colours.get(stage, UNKNOWN), height=0.6)
                end += width
            axes.annotate(f"{end:.1f}", (end, bar), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(limit, color=INK, linestyle=(0, (1, 2)), linewidth=1.2)
        axes.annotate("decode alone", (limit, 1), xycoords=axes.get_xaxis_transform(), xytext=(2, 2),
                      textcoords="offset points", fontsize=7.5, color=INK, path_effects=[HALO])
        axes.set(xlabel="CPU ms for an image, all its views")
        axes.invert_yaxis()
        figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
        figure.legend(handles=[Patch(color=colour, label=stage) for stage, colour in colours.items()],
                      loc="outside right upper", fontsize=7.5)
    return figure


# ---------------------------------------------------------------------------------------------- maps

def maps(points, labels, class_names, title, axis_labels):
    """Maps of the same rows side by side, coloured by label.

    Args:
        points: {name of a map: (n, 2)}.
        labels: (n,) ints, below 0 where there is none.
        class_names: () where nothing is labelled: all points have one colour.
        title: above all.
        axis_labels: {name of a map: (text along x, text along y)}; a map without has no axes.

    Returns:
        A matplotlib Figure.
    """
    draw = draw_plain if not class_names else draw_classes if len(class_names) <= LEGEND_CLASSES else draw_scale
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=((MAP_INCHES + 0.6) * len(points) + 1.4 * bool(class_names), MAP_INCHES + 0.9), dpi=DPI,
                        layout="constrained")
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        grid = figure.subplots(1, len(points), squeeze=False)[0]
        for axes, (name, rows) in zip(grid, points.items()):
            look = dict(s=12 if len(rows) <= 3000 else 5, linewidths=0, alpha=0.75)
            shown = draw(axes, rows, labels, class_names, look)
            axes.set_title(name)
            axes.set_aspect("equal", adjustable="datalim")
            if name in axis_labels:
                axes.set_xlabel(axis_labels[name][0])
                axes.set_ylabel(axis_labels[name][1])
            else:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
        if draw is draw_classes:
            grid[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2)
        elif draw is draw_scale:
            figure.colorbar(shown, ax=grid[-1], label=f"number of the class, of {len(class_names)}", shrink=0.7)
    return figure


def draw_plain(axes, rows, labels, class_names, look):
    return axes.scatter(*rows.T, color=RUN_COLOURS[0], **look)


def draw_classes(axes, rows, labels, class_names, look):
    """A colour and a marker for each class; its name at its median, where it can be read without the colours."""
    present = [label for label in range(len(class_names)) if np.any(labels == label)]
    for label in present:
        rank, colour = divmod(label, len(CLASS_COLOURS))
        axes.scatter(*rows[labels == label].T, color=CLASS_COLOURS[colour], marker=CLASS_MARKERS[rank],
                     label=shorten(class_names[label], 24), **look)
    names = [shorten(class_names[label], 16) for label in present]
    places = np.array([np.median(rows[labels == label], axis=0) for label in present])
    for name, place in zip(names, apart(places, names, np.ptp(rows, axis=0))):
        axes.annotate(name, place, ha="center", va="center", fontsize=7.5, weight="bold",
                      path_effects=[HALO])
    if np.any(labels < 0):
        axes.scatter(*rows[labels < 0].T, color=UNKNOWN, label="no label", zorder=0, **look)


def apart(places, names, extent):
    """Places (n, 2) of texts on a map of this extent (2,), moved up until none covers another."""
    inch = max(extent / MAP_INCHES)    # in units of the data, which are alike in both directions
    height, settled = 0.14 * inch, []
    for i in np.argsort(places[:, 1]):
        x, y = places[i]
        while any(abs(x - other_x) < 0.04 * inch * (len(names[i]) + len(names[j])) and abs(y - other_y) < height
                  for j, other_x, other_y in settled):
            y += height / 4
        settled.append((i, x, y))
    return np.array([[x, y] for _, x, y in sorted(settled)])


def draw_scale(axes, rows, labels, class_names, look):
    """So many classes that only the number of a class can be shown."""
    known = labels >= 0
    axes.scatter(*rows[~known].T, color=UNKNOWN, zorder=0, **look)
    return axes.scatter(*rows[known].T, c=labels[known], cmap="viridis", vmin=0, vmax=len(class_names) - 1, **look)
