"""Evaluation: accuracy with its interval, and what it cost in tokens, latent steps, positions and seconds.

One row of the table is one model under one prompt. Latents count as tokens, as in the paper: tokens = text
tokens + latent steps, both counted while decoding, never read off the text.

Answers are sampled as the paper evaluates (temperature 0.7, top-p 0.8, top-k 20): a gain that exists only at
temperature 1 is a gain over slips that nobody would sample. `--sampling trained` samples as RL does while it
trains (temperature 1, nothing cut), `--sampling paper trained` gives both, and --temperature, --top-p and
--top-k override either.

Left out, and why: (1) no pass@k or majority vote: the paper reports mean reward over samples. (2) No
length penalty in the accuracy: it is the task's reward alone.

    python eval.py --model tiny                       # the base, tag prompt, its tags as text: 5 seconds
    python eval.py --model tiny:plain tiny RUN        # one table: plain prompt, tags, a run's directory
    python eval.py --model RUN --sampling paper trained   # .. at both samplings
    python eval.py --model RUN --show 3               # three answers, latents as nearest words
    python eval.py --model RUN --controls             # what its latents do: zeros, noise, none, ..
    python eval.py --model RUN --show 20 --html answers.html   # as a page, wrong answers first
    python eval.py --model RUN --alone 20 --json rl.json       # .. and the seconds of an answer decoded alone
    python eval.py --curve rl.json base.json          # score against tokens (matplotlib)
    python eval.py --training RUN RUN                 # reward, tokens, .. against steps and tokens sampled
    python eval.py --model RUN --write 5 --out DIR    # next chapters, to be read
"""
import math
import os
import time

import numpy as np
import torch
from tqdm import tqdm

import data
from lib import checkpoint, display, memory, page, run
from results import plots
from litereason import UserError, generate, latent_step, load, z_size

# How answers are sampled, as arguments of generate.
PAPER = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}  # the paper's evaluation
# as RL samples while it trains, and generate's default
TRAINED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
SAMPLINGS = {"paper": PAPER, "trained": TRAINED}


# ============================================================ what an answer costs
def flops(model, rollouts, samples=1, latent="projector", feed=None):
    """Forward FLOPs per answer, a multiplication and an addition being two. n(M): weights in the linear maps
    of M.

        one position    2 * n(layers) + 4 * H * d * layers * context
                        its maps; q k^T and w v over its context, itself included
        one answer      its prompt's positions / samples (a group reads it once)
                        + those of its own slots but the last, which is never fed
                        + tokens * 2 * n(LM head) + latents * 2 * n(projector)

    Left out: norms, softmax, embedding, sampling (no matrix products), and what a batch wastes (padding; rows
    that have ended and not yet left). A `latent` or `feed` function that costs something else than the
    projector (or nothing) says so: latent.flops = per latent."""
    layers = matrix_flops(model.model.layers)
    head = matrix_flops(model.lm_head)
    widths = [layer.self_attn.q_proj.out_features for layer in model.model.layers]  # H * d, for each layer
    attention = 4 * sum(widths)
    projector = latent if isinstance(latent, torch.nn.Module) else model.reasoning_projector
    per_latent = 0 if latent in ("zeros", "none") else getattr(latent, "flops", matrix_flops(projector))
    per_token = head + getattr(feed, "flops", 0)
    total = 0
    for r in rollouts:
        prompt = len(r.prompt_ids)
        own = len(r.slots) - 1
        contexts = _sum_up_to(prompt + own) - _sum_up_to(prompt)  # prompt + 1 .. prompt + own
        total += (prompt * layers + attention * _sum_up_to(prompt)) / samples
        total += own * layers + attention * contexts
        total += r.n_tokens * per_token + r.n_latents * per_latent
    return total / len(rollouts)


def matrix_flops(module):
    """Of one position through all weight matrices of a module: linear maps, a recurrent cell's too."""
    return 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)


def _sum_up_to(n):
    """1 + 2 + .. + n"""
    return n * (n + 1) // 2


