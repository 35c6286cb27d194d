"""Stages 1 and 2 (paper Sec. 3.3): collect the model's own traces, put tags into them, train the projector.

Stage 1: of the base's samples those with reward > 0 that ended by themselves are kept; in each, random
sentences are replaced by tags (10 % and 25 % of them, five versions each). Stage 2: the base is frozen.
Cross-entropy on the text after the first tag trains the projector, through all latent steps of all tags.

A small model does otherwise by default: see the last part of this file. --targets none is the paper's. Every
difference from the released code: results/differences.md.

    python train_projector.py                               # the tiny model: a minute and a half
    python train_projector.py --model Qwen2.5-1.5B          # the paper's plot holes, on one GPU
"""
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import types
import zlib

import torch
from tqdm import tqdm

import data
from eval import PAPER, evaluate
from lib import UserError, checkpoint, kv_cache, memory, run, scoring
from lib.run import BySize
from litereason import (CAP, CLOSE, LATENT, OPEN, PROJECTORS, Rollout, generate, insert_latents, latent_step,
                        load, logprobs, parse_tags, projector_loss, start_projector, states, text_loss,
                        unroll, without_latents, word_embeddings, z_size)

# ============================================================ settings
# {title: {name: (default, the least or the choices, what it is)}}; BySize: see lib/run.py
SHARED = {  # by train_rl.py
    "projector": ("warm", ["warm", "random", *PROJECTORS],
                  "start: mlp (paper), normed (ours, real models); controls: random, pause"),
    "targets": (BySize("words", "none"), ["words", "none"], "of latents: the last words of what they skip")}
SETTINGS = {
    "what is run": run.COMMON | {
        "n": (200, 1, "val stories for the accuracy before and after"),
        "save_every": (50, 1, "steps of stage 2 between two states on the disk; the last two are kept")},
    "stage 1 [small model | any other, as released]": {
        "prompts": (BySize(1500, None), 1, "train prompts to sample traces for; None: all"),
        "samples": (BySize(1, 5), 1, "traces per prompt"),
        "max_new_tokens": (run.SLOTS, 1, "slots per trace, latents included"),
        "traces": (None, str, "take traces from this file, jsonl with example (its number) and text")},
    "stage 2": {
        "steps": (BySize(400, None), 0, "optimiser steps; None: every masked trace once"),
        "batch": (BySize(32, 16), 1, "traces per optimiser step"),
        "lr": (BySize(4e-3, 1e-4), 0.0, "peak learning rate of AdamW")},
    "ours, not in the paper": SHARED | {
        "noise": (0.2, 0.0, "on the targets that are fed, a share of their size"),
        "train_base": (0.0, 0.0, "with targets: rate at which the base learns in stage 2 too"),
        "imitate": (0, 0, "before stage 2 the base learns for N steps to write the masked traces")}}

RATIOS, VERSIONS = (0.10, 0.25), 5  # share of the sentences that become tags; versions of a trace for each
AT_ONCE = 160  # samples of stage 1 between two writes to the disk
LARGE = 100  # embeddings: a longer latent drowns the words around it


def settings_of(model, **given):
    """The settings above for a model of this size, but for those that are given and not None."""
    settings = types.SimpleNamespace(**{**dict.fromkeys(itertools.chain(*SETTINGS.values())), **given})
    run.fill(settings, SETTINGS, checkpoint.is_small(model))
    return settings


