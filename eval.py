"""Evaluation: accuracy with its interval, and what it cost in tokens, latent steps, forward positions and seconds.

One row of the table is one model under one prompt. Latents count as tokens, as in the paper: tokens = text tokens +
latent steps, both counted while decoding, never read off the text.

Left out, and why: (1) no pass@k or majority vote: the paper reports mean reward over samples. (2) The paper samples at
temperature 0.7, top-p 0.8, top-k 20; the default here is the distribution that RL trained (temperature 1, nothing cut),
since cutting hides the base's slips. The flags give the paper's. (3) Length penalties: score what the task scores.

    python eval.py --model tiny --task tiny                         # the base with the tag prompt: 5 seconds
    python eval.py --model tiny:plain tiny out/rl --task tiny       # one table: explicit reasoning, tags, a trained run
    python eval.py --model out/rl --task tiny --show 3              # three answers, latents with their nearest words
    python eval.py --model out/rl --task tiny --controls            # what its latents do: zeros, noise, another story's, none, ..
    python eval.py --model out/rl --show 20 --html answers.html     # the same as a page that unfolds, for a browser
    python eval.py --model out/rl --alone 20 --json rl.json         # .. and the seconds of an answer decoded alone
    python eval.py --curve rl.json base.json --plot curve.svg       # score against tokens, FLOPs and seconds (matplotlib)
    python eval.py --training out/rl out/grpo --plot training.svg   # reward, tokens, latents, tags against steps and tokens sampled
    python eval.py --model out/next --task next_chapter --write 5 --out out/chapters     # the chapters themselves, to be read
"""
import argparse
import html
import importlib
import itertools
import json
import math
import os
import re
import time

import numpy as np
import torch
from tqdm import tqdm

from litereason import CLOSE, LATENT, OPEN, ReasoningProjector, UserError, compute, encode_prompt, generate, load, run_script


def load_task(name):
    """The task module data.<name>; a folder under data/ (or a module in it, as in tiny.next_chapter) is a task."""
    try:
        task = importlib.import_module(f"data.{name}")
        assert all(hasattr(task, f) for f in ("examples", "prompt", "reward"))
        return task
    except (ImportError, AssertionError) as e:
        if isinstance(e, ModuleNotFoundError) and e.name not in (f"data.{name}", f"data.{name.split('.')[0]}"):
            raise
        here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
        known = [d for d in sorted(os.listdir(here)) if os.path.exists(os.path.join(here, d, "__init__.py"))]
        raise UserError(f"no task {name!r}; there are {', '.join(known)} (a task is a folder under data/ with examples, "
                        f"prompt and reward; tiny.next_chapter is the tiny world's second)") from e


def is_small(model):
    """Whether a model wants the settings of one trained from scratch (and, by default, the tiny world) or the released ones."""
    return sum(p.numel() for p in model.parameters()) < 50e6


def task_flags(g):
    """The flags of all scripts that say what is to be done."""
    g.add_argument("--task", default=None, help="a folder under data/, or tiny.next_chapter (default: tiny for a small model, else "
                   "flawed_fictions)")
    g.add_argument("--reward", default=None, choices=["contrastive", "vrcli", "thresholded"], help="of next_chapter (default contrastive)")
    g.add_argument("--scorer", default=None, metavar="NAME", help="the frozen model that reads chapters (default: a copy of the base)")


def device_flags(g):
    """Where, and how a GPU is used."""
    g.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    g.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=False, help="on CUDA, record the decoding step as a graph and play "
                   "it; where that fails it runs as ever (not yet tried on a GPU)")


def start_task(args, model, name):
    """The task module of args.task, by default the one that fits the model's size; --reward, --scorer and the seed go to a task with
    `settings`. The scorer is never the policy itself, but a copy of the base that `name` was trained from."""
    args.task = args.task or ("tiny" if is_small(model) else "flawed_fictions")
    task = load_task(args.task)
    if hasattr(task, "settings"):
        reader, tokenizer = load(args.scorer or base_of(name), args.device)
        task.settings.update(reward=args.reward or task.settings["reward"], seed=args.seed, scorer=(reader.requires_grad_(False), tokenizer))
    elif args.reward or args.scorer:
        raise UserError(f"--reward and --scorer are for tasks with a scorer (next_chapter); {args.task} has none")
    return task


def run_settings(path):
    """What a run directory, or the model/ in it, was made with; {} if it is none."""
    run = os.path.dirname(os.path.normpath(path)) if os.path.basename(os.path.normpath(path)) == "model" else path
    try:
        with open(os.path.join(run, "config.json")) as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def base_of(name):
    """The model that a run directory was trained from; any other model is its own base."""
    base = run_settings(name).get("base", name)
    return os.path.abspath(base) if os.path.isdir(base) else base


def score(task, examples, completions, step=0):
    """Rewards of completions; a task may offer `rewards`, the same for many at once (a scorer model wants batches).

    step: of the training, 0 in evaluation; a task with `settings` may draw something anew at each step."""
    if hasattr(task, "settings"):
        task.settings["step"] = step
    if hasattr(task, "rewards"):
        return task.rewards(examples, completions)
    return [float(task.reward(e, c)) for e, c in zip(examples, completions)]


