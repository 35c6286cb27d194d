"""Slots that are given, in batches. Without this file the method is the same; a first reading can skip it.

    Batch, slot_table   rollouts ordered by prompt, their slots padded
    plan_rounds         how latents are made again: rounds of text and latents
    token_logprobs      log-probs of tokens, in chunks of logits
    pack                which rollouts go through the model together

Letters in the shape comments are those of litereason.py.
"""
import dataclasses

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lib import kv_cache

LOGITS = 2**26  # most logits that scoring computes at once: 256 MiB in fp32, 441 tokens of Qwen's vocabulary
COPIED = 16  # so many copied keys, or padded queries, of attention take about the memory of one position


class Batch:
    """Rollouts ordered by prompt, each prompt once, slots padded on the right.

    prompts: lists of token ids. owner (B,), owners, a list: which prompt a row belongs to. rows: the rollouts
    in that order. slots, valid (B, S): see slot_table. back (B,): which row each rollout has become."""

    def __init__(self, rollouts, device, padding):
        number = {}  # prompt -> its number
        owners = []  # of each rollout
        for rollout in rollouts:
            prompt = tuple(rollout.prompt_ids)
            owners.append(number.setdefault(prompt, len(number)))
        order = sorted(range(len(rollouts)), key=owners.__getitem__)
        self.prompts = [list(prompt) for prompt in number]
        self.owners = sorted(owners)
        self.owner = torch.tensor(self.owners, device=device)
        self.rows = [rollouts[i] for i in order]
        self.slots, self.valid = slot_table(self.rows, device, padding)
        self.back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)


def slot_table(rollouts, device, padding):
    """The slots of rollouts, padded on the right -> slots (B, S), valid (B, S)."""
    slots = pad_sequence([torch.tensor(r.slots) for r in rollouts], batch_first=True, padding_value=padding)
    return slots.to(device), kv_cache.is_real([len(r.slots) for r in rollouts]).to(device)


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
        counts = [waiting + _run_length(row, start + waiting, False)
                  for row, start, waiting in zip(rows, at, carried)]
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


@kv_cache.with_autocast
def token_logprobs(model, h, targets, temperature=1.0, chunk=None):
    """log p(target) for states h (M, D), targets (M,) -> (M,).

    The (chunk, V) logits, by default LOGITS numbers, exist one chunk at a time. Unless one chunk is all, they
    are not kept for the backward pass but computed again there."""
    chunk = chunk or max(1, LOGITS // model.lm_head.out_features)

    def of_chunk(h, targets):
        logits = model.lm_head(h)  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    if len(h) <= chunk:
        return of_chunk(h, targets)
    chunks = zip(h.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(of_chunk, *one, use_reentrant=False) for one in chunks])


def pack(rollouts, budget, unrolled=False):
    """Splits rollouts into runs of neighbours -> lists of indices. One forward pass over a run computes at
    most `budget` positions, each prompt once, attention's padding and copied keys included (or it is a single
    rollout).

    unrolled: they go through litereason.unroll, which reads a row's keys again after each block of latents.
    Budgets change memory and time, no result."""
    parts = [[]]
    for i, rollout in enumerate(rollouts):
        prompt = tuple(rollout.prompt_ids)
        own = len(prompt), len(rollout.slots), 1 + (rollout.n_tags if unrolled else 0)
        if not parts[-1]:
            prompts, L, S, pieces, real = set(), 0, 0, 0, 0  # of the part; the longest, the most
        L, S, pieces = (max(pair) for pair in zip((L, S, pieces), own))
        real += len(rollout.slots) + (0 if prompt in prompts else len(prompt))
        prompts.add(prompt)
        rows = len(parts[-1]) + 1
        if parts[-1] and real + rows * pieces * (L + 2 * S) // COPIED > budget:
            parts.append([])
            prompts, real = {prompt}, len(prompt) + len(rollout.slots)
            L, S, pieces = own
        parts[-1].append(i)
    return [part for part in parts if part]