# ============================================================ stage 1: the model's own traces
def collect_traces(model, tokenizer, task, examples, path, samples, max_new_tokens, seed, tag=None):
    """Stage 1 -> all samples, dicts with "example", "prompt", "text" and, if it is no trace, "left out": why.

    A trace has reward > 0 and ended by itself. `path` has a line of settings and one for each AT_ONCE
    samples: a run with the same settings goes on behind the last line. Tags run no latents yet; with
    tag="forbidden" there are none."""
    prompts = [task.prompt(example, True) for example in examples]
    at_once = max(1, AT_ONCE // samples)  # prompts
    starts = range(0, len(prompts), at_once)
    own = getattr(task, "settings", {"reward": None, "scorer": None})
    header = {  # all that decides what is sampled and kept
        "weights": checkpoint.fingerprint(model), "prompts_crc32": zlib.crc32("".join(prompts).encode()),
        "samples": samples, "max_new_tokens": max_new_tokens, "at_once": at_once, "seed": seed, "tag": tag,
        "task": task.__name__, "reward": own["reward"],
        "scorer": own["scorer"] and own["scorer"][0].config._name_or_path}
    found, *lines = lines_of(path) if os.path.exists(path) else [None]
    lines = lines if found == header else []
    if lines:
        n = len(kept(lines))
        print(f"stage 1: {n} traces are in {path} already, {len(lines)} of {len(starts)} lines")
    file = run.open_log(path, [json.dumps(line) + "\n" for line in [header] + lines])
    bar = tqdm(total=samples * len(prompts), initial=sum(map(len, lines)), desc="stage 1", leave=False)
    said = f"the traces sampled so far are kept; go on with --resume {os.path.dirname(path)}"
    with file, bar, run.stops_noted(said) as stopped:
        for start in starts[len(lines) :]:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(lines))
            rollouts = generate(model, tokenizer, prompts[start : start + at_once], samples, max_new_tokens,
                                latent="none", generator=generator, bar=bar, tag=tag, **PAPER)
            asked = [start + r.prompt for r in rollouts]  # the examples' numbers
            rewards = data.score(task, [examples[i] for i in asked], [r.text for r in rollouts])
            line = []
            for i, r, reward in zip(asked, rollouts, rewards):
                sample = {"example": i, "prompt": prompts[i], "text": r.text}
                if not r.finished:
                    sample["left out"] = "cut"
                elif reward <= 0:
                    sample["left out"] = "wrong" if data.has_verdict(task, r.text) else "no verdict"
                line.append(sample)
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            if stopped:
                break
    everything = list(itertools.chain(*lines))
    n = collections.Counter(sample.get("left out") for sample in everything)
    print(f"stage 1: kept {n[None]} of {len(everything)} traces (reward > 0), in {path}; {n['cut']} were cut "
          f"by --max-new-tokens, {n['no verdict']} without an answer, {n['wrong']} wrong", flush=True)
    return everything


def kept(lines):  # -> traces
    return [sample for sample in itertools.chain(*lines) if "left out" not in sample]


def lines_of(path):
    """What collect_traces has written there: its settings, then lines of samples."""
    with open(path) as f:  # without its end a line is half a line
        return [json.loads(line) for line in f if line.endswith("\n")]


# ============================================================ stage 1: tags in the place of sentences
# A sentence ends at [.!?…] and what closes it, before a space; at the stop of a script without spaces; or
# with the line. The look-behind: a run of dots is tried once, not n times.
CLOSING = r"""["'”’»›)\]}」』）】*_]*"""
SENTENCE = re.compile(rf"\s*[^\n]*?(?:(?<![.!?…])[.!?…]+{CLOSING}(?=\s)|[。！？｡]+{CLOSING}|\n|$)")


def split_answer(text, marker="\\boxed{"):
    """(reasoning, answer): the answer begins at the last marker; ("", "") if there is none."""
    place = data.last_opening(text, marker)
    return (text[: place[0]], text[place[0] :]) if place else ("", "")


def sentences_of(text):
    return [sentence.strip() for sentence in SENTENCE.findall(text) if sentence.strip()]


