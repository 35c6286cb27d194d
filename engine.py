"""Speed and memory: without this file the method is the same, up to rounding, so a first reading can skip it.

    forward, prefill, autocast    the model on embeddings; each prompt read once; bf16 products, fp32 weights
    PromptCache                   keys and values while the prompts are read
    ScoringCache                  .. of given slots, several at a time, with their gradients
    DecodingCache                 .. of one new slot per row and step, written in place
    Decoder                       which rows are decoded: ended ones leave, waiting prompts join; CUDA graphs
    TagTable                      the grammar of the tag as a table over token ids
    token_logprobs, pack          logits in chunks; rollouts split by a budget of positions
    checkpoint_layers, offload    less memory for the update; how much there is: card.py
    FewRows                       a few rows times a large matrix, on a CPU

Letters in the shape comments are those of litereason.py, and:
    H heads   K key/value heads   R = H / K   d head size   n columns of own slots, or rows
"""
import contextlib
import copy
import dataclasses
import functools
import signal
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

LOGITS = 2**27  # most logits that scoring computes at once: 512 MiB in fp32, 883 tokens of Qwen's vocabulary
PREFILL = 2**14  # most positions, padding included, that are read in one forward pass before decoding
LOOK = 4  # while decoding, the host looks at the device once in so many steps
WAITS = ("cuda",)  # devices where data-dependent shapes force a sync
GROWS = ("cpu",)  # devices where a cache grows as it is filled: they read memory with gaps at half the speed
REPEATS = ("cuda",)  # devices whose fused attention takes a mask only with as many key heads as query heads


# ============================================================ the model on embeddings
@contextlib.contextmanager
def autocast(model):
    """The context in which the base computes: bf16 matrix products on CUDA from fp32 weights (`model.bf16`;
    False on a CPU).

    fp32 master weights: an RL step of 5e-7 is far below bf16's spacing and would round away. Each weight is
    cast once, however many forwards there are until the outermost of these contexts ends: torch's own
    autocast does so only for weights that require a gradient, FewRows does for the others (a frozen base, the
    scorer). So no frozen weight may change inside."""
    outermost = not getattr(model, "is_autocasting", False)
    model.is_autocasting = True
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
            yield
    finally:
        if outermost:
            model.is_autocasting = False
            for module in model.modules():
                if isinstance(module, FewRows):
                    module.cast = None


def with_autocast(function):
    """Runs function(model, ..) in that context."""

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        with autocast(model):
            return function(model, *args, **kwargs)

    return run


def forward(model, x, positions, cache):
    """Embeddings x (rows, S, D) at positions (rows, S) -> states after the final norm (rows, S, D), what the
    LM head reads."""
    # A 4-D mask is passed through as it is; the cache knows who attends to whom.
    unread = x.new_empty(1, 1, 1, 1)
    out = model.model(inputs_embeds=x, position_ids=positions, attention_mask=unread, past_key_values=cache,
                      use_cache=True)
    return out.last_hidden_state


def prefill(model, prompts, slots=None):
    """Reads each prompt (a list of token ids) once -> (PromptCache, last states (P, D), embeddings of slots
    (B, S, D) or None).

    slots: None or (B, S) ids, looked up together with the prompts: the gradient of a look-up is as large as
    the whole table."""
    embed = model.get_input_embeddings()
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)  # (P, L), padded on the right
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    ids = ids.to(model.device)
    lengths = torch.tensor(lengths, device=model.device)  # (P,)
    if slots is None:
        x = embed(ids)  # (P, L, D)
        x_slots = None
    else:
        both = embed(torch.cat([ids.flatten(), slots.flatten()]))  # (P * L + B * S, D)
        x, x_slots = both.split([ids.numel(), slots.numel()])
        x = x.view(*ids.shape, -1)
        x_slots = x_slots.view(*slots.shape, -1)
    cache = PromptCache(model.config.num_hidden_layers, lengths)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)  # (P, L)
    h = forward(model, x, positions, cache)  # (P, L, D)
    last = h[torch.arange(len(prompts), device=ids.device), lengths - 1]  # (P, D)
    return cache, last, x_slots


# ============================================================ the caches: who attends to whom
#                   the prompt, once per group           own slots, per row
#     row 0  -----> [ p0  p1  p2  p3  pad ]  <-- mask    [ s0  s1  s2 ]      slot i sees all of its prompt
#     row 1  -----/                                      [ s0  s1  s2 ]      and its own slots 0..i,
#     row 2  -----> [ q0  q1  pad pad pad ]              [ s0  s1  s2 ]      never another row's
#
# A cache is given to transformers as `past_key_values`: each layer calls `update` with its new keys and
# values, then our attention function, which calls `attend`. Positions restart after the prompt, so a group's
# rows give the same numbers as if each had been run alone on prompt + slots. Each cache has `layers`: per
# layer, the (keys, values) that it adds to.
class PromptCache:
    """Keys and values of P prompts while they are read: plain causal attention; padding stands to the right
    of all it could disturb."""

    def __init__(self, n_layers, lengths):
        self.layers = [None] * n_layers  # (keys, values), (P, K, L, d) each
        self.lengths = lengths  # (P,) tokens of each prompt

    def update(self, keys, values, layer, *_, **__):
        """Called by every attention layer with its new keys and values, (rows, K, S, d) each, rotary already
        applied."""
        keys = keys.to(values.dtype)  # with bf16 compute the rotary leaves them in fp32
        # Contiguous, as matrix products need them: otherwise every later step would copy the prompt.
        self.add(layer, keys.contiguous(), values.contiguous())
        return self, layer

    def add(self, layer, keys, values):
        self.layers[layer] = (keys, values)

    def newest(self, layer):
        """What the last forward pass has added."""
        return self.layers[layer]

    def attend(self, layer, q, scale, window=None):
        """q (P, H, L, d) -> (P, L, H, d). window: the layer sees only so many positions, its own included."""
        keys, values = self.layers[layer]
        near = None  # (L, L), only a window needs a mask
        if window and window < q.shape[2]:
            every_pair = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            near = every_pair.tril().triu(1 - window)
        return fused(q.to(values.dtype), keys, values, near, scale)