def flops(model, rollouts, samples=1, latent="projector", feed=None):
    """Forward FLOPs per answer, a multiplication and an addition being two; n(M) is the count of weights in the linear maps of M:

        one position in context c (itself included)    2 * n(layers) + 4 * H * d * layers * c      its maps; q k^T and w v
        one answer    its prompt's positions / samples (a group reads it once) + those of its own slots but the last, which is never fed
                      + tokens * 2 * n(LM head) + latents * 2 * n(projector)

    Left out: norms, softmax, embedding, sampling (no matrix products), and what a batch wastes (padding; rows that have ended and not yet
    left). A `latent` or `feed` function that costs something else than the projector (or nothing) says so: latent.flops = per latent.
    """
    linear = lambda module: 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    layers, head, upto = linear(model.model.layers), linear(model.lm_head), lambda n: n * (n + 1) // 2
    attention = 4 * sum(layer.self_attn.q_proj.out_features for layer in model.model.layers)  # 4 * H * d * layers
    latent = getattr(latent, "flops", 0 if latent in ("zeros", "none") else linear(model.reasoning_projector))
    total = 0
    for r in rollouts:
        L, S = len(r.prompt_ids), len(r.slots) - 1
        total += (L * layers + attention * upto(L)) / samples  # contexts 1 .. L
        total += S * layers + attention * (upto(L + S) - upto(L))  # contexts L + 1 .. L + S
        total += r.n_tokens * (head + getattr(feed, "flops", 0)) + r.n_latents * latent
    return total / len(rollouts)


def seconds_alone(model, tokenizer, prompts, seed=0, **sampling):
    """Median seconds of an answer when answers are decoded one at a time: what a person waits, where `seconds` is what a batch costs."""
    generator, times = torch.Generator().manual_seed(seed), []
    for prompt in prompts:
        start = time.time()
        generate(model, tokenizer, [prompt], generator=generator, **sampling)
        times.append(time.time() - start)
    return float(np.median(times))


def evaluate(model, tokenizer, task, examples, latent_prompt=True, samples=1, seed=0, batch=64, progress=None, at_once=False, alone=0,
             **sampling):
    """Samples answers and scores them -> (a dict of means, at its end those of task.report; the rollouts). `sampling` goes to generate.

    at_once: the answer's opening (task.ANSWER, default \\boxed{) is put into the model's mouth, so that nothing can be reasoned.
    accuracy_ci95: over examples (the mean of an example's samples is one observation), normal approximation.
    per_example: the same observations one by one, for paired tests.
    flops, seconds_each: per answer; seconds_alone: of the first `alone` examples' answers, decoded one at a time.
    """
    generator, opening = torch.Generator().manual_seed(seed), getattr(task, "ANSWER", "\\boxed{") if at_once else ""
    encode = lambda e: encode_prompt(model, tokenizer, task.prompt(e, latent_prompt), opening)
    start, stats, means, rollouts, asked = time.time(), {}, [], [], []
    bar = tqdm(total=len(examples), desc=progress, leave=False, disable=progress is None)
    for i in range(0, len(examples), batch):
        part = examples[i : i + batch]
        got = generate(model, tokenizer, [encode(e) for e in part], samples, generator=generator, stats=stats, **sampling)
        for r in got:
            r.text = opening + r.text  # as the reward reads it
        rewards = score(task, [part[r.prompt] for r in got], [r.text for r in got])
        means += torch.tensor(rewards).view(len(part), samples).mean(1).tolist()
        rollouts += got
        asked += [part[r.prompt] for r in got]
        bar.update(len(part))
    bar.close()
    seconds, n, accuracy = time.time() - start, len(means), sum(means) / len(means)
    lonely = {"seconds_alone": seconds_alone(model, tokenizer, [encode(e) for e in examples[:alone]], seed, **sampling)} if alone else {}
    half = 1.96 * math.sqrt(sum((m - accuracy) ** 2 for m in means) / max(1, n - 1) / n)
    mean = lambda f: sum(map(f, rollouts)) / len(rollouts)
    text, latents = mean(lambda r: r.n_tokens), mean(lambda r: r.n_latents)
    tokens = torch.tensor([len(r.slots) for r in rollouts], dtype=torch.float64).view(n, samples).mean(1).tolist()
    return {"accuracy": accuracy, "accuracy_ci95": [accuracy - half, accuracy + half], "tokens": text + latents,
            "text_tokens": text, "latent_steps": latents, "tags": mean(lambda r: r.n_tags),
            "truncated": mean(lambda r: not r.finished), "forward_positions": stats["forwards"] / len(rollouts),
            "n_examples": n, "samples": samples, "per_example": {"score": means, "tokens": tokens},
            "flops": flops(model, rollouts, samples, sampling.get("latent", "projector"), sampling.get("feed")),
            "seconds_each": seconds / len(rollouts), **lonely, "seconds": seconds,
            **(task.report(asked, [r.text for r in rollouts]) if hasattr(task, "report") else {})}, rollouts


