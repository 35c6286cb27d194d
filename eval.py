"""Evaluation: accuracy with its interval, and what it cost in tokens, latent steps, positions and seconds.

One row of the table is one model under one prompt. Latents count as tokens, as in the paper: tokens = text
tokens + latent steps, both counted while decoding, never read off the text.

Answers are sampled as the paper evaluates (temperature 0.7, top-p 0.8, top-k 20): a gain that exists only at
temperature 1 is a gain over slips that nobody would sample. `--sampling trained` samples as RL does while it
trains (temperature 1, nothing cut). The accuracy is the task's reward alone, without a length penalty.

    python eval.py --model tiny                       # the base, tag prompt, its tags as text: 5 seconds
    python eval.py --model tiny:plain tiny RUN        # one table: plain prompt, tags, a run's directory
    python eval.py --model RUN --controls             # what its latents do: paired with zeros, noise, ..
    python eval.py --model RUN --show 20 --html answers.html   # as a page; without --html as text
"""
import os
import time

import numpy as np
import torch
from tqdm import tqdm

import data
from lib import checkpoint, display, memory, page, run
from lib.stats import against, interval, judge
from litereason import UserError, generate, latent_step, load, z_size

# How answers are sampled, as arguments of generate.
PAPER = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}  # the paper's evaluation
TRAINED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # as RL samples; generate's default
SAMPLINGS = {"paper": PAPER, "trained": TRAINED, "greedy": {**TRAINED, "temperature": 0.0}}

LATENTS = {  # what a latent step feeds: see latent_of
    "projector": "the method",
    "zeros": "all-zero vectors",
    "noise": "a random direction, as long as the projector's output would be",
    "mean": "the mean of the latents of other stories",
    "shuffled": "the latents of one other story, in their order",
    "warm": "the projector's warm start (fresh copies of the last block's MLP)",
    "none": "nothing: the tag is written, no latent is run"}

SETTINGS = {  # {title: {name: (default, the least or the choices, what it is)}}
    "what": {
        "model": (["tiny"], str, "models or run directories; NAME:plain takes the prompt without tags"),
        "task": (None, str, "a folder under data/ or tiny.next_chapter [the run's, else by the model]"),
        "reward": (None, run.COMMON["reward"][1], "of chapters: contrastive, vrcli, thresholded [the run's]"),
        "scorer": (None, str, "the frozen model that reads chapters [the run's, else a copy of the base]"),
        "split": ("test", list(data.SPLITS), "train, val or test"),
        "n": (None, 1, "examples, the split's first [all]"),
        "hops": (None, 2, "tiny: stories whose chains have N hand-overs, 2 to 7 [2 to 6, as many of each]"),
        "samples": (1, 1, "answers per example"),
        "seed": (0, 0, "of all random draws")},
    "how answers are sampled": {
        "sampling": (["paper"], list(SAMPLINGS), f"one or several of {', '.join(SAMPLINGS)}"),
        "max_new_tokens": (None, 1, "slots per answer, latents included [the run's, else by size]")},
    "what to look at": {
        "controls": (False, bool, "what the latents do: each --latent and more, paired tests"),
        "latent": ("projector", list(LATENTS), f"fed as a latent: {', '.join(LATENTS)}"),
        "show": (0, 0, "print N answers with their latents"),
        "html": (None, str, "write the answers of --show into this file instead, as a page"),
        "alone": (0, 0, "also time N answers decoded one at a time"),
        "json": (None, str, "write the numbers into this file, a list if there are several rows"),
        "out": (None, str, "write config.json and results.json into this directory")},
    "memory and speed": {
        "gen_batch_size": (None, 1, "answers decoded at once; changes no result [what fits, at most 512]"),
        "device": (None, str, "cpu or cuda [cuda if there is one]"),
        "graphs": (True, bool, "on CUDA, record the decoding step and replay it")}}


