"""What people look at."""
import html
import itertools
import json
import math
import os
import re
import time

import numpy as np
import torch

from data import score
from engine import LOGITS, compute
from litereason import CLOSE, LATENT, OPEN, TAG, generate, logprobs
from runs import UserError, run_settings, write_json


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


def forecast(model, args, longest, scorer=None):
    """Sizes of this run and the memory it will want, as text, from the configuration; on CUDA also whether it fits, and what to turn.

    An estimate from shapes, rounded up: every rollout as long as allowed, every prompt as long as the longest (in tokens)."""
    c, gib = model.config, 2.0**30
    H, K, D, V, layers = c.num_attention_heads, c.num_key_value_heads, c.hidden_size, c.vocab_size, c.num_hidden_layers
    d, width, S = getattr(c, "head_dim", None) or D // H, 2 if model.bf16 else 4, args.max_new_tokens
    numbers = sum(p.numel() for p in model.parameters())
    base = numbers - sum(p.numel() for p in model.reasoning_projector.parameters())
    batch = args.prompts * args.group
    rows = min(batch, max(1, args.rows // args.group) * args.group)  # decoded at once
    read = min(args.prompts, 2 * rows // args.group)  # prompts in memory, at most: a long answer keeps its own while others begin
    tokens = max(args.tokens_per_forward, longest + S)
    # One layer's activations per token: norms and residuals in fp32, q k v and output, the MLP's four; and each slot's attention weights.
    layer = 28 * D + width * (2 * (H + K) * d + 4 * c.intermediate_size) + (5 + 2 * width) * H * (longest + S)
    kept = 2 if args.offload else 4  # bytes per weight, and per gradient, on the card
    always = {"weights": kept * numbers, "AdamW": 0 if args.offload else 8 * base, "16-bit copies": 2 * base * (model.bf16 and not args.offload),
              "scorer": 4 * sum(p.numel() for p in scorer.parameters()) if scorer else 0}
    sampling = {"keys and values": 2 * layers * K * d * width * (rows * S + read * longest), "logits": 5 * 4 * rows * V}
    update = {"gradients": kept * base, "activations": tokens * (layers * (4 * D + 2 * K * d * width) + 2 * layer if args.checkpoint_layers else layers * layer),
              "logits": 2 * 4 * min(LOGITS, tokens * V)}
    peak = sum(always.values()) + max(sum(sampling.values()), sum(update.values()))
    say = lambda sizes: ", ".join(f"{k} {v / gib:.2f}" for k, v in sizes.items())
    text = (f"per rollout batch: {batch} rollouts, {rows} rows at a time, up to {S} decoding steps; the update reads up to "
            f"{batch * S + args.prompts * longest:,} positions, {tokens:,} at a time\n"
            f"memory at most, GiB: {say(always)}; sampling: {say(sampling)}; update: {say(update)}; "
            f"peak {peak / gib:.1f}")
    card = torch.cuda.get_device_properties(model.device).total_memory if model.device.type == "cuda" else None
    if card and peak > 0.95 * card:
        text += (f"\nthis card has {card / gib:.1f} GiB, so it may not fit: lower --rows (sampling) or --tokens-per-forward (update), say "
                 f"--checkpoint-layers, --offload, shorten --max-new-tokens, or take a smaller model")
    return text


def pace(model, tokenizer, prompts, args, steps=16):
    """How long this run may take on this machine, as text: one group of the longest prompt is decoded for a few steps and scored.

    An upper estimate: every rollout as long as allowed, no row makes room before, and a step with all rows taken to cost what it costs with
    one group per forward."""
    longest, clock, spent = max(prompts, key=len), time.time(), []
    for n in (1, steps + 1):  # the difference is `steps` steps without the prompt
        rollouts = generate(model, tokenizer, [longest], args.group, n)
        spent.append(time.time() - clock)
        clock = time.time()
    logprobs(model, rollouts)[0].sum().backward()
    model.zero_grad(set_to_none=True)
    update = (time.time() - clock) / (len(longest) + sum(len(r.slots) for r in rollouts))  # seconds per position
    forwards = -(-args.prompts // max(1, args.rows // args.group))  # batches of rows
    sample = forwards * (spent[0] + max(0.0, spent[1] - spent[0]) / steps * args.max_new_tokens)
    update *= args.prompts * (len(longest) + args.group * args.max_new_tokens)
    batches = args.steps / args.minibatches
    return (f"time at most, from a short measurement: {sample:.0f} s to sample and {update:.0f} s to update per rollout batch; {batches:.0f} batches: "
            f"{batches * (sample + update) / 3600:.1f} hours, without evaluation and stages 1 and 2")


def warn(m, latent, n_groups, texts):
    """m: the metrics of a step; texts: what its rollouts wrote."""
    say = lambda what: print(f"warning: step {m['step']}: {what}", flush=True)
    if latent and m["tag_share"] == 0:
        say(f"0 of {n_groups} groups' rollouts ran a tag: there is no latent reasoning left")
    if m["zero_variance"] == 1:
        say(f"in all {n_groups} groups every rollout earned the same (mean {m['reward']:.3f}): nothing to learn from")
    if len(set(texts)) == 1:
        say(f"all {len(texts)} rollouts wrote the same: {texts[0][:60]!r}")
    elif not any(TAG.sub("", text).strip() for text in texts):
        say(f"all {len(texts)} rollouts wrote tags and nothing else")


def warn_of_validation(metrics, val):
    """After a check: if the train reward since the check before rose, and validation fell by more than half its interval's width."""
    checks = [-1] + [i for i, m in enumerate(metrics) if m["val_accuracy"] is not None]
    if len(checks) < 3:
        return
    a, b, c = checks[-3:]  # lines of the file: the two spans between three checks
    before, since = (sum(m["reward"] for m in span) / len(span) for span in (metrics[a + 1 : b + 1], metrics[b + 1 : c + 1]))
    fell, half = metrics[b]["val_accuracy"] - val["accuracy"], (val["accuracy_ci95"][1] - val["accuracy_ci95"][0]) / 2
    if since > before and fell > half:
        print(f"warning: step {c + 1}: since step {b + 1} the train reward rose from {before:.3f} to {since:.3f}, but the accuracy on "
              f"{val['n_examples']} val examples fell from {metrics[b]['val_accuracy']:.3f} to {val['accuracy']:.3f} (plus or minus {half:.3f})",
              flush=True)


def put_aside(out, step, rollouts, earned, which):
    """Writes the rollouts that caused a trouble, to be read; -> where."""
    path = os.path.join(out, "bad-rollouts.json")
    write_json(path, [{"step": step + 1, "rollout": b, "reward": float(earned[b]), "latents_finite": bool(rollouts[b].latents.isfinite().all()),
                       "prompt_ids": rollouts[b].prompt_ids, "slots": rollouts[b].slots, "text": rollouts[b].text,
                       "logprobs": rollouts[b].logprobs.tolist()} for b in which])
    return path
