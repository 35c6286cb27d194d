"""Slots that are given, in batches. Without this file the method is the same; a first reading can skip it.

    Batch, slot_table   rollouts ordered by prompt, their slots padded
    plan_rounds         how latents are made again: rounds of text and latents
    token_logprobs      log-probs of tokens, in chunks of logits
    pack                which rollouts go through the model together
"""
import dataclasses

import torch
import torch.nn.functional as F

LOGITS = 2**27  # most logits that scoring computes at once: 512 MiB in fp32, 883 tokens of Qwen's vocabulary


class Batch:
    """Rollouts ordered by prompt, each prompt once, slots padded on the right.

    prompts: lists of token ids. owner (B,): which prompt a row belongs to. rows: the rollouts in that order.
    back: for each rollout, in the order in which they were given, the number of its row."""

    def __init__(self, rollouts, device, padding):
        number = {}  # prompt -> its number
        owners = []  # of each rollout
        for rollout in rollouts:
            prompt = tuple(rollout.prompt_ids)
            owners.append(number.setdefault(prompt, len(number)))
        order = sorted(range(len(rollouts)), key=owners.__getitem__)
        self.prompts = [list(prompt) for prompt in number]
        self.owner = torch.tensor(sorted(owners), device=device)
        self.rows = [rollouts[i] for i in order]
        self.slots, self.valid = slot_table(self.rows, device, padding)  # (B, S) each
        self.back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)


def slot_table(rollouts, device, padding):
    """The slots of rollouts, padded on the right -> slots (B, S), valid (B, S)."""
    S = max(len(r.slots) for r in rollouts)
    slots, lengths = [], []
    for rollout in rollouts:
        n = len(rollout.slots)
        slots.append(rollout.slots + [padding] * (S - n))
        lengths.append([n])
    lengths = torch.tensor(lengths, device=device)  # (B, 1)
    valid = torch.arange(S, device=device) < lengths
    return torch.tensor(slots, device=device), valid


@dataclasses.dataclass
class Piece:
    """What litereason.unroll feeds in one forward pass; each list has an entry per row."""

    starts: list  # the first slot that the row feeds
    counts: list  # how many it feeds
    is_latent: bool  # one latent per row, made right before; else text
    carried: list = None  # of text: 1 where its first slot is a latent that was made before
    made: list = None  # of latents: whether the row keeps what is made here


def plan_rounds(rows):
    """How unroll goes through rows of slots, known before anything is computed. rows: lists that say of each
    slot whether it is a latent -> ([Piece], column (B, S)).

    Rows have their tags at different places, so the batch advances in rounds: every row's text up to its next
    block in one piece, then the block's latents one at a time. Nothing waits for the output of a block's last
    latent, so that one is carried into the text after it. column[b, s]: where among all outputs (the prompt's
    last is number 0) the one for slot s is."""
    plan = []
    at = [0] * len(rows)  # the next slot of each row
    carried = [0] * len(rows)
    while any(start < len(row) for start, row in zip(at, rows)):
        counts = []
        for row, start, waiting in zip(rows, at, carried):
            counts.append(waiting + _run_length(row, start + waiting, False))
        plan.append(Piece(at, counts, is_latent=False, carried=carried))
        at = [start + count for start, count in zip(at, counts)]
        blocks = [_run_length(row, start, True) for row, start in zip(rows, at)]  # latents that come next
        carried = [int(n > 0) for n in blocks]
        for k in range(max(blocks)):
            fed = [int(k < n - 1) for n in blocks]  # all but the block's last
            made = fed if k < max(blocks) - 1 else carried
            plan.append(Piece(at, fed, is_latent=True, made=made))
            at = [start + count for start, count in zip(at, fed)]

    S = max(map(len, rows))
    column = torch.zeros(len(rows), S + 1, dtype=torch.long)
    columns = 1
    for piece in plan:
        for own, start, count in zip(column, piece.starts, piece.counts):
            own[start + 1 : start + 1 + count] = torch.arange(columns, columns + count)
        columns += max(piece.counts)
    return plan, column[:, :S]


def _run_length(row, start, kind):
    """How many slots from `start` on are of one kind: latents (True) or text (False)."""
    end = start
    while end < len(row) and row[end] == kind:
        end += 1
    return end - start


