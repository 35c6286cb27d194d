"""Stages 1 and 2 (paper Sec. 3.3): collect the model's own traces, put tags into them, train the projector.

Stage 1: k samples per prompt from the base, with the tag prompt; those with reward > 0 that ended by
themselves are kept (as released, with --keep-cut, also those that the length limit cut); in every kept
trace random sentences are replaced by tags (10 % and 25 % of them, five versions each), N from the
sentence's length.
Stage 2: the base is frozen; cross-entropy on the text after the first tag trains the projector, through all
latent steps of all tags.

A small model does otherwise by default (--targets words, see targets.py): it writes stage 1 without tags, a
run of sentences becomes one tag, and each latent learns a target of its own. --targets none is the paper's.

Left out, and why: (1) spaCy: sentences end at [.!?…。] or a newline. (2) The released code drops paragraphs
when it joins sentences again; here the text between them stays. (3) Its loss seems to be summed over 16
micro-batches instead of averaged, so that its clip of 0.2 bites harder; here the gradient of the mean over
a batch's tokens is clipped. (4) Its AdamW has the betas 0.9 and 0.999 (--betas), and it takes no trace of
more than 4,096 tokens (--max-length).

    python train_projector.py                               # the tiny model: a minute and a half on 2 cores
    python train_projector.py --model Qwen2.5-1.5B          # the paper's plot holes, on one GPU
    python train_projector.py --steps 2 --prompts 8 --n 8   # a smoke run
    python train_projector.py --resume out/tiny-projector   # continue a stopped run: on a CPU bit for bit
"""
import collections
import contextlib
import itertools
import json
import math
import os
import random
import re
import time
import zlib

import torch
from tqdm import tqdm

import data
from lib import checkpoint, display, memory, run, scoring
import targets
from eval import PAPER, evaluate
from litereason import (CAP, CLOSE, LATENT, OPEN, PROJECTORS, Rollout, UserError, embedding_size, generate,
                        insert_latents, load, logprobs, parse_tags, projector_loss, start_projector,
                        without_latents)

# Share of the sentences that become tags; versions per trace and ratio (paper Sec. 3.3)
RATIOS, VERSIONS = (0.10, 0.25), 5
VERSIONS_TOGETHER = 4  # of one trace in a batch of stage 2, with --targets words
AT_ONCE = 160  # traces that stage 1 samples before it writes those down that it keeps

# Why a sample of stage 1 is of no use to stage 2: in words, and what helps.
REASONS = {
    "no verdict": ("without an answer in the form that the prompt asks for", "a --model that keeps to that "
                   "form (an instruct model, or a larger one), or another --task"),
    "cut": ("cut by the length limit", "a higher --max-new-tokens"),
    "wrong": ("that earned nothing", "more prompts (--prompts, in train_rl.py --trace-prompts) or a stronger "
              "--model"),
    "no sentence": ("without a sentence before the answer", "a --model that reasons before it answers")}

# The released settings, and what a model of under 50 M parameters trained from scratch needs.
RELEASED = {"prompts": None, "k": 5, "lr": 1e-4, "batch": 16, "steps": None, "imitate": 0,
            "targets": "none", "words": 2, "noise": 0.2, "train_base": 0.0}
SMALL = {"prompts": 1500, "k": 1, "lr": 4e-3, "batch": 32, "steps": 400, "imitate": 0,
         "targets": "words", "words": 2, "noise": 0.2, "train_base": 0.0}
IMITATION_LR = 5e-5  # peak; ours
LARGE = 100  # sizes of an embedding: a latent of more drowns the words around it


