"""What people look at; nothing here is in the paper, and a reader of the paper may skip it.

    say_what_runs, pace             before a run: its settings and its hours (its memory: card.py)
    step_line, warn, ..             during training
    stop_if_.., put_aside           what goes wrong without a crash: said, and set aside to be read
    table, controls_table, collect  results as tables
    curve, by_length, training      results as pictures (the only part that needs matplotlib)
    readable, nearest_words         an answer with its latents, as text (as an HTML page: page.py)
    write_chapters                  chapters written from plans, beside the true ones
"""
import html
import itertools
import json
import math
import os
import time
import typing

import numpy as np
import torch

import data
import engine
import runs
from litereason import LATENT, TAG, Rollout, generate, logprobs
from runs import UserError

GIB = 2.0**30


# ============================================================ before a run
def beside_released(settings, released):
    """The settings that are not the released ones, as text. None is all that there is."""
    def text(value):
        return "all" if value is None else value if isinstance(value, str) else f"{value:g}"

    others = [f"{name} {text(settings[name])} (released: {text(theirs)})"
              for name, theirs in released.items() if settings[name] != theirs]
    return f"not as released: {', '.join(others)}" if others else "all settings as released"


def say_what_runs(args, model, tokenizer, prompts, released, memory):
    """What is trained, on how much, what differs from the released settings and, of a real model, the hours
    that a run may need. released: the settings that apply, with their released values; memory: card.py's
    lines."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    longest = max(map(len, prompts))
    weights = "bf16 weights, fp32 masters on the host" if args.offload else "fp32 weights"
    print(f"{args.method} on {args.task}: {args.model}, {millions:.1f} M parameters, {model.device}, "
          f"{weights}; {len(prompts)} train prompts of up to {longest} tokens")
    print(f"{args.steps} steps, {args.minibatches} on each batch of {args.prompts * args.group} rollouts of "
          f"up to {args.max_new_tokens} tokens, {args.group} for each of {args.prompts} prompts")
    print(beside_released(vars(args), released), *memory, sep="\n", flush=True)
    if not runs.is_small(model) and not args.smoke:
        if model.device.type == "cpu":
            print("on a CPU --smoke makes a whole run in about ten minutes; this one: ", end="", flush=True)
        print(pace(model, tokenizer, prompts, args), flush=True)


class Pace(typing.NamedTuple):
    """What a machine takes for a model, in seconds; `measure` makes it."""
    rows: int  # answers decoded at once
    prompts: float  # to read their prompts
    step: float  # one decoding step of all of them
    alone: float  # one decoding step of one answer alone
    position: float  # one position of the update, forward and backward

    def decoding(self, answers, length):
        """Of so many answers of `length` slots each: full rounds, and one with what is left over."""
        rounds, rest = divmod(answers, self.rows)
        share = rest / self.rows
        step = self.alone + (self.step - self.alone) * share if rest else 0.0
        return (rounds + share) * self.prompts + (rounds * self.step + step) * length

    def updating(self, prompts, longest, answers, length):
        """The update on answers to `prompts` prompts of `longest` tokens, each read once."""
        return self.position * (prompts * longest + answers * length)


def pace(model, tokenizer, prompts, args):
    """How long a run may take on this machine, as text.

    An upper estimate: every rollout as long as allowed."""
    measured = measure(model, tokenizer, prompts, args)
    longest = max(map(len, prompts))
    rollouts = args.prompts * args.group
    sample = measured.decoding(rollouts, args.max_new_tokens)
    scored = measured.updating(args.prompts, longest, rollouts, args.max_new_tokens)
    batches = args.steps / args.minibatches
    hours = batches * (sample + scored) / 3600
    return (f"time at most, from a short measurement: {sample:.1f} s to sample and {scored:.1f} s to update "
            f"per rollout batch; {batches:.0f} batches: {hours:.1f} hours, "
            f"without evaluation and stages 1 and 2")


def measure(model, tokenizer, prompts, args):
    """-> Pace. Measured after a warm-up: as many rows as are decoded at once, with the longest prompts, for a
    few steps; and one forward and backward pass of the update at its full size. On a CPU less of both, where
    one group and one rollout take minutes already: more at once would be a little faster."""
    steps = 64 if model.graphs else 16  # a recording serves 64
    at_once = min(args.prompts, max(1, args.rows // args.group)) if model.device.type == "cuda" else 1
    longest = sorted(prompts, key=len)[-at_once:]

    def decode(n_slots):
        return generate(model, tokenizer, longest, args.group, n_slots)

    def decode_one(n_slots):
        return generate(model, tokenizer, longest[-1:], 1, n_slots)

    def step_of(decode):
        """-> (seconds with one slot, seconds per further slot)"""
        one_slot = seconds_of(model, lambda: decode(1))
        all_slots = seconds_of(model, lambda: decode(steps + 1))
        return one_slot, max(0.0, all_slots - one_slot) / steps

    update(model, decode(2)[:1])  # the first call of everything is slow
    to_begin, step = step_of(decode)
    _, alone = step_of(decode_one)
    rollouts = longest_rollouts(model, longest[-1], args)
    # of this size too; without it the forecast of the update was ten times too long on an H100
    update(model, rollouts)
    one_pass = seconds_of(model, lambda: update(model, rollouts))
    positions = len(longest[-1]) + sum(len(r.slots) for r in rollouts)
    return Pace(at_once * args.group, to_begin, step, alone, one_pass / positions)


def update(model, rollouts):
    """A pass of the update, forward and backward, that leaves no gradient."""
    logprobs(model, rollouts)[0].sum().backward()
    engine.wait_for_gradients(model)
    engine.forget_gradients(model)


def longest_rollouts(model, prompt, args):
    """As many rollouts of one prompt, of the length allowed, as the update reads in one pass; on a CPU
    one."""
    room = args.tokens_per_forward - len(prompt) if model.device.type == "cuda" else 0
    n = max(1, min(args.group, room // args.max_new_tokens))
    slots = (prompt * args.max_new_tokens)[: args.max_new_tokens]
    return [Rollout(prompt, slots, torch.zeros(0, model.config.hidden_size))] * n


def seconds_of(model, action):
    """Of an action; on CUDA until the device has done it."""

    def now():
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.time()

    began = now()
    action()
    return now() - began


# ============================================================ during training
def step_line(m, steps):
    """A step of training in one line. m: its metrics (train_rl.metrics says what they are); steps: of the
    whole run."""
    norm = math.nan if m["grad_norm"] is None else m["grad_norm"]
    seconds = m["seconds"]
    memory = m["peak_memory_gib"]
    fields = [
        f"step {m['step']:4d}/{steps}",
        f"reward {m['reward']:6.3f}",
        f"text {m['text_tokens']:6.1f}",
        f"latent {m['latent_steps']:5.1f}",
        f"tags {m['tags']:4.2f}",
        f"z size {'-' if m['z_size'] is None else format(m['z_size'], '.2g'):>4s}",
        f"zero-var {m['zero_variance']:4.2f}",
        f"cut {m['truncated']:4.2f}",
        f"gnorm {norm:6.3f}",
        f"dlogp {m['max_dlogp']:.0e}",
        f"{sum(seconds.values()):5.1f}s (sample {seconds.get('sample', 0):.1f})",
        f"GiB {memory.get('sample', 0):.2f} {memory['update']:.2f}"]
    if m["no_verdict"]:
        fields.append(f"no verdict {m['no_verdict']:.2f}")
    if m["refresh_loss"] is not None:
        fields.append(f"refresh loss {m['refresh_loss']:.3f}")
    return " | ".join(fields)


def warn(m, latent, n_groups, texts):
    """Prints what is wrong with a step, if anything is. m: its metrics; latent: whether tags run latents;
    texts: what its rollouts wrote."""
    warnings = []
    if latent and m["tag_share"] == 0:
        warnings.append(f"0 of {n_groups} groups' rollouts ran a tag: there is no latent reasoning left")
    if m["zero_variance"] == 1:
        warnings.append(f"in all {n_groups} groups every rollout earned the same (mean {m['reward']:.3f}): "
                        f"nothing to learn from")
    if len(set(texts)) == 1:
        warnings.append(f"all {len(texts)} rollouts wrote the same: {texts[0][:60]!r}")
    elif not any(TAG.sub("", text).strip() for text in texts):
        warnings.append(f"all {len(texts)} rollouts wrote tags and nothing else")
    for warning in warnings:
        print(f"warning: step {m['step']}: {warning}", flush=True)


def warn_of_validation(metrics, val):
    """After a check on the val examples: prints a warning if, since the check before, the train reward rose
    and validation fell by more than half the width of its interval.

    metrics: all steps so far, this one included; val: the result of this check."""
    checks = [-1] + [i for i, m in enumerate(metrics) if m["val_accuracy"] is not None]
    if len(checks) < 3:
        return
    start, middle, end = checks[-3:]  # lines of the file: two spans between three checks
    before = _mean_reward(metrics[start + 1 : middle + 1])
    since = _mean_reward(metrics[middle + 1 : end + 1])
    earlier = metrics[middle]["val_accuracy"]
    low, high = val["accuracy_ci95"]
    half = (high - low) / 2
    if since > before and earlier - val["accuracy"] > half:
        print(f"warning: step {end + 1}: since step {middle + 1} the train reward rose from {before:.3f} to "
              f"{since:.3f}, but the accuracy on {val['n_examples']} val examples fell from {earlier:.3f} to "
              f"{val['accuracy']:.3f} (plus or minus {half:.3f})", flush=True)


def _mean_reward(metrics):
    return sum(m["reward"] for m in metrics) / len(metrics)


# ============================================================ tripwires: what goes wrong without a crash
# Most that sampler and scorer may differ, by whether the model computes in bf16.
DLOGP = {False: 1e-2, True: 2.0}


def check_answers(task, examples):
    """Before the first step, on real rows: the refresh's target, the label and the reward agree. For tasks
    with `answer`."""
    marker = data.opening_of(task)
    for i, example in enumerate(examples if hasattr(task, "answer") else []):
        answer = task.answer(example)
        earned = data.score(task, [example], ["Some reasoning.\n" + answer])[0]
        if earned != 1 or not answer.startswith(marker):
            raise UserError(f"train example {i}: its own answer {answer!r} earns {earned:g}, not 1, or does "
                            f"not begin with {marker!r}: the label, the answer and the reward of this task "
                            "do not agree")


def warn_of_unknown_words(tokenizer, prompts):
    """A tokenizer of whole words turns others into its unknown token, silently."""
    unknown = tokenizer.unk_token_id
    counts = [prompt.count(unknown) for prompt in prompts] if unknown is not None else [0]
    if any(counts):
        worst = max(range(len(counts)), key=counts.__getitem__)
        print(f"warning: {sum(map(bool, counts))} of {len(prompts)} prompts have words that this model's "
              f"tokenizer does not know; the worst is number {worst}, with {counts[worst]}", flush=True)


def stop_if_a_reward_is_not_finite(args, step, state, index):
    bad = (~state.earned.isfinite()).nonzero().flatten().tolist()
    if bad:
        reward = float(state.earned[bad[0]])
        prompt = index[state.rollouts[bad[0]].prompt]
        aside = put_aside(args.out, step, state.rollouts, state.earned, bad)
        raise UserError(f"step {step + 1}: the reward of a rollout of train prompt {prompt} is {reward}; "
                        f"its text is in {aside}")


def stop_if_sampler_and_scorer_differ(args, step, model, state, index, gap):
    """Before an update only: after one they must differ."""
    largest, worst = gap
    allowed = DLOGP[model.bf16 or args.offload]
    if largest > allowed:
        prompt = index[state.rollouts[worst].prompt]
        aside = put_aside(args.out, step, state.rollouts, state.earned, [worst])
        raise UserError(f"step {step + 1}: sampler and scorer differ by {largest:.3g} in a log-prob of "
                        f"rollout {worst} (train prompt {prompt}); more than {allowed:g} means that what is "
                        f"trained is not what was sampled; it is in {aside}")


def set_aside_if_skipped(args, step, state, chosen, step_is_finite):
    if not step_is_finite:
        aside = put_aside(args.out, step, state.rollouts, state.earned, chosen)
        print(f"warning: step {step + 1}: a loss, gradient or latent is not finite; step skipped, "
              f"{state.carried['skipped']} so far; its rollouts are in {aside}", flush=True)


def stop_if_three_in_a_row_were_skipped(args, state):
    if state.carried["skipped_in_a_row"] >= 3:
        raise UserError(f"steps {state.step - 2} to {state.step} were not finite and were skipped: stopped; "
                        f"the weights before them are in {args.out}/state-{state.step}")


def put_aside(out, step, rollouts, earned, which):
    """Writes the rollouts that caused trouble to a file, to be read -> its path. which: their numbers."""
    path = os.path.join(out, "bad-rollouts.json")
    rows = []
    for b in which:
        rollout = rollouts[b]
        rows.append({
            "step": step + 1,
            "rollout": b,
            "reward": float(earned[b]),
            "latents_finite": bool(rollout.latents.isfinite().all()),
            "prompt_ids": rollout.prompt_ids,
            "slots": rollout.slots,
            "text": rollout.text,
            "logprobs": rollout.logprobs.tolist()})
    runs.write_json(path, rows)
    return path


# ============================================================ tables
def what_was_asked(args, n, samplings):
    """The line above a table of eval.py: task, split, number of examples and the sampling (or samplings, by
    name)."""
    each = f", {args.samples} answers each" if args.samples > 1 else ""
    words = [sampling_in_words(sampling) for sampling in samplings.values()]
    if len(words) > 1:
        words = [f"{name}: {text}" for name, text in zip(samplings, words)]
    return f"{args.task}, {args.split} split, {n} examples{each}, {'; '.join(words)}, seed {args.seed}"


def sampling_in_words(sampling):
    """sampling: arguments of generate."""
    if sampling["temperature"] == 0:
        return "greedy"
    cut = f"top-p {sampling['top_p']:g}, top-k {sampling['top_k'] or 'off'}"
    return f"temperature {sampling['temperature']:g}, {cut}"


def table(rows, measure="accuracy"):
    """rows: [(name, result of eval.evaluate)] -> a table as text, which is Markdown as well, and under it
    what the task itself reports. measure: what the task's scores are called. The columns:

    accuracy    or `measure`: mean reward, and its 95 % interval over examples
    tokens      per answer: text + latent
    text        sampled tokens per answer, those of the tags included
    latent      latent steps per answer
    z size      median size of what latent steps fed, in sizes of an embedding
    tags        tags per answer that ran latents
    cut off     share of answers that reached the length limit
    positions   computed per answer, those of its prompt and those wasted on rows that had ended included
    seconds     for all answers together
    """
    lines = [f"| model | {measure} | 95 % interval | tokens | text | latent "
             "| z size | tags | cut off | positions | seconds |",
             f"|{'---|' * 11}"]
    width = max(len(name) for name, _ in rows)
    for name, row in rows:
        cells = [
            *_first_cells(name, width, row),
            f"{row['z_size']:.3g}" if row.get("z_size") else "",  # earlier tables have none
            f"{row['tags']:.2f}",
            f"{row['truncated']:.3f}",
            f"{row['forward_positions']:.1f}",
            f"{row['seconds']:.1f}"]
        lines.append(_table_line(cells))
    for name, row in rows:
        keys = list(row)
        own = keys[keys.index("seconds") + 1 :]  # the task's own figures come after the seconds
        if own:
            figures = [f"{key} {_number_or_interval(row[key])}" for key in own]
            lines.append(f"\n{name.strip()}: {', '.join(figures)}")
    return "\n".join(lines)


def controls_table(rows, measure="accuracy"):
    """rows: [(control, result)] of eval.run_controls -> a table as text. What is gained is gained over the
    plain run, which comes first; eval.judge says what differs. measure: what the task's scores are called."""
    lines = ["| control | accuracy | 95 % interval | tokens | text | latent "
             "| accuracy gained | 95 % interval | p | Holm's p "
             "| tokens gained | 95 % interval | p | Holm's p | differs in |",
             f"|{'---|' * 15}"]
    width = max(len(name) for name, _ in rows)
    for i, (name, row) in enumerate(rows):
        cells = _first_cells(name, width, row)
        if i == 0:
            lines.append(_table_line(cells + [""] * 9))
            continue
        gained = row["against_plain"]
        for what, digits in (("accuracy", "+.3f"), ("tokens", "+.1f")):
            cells += [
                f"{gained[what]:{digits}}",
                _interval(gained[f"{what}_ci95"], digits),
                f"{gained[f'{what}_p']:.2g}",
                f"{gained[f'{what}_holm']:.2g}"]
        lines.append(_table_line([*cells, what_differs(gained)]))
    text = "\n".join([*lines, "", HOW_IT_IS_TESTED.format(n=2 * (len(rows) - 1))])
    return text.replace("accuracy", measure)


