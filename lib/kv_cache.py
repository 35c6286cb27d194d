"""Keys and values. Without this file the method is the same, up to rounding; a first reading can skip it.

    autocast, forward      the model on embeddings; on CUDA bf16 products of fp32 weights
    Packing                padding goes through no layer
    PromptCache, prefill   each prompt is read once
    attend_shared          the rows of a group attend to one copy of their prompt
    ScoringCache           slots that are given, in pieces, with their gradients
    WholeCache             prompts and slots in one pass (forward_whole)
    DecodingCache          one new slot per row and step, written in place
    mask_no_words          ids that no text has are never sampled

Letters in the shape comments are those of litereason.py, and:
    H heads   K key/value heads   R = H / K   d head size   n columns of own slots, or rows
"""
import functools

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

PREFILL = 2**14  # most positions, padding included, that are read in one forward pass before decoding
GROWS = ("cpu",)  # devices where the decoding cache grows: reading around empty columns takes twice as long
REPEATS = ("cuda",)  # devices whose fused attention takes a mask only with as many key heads as query heads


# ============================================================ the model on embeddings
def autocast(model):
    """The context in which the base computes: on CUDA bf16 matrix products of fp32 weights (`model.bf16`).

    fp32 master weights: an RL step of 5e-7 is far below bf16's spacing and would round away. Weights that
    learn are cast once, until the outermost of these contexts ends; they must not change inside."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16)


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
    packing = cache.packing  # None while decoding: every row has one new slot
    if packing is None:
        return _layers(model, x, positions, cache)
    return packing.unpack(_layers(model, packing.pack(x), packing.pack(positions), cache))


def forward_whole(model, x_prompts, x, cache):
    """Prompts (P, L, D) and the slots of their rows (B, S, D) in one pass -> the prompts' last states (P, D),
    states of the slots (B, S, D). cache: a WholeCache.

    Two passes would make the gradient of every weight twice and add them up."""
    prompts, rows = cache.prompts, cache.packing
    of_prompts = torch.arange(x_prompts.shape[1], device=x.device).expand(len(x_prompts), -1)  # positions
    of_rows = cache.start[:, None] + torch.arange(x.shape[1], device=x.device)
    packed = torch.cat([prompts.packing.pack(x_prompts), rows.pack(x)], 1)  # (1, T, D)
    positions = torch.cat([prompts.packing.pack(of_prompts), rows.pack(of_rows)], 1)  # (1, T)
    h = _layers(model, packed, positions, cache)
    return h[0, prompts.lengths.cumsum(0) - 1], rows.unpack(h[:, cache.sizes[0] :])


def _layers(model, x, positions, cache):
    # transformers passes a 4-D mask through as it is. Nobody reads it: the cache knows who attends to whom.
    return model.model(inputs_embeds=x, position_ids=positions, past_key_values=cache, use_cache=True,
                       attention_mask=x.new_empty(1, 1, 1, 1)).last_hidden_state


def is_real(lengths):
    """(B, S), on the host, so that no device is waited for: where rows of these lengths have no padding."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


class Packing:
    """Only real positions, (1, T, ..), go through the layers; attention alone sees padded rows, (B, S, ..).
    Where lengths differ as much as those of rollouts do, padding would be most of the work."""

    def __init__(self, lengths, device, order=None):
        """lengths: of the rows, a list. order: of the rows in (1, T, ..), by default as they stand."""
        self.is_real = is_real(lengths)
        self.shape = self.is_real.shape  # (B, S)
        rows = torch.arange(len(lengths)) if order is None else torch.tensor(order)
        place = torch.arange(self.shape.numel()).view(self.shape)[rows][self.is_real[rows]]
        # (T,) where they stand in the padded grid; None: nothing is padded.
        self.place = None if order is None and self.is_real.all() else place.to(device)

    def pack(self, t):
        """(B, S, ..) -> (1, T, ..)"""
        t = t.flatten(0, 1)
        return (t if self.place is None else t.index_select(0, self.place))[None]

    def unpack(self, t):
        """(1, T, ..) -> (B, S, ..), zeros at padding"""
        t = t[0]
        if self.place is not None:
            t = t.new_zeros(self.shape.numel(), *t.shape[1:]).index_copy(0, self.place, t)
        return t.unflatten(0, self.shape)

    def heads(self, t):
        """Queries, keys or values (1, H, T, d) -> (B, H, S, d)"""
        return self.unpack(t.transpose(1, 2)).transpose(1, 2)