def table(rows):
    """rows: [(name, result of evaluate)] -> the lines of a plain-text table that is Markdown as well."""
    out = ["| model | accuracy | 95 % interval | tokens | text | latent | tags | cut off | positions | seconds |",
           "|---|---|---|---|---|---|---|---|---|---|"]
    width = max(len(name) for name, _ in rows)
    for name, r in rows:
        lo, hi = r["accuracy_ci95"]
        out.append(f"| {name:{width}} | {r['accuracy']:.3f} | {lo:.3f} to {hi:.3f} | {r['tokens']:.1f} | {r['text_tokens']:.1f} | "
                   f"{r['latent_steps']:.1f} | {r['tags']:.2f} | {r['truncated']:.3f} | {r['forward_positions']:.1f} | {r['seconds']:.1f} |")
    for name, r in rows:  # under it what the task itself reports, which comes after the seconds
        own = {k: r[k] for k in list(r)[list(r).index("seconds") + 1:]}
        if own:
            say = lambda v: " to ".join(f"{x:.3f}" for x in v) if isinstance(v, list) else f"{v:.3f}"
            out.append(f"\n{name.strip()}: " + ", ".join(f"{k} {say(v)}" for k, v in own.items()))
    return "\n".join(out)


# ---------------------------------------------------------------- controls: what do the latents do?
LATENTS = {  # what a latent step feeds: see latent_of
    "projector": "the method", "zeros": "all-zero vectors", "noise": "a random direction, as long as the projector's output would be",
    "mean": "the mean of the latents of other stories", "other": "the latents of one other story, in their order",
    "warm": "the projector's warm start (fresh copies of the last block's MLP)", "none": "nothing: the tag is written, no latent is run"}
CONTROLS = [("plain", {})] + [(f"latents: {k}", {"latent": k}) for k in LATENTS if k != "projector"] + [
    *((f"{k} latent{'s' * (k > 1)} per tag", {"tag": k}) for k in range(1, 9)), ("tag forbidden", {"tag": "forbidden"}),
    ("answer forced at once", {"at_once": True})]


def latents_of_others(model, tokenizer, task, examples, **settings):
    """A first pass on other examples -> the latents they ran, [(n, D)] of those that ran any. mean and other take them from there."""
    return [r.latents for r in evaluate(model, tokenizer, task, examples, **settings)[1] if len(r.latents)]


def latent_of(name, model, others=(), seed=0):
    """The latent step of that name as generate takes it: a word it knows, or a function (h (B, D), u (B,), k (B,)) -> z (B, D).

    What a row gets depends on its u and k only (see latent_step), hence not on the batch. others: see latents_of_others.
    """
    if name in ("projector", "zeros", "none"):
        return name
    if name == "warm":
        warm = ReasoningProjector.warm_start(model, len(model.reasoning_projector))
        return lambda h, u, k: warm(h)
    if name == "noise":  # one of 1,024 directions; 617 has no divisor in common with that, so a row's latents all differ
        table = torch.randn(1024, model.config.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        table = torch.nn.functional.normalize(table, dim=-1).to(model.device, model.dtype)  # (1024, D)
        return lambda h, u, k: table[((u * 1024).long() + 617 * k) % 1024].to(h.dtype) * model.reasoning_projector(h).norm(dim=-1, keepdim=True)
    if not len(others):
        raise UserError(f"--latent {name} takes the latents of other stories, and on those read first the model ran none")
    if name == "mean":
        mean = torch.cat(list(others)).double().mean(0).to(model.device)  # (D,)
        same = lambda h, u, k: mean.to(h.dtype).expand_as(h)
        same.flops = 0
        return same
    flat, counts = torch.cat(list(others)).to(model.device), torch.tensor([len(z) for z in others], device=model.device)
    first = counts.cumsum(0) - counts  # story i's k-th latent is flat[first[i] + k]; a row that runs more begins again
    shuffle = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).to(model.device)

    def another(h, u, k):
        story = shuffle[(u * len(others)).long()]
        return flat[first[story] + k % counts[story]].to(h.dtype)

    another.flops = 0
    return another


def mcnemar(a, b):
    """Exact two-sided p for paired right/wrong scores: of the examples on which the runs differ, as many go either way by a fair coin."""
    up, down = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))  # for graded scores this is the sign test
    return min(1.0, 2 * sum(math.comb(up + down, i) for i in range(min(up, down) + 1)) / 2 ** (up + down))