# ============================================================ stage 1: the model's own traces
def collect_traces(model, tokenizer, task, examples, k, max_new_tokens, seed, path, tag=None, keep_cut=False):
    """Stage 1: k samples per example, those with reward > 0 that are whole (keep_cut: or not) kept ->
    [{"example", "prompt", "text"}], the others, each with its reason as "left out".

    `path` has a line for the settings and one for each AT_ONCE samples, written when they are done: what is
    there with the same settings is not sampled again. The draws of a line follow from the seed and its number
    alone, so a stopped stage 1 loses one at most. The base has no trained projector yet, so tags that it
    writes run no latents (latent="none"); with tag="forbidden" it writes none."""
    header = _settings_of_traces(model, task, examples, k, max_new_tokens, seed, tag)
    header |= {"keep_cut": True} if keep_cut else {}
    lines = _lines_already_there(path, header)
    together = header["at_once"]
    starts = range(0, len(examples), together)
    if lines:
        n_traces = len(_kept(lines))
        print(f"stage 1: {n_traces} traces are in {path} already, {len(lines)} of {len(starts)} lines of it")
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in [header] + lines)
        f.flush()
        os.replace(path + ".tmp", path)
        bar = tqdm(total=k * len(examples), desc="stage 1", leave=False)
        for number, start in enumerate(starts):
            if number < len(lines):
                bar.update(k * len(examples[start : start + together]))
                continue
            asked = examples[start : start + together]
            prompts = [task.prompt(example, True) for example in asked]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            rollouts = generate(model, tokenizer, prompts, k, max_new_tokens, latent="none",
                                generator=generator, bar=bar, tag=tag, **PAPER)
            rewards = data.score(task, [asked[r.prompt] for r in rollouts], [r.text for r in rollouts])
            line = []
            for r, reward in zip(rollouts, rewards):
                trace = {"example": start + r.prompt, "prompt": prompts[r.prompt], "text": r.text}
                if reward <= 0 and data.has_verdict(task, r.text):
                    trace["left out"] = "wrong"
                elif reward <= 0 or not (r.finished or keep_cut):
                    trace["left out"] = "no verdict" if r.finished else "cut"
                line.append(trace)
            lines.append(line)
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
        bar.close()
    traces = _kept(lines)
    others = [trace for trace in itertools.chain(*lines) if "left out" in trace]
    said = f"; the others: {_in_words(reasons_of(others))}" if others else ""
    print(f"stage 1: kept {len(traces)} of {k * len(examples)} traces (reward > 0), in {path}{said}")
    return traces, others


def reasons_of(left_out):
    """Why samples were not kept -> Counter."""
    return collections.Counter(trace["left out"] for trace in left_out)


def _in_words(reasons):
    """{reason: samples} as text, the most frequent first."""
    return ", ".join(f"{n} {REASONS[why][0]}" for why, n in reasons.most_common())


def _kept(lines):
    """The traces in lines of traces.jsonl, without the samples that were left out."""
    return [trace for trace in itertools.chain(*lines) if "left out" not in trace]


