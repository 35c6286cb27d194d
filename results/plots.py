"""What people look at; nothing here is in the paper, and a reader of the paper may skip it.

    say_what_runs, pace             before a run: its settings and its hours (its memory: card.py)
    step_line, warn, ..             during training
    stop_if_.., put_aside           what goes wrong without a crash: said, and set aside to be read
    table, controls_table, collect  results as tables
    curve, by_length, training      results as pictures (the only part that needs matplotlib)
    readable, nearest_words         an answer with its latents, as text (as an HTML page: page.py)
    write_chapters                  chapters written from plans, beside the true ones
"""
import itertools
import json
import math
import os

import numpy as np

from lib import UserError, display, run


def collect(files):
    """Tables of several runs -> [(row name, means over the runs that have the row)]; in each mean `runs`: how
    many, `spread`: their lowest and highest accuracy.

    files: JSON as --json writes it (one row, a list, or {name: row}), or directories of train_rl.py, whose
    results.json is meant."""
    rows_by_name = {}
    for file in files:
        if os.path.isdir(file):
            file = os.path.join(file, "results.json")
        try:
            for row in _rows_of_file(file):
                name = row.get("name") or row.get("control") or row["model"]
                row = {"runs": 1, "spread": [row["accuracy"]] * 2, **row}
                rows_by_name.setdefault(name.strip(), []).append(row)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{file} is not a table of results ({e})") from e
    return [(name, _mean_row(rows)) for name, rows in rows_by_name.items()]


def _rows_of_file(file):
    with open(file) as f:
        rows = json.load(f)
    if isinstance(rows, list):
        return rows
    if "accuracy" in rows:
        return [rows]
    return [{"name": name, **row} for name, row in rows.items()]


def _mean_row(rows):
    """The rows of one name in one: means of what is a number, or a list of numbers, in all of them."""
    lowest = min(row["spread"][0] for row in rows)
    highest = max(row["spread"][1] for row in rows)
    mean = {"runs": sum(row["runs"] for row in rows), "spread": [lowest, highest]}
    for key in rows[0]:
        values = [row.get(key) for row in rows]
        if key in mean or not all(isinstance(value, (int, float, list)) for value in values):
            continue
        if isinstance(values[0], list):  # an interval
            mean[key] = [sum(ends) / len(ends) for ends in zip(*values)]
        else:
            mean[key] = sum(values) / len(values)
    return mean


# ============================================================ pictures
# Each panel is as wide as a README is shown (900 px), all on a white card: legible on any background, and the
# colours are dark enough for text on it. A method has one colour in all pictures.
WIDTH = 900  # px of CSS; the figures have as many dots
DOTS = 96  # per inch, as in CSS
COLOURS = {  # of a method with the length penalty and without it
    "LiteReason": "#1f5f99",
    "the paper's recipe": "#6f4aa8",
    "RL without latents": "#b3261e",
    "RL with tags": "#2a7436",
    "base, explicit reasoning": "#595959"}
OTHER_COLOURS = ["#a34a00", "#0d6f7c", "#7a4b3a", "#a8378c", "#6b6b00"]
DARK, SOFT, GRID = "#1c1c1c", "#555555", "#dddddd"
TEXT, SMALL = 9.5, 8.5  # points: 12.7 and 11.3 px
LINE = 17  # px from one line of text to the next
SMOOTH = 5  # steps
COSTS = {  # key of a result: (what it is, in which unit)
    "tokens": ("tokens per answer (text + latents)", 1),
    "flops": ("forward GFLOPs per answer", 1e-9),
    "seconds_each": ("seconds per answer, full batch", 1),
    "seconds_alone": ("seconds per answer, decoded alone", 1)}
TRAINING_CURVES = ("reward", "tokens per rollout (text + latents)", "latent steps per rollout",
                   "share of rollouts with a tag")


