"""Results as pictures, for reproduce.py; only this needs matplotlib. Each is 900 px wide, as a README is
shown, and white, so that it can be read on a dark page too."""
import numpy as np

WIDTH, DOTS = 900, 96  # px, and how many make an inch in CSS
COLOURS = {  # of a method, with the length penalty and without it
    "LiteReason": "#1f5f99",
    "the paper's recipe": "#6f4aa8",
    "RL without latents": "#b3261e",
    "RL with tags": "#2a7436",
    "base, explicit reasoning": "#595959"}
OTHER_COLOURS = ["#a34a00", "#0d6f7c", "#7a4b3a", "#a8378c", "#6b6b00", "#1c1c1c", "#3c8f8f"]


def curve(rows, path, score="accuracy"):
    """Scores against tokens. rows: {method: [means as of reproduce.mean_of]}; those of chains of one length
    have it beside the dot, and are joined. score: what the scores are called."""
    picture, (panel,) = figure([420])
    for (method, dots), colour in zip(rows.items(), colours_of(rows)):
        for row in dots:
            x, y = row["tokens"], row["accuracy"]
            panel.plot([x, x], row["accuracy_ci95"], color=colour)
            panel.plot(x, y, "o", color=colour, label=method)
            panel.plot(row["tokens_ci95"], [y, y], color=colour)
            if "length" in row:
                panel.annotate(row["length"], (x, y), (4, 4), textcoords="offset points", color=colour)
        if len(dots) > 1:
            panel.plot(*zip(*((row["tokens"], row["accuracy"]) for row in dots)), color=colour, alpha=0.35)
    panel.set_xscale("log")
    write_numbers(panel.xaxis)
    name_axes(panel, "tokens per answer (text + latents)", score)
    numbers = "; numbers: hand-overs in each chain" if "length" in row else ""
    save(picture, path, f"bars: 95 % interval over seeds and stories{numbers}")


def chains(rows, path):
    """How large latents are along a chain, a panel for each model. rows: of starts.py, of which those of the
    first seed at the first learning rate are drawn. A latent that is 0 or not finite has no dot."""
    rows = [row for row in rows if row["seed"] == rows[0]["seed"] and row["lr"] == rows[0]["lr"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    starts = list(dict.fromkeys(row["start"] for row in rows))
    colours = dict(zip(starts, [*COLOURS.values(), *OTHER_COLOURS]))
    picture, panels = figure([260] * len(models))
    for panel, model in zip(panels, models):
        for row in (row for row in rows if row["model"] == model):
            for when, style in (("before", {"alpha": 0.35}), ("after", {"label": row["start"]})):
                sizes = np.array(row[f"chain {when}"], dtype=float)  # None is nan
                panel.plot(np.arange(len(sizes)) + 1, sizes, "o-", color=colours[row["start"]], **style)
        panel.set_yscale("log")
        panel.locator_params(axis="x", integer=True)
        name_axes(panel, "", f"{model}: size of a latent, in embeddings")
    panels[-1].set_xlabel("latent of the chain")
    save(picture, path, "faint: before stage 2; strong: after it; no dot: 0 or not finite; the starts with a "
         "norm and pause lie near 1, behind each other")


# ============================================================ what they share
def figure(heights):
    """-> (an empty figure, its panels, one above the other). heights: of the panels, in px."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    rcParams["svg.hashsalt"] = "litereason"  # else the names inside an svg are drawn by chance
    size = WIDTH / DOTS, sum(heights) / DOTS
    picture = Figure(size, dpi=DOTS, layout="constrained", facecolor="white")
    panels = picture.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#dddddd")
    return picture, panels


def name_axes(panel, x, y):
    """The y axis has its name above it, where it can be read without turning the head."""
    panel.set_title(y, loc="left", fontsize=10)
    panel.set_xlabel(x)


def write_numbers(axis):
    """On a logarithmic axis: 20, 50, 100, no powers."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.set_major_locator(LogLocator(subs=[1, 2, 5]))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def colours_of(methods):  # a method has the same one in all pictures
    others = iter(OTHER_COLOURS * len(methods))
    names = [method.removesuffix(" + length penalty").removesuffix(", no latents") for method in methods]
    return [COLOURS[name] if name in COLOURS and name not in names[:i] else next(others)
            for i, name in enumerate(names)]


def save(picture, path, said):
    """Adds the legend, and what bars or faint lines are. The same numbers make the same file."""
    handles = {name: handle for panel in picture.axes
               for handle, name in zip(*panel.get_legend_handles_labels())}
    picture.legend(handles.values(), handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    picture.supxlabel(said, x=0.02, ha="left", fontsize=9, color="#555555")
    picture.savefig(path, metadata={"Date": None})