def _settings_of_traces(model, task, examples, k, max_new_tokens, seed, tag):
    """All that decides what stage 1 samples."""
    own = getattr(task, "settings", {"reward": None, "scorer": None})
    prompts = "".join(task.prompt(example, True) for example in examples)
    return {
        "model": model.config._name_or_path,
        "weights": checkpoint.fingerprint(model),
        "task": task.__name__,
        "prompts": len(examples),
        "prompts_crc32": zlib.crc32(prompts.encode()),
        "k": k,
        "max_new_tokens": max_new_tokens,
        "at_once": max(1, AT_ONCE // k),  # prompts
        "seed": seed,
        "tag": tag,
        "left_out": True,  # samples that are not kept are in the lines too
        "reward": own["reward"],
        "scorer": own["scorer"] and own["scorer"][0].config._name_or_path}


def _lines_already_there(path, header):
    """The lines of traces that an earlier run with the same settings has written."""
    try:
        with open(path) as f:
            # Without its end it is half a line.
            old_header, *lines = [json.loads(line) for line in f if line.endswith("\n")]
    except FileNotFoundError:
        return []
    except ValueError:
        print(f"stage 1: {path} is not readable; sampling again")
        return []
    if old_header != header:
        print(f"stage 1: {path} was made with other settings; sampling again")
        return []
    return lines


def given_traces(path, task, examples):
    """Ours: traces that somebody else has written, for a base that earns nothing -> as collect_traces.

    path: jsonl, in each line the number of a train example and a text: {"example": 0, "text": ".."}."""
    traces = []
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                prompt = task.prompt(examples[row["example"]], True)
                traces.append({"example": row["example"], "prompt": prompt, "text": row["text"]})
    except (OSError, ValueError, TypeError, KeyError, IndexError) as e:
        raise UserError(f"--traces {path}: {e!r}; each line is to be like {{\"example\": 0, \"text\": \"..\"}}, "
                        f"with one of {len(examples)} train examples") from e
    print(f"stage 1: {len(traces)} traces from {path}, none sampled")
    return traces


def read_traces(path):
    """The traces that collect_traces has written there."""
    with open(path) as f:
        _, *lines = [json.loads(line) for line in f]
    return _kept(lines)


# ============================================================ stage 1: tags in the place of sentences
# A run of characters up to [.!?…] and what closes it, if a space follows; to the stop of a script without
# spaces; or to the line's end. The look-behind: a run of dots is tried once, not n times.
CLOSING = r"""["'”’»›)\]}」』）】*_]*"""
SENTENCE = re.compile(rf"\s*[^\n]*?(?:(?<![.!?…])[.!?…]+{CLOSING}(?=\s)|[。！？｡]+{CLOSING}|\n|$)")


def split_answer(text, marker="\\boxed{"):
    """(reasoning, answer): the answer begins at the last marker; ("", "") if there is none."""
    place = data.last_opening(text, marker)
    return (text[: place[0]], text[place[0] :]) if place else ("", "")


def sentences_of(text):
    return [sentence.strip() for sentence in SENTENCE.findall(text) if sentence.strip()]


def mask_sentences(rng, tokenizer, reasoning, ratio, cap=CAP):
    """Replaces max(1, int(ratio * n)) random sentences by tags, N = clamp(int(0.2 * tokens of the sentence),
    1, cap).

    The sentence is deleted: there is no target for the latents themselves. Tags already there are kept and
    never replaced. One space on each side of a tag. rng: random.Random. None if there is no sentence.

    Ours: one pattern, SENTENCE, says where sentences end. The released code has spaCy's model for that in
    stage 1 and its sentencizer in stage 3, which ends one at a [.!?] that is a word of its own (not in "Mr."
    or "...") and at more scripts' stops, with all punctuation that follows, opening quotes too. Here a
    newline, "...", "…" and an abbreviation's point end one as well, 。 needs no space after it, and a quote
    stays with what it opens."""
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
        n = max(1, min(cap, int(0.2 * n_tokens)))
        pieces[i] = f" {OPEN}{n}{CLOSE} "
    text = re.sub(rf"(?:(?<!\s)\s+|)({OPEN}[0-9 ]*{CLOSE})\s*", r" \1 ", "".join(pieces))
    return text.replace(f"{CLOSE}  {OPEN}", f"{CLOSE} {OPEN}").strip()


def masked_trace(model, tokenizer, rng, prompt, text, answer, marker, ratio):
    """One training trace: the reasoning with sentences replaced by tags, then the answer -> Rollout, or None
    if there is no sentence.

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


def mask_all(model, tokenizer, traces, left_out, marker, rng, aim="none", words=2):
    """Every trace in several masked versions (RATIOS x VERSIONS; with targets, targets.SHARES x VERSIONS) ->
    (training rows, at most 256 held-out rows); a tenth of the stories is held out. left_out: samples that
    are no traces. aim: "words" gives each latent a target (targets.py)."""
    masked = versions_with_targets if aim == "words" else versions
    rows = masked(model, tokenizer, traces, marker, rng, words)  # (story, row)
    stories = sorted({story for story, _ in rows})
    held_out = set(stories[len(stories) - max(1, len(stories) // 10):])
    train = [row for story, row in rows if story not in held_out]
    held = [row for story, row in rows if story in held_out]
    if traces and not any(split_answer(trace["text"], marker)[1] for trace in traces):
        raise UserError(f"none of the {len(traces)} traces that stage 1 kept has the words {marker!r}, "
                        f"before which reasoning stands: set ANSWER of the task to the words that its "
                        f"prompt asks for")
    if not train or not held:
        empty = sum(trace["example"] not in stories for trace in traces)
        why = reasons_of(left_out) + collections.Counter({"no sentence": empty})
        leading = max(why, key=why.get, default="wrong")
        others = f"; the others: {_in_words(why)}" if why else ""
        raise UserError(f"stage 1 kept {len(traces)} of {len(traces) + len(left_out)} traces, too few: "
                        f"two stories with a sentence to mask are the least{others}; what helps: "
                        f"{REASONS[leading][1]}")
    return train, rng.sample(held, min(256, len(held)))


def versions(model, tokenizer, traces, marker, rng, words):
    """The paper's: RATIOS x VERSIONS of each trace -> [(story, row)]"""
    rows = []
    for trace in traces:
        for ratio in RATIOS * VERSIONS:
            row = masked_trace(model, tokenizer, rng, trace["prompt"], trace["text"], None, marker, ratio)
            if row is not None:
                rows.append((trace["example"], row))
    return rows


def versions_with_targets(model, tokenizer, traces, marker, rng, words):
    """Ours, see targets.py: targets.SHARES x VERSIONS of each trace -> [(story, row)]"""
    pieces, common = pieces_of(tokenizer, traces, marker)
    rows = []
    for trace, (sentences, answer) in zip(traces, pieces):
        shares = targets.SHARES * VERSIONS
        masked = targets.masked_with_targets(model, tokenizer, rng, trace["prompt"], sentences, answer,
                                             common, words, shares)
        rows += [(trace["example"], row) for row in masked]
    return rows


def pieces_of(tokenizer, traces, marker):
    """-> [(sentences, answer) of each trace], the token ids that tell nothing (targets.common_words)"""
    pieces = []
    for trace in traces:
        reasoning, answer = split_answer(trace["text"], marker)
        pieces.append((sentences_of(reasoning), answer))
    common = targets.common_words(tokenizer, itertools.chain(*(sentences for sentences, _ in pieces)))
    return pieces, common


# ========================================================== stage 2: the projector learns, the base is frozen
def fit_projector(model, traces, lr, batch, steps=None, schedule=True, clip=0.2, seed=0, budget=None,
                  progress=None, states=None, every=50, carried=None, aim="none", noise=0.0,
                  base_lr=0.0, betas=(0.9, 0.95)):
    """Trains the projector on traces (and with base_lr > 0 the base), one epoch or `steps` steps -> the last
    steps' mean loss.

    Used by stage 2 (cosine to 10 %, warm-up 10 %) and by the refresh of stage 3 (constant rate, as released).
    budget: positions per forward pass (None: what fits). states: a directory; the fit continues from the
    newest state in it, and leaves one there every so many steps and when it is stopped, with `carried`
    (JSON) in it, and beside it a line per step in DIRECTORY.jsonl.
    Ours (targets.py): with aim "words" a trace's latents are targets, fed with noise; with base_lr > 0 the
    base learns too, from the second fifth of the steps on, when the projector is no longer a stranger. With
    aim "imitation" the base learns alone, at lr, to write the traces, their tags as text."""
    imitates = aim == "imitation"
    budget = budget or positions_at_once(model, traces, imitates or base_lr > 0)
    parameters = list(memory.base_parameters(model) if imitates else model.reasoning_projector.parameters())
    groups = [{"params": parameters, "lr": lr, "peak": lr}]
    if base_lr:
        base = memory.base_parameters(model)
        groups.append({"params": base, "lr": base_lr, "peak": base_lr})
        parameters = parameters + base
    optimizer = torch.optim.AdamW(groups, betas=tuple(betas), weight_decay=0.0)
    if steps is None:
        steps = max(1, len(traces) // batch)
    # One line per step so far; the step of the newest state.
    lines, kept = _resume_fit(states, parameters, optimizer)

    def keep():
        nonlocal kept
        if kept != len(lines):
            tensors = run.optimizer_tensors(parameters, optimizer)
            run.write_state(states, len(lines), tensors, {"lines": lines, "carried": carried})
        kept = len(lines)
        return f"step {kept} of {steps} of {progress} is saved; go on with --resume {os.path.dirname(states)}"

    uninterrupted = contextlib.nullcontext
    log = None
    if states:
        keep()  # before the first step: `carried` holds an evaluation that should not be run again
        uninterrupted = run.on_stop(keep)
        log = run.open_log(f"{states}.jsonl", lines)
    base_learns = base_lr > 0 or imitates
    frozen = contextlib.nullcontext() if base_learns else _base_frozen(model)
    with frozen, _sizes_made(model) as sizes:
        done = len(lines)
        together = VERSIONS_TOGETHER if aim == "words" else 1
        batches = itertools.islice(_batches(traces, batch, seed, together), done, steps)
        bar = tqdm(batches, desc=progress, initial=done, total=steps, leave=False, disable=progress is None)
        for step, rows in enumerate(bar, start=done):
            # (1) The learning rate of this step.
            share = warm_up_and_cosine(step, steps, max(1, steps // 10)) if schedule else 1.0
            for i, group in enumerate(optimizer.param_groups):
                waits = i > 0 and step < steps // 5
                group["lr"] = 0.0 if waits else group["peak"] * share

            # (2) The loss, in micro-batches. Its denominator is known before the first of them: text tokens
            #     after the first tag, over the whole batch.
            if imitates:  # every token is learned, and no latent is run
                rows = [without_latents(r) for r in rows]
                n_tokens = sum(r.n_tokens for r in rows)
            else:
                n_tokens = sum(_scored_tokens(r.slots) for r in rows)
            n_latents = sum(r.n_latents for r in rows)
            if aim == "words":
                fed = targets.with_noise(rows, noise, torch.Generator().manual_seed(seed * 1_000_003 + step))
            total = 0.0
            for part in scoring.pack(rows, budget, unrolled=not imitates):
                some = [rows[i] for i in part]
                if imitates:
                    loss = -logprobs(model, some)[0].sum() / n_tokens
                elif aim == "words":
                    loss = targets.target_loss(model, some, [fed[i] for i in part], n_tokens, n_latents,
                                               base_lr > 0)
                else:
                    loss = projector_loss(model, some)[0] / n_tokens
                loss.backward()
                total += loss.item()

            # (3) One optimiser step; one bad batch must not cost the projector.
            with uninterrupted():
                norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
                if norm.isfinite():
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                m = {"step": step + 1, "loss": total, "grad_norm": float(norm), "z_size": _median(sizes)}
                lines.append(json.dumps({name: run.if_finite(value) for name, value in m.items()}) + "\n")
                sizes.clear()
                bar.set_postfix({name: m[name] for name in ("loss", "z_size") if m[name] is not None})
                if log:
                    log.write(lines[-1])
                    log.flush()
                if states and (len(lines) % every == 0 or len(lines) == steps):
                    keep()
    if log:
        log.close()
    steps_made = [json.loads(line) for line in lines]
    skipped = sum(m["grad_norm"] is None for m in steps_made)
    if skipped:
        print(f"warning: {skipped} of {steps} steps of {progress or 'the refresh'} were skipped: a loss or "
              f"gradient was not finite", flush=True)
    model.projector_trained = model.projector_trained or not imitates
    losses = [m["loss"] for m in steps_made[-20:] if m["loss"] is not None]
    return sum(losses) / len(losses) if losses else math.nan


@contextlib.contextmanager
def _sizes_made(model):
    """Inside, the list that it gives fills with the lengths of all latents that the projector makes, in lengths
    of an embedding."""
    sizes, one = [], embedding_size(model)
    # Whatever module the projector is, and whatever loss it is trained with.
    hook = model.reasoning_projector.register_forward_hook(
        lambda module, fed, made: sizes.append(made[0].detach().float().norm(dim=-1).flatten() / one))
    try:
        yield sizes
    finally:
        hook.remove()


def _median(sizes):
    """Of a list of tensors; None of nothing."""
    return float(torch.cat(sizes).median()) if sizes else None


def _resume_fit(states, parameters, optimizer):
    """-> (the lines of the steps so far, the step of the newest state), from which weights and moments come
    back; ([], None) without one."""
    found = run.read_state(states) if states else None
    if found is None:
        return [], None
    step, tensors, rest = found
    run.restore_optimizer(parameters, optimizer, tensors)
    print(f"resumed from {states}/state-{step}", flush=True)
    return rest["lines"], step


@contextlib.contextmanager
def _base_frozen(model):
    """Inside, no weight but the projector's gets a gradient."""
    frozen = [p for p in memory.base_parameters(model) if p.requires_grad]
    # On CUDA they are cast once, here: autocast would cast what is frozen again in every forward pass.
    matrices = memory.matrices(model) if model.bf16 else []
    whole = [weight.data for weight in matrices]
    for p in frozen:
        p.requires_grad_(False)
    for weight in matrices:
        weight.data = weight.data.to(torch.bfloat16)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for weight, before in zip(matrices, whole):
            weight.data = before


def _batches(traces, size, seed, together=1):
    """Yields batches without end, one shuffled epoch after another; they follow from the seed, so no state
    needs them. together: so many neighbours stay together (versions of one trace: their prompt is
    read once)."""
    rng = random.Random(seed)
    order = []
    while True:
        while len(order) < size:
            starts = range(0, len(traces), together)
            for start in rng.sample(starts, len(starts)):
                order += range(start, min(start + together, len(traces)))
        rows = [traces[i] for i in order[:size]]
        order = order[size:]
        # Rows of a micro-batch alike: less padding.
        rows.sort(key=lambda r: (len(r.slots), r.slots.index(LATENT)))
        yield rows


def _scored_tokens(slots):
    """Text tokens after the first tag."""
    after_first = slots[slots.index(LATENT) :]
    return len(after_first) - after_first.count(LATENT)


def warm_up_and_cosine(step, steps, warm_up):
    """The share of the peak rate: up over the first warm_up steps, then a cosine down to 0.1."""
    progress = max(0, step - warm_up) / max(1, steps - warm_up)
    return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * progress))


def short_enough(traces, most):
    """The traces of at most so many tokens, prompt included; None: all."""
    return [r for r in traces if most is None or len(r.prompt_ids) + r.n_tokens <= most]


def positions_at_once(model, traces, base_learns=False):
    """How many positions of traces one forward and backward pass can have."""
    longest = max(len(r.prompt_ids) + len(r.slots) for r in traces)
    return memory.positions_that_fit(model, longest, "stage 2", otherwise=12_000, base_learns=base_learns)


def mean_loss(model, traces, latent):
    """Loss after the first tag over all traces, per token."""
    budget = positions_at_once(model, traces)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for part in scoring.pack(traces, budget, unrolled=True):
            loss, n = projector_loss(model, [traces[i] for i in part], latent)
            total = total + loss
            tokens += n
    return float(total) / max(1, tokens)


# ============================================================ both stages
def stages_1_and_2(model, tokenizer, task, out, max_new_tokens, seed=0, n=200, every=50, betas=(0.9, 0.95),
                   max_length=None, keep_cut=False, smoke=False, given=None, **changes):
    """Both stages; trains model.reasoning_projector in place and prints what came of it -> the figures
    printed.

    Continues from what a stopped run left in `out`: traces.jsonl, and stage 2's states (one every so many
    steps) in stage-2/. n: val examples for the accuracy before and after. betas, max_length, keep_cut, smoke:
    the flags of these names; given: --traces. changes: of RELEASED or SMALL above, whichever the model's size
    selects; None leaves a value as it is."""
    cfg = dict(SMALL if checkpoint.is_small(model) else RELEASED)
    cfg.update({name: value for name, value in changes.items() if value is not None})
    started = time.time()
    rng = random.Random(seed)

    examples = task.examples("train")[: cfg["prompts"]]
    # Stage 2 has its own way to stop.
    run.on_stop(lambda: f"the traces sampled so far are kept; go on with --resume {out}")
    path = os.path.join(out, "traces.jsonl")
    aim = cfg["targets"]
    if aim != "words":
        if changes.get("train_base"):
            raise UserError("--train-base goes with --targets words: the paper's stage 2 leaves the "
                            "base frozen")
        cfg["train_base"] = 0.0
    applies = {name: value for name, value in RELEASED.items()
               if aim == "words" or name not in ("words", "noise", "train_base")}
    steps = "one pass over the masked traces" if cfg["steps"] is None else f"{cfg['steps']} steps"
    print(f"stages 1 and 2: {cfg['k']} traces of up to {max_new_tokens} tokens for each of {len(examples)} "
          f"train prompts, then {steps}, {cfg['batch']} masked traces each\n"
          f"{display.beside_released(cfg, applies)}")
    # With targets no tag is written in stage 1: a target is taken from a sentence that was written out.
    tag = "forbidden" if aim == "words" else None
    if given:
        traces, left_out = given_traces(given, task, examples), []
    else:
        traces, left_out = collect_traces(model, tokenizer, task, examples, cfg["k"], max_new_tokens, seed,
                                          path, tag, keep_cut)
    marker = data.opening_of(task)
    try:
        train, held = mask_all(model, tokenizer, traces, left_out, marker, rng, aim, cfg["words"])
    except UserError as e:
        if not smoke or aim == "words":  # with targets RL needs traces too
            raise
        print(f"warning: {e}; without --smoke the run would end here. This one goes on with all samples, "
              f"whatever they earned", flush=True)
        samples = [{**trace, "text": f"{trace['text']}\n{marker}"} for trace in traces + left_out]
        train, held = mask_all(model, tokenizer, samples, [], marker, rng)
    train, held = short_enough(train, max_length), short_enough(held, max_length)
    if not train or not held:
        raise UserError(f"no masked trace has {max_length} tokens or fewer, prompt included: "
                        f"raise --max-length")
    base = "learns too" if cfg["train_base"] else "is frozen"
    print(f"stage 2: {len(train)} masked traces, {len(held)} more held out; the base {base}", flush=True)

    checked = task.examples("val")[:n]

    def evaluate_now():
        figures, _ = evaluate(model, tokenizer, task, checked, latent_prompt=True, seed=seed,
                              max_new_tokens=max_new_tokens, **PAPER)
        return figures

    if cfg["imitate"]:  # ours: a base that never writes the tag has none for RL to keep
        loss = fit_projector(model, train, IMITATION_LR, cfg["batch"], cfg["imitate"], seed=seed, clip=1.0,
                             progress="the imitation", states=os.path.join(out, "imitation"), every=every,
                             aim="imitation")
        print(f"imitation: {cfg['imitate']} steps of the base on masked traces, loss {loss:.4f} in the end",
              flush=True)
    states = os.path.join(out, "stage-2")
    found = run.read_state(states)
    if found:
        losses, before = found[2]["carried"]
    else:
        losses = {
            "no latents": mean_loss(model, held, "none"),
            "zeros": mean_loss(model, held, "zeros")}
        with _sizes_made(model) as sizes:
            losses["start"] = mean_loss(model, held, "projector")
        say_size_of_start(torch.cat(sizes), are_fed=aim == "none")
        before = evaluate_now()
    fit_projector(model, train, cfg["lr"], cfg["batch"], cfg["steps"], seed=seed, progress="stage 2",
                  states=states, every=every, carried=[dict(losses), before], aim=aim, noise=cfg["noise"],
                  base_lr=cfg["train_base"], betas=betas)
    losses["trained"] = mean_loss(model, held, "projector")
    after = evaluate_now()
    said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    print(f"stage 2: validation loss after the first tag: {said}")
    print(f"stage 2: {data.measure_of(task)} with the tag prompt on {len(checked)} val stories: "
          f"{before['accuracy']:.3f} before, {after['accuracy']:.3f} trained; "
          f"both stages {time.time() - started:.0f}s", flush=True)
    sampled = 0 if given else cfg["k"] * len(examples)
    return {"kept": len(traces), "sampled": sampled, "losses": losses, "before": before, "after": after}


def say_size_of_start(sizes, are_fed=True):
    """One line on the latents (n,) that the projector makes before it is trained, in sizes of an embedding; a
    warning if they drown the words. are_fed: with targets the targets are fed instead, and pull them back."""
    lost = int((~sizes.isfinite()).sum())
    size = f"a latent is {float(sizes.median()):.3g} times as long as an embedding"
    if are_fed and (lost or sizes.max() > LARGE):
        longest = float(sizes.nan_to_num(math.inf).max())
        print(f"warning: stage 2 begins where {size}, the longest {longest:.3g} times, {lost} of {len(sizes)} not "
              f"finite: the words around it are not read. Take --projector normed, whose outputs are as long "
              f"as an embedding", flush=True)
    else:
        print(f"stage 2: {size} at the start", flush=True)


def by_size(name):
    return run.default_text(SMALL[name], RELEASED[name])


def add_start_flags(group):
    """What stage 2 starts from, the same for both training scripts."""
    group.add_argument("--projector", default="warm", choices=["warm", "random", *PROJECTORS],
                       help="what stage 2 starts from: mlp, copies of the last block's MLP, the paper's; normed, "
                            "the same with a norm behind each; random weights, or pause, one learned vector "
                            "(controls); warm, mlp for a small model, else normed (default warm)")
    group.add_argument("--imitate", type=int, metavar="STEPS",
                       help="before stage 2 the base learns so many steps to write the masked traces, so that "
                            "it writes tags at all (ours; default 0)")


def set_start(args, model):
    """--projector, where the model has no trained one; else UserError if it is named."""
    if args.projector == "warm":
        return
    if model.projector_trained:
        raise UserError(f"--projector {args.projector} is for stage 2, but {args.model} has a trained "
                        "projector: leave the flag out, or start from a model that has none")
    torch.manual_seed(args.seed)
    start_projector(model, args.projector)


def parse_arguments():
    ap = run.parser(__doc__)
    g = ap.add_argument_group("what")
    g.add_argument("--model", default="tiny",
                   help="tiny, a directory, or a hub name such as Qwen2.5-1.5B (default tiny)")
    data.task_flags(g)
    run.out_flags(g, "traces, settings, figures and the model", "out/MODEL-TASK-projector")
    g.add_argument("--resume", default=None, metavar="DIR", help="continue the run in DIR, by its own "
                   "settings; only --device and --graphs may stand beside it (default: a new run)")
    g.add_argument("--seed", type=int, default=0, help="of all random draws (default 0)")
    g = ap.add_argument_group("stage 1 (a small model has less than 50 M parameters)")
    g.add_argument("--prompts", type=int, metavar="N", default=None,
                   help=f"train prompts to sample traces for ({by_size('prompts')})")
    g.add_argument("--samples", type=int, metavar="N", default=None,
                   help=f"traces per prompt ({by_size('k')})")
    g.add_argument("--traces", metavar="FILE", help="take traces from there, jsonl with example (the number "
                   "of a train example) and text, for a base that earns nothing (ours; default: the base's own)")
    g.add_argument("--max-new-tokens", type=int, metavar="N", default=None,
                   help=f"slots per trace, latents included "
                   f"({run.default_text(checkpoint.SLOTS_SMALL, checkpoint.SLOTS_RELEASED)})")
    g = ap.add_argument_group("stage 2")
    g.add_argument("--steps", type=int, metavar="N", default=None,
                   help="optimiser steps (default 400 for a small model, else as many as see every masked "
                   "trace once)")
    g.add_argument("--batch", type=int, metavar="N", default=None,
                   help=f"traces per optimiser step ({by_size('batch')})")
    g.add_argument("--lr", type=float, default=None, help=f"peak learning rate of AdamW ({by_size('lr')})")
    add_start_flags(g)
    targets.add_flags(g)
    g = ap.add_argument_group("run")
    g.add_argument("--n", type=int, default=200, help="val stories for the accuracy before and after "
                   "(default 200)")
    g.add_argument("--save-every", type=int, metavar="N", default=50,
                   help="steps of stage 2 between two states on the disk, from which --resume continues; "
                   "the last two are kept; stage 1 keeps each 160 samples' traces (default 50)")
    run.device_flags(g)
    g = ap.add_argument_group("as released")
    g.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.95], metavar="B",
                   help="of AdamW in stage 2 (default 0.9 0.95; released 0.9 0.999)")
    g.add_argument("--max-length", type=int, metavar="N", help="leave longer masked traces, prompt "
                   "included, out of stage 2 (default: none are; released 4096)")
    g.add_argument("--keep-cut", action="store_true", help="keep rewarded traces that the length limit has "
                   "cut, as released (default: whole ones only)")
    return run.parse_resumable(ap, "train_projector.py")