def seconds_alone(model, tokenizer, prompts, seed=0, **sampling):
    """Median seconds of an answer when answers are decoded one at a time: what a person waits, where
    `seconds` is what a batch costs."""
    generator = torch.Generator().manual_seed(seed)
    times = []
    for prompt in prompts:
        start = time.time()
        generate(model, tokenizer, [prompt], generator=generator, **sampling)
        times.append(time.time() - start)
    return float(np.median(times))


# ============================================================ one row of the table
def evaluate(model, tokenizer, task, examples, latent_prompt=True, samples=1, seed=0, batch=64, progress=None,
             at_once=False, alone=0, **sampling):
    """Samples answers and scores them -> (a dict of means, at its end those of task.report; the rollouts).

    latent_prompt: the prompt that offers the tag. batch: examples per call of generate, to which `sampling`
    goes. progress: the name of a progress bar, None for none. at_once: the answer's opening (task.ANSWER,
    default \\boxed{) is put into the model's mouth, so that nothing can be reasoned.

    Of the result, beside what display.table explains:

    accuracy_ci95    over examples (the mean of an example's samples is one observation), see interval
    per_example      the same observations one by one, for paired tests
    z_size           median norm of what latent steps fed, in sizes of an embedding; None without any, or if it
                     is not finite
    flops            per answer, see flops
    seconds_each     per answer, in these batches
    seconds_alone    per answer of the first `alone` examples, decoded one at a time
    """
    generator = torch.Generator().manual_seed(seed)
    opening = data.opening_of(task) if at_once else ""
    start = time.time()
    prompts = [checkpoint.encode_prompt(model, tokenizer, task.prompt(e, latent_prompt), opening) for e in examples]
    rollouts, asked, scores, stats = [], [], [], {}
    bar = tqdm(total=len(examples) * samples, desc=progress, leave=False, disable=progress is None)
    for i in range(0, len(examples), batch):
        some = examples[i : i + batch]
        answers = generate(model, tokenizer, prompts[i : i + batch], samples, generator=generator,
                           stats=stats, bar=bar, **sampling)
        for r in answers:
            r.text = opening + r.text  # as the reward reads it
        examples_of_answers = [some[r.prompt] for r in answers]
        rewards = data.score(task, examples_of_answers, [r.text for r in answers])
        scores += torch.tensor(rewards).view(len(some), samples).mean(1).tolist()
        rollouts += answers
        asked += examples_of_answers
    bar.close()
    seconds = time.time() - start

    n = len(scores)
    accuracy = _mean(scores)
    text_tokens = _mean([r.n_tokens for r in rollouts])
    latent_steps = _mean([r.n_latents for r in rollouts])
    lengths = np.reshape([len(r.slots) for r in rollouts], (n, samples))
    result = {
        "accuracy": accuracy,
        "accuracy_ci95": interval(scores),
        "tokens": text_tokens + latent_steps,
        "text_tokens": text_tokens,
        "latent_steps": latent_steps,
        "tags": _mean([r.n_tags for r in rollouts]),
        "z_size": run.if_finite(z_size(model, torch.cat([r.latents for r in rollouts]))),
        "truncated": _mean([not r.finished for r in rollouts]),
        "forward_positions": stats["positions"] / len(rollouts),
        "n_examples": n,
        "samples": samples,
        "per_example": {"score": scores, "tokens": lengths.mean(1).tolist()},
        "flops": flops(model, rollouts, samples, sampling.get("latent", "projector"), sampling.get("feed")),
        "seconds_each": seconds / len(rollouts)}
    if "book" in examples[0]:  # chapters of one book are not independent of each other
        result["per_example"]["book"] = [example["book"] for example in examples]
    if alone:
        result["seconds_alone"] = seconds_alone(model, tokenizer, prompts[:alone], seed, **sampling)
    result["seconds"] = seconds  # display.table reads what comes after this as the task's own
    if hasattr(task, "report"):
        result.update(task.report(asked, [r.text for r in rollouts]))
    return result, rollouts


def _mean(numbers):
    return sum(numbers) / len(numbers)


# ============================================================ controls: what the latents do
LATENTS = {  # what a latent step feeds: see latent_of
    "projector": "the method",
    "zeros": "all-zero vectors",
    "noise": "a random direction, as long as the projector's output would be",
    "mean": "the mean of the latents of other stories",
    "other": "the latents of one other story, in their order",
    "warm": "the projector's warm start (fresh copies of the last block's MLP)",
    "none": "nothing: the tag is written, no latent is run"}