def bootstrap(differences, seed=0, resamples=10000):
    """95 % interval of the mean of paired differences: examples are drawn anew with replacement, in blocks that fit any memory."""
    d, rng = np.asarray(differences, dtype=np.float64), np.random.default_rng(seed)
    means = np.concatenate([d[rng.integers(0, len(d), (100, len(d)))].mean(1) for _ in range(resamples // 100)])
    return np.quantile(means, [0.025, 0.975]).tolist()


def against(result, plain, seed=0):
    """A control's paired tests against the plain run on the same examples."""
    (a, b), (s, t) = ((result["per_example"][k], plain["per_example"][k]) for k in ("score", "tokens"))
    scores, tokens = np.subtract(a, b), np.subtract(s, t)
    return {"accuracy": float(scores.mean()), "accuracy_ci95": bootstrap(scores, seed), "better": int((scores > 0).sum()),
            "worse": int((scores < 0).sum()), "mcnemar_p": mcnemar(a, b), "tokens": float(tokens.mean()), "tokens_ci95": bootstrap(tokens, seed)}


def run_controls(model, tokenizer, task, examples, elsewhere, seed=0, progress=None, **settings):
    """Every control on the same examples with the same seed, elsewhere: examples for the first pass -> [(name, result)], plain first.

    The same seed is the same random numbers: where nothing differs nothing changes, and a difference is the control's."""
    say = lambda what: progress and f"{progress}, {what}"
    others, rows = latents_of_others(model, tokenizer, task, elsewhere, seed=seed, progress=say("other stories"), **settings), []
    for name, choice in CONTROLS:
        if choice.get("latent") in ("mean", "other") and not others:
            continue  # no story read first has run a latent
        choice = {**choice, "latent": latent_of(choice.get("latent", "projector"), model, others, seed)}
        rows.append((name, evaluate(model, tokenizer, task, examples, seed=seed, progress=say(name), **choice, **settings)[0]))
        rows[-1][1]["against_plain"] = against(rows[-1][1], rows[0][1], seed)
    return rows


def controls_table(rows):
    """The lines of the controls' table; the differences are to the plain run, p is McNemar's."""
    out = ["| control | accuracy | 95 % interval | tokens | text | latent | accuracy gained | 95 % interval | p | tokens gained | 95 % interval |",
           "|---|---|---|---|---|---|---|---|---|---|---|"]
    width = max(len(name) for name, _ in rows)
    for name, r in rows:
        d, cell = r["against_plain"], lambda pair, f: f"{pair[0]:{f}} to {pair[1]:{f}}"
        out.append(f"| {name:{width}} | {r['accuracy']:.3f} | {cell(r['accuracy_ci95'], '.3f')} | {r['tokens']:.1f} | {r['text_tokens']:.1f} | "
                   f"{r['latent_steps']:.1f} | " + ("| | | | |" if r is rows[0][1] else
                   f"{d['accuracy']:+.3f} | {cell(d['accuracy_ci95'], '+.3f')} | {d['mcnemar_p']:.2g} | {d['tokens']:+.1f} | {cell(d['tokens_ci95'], '+.1f')} |"))
    return "\n".join(out)


# ---------------------------------------------------------------- pictures: score against cost, and training
def collect(files):
    """JSON files as --json writes them (one row, a list, or {name: row}), or runs of train_rl.py, whose results.json is meant ->
    [(row name, means over the runs that have the row)]; `spread`: lowest, highest."""
    found = {}
    for file in files:
        file = os.path.join(file, "results.json") if os.path.isdir(file) else file
        try:
            with open(file) as f:
                rows = json.load(f)
            if isinstance(rows, dict):
                rows = [rows] if "accuracy" in rows else [{"name": name, **row} for name, row in rows.items()]
            for row in rows:
                name = row.get("name") or row.get("control") or row["model"]
                found.setdefault(name.strip(), []).append({"runs": 1, "spread": [row["accuracy"]] * 2, **row})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{file} is not a table of results ({e})") from e
    out = []
    for name, rows in found.items():
        mean = {"runs": sum(r["runs"] for r in rows), "spread": [min(r["spread"][0] for r in rows), max(r["spread"][1] for r in rows)]}
        for k in (k for k in rows[0] if k not in mean and all(isinstance(r.get(k), (int, float, list)) for r in rows)):
            values = [r[k] for r in rows]  # numbers, or lists of numbers (intervals)
            mean[k] = [sum(v) / len(v) for v in zip(*values)] if isinstance(values[0], list) else sum(values) / len(values)
        out.append((name, mean))
    return out


def figure(path, panels, rows=1, height=4.2):
    """An empty figure of matplotlib, which nothing else here needs -> (figure, its axes (rows, panels))."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from e
    if not path.endswith((".svg", ".png")):
        raise UserError(f"--plot is {path!r}; it must end in .svg or .png")
    rcParams["svg.hashsalt"] = "litereason"  # else the names inside an svg are drawn by chance
    out = Figure((4.8 * panels, height * rows), dpi=120, layout="constrained")
    return out, out.subplots(rows, panels, squeeze=False)


def save_figure(out, path):
    try:
        out.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)  # the same numbers, the same file
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


COLOURS = "#1f5f99 #c45a00 #2a7f2a #b3261e #6f4aa8 #7a4b3a #b8479b #555555 #7d7d00 #0f7f8c".split()  # dark enough for text
COSTS = {"tokens": ("tokens per answer (text + latents)", 1), "flops": ("forward GFLOPs per answer", 1e-9),  # key: (what it is, its unit)
         "seconds_each": ("seconds per answer, full batch", 1), "seconds_alone": ("seconds per answer, decoded alone", 1)}


def curve(rows, path):
    """Score against each cost that any row has. Bars: lowest and highest run, or the 95 % interval over examples if there is one run."""
    for _, r in rows:
        if "seconds" in r and "n_examples" in r:  # a table of before seconds_each was written
            r.setdefault("seconds_each", r["seconds"] / r["n_examples"] / r.get("samples", 1))
    panels = {key: [(name, r[key] * COSTS[key][1], r["accuracy"], COLOURS[i % 10]) for i, (name, r) in enumerate(rows) if key in r] for key in COSTS}
    panels = {key: dots for key, dots in panels.items() if dots}
    out, axes = figure(path, len(panels), height=4.2 + 0.1 * max(0, len(rows) - 6))
    out.supxlabel("bars: lowest to highest run; 95 % interval over examples if one run", fontsize=9)
    bars = {name: r["spread"] if r["runs"] > 1 else r.get("accuracy_ci95", r["spread"]) for name, r in rows}
    for at, (key, dots) in zip(axes[0], panels.items()):
        for name, x, y, colour in dots:
            at.plot([x, x], bars[name], color=colour, linewidth=1.5)
            at.plot(x, y, "o", color=colour)
        at.set(xlabel=COSTS[key][0], ylabel="score", xlim=(0, 1.1 * max(x for _, x, _, _ in dots) or 1))
        at.margins(y=0.1)
        at.locator_params(axis="x", nbins=6)
        at.grid(alpha=0.3)
    out.draw_without_rendering()  # from here on the axes stand where they will stand
    for at, dots in zip(axes[0], panels.values()):
        label(at, dots)
    save_figure(out, path)


def label(at, dots):
    """Writes the names of dots (name, x, y, colour) into the axes: each in the nearest place around its dot where it covers no name, dot or bar."""
    points, frame = 72 / at.figure.dpi, at.get_window_extent()
    taken = [line.get_window_extent().padded(4) for line in at.lines]
    for name, x, y, colour in sorted(dots, key=lambda d: d[1]):
        style = {"textcoords": "offset points", "fontsize": 8, "ha": "center", "va": "center", "color": colour}
        note = at.annotate(name, (x, y), (0, 0), **style)
        size, (px, py) = note.get_window_extent(), at.transData.transform((x, y))
        note.remove()
        for i in range(16 * 30):  # places on growing circles, from the right side on
            angle, far = 2 * math.pi * (i % 16) / 16, 7 + 7 * (i // 16)  # pixels
            dx, dy = math.cos(angle) * (far + size.width / 2), math.sin(angle) * (far + size.height / 2)
            box = size.translated(px + dx - size.x0 - size.width / 2, py + dy - size.y0 - size.height / 2)
            if not any(map(box.overlaps, taken)) and frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1:
                break
        taken.append(box.padded(2))
        line = {"arrowstyle": "-", "linewidth": 0.6, "color": colour, "shrinkA": 0} if far > 14 else None
        at.annotate(name, (x, y), (dx * points, dy * points), arrowprops=line, **style).set_in_layout(False)


def training(directories, path):
    """metrics.jsonl of several runs: reward, tokens, latent steps and tag share against steps (top) and training tokens (bottom)."""
    panels = {"reward": lambda m: m["reward"], "tokens per rollout (text + latents)": lambda m: m["text_tokens"] + m["latent_steps"],
              "latent steps per rollout": lambda m: m["latent_steps"], "share of rollouts with a tag": lambda m: m["tag_share"]}
    out, axes = figure(path, len(panels), 2)
    for d in directories:
        try:
            with open(os.path.join(d, "metrics.jsonl")) as f:
                lines = [json.loads(line) for line in f]
            config = run_settings(d)
            rollouts = config["prompts"] * config["group"] / config.get("minibatches", 1)  # new ones per optimiser step
            steps = [m["step"] for m in lines]
            tokens = np.cumsum([(m["text_tokens"] + m["latent_steps"]) * rollouts for m in lines]) / 1e6
            for column, (panel, value) in zip(axes.T, panels.items()):
                for at, x in zip(column, (steps, tokens)):
                    at.plot(x, [value(m) for m in lines], label=os.path.normpath(d), linewidth=1.2)
                    at.set(ylabel=panel, xlabel="step" if x is steps else "tokens sampled in training, millions (text + latents)")
                    at.grid(alpha=0.3)
                    at.set(ylim=(-0.02, 1.02)) if "share" in panel else None
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{d} is not a run of train_rl.py: metrics.jsonl or config.json ({e})") from e
    out.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(directories)))
    save_figure(out, path)


# ---------------------------------------------------------------- answers to be read, as text and as a page
def pieces(tokenizer, rollout):
    """A rollout's slots as a list of texts and, where a block of latents stands, of their number."""
    runs = [(latent, list(run)) for latent, run in itertools.groupby(rollout.slots, LATENT.__eq__)]
    return [len(run) if latent else tokenizer.decode(run) for latent, run in runs]


def readable(tokenizer, rollout):
    """A rollout's text with its latent blocks shown as such: .. </implicit_thought>[3 latents] .."""
    show = lambda p: f"[{p} latent{'s' * (p > 1)}] " if isinstance(p, int) else p
    return "".join(map(show, pieces(tokenizer, rollout))) + ("" if rollout.finished else " [cut off]")


@torch.no_grad()
def read_out(model, tokenizer, latents, k=3):
    """For each latent (n, D): the k vocabulary words whose embeddings point its way, with the cosine; its length against the mean length of
    an embedding; and the k words that the LM head would say if the latent were its input (through the final norm), with probability."""
    embed = model.get_input_embeddings()
    table = embed(torch.arange(embed.num_embeddings, device=model.device)).float()  # (V, D); Gemma's are scaled
    z = latents.to(table.device).float()
    cos = torch.nn.functional.normalize(z, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T  # (n, V)
    with compute(model):
        said = model.lm_head(model.model.norm(z.to(model.dtype))).float().softmax(-1)  # (n, V)
    words = lambda top: [[(tokenizer.decode([i]), c) for i, c in zip(*row)] for row in zip(top.indices.tolist(), top.values.tolist())]
    return list(zip(words(cos.topk(k)), (z.norm(dim=-1) / table.norm(dim=-1).mean()).tolist(), words(said.topk(k))))


def nearest_words(model, tokenizer, latents, k=3):
    """The same with the words as text."""
    say = lambda words: ", ".join(f"{word!r} {c:.2f}" for word, c in words)
    return [(say(near), length, say(said)) for near, length, said in read_out(model, tokenizer, latents, k)]


# One page, light and dark, no script: the Content-Security-Policy forbids any, so that a story cannot bring one even if an escape were forgotten.
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><title>Answers with their latents</title><style>
:root { color-scheme: light dark; --back: #fdfdfb; --text: #1c1c1c; --soft: #5c5c5c; --line: #d4d4ce; --box: #f1f1ec; --latent: #6a3fb0;
  --ok: #1d6b34; --no: #a8271c }
@media (prefers-color-scheme: dark) { :root {
  --back: #17181a; --text: #e8e6e1; --soft: #a5a39d; --line: #3d3f43; --box: #222428; --latent: #c0a2f5; --ok: #77cf91; --no: #ff9385 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: .75rem; max-width: 60rem; background: var(--back); color: var(--text); font: 1rem/1.6 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.25rem; margin-top: 2.5rem; overflow-wrap: anywhere } h3 { font-size: 1rem; margin: 0 0 .5rem }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: 1rem 0 } article > p { margin: 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
.prompt { color: var(--soft); padding-left: .75rem; border-left: 3px solid var(--line) }
.tag, .soft { color: var(--soft); font-weight: normal } .tag { font-size: .8rem } .right { color: var(--ok) } .wrong { color: var(--no) }
summary { cursor: pointer } summary:focus-visible { outline: 3px solid var(--latent); outline-offset: 2px }
.latents { display: inline-block; white-space: normal; margin: 0 .2rem } .latents[open] { display: block; margin: .5rem 0 }
.latents summary { display: inline-block; color: var(--latent); border: 1px solid; border-radius: 1rem; padding: 0 .7rem; line-height: 1.4 }
.latents summary::-webkit-details-marker { display: none }
.latents summary::before { content: "\\25b8  " } .latents[open] summary::before { content: "\\25be  " }
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
<p>Each box is one answer; what the model was asked unfolds at its top. Where the model stopped writing and ran latent steps stands <b>4 latents</b>:
unfold it for one line per latent. <b>Head</b>: the words, with their probability, that the LM head reads off the latent if it goes through the final
norm. <b>Embedding</b>: the words whose embeddings point its way, with the cosine. <b>Length</b>: how many times as long as the mean embedding; the
bar is logarithmic, its mark is at 1, a quarter of it is a factor of 100. The words near a latent do not prove what it does; eval.py --controls
tests that.</p>
</details>"""


def answer_on_page(model, tokenizer, task, example, rollout, number):
    """One answer as HTML. Every text of a story or a model goes through html.escape."""
    reward, body, gold, k = score(task, [example], [rollout.text])[0], "", "", 0  # k: latents so far
    verdict = f"reward {reward:.2f}"
    if hasattr(task, "answer"):
        verdict = '<span class="right">✓ right</span>' if reward > 0 else '<span class="wrong">✗ wrong</span>'
        gold = f'<p class="soft">Right would be: {html.escape(task.answer(example))}</p>'
    cell = lambda words: "".join(f"<div><code>{html.escape(w).replace(chr(10), '⏎')}</code> <small>{c:.2f}</small></div>" for w, c in words)
    rows = []
    for i, (near, length, said) in enumerate(read_out(model, tokenizer, rollout.latents)):
        width = 12.5 * min(8, max(0, 2 + math.log10(max(length, 1e-9))))  # percent: 0.01 is empty, 1 a quarter, a million full
        rows.append(f'<tr><td>{i + 1}</td><td>{cell(said)}</td><td>{cell(near)}</td><td><span class="number">{length:,.3g}</span>'
                    f'<span class="bar"><i style="width:{width:.0f}%"></i></span></td></tr>')
    for piece in pieces(tokenizer, rollout):
        if isinstance(piece, str):
            body += re.sub(f"({html.escape(OPEN)}|{html.escape(CLOSE)})", r'<span class="tag">\1</span>', html.escape(piece))
        else:
            body += (f'<details class="latents"><summary>{piece} latent{"s" * (piece > 1)}</summary><table><thead><tr><th>#</th><th>Head</th>'
                     f"<th>Embedding</th><th>Length</th></tr></thead><tbody>{''.join(rows[k : k + piece])}</tbody></table></details>")
            k += piece
    return (f'<article><h3>{number}. {verdict} <span class="soft">· {len(rollout.slots)} tokens, {rollout.n_latents} of them latents'
            f'{"" if rollout.finished else ", cut off"}</span></h3><details><summary>What it was asked ({len(rollout.prompt_ids)} tokens)</summary>'
            f'<div class="text prompt">{html.escape(tokenizer.decode(rollout.prompt_ids))}</div></details><div class="text">{body}</div>{gold}'
            "</article>\n")


def page(sections):
    """[(row of the table, its answers as HTML)] -> one HTML page that needs nothing else, no network and no script."""
    out = PAGE
    for r, answers in sections:
        low, high = r["accuracy_ci95"]
        out += (f"<h2>{html.escape(r['model'])}, task {html.escape(r['task'])}</h2><p>Score <b>{r['accuracy']:.3f}</b> (95 % interval {low:.3f} to "
                f"{high:.3f}, {r['n_examples']} examples) with <b>{r['tokens']:.1f}</b> tokens per answer: {r['text_tokens']:.1f} of text, "
                f"{r['latent_steps']:.1f} latents. {len(answers)} of the answers:</p>\n{''.join(answers)}")
    return out + "</body></html>\n"


def write_chapters(task, examples, plans, n, sampling, file):
    """For people to read: the frozen LM writes the next chapter of n examples with its plan, without one, and with the plan of the next
    example, in a table beside the true one. Same random numbers for all three, at most the true chapter's length; after each example
    the file is flushed, so that a stop loses nothing."""
    model, tokenizer = task.scorer()
    encode = lambda text: tokenizer.encode(text, split_special_tokens=True)
    cell = lambda text: html.escape(text.strip()).replace("|", "&#124;").replace("\n", "<br>")
    for i, example in enumerate(examples[:n]):
        three = plans[i], "", plans[(i + 1) % len(plans)]
        prompts, most = [encode(task.chapter_prompt(example, p)) for p in three], len(encode(example["chapter"]))
        texts = [generate(model, tokenizer, [p], 1, max(1, min(most, model.config.max_position_embeddings - len(p))), latent="none",
                          generator=torch.Generator().manual_seed(i), **sampling)[0].text for p in prompts]
        file.write(f"\n## {example.get('book', 'Story')}, {example.get('number', i + 1)}\n\nIts plan: {cell(three[0]) or '(none)'}\n\n"
                   f"The other plan: {cell(three[2]) or '(none)'}\n\n| with its plan | without a plan | with the other plan | the true chapter |\n"
                   f"|---|---|---|---|\n| " + " | ".join(map(cell, texts + [example["chapter"]])) + " |\n")
        file.flush()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = ap.add_argument_group("what")
    g.add_argument("--model", nargs="+", default=["tiny"], metavar="NAME", help="models or run directories; NAME:plain uses "
                   "the prompt without the tag (the default for runs of --method grpo)")
    task_flags(g)
    g.add_argument("--split", default="test", help="train, val or test")
    g.add_argument("--n", type=int, default=None, help="examples, from the split's first (default all)")
    g.add_argument("--samples", type=int, default=1, help="answers per example")
    g.add_argument("--alone", type=int, default=0, metavar="N", help="also time N answers decoded one at a time")
    g = ap.add_argument_group("decoding")
    g.add_argument("--max-new-tokens", type=int, default=None, help="slots per answer, latents included (default: 160 for a "
                   "small model, else 2048)")
    g.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (the paper: 0.7)")
    g.add_argument("--top-p", type=float, default=1.0, help="0 to 1 (the paper: 0.8)")
    g.add_argument("--top-k", type=int, default=0, help="0 is off (the paper: 20)")
    g.add_argument("--rows", type=int, default=256, help="answers decoded at once: memory; changes no result")
    g.add_argument("--at-once", action="store_true", help="force the answer without reasoning")
    g.add_argument("--latent", default="projector", choices=list(LATENTS),
                   help="what a latent step feeds: " + "; ".join(f"{k}: {v}" for k, v in LATENTS.items()))
    g.add_argument("--tag", default="free", choices=["free", "forbidden"], help="forbidden: no tag can be started")
    g.add_argument("--n-latents", type=int, default=None, metavar="K", help="0 to 8: every tag runs K latents, whatever number it says")
    g = ap.add_argument_group("instead of evaluating")
    g.add_argument("--controls", action="store_true", help="all of these in turn, same stories and seed, with paired tests against the plain run")
    g.add_argument("--collect", nargs="+", metavar="DIR", help="average the tables that runs of train_rl.py left, row by row")
    g.add_argument("--curve", nargs="+", metavar="FILE", help="draw score against tokens, FLOPs and seconds from JSON files of results")
    g.add_argument("--training", nargs="+", metavar="DIR", help="draw the training curves of runs of train_rl.py")
    g.add_argument("--plot", default="plot.svg", metavar="FILE", help="where --curve and --training draw (svg or png; default plot.svg)")
    g = ap.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0)
    device_flags(g)
    g.add_argument("--json", default=None, metavar="FILE", help="write the numbers there (a list if several models)")
    g.add_argument("--out", default=None, metavar="DIR", help="write config.json and results.json there")
    g.add_argument("--show", type=int, default=0, metavar="N", help="print N answers with their latents")
    g.add_argument("--html", default=None, metavar="FILE", help="write the answers of --show there instead, as a page to be opened and read")
    g.add_argument("--write", type=int, default=0, metavar="N", help="next chapters: have the frozen LM write N of them with the plan, without "
                   "and with another's, into chapters.md in --out")
    args = ap.parse_args()
    check_arguments(args)
    if args.collect:
        rows = collect(args.collect)
        print(table(rows))
        print("\n" + "; ".join(f"{name}: {r['runs']} runs, accuracy {r['spread'][0]:.3f} to {r['spread'][1]:.3f}" for name, r in rows))
        if args.json:
            write_json(args.json, dict(rows))
        return
    if args.curve or args.training:
        if args.curve and args.training:
            raise UserError("--curve and --training are two pictures: choose one")
        curve(collect(args.curve), args.plot) if args.curve else training(args.training, args.plot)
        print(f"drawn: {args.plot}")
        return

    if args.n_latents is not None and args.n_latents > 8:
        raise UserError(f"--n-latents is {args.n_latents}; it must be at most 8")
    if (args.n_latents is not None) + (args.tag == "forbidden") + args.at_once > 1:
        raise UserError("--tag forbidden, --n-latents and --at-once are alternatives: choose one")
    chosen = args.tag != "free", args.n_latents is not None, args.at_once, args.show, args.write, args.alone
    if args.controls and (args.latent != "projector" or any(chosen)):
        raise UserError("--controls runs every --latent, --tag and --n-latents by itself, and shows and times no answers: leave those flags out")
    if args.write and not args.out:
        raise UserError("--write needs --out DIR: the chapters go into chapters.md there")
    if args.html and not args.show:
        raise UserError("--html needs --show N: that many answers go onto the page")
    rows, sections = [], []
    for name in args.model:
        path, _, suffix = name.partition(":")
        model, tokenizer = load(path, args.device)
        model.graphs = args.graphs
        if not rows:  # the first model's size may choose the task
            task = start_task(args, model, path)
            try:
                examples = task.examples(args.split)[: args.n]
                elsewhere = []  # other stories: --latent mean and other take their latents from these
                if args.controls or args.latent in ("mean", "other"):
                    elsewhere = task.examples("train" if args.split == "val" else "val")[: args.n or 200]
            except ValueError as e:
                raise UserError(str(e)) from e
            if args.write and not hasattr(task, "chapter_prompt"):
                raise UserError(f"--write is for tasks whose answers are plans of chapters (next_chapter); {args.task} is none")
        made = run_settings(path)
        if made.get("script") == "baselines.py":
            raise UserError(f"{path} is a run of baselines.py, whose methods decode in their own ways: it has its table in its results.json")
        latent_prompt = suffix != "plain" and made.get("method") != "grpo"
        feeds = "none" if made.get("method") == "tag" and args.latent == "projector" else args.latent  # its tags have always been text
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        settings = {"latent_prompt": latent_prompt, "seed": args.seed, "progress": name, "rows": args.rows, **sampling,
                    "max_new_tokens": args.max_new_tokens or (160 if is_small(model) else 2048)}
        if args.controls:
            found = run_controls(model, tokenizer, task, examples, elsewhere, samples=args.samples, **settings)
            print(f"\n{name}, {len(examples)} of {args.task} {args.split}\n{controls_table(found)}", flush=True)
            rows += [(name, {"model": name, "control": control, "task": args.task, "prompt": "tag" if latent_prompt else "plain", **r}) for control, r in found]
            continue
        others = latents_of_others(model, tokenizer, task, elsewhere, **settings) if elsewhere else []
        result, rollouts = evaluate(model, tokenizer, task, examples, samples=args.samples, at_once=args.at_once, alone=args.alone,
                                    latent=latent_of(feeds, model, others, args.seed),
                                    tag="forbidden" if args.tag == "forbidden" else args.n_latents, **settings)
        rows.append((name, {"model": name, "task": args.task, "prompt": "tag" if latent_prompt else "plain", **result}))
        shown = list(zip(examples, rollouts[:: args.samples]))[: args.show]  # each example's first answer
        if args.html:
            sections.append((rows[-1][1], [answer_on_page(model, tokenizer, task, e, r, i + 1) for i, (e, r) in enumerate(shown)]))
            shown = []
        for example, r in shown:
            print(f"\n--- {name}, reward {score(task, [example], [r.text])[0]:.2f}\n{tokenizer.decode(r.prompt_ids)}\n>>> {readable(tokenizer, r)}")
            for i, (words, norm, said) in enumerate(nearest_words(model, tokenizer, r.latents)):
                print(f"    latent {i + 1}: nearest {words}; the head says {said}; length {norm:.2f} of an embedding's")
        if args.write:
            with open(os.path.join(args.out, "chapters.md"), "a" if len(rows) > 1 else "w", encoding="utf-8") as f:
                f.write(f"\n# {name}\n")
                write_chapters(task, examples, [task.plan_of(r.text) for r in rollouts[:: args.samples]], args.write, sampling, f)
            print(f"chapters in {f.name}")
    if not args.controls:
        print(table(rows) + "\n")
        for name, r in rows:
            print(f"{name}: {r['flops']:.3g} FLOPs and {r['seconds_each']:.2g} s an answer" +
                  (f", {r['seconds_alone']:.2g} s alone" if "seconds_alone" in r else ""))
    if args.html:
        write_text(args.html, page(sections))
        print(f"page: {args.html}")
    results = [r for _, r in rows]
    for file in [args.json] + ([os.path.join(args.out, "results.json")] if args.out else []):
        if file:
            write_json(file, results[0] if len(results) == 1 else results)
    if args.out:
        write_json(os.path.join(args.out, "config.json"), vars(args))


def check_arguments(args, n=1):
    """Bounds that all scripts share; a wrong value ends in one line. n: the least --n."""
    least = {"n": n, "seed": 0, "val": 0, "steps": 0, "projector_steps": 0, "overlong_buffer": 0, "show_every": 0, "show": 0, "write": 0, "alone": 0,
             "top_k": 0, "n_latents": 0}
    for name, value in vars(args).items():
        bound = least.get(name, 0 if isinstance(value, float) else 1)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= bound:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {bound}")
    if not 0 < getattr(args, "top_p", 1) <= 1:
        raise UserError(f"--top-p is {args.top_p}; it must be above 0 and at most 1")
    if args.device is not None and not (args.device == "cpu" or args.device.startswith("cuda")):
        raise UserError(f"--device is {args.device!r}; it must be cpu or cuda")
    if (args.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; leave the flag out or say cpu")
    if args.out:
        make_directory(args.out)


def make_directory(path):
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as e:
        raise UserError(f"cannot write to the output directory {path!r}: {e.strerror}") from e


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".tmp", path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


if __name__ == "__main__":
    run_script(main)