class TokenLogprobs(torch.autograd.Function):
    """log softmax((h W^T + bias) / temperature)[target] of states h (M, D) -> (M,), with its gradient by
    hand. The ids no_words have no part in it.

    With p = softmax(..), the one-hot e and the incoming g / temperature: d/dh = g (e - p) W and d/dW = (e -
    p)^T g h. Autograd would make five more (M, V) tensors on the way."""

    @staticmethod
    def logits(h, weight, bias, temperature, no_words):
        logits = F.linear(h.to(weight.dtype), weight, bias)  # (M, V)
        logits = logits.index_fill_(-1, no_words, -torch.inf)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if temperature == 1 else logits / temperature

    @staticmethod
    def forward(ctx, h, weight, bias, targets, temperature, no_words, keep):
        logits = TokenLogprobs.logits(h, weight, bias, temperature, no_words)
        # (M,); in parts, since it copies what it reads.
        total = torch.cat([part.logsumexp(-1) for part in logits.split(32)])
        ctx.save_for_backward(h, weight, bias, targets, no_words, total, logits if keep else None)
        ctx.temperature = temperature
        return logits.gather(-1, targets[:, None])[:, 0] - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, weight, bias, targets, no_words, total, logits = ctx.saved_tensors
        if logits is None:
            logits = TokenLogprobs.logits(h, weight, bias, ctx.temperature, no_words)
        # (M, V), in place: a second backward pass through the same logits is an error.
        p = logits.sub_(total[:, None]).exp_()
        p[torch.arange(len(targets), device=h.device), targets] -= 1  # p - e
        p = p.to(weight.dtype)
        g = -g[:, None] / ctx.temperature  # (M, 1)
        needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_h = to_weight = to_bias = None
        if needs_h:
            to_h = (g * (p @ weight)).to(h.dtype)
        if needs_weight:
            to_weight = p.T @ (g * h).to(weight.dtype)
        if needs_bias:
            to_bias = (p.T @ g.to(p.dtype))[:, 0]
        return to_h, to_weight, to_bias, None, None, None, None


def token_logprobs(model, h, targets, temperature=1.0, chunk=None):
    """log p(target) for states h (M, D), targets (M,) -> (M,).

    The (chunk, V) logits, by default LOGITS numbers, exist one chunk at a time; in the backward pass they are
    computed again instead of being kept, unless one chunk is all."""
    head = model.lm_head
    chunk = chunk or max(1, LOGITS // head.out_features)
    # Once, for all chunks and both directions.
    weight = head.weight.to(torch.bfloat16) if model.bf16 else head.weight
    bias = None if head.bias is None else head.bias.to(weight.dtype)
    if not len(h):
        return h[:, 0]
    one_chunk = len(h) <= chunk
    logps = []
    for some, wanted in zip(h.split(chunk), targets.split(chunk)):
        logps.append(TokenLogprobs.apply(some, weight, bias, wanted, temperature, head.no_words, one_chunk))
    return torch.cat(logps)


COPIED = 16  # a row's own copy of so many keys, for fused attention, takes about the memory of one position


def pack(rollouts, budget, unrolled=False):
    """Splits rollouts into runs of neighbours -> lists of indices. One forward pass over a run computes at
    most `budget` positions, each prompt once, padding and copied keys included (or it is a single rollout).

    unrolled: they go through litereason.unroll, which reads a row's keys again after each block of latents.
    Budgets change memory and time, no result."""
    parts = [[]]
    # of the last part: its prompts, the longest, most slots and pieces
    prompts, L, S, pieces = set(), 0, 0, 1
    for i, rollout in enumerate(rollouts):
        prompt = tuple(rollout.prompt_ids)
        own = len(prompt), len(rollout.slots), 1 + (rollout.n_tags if unrolled else 0)
        prompts = prompts | {prompt}
        L, S, pieces = (max(pair) for pair in zip((L, S, pieces), own))
        rows = len(parts[-1]) + 1
        positions = len(prompts) * L + rows * S + rows * pieces * (L + S) // COPIED
        if parts[-1] and positions > budget:
            parts.append([])
            prompts = {prompt}
            L, S, pieces = own
        parts[-1].append(i)
    return [part for part in parts if part]
