"""What people see: the lines of a run, tables, an answer as text; a first reading can skip it.
"""
import itertools
import math
import os
import time
import typing

import torch

import data
from lib import UserError, checkpoint, kv_cache, memory, run
from litereason import LATENT, TAG, Rollout, generate, logprobs

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
    if not checkpoint.is_small(model) and not args.smoke:
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
    memory.wait_for_gradients(model)
    memory.forget_gradients(model)


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
    run.write_json(path, rows)
    return path


# ============================================================ tables
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

    Of results of eval.run_controls, instead of the last five: what each has gained over the plain run, the
    first row, and what differs (eval.judge)."""
    are_tested = "against_plain" in rows[-1][1]
    headings = ["control" if are_tested else "model", measure, "95 % interval", "tokens", "text", "latent"]
    if are_tested:
        for what in (measure, "tokens"):
            headings += [f"{what} gained", "95 % interval", "p", "Holm's p"]
        headings += ["differs in"]
    else:
        headings += ["z size", "tags", "cut off", "positions", "seconds"]
    lines = [_line(headings), f"|{'---|' * len(headings)}"]
    width = max(len(name) for name, _ in rows)
    for i, (name, row) in enumerate(rows):
        cells = [f"{name:{width}}", f"{row['accuracy']:.3f}", _interval(row["accuracy_ci95"])]
        cells += [f"{row[key]:.1f}" for key in ("tokens", "text_tokens", "latent_steps")]
        if are_tested:
            cells += _cells_of_tests(row["against_plain"], measure) if i > 0 else [""] * 9
        else:
            cells += [
                f"{row['z_size']:.3g}" if row.get("z_size") else "",  # earlier results have none
                f"{row['tags']:.2f}",
                f"{row['truncated']:.3f}",
                f"{row['forward_positions']:.1f}",
                f"{row['seconds']:.1f}"]
        lines.append(_line(cells))
    if are_tested:
        lines += ["", HOW_IT_IS_TESTED.format(n=2 * (len(rows) - 1))]
    for name, row in rows if not are_tested else []:
        keys = list(row)
        own = keys[keys.index("seconds") + 1 :]  # the task's own figures come after the seconds
        if own:
            figures = [f"{key} {_number_or_interval(row[key])}" for key in own]
            lines.append(f"\n{name.strip()}: {', '.join(figures)}")
    return "\n".join(lines)


HOW_IT_IS_TESTED = """p: of sign flips, paired by example; Holm's p is corrected for all {n} tests of this table.
"differs in": Holm's p is below 0.05 and the 95 % interval (bootstrap) leaves 0 out."""


def _cells_of_tests(gained, measure):
    cells = []
    for what, digits in (("accuracy", "+.3f"), ("tokens", "+.1f")):
        cells += [f"{gained[what]:{digits}}", _interval(gained[f"{what}_ci95"], digits)]
        cells += [f"{gained[f'{what}_p']:.2g}", f"{gained[f'{what}_holm']:.2g}"]
    return [*cells, what_differs(gained).replace("accuracy", measure)]


def what_differs(comparison):
    """In words, of a comparison that eval.judge has judged."""
    if comparison["accuracy_differs"]:
        return "accuracy and tokens" if comparison["tokens_differs"] else "accuracy, not tokens"
    return "tokens, not accuracy" if comparison["tokens_differs"] else "nothing"


def sampling_in_words(sampling):
    """sampling: arguments of generate."""
    if sampling["temperature"] == 0:
        return "greedy"
    cut = f"top-p {sampling['top_p']:g}, top-k {sampling['top_k'] or 'off'}"
    return f"temperature {sampling['temperature']:g}, {cut}"


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _interval(numbers, digits=".3f"):
    return " to ".join(f"{x:{digits}}" for x in numbers)


def _number_or_interval(value):
    return _interval(value) if isinstance(value, list) else f"{value:.3f}"


METHODS = {"litereason": "LiteReason", "grpo": "RL without latents", "tag": "RL with tags, no latents"}


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
    with kv_cache.autocast(model):
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