# [(name, what differs from the plain run, as arguments of evaluate)]
CONTROLS = [("plain", {})]
CONTROLS += [(f"latents: {name}", {"latent": name}) for name in LATENTS if name != "projector"]
CONTROLS += [(f"{n} latent{'s' * (n > 1)} per tag", {"tag": n}) for n in range(1, 9)]
CONTROLS += [("tag forbidden", {"tag": "forbidden"}), ("answer forced at once", {"at_once": True})]


def latents_of_others(model, tokenizer, task, examples, **settings):
    """A first pass on other examples -> the latents they ran, [(n, D)] of those that ran any: `mean` and
    `other` feed these."""
    _, rollouts = evaluate(model, tokenizer, task, examples, **settings)
    return [r.latents for r in rollouts if len(r.latents)]


def latent_of(name, model, others=(), seed=0):
    """The latent step of that name as generate expects it: a word it knows, a module in the projector's
    place, or a function (h (B, D), u (B,), k (B,)) -> z (B, D). u: a random number of the row's own; k: how
    many latents it has run.

    What a row gets depends on its u and k only (see litereason.latent_step), hence not on the batch. others:
    what latents_of_others returns."""
    if name in ("projector", "zeros", "none"):
        return name
    if name == "warm":
        layers = model.config.litereason_num_reasoning_layers
        return type(model.reasoning_projector).start(model, layers).to(model.device)
    if name == "noise":
        return _noise(model, seed)
    if not others:
        raise UserError(f"--latent {name} takes the latents of other stories, "
                        f"and on those read first the model ran none: choose another --latent")
    return _mean_latent(model, others) if name == "mean" else _another_storys(model, others, seed)


def _noise(model, seed):
    """One of 1,024 random directions, at the length of the projector's output."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(1024, model.config.hidden_size, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=-1).to(model.device, model.dtype)  # (1024, D)

    def noise(h, u, k):
        z = latent_step(model, h)
        which = ((u * 1024).long() + 617 * k) % 1024  # 617 is prime to 1,024: the latents of a row all differ
        return directions[which].to(h.dtype) * z.norm(dim=-1, keepdim=True)

    return noise


def _mean_latent(model, others):
    """The same vector at every latent step."""
    mean = torch.cat(list(others)).double().mean(0).to(model.device)  # (D,)

    def mean_latent(h, u, k):
        return mean.to(h.dtype).expand_as(h)

    mean_latent.flops = 0
    return mean_latent


def _another_storys(model, others, seed):
    """A row's u chooses the story; a row that runs more latents than the story has begins again."""
    latents = torch.cat(list(others)).to(model.device)  # of all stories, one after another
    counts = torch.tensor([len(z) for z in others], device=model.device)
    first = counts.cumsum(0) - counts  # latents[first[i] + k] is story i's k-th
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(others), generator=generator).to(model.device)

    def another_storys(h, u, k):
        story = shuffled[(u * len(others)).long()]
        return latents[first[story] + k % counts[story]].to(h.dtype)

    another_storys.flops = 0
    return another_storys


# ============================================================ paired tests
def interval(scores):
    """95 % interval of the mean of scores: Wilson's where all of them are 0 or 1, else the normal one."""
    n = len(scores)
    mean = _mean(scores)
    if set(scores) <= {0, 1}:
        return wilson(mean, n)
    variance = sum((score - mean) ** 2 for score in scores) / max(1, n - 1)
    half = 1.96 * math.sqrt(variance / n)
    return [mean - half, mean + half]


def wilson(share, n):
    """Wilson's 95 % interval of a share of n: it has a width at 0 and at 1, too."""
    z = 1.96
    shrink = 1 / (1 + z**2 / n)
    centre = shrink * (share + z**2 / (2 * n))
    half = shrink * z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mcnemar(a, b):
    """Exact two-sided p for paired right/wrong scores: the chance that fair coins, one for each example on
    which the runs differ, come out at least as unequal. For graded scores this is the sign test."""
    up = sum(x > y for x, y in zip(a, b))
    down = sum(x < y for x, y in zip(a, b))
    n = up + down
    one_side = sum(math.comb(n, i) for i in range(min(up, down) + 1))
    return min(1.0, 2 * one_side / 2**n)


