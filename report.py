"""What people look at; nothing here is in the paper, and a reader of the paper may skip it.

    say_what_runs, pace             before a run: its settings and its hours (its memory: card.py)
    step_line, warn, ..             during training
    stop_if_.., put_aside           what goes wrong without a crash: said, and set aside to be read
    table, controls_table, collect  results as tables
    curve, by_length, training      results as pictures (the only part that needs matplotlib)
    readable, nearest_words         an answer with its latents, as text
    answer_on_page, page            the same as an HTML page
    write_chapters                  chapters written from plans, beside the true ones
"""
import html
import itertools
import json
import math
import os
import re
import time
import typing

import numpy as np
import torch

import data
import engine
import runs
from litereason import CLOSE, LATENT, OPEN, TAG, Rollout, generate, logprobs
from runs import UserError

GIB = 2.0**30


# ============================================================ before a run
def as_text(value):
    """A setting's value."""
    return value if isinstance(value, str) else f"{value:g}"


def say_what_runs(args, model, tokenizer, task, prompts, released, ours):
    """The sizes, the settings beside the released ones and, of a real model, the work and the hours that a
    run may need."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    longest = max(map(len, prompts))
    weights = "bf16 weights, fp32 masters on the host" if args.offload else "fp32 weights"
    print(f"{args.method} on {args.task}: {args.model}, {millions:.1f} M parameters, {model.device}, "
          f"{weights}; {len(prompts)} train prompts of up to {longest} tokens")
    settings = []
    for name, theirs in released.items():
        value = getattr(args, name)
        beside = f" (released: {as_text(theirs)})" if name not in ours and value != theirs else ""
        settings.append(f"{name} {as_text(value)}{beside}")
    print("settings: " + ", ".join(settings))
    if not runs.is_small(model):
        batch = args.prompts * args.group
        positions = batch * args.max_new_tokens + args.prompts * longest
        print(f"per rollout batch: {batch} rollouts, {min(batch, args.rows)} rows at a time, up to "
              f"{args.max_new_tokens} decoding steps; the update reads up to {positions:,} positions, "
              f"{args.tokens_per_forward:,} at a time", flush=True)
        print(pace(model, tokenizer, prompts, args), flush=True)


def _groups_at_once(args):
    """How many groups are decoded together."""
    return max(1, args.rows // args.group)


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


def measure(model, tokenizer, prompts, args, steps=16):
    """-> Pace. Measured after a warm-up: as many rows as are decoded at once, with the longest prompts, for a
    few steps; and one forward and backward pass of the update at its full size."""
    at_once = min(args.prompts, _groups_at_once(args))
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

    def update(rollouts):
        logprobs(model, rollouts)[0].sum().backward()
        engine.wait_for_gradients(model)
        engine.forget_gradients(model)

    update(decode(2)[:1])  # the first call of everything is slow
    to_begin, step = step_of(decode)
    _, alone = step_of(decode_one)
    rollouts = _longest_rollouts(model, longest[-1], args)
    one_pass = seconds_of(model, lambda: update(rollouts))
    positions = len(longest[-1]) + sum(len(r.slots) for r in rollouts)
    return Pace(at_once * args.group, to_begin, step, alone, one_pass / positions)


def _longest_rollouts(model, prompt, args):
    """As many rollouts of one prompt, of the length allowed, as the update reads in one pass."""
    room = args.tokens_per_forward - len(prompt)
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
        f"zero-var {m['zero_variance']:4.2f}",
        f"cut {m['truncated']:4.2f}",
        f"gnorm {norm:6.3f}",
        f"dlogp {m['max_dlogp']:.0e}",
        f"{sum(seconds.values()):5.1f}s (sample {seconds.get('sample', 0):.1f})",
        f"GiB {memory.get('sample', 0):.2f} {memory['update']:.2f}"]
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
    marker = getattr(task, "ANSWER", "\\boxed{")
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


def table(rows):
    """rows: [(name, result of eval.evaluate)] -> a table as text, which is Markdown as well, and under it
    what the task itself reports. Its columns:

    accuracy    mean reward, and its 95 % interval over examples
    tokens      per answer: text + latent
    text        sampled tokens per answer, those of the tags included
    latent      latent steps per answer
    tags        tags per answer that ran latents
    cut off     share of answers that reached the length limit
    positions   computed per answer, those of its prompt and those wasted on rows that had ended included
    seconds     for all answers together
    """
    lines = ["| model | accuracy | 95 % interval | tokens | text | latent "
             "| tags | cut off | positions | seconds |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    width = max(len(name) for name, _ in rows)
    for name, row in rows:
        cells = [
            *_first_cells(name, width, row),
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


def controls_table(rows):
    """rows: [(control, result)] of eval.run_controls -> a table as text. What is gained is gained over the
    plain run, which comes first; eval.judge says what differs."""
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
    return "\n".join([*lines, "", HOW_IT_IS_TESTED.format(n=2 * (len(rows) - 1))])


HOW_IT_IS_TESTED = """p: McNemar's (accuracy) and that of sign flips (tokens), paired by example; Holm's p is \
corrected for all {n} tests of
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
COLOURS = ["#1f5f99", "#c45a00", "#2a7f2a", "#b3261e", "#6f4aa8",  # dark enough for text
           "#7a4b3a", "#b8479b", "#555555", "#7d7d00", "#0f7f8c"]