@run.signals_restored()
def main():
    args = parse_arguments()
    task = data.choose_task(args, args.model)
    args.out = args.out or run.default_out(args.model, args.task, "projector")
    run.check_arguments(args)
    lock_file = run.lock(args.out)  # noqa: F841  held until the process ends
    run.check_what_is_there(args)
    # what is missing is said before a model is fetched
    run.check_examples(args, train=task.examples("train"), val=task.examples("val"))
    model, tokenizer = load(args.model, args.device)
    run.use_graphs(model, args.graphs)
    set_start(args, model)
    data.start_task(args, task, args.model)
    args.max_new_tokens = args.max_new_tokens or checkpoint.slots_per_answer(model)
    if not checkpoint.is_small(model):
        memory.checkpoint_layers(model)
    if not args.resume:
        run.delete_earlier_run(args.out)
    run.write_settings(args, "train_projector.py")
    result = stages_1_and_2(model, tokenizer, task, args.out, args.max_new_tokens, args.seed, args.n,
                            args.save_every, prompts=args.prompts, k=args.samples, lr=args.lr,
                            batch=args.batch, steps=args.steps, imitate=args.imitate, targets=args.targets,
                            words=args.words, noise=args.noise, train_base=args.train_base,
                            betas=args.betas, max_length=args.max_length, keep_cut=args.keep_cut,
                            given=args.traces)
    checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
    run.write_json(os.path.join(args.out, "results.json"), result)
    print(f"saved {args.out}/model; next: python train_rl.py --model {args.out} --task {args.task}")


if __name__ == "__main__":
    run.run_script(main)
