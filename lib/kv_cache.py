"""Keys and values: without this file the method is the same, up to rounding, so a first reading can skip it.

    forward, prefill, autocast    the model on embeddings; each prompt read once; bf16 products, fp32 weights
    PromptCache                   keys and values while the prompts are read
    ScoringCache                  .. of given slots, several at a time, with their gradients
    DecodingCache                 .. of one new slot per row and step, written in place
    FewRows                       a few rows times a large matrix, on a CPU

Letters in the shape comments are those of litereason.py, and:
    H heads   K key/value heads   R = H / K   d head size   n columns of own slots, or rows
"""
import contextlib
import functools

import torch
import torch.nn.functional as F
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

PREFILL = 2**14  # most positions, padding included, that are read in one forward pass before decoding
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