def sign_flips(differences, seed=0, resamples=10000):
    """Two-sided p for the mean of paired differences: how often it is as far from 0 if the sign of each
    difference is a matter of chance. All signs are tried for up to 12 differences, else `resamples` of them
    and the true ones."""
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[differences != 0]
    n = len(differences)
    threshold = abs(differences.sum()) * (1 - 1e-9)  # the same sum in another order counts as the same
    if n <= 12:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2**n, n)
        return float(np.mean(np.abs(signs @ differences) >= threshold))
    generator = np.random.default_rng(seed)
    as_far = 1
    for _ in range(resamples // 100):  # in blocks, which fit any memory
        signs = 1 - 2 * generator.integers(0, 2, (100, n))
        as_far += int(np.sum(np.abs(signs @ differences) >= threshold))
    return as_far / (resamples + 1)


def bootstrap(differences, seed=0, resamples=10000):
    """95 % interval of the mean of paired differences: examples are drawn again with replacement."""
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples // 100):  # in blocks, which fit any memory
        drawn = generator.integers(0, n, (100, n))
        means.append(differences[drawn].mean(1))
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def holm(p):
    """Holm's correction: the p of one family of tests -> each one's adjusted p. If it is below 0.05 wherever
    a difference is claimed, the chance of any false claim in the family is below 0.05."""
    p = np.asarray(p, dtype=np.float64)
    order = p.argsort()
    left = np.arange(len(p), 0, -1)  # how many hypotheses are left when this one's turn comes
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * left))
    return adjusted.tolist()


def differs(adjusted_p, ci95):
    """The one criterion for "differs": Holm's p is below 0.05 and the 95 % interval leaves 0 out."""
    low, high = ci95
    return bool(adjusted_p < 0.05 and not low <= 0 <= high)


def against(result, plain, seed=0):
    """A control's paired tests against the plain run on the same examples; `judge` says what differs."""
    ours, theirs = result["per_example"], plain["per_example"]
    scores = np.subtract(ours["score"], theirs["score"])
    tokens = np.subtract(ours["tokens"], theirs["tokens"])
    return {
        "accuracy": float(scores.mean()),
        "accuracy_ci95": bootstrap(scores, seed),
        "better": int((scores > 0).sum()),
        "worse": int((scores < 0).sum()),
        "accuracy_p": mcnemar(ours["score"], theirs["score"]),
        "tokens": float(tokens.mean()),
        "tokens_ci95": bootstrap(tokens, seed),
        "tokens_p": sign_flips(tokens, seed)}


def judge(comparisons):
    """Adds to each comparison of one table (as `against` makes them) accuracy_holm, tokens_holm, and
    accuracy_differs, tokens_differs. The family is all of them, accuracies and tokens."""
    tests = [(own, what) for own in comparisons for what in ("accuracy", "tokens")]
    adjusted = holm([own[f"{what}_p"] for own, what in tests])
    for (own, what), p in zip(tests, adjusted):
        own[f"{what}_holm"] = p
        own[f"{what}_differs"] = differs(p, own[f"{what}_ci95"])


# ============================================================ all controls
def run_controls(model, tokenizer, task, examples, elsewhere, seed=0, progress=None, **settings):
    """Every control on the same examples with the same seed -> [(name, result)], plain first. elsewhere:
    examples for the first pass.

    The same seed is the same random numbers: where nothing differs nothing changes, and a difference is the
    control's."""

    def bar(what):
        return progress and f"{progress}, {what}"

    others = latents_of_others(model, tokenizer, task, elsewhere,
                               seed=seed, progress=bar("other stories"), **settings)
    rows = []
    for name, changed in CONTROLS:
        latent = changed.get("latent", "projector")
        if latent in ("mean", "other") and not others:
            continue  # no story read first has run a latent
        changed = {**changed, "latent": latent_of(latent, model, others, seed)}
        result, _ = evaluate(model, tokenizer, task, examples,
                             seed=seed, progress=bar(name), **changed, **settings)
        rows.append((name, result))
        plain = rows[0][1]
        result["against_plain"] = against(result, plain, seed)
    judge([result["against_plain"] for _, result in rows[1:]])  # the plain run against itself is no test
    return rows


