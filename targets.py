"""A target for each latent: ours, not in the paper; a first reading can skip this file.

The paper's loss does not say what a latent should hold: it is the cross-entropy of the text behind the tag,
which a policy can also lower by learning how texts with tags go on. With `--targets words` a run of skipped
sentences becomes one tag, with a latent for each of them and one before: where the thought stood when the
tag was opened. Each has a target, the embeddings of the last informative words of its sentence (of the
first: of the text before the tag), added up and divided by the root of their number, so that the sum is
about as long as one word's.

    the policy wrote    a b c . d e f . g h i . \\boxed{Yes}
    a training trace    a b c . <..> 3 </..>  LATENT      LATENT      LATENT      \\boxed{Yes}
    targets                                   b + c       e + f       h + i

They are learned with the true targets fed, so that a whole trace takes one pass, and with noise on what is
fed, so that the reader bears the errors that the projector will make. The base is frozen, as in the paper;
or, with `--train-base LR`, it learns too (as in Coconut and CODI, arXiv 2412.06769 and 2502.21074), by the
paper's loss on the text that follows. In RL the base is held to the same targets (`--anchor`).
"""
import collections
import dataclasses
import random

import torch

from lib import checkpoint, kv_cache, memory, scoring
from litereason import (CLOSE, LATENT, OPEN, Rollout, empty_memory, insert_latents, latent_step, states,
                        word_embeddings)

SHARES = (0.3, 0.6, 1.0)  # of the sentences that are skipped, instead of the paper's 0.1 and 0.25
SHARES_IN_RL = (0.6, 1.0, 1.0)  # there the policy skips more
ANCHORED = 32  # traces of stage 1 in each step of the anchor
OF_A_LATENT = ("targets", "words", "noise")  # the flags below that RL takes over from stage 2
# What tells nothing: a sentence that is more than this share of all, word for word (in the tiny world it
# is 0.30 to 0.48 of them, any other less than 0.001) ..
REPEATED = 0.1
# .. and, of different sentences, a word that more than this share of them has (there 0.78 and more do, and
# 0.22 at most have a name).
COMMON = 0.5


# ============================================================ stage 1: traces with targets
def common_words(tokenizer, sentences):
    """Token ids that tell nothing: those of sentences that are repeated, and those that most others have."""
    times = collections.Counter(sentences)
    at_most = max(1, REPEATED * times.total())
    repeated = [sentence for sentence, n in times.items() if n > at_most]
    others = [sentence for sentence, n in times.items() if n <= at_most]
    counts = collections.Counter()
    for sentence in others:
        counts.update(set(encode(tokenizer, sentence)))
    common = {token for token, n in counts.items() if n > COMMON * len(others)}
    return common.union(*(encode(tokenizer, sentence) for sentence in repeated))


def last_words(model, tokenizer, text, common, words):
    """A latent's target (D,): what the text came to; None if it has too few informative words."""
    ids = [token for token in encode(tokenizer, text) if token not in common]
    informative = [token for token in ids if any(char.isalnum() for char in tokenizer.decode([token]))]
    if len(informative) < words:
        return None
    last = torch.tensor(informative[-words:], device=model.device)
    return model.get_input_embeddings()(last).detach().sum(0) / words**0.5


def of_trace(model, tokenizer, prompt, sentences, common, words):
    """-> [the target of the prompt, of each sentence]; None where a text tells nothing."""
    return [last_words(model, tokenizer, text, common, words) for text in [prompt, *sentences]]


def mask_runs(model, tokenizer, rng, prompt_ids, sentences, answer, known, share):
    """One training trace: each sentence is skipped with this chance, a run of them for one tag -> Rollout
    whose `latents` are the targets, or None if nothing was skipped. known: from of_trace.

    In a skipped run a sentence that tells nothing has no latent.
    A run too long for the cap takes several tags."""
    cap = model.config.litereason_max_reasoning_steps
    pieces, targets = [], []
    run = []  # targets of the sentences skipped just now
    before, *of_sentences = known
    for sentence, target in zip([*sentences, answer], [*of_sentences, None]):
        if sentence is not answer and rng.random() < share:
            run += [] if target is None else [target]
            continue
        while run:
            begins = [] if before is None or cap == 1 else [before]
            held = (begins + run)[:cap]
            pieces.append(f"{OPEN}{len(held)}{CLOSE}")
            targets += held
            before = held[-1]
            run = run[len(held) - len(begins) :]
        pieces.append(sentence)
        before = before if target is None else target
    if not targets:
        return None
    text = " ".join(pieces)
    slots = insert_latents(model, tokenizer, encode(tokenizer, text) + [checkpoint.end_of_answer(model, tokenizer)])
    return Rollout(prompt_ids, slots, torch.stack(targets).cpu(), text=text)


def masked_with_targets(model, tokenizer, rng, prompt, sentences, answer, common, words, shares):
    """One trace masked again for each of these shares -> [Rollout whose `latents` are the targets], without
    those in which nothing was skipped. The targets are embeddings as they are now."""
    prompt_ids = checkpoint.encode_prompt(model, tokenizer, prompt)
    known = of_trace(model, tokenizer, prompt, sentences, common, words)
    rows = [mask_runs(model, tokenizer, rng, prompt_ids, sentences, answer, known, share) for share in shares]
    return [row for row in rows if row is not None]


def encode(tokenizer, text):
    return checkpoint.encode_text(tokenizer, text.strip())