def mask_sentences(rng, tokenizer, reasoning, ratio, cap=CAP):
    """Replaces max(1, int(ratio * n)) random sentences by tags -> the text; None if there is no sentence.

    N = clamp(int(0.2 * tokens of the sentence), 1, cap). The sentence is deleted: there is no target for the
    latents. Tags already there stay. One space on each side of a tag. rng: random.Random."""
    pieces, sentences = [], []  # texts that join to the reasoning; the numbers of those that are sentences
    start = 0
    for tag_start, tag_end, _ in parse_tags(reasoning, cap) + [(len(reasoning), len(reasoning), 0)]:
        for sentence in SENTENCE.findall(reasoning[start:tag_start]):
            if sentence.strip():
                sentences.append(len(pieces))
            pieces.append(sentence)
        pieces.append(reasoning[tag_start:tag_end])
        start = tag_end
    if not sentences:
        return None
    for i in rng.sample(sentences, max(1, int(ratio * len(sentences)))):
        n_tokens = len(checkpoint.encode_text(tokenizer, pieces[i].strip()))
        pieces[i] = f" {OPEN}{max(1, min(cap, int(0.2 * n_tokens)))}{CLOSE} "
    text = re.sub(rf"(?:(?<!\s)\s+|)({OPEN}[0-9 ]*{CLOSE})\s*", r" \1 ", "".join(pieces))
    return text.replace(f"{CLOSE}  {OPEN}", f"{CLOSE} {OPEN}").strip()


def masked_trace(model, tokenizer, rng, prompt, text, answer, marker, ratio):
    """One training trace: the reasoning with sentences replaced by tags, then the answer -> Rollout, or None.

    prompt: text or token ids. answer: the text to end in; None keeps the trace's own."""
    reasoning, own_answer = split_answer(text, marker)
    masked = mask_sentences(rng, tokenizer, reasoning, ratio, model.config.litereason_max_reasoning_steps)
    if masked is None:
        return None
    text = masked + "\n" + (own_answer if answer is None else answer).strip()
    ids = checkpoint.encode_text(tokenizer, text)
    slots = insert_latents(model, tokenizer, ids + [checkpoint.end_of_answer(model, tokenizer)])
    prompt_ids = checkpoint.encode_prompt(model, tokenizer, prompt) if isinstance(prompt, str) else prompt
    no_latents = torch.zeros(0, model.config.hidden_size)  # they are made while the projector is trained
    return Rollout(prompt_ids, slots, no_latents, text=text) if LATENT in slots else None


def versions(model, tokenizer, traces, marker, rng):  # -> [(story, row)]
    rows = []
    for trace, ratio in itertools.product(traces, RATIOS * VERSIONS):
        row = masked_trace(model, tokenizer, rng, trace["prompt"], trace["text"], None, marker, ratio)
        rows += [] if row is None else [(trace["example"], row)]
    return rows