# ============================================================ the script
def parse_arguments():
    ap = run.parser(__doc__)
    g = ap.add_argument_group("what")
    g.add_argument("--model", nargs="+", default=["tiny"], metavar="NAME",
                   help="models or run directories (default tiny); NAME:plain uses the prompt without the "
                   "tag (the default for runs of --method grpo)")
    data.task_flags(g)
    g.add_argument("--split", default="test", help="train, val or test (default test)")
    g.add_argument("--n", type=int, default=None, help="examples, the split's first (default all)")
    g.add_argument("--hops", type=int, default=None, metavar="N",
                   help="tiny: stories whose chains have N hand-overs, 2 to 7 (default 2 to 6, as many "
                   "of each)")
    g.add_argument("--samples", type=int, metavar="N", default=1, help="answers per example (default 1)")
    g.add_argument("--seed", type=int, default=0, help="of all random draws (default 0)")
    g = ap.add_argument_group("how answers are sampled")
    g.add_argument("--sampling", nargs="+", default=["paper"], choices=list(SAMPLINGS),
                   help="paper: temperature 0.7, top-p 0.8, top-k 20; trained: as RL samples, temperature 1 "
                   "and nothing cut; or both, one after the other (default paper)")
    g.add_argument("--max-new-tokens", type=int, metavar="N", default=None,
                   help=f"slots per answer, latents included (default: a run's own, {checkpoint.SLOTS_SMALL} for a "
                   f"model of less than 50 M parameters, else {checkpoint.SLOTS_RELEASED}; released 512)")
    g.add_argument("--temperature", type=float, help="0 is greedy (default: that of --sampling)")
    g.add_argument("--top-p", type=float, help="0 to 1 (default: that of --sampling)")
    g.add_argument("--top-k", type=int, help="0 is off (default: that of --sampling)")
    g = ap.add_argument_group("what to look at")
    g.add_argument("--controls", action="store_true", help="what the latents do: each control below in "
                   "turn, same stories and seed, with paired tests against the plain run (default: the "
                   "plain run alone)")
    g.add_argument("--show", type=int, default=0, metavar="N",
                   help="print N answers with their latents (default 0)")
    g.add_argument("--html", default=None, metavar="FILE", help="write the answers of --show there instead, "
                   "as a page to be opened and read (default: print them)")
    g.add_argument("--alone", type=int, default=0, metavar="N",
                   help="also time N answers decoded one at a time (default 0)")
    g.add_argument("--json", default=None, metavar="FILE",
                   help="write the numbers there, a list if there are several rows (default: print only)")
    g.add_argument("--out", default=None, metavar="DIR",
                   help="write config.json and results.json there (default: print only)")
    g.add_argument("--write", type=int, default=0, metavar="N",
                   help="next chapters: have the frozen LM write N of them with the plan, without and with "
                   "another's, into chapters.md in --out (default 0)")
    add_control_flags(ap.add_argument_group("one control alone"))
    add_collecting_flags(ap.add_argument_group("instead of evaluating, from runs that are there"))
    g = ap.add_argument_group("memory and speed")
    g.add_argument("--rows", type=int, metavar="N", help="answers decoded at once; changes no result "
                   "(default: what fits on the card, at most 512)")
    run.device_flags(g)
    return ap.parse_args()


def add_control_flags(g):
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in LATENTS.items())
    g.add_argument("--latent", default="projector", choices=list(LATENTS),
                   help=f"what a latent step feeds: {meanings} (default projector)")
    g.add_argument("--tag", default="free", choices=["free", "forbidden"],
                   help="forbidden: no tag can be started (default free)")
    g.add_argument("--n-latents", type=int, default=None, metavar="K",
                   help="0 to 8: every tag runs K latents (default: as many as it says)")
    g.add_argument("--at-once", action="store_true",
                   help="force the answer without reasoning (default: the model reasons first)")