def figure(path, heights):
    """An empty figure of matplotlib, which nothing else here needs -> (figure, its panels, one above the
    other). heights: of the panels with what stands around them, in px."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from e
    if not path.endswith((".svg", ".png")):
        raise UserError(f"--plot is {path!r}; it must end in .svg or .png")
    rcParams["svg.hashsalt"] = "litereason"  # else the names inside an svg are drawn by chance
    size = WIDTH / DOTS, sum(heights) / DOTS
    picture = Figure(size, dpi=DOTS, layout="constrained", facecolor="white")
    picture.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    panels = picture.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(SOFT)
        panel.tick_params(labelsize=SMALL, color=SOFT, labelcolor=DARK)
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
    return picture, panels


def name_axes(panel, x, y):
    """The y axis has its name above it, where it can be read without turning the head."""
    panel.set_title(y, loc="left", fontsize=TEXT, color=DARK, pad=8)
    panel.set_xlabel(x, fontsize=TEXT, color=DARK)


def save_figure(picture, path):
    """Without the date: the same numbers make the same file."""
    metadata = {"Date": None} if path.endswith(".svg") else None
    try:
        picture.savefig(path, metadata=metadata, dpi=2 * DOTS)  # the dots of a png: sharp at 900 px
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def colours_of(names):
    """{name: its colour}"""
    others = itertools.cycle(OTHER_COLOURS)
    colours = {}
    for name in names:
        method = name.removesuffix(" + length penalty").removesuffix(", no latents")
        free = method in COLOURS and COLOURS[method] not in colours.values()
        colours[name] = COLOURS[method] if free else next(others)
    return colours


def names_of(paths):
    """What pictures call results or runs: a directory of train_rl.py by its method, and anything else as it
    is. Where two would be called alike, their directories are said too, in full if need be."""
    names = [_method_of(path) for path in paths]
    for place_of in (_last_part, str):
        names = [f"{_method_of(path)} ({place_of(path)})" if names.count(name) > 1 else name
                 for name, path in zip(names, paths)]
    return names


def _last_part(path):
    return os.path.basename(os.path.normpath(path))


def _method_of(path):
    """path: of a run, maybe with the sampling behind it, as eval.py names its rows: "RUN (paper)"."""
    directory, bracket, sampling = path.partition(" (")
    settings = run.run_settings(directory)
    if settings.get("script") != "train_rl.py":
        return path
    return display.METHODS[settings["method"]] + bracket + sampling


def curve(rows, path, costs=("tokens",), score="score"):
    """Draws scores against those of the costs that any row has, a panel each. rows: from collect; score: what
    the scores are called.

    Bars: see _bar."""
    rows = list(zip(names_of([name for name, _ in rows]), (row for _, row in rows)))
    for _, row in rows:
        if "seconds" in row and "n_examples" in row:  # older tables have no seconds_each
            answers = row["n_examples"] * row.get("samples", 1)
            row.setdefault("seconds_each", row["seconds"] / answers)
    by_cost = {cost: _dots(rows, cost) for cost in costs}
    by_cost = {cost: dots for cost, dots in by_cost.items() if dots}
    if not by_cost:
        raise UserError(f"no row has any of these costs: {', '.join(costs)}")

    picture, panels = figure(path, [440 + 10 * max(0, len(rows) - 6)] * len(by_cost))
    for panel, (cost, dots) in zip(panels, by_cost.items()):
        _draw_dots(panel, cost, dots, dict(rows))
        name_axes(panel, COSTS[cost][0], score)
    say_bars(picture, {_bar(row, "accuracy")[1] for _, row in rows})
    picture.draw_without_rendering()  # from here on the panels stand where they will stand
    for panel, dots in zip(panels, by_cost.values()):
        label_dots(panel, dots)
    save_figure(picture, path)


def _draw_dots(panel, cost, dots, by_name):
    """Dots with their bars. The axis of the cost begins at 0, unless one row costs many times what another
    does: then it is logarithmic."""
    unit = COSTS[cost][1]
    for name, x, y, colour in dots:
        vertical, _ = _bar(by_name[name], "accuracy")
        panel.plot([x, x], vertical, color=colour, linewidth=1.5, label=name)
        horizontal, _ = _bar(by_name[name], cost)
        if horizontal:
            ends = [end * unit for end in horizontal]
            panel.plot(ends, [y, y], color=colour, linewidth=1.5, label=name)
        panel.plot(x, y, "o", color=colour, markersize=6, label=name)
    panel.margins(y=0.1)
    least = min(x for _, x, _, _ in dots)
    most = max(x for _, x, _, _ in dots)
    if 0 < least < most / 8:
        panel.set_xscale("log", subs=[2, 5])
        panel.set_xlim(least / 1.4, most * 1.4)
        say_minor_ticks(panel, panel.xaxis)
    else:
        panel.set_xlim(0, 1.1 * most or 1)
        panel.locator_params(axis="x", nbins=8)


def say_minor_ticks(panel, axis):
    """On a logarithmic axis 2 and 5 are written like 1 and 10."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:,g}")
    panel.grid(color=GRID, linewidth=0.8, which="minor")
    panel.tick_params(which="minor", labelsize=SMALL, labelcolor=DARK, color=SOFT, length=3.5, width=0.8)


def say_bars(picture, kinds):
    """What the bars are, under the panels at the left."""
    picture.supxlabel(f"bars: {'; '.join(sorted(kinds))}", x=0.02, ha="left", fontsize=SMALL, color=SOFT)