# ============================================================ what an answer costs
def flops(model, rollouts, samples=1, latent="projector", feed=None):
    """Forward FLOPs per answer, a multiplication and an addition being two. n(M): weights in the linear maps
    of M.

        one position    2 * n(layers) + 4 * H * d * layers * context: q k^T and w v, itself included
        one answer      its prompt's positions / samples (a group reads it once)
                        + those of its own slots but the last, which is never fed
                        + tokens * 2 * n(LM head) + latents * 2 * n(projector)

    Left out: what is no matrix product, and what a batch wastes (padding; rows that have ended and not yet
    left). A `latent` or `feed` function that costs something else than the projector says so in its .flops.
    """
    layers = matrix_flops(model.model.layers)
    head = matrix_flops(model.lm_head)
    attention = 4 * sum(layer.self_attn.q_proj.out_features for layer in model.model.layers)  # 4 * H * d each
    projector = latent if isinstance(latent, torch.nn.Module) else model.reasoning_projector
    per_latent = 0 if latent in ("zeros", "none") else getattr(latent, "flops", matrix_flops(projector))
    per_token = head + getattr(feed, "flops", 0)
    total = 0
    for r in rollouts:
        prompt = len(r.prompt_ids)
        own = len(r.slots) - 1
        contexts = prompt * (prompt + 1) // 2  # 1 + 2 + .. + prompt
        own_contexts = own * prompt + own * (own + 1) // 2  # prompt + 1, .., prompt + own
        total += (prompt * layers + attention * contexts) / samples
        total += own * layers + attention * own_contexts
        total += r.n_tokens * per_token + r.n_latents * per_latent
    return total / len(rollouts)


def matrix_flops(module):
    """Of one position through all weight matrices of a module: linear maps, a recurrent cell's too."""
    return 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)


def seconds_alone(model, tokenizer, prompts, seed=0, **sampling):
    """Median seconds of an answer when answers are decoded one at a time: what a person waits."""
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
    default \\boxed{) is put into the model's mouth, so that nothing can be reasoned. Of the result, beside
    what display.table explains:

    accuracy_ci95    over examples (the mean of an example's samples is one observation), see interval
    per_example      the same observations one by one, for paired tests
    z_size           median norm of what latent steps fed, in sizes of an embedding; None without a finite one
    flops            per answer, see flops
    seconds_each     per answer, in these batches
    seconds_alone    per answer of the first `alone` examples, decoded one at a time
    """
    generator = torch.Generator().manual_seed(seed)
    opening = data.opening_of(task) if at_once else ""
    start = time.time()
    prompts = [checkpoint.encode_prompt(model, tokenizer, task.prompt(e, latent_prompt), opening)
               for e in examples]
    rollouts, asked, scores, stats = [], [], [], {}
    bar = tqdm(total=len(examples) * samples, desc=progress, leave=False, disable=progress is None)
    for i in range(0, len(examples), batch):
        answers = generate(model, tokenizer, prompts[i : i + batch], samples, generator=generator,
                           stats=stats, bar=bar, **sampling)
        for r in answers:
            r.text = opening + r.text  # as the reward reads it
        some = [examples[i + r.prompt] for r in answers]
        rewards = data.score(task, some, [r.text for r in answers])
        scores += torch.tensor(rewards).view(-1, samples).mean(1).tolist()
        rollouts += answers
        asked += some
    bar.close()
    seconds = time.time() - start

    n = len(scores)
    text_tokens = _mean([r.n_tokens for r in rollouts])
    latent_steps = _mean([r.n_latents for r in rollouts])
    lengths = np.reshape([len(r.slots) for r in rollouts], (n, samples))
    result = {
        "accuracy": _mean(scores),
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
# [(name, what differs from the plain run, as arguments of evaluate)]
CONTROLS = [("plain", {})]
CONTROLS += [(f"latents: {name}", {"latent": name}) for name in LATENTS if name != "projector"]
CONTROLS += [(f"{n} latent{'s' * (n > 1)} per tag", {"tag": n}) for n in range(1, 9)]
CONTROLS += [("tag forbidden", {"tag": "forbidden"}), ("answer forced at once", {"at_once": True})]
OF_OTHERS = ("mean", "shuffled")  # these take the latents of other stories


def run_controls(model, tokenizer, task, examples, elsewhere, seed=0, progress=None, **settings):
    """Every control on the same examples with the same seed -> [(name, result)], plain first. elsewhere:
    examples for the first pass.

    The same seed is the same random numbers: where nothing differs nothing changes, and a difference is the
    control's."""
    others = latents_of_others(model, tokenizer, task, elsewhere, seed=seed, progress=progress, **settings)
    rows = []
    for name, changed in CONTROLS:
        latent = changed.get("latent", "projector")
        if latent in OF_OTHERS and not others:
            continue  # no story read first has run a latent
        changed = {**changed, "latent": latent_of(latent, model, others, seed)}
        result, _ = evaluate(model, tokenizer, task, examples, seed=seed,
                             progress=progress and f"{progress}, {name}", **changed, **settings)
        rows.append((name, result))
        result["against_plain"] = against(result, rows[0][1], seed)
    judge([result["against_plain"] for _, result in rows[1:]])  # the plain run against itself is no test
    return rows


def latents_of_others(model, tokenizer, task, examples, **settings):
    """A first pass on other examples -> the latents they ran, [(n, D)] of those that ran any."""
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
        raise UserError(f"--latent {name} takes latents of other stories, and on those the model ran none")
    if name == "mean":
        others = [torch.cat(list(others)).double().mean(0, keepdim=True)]  # one story of one latent
    return _shuffled(model, others, seed)


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


def _shuffled(model, others, seed):
    """A row's u chooses the story; a row that runs more latents than the story has begins again."""
    latents = torch.cat(list(others)).to(model.device)  # of all stories, one after another
    counts = torch.tensor([len(z) for z in others], device=model.device)
    first = counts.cumsum(0) - counts  # latents[first[i] + k] is story i's k-th
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(others), generator=generator).to(model.device)

    def shuffled(h, u, k):
        story = order[(u * len(others)).long()]
        return latents[first[story] + k % counts[story]].to(h.dtype)

    shuffled.flops = 0
    return shuffled