def add_collecting_flags(g):
    g.add_argument("--collect", nargs="+", metavar="DIR",
                   help="average the tables that runs of train_rl.py left, row by row (default: evaluate)")
    g.add_argument("--curve", nargs="+", metavar="FILE",
                   help="draw score against --costs from JSON files of results (default: evaluate)")
    g.add_argument("--costs", nargs="+", default=["tokens"], choices=list(plots.COSTS),
                   help="what --curve has a panel for (default tokens)")
    g.add_argument("--training", nargs="+", metavar="DIR",
                   help="draw the training curves of runs of train_rl.py (default: evaluate)")
    g.add_argument("--plot", default="plot.svg", metavar="FILE",
                   help="where --curve and --training draw, svg or png (default plot.svg)")


def main():
    args = parse_arguments()
    run.check_arguments(args)
    if args.collect:
        show_collected(args)
        return
    if args.curve or args.training:
        draw(args)
        return
    check_flags(args)

    take_settings_of_runs(args)
    task, examples, elsewhere = task_and_examples(args)

    rows, sections = [], []  # of the table, and of the page
    for name in args.model:
        model, tokenizer = load(name.partition(":")[0], args.device)
        memory.freeze(model)
        run.use_graphs(model, args.graphs)
        for sampling in args.sampling:
            settings = settings_of(args, name, model, sampling)
            own = (args, name, sampling, model, tokenizer, task, examples, elsewhere, settings)
            if args.controls:
                rows += rows_of_controls(*own)
                continue
            row, rollouts = row_of_model(*own)
            rows.append(row)
            answers = list(zip(examples, rollouts[:: args.samples]))  # each example's first
            if args.html:
                sections.append(section_of_page(args, row, sampling, model, tokenizer, task, answers))
            else:
                print_answers(row["name"], model, tokenizer, task, answers[: args.show])
            if args.write:
                append_chapters(args, row["name"], sampling, task, answers, is_first=len(rows) == 1)

    print(f"\n{display.what_was_asked(args, len(examples), samplings_of(args))}")
    if not args.controls:
        print_table(rows, data.measure_of(task))
    if args.html:
        run.write_text(args.html, page.whole(sections))
        print(f"wrote {args.html}")
    write_results(args, rows)


# ---------------------------------------------------------------------------- before the models
def show_collected(args):
    """--collect: the table of means, and each row's runs and spread."""
    rows = plots.collect(args.collect)
    if not all("seconds" in row for _, row in rows):
        raise UserError("--collect reads results of train_rl.py and eval.py, and these are others")
    tasks = {run.run_settings(path).get("task") for path in args.collect} - {None}
    measure = data.measure_of(data.load_task(tasks.pop())) if len(tasks) == 1 else "accuracy"
    print(display.table(rows, measure))
    spreads = []
    for name, row in rows:
        low, high = row["spread"]
        spreads.append(f"{name}: {row['runs']} runs, {measure} {low:.3f} to {high:.3f}")
    print("\n" + "; ".join(spreads))
    print("the 95 % interval is the mean of the runs' own, which count stories and not runs")
    if args.json:
        run.write_json(args.json, dict(rows))


def draw(args):
    """--curve or --training."""
    if args.curve and args.training:
        raise UserError("--curve and --training are two pictures: choose one")
    if args.curve:
        plots.curve(plots.collect(args.curve), args.plot, args.costs)
    else:
        plots.training(args.training, args.plot)
    print(f"wrote {args.plot}")


def check_flags(args):
    """UserError for flags that exclude each other or need another one."""
    if args.n_latents is not None and args.n_latents > 8:
        raise UserError(f"--n-latents is {args.n_latents}; it must be at most 8")
    changes = [args.tag == "forbidden", args.n_latents is not None, args.at_once]
    if sum(changes) > 1:
        raise UserError("--tag forbidden, --n-latents and --at-once are alternatives: choose one")
    if args.controls and (args.latent != "projector" or any([*changes, args.show, args.write, args.alone])):
        raise UserError("--controls runs every --latent, --tag and --n-latents by itself, "
                        "and shows and times no answers: leave those flags out")
    if args.out and run.run_settings(args.out).get("script"):
        raise UserError(f"--out {args.out} is a run: the results of eval.py would replace its own; choose "
                        "another --out")
    for name in args.model:
        if name.partition(":")[2] not in ("", "plain"):
            raise UserError(f"--model {name}: behind a colon may stand plain, for the prompt without tags")
    if args.write and not args.out:
        raise UserError("--write needs --out DIR: the chapters go into chapters.md there")
    if args.html and not args.show:
        raise UserError("--html needs --show N: that many answers go onto the page")