COSTS = {  # key of a result: (what it is, in which unit)
    "tokens": ("tokens per answer (text + latents)", 1),
    "flops": ("forward GFLOPs per answer", 1e-9),
    "seconds_each": ("seconds per answer, full batch", 1),
    "seconds_alone": ("seconds per answer, decoded alone", 1)}
TRAINING_CURVES = ("reward", "tokens per rollout (text + latents)", "latent steps per rollout",
                   "share of rollouts with a tag")


def figure(path, panels, rows=1, height=4.2):
    """An empty figure of matplotlib, which nothing else here needs -> (figure, its axes (rows, panels)). One
    panel is as wide as a page."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from e
    if not path.endswith((".svg", ".png")):
        raise UserError(f"--plot is {path!r}; it must end in .svg or .png")
    rcParams["svg.hashsalt"] = "litereason"  # else the names inside an svg are drawn by chance
    width = 7.2 if panels == 1 else 4.8 * panels
    picture = Figure((width, height * rows), dpi=120, layout="constrained")
    return picture, picture.subplots(rows, panels, squeeze=False)


def save_figure(picture, path):
    """Without the date: the same numbers make the same file."""
    metadata = {"Date": None} if path.endswith(".svg") else None
    try:
        picture.savefig(path, metadata=metadata)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def curve(rows, path, costs=("tokens",)):
    """Draws score against those of the costs that any row has, a panel each. rows: from collect.

    Bars: see _bar."""
    for _, row in rows:
        if "seconds" in row and "n_examples" in row:  # older tables have no seconds_each
            answers = row["n_examples"] * row.get("samples", 1)
            row.setdefault("seconds_each", row["seconds"] / answers)
    panels = {cost: _dots(rows, cost) for cost in costs}
    panels = {cost: dots for cost, dots in panels.items() if dots}
    if not panels:
        raise UserError(f"no row has any of these costs: {', '.join(costs)}")

    height = 4.2 + 0.1 * max(0, len(rows) - 6)
    picture, axes = figure(path, len(panels), height=height)
    said = {_bar(row, "accuracy")[1] for _, row in rows}
    picture.supxlabel(f"bars: {'; '.join(sorted(said))}", fontsize=9)
    by_name = dict(rows)
    for panel, (cost, dots) in zip(axes[0], panels.items()):
        for name, x, y, colour in dots:
            vertical, _ = _bar(by_name[name], "accuracy")
            panel.plot([x, x], vertical, color=colour, linewidth=1.5)
            horizontal, _ = _bar(by_name[name], cost)
            if horizontal:
                panel.plot([end * COSTS[cost][1] for end in horizontal], [y, y], color=colour, linewidth=1.5)
            panel.plot(x, y, "o", color=colour)
        most = max(x for _, x, _, _ in dots)
        panel.set(xlabel=COSTS[cost][0], ylabel="score", xlim=(0, 1.1 * most or 1))
        panel.margins(y=0.1)
        panel.locator_params(axis="x", nbins=6)
        panel.grid(alpha=0.3)
    picture.draw_without_rendering()  # from here on the axes stand where they will stand
    for panel, dots in zip(axes[0], panels.values()):
        label(panel, dots)
    save_figure(picture, path)


def _bar(row, what):
    """-> ((low, high) or None, what they are) of a row's accuracy or cost. Results of several runs that have
    an interval of their tokens have intervals that count seeds (results/evidence.py); other means of runs
    have only the lowest and the highest of them, and only of the accuracy."""
    if "tokens_ci95" in row:
        return row.get(f"{what}_ci95"), "95 % interval over seeds and stories"
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
    for (name, row), colour in zip(rows, itertools.cycle(COLOURS)):
        if row.get(cost) is not None:
            dots.append((name, row[cost] * unit, row["accuracy"], colour))
    return dots


def by_length(rows, path, xlabel="hops from the question to the answer"):
    """Draws accuracy (top) and tokens (bottom) against the length of the chain, a line for each method, with
    its name at its end.

    rows: dicts with method, length, accuracy, accuracy_ci95, tokens and tokens_ci95."""
    picture, axes = figure(path, 1, rows=2, height=3.1)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    ends = {"accuracy": [], "tokens": []}  # of the lines: (method, x, y, colour)
    for i, (method, colour) in enumerate(zip(methods, itertools.cycle(COLOURS))):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["length"])
        aside = 0.012 * (lengths[-1] - lengths[0]) * (i - (len(methods) - 1) / 2)  # bars beside each other
        x = [row["length"] + aside for row in own]
        for panel, what in zip(axes[:, 0], ends):
            panel.plot(x, [row[what] for row in own], "o-", color=colour, linewidth=1.5, markersize=4)
            for at, row in zip(x, own):
                panel.plot([at, at], row[f"{what}_ci95"], color=colour, linewidth=1.2)
            ends[what].append((method, x[-1], own[-1][what], colour))
    axes[0, 0].set(ylabel="accuracy")
    axes[1, 0].set(ylabel="tokens per answer", xlabel=xlabel, ylim=(0, None))
    for panel in axes[:, 0]:
        panel.set_xticks(lengths)
        panel.grid(alpha=0.3)
    picture.supxlabel("bars: 95 % interval over seeds and stories", fontsize=9)
    for panel, what in zip(axes[:, 0], ends):
        label_ends(panel, ends[what])
    save_figure(picture, path)


def label_ends(panel, ends):
    """Writes the names of lines beside their ends (name, x, y, colour), at the right; those that would cover
    each other are moved up."""
    low, high = panel.get_ylim()
    inches = panel.figure.get_size_inches()[1] / len(panel.figure.axes)
    line = (high - low) * 0.17 / inches  # the height of a line of text, in the panel's units
    free = low
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        at = max(y, free)
        free = at + line
        panel.annotate(name, (x, y), (1.02, at), textcoords=panel.get_yaxis_transform(), color=colour,
                       fontsize=9, va="center",
                       arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": colour})


def label(panel, dots):
    """Writes the names of dots (name, x, y, colour) beside them, from left to right."""
    points_per_pixel = 72 / panel.figure.dpi
    size_of_text = 9 if len(panel.figure.axes) == 1 else 8
    taken = [line.get_window_extent().padded(4) for line in panel.lines]
    for name, x, y, colour in sorted(dots, key=lambda dot: dot[1]):
        style = {"color": colour, "fontsize": size_of_text, "textcoords": "offset points", "ha": "center",
                 "va": "center"}
        trial = panel.annotate(name, (x, y), (0, 0), **style)
        size = trial.get_window_extent()
        trial.remove()
        dot = panel.transData.transform((x, y))
        distance, offset, box = _free_place(size, dot, taken, panel.get_window_extent())
        taken.append(box.padded(2))
        line = None
        if distance > 14:
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": colour, "shrinkA": 0}
        note = panel.annotate(name, (x, y), offset * points_per_pixel, arrowprops=line, **style)
        note.set_in_layout(False)


def _free_place(size, dot, taken, frame):
    """The nearest place around a dot where its name covers no name, dot or bar and stays within the frame; if
    there is none, the last one tried -> (distance, offset from the dot, box), in pixels. size: the name's
    box, wherever it is."""
    half = np.array([size.width / 2, size.height / 2])
    for i in range(16 * 30):  # places on growing circles, from the right side on
        angle = 2 * math.pi * (i % 16) / 16
        distance = 7 + 7 * (i // 16)
        offset = np.array([math.cos(angle), math.sin(angle)]) * (distance + half)
        box = size.translated(*(dot + offset - size.min - half))
        is_inside = np.all(frame.min <= box.min) and np.all(box.max <= frame.max)
        if is_inside and not any(map(box.overlaps, taken)):
            break
    return distance, offset, box


def training(directories, path):
    """Draws metrics.jsonl of several runs: reward, tokens, latent steps and tag share against steps (top) and
    against the tokens sampled in training (bottom)."""
    picture, axes = figure(path, len(TRAINING_CURVES), 2)
    for directory in directories:
        try:
            _draw_run(axes, directory)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{directory} is not a run of train_rl.py: "
                            f"metrics.jsonl or config.json ({e})") from e
    lines = axes[0, 0].get_legend_handles_labels()
    picture.legend(*lines, loc="outside lower center", ncols=min(6, len(directories)))
    save_figure(picture, path)


def _draw_run(axes, directory):
    """The curves of one run into the axes (2, 4)."""
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
    against_steps = (axes[0], steps, "step")
    against_tokens = (axes[1], millions, "tokens sampled in training, millions (text + latents)")
    for panels, x, xlabel in (against_steps, against_tokens):
        for panel, ylabel, y in zip(panels, TRAINING_CURVES, (reward, tokens, latents, tag_share)):
            panel.plot(x, y, label=os.path.normpath(directory), linewidth=1.2)
            panel.set(xlabel=xlabel, ylabel=ylabel)
            panel.grid(alpha=0.3)
            if ylabel.startswith("share"):
                panel.set(ylim=(-0.02, 1.02))


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


# ============================================================ answers as a page
# Light and dark, no script: the Content-Security-Policy forbids any, so that a story cannot bring one even if
# an escape were forgotten.
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Answers with their latents</title><style>
:root { color-scheme: light dark;
  --back: #fdfdfb; --text: #1c1c1c; --soft: #5c5c5c; --line: #d4d4ce; --box: #f1f1ec; --latent: #6a3fb0;
  --ok: #1d6b34; --no: #a8271c }
@media (prefers-color-scheme: dark) { :root {
  --back: #17181a; --text: #e8e6e1; --soft: #a5a39d; --line: #3d3f43; --box: #222428; --latent: #c0a2f5;
  --ok: #77cf91; --no: #ff9385 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: .75rem; max-width: 60rem;
  background: var(--back); color: var(--text); font: 1rem/1.6 system-ui, sans-serif }
h1 { font-size: 1.5rem }
h2 { font-size: 1.25rem; margin-top: 2.5rem; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 0 0 .5rem }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: 1rem 0 }
article > p { margin: 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
.prompt { color: var(--soft); padding-left: .75rem; border-left: 3px solid var(--line) }
.tag, .soft { color: var(--soft); font-weight: normal }
.tag { font-size: .8rem }
.right { color: var(--ok) }
.wrong { color: var(--no) }
summary { cursor: pointer }
summary:focus-visible { outline: 3px solid var(--latent); outline-offset: 2px }
.latents { display: inline-block; white-space: normal; margin: 0 .2rem }
.latents[open] { display: block; margin: .5rem 0 }
.latents summary { display: inline-block; color: var(--latent);
  border: 1px solid; border-radius: 1rem; padding: 0 .7rem; line-height: 1.4 }
.latents summary::-webkit-details-marker { display: none }
.latents summary::before { content: "\\25b8  " }
.latents[open] summary::before { content: "\\25be  " }
table { border-collapse: collapse; width: 100%; font-size: .875rem; margin-top: .5rem; background: var(--box) }
th, td { text-align: left; vertical-align: top; padding: .35rem .4rem; border-top: 1px solid var(--line) }
td div { display: flex; align-items: baseline; justify-content: space-between; gap: .4rem; max-width: 15rem }
small, td { white-space: nowrap }
code { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; line-height: 1.4 }
small, .number { font-variant-numeric: tabular-nums; color: var(--soft) }
.bar { display: block; min-width: 3.5rem; height: .5rem; margin-top: .3rem; border: 1px solid var(--line);
  background: linear-gradient(var(--text), var(--text)) 25% 0 / 2px 100% no-repeat }
.bar i { display: block; height: 100%; background: var(--latent); opacity: .75 }
</style></head><body><h1>Answers with their latents</h1><details open><summary>How to read this page</summary>
<p>Each box is one answer; what the model was asked unfolds at its top. Where the model stopped writing and
ran latent steps stands <b>4 latents</b>: unfold it for one line per latent. <b>Head</b>: the words, with
their probability, that the LM head reads off the latent if it goes through the final norm.
<b>Embedding</b>: the words whose embeddings point its way, with the cosine. <b>Length</b>: how many times
as long as the mean embedding; the bar is logarithmic, its mark is at 1, a quarter of it is a factor of 100.
The words near a latent do not prove what it does; eval.py --controls tests that.</p>
</details>"""