# ============================================================ stage 2: the loss
def with_noise(rows, noise, generator):
    """Rollouts whose `latents` are the targets -> the same with noise on each: of a strength of its own, up
    to `noise` times the target's. (Noise on embeddings as such: NEFTune, arXiv 2310.05914.)"""
    noisy = []
    for row in rows:
        strength = noise * torch.rand(row.n_latents, 1, generator=generator)
        # on the CPU: the same on every device
        direction = torch.randn(row.latents.shape, generator=generator)
        scale = row.latents.square().mean(-1, keepdim=True).sqrt()
        added = direction.to(row.latents) * scale * strength.to(row.latents)
        noisy.append(dataclasses.replace(row, latents=row.latents + added))
    return noisy


@kv_cache.with_autocast
def target_loss(model, rows, fed, n_tokens, n_latents, base_learns=False):
    """The squared error of each latent to its target, and if the base learns the paper's loss, the
    cross-entropy after the first tag -> this micro-batch's share of the two means over the whole batch.

    rows: Rollouts whose `latents` are the targets; fed: the same rows, with what is fed instead. n_tokens,
    n_latents: of the whole batch."""
    h, slots, valid = states(model, fed)
    targets = torch.cat([row.latents for row in rows]).to(model.device)  # (n, D)
    z = projected(model, h, valid & (slots == LATENT))  # (n, D)
    loss = squared_error(model, z, targets) / n_latents
    if base_learns:
        first = torch.tensor([row.slots.index(LATENT) for row in rows], device=model.device)
        after_first = torch.arange(slots.shape[1], device=model.device) >= first[:, None]
        scored = valid & (slots != LATENT) & after_first
        logp = scoring.token_logprobs(model, h[scored], slots[scored])  # (M,)
        loss = loss - logp.sum() / n_tokens
    return loss


def projected(model, h, is_latent):
    """What the projector makes of the outputs h (B, S, D) that predict latents, which is_latent (B, S) marks
    -> (n, D), row by row. A recurrent projector hands its memory on within a block, as in decoding."""
    if model.reasoning_projector.memory_size == 0:  # then one call serves all of them
        z, _ = latent_step(model, h[is_latent], None)
        return z
    memory = empty_memory(model, len(h))
    made = []
    for s in range(is_latent.shape[1]):
        z, memory = latent_step(model, h[:, s], memory)  # (B, D), (B, memory_size)
        memory = torch.where(is_latent[:, s, None], memory, 0.0)  # outside a block it is empty
        made.append(z)
    return torch.stack(made, 1)[is_latent]


def squared_error(model, z, targets):
    """Summed over latents, in units of the embeddings' variance."""
    variance = word_embeddings(model, 10_000).var()  # in a large vocabulary these will do
    return (z - targets.to(z)).square().mean(-1).sum() / variance


# ============================================================ stage 3: the anchor
def masked_again(args, model, tokenizer, stage_1, n, what):
    """n traces of stage 1, each masked with a share of SHARES_IN_RL -> Rollouts whose `latents` are the
    targets. stage_1: (traces, [(sentences, answer)], the words that tell nothing); what: a text; the draws
    are a function of (args.seed, what) alone."""
    traces, pieces, common = stage_1
    rng = random.Random(f"{args.seed} {what}")
    rows = []
    for i in rng.sample(range(len(traces)), min(n, len(traces))):
        sentences, answer = pieces[i]
        shares = [rng.choice(SHARES_IN_RL)]
        rows += masked_with_targets(model, tokenizer, rng, traces[i]["prompt"], sentences, answer, common,
                                    args.words, shares)
    return rows


def add_anchor(args, model, tokenizer, stage_1, step):
    """Adds args.anchor times the gradient of stage 2's squared error, for the base alone -> the error.

    The projector was trained on the base as it was. RL moves the base, and nothing in RL's loss asks that
    what the projector then makes still says what it should. So some traces of stage 1 are masked again, and
    the base is held to their targets, as InstructGPT's policy is to its pretraining (arXiv 2203.02155)."""
    rows = masked_again(args, model, tokenizer, stage_1, ANCHORED, f"{step} anchor")
    fed = with_noise(rows, args.noise, torch.Generator().manual_seed(args.seed * 1_000_003 + step))
    n_latents = sum(row.n_latents for row in rows)
    error = 0.0
    model.reasoning_projector.requires_grad_(False)
    for part in scoring.pack(rows, args.tokens_per_forward):
        loss = target_loss(model, [rows[i] for i in part], [fed[i] for i in part], None, n_latents)
        if loss.requires_grad:  # a pause token does not depend on the base
            (args.anchor * loss).backward()
            memory.wait_for_gradients(model)
        error += loss.item()
    model.reasoning_projector.requires_grad_(True)
    return error


# ============================================================ flags
def add_flags(group):
    """What a latent learns in stage 2, the same for both training scripts."""
    group.add_argument("--targets", default=None, choices=["words", "none"],
                       help="of the latents in stage 2: words, the embeddings of the skipped sentence's last "
                            "informative words (ours); none, the paper's loss (default words for a small "
                            "model, else none)")
    group.add_argument("--words", type=int, default=None, help="words in the target of a latent (default 2)")
    group.add_argument("--noise", type=float, default=None,
                       help="with --targets words: noise on the targets that are fed in stage 2, as a share "
                            "of their size (default 0.2)")
    group.add_argument("--train-base", type=float, default=None, metavar="LR",
                       help="with --targets words: the base learns too in stage 2, at this rate (default 0: "
                            "it is frozen, as in the paper)")