def take_settings_of_runs(args):
    """What the command line leaves open is taken from the config.json of the runs among the models: the task,
    its reward and its scorer. UserError if they differ: one table has one task."""
    for flag in ("task", "reward", "scorer"):
        if getattr(args, flag) is not None:
            continue
        found = {}  # value -> the run that says so
        for name in args.model:
            path = name.partition(":")[0]
            made = run.run_settings(path)
            if flag != "task" and made.get("task") != args.task:
                continue  # its reward is another task's
            if made.get("script") in ("train_rl.py", "train_projector.py"):
                found.setdefault(made.get(flag), path)
        if len(found) > 1:
            said = ", ".join(f"{path} says {value}" for value, path in found.items())
            raise UserError(f"these runs differ in their {flag} ({said}): choose one with --{flag}")
        for value in found:
            setattr(args, flag, value)


def examples_of(args, task):
    if args.hops is None:
        return task.examples(args.split)[: args.n]
    if args.task != "tiny" or not 2 <= args.hops <= 7:
        raise UserError("--hops is for --task tiny, from 2 to 7: there are 22 people for three chains")
    return task.examples(args.split, hops=args.hops)[: args.n]


def task_and_examples(args):
    """-> (task, its examples, examples elsewhere: the latents of --latent mean and other come from these)"""
    first = args.model[0].partition(":")[0]
    args.task, task = data.choose_task(args.task, first, args.reward, args.scorer)
    elsewhere = []
    try:
        examples = examples_of(args, task)
        if args.controls or args.latent in ("mean", "other"):
            elsewhere = task.examples("train" if args.split == "val" else "val")[: args.n or 200]
    except ValueError as e:
        raise UserError(str(e)) from e
    if args.write and not hasattr(task, "chapter_prompt"):
        raise UserError(f"--write is for tasks whose answers are plans of chapters (next_chapter); "
                        f"{args.task} is none")
    data.start_task(task, first, args.reward, args.scorer, args.seed, args.device)
    return task, examples, elsewhere


# ---------------------------------------------------------------------------- each model
def settings_of(args, name, model, sampling):
    """What all evaluations of a model at one sampling share, as arguments of evaluate."""
    path, _, suffix = name.partition(":")
    made = run.run_settings(path)
    if made.get("script") == "results/baselines.py":
        raise UserError(f"{path} is a run of results/baselines.py, whose methods decode in their own ways: "
                        f"read the table in its results.json")
    return {
        "latent_prompt": suffix != "plain" and made.get("method") != "grpo",
        "seed": args.seed,
        "progress": name,
        "rows": args.rows,
        "max_new_tokens": args.max_new_tokens or made.get("max_new_tokens") or checkpoint.slots_per_answer(model),
        **samplings_of(args)[sampling]}


def samplings_of(args):
    """{each of --sampling: its arguments for generate}, with what the other flags override"""
    said = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    said = {key: value for key, value in said.items() if value is not None}
    return {sampling: {**SAMPLINGS[sampling], **said} for sampling in args.sampling}


def heading(args, name, sampling, settings, **control):
    """What a row of results belongs to. Its name in tables says the sampling where there are two."""
    prompt = "tag" if settings["latent_prompt"] else "plain"
    own = samplings_of(args)[sampling]
    known = [word for word, numbers in SAMPLINGS.items() if numbers == own]
    title = control.get("control", name)
    return {
        "name": f"{title} ({sampling})" if len(args.sampling) > 1 else title,
        "model": name,
        **control,
        "task": args.task,
        "split": args.split,
        "sampling": known[0] if known else display.sampling_in_words(own),
        "prompt": prompt}