def answer_on_page(model, tokenizer, task, example, rollout, number):
    """One answer as HTML. Every text of a story or a model goes through html.escape."""
    reward = data.score(task, [example], [rollout.text])[0]
    verdict = f"reward {reward:.2f}"
    gold = ""
    if hasattr(task, "answer"):
        is_right = reward > 0
        verdict = '<span class="right">✓ right</span>' if is_right else '<span class="wrong">✗ wrong</span>'
        gold = f'<p class="soft">Right would be: {html.escape(task.answer(example))}</p>'

    latents = read_out(model, tokenizer, rollout.latents)
    lines = [_latent_on_page(i + 1, *latent) for i, latent in enumerate(latents)]
    body = ""
    latents_shown = 0
    for piece in pieces(tokenizer, rollout):
        if isinstance(piece, str):
            body += _text_on_page(piece)
        else:
            body += _block_on_page(lines[latents_shown : latents_shown + piece])
            latents_shown += piece

    n_tokens = f"{len(rollout.slots)} tokens, {rollout.n_latents} of them latents"
    cut_off = "" if rollout.finished else ", cut off"
    prompt = html.escape(tokenizer.decode(rollout.prompt_ids))
    return (f'<article><h3>{number}. {verdict} <span class="soft">· {n_tokens}{cut_off}</span></h3>'
            f"<details><summary>What it was asked ({len(rollout.prompt_ids)} tokens)</summary>"
            f'<div class="text prompt">{prompt}</div></details>'
            f'<div class="text">{body}</div>{gold}</article>\n')