def run_stage_1(model, tokenizer, task, out, settings, smoke=False):
    """Masked traces -> (those to train on, those of a tenth of the stories, held out, {"kept": n,
    "sampled": n}). Goes on with what a stopped run left in `out`.

    settings: as settings_of makes them. smoke: if too few samples earned anything, all are taken."""
    rng = random.Random(settings.seed)
    marker = data.opening_of(task)
    has_targets = settings.targets == "words"
    if settings.train_base and not has_targets:
        raise UserError("--train-base goes with --targets words: the paper's stage 2 leaves the base frozen")
    examples = task.examples("train")[: settings.prompts]
    if settings.traces:  # ours: somebody else has written them, for a base that earns nothing
        with open(settings.traces, encoding="utf-8") as f:
            samples = [{"prompt": task.prompt(examples[row["example"]], True), **row}
                       for row in map(json.loads, f)]
    else:
        tag = "forbidden" if has_targets else None  # a target is taken from a sentence that was written out
        samples = collect_traces(model, tokenizer, task, examples, os.path.join(out, "traces.jsonl"),
                                 settings.samples, settings.max_new_tokens, settings.seed, tag)
    traces = kept([samples])
    if has_targets:
        every = ((i, SHARES * VERSIONS) for i in range(len(traces)))
        rows = masked_with_targets(model, tokenizer, rng, pieces_of(tokenizer, traces, marker), every)
    else:
        rows = versions(model, tokenizer, traces, marker, rng)
        if smoke and len(dict(rows)) < 2:
            print("warning: too few traces were kept; --smoke goes on with all samples", flush=True)
            traces = [{**sample, "text": f"{sample['text']}\n{marker}"} for sample in samples]
            rows = versions(model, tokenizer, traces, marker, rng)
    stories = sorted(dict(rows))
    if len(stories) < 2:
        raise UserError("stage 1 kept too few traces: two stories with a sentence before the answer are the "
                        "least; a stronger --model, a higher --max-new-tokens or more prompts may help")
    held_out = set(stories[-max(1, len(stories) // 10) :])
    train = [row for story, row in rows if story not in held_out]
    held = [row for story, row in rows if story in held_out]
    counts = {"kept": len(traces), "sampled": 0 if settings.traces else len(samples)}
    return train, rng.sample(held, min(8 if smoke else 256, len(held))), counts


# ======================================================= stage 2: the projector learns, the base is frozen
def fit_projector(model, traces, lr, batch, steps=None, budget=None, **loop):
    """Stage 2, and with schedule=False stage 3's refresh: trains the projector -> the last steps' mean loss.
    budget: positions per forward pass, None is what fits. loop: see `optimise`."""
    budget = budget or positions_at_once(model, traces)

    def losses_of(rows, step):  # per text token after the first tag
        n_tokens = sum(map(_scored_tokens, rows))
        for part in scoring.pack(rows, budget, unrolled=True):
            loss, _ = projector_loss(model, [rows[i] for i in part])
            yield loss / n_tokens

    learners = [(model.reasoning_projector.parameters(), lr, 0.0)]
    with memory.base_frozen(model):
        return optimise(model, traces, learners, batch, steps, losses_of, **loop)


def _scored_tokens(row):  # after the first tag
    after_first = row.slots[row.slots.index(LATENT) :]
    return len(after_first) - after_first.count(LATENT)


def optimise(model, traces, learners, batch, steps, losses_of, clip=0.2, seed=0, together=1,
             schedule=True, states=None, every=50):
    """The loop of stage 2, whatever learns from whatever loss -> the mean loss of the last 20 steps.

    learners   [(parameters, peak learning rate, the share of the steps after which they begin to learn)]
    steps      None is one pass over the traces
    losses_of  (rows, step) -> yields the mean loss of a batch in parts, one per micro-batch
    together   see `batches`
    schedule   warm-up over 10 % of the steps, then a cosine to 10 %; else the rate is constant
    states     a directory: the loop continues from the newest state there, and leaves one every so many steps
               and when it is stopped. Beside it DIRECTORY.jsonl has a line per step"""
    steps = max(1, len(traces) // batch) if steps is None else steps
    groups = [{"params": list(p), "lr": lr, "peak": lr, "begins": int(share * steps)}
              for p, lr, share in learners]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    name = os.path.basename(states or "the refresh").replace("-", " ")
    lines, log, stops = [], open(os.devnull, "w"), contextlib.nullcontext()
    if states:
        step, state = run.read_state(states) or (0, None)
        if state:
            lines = state["lines"]
            optimizer.load_state_dict(state["optimizer"])
            for p, saved in zip(parameters, state["weights"], strict=True):
                p.data.copy_(saved)
            print(f"resumed from step {step} of {name}", flush=True)
        log = run.open_log(f"{states}.jsonl", lines)
        stops = run.stops_noted(f"go on with --resume {os.path.dirname(states)}")
    rest = itertools.islice(batches(traces, batch, seed, together), len(lines), steps)
    bar = tqdm(rest, desc=name, initial=len(lines), total=steps, leave=False, disable=states is None)
    latents = []  # all that the projector makes in a step, (n, D) each
    hook = model.reasoning_projector.register_forward_hook(lambda module, h, z: latents.append(z.detach()))
    with log, hook, stops as stopped:
        for step, rows in enumerate(bar, start=len(lines)):
            # (1) The learning rate of this step.
            share = warm_up_and_cosine(step, steps, max(1, steps // 10)) if schedule else 1.0
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"] if step >= group["begins"] else 0.0

            # (2) The gradient of the batch's mean loss, one micro-batch after the other.
            total = 0.0
            for loss in losses_of(rows, step):
                loss.backward()
                total += loss.item()

            # (3) One optimiser step; one bad batch must not cost the projector.
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
            if norm.isfinite():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # (4) The step's line, and the state.
            size = z_size(model, torch.cat(latents)) if latents else None
            latents.clear()
            m = {"step": step + 1, "loss": run.if_finite(total), "grad_norm": run.if_finite(float(norm)),
                 "z_size": run.if_finite(size)}
            lines.append(json.dumps(m) + "\n")
            log.write(lines[-1])
            log.flush()
            bar.set_postfix(loss=total, z_size=size)
            if states and (stopped or len(lines) % every == 0 or len(lines) == steps):
                weights = [p.detach() for p in parameters]
                run.write_state(states, len(lines), {"weights": weights, "lines": lines,
                                                     "optimizer": optimizer.state_dict()})
            if stopped:
                break
    steps_made = list(map(json.loads, lines))
    skipped = sum(m["grad_norm"] is None for m in steps_made)
    if skipped:
        print(f"warning: {skipped} of {steps} steps of {name} were skipped: their gradient was not finite",
              flush=True)
    losses = [m["loss"] for m in steps_made[-20:] if m["loss"] is not None]
    return sum(losses) / len(losses) if losses else math.nan


def batches(traces, size, seed, together=1):
    """Yields batches without end, one shuffled epoch after another. together: so many neighbours stay
    together (versions of one trace: their prompt is read once)."""
    rng = random.Random(seed)
    order = []
    while True:
        while len(order) < size:
            starts = range(0, len(traces), together)
            for start in rng.sample(starts, len(starts)):
                order += range(start, min(start + together, len(traces)))
        rows = [traces[i] for i in order[:size]]
        order = order[size:]
        rows.sort(key=lambda r: (len(r.slots), r.slots.index(LATENT)))  # neighbours alike: less padding
        yield rows


def warm_up_and_cosine(step, steps, warm_up):
    """The share of the peak rate: up over the first warm_up steps, then a cosine down to 0.1."""
    progress = max(0, step - warm_up) / max(1, steps - warm_up)
    return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * progress))


def positions_at_once(model, traces, base_learns=False):
    """How many positions of traces one forward and backward pass can have."""
    longest = max(len(r.prompt_ids) + len(r.slots) for r in traces)
    trained = model if base_learns else model.reasoning_projector
    return memory.positions_that_fit(model, longest, trained.parameters(), otherwise=12_000)


@torch.no_grad()
def mean_loss(model, traces, latent):
    """Loss per token after the first tag, over all traces."""
    total, tokens = 0.0, 0
    for part in scoring.pack(traces, positions_at_once(model, traces), unrolled=True):
        loss, n = projector_loss(model, [traces[i] for i in part], latent)
        total += loss
        tokens += n
    return float(total) / tokens


def run_stage_2(model, tokenizer, train, held, out, settings):
    """Trains model.reasoning_projector in place -> {name: loss on the held out rows}. Continues what a
    stopped run left in `out`."""
    loop = {"seed": settings.seed, "every": settings.save_every}
    if settings.imitate:
        imitate(model, train, settings.batch, settings.imitate, states=os.path.join(out, "imitation"), **loop)
    print(f"stage 2: {len(train)} masked traces, {len(held)} more held out", flush=True)
    losses = {"no latents": mean_loss(model, held, "none"), "zeros": mean_loss(model, held, "zeros"),
              "start": mean_loss(model, held, "projector")}
    with torch.no_grad():
        size = z_size(model, torch.cat(unroll(model, held[:8])[1]))
    if settings.targets == "none" and not size < LARGE:  # nan is not, too
        print(f"warning: a latent is {size:.3g} times as long as an embedding at the start and drowns the "
              "words around it; those of --projector normed do not", flush=True)
    loop["states"] = os.path.join(out, "stage-2")
    if settings.targets == "words":
        fit_to_targets(model, train, settings.lr, settings.batch, settings.steps, noise=settings.noise,
                       base_lr=settings.train_base, **loop)
    else:
        fit_projector(model, train, settings.lr, settings.batch, settings.steps, **loop)
    model.projector_trained = True
    losses["trained"] = mean_loss(model, held, "projector")
    said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    print(f"stage 2: validation loss after the first tag: {said}", flush=True)
    return losses


# ============================================================ the script
def set_start(args, model):
    """--projector, where the model has no trained one; else UserError if it is named."""
    if args.projector == "warm":
        return
    if model.projector_trained:
        raise UserError(f"--projector {args.projector}: {args.model} has a trained projector already")
    torch.manual_seed(args.seed)
    start_projector(model, args.projector)


def parse_arguments():
    return run.parse_resumable(run.parser(__doc__, SETTINGS), "train_projector.py")


def main():
    args = parse_arguments()
    args.task, task = data.choose_task(args.task, args.model, args.reward, args.scorer)
    args.out = args.out or run.default_out(args.model, args.task, "projector")
    run.check_arguments(args, SETTINGS)
    lock_file = run.take_directory(args.out, args.model, args.resume, args.overwrite)  # noqa: F841
    args.examples = run.digest([task.examples("train"), task.examples("val")])
    model, tokenizer = load(args.model, args.device)
    run.fill(args, SETTINGS, checkpoint.is_small(model))
    model.graphs = model.device.type == "cuda"
    set_start(args, model)
    data.start_task(task, args.model, args.reward, args.scorer, args.seed, args.device)
    if not checkpoint.is_small(model):
        memory.checkpoint_layers(model)
    run.begin(args.out, "train_projector.py", vars(args))

    def accuracy():
        figures, _ = evaluate(model, tokenizer, task, task.examples("val")[: args.n], latent_prompt=True,
                              seed=args.seed, max_new_tokens=args.max_new_tokens, **PAPER)
        return figures

    train, held, counts = run_stage_1(model, tokenizer, task, args.out, args)
    before = accuracy()
    losses = run_stage_2(model, tokenizer, train, held, args.out, args)
    after = accuracy()
    print(f"{data.measure_of(task)} with the tag prompt on {after['n_examples']} val stories: "
          f"{before['accuracy']:.3f} before, {after['accuracy']:.3f} trained", flush=True)
    checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
    run.write_json(os.path.join(args.out, "results.json"),
                   {**counts, "losses": losses, "before": before, "after": after})
    print(f"saved {args.out}/model; next: python train_rl.py --model {args.out} --task {args.task}")


# ========================================================== OURS, NOT IN THE PAPER: a target for each latent
# The paper's loss does not say what a latent should hold: it is the cross-entropy of the text behind the tag.
# With --targets words a run of skipped sentences becomes one tag, with a latent for each of them and one
# before: where the thought stood when the tag was opened. The target of a latent: the embeddings of the last
# informative words of its sentence (of the first: of the text before the tag), their sum divided by the root
# of their number.
#
#     the policy wrote    a b c . d e f . g h i . \boxed{Yes}
#     a training trace    a b c . <..> 3 </..>  LATENT      LATENT      LATENT      \boxed{Yes}
#     targets                                   b + c       e + f       h + i
#
# The targets are fed, so that a whole trace takes one pass, and with noise, as the projector will err. The
# base is frozen, or with --train-base it learns too, by the paper's loss (as in Coconut, arXiv 2412.06769,
# and CODI, 2502.21074). In RL the base is held to the same targets (add_anchor).
SHARES = (0.3, 0.6, 1.0)  # of the sentences that are skipped, instead of the paper's 0.1 and 0.25
SHARES_IN_RL = (0.6, 1.0, 1.0)  # there the policy skips more
VERSIONS_TOGETHER = 4  # of one trace in a batch
WORDS = 2  # in a target
ANCHORED = 32  # traces of stage 1 in each step of the anchor
# Words that tell nothing: those of a sentence that is more than REPEATED of all (in the tiny world 0.30 and
# more, any other less than 0.001), and those that more than COMMON of the others have (there 0.78; a name
# 0.22).
REPEATED, COMMON = 0.1, 0.5


def pieces_of(tokenizer, traces, marker):
    """-> (traces, [(sentences, answer) of each], the token ids that tell nothing), below `pieces`."""
    split = [split_answer(trace["text"], marker) for trace in traces]
    pieces = [(sentences_of(reasoning), answer) for reasoning, answer in split]
    return traces, pieces, common_words(tokenizer, itertools.chain(*(sentences for sentences, _ in pieces)))


def common_words(tokenizer, sentences):
    """Token ids that tell nothing: those of repeated sentences, and those that most of the others have."""
    times = collections.Counter(sentences)
    repeated = {sentence for sentence, n in times.items() if n > max(1, REPEATED * times.total())}
    others = times.keys() - repeated
    counts = collections.Counter()
    for sentence in others:
        counts.update(set(checkpoint.encode_text(tokenizer, sentence.strip())))
    common = {token for token, n in counts.items() if n > COMMON * len(others)}
    return common.union(*(checkpoint.encode_text(tokenizer, sentence.strip()) for sentence in repeated))


def last_words(model, tokenizer, text, common, words=WORDS):
    """A latent's target (D,); None if the text has too few informative words."""
    ids = [token for token in checkpoint.encode_text(tokenizer, text.strip()) if token not in common]
    informative = [token for token in ids if any(char.isalnum() for char in tokenizer.decode([token]))]
    if len(informative) < words:
        return None
    last = torch.tensor(informative[-words:], device=model.device)
    return model.get_input_embeddings()(last).detach().sum(0) / words**0.5


def masked_with_targets(model, tokenizer, rng, pieces, chosen):
    """Masks traces, each once for each of its shares -> [(story, Rollout whose `latents` are the targets)].

    chosen: (the trace's number, shares of its sentences to skip), ..."""
    traces, split, common = pieces
    rows = []
    for i, shares in chosen:
        prompt = traces[i]["prompt"]
        prompt_ids = checkpoint.encode_prompt(model, tokenizer, prompt)
        sentences, answer = split[i]
        known = [last_words(model, tokenizer, text, common) for text in [prompt, *sentences]]
        for share in shares:
            row = mask_runs(model, tokenizer, rng, prompt_ids, sentences, answer, known, share)
            rows += [] if row is None else [(traces[i]["example"], row)]
    return rows


def mask_runs(model, tokenizer, rng, prompt_ids, sentences, answer, known, share):
    """One training trace: each sentence is skipped with the chance `share`, a run of them for one tag ->
    Rollout whose `latents` are the targets, or None if nothing was skipped.

    known: the targets of the prompt and of each sentence, or None: then a skipped sentence has no latent. A
    run too long for the cap takes several tags."""
    cap = model.config.litereason_max_reasoning_steps
    pieces, targets = [], []
    skipped = []  # targets of the run just now
    before, *of_sentences = known
    for sentence, target in zip([*sentences, answer], [*of_sentences, None]):
        if sentence is not answer and rng.random() < share:
            skipped += [] if target is None else [target]
            continue
        while skipped:
            begins = [] if before is None or cap == 1 else [before]
            held = (begins + skipped)[:cap]
            pieces.append(f"{OPEN}{len(held)}{CLOSE}")
            targets += held
            before = held[-1]
            skipped = skipped[len(held) - len(begins) :]
        pieces.append(sentence)
        before = before if target is None else target
    if not targets:
        return None
    text = " ".join(pieces)
    ids = checkpoint.encode_text(tokenizer, text.strip()) + [checkpoint.end_of_answer(model, tokenizer)]
    return Rollout(prompt_ids, insert_latents(model, tokenizer, ids), torch.stack(targets).cpu(), text=text)


def fit_to_targets(model, rows, lr, batch, steps=None, budget=None, noise=0.0, base_lr=0.0, seed=0, **loop):
    """As fit_projector, on rows whose `latents` are targets. base_lr > 0: the base learns too, from the
    second fifth of the steps on."""
    budget = budget or positions_at_once(model, rows, base_lr > 0)
    learners = [(model.reasoning_projector.parameters(), lr, 0.0)]
    if base_lr:
        learners.append((memory.base_parameters(model), base_lr, 0.2))

    losses_of = functools.partial(target_losses, model, budget, noise, seed, base_lr > 0)
    with contextlib.nullcontext() if base_lr else memory.base_frozen(model):
        return optimise(model, rows, learners, batch, steps, losses_of, seed=seed, together=VERSIONS_TOGETHER,
                        **loop)


def target_losses(model, budget, noise, seed, base_learns, rows, step):
    """Yields a batch's loss in one part per micro-batch."""
    n_tokens = sum(map(_scored_tokens, rows))
    n_latents = sum(r.n_latents for r in rows)
    fed = with_noise(rows, noise, torch.Generator().manual_seed(seed * 1_000_003 + step))
    for part in scoring.pack(rows, budget, unrolled=True):
        some, some_fed = [rows[i] for i in part], [fed[i] for i in part]
        yield target_loss(model, some, some_fed, n_tokens, n_latents, base_learns)


def with_noise(rows, noise, generator):
    """The rows with noise on each latent, of a strength of its own, up to `noise` times the latent's size.
    (Noise on embeddings as such: NEFTune, arXiv 2310.05914.)"""
    noisy = []
    for row in rows:  # drawn on the CPU: the same on every device
        strength = noise * torch.rand(row.n_latents, 1, generator=generator)
        direction = torch.randn(row.latents.shape, generator=generator)
        scale = row.latents.square().mean(-1, keepdim=True).sqrt()
        added = direction.to(row.latents) * scale * strength.to(row.latents)
        noisy.append(dataclasses.replace(row, latents=row.latents + added))
    return noisy


@kv_cache.with_autocast
def target_loss(model, rows, fed, n_tokens, n_latents, base_learns=False):
    """The squared error of latents to their targets, in units of the embeddings' variance, and, if the base
    learns, the paper's loss: a micro-batch's share of the batch's. fed: the rows as they are fed."""
    h, slots, valid = states(model, fed)
    z = latent_step(model, h[valid & (slots == LATENT)])  # (n, D)
    variance = word_embeddings(model, 10_000).var()  # in a large vocabulary these will do
    targets = torch.cat([row.latents for row in rows]).to(z)
    loss = (z - targets).square().mean(-1).sum() / variance / n_latents
    if base_learns:
        text, _ = text_loss(model, h, rows, [row.slots.index(LATENT) for row in rows])
        loss = loss + text / n_tokens
    return loss


def imitate(model, traces, batch, steps, lr=5e-5, **loop):
    """The base learns to write the masked traces, tags as text: RL cannot keep a tag that is never
    written."""
    budget = positions_at_once(model, traces, base_learns=True)

    def losses_of(rows, step):  # per token
        rows = [without_latents(r) for r in rows]
        n_tokens = sum(r.n_tokens for r in rows)
        for part in scoring.pack(rows, budget):
            yield -logprobs(model, [rows[i] for i in part])[0].sum() / n_tokens

    learners = [(memory.base_parameters(model), lr, 0.0)]
    return optimise(model, traces, learners, batch, steps, losses_of, clip=1.0, **loop)


def masked_again(model, tokenizer, pieces, n, rng):
    """n traces of stage 1, masked anew -> Rollouts whose `latents` are the targets."""
    numbers = rng.sample(range(len(pieces[0])), min(n, len(pieces[0])))
    chosen = ((i, [rng.choice(SHARES_IN_RL)]) for i in numbers)
    return [row for _, row in masked_with_targets(model, tokenizer, rng, pieces, chosen)]


def add_anchor(model, tokenizer, pieces, step, weight, noise, seed, budget):
    """Adds `weight` times the gradient of stage 2's squared error, for the base alone -> the error.

    Nothing in RL's loss keeps latents as they should be. So some traces of stage 1 are masked again and the
    base is held to their targets, as InstructGPT's policy is to its pretraining (arXiv 2203.02155)."""
    rows = masked_again(model, tokenizer, pieces, ANCHORED, random.Random(f"{seed} {step} anchor"))
    error = 0.0
    model.reasoning_projector.requires_grad_(False)
    for loss in target_losses(model, budget, noise, seed, False, rows, step):
        if loss.requires_grad:  # a pause token does not depend on the base
            (weight * loss).backward()
            memory.wait_for_gradients(model)
        error += loss.item()
    model.reasoning_projector.requires_grad_(True)
    return error


if __name__ == "__main__":
    run.run_script(main)