HOW_IT_IS_TESTED = """p: McNemar's (accuracy) and that of sign flips (tokens), paired by example; Holm's p \
is corrected for all {n} tests of
this table. "differs in": Holm's p is below 0.05 and the 95 % interval (bootstrap) leaves 0 out."""


def what_differs(comparison):
    """In words, of a comparison that eval.judge has judged."""
    if comparison["accuracy_differs"]:
        return "accuracy and tokens" if comparison["tokens_differs"] else "accuracy, not tokens"
    return "tokens, not accuracy" if comparison["tokens_differs"] else "nothing"


def _first_cells(name, width, row):
    """Those that both tables have."""
    return [
        f"{name:{width}}",
        f"{row['accuracy']:.3f}",
        _interval(row["accuracy_ci95"]),
        f"{row['tokens']:.1f}",
        f"{row['text_tokens']:.1f}",
        f"{row['latent_steps']:.1f}"]


def _table_line(cells):
    return f"| {' | '.join(cells)} |"


def _interval(numbers, digits=".3f"):
    return " to ".join(f"{x:{digits}}" for x in numbers)


def _number_or_interval(value):
    return _interval(value) if isinstance(value, list) else f"{value:.3f}"


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
METHODS = {"litereason": "LiteReason", "grpo": "RL without latents", "tag": "RL with tags, no latents"}
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
    settings = runs.run_settings(directory)
    if settings.get("script") != "train_rl.py":
        return path
    return METHODS[settings["method"]] + bracket + sampling


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
    settings = runs.run_settings(directory)
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