def _text_on_page(text):
    """Escaped; the ends of tags are made small."""
    tag_ends = f"({html.escape(OPEN)}|{html.escape(CLOSE)})"
    return re.sub(tag_ends, r'<span class="tag">\1</span>', html.escape(text))


def _block_on_page(lines):
    """A block of latents, to be unfolded. lines: of its table."""
    return (f'<details class="latents"><summary>{_n_latents(len(lines))}</summary>'
            f"<table><thead><tr><th>#</th><th>Head</th><th>Embedding</th><th>Length</th></tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></details>")


def _latent_on_page(number, near, length, head):
    """A line of a block's table, from what read_out says of the latent."""
    decades = math.log10(max(length, 1e-9))
    width = 12.5 * min(8, max(0, 2 + decades))  # percent: 0.01 is empty, 1 a quarter, a million full
    return (f"<tr><td>{number}</td><td>{_words_on_page(head)}</td><td>{_words_on_page(near)}</td>"
            f'<td><span class="number">{length:,.3g}</span>'
            f'<span class="bar"><i style="width:{width:.0f}%"></i></span></td></tr>')


def _words_on_page(words):
    cells = ""
    for word, value in words:
        shown = html.escape(word).replace("\n", "⏎")
        cells += f"<div><code>{shown}</code> <small>{value:.2f}</small></div>"
    return cells