def _bar(row, what):
    """-> ((low, high) or None, what they are) of a row's accuracy or cost. Results of several runs that have
    an interval of their tokens have intervals that count seeds (results/evidence.py); other means of runs
    have only the lowest and the highest of them, and only of the accuracy."""
    if "tokens_ci95" in row:
        over = "seeds and stories" if row["runs"] > 1 else "stories of one seed"
        return row.get(f"{what}_ci95"), f"95 % interval over {over}"
    if what != "accuracy":
        return None, ""
    if row["runs"] > 1:
        return row["spread"], "lowest to highest run"
    return row.get("accuracy_ci95", row["spread"]), "95 % interval over examples of one run"


def _dots(rows, cost):
    """[(name, x, y, colour)] of the rows in which this cost is known; a row has the same colour in each
    panel."""
    unit = COSTS[cost][1]
    dots = []
    colours = colours_of([name for name, _ in rows])
    for name, row in rows:
        if row.get(cost) is not None:
            dots.append((name, row[cost] * unit, row["accuracy"], colours[name]))
    return dots


def by_length(rows, path, xlabel="hand-overs in each chain", score="accuracy"):
    """Draws scores (top) and tokens (bottom, logarithmic) against the length of the chain, a line for each
    method, with its name at its end.

    rows: dicts with method, length, accuracy, accuracy_ci95, tokens and tokens_ci95."""
    picture, panels = figure(path, [310, 310])
    colours = colours_of(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    ends = {"accuracy": [], "tokens": []}  # of the lines: (method, x, y, colour)
    for i, (method, colour) in enumerate(colours.items()):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["length"])
        aside = 0.012 * (lengths[-1] - lengths[0]) * (i - (len(colours) - 1) / 2)  # bars beside each other
        x = [row["length"] + aside for row in own]
        for panel, what in zip(panels, ends):
            panel.plot(x, [row[what] for row in own], "o-", color=colour, linewidth=1.5, markersize=5)
            for at, row in zip(x, own):
                panel.plot([at, at], row[f"{what}_ci95"], color=colour, linewidth=1.5)
            ends[what].append((method, x[-1], own[-1][what], colour))
    for panel in panels:
        panel.set_xticks(lengths)
    panels[1].set_yscale("log", subs=[2, 5])
    say_minor_ticks(panels[1], panels[1].yaxis)
    panels[1].grid(False, which="minor", axis="x")
    name_axes(panels[0], "", score)
    name_axes(panels[1], xlabel, "tokens per answer (text + latents)")
    say_bars(picture, {"95 % interval over seeds and stories"})
    label_ends(picture, dict(zip(panels, ends.values())))
    save_figure(picture, path)


def label_ends(picture, ends):
    """Writes the names of lines at their ends, right of the panels; those that would cover each other are
    moved up or down. ends: {panel: [(name, x, y, colour)]}"""
    picture.draw_without_rendering()  # from here on the panels are as high as they will be
    for panel, lines in ends.items():
        lines = sorted(lines, key=lambda line: line[2])
        low, high = panel.get_window_extent().get_points()[:, 1]
        heights = [panel.transData.transform((x, y))[1] for _, x, y, _ in lines]
        for (name, x, y, colour), at in zip(lines, spread(heights, LINE, low, high)):
            share = (at - low) / (high - low)
            line = {"arrowstyle": "-", "linewidth": 0.7, "color": colour, "shrinkA": 2, "shrinkB": 4,
                    "relpos": (0, 0.5)}
            panel.annotate(name, (x, y), (1.035, share), textcoords="axes fraction", color=colour,
                           fontsize=TEXT, va="center", annotation_clip=False, arrowprops=line)


def spread(heights, gap, low, high):
    """Sorted heights, moved so that neighbours are a gap apart and, if there is room,
    all from low to high."""
    at = [max(low, height) for height in heights]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], high - gap * (len(at) - 1 - i))
    return at


def label_dots(panel, dots):
    """Writes the names of dots (name, x, y, colour) beside them, from right to left. A line leads from a name
    to its dot unless nothing but the dot or its own bars is near. What is drawn for a dot has its name as
    label."""
    points_per_pixel = 72 / panel.figure.dpi
    ink = [(box, line.get_label()) for line in panel.lines for box in _boxes_of(line)]
    names = []  # boxes of those that are written
    for name, x, y, colour in sorted(dots, key=lambda dot: -dot[1]):
        style = {"color": colour, "fontsize": TEXT, "textcoords": "offset points", "ha": "center",
                 "va": "center"}
        trial = panel.annotate(name, (x, y), (0, 0), **style)
        size = trial.get_window_extent()
        trial.remove()
        dot = panel.transData.transform((x, y))
        offset, box = _free_place(size, dot, [part for part, _ in ink], names, panel.get_window_extent())
        near = {owner for part, owner in ink if box.padded(8).overlaps(part)}
        end = _nearest_in(box, dot)
        is_far = np.hypot(*(dot - end)) > 14
        line = None
        if is_far and near != {name}:
            relative = tuple((end - box.min) / box.size)
            line = {"arrowstyle": "-", "linewidth": 0.7, "color": colour, "shrinkA": 0, "relpos": relative}
        note = panel.annotate(name, (x, y), offset * points_per_pixel, arrowprops=line, **style)
        note.set_in_layout(False)
        names.append(box.padded(2))