# ============================================================ the script
def main():
    args = run.parser(__doc__, SETTINGS).parse_args()
    run.check_arguments(args, SETTINGS)
    check_flags(args)
    take_settings_of_runs(args)
    task, examples, elsewhere = task_and_examples(args)
    measure = data.measure_of(task)
    samplings = {name: SAMPLINGS[name] for name in args.sampling}

    rows, sections = [], []  # of the table, and of the page
    for name in args.model:
        model, tokenizer = load(name.partition(":")[0], args.device)
        memory.freeze(model)
        model.graphs = args.graphs and model.device.type == "cuda"
        for sampling, numbers in samplings.items():
            said = what_was_asked(args, len(examples), {sampling: numbers})
            settings = {**settings_of(args, name, model), **numbers}
            if args.controls:
                if not runs_latents(name, model):
                    raise UserError(f"--controls asks what latents do, and {name} runs none: "
                                    "give it a run of --method litereason")
                results = run_controls(model, tokenizer, task, examples, elsewhere, samples=args.samples,
                                       **settings)
                rows += [{**heading(args, title, name, sampling, settings), "control": title, **result}
                         for title, result in results]
                print(f"\n{name}, {said}\n{display.table(results, measure)}", flush=True)
                continue
            latent = args.latent if args.latent != "projector" or runs_latents(name, model) else "none"
            others = latent in OF_OTHERS and latents_of_others(model, tokenizer, task, elsewhere, **settings)
            latent = latent_of(latent, model, others, args.seed)
            result, rollouts = evaluate(model, tokenizer, task, examples, samples=args.samples,
                                        latent=latent, alone=args.alone, **settings)
            row = {**heading(args, name, name, sampling, settings), **result}
            rows.append(row)
            answers = rollouts[:: args.samples]  # each example's first
            if args.html:
                rewards = data.score(task, examples, [answer.text for answer in answers])
                sections.append(page.section(said, row, measure, model, tokenizer, task, examples, answers,
                                             rewards, args.show))
            else:
                print_answers(row["name"], model, tokenizer, task, examples[: args.show], answers)

    if not args.controls:
        print(f"\n{what_was_asked(args, len(examples), samplings)}")
        print(display.table([(row["name"], row) for row in rows], measure) + "\n")
        for row in rows:
            alone = f", {row['seconds_alone']:.2g} s alone" if "seconds_alone" in row else ""
            print(f"{row['name']}: {row['flops']:.3g} FLOPs and {row['seconds_each']:.2g} s an answer{alone}")
    if args.html:
        run.write_text(args.html, page.whole(sections))
        print(f"wrote {args.html}")
    results = rows[0] if len(rows) == 1 else rows
    if args.json:
        run.write_json(args.json, results)
    if args.out:
        run.write_json(os.path.join(args.out, "results.json"), results)
        run.write_json(os.path.join(args.out, "config.json"), vars(args))


# ---------------------------------------------------------------------------- before the models
def check_flags(args):
    """UserError for flags that exclude each other or need another one."""
    if args.controls and (args.latent != "projector" or args.show or args.alone):
        raise UserError("--controls runs every --latent by itself: leave --latent, --show and --alone out")
    if args.out and run.run_settings(args.out).get("script"):
        raise UserError(f"--out {args.out} is a run: the results of eval.py would replace its own")
    for name in args.model:
        if name.partition(":")[2] not in ("", "plain"):
            raise UserError(f"--model {name}: behind a colon may stand plain, for the prompt without tags")
        if run.run_settings(name.partition(":")[0]).get("script") == "results/baselines.py":
            raise UserError(f"{name} is a run of results/baselines.py: read the table in its results.json")
    if args.html and not args.show:
        raise UserError("--html needs --show N: that many answers go onto the page")