def page(sections):
    """[(row of the table, its answers as HTML)] -> one HTML page that needs nothing else, no network and no
    script."""
    text = PAGE
    for row, answers in sections:
        model = html.escape(row.get("name", row["model"]))
        task = html.escape(row["task"])
        text += (f"<h2>{model}, task {task}</h2><p>Score <b>{row['accuracy']:.3f}</b> "
                 f"(95 % interval {_interval(row['accuracy_ci95'])}, {row['n_examples']} examples) "
                 f"with <b>{row['tokens']:.1f}</b> tokens per answer: {row['text_tokens']:.1f} of text, "
                 f"{row['latent_steps']:.1f} latents. {len(answers)} of the answers:</p>\n")
        text += "".join(answers)
    return text + "</body></html>\n"


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
    prompt = tokenizer.encode(task.chapter_prompt(example, plan), split_special_tokens=True)
    true_length = len(tokenizer.encode(example["chapter"], split_special_tokens=True))
    room = model.config.max_position_embeddings - len(prompt)
    rollout, = generate(model, tokenizer, [prompt], 1, max(1, min(true_length, room)), latent="none",
                        generator=torch.Generator().manual_seed(seed), **sampling)
    return rollout.text


def _in_a_cell(text):
    """As the text of one cell of a Markdown table."""
    return html.escape(text.strip()).replace("|", "&#124;").replace("\n", "<br>")
