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
import json
import math
import os
import time

import numpy as np
import torch
from tqdm import tqdm

from data import load_task, score, start_task, task_flags
from litereason import ReasoningProjector, UserError, generate, load
from runs import encode_prompt
from report import (answer_on_page, collect, controls_table, curve, nearest_words, page, readable, table, training, write_chapters)
from runs import check_arguments, device_flags, is_small, run_script, run_settings, write_json, write_text


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
        warm = ReasoningProjector.start(model, len(model.reasoning_projector))
        return lambda h, u, k: warm(h)[0]
    if name == "noise":  # one of 1,024 directions; 617 has no divisor in common with that, so a row's latents all differ
        table = torch.randn(1024, model.config.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        table = torch.nn.functional.normalize(table, dim=-1).to(model.device, model.dtype)  # (1024, D)
        return lambda h, u, k: table[((u * 1024).long() + 617 * k) % 1024].to(h.dtype) * model.reasoning_projector(h)[0].norm(dim=-1, keepdim=True)
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


if __name__ == "__main__":
    run_script(main)