def row_of_model(args, name, sampling, model, tokenizer, task, examples, elsewhere, settings):
    """-> (the row, the rollouts)"""
    latent = args.latent
    if latent == "projector" and not runs_latents(name, model):
        latent = "none"
    others = latents_of_others(model, tokenizer, task, elsewhere, **settings) if elsewhere else []
    result, rollouts = evaluate(
        model, tokenizer, task, examples, samples=args.samples, at_once=args.at_once, alone=args.alone,
        latent=latent_of(latent, model, others, args.seed),
        tag="forbidden" if args.tag == "forbidden" else args.n_latents, **settings)
    return {**heading(args, name, sampling, settings), **result}, rollouts


def runs_latents(name, model):
    """Whether a model's tags run latents. Not if its projector was never trained, and not in a run of another
    method: there tags have always been text (its checkpoint carries a projector all the same)."""
    method = run.run_settings(name.partition(":")[0]).get("method", "litereason")
    return model.projector_trained and method == "litereason"


def rows_of_controls(args, name, sampling, model, tokenizer, task, examples, elsewhere, settings):
    """--controls: prints their table -> its rows"""
    if not runs_latents(name, model):
        raise UserError(f"--controls asks what latents do, and {name} runs none: its projector was never "
                        f"trained, or its method leaves tags as text; give it a run of --method litereason")
    results = run_controls(model, tokenizer, task, examples, elsewhere, samples=args.samples, **settings)
    words = display.sampling_in_words(samplings_of(args)[sampling])
    print(f"\n{name}, {len(examples)} of {args.task} {args.split}, {words}")
    print(display.controls_table(results, data.measure_of(task)), flush=True)
    return [{**heading(args, name, sampling, settings, control=control), **result}
            for control, result in results]


def print_answers(name, model, tokenizer, task, answers):
    """--show: [(example, rollout)], each with a line per latent."""
    for example, rollout in answers:
        reward = data.score(task, [example], [rollout.text])[0]
        print(f"\n--- {name}, reward {reward:.2f}\n{tokenizer.decode(rollout.prompt_ids)}\n"
              f">>> {display.readable(tokenizer, rollout)}")
        for i, (near, length, head) in enumerate(display.nearest_words(model, tokenizer, rollout.latents)):
            print(f"    latent {i + 1}: nearest {near}; the head says {head}; "
                  f"length {length:.2f} of an embedding's")


def section_of_page(args, row, sampling, model, tokenizer, task, answers):
    """--html: a model's part of the page. answers: [(example, rollout)], each example's first."""
    examples, rollouts = zip(*answers)
    said = display.what_was_asked(args, len(examples), {sampling: samplings_of(args)[sampling]})
    rewards = row["per_example"]["score"]
    if args.samples > 1:  # those are means over an example's answers
        rewards = data.score(task, examples, [rollout.text for rollout in rollouts])
    return page.section(said, row, model, tokenizer, task, examples, rollouts, rewards, args.show)


def append_chapters(args, name, sampling, task, answers, is_first):
    """--write: chapters.md, one section per model."""
    examples = [example for example, _ in answers]
    plans = [task.plan_of(rollout.text) for _, rollout in answers]
    path = os.path.join(args.out, "chapters.md")
    with open(path, "w" if is_first else "a", encoding="utf-8") as f:
        f.write(f"\n# {name}\n")
        display.write_chapters(task, examples, plans, args.write, samplings_of(args)[sampling], f)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------- after the models
def print_table(rows, measure):
    named = [(row["name"], row) for row in rows]
    print(display.table(named, measure) + "\n")
    for name, row in named:
        alone = f", {row['seconds_alone']:.2g} s alone" if "seconds_alone" in row else ""
        print(f"{name}: {row['flops']:.3g} FLOPs and {row['seconds_each']:.2g} s an answer{alone}")


def write_results(args, rows):
    """--json and --out."""
    files = [args.json]
    if args.out:
        files.append(os.path.join(args.out, "results.json"))
    for file in files:
        if file:
            run.write_json(file, rows[0] if len(rows) == 1 else rows)
    if args.out:
        run.write_json(os.path.join(args.out, "config.json"), vars(args))


if __name__ == "__main__":
    run.run_script(main)