def _boxes_of(line):
    """Boxes around the parts of a line from point to point, with some room."""
    from matplotlib.transforms import Bbox
    points = line.axes.transData.transform(line.get_xydata())
    pairs = zip(points, [*points[1:], points[-1]])
    return [Bbox([np.minimum(a, b), np.maximum(a, b)]).padded(5) for a, b in pairs]


def _nearest_in(box, point):
    return np.clip(point, box.min, box.max)


def _free_place(size, dot, ink, names, frame):
    """The nearest place around a dot where its name covers no ink and no name and stays within the frame, if
    possible one that a straight line from the dot reaches without crossing a name; if there is none, the last
    one tried -> (offset from the dot, box), in pixels. size: the name's box, wherever it is."""
    half = size.size / 2
    taken = np.array([part.extents for part in ink + names])  # (n, 4): left, bottom, right, top
    free = None
    for i in range(16 * 50):  # places on growing circles, from the right side on
        angle = 2 * math.pi * (i % 16) / 16
        distance = 7 + 7 * (i // 16)
        offset = np.array([math.cos(angle), math.sin(angle)]) * (distance + half)
        box = size.translated(*(dot + offset - size.min - half))
        is_inside = np.all(frame.min <= box.min) and np.all(box.max <= frame.max)
        covers = np.all(taken[:, :2] < box.max, axis=1) & np.all(taken[:, 2:] > box.min, axis=1)
        if not is_inside or covers.any():
            continue
        free = free or (offset, box)
        way = np.linspace(dot, _nearest_in(box, dot), 20)
        if not any(name.contains(*point) for name in names for point in way):
            return offset, box
    return free or (offset, box)


def training(directories, path, names=None):
    """Draws metrics.jsonl of several runs: reward, tokens, latent steps and tag share against steps, and the
    reward against the tokens sampled in training.

    names: of the runs, by default from names_of."""
    directories = list(dict.fromkeys(directories))
    picture, panels = figure(path, [190] * len(TRAINING_CURVES) + [240])
    names = names or names_of(directories)
    ends = {panel: [] for panel in panels}
    for directory, (name, colour) in zip(directories, colours_of(names).items()):
        try:
            curves = _curves_of(directory)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{directory} is not a run of train_rl.py: "
                            f"metrics.jsonl or config.json ({e})") from e
        for panel, (x, y) in zip(panels, curves):
            smooth = running_mean(y)
            panel.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
            panel.plot(x, smooth, color=colour, linewidth=1.8, label=name)
            ends[panel].append((name, x[-1], smooth[-1], colour))
    for panel, curve_name in zip(panels, TRAINING_CURVES):
        name_axes(panel, "", curve_name)
        panel.tick_params(labelbottom=False)
        panel.margins(x=0.01)
    panels[3].set_ylim(-0.05, 1.05)
    panels[3].tick_params(labelbottom=True)
    name_axes(panels[3], "step", TRAINING_CURVES[3])
    name_axes(panels[4], "tokens sampled in training, millions (text + latents)", "reward")
    panels[4].margins(x=0.01)
    picture.supxlabel(f"faint: single steps; strong: means of {SMOOTH} steps around each", x=0.02, ha="left",
                      fontsize=SMALL, color=SOFT)
    against_tokens = ends.pop(panels[4])  # these lines end anywhere
    label_ends(picture, ends)
    picture.draw_without_rendering()
    label_dots(panels[4], against_tokens)
    save_figure(picture, path)


def _curves_of(directory):
    """-> [(x, y)] of a run, for the panels of `training`"""
    with open(os.path.join(directory, "metrics.jsonl")) as f:
        metrics = [json.loads(line) for line in f]
    settings = run.run_settings(directory)
    batch = settings["prompts"] * settings["group"]
    rollouts = batch / settings.get("minibatches", 1)  # new ones per optimiser step
    steps, reward, text, latents, tag_share = (
        np.array([m[key] for m in metrics])
        for key in ("step", "reward", "text_tokens", "latent_steps", "tag_share"))
    tokens = text + latents
    millions = np.cumsum(tokens * rollouts) / 1e6
    against_steps = [(steps, y) for y in (reward, tokens, latents, tag_share)]
    return [*against_steps, (millions, reward)]


def running_mean(values):
    """Of the SMOOTH values around each; of fewer at the ends."""
    window = np.ones(SMOOTH)
    counts = np.convolve(np.ones(len(values)), window, "full")
    sums = np.convolve(values, window, "full")
    around = slice(SMOOTH // 2, SMOOTH // 2 + len(values))
    return sums[around] / counts[around]