# ============================================================ an answer as text
def pieces(tokenizer, rollout):
    """A rollout's slots as a list of texts and, where a block of latents stands, of their number."""
    out = []
    for is_latent, block in itertools.groupby(rollout.slots, LATENT.__eq__):
        slots = list(block)
        out.append(len(slots) if is_latent else tokenizer.decode(slots))
    return out


def readable(tokenizer, rollout):
    """A rollout's text with its latent blocks shown as such: .. </implicit_thought>[3 latents] .."""
    text = ""
    for piece in pieces(tokenizer, rollout):
        text += piece if isinstance(piece, str) else f"[{_n_latents(piece)}] "
    return text if rollout.finished else text + " [cut off]"


def _n_latents(n):
    return f"{n} latent{'s' * (n > 1)}"


@torch.no_grad()
def read_out(model, tokenizer, latents, n_words=3):
    """What the vocabulary says of latents (n, D) -> [(near, length, head)], one for each.

    near      the n_words words whose embeddings point its way: [(word, cosine)]
    length    its norm, in units of the mean norm of an embedding
    head      the n_words words that the LM head says if the latent goes through the final norm:
              [(word, probability)]
    """
    embed = model.get_input_embeddings()
    ids = torch.arange(embed.num_embeddings, device=model.device)
    vocabulary = embed(ids).float()  # (V, D); not embed.weight: Gemma scales
    z = latents.to(vocabulary.device).float()
    directions = torch.nn.functional.normalize(vocabulary, dim=-1)
    cosines = torch.nn.functional.normalize(z, dim=-1) @ directions.T  # (n, V)
    with engine.autocast(model):
        logits = model.lm_head(model.model.norm(z.to(model.dtype)))
        probabilities = logits.float().softmax(-1)  # (n, V)
    lengths = z.norm(dim=-1) / vocabulary.norm(dim=-1).mean()  # (n,)
    near = _top_words(tokenizer, cosines, n_words)
    head = _top_words(tokenizer, probabilities, n_words)
    return list(zip(near, lengths.tolist(), head))