def fused(q, keys, values, bias, scale):
    """torch's own attention, which keeps no weights: q (B, H, S, d), keys and values (B, K, n, d)
    -> (B, S, H, d). bias: a mask, or numbers that are added to the scores; None: causal."""
    is_causal = bias is None
    R = q.shape[1] // keys.shape[1]
    if bias is not None and q.device.type in REPEATS:
        keys = keys.repeat_interleave(R, 1)  # (B, H, n, d)
        values = values.repeat_interleave(R, 1)
    shares = keys.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(q, keys, values, bias, is_causal=is_causal, scale=scale,
                                         enable_gqa=shares)
    return out.transpose(1, 2)


def pad_mask(lengths, L):
    """True where a prompt has ended, (P, 1, 1, L); None if all of them, lengths (P,), are equally long."""
    pad = torch.arange(L, device=lengths.device) >= lengths[:, None]  # (P, L)
    return pad[:, None, None] if pad.any() else None


def prefill_in_chunks(model, prompts):
    """prefill for decoding, PREFILL positions at a time: a long prompt's activations need far more memory
    than its keys and values -> (PromptCache, last states (P, D))."""
    longest = max(len(prompt) for prompt in prompts)
    at_once = max(1, PREFILL // longest)
    caches, last = [], []
    for start in range(0, len(prompts), at_once):
        cache, h, _ = prefill(model, prompts[start : start + at_once])
        caches.append(cache)
        last.append(h)
    whole = PromptCache(len(caches[0].layers), torch.cat([cache.lengths for cache in caches]))
    for i in range(len(whole.layers)):
        keys = [_widened(cache.layers[i][0], longest) for cache in caches]
        values = [_widened(cache.layers[i][1], longest) for cache in caches]
        whole.layers[i] = (torch.cat(keys), torch.cat(values)) if len(caches) > 1 else (keys[0], values[0])
        for cache in caches:
            cache.layers[i] = None
    return whole, torch.cat(last)


def _widened(t, L):
    """Keys or values (P, K, .., d) -> (P, K, L, d): the first ones, and zeros behind them."""
    return t if t.shape[2] == L else F.pad(t[:, :, :L], (0, 0, 0, max(0, L - t.shape[2])))


def once_more_in_halves(model, run, n, unit="rows"):
    """run(n); out of memory: once more with half of the rows (or positions), and from then on never with more
    for this model, whatever calls it. Changes no result.

    Raises torch.OutOfMemoryError if half is too much, too."""
    most = f"most_{unit}"
    n = min(n, getattr(model, most, n))
    try:
        return run(n)
    except torch.OutOfMemoryError:
        if n == 1:
            raise
    if model.device.type == "cuda":  # here the exception, and what it held, is gone
        torch.cuda.empty_cache()
    half = max(1, n // 2)
    setattr(model, most, half)
    print(f"out of memory with {n} {unit} at once; from here on {half}", flush=True)
    return run(half)


class Groups:
    """Rows owner (B,), ordered by prompt, seen as (P, G): brings tensors from one form into the other.

    Groups of unequal size are padded to the largest, G."""

    def __init__(self, owner, n_prompts):
        sizes = torch.bincount(owner, minlength=n_prompts).tolist()  # rows per prompt
        self.size = max(sizes)  # G
        self.equal = min(sizes) == self.size
        if not self.equal:
            # (B,) a row's number in its group.
            rank = torch.cat([torch.arange(size) for size in sizes]).to(owner.device)
            self.place = owner * self.size + rank  # (B,) where in the padded grid a row stands
            # (P * G,) who stands there.
            self.row = torch.zeros(n_prompts * self.size, dtype=torch.long, device=owner.device)
            self.row[self.place] = torch.arange(len(owner), device=owner.device)

    def split(self, t):
        """(B, ..) -> (P, G, ..)"""
        t = t if self.equal else t[self.row]
        return t.unflatten(0, (-1, self.size))

    def join(self, t):
        """(P, G, ..) -> (B, ..)"""
        t = t.flatten(0, 1)
        return t if self.equal else t[self.place]


def attend_shared(q, scale, prompt, own, groups, pad=None, far=None, hide_own=None):
    """Softmax over the keys of the shared prompt and the row's own together: q (B, H, S, d) -> (B, S, H, d).

    prompt: keys and values (P, K, L, d); own: the same per row, (B, K, n, d). What is not seen: pad (P, 1, 1,
    L) and far (B, 1, 1, S, L) of the prompt, hide_own (B, 1, 1, S, n) of the row's own. All rows of a group
    meet their one copy of the prompt in a single matrix product per prompt and head, G * R * S rows high."""
    prompt_keys, prompt_values = prompt
    own_keys, own_values = own
    B, H, S, d = q.shape
    P, K, L, _ = prompt_keys.shape
    n = own_keys.shape[2]
    R = H // K

    def by_group(t):  # (B, K or 1, R, S, ..) -> (P, K or 1, G * R * S, ..)
        heads = t.shape[1]
        t = groups.split(t).transpose(1, 2)  # (P, K or 1, G, R, S, ..)
        return t.reshape(P, heads, -1, t.shape[-1])

    def by_row(t):  # (P, K, G * R * S, ..) -> (B, K, R, S, ..)
        t = t.reshape(P, K, groups.size, R, S, -1)
        return groups.join(t.transpose(1, 2))

    # (1) How well each query fits each key.
    q = (q * scale).view(B, K, R, S, d)
    on_own = q.reshape(B, K, R * S, d) @ own_keys.transpose(2, 3)
    on_own = on_own.view(B, K, R, S, n)
    on_prompt = by_group(q) @ prompt_keys.transpose(2, 3)  # (P, K, G * R * S, L)

    # (2) What is not seen.
    if hide_own is not None:
        on_own = on_own.masked_fill(hide_own, -torch.inf)
    if pad is not None:
        on_prompt = on_prompt.masked_fill(pad, -torch.inf)
    if far is not None:
        far = far.expand(B, 1, R, S, L)
        on_prompt = on_prompt.masked_fill(by_group(far), -torch.inf)

    # (3) One softmax over both, and the weighted values.
    scores = torch.cat([on_prompt, by_group(on_own)], -1)  # (P, K, G * R * S, L + n)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    w_prompt, w_own = weights.to(q.dtype).split([L, n], -1)
    w_own = by_row(w_own).reshape(B, K, R * S, n)
    from_prompt = by_row(w_prompt @ prompt_values)  # (B, K, R, S, d)
    from_own = (w_own @ own_values).view(B, K, R, S, d)
    out = from_prompt + from_own
    return out.permute(0, 3, 1, 2, 4).reshape(B, S, H, d)


def beyond_window(window, queries, keys, L):
    """What a sliding-window layer (Gemma 3) no longer sees: (B, 1, 1, S, L) of the prompt, (B, 1, 1, S, n) of
    the own slots.

    queries (B, S), keys (B, n): positions, counted from the prompt's first token."""
    queries = queries[:, :, None]
    far = queries - torch.arange(L, device=keys.device) >= window  # (B, S, L)
    far_own = queries - keys[:, None] >= window  # (B, S, n)
    return far[:, None, None], far_own[:, None, None]


class ScoringCache:
    """Own slots that are given, fed in one or more pieces (rows padded on the right), on prompts that have
    been read.

    Tensors keep their graph: nothing is detached or copied in place, so the gradients of a group's rows meet
    in its prompt."""

    # From more new slots per row on, each row gets a copy of its prompt's keys: smaller than the attention
    # weights that need not be kept then. With fewer (a latent, a few words) sharing the prompt is cheaper.
    FUSED = 8

    def __init__(self, prompts, owner):
        """prompts: a PromptCache; owner (B,): which prompt each row belongs to, in order."""
        self.prompts = prompts.layers
        self.pad = pad_mask(prompts.lengths, prompts.layers[0][0].shape[2])
        self.owner = owner
        self.start = prompts.lengths[owner]  # (B,) position of a row's first slot
        self.groups = Groups(owner, len(prompts.lengths))
        # Per layer its pieces, (keys, values), (B, K, n, d) each. They are joined where they are used: a
        # joined copy per piece and layer would have to be kept for the backward pass.
        self.layers = [()] * len(prompts.layers)
        self.valid = None  # (B, n) the slots so far that are not padding
        self.hidden = None  # (B, 1, 1, S, n) the slots that a new one does not see
        self.bias = {}  # window -> what `joint_bias` gives, the same in all layers

    def begin(self, valid):
        """Before a forward pass of new slots: valid (B, S) says which are real."""
        B, S = valid.shape
        if self.valid is not None:
            valid = torch.cat([self.valid, valid], 1)
        self.valid = valid  # (B, n)
        self.bias = {}
        # (S, S) slot j comes after slot i.
        later = torch.ones(S, S, dtype=torch.bool, device=valid.device).triu(1)
        hidden = (~valid[:, None]).repeat(1, S, 1)  # (B, S, n)
        hidden[:, :, -S:] |= later
        self.hidden = hidden[:, None, None]

    def update(self, keys, values, layer, *_, **__):
        self.add(layer, keys.to(values.dtype), values)
        return self, layer

    def add(self, layer, keys, values):
        self.layers[layer] = (*self.layers[layer], (keys, values))

    def newest(self, layer):
        """What the last forward pass has added."""
        return self.layers[layer][-1]

    def attend(self, layer, q, scale, window=None):
        """q (B, H, S, d) -> (B, S, H, d)."""
        prompt, pieces = self.prompts[layer], self.layers[layer]
        q = q.to(prompt[1].dtype)
        if q.shape[2] > self.FUSED:
            return self._attend_fused(prompt, pieces, q, scale, window)
        own = [torch.cat(same, 2) for same in zip(*pieces)]
        far, hide_own = None, self.hidden
        if window:
            far, far_own = self.beyond(window, q.shape[2], prompt[0].shape[2])
            hide_own = hide_own | far_own
        return attend_shared(q, scale, prompt, own, self.groups, self.pad, far, hide_own)

    def _attend_fused(self, prompt, pieces, q, scale, window):
        """Fused attention never keeps the weights: for (B, H, S, L + n) of them in two types, on CUDA, there
        is no room, and a CPU is faster so than sharing the products. On CUDA not yet tried."""
        keys, values = (
            torch.cat([of_prompt.index_select(0, self.owner), *of_row], 2)
            for of_prompt, *of_row in zip(prompt, *pieces))  # (B, K, L + n, d)
        if window not in self.bias:
            self.bias[window] = self.joint_bias(q, prompt[0].shape[2], window)
        return fused(q, keys, values, self.bias[window], scale)

    def joint_bias(self, q, L, window):
        """0 where a slot sees a key, -inf elsewhere, over the prompt's keys and the row's own: (B, 1, S, L +
        n)."""
        B, _, S, _ = q.shape
        if self.pad is None:
            hide_prompt = torch.zeros(1, 1, 1, L, dtype=torch.bool, device=q.device)
        else:
            hide_prompt = self.pad[self.owner]  # (B, 1, 1, L)
        hide = torch.cat([hide_prompt.expand(B, 1, S, L), self.hidden[:, 0]], 3)
        if window:
            hide = hide | torch.cat(self.beyond(window, S, L), 4)[:, 0]
        n = hide.shape[3]
        # Rows as long as CUDA's kernels want them: otherwise torch would copy the whole bias in every layer.
        bias = q.new_zeros(B, 1, S, -(-n // 16) * 16)[..., :n]
        return bias.masked_fill_(hide, -torch.inf)

    def beyond(self, window, S, L):
        keys = self.valid.cumsum(1) - 1 + self.start[:, None]  # (B, n)
        return beyond_window(window, keys[:, -S:], keys, L)


class DecodingCache:
    """Own slots while decoding: one new slot for every row in each step, written in place.

    All rows write the same column in the same step, also a row that began late, in the place of one that had
    ended. The columns before it began are hidden from it, and dropped once no row needs them any more.

        column           0    1    2    3    4    5
        row 0          [ s0   s1   s2   s3   s4   s5 ]
        row 1 began 3  [  -    -    -   s0   s1   s2 ]
    """

    def __init__(self, prompts, owner, room, grows=False):
        """prompts: a PromptCache; owner (B,): which prompt each row belongs to, in order; room: columns,
        slots at most. grows: `layers` have as many columns as a step looks at, not `room` from the start."""
        self.prompts = prompts.layers
        self.lengths = prompts.lengths  # (P,)
        self.room = room
        self.grows = grows
        self.filled = 0  # columns that are written
        self.reach = 0  # columns that this step looks at
        self.column = torch.zeros_like(owner[:1])  # (1,) `filled`, on the device
        self.began = torch.zeros_like(owner)  # (B,) column of a row's first slot
        self.late = False  # whether any row began after column 0
        self.rounded = False  # whether `reach` is rounded up, see set_reach
        self.hidden = None  # (B, 1, 1, 1, n) columns that a row does not see; None: it sees all
        self.layers = []  # (keys, values), (B, K, room or reach, d) each
        for keys, _ in prompts.layers:
            _, K, _, d = keys.shape
            size = (len(owner), K, 0 if self.grows else room, d)
            self.layers.append((keys.new_zeros(size), keys.new_zeros(size)))
        self._assign(owner)

    def _assign(self, owner):
        """Rows owner (B,), in order, on the prompts that there are."""
        self.owner = owner
        self.pad = pad_mask(self.lengths, self.prompts[0][0].shape[2])
        self.groups = Groups(owner, len(self.lengths))

    def set_reach(self, rounded):
        """Before each step: how many columns it looks at. rounded: up to a multiple of 64 and, of many
        columns, by at most a half, so that steps are alike for long and a recorded one serves them all. Where
        the cache grows, up to a multiple of 16, by at most a quarter: growing copies it. -> whether that
        number has changed"""
        needed = self.filled + 1
        rounded = rounded or self.grows
        least, share = (16, 4) if self.grows else (64, 2)
        block = max(least, 2 ** needed.bit_length() // (2 * share)) if rounded else 1
        reach = min(self.room, -(-needed // block) * block)
        changed = reach != self.reach
        self.reach = reach
        self.rounded = rounded
        self.column.fill_(self.filled)
        if self.grows and changed:
            for i, (keys, values) in enumerate(self.layers):  # layer by layer: little is in memory twice
                self.layers[i] = (_widened(keys, reach), _widened(values, reach))
        return changed

    def hide(self):
        """In each step: the columns before a row began, and those that are not written yet."""
        self.hidden = None
        if self.rounded or self.late:
            column = torch.arange(self.reach, device=self.owner.device)
            hidden = (column < self.began[:, None]) | (column > self.column)  # (B, n)
            self.hidden = hidden[:, None, None, None]

    def update(self, keys, values, layer, *_, **__):
        for memory, new in zip(self.layers[layer], (keys.to(values.dtype), values)):
            if self.grows:
                memory[:, :, self.filled] = new[:, :, 0]
            else:  # the same, where a recorded step finds the column on the device
                memory.index_copy_(2, self.column, new)
        return self, layer

    def attend(self, layer, q, scale, window=None):
        """q (B, H, 1, d) -> (B, 1, H, d)."""
        prompt = self.prompts[layer]
        own = tuple(t[:, :, : self.reach] for t in self.layers[layer])
        far, hide_own = None, self.hidden
        if window:
            far, far_own = self.beyond(window, prompt[0].shape[2])
            hide_own = far_own if hide_own is None else hide_own | far_own
        return attend_shared(q.to(prompt[1].dtype), scale, prompt, own, self.groups, self.pad, far, hide_own)

    def beyond(self, window, L):
        start = self.lengths[self.owner] - self.began  # (B,) position of column 0
        column = torch.arange(self.reach, device=start.device)
        keys = start[:, None] + column  # (B, n)
        queries = (start + self.column)[:, None]  # (B, 1)
        return beyond_window(window, queries, keys, L)

    def change(self, rows, prompts=None, owner=None):
        """Between two steps: only `rows` (n,) stay, and the prompts that they need; behind them come new
        rows.

        prompts, owner: a PromptCache, and which of its prompts each new row belongs to, (m,). Columns that no
        row needs any more are dropped, and the write position moves left."""
        # Prompts; the rows' places among them.
        kept, owner_kept = self.owner[rows].unique(return_inverse=True)
        dropped = int(self.began[rows].min()) if len(rows) else self.filled
        columns = slice(dropped, self.filled)
        lengths = self.lengths[kept]
        began = self.began[rows] - dropped
        if prompts is not None:
            lengths = torch.cat([lengths, prompts.lengths])
            began = torch.cat([began, torch.full_like(owner, self.filled - dropped)])
            owner_kept = torch.cat([owner_kept, owner + len(kept)])
        L = int(lengths.max())
        for i in range(len(self.layers)):  # layer by layer, so that little is in memory twice
            if prompts is not None:
                self.prompts[i] = _joined(self.prompts[i], kept, prompts.layers[i], L)
                prompts.layers[i] = None
            elif len(kept) < len(self.lengths):
                self.prompts[i] = _joined(self.prompts[i], kept, None, L)
            keys, values = self.layers[i]
            n_rows = len(owner_kept)
            self.layers[i] = (_moved(keys, rows, columns, n_rows), _moved(values, rows, columns, n_rows))
        self.lengths = lengths
        self.began = began
        self.filled = self.filled - dropped
        self.late = bool(began.any())
        self._assign(owner_kept)


def _joined(old, kept, new, L):
    """Keys and values of the prompts `kept` of old, then those of new (None: no more), each (P, K, L, d)."""
    if new is None:
        return tuple(_widened(t[kept], L) for t in old)
    return tuple(torch.cat([_widened(t[kept], L), _widened(more, L)]) for t, more in zip(old, new))


def _moved(memory, rows, columns, n_rows):
    """Own slots (B, K, room, d) -> (n_rows, K, room, d): those of `rows`, from column 0 on; what is masked
    must at least be finite."""
    out = memory.new_zeros(n_rows, *memory.shape[1:])
    n = columns.stop - columns.start
    out[: len(rows), :, :n] = memory[:, :, columns][rows]
    return out


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What transformers calls in every layer; with any other cache (its own generate, say) this is plain
    sdpa."""
    if isinstance(key, (PromptCache, ScoringCache, DecodingCache)):  # `update` returned (cache, layer)
        return key.attend(value, query, scaling, kwargs.get("sliding_window")), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("litereason", _attention)
AttentionMaskInterface.register("litereason", sdpa_mask)


# ============================================================ decoding: who is decoded
class Decoder:
    """The rows that are being decoded, and the prompts that wait for rows to end.

    `rows` has one tensor per field, (B, ..) each; new_rows(numbers, h, prompt_lengths) -> dict of them makes
    those of rows that begin. Looking at the device costs a sync, so who has ended is asked once in LOOK steps
    only; until then an ended row is decoded on, to no effect. A row's numbers do not depend on who is decoded
    beside it."""

    def __init__(self, model, prompts, samples, limit, max_prompts, new_rows, watch):
        """prompts: lists of token ids, `samples` rows each; limit: slots per row; max_prompts: prompts
        decoded at once; watch: a TagTable."""
        self.model = model
        self.prompts = prompts
        self.samples = samples
        self.limit = limit
        self.max_prompts = min(max_prompts, len(prompts))
        self.new_rows = new_rows
        self.watch = watch
        # Positions that go through the model, the prompts' included.
        self.n_positions = sum(map(len, prompts))
        self.n_begun = 0  # prompts that have begun
        self.step = 0
        self.last_join = 0  # the step in which prompts joined last
        self.all_at_limit = False
        self.recorded = None  # a CUDA graph of the step
        prompts_read, owner, fields = self._begin(self.max_prompts)
        grows = model.device.type in GROWS and not model.graphs
        self.cache = DecodingCache(prompts_read, owner, limit, grows)
        self.rows = types.SimpleNamespace(**fields)

    def _begin(self, n):
        """Reads the next n prompts -> (their PromptCache, owner (B,), the fields of their rows)."""
        first, end = self.n_begun, self.n_begun + n
        self.n_begun = end
        prompts_read, h = prefill_in_chunks(self.model, self.prompts[first:end])
        owner = torch.arange(n, device=self.model.device).repeat_interleave(self.samples)
        numbers = torch.arange(first * self.samples, end * self.samples)
        fields = self.new_rows(numbers, h[owner], prompts_read.lengths[owner])
        return prompts_read, owner, fields

    def refill(self, finish):
        """Before each step: rows that have ended leave, prompts that wait join. finish(indices of rows that
        leave) is called before they do. -> False when everything is decoded"""
        look = self.step % LOOK == 0 or self.cache.filled == self.limit or self.all_at_limit
        if not look:
            return True
        live = self.rows.live.nonzero()[:, 0]  # (n,) the sync
        n_join = self._how_many_join(live)
        if not len(live) and not n_join:
            finish(torch.arange(len(self.rows.live), device=live.device))
            return False
        few = 0.5 if self.model.graphs else 0.75  # of the rows; each change needs a new recording
        if n_join or len(live) <= few * len(self.rows.live) or self.cache.filled == self.limit:
            finish((~self.rows.live).nonzero()[:, 0])
            self._exchange(live, n_join)
        self._widen_latents()
        may_be_inside = (self.rows.latents_left > 0) | self.watch.soon[self.rows.tag_state]
        self.may_project = may_be_inside.nonzero()[:, 0]  # (n,) until the next look
        return True

    def _how_many_join(self, live):
        """Prompts that begin now, 0 if it is too few to be worth moving the memory for."""
        groups_live = -(-len(live) // self.samples)
        prompts_kept = len(self.cache.owner[live].unique())
        waiting = len(self.prompts) - self.n_begun
        free = self.max_prompts - groups_live
        # A prompt stays in memory while any row of its group lives: at most twice max_prompts do.
        room = 2 * self.max_prompts - prompts_kept
        n = min(waiting, free, room)
        worth_it = n * self.samples >= 0.25 * len(self.rows.live) or not len(live)
        return n if n > 0 and worth_it else 0

    def _exchange(self, live, n_join):
        """Only rows `live` (n,) stay, and n_join prompts begin."""
        fields = {name: t[live] for name, t in vars(self.rows).items()}
        prompts_read = owner = None
        if n_join:
            prompts_read, owner, new = self._begin(n_join)
            missing = self.rows.latents.shape[1] - new["latents"].shape[1]
            new["latents"] = F.pad(new["latents"], (0, 0, 0, missing))
            fields = {name: torch.cat([t, new[name]]) for name, t in fields.items()}
            self.last_join = self.step
        self.cache.change(live, prompts_read, owner)
        self.recorded = None
        self.rows = types.SimpleNamespace(**fields)

    def _widen_latents(self):
        """The record of latents has room until the next look, and a scratch column behind."""
        needed = int(self.rows.latents_run.max()) + LOOK + 1
        missing = needed - self.rows.latents.shape[1]
        if missing > 0:
            self.rows.latents = F.pad(self.rows.latents, (0, 0, 0, missing + 8))

    def who(self, inside, everyone=False):
        """-> (rows that sample a token, rows that run the projector), indices.

        On CUDA choosing them would force a sync: there all rows sample, and the projector runs on those that
        can be inside a block before the next look. everyone: all rows do both."""
        rows = torch.arange(len(inside), device=inside.device)
        if everyone:
            return rows, rows
        if self.model.device.type in WAITS:
            return rows, self.may_project
        return (~inside).nonzero()[:, 0], inside.nonzero()[:, 0]

    def forward(self, x, positions):
        """One slot for every row: embeddings x (B, D) at positions (B,) -> states (B, D).

        With model.graphs, on CUDA: a step is a thousand short kernels, which Python starts more slowly than
        the card runs them. They are recorded once and then replayed, until rows change or the columns that a
        step looks at are full."""
        self.step += 1
        self.all_at_limit = self.step == self.last_join + self.limit
        if self.all_at_limit:  # no row is left: no need to run
            return self.rows.h
        h = self._forward_recorded(x, positions) if self.model.graphs else None
        if h is None:
            self.cache.set_reach(rounded=False)
            h = self._one_slot(x, positions)
        self.cache.filled += 1
        self.n_positions += len(x)
        return h

    def _one_slot(self, x, positions):
        self.cache.hide()
        return forward(self.model, x[:, None], positions[:, None], self.cache)[:, 0]

    def _forward_recorded(self, x, positions):
        """The same from a recording; None, from then on, where a step cannot be recorded."""
        if self.cache.set_reach(rounded=True):
            self.recorded = None
        try:
            if self.recorded is None:
                with signals_held():
                    self.recorded = record(self._one_slot, x, positions)
            return self.recorded(x, positions)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            self.model.graphs = False
            why = str(e).partition("\n")[0]
            print(f"warning: the decoding step cannot be recorded as a CUDA graph ({why}); it runs without",
                  file=sys.stderr)
            return None


@contextlib.contextmanager
def signals_held():
    """Ctrl-C and SIGTERM take effect at the end: while a graph is recorded nothing can be copied from the
    card, so no state could be saved."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


ASIDE = {}  # device -> the stream on which steps are recorded


def record(step, *inputs):
    """step(*inputs) as a CUDA graph -> replay(*inputs), for inputs of the same shapes; its result stands in
    the same memory each time."""
    if inputs[0].device.type != "cuda":
        raise RuntimeError("this is no CUDA device")
    device = inputs[0].device
    memory = [t.clone() for t in inputs]
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream(device)
    # `current` is restored, also if the recording fails.
    with torch.cuda.device(device), torch.cuda.stream(current):
        if device not in ASIDE:
            # Once without recording: what libraries allocate on a stream's first call must not be recorded.
            ASIDE[device] = torch.cuda.Stream()
            ASIDE[device].wait_stream(current)
            with torch.cuda.stream(ASIDE[device]):
                step(*memory)
            current.wait_stream(ASIDE[device])
        with torch.cuda.graph(graph, stream=ASIDE[device]):
            out = step(*memory)

    def replay(*new):
        for old, t in zip(memory, new):
            old.copy_(t)
        graph.replay()
        return out

    return replay


class TagTable:
    """An automaton as a table over token ids: rows of sampled tokens are followed without decoding any text.

    A table turns (state, token) into (next state, n). Tokens that act alike share a class; most send every
    state back to the start. classes (V,); next_state, fires and starts (classes, states)."""

    def __init__(self, classes, next_state, fires, begun, device):
        """numpy arrays; state 0 is the start, class 0 resets. fires > 0: a tag ends with this token and has
        so many latents. begun (states,): so much of a tag is written that it can be nothing else."""
        self.as_lists = classes.tolist(), next_state.tolist(), fires.tolist()  # for one row, on the host
        self.classes = torch.from_numpy(classes).to(device)
        self.next_state = torch.from_numpy(next_state).to(device)
        self.fires = torch.from_numpy(fires).to(device)

        # Which tokens start a tag, in which states.
        begun = torch.tensor(begun, device=device)
        self.starts = begun[self.next_state] | (self.fires > 0)

        # States from which a tag may end within LOOK - 1 tokens, so that its latents begin before the
        # next look.
        self.soon = (self.fires > 0).any(0)  # (states,)
        for _ in range(LOOK - 2):
            self.soon = self.soon | self.soon[self.next_state].any(0)

    @classmethod
    def of_characters(cls, read_char, start, alphabet, has_begun, only_resets, texts, vocab_size, device):
        """The table of an automaton that reads characters: it is run over the text of every vocabulary entry
        once, from every state. A few seconds for the real Qwen2 vocabulary, once per tokenizer.

        texts: of the vocabulary's entries. read_char(state, char) -> (state, n): n > 0 where a tag has ended.
        alphabet: every character that read_char tells apart. has_begun(state): see `begun`. only_resets: a
        pattern of texts that lead to `start` from every state."""
        # (1) Every state that some text can reach, as a small integer; 0 is the start.
        other = "\0"  # stands for any character outside the alphabet
        chars = [*alphabet, other]
        states = {start: 0}
        queue = [start]
        for state in queue:
            for char in chars:
                reached, _ = read_char(state, char)
                if reached not in states:
                    states[reached] = len(states)
                    queue.append(reached)
        next_of, n_of = {}, {}  # character -> (states,) the next state, n
        for char in chars:
            steps = [read_char(state, char) for state in queue]
            next_of[char] = np.array([states[reached] for reached, _ in steps])
            n_of[char] = np.array([n for _, n in steps])

        # (2) The same for every token of the vocabulary, read character by character.
        nothing = np.zeros(len(queue), dtype=np.int64)
        pairs = [(nothing, nothing)]  # one per class: (next states, ns); class 0 resets
        class_of = {(nothing.tobytes(), nothing.tobytes()): 0}
        classes = np.zeros(vocab_size, dtype=np.int64)
        for token, text in enumerate(texts):
            if only_resets.fullmatch(text):
                continue
            at = np.arange(len(queue))
            n = nothing
            for char in text:
                char = char if char in next_of else other
                fired = n_of[char][at]
                n = np.where(fired > 0, fired, n)
                at = next_of[char][at]
            key = (at.tobytes(), n.tobytes())
            if key not in class_of:
                class_of[key] = len(pairs)
                pairs.append((at, n))
            classes[token] = class_of[key]
        next_state = np.array([at for at, _ in pairs])  # (classes, states)
        fires = np.array([n for _, n in pairs])
        return cls(classes, next_state, fires, [has_begun(state) for state in queue], device)

    def step(self, state, token):
        """state (B,), sampled token (B,) -> (state (B,), n (B,)): n > 0 where this token ends a tag."""
        kind = self.classes[token]  # (B,)
        return self.next_state[kind, state], self.fires[kind, state]


# ============================================================ scoring: shared prompts, chunks of logits
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
        logits = _masked(F.linear(h.to(weight.dtype), weight, bias), no_words)  # (M, V)
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


# ============================================================ training: less memory
def checkpoint_layers(model):
    """From now on a layer's activations are not kept for the backward pass but computed again: far less
    memory, a third more time.

    transformers' own switch turns the cache off; ours hands each layer the cache as it stood, so running it
    twice is harmless."""
    model.checkpointed = True
    for i, layer in enumerate(model.model.layers):
        layer.forward = functools.partial(_recomputed, layer.forward, i)


def _recomputed(layer, i, x, past_key_values=None, **kwargs):
    cache = past_key_values
    if not torch.is_grad_enabled() or not isinstance(cache, (PromptCache, ScoringCache)):
        return layer(x, past_key_values=cache, **kwargs)

    def copied(cache):
        copy_of_it = copy.copy(cache)
        copy_of_it.layers = list(cache.layers)
        return copy_of_it

    before = copied(cache)

    def run(x):
        view = copied(before)
        out = layer(x, past_key_values=view, **kwargs)
        return out, *view.newest(i)

    out, keys, values = checkpoint(run, x, use_reentrant=False)
    cache.add(i, keys, values)
    return out


def base_parameters(model):
    """The base's weights: all but the projector's."""
    return [p for name, p in model.named_parameters() if not name.startswith("reasoning_projector.")]


def matrices(model):
    """The weights of the layers' linear maps, which autocast multiplies in 16 bits."""
    return [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]


def freeze(model):
    """For a model that is never trained: on CUDA its matrices are kept only as autocast would cast them, half
    the memory and the same numbers."""
    model.requires_grad_(False)
    if model.bf16:
        for weight in matrices(model):
            weight.data = weight.data.to(torch.bfloat16)
    return model


def offload(model, parameters):
    """What the optimizer needs of `parameters` moves to the host: -> fp32 masters to step on.

    On the card the matrices stay as autocast would cast them, so that all products are those of fp32 weights.
    A gradient is sent to the host as soon as it is whole, through a page-locked buffer and without waiting
    for it. Call wait_for_gradients after each backward pass; the next one adds what has come to the masters'
    gradients, in fp32, while the card works, and gradients_to_masters adds the last."""
    masters = [p.detach().to("cpu", torch.float32, copy=True).requires_grad_() for p in parameters]
    model.bf16 = True
    for weight in matrices(model):
        weight.data = weight.data.to(torch.bfloat16)
    for p, master in zip(parameters, masters):
        p.master = master
        p.on_host = torch.empty(p.shape, dtype=p.dtype, pin_memory=p.device.type == "cuda")
        p.is_sent = False  # a gradient is on its way to on_host, or there
        p.register_post_accumulate_grad_hook(_send_gradient)
    return masters


def _send_gradient(p):
    _add_to_master(p)  # that of the micro-batch before
    p.on_host.copy_(p.grad, non_blocking=True)
    p.is_sent = True
    p.grad = None


def _add_to_master(p):
    if p.is_sent:
        if p.master.grad is None:
            p.master.grad = torch.zeros_like(p.master)
        p.master.grad += p.on_host
        p.is_sent = False


def wait_for_gradients(model):
    """After each backward pass: until its gradients are on the host; nothing to do without `offload`."""
    is_offloaded = any(hasattr(p, "master") for p in model.parameters())
    if is_offloaded and model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def gradients_to_masters(parameters, masters):
    """After the last backward pass of a step; nothing to do without `offload`."""
    if masters is not parameters:
        for p in parameters:
            _add_to_master(p)


def forget_gradients(model):
    """All gradients so far, wherever they are."""
    for p in model.parameters():
        p.grad = None
        if hasattr(p, "master"):
            p.is_sent = False
            p.master.grad = None


def weights_from_masters(parameters, masters):
    """Brings the stepped weights back; nothing to do without `offload`."""
    if masters is parameters:
        return
    for p, master in zip(parameters, masters):
        p.on_host.copy_(master.detach())
        p.data.copy_(p.on_host, non_blocking=True)


# ============================================================ a CPU's matrix products
class FewRows(torch.nn.Linear):
    """torch.nn.Linear at a decoding step's speed on a CPU, with one cast of a frozen weight (see autocast).

    A CPU's libraries multiply a few rows by a large matrix at a third of the memory's speed or less;
    transposed, an even number of rows is two to five times as fast (measured with MKL)."""

    cast = None  # the frozen weight in autocast's type

    def forward(self, x):
        weight, bias = self.weight, self.bias
        device = x.device.type
        if not weight.requires_grad and torch.is_autocast_enabled(device):
            if self.cast is None:
                # Detached: one that is of that type already (see freeze) is no second parameter.
                self.cast = weight.detach().to(torch.get_autocast_dtype(device))
            weight = self.cast
        if device != "cpu" or weight.numel() < 2**17:
            return F.linear(x, weight, bias)
        n = x.numel() // self.in_features
        if not 0 < n <= 8:
            return F.linear(x, weight, bias)
        rows = x.reshape(n, self.in_features)
        rows = F.pad(rows, (0, 0, 0, n % 2))  # (n or n + 1, in)
        y = (weight @ rows.T).T.contiguous()
        y = y[:n].view(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias


def mask_no_words(model, ids):
    """From now on the LM head gives these ids the logit -inf, here and in token_logprobs."""
    model.lm_head.register_buffer("no_words", torch.tensor(ids, dtype=torch.long, device=model.device), False)
    model.lm_head.register_forward_hook(lambda head, _, logits: _masked(logits, head.no_words))


def _masked(logits, no_words):
    return logits.index_fill_(-1, no_words, -torch.inf)


def use_few_rows(model):
    """Every plain linear map of the model multiplies that way from now on."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = FewRows