def take_settings_of_runs(args):
    """What the command line leaves open is taken from the config.json of the runs among the models: the task,
    its reward and its scorer. UserError if they differ: one table has one task."""
    runs = {path: run.run_settings(path) for path in (name.partition(":")[0] for name in args.model)}
    for flag in ("task", "reward", "scorer"):
        found = {made.get(flag): path for path, made in runs.items()  # another task's reward is another
                 if made.get("script") in ("train_rl.py", "train_projector.py")
                 and (flag == "task" or made.get("task") == args.task)}
        if getattr(args, flag) is None and len(found) > 1:
            said = ", ".join(f"{path} says {value}" for value, path in found.items())
            raise UserError(f"these runs differ in their {flag} ({said}): choose one with --{flag}")
        if getattr(args, flag) is None and found:
            setattr(args, flag, *found)


def task_and_examples(args):
    """-> (task, its examples, examples elsewhere: the latents of other stories come from these)"""
    first = args.model[0].partition(":")[0]
    args.task, task = data.choose_task(args.task, first, args.reward, args.scorer)
    if args.hops and (args.task != "tiny" or args.hops > 7):
        raise UserError("--hops is for --task tiny, from 2 to 7: there are 22 people for three chains")
    chains = {"hops": args.hops} if args.hops else {}
    examples = task.examples(args.split, **chains)[: args.n]
    elsewhere = []
    if args.controls or args.latent in OF_OTHERS:
        elsewhere = task.examples("train" if args.split == "val" else "val")[: args.n or 200]
    data.start_task(task, first, args.reward, args.scorer, args.seed, args.device)
    return task, examples, elsewhere


def what_was_asked(args, n, samplings):
    """The line above a table: task, split, number of examples and how answers were sampled."""
    each = f", {args.samples} answers each" if args.samples > 1 else ""
    words = [f"{name}: " * (len(samplings) > 1)
             + "temperature {temperature:g}, top-p {top_p:g}, top-k {top_k}".format(**numbers)
             for name, numbers in samplings.items()]
    return f"{args.task}, {args.split} split, {n} examples{each}, {'; '.join(words)}, seed {args.seed}"


# ---------------------------------------------------------------------------- each model
def settings_of(args, name, model):
    """What all evaluations of a model share, as arguments of evaluate."""
    path, _, suffix = name.partition(":")
    made = run.run_settings(path)
    slots = run.SLOTS[not checkpoint.is_small(model)]
    return {"latent_prompt": suffix != "plain" and made.get("method") != "grpo", "seed": args.seed,
            "progress": name, "gen_batch_size": args.gen_batch_size,
            "max_new_tokens": args.max_new_tokens or made.get("max_new_tokens") or slots}


def runs_latents(name, model):
    """Whether a model's tags run latents. Not if its projector was never trained, and not in a run of another
    method: there tags have always been text (its checkpoint carries a projector all the same)."""
    method = run.run_settings(name.partition(":")[0]).get("method", "litereason")
    return model.projector_trained and method == "litereason"


def heading(args, title, name, sampling, settings):
    """What a row of results belongs to. Its name in tables says the sampling where there are several."""
    named = f"{title} ({sampling})" if len(args.sampling) > 1 else title
    return {"name": named, "model": name, "task": args.task, "split": args.split, "sampling": sampling,
            "prompt": "tag" if settings["latent_prompt"] else "plain"}


def print_answers(name, model, tokenizer, task, examples, rollouts):
    """--show: each answer, with a line per latent."""
    for example, rollout in zip(examples, rollouts):
        reward = data.score(task, [example], [rollout.text])[0]
        print(f"\n--- {name}, reward {reward:.2f}\n{tokenizer.decode(rollout.prompt_ids)}\n"
              f">>> {display.readable(tokenizer, rollout)}")
        for i, (near, length, head) in enumerate(display.read_out(model, tokenizer, rollout.latents)):
            print(f"    latent {i + 1}: nearest {display.listed(near)}; "
                  f"the head says {display.listed(head)}; length {length:.2f} of an embedding's")


if __name__ == "__main__":
    run.run_script(main)