# ============================================================ prompts: each is read once
# A cache is given to transformers as `past_key_values`: each layer calls `update` with its new keys and
# values, then `attention` (at the end of this file), which calls the cache's `attend`. Its `layers` hold per
# layer the (keys, values) so far.
class PromptCache:
    """P prompts while they are read: causal attention. Padding stands on the right: no token sees it."""

    def __init__(self, model, prompts):
        lengths = list(map(len, prompts))
        self.layers = [()] * model.config.num_hidden_layers  # (keys, values), (P, K, L, d) each
        self.lengths = torch.tensor(lengths, device=model.device)  # (P,) tokens of each prompt
        self.packing = Packing(lengths, model.device)
        self.pad = pad_mask(lengths, model.device)

    def update(self, keys, values, layer, *_, **__):
        """New keys (after rotary, which leaves them in fp32) and values, packed, (1, K, T, d) each."""
        keys, values = self.packing.heads(keys.to(values.dtype)), self.packing.heads(values)
        # Contiguous, as matrix products need them: otherwise every later step would copy the prompt.
        self.layers[layer] = (keys.contiguous(), values.contiguous())
        return self, layer

    def attend(self, layer, q, scale, window=None):
        """q (1, H, T, d) -> (1, T, H, d). window: see causal."""
        return self.packing.pack(causal(self.packing.heads(q), *self.layers[layer], scale, window))