def _top_words(tokenizer, scores, n_words):
    """scores (n, V) -> for each row its best [(word, score)]."""
    top = scores.topk(n_words)
    return [[(tokenizer.decode([i]), value) for i, value in zip(ids, values)]
            for ids, values in zip(top.indices.tolist(), top.values.tolist())]


def nearest_words(model, tokenizer, latents, n_words=3):
    """The same with the words as text."""
    lines = read_out(model, tokenizer, latents, n_words)
    return [(_listed(near), length, _listed(head)) for near, length, head in lines]


def _listed(words):
    return ", ".join(f"{word!r} {value:.2f}" for word, value in words)


# ============================================================ chapters
def write_chapters(task, examples, plans, n, sampling, file):
    """For people to read: the frozen LM writes the next chapter of n examples with its plan, without one, and
    with the plan of the next example, in a table beside the true one.

    The random numbers are the same for all three, and none is longer than the true chapter. After each
    example the file is flushed, so that a stop loses nothing."""
    model, tokenizer = task.scorer()
    for i, example in enumerate(examples[:n]):
        own_plan = plans[i]
        other_plan = plans[(i + 1) % len(plans)]
        with engine.autocast(model):
            chapters = [_write_chapter(model, tokenizer, task, example, plan, i, sampling)
                        for plan in (own_plan, "", other_plan)]
        cells = [_in_a_cell(text) for text in (*chapters, example["chapter"])]
        file.write(f"\n## {example.get('book', 'Story')}, {example.get('number', i + 1)}\n\n"
                   f"Its plan: {_in_a_cell(own_plan) or '(none)'}\n\n"
                   f"The other plan: {_in_a_cell(other_plan) or '(none)'}\n\n"
                   f"| with its plan | without a plan | with the other plan | the true chapter |\n"
                   f"|---|---|---|---|\n"
                   f"{_table_line(cells)}\n")
        file.flush()


def _write_chapter(model, tokenizer, task, example, plan, seed, sampling):
    prompt = runs.encode_text(tokenizer, task.chapter_prompt(example, plan), begins=True)
    true_length = len(runs.encode_text(tokenizer, example["chapter"], begins=True))
    room = model.config.max_position_embeddings - len(prompt)
    rollout, = generate(model, tokenizer, [prompt], 1, max(1, min(true_length, room)), latent="none",
                        generator=torch.Generator().manual_seed(seed), **sampling)
    return rollout.text


def _in_a_cell(text):
    """As the text of one cell of a Markdown table."""
    return html.escape(text.strip()).replace("|", "&#124;").replace("\n", "<br>")