def causal(q, keys, values, scale, window):
    """Texts that attend to themselves: q (P, H, L, d), keys and values (P, K, L, d) -> (P, L, H, d).
    window: the layer sees only so many positions, its own included."""
    near, L = None, q.shape[2]
    if window and window < L:  # else no mask is needed
        near = torch.ones(L, L, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return fused(q.to(values.dtype), keys, values, near, scale)


def fused(q, keys, values, bias, scale):
    """torch's own attention, which keeps no weights: q (B, H, S, d), keys and values (B, K, n, d)
    -> (B, S, H, d). bias: a mask, or numbers that are added to the scores; None: causal."""
    if bias is not None and q.device.type in REPEATS:
        R = q.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(R, 1)  # (B, H, n, d)
        values = values.repeat_interleave(R, 1)
    shares = keys.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(q, keys, values, bias, is_causal=bias is None, scale=scale,
                                         enable_gqa=shares)
    return out.transpose(1, 2)


def embed(model, prompts, slots=None):
    """Token ids -> embeddings of prompts, lists, padded on the right (P, L, D), and of slots (B, S), with -1
    for none, (B, S, D). One look-up: the gradient of each is as large as the whole table."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    slots = ids[:0] if slots is None else slots.clamp(min=0)
    x = model.get_input_embeddings()(torch.cat([ids.flatten(), slots.flatten()]))  # (P * L + B * S, D)
    x_prompts, x = x.split([ids.numel(), slots.numel()])
    return x_prompts.unflatten(0, ids.shape), x.unflatten(0, slots.shape)


def prefill(model, prompts, slots=None):
    """Reads each prompt (a list of token ids) once -> (PromptCache, last states (P, D), embeddings of slots
    (B, S, D))."""
    x, x_slots = embed(model, prompts, slots)
    cache = PromptCache(model, prompts)
    rows = torch.arange(len(prompts), device=x.device)
    h = forward(model, x, torch.arange(x.shape[1], device=x.device).expand(len(rows), -1), cache)  # (P, L, D)
    return cache, h[rows, cache.lengths - 1], x_slots


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
    whole = PromptCache(model, prompts)
    for i in range(len(whole.layers)):
        chunks = [cache.layers[i] for cache in caches]
        whole.layers[i] = tuple(torch.cat([_widened(t, longest) for t in same]) for same in zip(*chunks))
        for cache in caches:  # layer by layer, here and below: so little is in memory twice
            cache.layers[i] = None
    return whole, torch.cat(last)


def _widened(t, L):
    """Keys or values (P, K, .., d) -> (P, K, L, d): the first ones, and zeros behind them."""
    return t if t.shape[2] == L else F.pad(t[:, :, :L], (0, 0, 0, max(0, L - t.shape[2])))


# ============================================================ own slots, on prompts that have been read
#                   the prompt, once per group           own slots, per row
#     row 0  -----> [ p0  p1  p2  p3  pad ]  <-- mask    [ s0  s1  s2 ]      slot i sees all of its prompt
#     row 1  -----/                                      [ s0  s1  s2 ]      and its own slots 0..i,
#     row 2  -----> [ q0  q1  pad pad pad ]              [ s0  s1  s2 ]      never another row's
#
# Positions restart after the prompt, so a row gives the same numbers as if it had been run alone.
class Groups:
    """Rows (B, ..), ordered by prompt, seen as (P, G, ..); groups of unequal size are padded to the largest,
    G."""

    def __init__(self, owners, n_prompts, device):
        """owners: which prompt each row belongs to, a list."""
        self.sizes = torch.tensor(owners).bincount(minlength=n_prompts).tolist()  # rows per prompt
        self.size = max(self.sizes)  # G
        self.place = None  # (B,) where in the padded grid a row stands; None: nothing is padded
        if min(self.sizes) < self.size:
            rank = torch.cat([torch.arange(size) for size in self.sizes])  # (B,) a row's number in its group
            place = torch.tensor(owners) * self.size + rank
            row = torch.zeros(n_prompts * self.size, dtype=torch.long)
            row[place] = torch.arange(len(owners))
            self.place, self.row = place.to(device), row.to(device)  # row (P * G,): who stands there

    def split(self, t):
        """(B, ..) -> (P, G, ..)"""
        t = t if self.place is None else t[self.row]
        return t.unflatten(0, (-1, self.size))

    def join(self, t):
        """(P, G, ..) -> (B, ..)"""
        t = t.flatten(0, 1)
        return t if self.place is None else t[self.place]

    def copies(self, t):
        """(P, K, L, d) -> (B, K, L, d). No index: its gradient would be added row by row."""
        return torch.cat([one.expand(n, -1, -1, -1) for one, n in zip(t.split(1), self.sizes)])


def pad_mask(lengths, device):
    """True where a prompt has ended, (P, 1, 1, L); None if all, lengths a list, are equally long."""
    return None if min(lengths) == max(lengths) else ~is_real(lengths)[:, None, None].to(device)


def unseen(cache, window, L):
    """What the new slots do not see: -> (of the prompt (B, 1, 1, S, L) or None, of the own slots (B, 1, 1, S,
    n)). window: how many positions a sliding layer (Gemma 3) sees, None for all."""
    if not window:
        return None, cache.hidden
    queries, keys = cache.positions()  # (B, S), (B, n), counted from the prompt's first token
    queries = queries[:, :, None]
    far = queries - torch.arange(L, device=keys.device) >= window  # (B, S, L)
    far_own = queries - keys[:, None] >= window  # (B, S, n)
    return far[:, None, None], far_own[:, None, None] | cache.hidden


def attend_shared(cache, q, scale, prompt, own, window):
    """One softmax over the keys of the shared prompt and the row's own: q (B, H, S, d) -> (B, S, H, d).

    prompt: keys and values (P, K, L, d); own: the same per row, (B, K, n, d). All rows of a group meet their
    one copy of the prompt in a single matrix product per prompt and head, G * R * S rows high."""
    prompt_keys, prompt_values = prompt
    own_keys, own_values = own
    B, H, S, d = q.shape
    P, K, L, _ = prompt_keys.shape
    n = own_keys.shape[2]
    R = H // K
    far, hidden = unseen(cache, window, L)

    def by_group(t):  # (B, K or 1, R, S, ..) -> (P, K or 1, G * R * S, ..)
        t = cache.groups.split(t).transpose(1, 2)  # (P, K or 1, G, R, S, ..)
        return t.reshape(P, t.shape[1], -1, t.shape[-1])

    def by_row(t):  # (P, K, G * R * S, ..) -> (B, K, R, S, ..)
        t = t.reshape(P, K, cache.groups.size, R, S, -1)
        return cache.groups.join(t.transpose(1, 2))

    # (1) How well each query fits each key; -inf where it sees none.
    q = (q.to(prompt_values.dtype) * scale).view(B, K, R, S, d)
    on_own = q.reshape(B, K, R * S, d) @ own_keys.transpose(2, 3)
    on_own = on_own.view(B, K, R, S, n).masked_fill_(hidden, -torch.inf)
    on_prompt = by_group(q) @ prompt_keys.transpose(2, 3)  # (P, K, G * R * S, L)
    if cache.pad is not None:
        on_prompt.masked_fill_(cache.pad, -torch.inf)
    if far is not None:
        on_prompt.masked_fill_(by_group(far.expand(B, 1, R, S, L)), -torch.inf)

    # (2) One softmax over both, and the weighted values.
    scores = torch.cat([on_prompt, by_group(on_own)], -1)  # (P, K, G * R * S, L + n)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    w_prompt, w_own = weights.to(q.dtype).split([L, n], -1)
    w_own = by_row(w_own).reshape(B, K, R * S, n)
    from_prompt = by_row(w_prompt @ prompt_values)  # (B, K, R, S, d)
    from_own = (w_own @ own_values).view(B, K, R, S, d)
    out = from_prompt + from_own
    return out.permute(0, 3, 1, 2, 4).reshape(B, S, H, d)


class ScoringCache:
    """Own slots that are given, fed in one or more pieces, rows padded on the right.

    Tensors keep their graph, so the gradients of a group's rows meet in its prompt."""

    # With more new slots per row attention is fused: it keeps no weights, but each row needs a copy of its
    # prompt's keys. With fewer (a latent, a few words) sharing the prompt is cheaper.
    FUSED = 8

    def __init__(self, prompts, owners):
        """prompts: a PromptCache; owners: which prompt each row belongs to, a list, in order."""
        device = prompts.lengths.device
        self.prompts = prompts.layers
        self.pad = prompts.pad
        self.owner = torch.tensor(owners, device=device)
        self.start = prompts.lengths[self.owner]  # (B,) position of a row's first slot
        self.groups = Groups(owners, len(prompts.lengths), device)
        # Per layer (keys, values, keys, values ..) of its pieces, (B, K, n, d) each. They are joined where
        # they are used: a joined copy per piece and layer would have to be kept for the backward pass.
        self.layers = [()] * len(prompts.layers)
        self.valid = self.owner.new_zeros(len(owners), 0, dtype=torch.bool)  # (B, n) no padding
        self.hidden = None  # (B, 1, 1, S, n) the slots that a new one does not see
        self.bias = {}  # window -> joint_bias, the same in all layers
        self.packing = None  # of the new slots

    def begin(self, counts):
        """Before a forward pass of new slots, so many of each row."""
        self.packing = Packing(counts, self.valid.device)
        B, S = self.packing.shape
        self.valid = torch.cat([self.valid, self.packing.is_real.to(self.valid.device)], 1)  # (B, n)
        self.bias = {}
        hidden = (~self.valid[:, None]).repeat(1, S, 1)  # (B, S, n)
        hidden[:, :, -S:] |= torch.ones(S, S, dtype=torch.bool, device=hidden.device).triu(1)  # later slots
        self.hidden = hidden[:, None, None]

    def update(self, keys, values, layer, *_, **__):
        self.layers[layer] += (self.packing.heads(keys.to(values.dtype)), self.packing.heads(values))
        return self, layer

    def attend(self, layer, q, scale, window=None):
        """q (1, H, T, d), packed -> (1, T, H, d)."""
        q = self.packing.heads(q)  # (B, H, S, d)
        prompt, own = self.prompts[layer], self.layers[layer]
        if q.shape[2] > self.FUSED:
            out = self.attend_fused(q, scale, prompt, own, window)
        else:
            own = torch.cat(own[::2], 2), torch.cat(own[1::2], 2)
            out = attend_shared(self, q, scale, prompt, own, window)
        return self.packing.pack(out)

    def attend_fused(self, q, scale, prompt, own, window):
        """q (B, H, S, d) -> (B, S, H, d), for rows that have a copy of their prompt's keys each."""
        keys, values = (torch.cat([self.groups.copies(of_prompt), *of_row], 2)
                        for of_prompt, of_row in zip(prompt, (own[::2], own[1::2])))  # (B, K, L + n, d)
        if window not in self.bias:
            self.bias[window] = self.joint_bias(values, q.shape[2], prompt[0].shape[2], window)
        return fused(q.to(values.dtype), keys, values, self.bias[window], scale)

    def joint_bias(self, like, S, L, window):
        """0 where a slot sees a key of its prompt or its row, -inf elsewhere: (B, 1, S, L + n)."""
        B = len(self.owner)
        far, hidden = unseen(self, window, L)
        if far is None:
            far = hidden.new_zeros(B, 1, 1, S, L)
        if self.pad is not None:
            far = far | self.pad[self.owner, :, :, None]
        hide = torch.cat([far, hidden], 4)[:, 0]  # (B, 1, S, L + n)
        # Rows as long as CUDA's kernels want them: otherwise torch would copy the whole bias in every layer.
        n = hide.shape[3]
        bias = like.new_zeros(B, 1, S, -(-n // 16) * 16)[..., :n]
        return bias.masked_fill_(hide, -torch.inf)

    def positions(self):
        """-> of the new slots (B, S), of all of them (B, n)."""
        keys = self.valid.cumsum(1) - 1 + self.start[:, None]
        return keys[:, -self.hidden.shape[3] :], keys


class WholeCache:
    """Prompts and own slots that are given all at once, for forward_whole. Rows of like lengths (within a
    factor of two) attend together: so little of that, too, is padding."""

    def __init__(self, model, batch):
        """batch: a scoring.Batch."""
        lengths = [len(row.slots) for row in batch.rows]
        self.prompts = PromptCache(model, batch.prompts)  # its layers stay empty
        self.layers = [()] * len(self.prompts.layers)  # (keys, values), (1, K, T, d) each
        self.start = self.prompts.lengths[batch.owner]  # (B,) see ScoringCache
        of_length = {}  # bits of a length -> rows
        for row, length in enumerate(lengths):
            of_length.setdefault(length.bit_length(), []).append(row)
        self.packing = Packing(lengths, model.device, [row for rows in of_length.values() for row in rows])
        self.parts, self.sizes = [], [sum(map(len, batch.prompts))]  # ScoringCaches; positions, prompts first
        for rows in of_length.values():
            counts = [lengths[row] for row in rows]
            part = ScoringCache(self.prompts, [batch.owners[row] for row in rows])
            part.begin(counts)
            self.parts.append(part)
            self.sizes.append(sum(counts))

    def update(self, keys, values, layer, *_, **__):
        self.layers[layer] = (keys.to(values.dtype), values)
        return self, layer

    def attend(self, layer, q, scale, window=None):
        of_prompts, *of_parts = zip(*(t.split(self.sizes, 2) for t in (q, *self.layers[layer])))
        q, *prompt = map(self.prompts.packing.heads, of_prompts)  # (P, H or K, L, d)
        outs = [self.prompts.packing.pack(causal(q, *prompt, scale, window))]
        for part, qkv in zip(self.parts, of_parts):
            q, *own = map(part.packing.heads, qkv)  # (b, H or K, S, d)
            outs.append(part.packing.pack(part.attend_fused(q, scale, prompt, own, window)))
        return torch.cat(outs, 1)


class DecodingCache:
    """Own slots while decoding: one new slot for every row in each step, written in place.

    All rows write the same column in the same step, also a row that began late, in the place of one that had
    ended. The columns before it began are hidden from it, and dropped once no row needs them any more.

        column           0    1    2    3    4    5
        row 0          [ s0   s1   s2   s3   s4   s5 ]
        row 1 began 3  [  -    -    -   s0   s1   s2 ]
    """

    packing = None

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
        self.hidden = None  # (B, 1, 1, 1, n) columns that a row does not see
        self.layers = []  # (keys, values), (B, K, room or reach, d) each
        for keys, _ in prompts.layers:
            _, K, _, d = keys.shape
            size = (len(owner), K, 0 if grows else room, d)
            self.layers.append((keys.new_zeros(size), keys.new_zeros(size)))
        self._assign(owner)

    def _assign(self, owner):
        """Rows owner (B,), in order, on the prompts that there are."""
        self.owner = owner
        self.pad = pad_mask(self.lengths.tolist(), owner.device)
        self.groups = Groups(owner.tolist(), len(self.lengths), owner.device)

    def set_reach(self, rounded):
        """Before each step: how many columns it looks at -> whether that number has changed.

        Where the cache grows, a multiple of 16 and of an eighth of all: growing copies it. rounded: of 64 and
        of a quarter, so that one recorded step serves many. Else exactly those that are written."""
        needed = self.filled + 1
        power = 2 ** needed.bit_length()
        block = max(16, power // 8) if self.grows else max(64, power // 4) if rounded else 1
        reach = min(self.room, -(-needed // block) * block)
        changed = reach != self.reach
        self.reach = reach
        self.column.fill_(self.filled)
        if self.grows and changed:
            for i, pair in enumerate(self.layers):
                self.layers[i] = tuple(_widened(t, reach) for t in pair)
        return changed

    def hide(self):
        """In each step: the columns before a row began, and those that are not written yet."""
        column = torch.arange(self.reach, device=self.owner.device)
        hidden = (column < self.began[:, None]) | (column > self.column)  # (B, n)
        self.hidden = hidden[:, None, None, None]

    def update(self, keys, values, layer, *_, **__):
        for memory, new in zip(self.layers[layer], (keys.to(values.dtype), values)):
            memory.index_copy_(2, self.column, new)  # a recorded step finds the column on the device
        return self, layer

    def attend(self, layer, q, scale, window=None):
        """q (B, H, 1, d) -> (B, 1, H, d)."""
        own = [t[:, :, : self.reach] for t in self.layers[layer]]
        return attend_shared(self, q, scale, self.prompts[layer], own, window)

    def positions(self):
        """-> of the new slots (B, 1), of all columns (B, n)."""
        start = (self.lengths[self.owner] - self.began)[:, None]  # (B, 1) position of column 0
        return start + self.column, start + torch.arange(self.reach, device=start.device)

    def change(self, rows, prompts=None, owner=None):
        """Between two steps: only `rows` (n,) stay, and the prompts that they need; then come new rows.

        prompts, owner: a PromptCache, and which of its prompts each new row belongs to, (m,). Columns that no
        row needs any more are dropped, and the write position moves left."""
        kept, owner_kept = self.owner[rows].unique(return_inverse=True)
        dropped = int(self.began[rows].min()) if len(rows) else self.filled
        columns = slice(dropped, self.filled)
        self.filled -= dropped
        self.lengths = self.lengths[kept]
        self.began = self.began[rows] - dropped
        if prompts is not None:
            self.lengths = torch.cat([self.lengths, prompts.lengths])
            self.began = torch.cat([self.began, torch.full_like(owner, self.filled)])
            owner_kept = torch.cat([owner_kept, owner + len(kept)])
        L = int(self.lengths.max())
        for i in range(len(self.layers)):
            parts = [tuple(t[kept] for t in self.prompts[i])]
            if prompts is not None:
                parts.append(prompts.layers[i])
                prompts.layers[i] = None
            self.prompts[i] = tuple(torch.cat([_widened(t, L) for t in same]) for same in zip(*parts))
            self.layers[i] = tuple(_moved(t, rows, columns, len(owner_kept)) for t in self.layers[i])
        self._assign(owner_kept)


def _moved(memory, rows, columns, n_rows):
    """Own slots (B, K, room, d) -> (n_rows, K, room, d): those of `rows`, from column 0 on; what is masked
    must at least be finite."""
    out = memory.new_zeros(n_rows, *memory.shape[1:])
    n = columns.stop - columns.start
    out[: len(rows), :, :n] = memory[:, :, columns][rows]
    return out


# ============================================================ what transformers calls
def attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """In every layer; with any other cache (its own generate, say) this is plain sdpa."""
    if hasattr(key, "attend"):  # one of our caches: `update` returned (cache, layer)
        return key.attend(value, query, scaling, kwargs.get("sliding_window")), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("litereason", attention)
AttentionMaskInterface.register("litereason", sdpa_mask)


def mask_no_words(model, ids):
    """From now on the LM head gives these ids the logit -inf, in sampling and in scoring."""
    model.lm_head.register_buffer("no_words", torch.tensor(ids, dtype=torch.long, device=model.device), False)
    model.lm_head.register_forward_hook(
        lambda head, _, logits: logits.index_fill_(-1, head.no_words, -torch.inf))
