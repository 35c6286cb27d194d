"""Speed. Nothing in this file changes a result."""
import copy
import functools
import sys

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface


LOGITS = 2**27  # most logits that scoring computes at once: 512 MiB in fp32, 883 tokens of Qwen's vocabulary


LOOK = 4  # while decoding, the device is looked at from outside once in so many steps


WAITS = ("cuda",)  # devices on which a shape that depends on numbers waits for them


class FewRows(torch.nn.Linear):
    """torch.nn.Linear, a decoding step's speed on a CPU: its libraries multiply a few rows by a large matrix at a third of the memory's
    speed, but the other way round, two or four rows at a time, they reach it (measured with MKL; one or three rows are padded)."""

    def forward(self, x):
        n = x.numel() // self.in_features
        if x.device.type != "cpu" or not 0 < n <= 8 or self.weight.numel() < 2**17:
            return super().forward(x)
        rows = F.pad(x.reshape(n, self.in_features), (0, 0, 0, n % 2))  # (n or n + 1, in)
        y = torch.cat([(self.weight @ part.T).T for part in rows.split(4)])[:n].view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class SharedCache:
    """Keys and values of a batch in which many rows share few prompts.

                      the prompt, once per group           own slots, per row
        row 0  -----> [ p0  p1  p2  p3  pad ]  <-- mask    [ s0  s1  s2 ]      slot i sees all of its prompt
        row 1  -----/                                      [ s0  s1  s2 ]      and its own slots 0..i,
        row 2  -----> [ q0  q1  pad pad pad ]              [ s0  s1  s2 ]      never another row's

    While decoding all rows write the same column of their memory in the same step, also when one of them began late, in the place
    of a row that had ended. The columns before are hidden from it, and dropped once they are no row's any more.

        column           0    1    2    3    4    5
        row 0          [ s0   s1   s2   s3   s4   s5 ]
        row 1 began 3  [  -    -    -   s0   s1   s2 ]

    Given to transformers as `past_key_values`: each layer calls `update` with its new keys and values, then our attention
    function, which calls `attend`. Positions restart after the prompt, so a group's rows give the same numbers as if each
    had been run alone on prompt + slots. With gradients the tensors keep their graph (nothing is detached or copied in
    place); while decoding, own slots are written into memory that is there already.
    """
    FUSED = 8  # new slots per row above which, on a CPU, rows get copies of their prompt's keys: smaller than the weights they save

    def __init__(self, layers):
        self.prompt = [None] * layers  # (keys, values), (P, K, L, d) each
        self.own = [None] * layers  # (keys, values), (B, K, S, d) each; preallocated, S = room, while decoding
        self.lengths = None  # (P,) prompt lengths
        self.owner = None  # (B,) which prompt a row belongs to; None while the prompts themselves are read
        self.mask = None  # own slots that are not seen, (B, 1, 1, S, n); None: all are
        # decoding only
        self.room = self.filled = self.reach = 0  # columns there are, columns that are written, columns that this step looks at
        self.began, self.late = None, False  # (B,) column of a row's first slot; whether it is another than 0 for any
        self.steady, self.column, self.played = False, None, None  # for CUDA graphs, see decode_slot

    def assign(self, owner, room=0):
        """After the prompts: there are rows owner (B,), ordered by prompt. room > 0: they will be decoded, at most so many slots each."""
        self.owner = owner
        if room:
            self.room, self.began, self.column = room, torch.zeros_like(owner), torch.zeros_like(owner[:1])
            self.own = [tuple(t.new_zeros(len(owner), t.shape[1], room, t.shape[3]) for t in kv) for kv in self.prompt]
        counts = torch.bincount(owner, minlength=len(self.lengths)).tolist()  # rows per prompt
        self.group = max(counts)  # G
        if min(counts) == self.group:
            self.grid = None  # equal groups: (B, ..) is (P, G, ..) as it stands
        else:  # ragged groups are padded to the largest; `grid` (P, G) names a row for each place, `back` (B,) undoes it
            rank = torch.cat([torch.arange(c) for c in counts]).to(owner.device)  # (B,) a row's number in its group
            self.back = owner * self.group + rank
            self.grid = torch.zeros(len(counts) * self.group, dtype=torch.long, device=owner.device)
            self.grid[self.back] = torch.arange(len(owner), device=owner.device)
        L = self.prompt[0][0].shape[2]
        pad = torch.arange(L, device=owner.device) >= self.lengths[:, None]  # (P, L)
        self.pad = pad[:, None, None] if pad.any() else None  # (P, 1, 1, L)

    def begin(self, valid):
        """Before a forward pass of new slots: valid (B, S) says which are real (rows are padded on the right)."""
        B, S = valid.shape
        seen = valid if self.mask is None else torch.cat([self.valid, valid], 1)  # (B, past + S)
        self.valid, self.bias = seen, {}
        later = torch.ones(S, S, dtype=torch.bool, device=valid.device).triu(1)  # (S, S) slot j comes after slot i
        hide = ~seen[:, None].expand(B, S, seen.shape[1]).clone()  # (B, S, past + S)
        hide[:, :, -S:] |= later
        self.mask = hide[:, None, None]  # (B, 1, 1, S, past + S)

    def beyond(self, window, S, L, n):
        """What a sliding-window layer (Gemma 3) no longer sees: (B, 1, 1, S, L) prompt keys, (B, 1, 1, S, n) own keys."""
        if self.room:  # (B, n) place among the row's real slots; the newest ones, (B, S, 1), ask
            key, query = torch.arange(n, device=self.owner.device) - self.began[:, None], (self.column - self.began)[:, None, None]
        else:
            key = self.valid.cumsum(1) - 1
            query = key[:, -S:, None]
        key, query = (t + self.lengths[self.owner].view(-1, *[1] * (t.dim() - 1)) for t in (key, query))  # positions
        on_prompt = query - torch.arange(L, device=key.device) >= window
        return on_prompt[:, None, None], (query - key[:, None] >= window)[:, None, None]

    def joint_bias(self, S, L, n, window, like):
        """0 where a slot sees a key, -inf elsewhere, over the prompt's keys and the row's own: (B, 1, S, L + n)."""
        B = len(self.owner)
        prompt = self.pad[self.owner] if self.pad is not None else torch.zeros(1, 1, 1, L, dtype=torch.bool, device=like.device)
        hide = torch.cat([prompt.expand(B, 1, S, L), self.mask[:, 0]], 3)  # (B, 1, S, L + n)
        if window:
            hide = hide | torch.cat(self.beyond(window, S, L, n), 4)[:, 0]
        return like.new_zeros(hide.shape).masked_fill(hide, -torch.inf)

    def update(self, k, v, layer, *_, **__):
        """Called by every attention layer with its new keys and values, (rows, K, S, d) each, rotary already applied."""
        k = k.to(v.dtype)  # with bf16 compute the rotary leaves it in fp32
        if self.owner is None:  # in rows of d numbers as matrix products want them: otherwise every later step would copy the prompt
            self.prompt[layer] = (k.contiguous(), v.contiguous())
        elif self.room:  # decoding: one slot per row, written in place
            for memory, new in zip(self.own[layer], (k, v)):
                memory.index_copy_(2, self.column, new)
        else:
            old = self.own[layer]
            self.own[layer] = (k, v) if old is None else tuple(torch.cat([o, n], 2) for o, n in zip(old, (k, v)))
        return self, layer

    def attend(self, layer, q, scale, window=None):
        """q (rows, H, S, d) -> (rows, S, H, d): softmax over the prompt's keys and the row's own together. window: the layer sees
        only so many positions, its own included."""
        q = q.to(self.prompt[layer][1].dtype)
        if self.owner is None:  # the prompts: plain causal attention; padding stands to the right of all it could disturb
            k, v = self.prompt[layer]
            near = None  # (L, L) only a window needs a mask
            if window and window < q.shape[2]:
                near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
            return F.scaled_dot_product_attention(q, k, v, near, is_causal=near is None, scale=scale, enable_gqa=True).transpose(1, 2)
        (B, H, S, d), (pk, pv), (ok, ov) = q.shape, self.prompt[layer], self.own[layer]
        if self.room:
            ok, ov = ok[:, :, : self.reach], ov[:, :, : self.reach]
        P, K, L, R, n = pk.shape[0], pk.shape[1], pk.shape[2], H // pk.shape[1], ok.shape[2]
        if S > self.FUSED and q.device.type == "cpu":  # fused attention, which never keeps the weights, beats sharing the products
            k, v = (torch.cat([p.index_select(0, self.owner), o], 2) for p, o in ((pk, ok), (pv, ov)))  # (B, K, L + n, d)
            if window not in self.bias:
                self.bias[window] = self.joint_bias(S, L, n, window, q)
            return F.scaled_dot_product_attention(q, k, v, self.bias[window], scale=scale, enable_gqa=True).transpose(1, 2)
        q = (q * scale).view(B, K, R, S, d)
        on_own = (q.reshape(B, K, R * S, d) @ ok.transpose(2, 3)).view(B, K, R, S, n)  # (B, K, R, S, n)
        if self.mask is not None:
            on_own = on_own.masked_fill(self.mask, -torch.inf)
        # All rows of a group against their one copy of the prompt: a single matrix product per prompt and head, G*R*S rows high.
        by_group = lambda t: self._grouped(t).transpose(1, 2).reshape(P, t.shape[1], -1, t.shape[-1])  # (B, K, R, S, ..) -> (P, K, G*R*S, ..)
        by_row = lambda t: self._ungrouped(t.reshape(P, K, self.group, R, S, -1).transpose(1, 2))  # and back: (B, K, R, S, ..)
        on_prompt = by_group(q) @ pk.transpose(2, 3)  # (P, K, G*R*S, L)
        if self.pad is not None:
            on_prompt = on_prompt.masked_fill(self.pad, -torch.inf)
        if window:
            far_prompt, far_own = self.beyond(window, S, L, n)
            on_prompt = on_prompt.masked_fill(by_group(far_prompt.expand(B, 1, R, S, L)), -torch.inf)
            on_own = on_own.masked_fill(far_own, -torch.inf)
        w = torch.cat([on_prompt, by_group(on_own)], -1)  # (P, K, G*R*S, L + n)
        w_prompt, w_own = w.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype).split([L, n], -1)
        out = by_row(w_prompt @ pv) + (by_row(w_own).reshape(B, K, R * S, n) @ ov).view(B, K, R, S, d)
        return out.permute(0, 3, 1, 2, 4).reshape(B, S, H, d)

    def _grouped(self, t):  # (B, ..) -> (P, G, ..)
        return (t if self.grid is None else t[self.grid]).unflatten(0, (-1, self.group))

    def _ungrouped(self, t):  # (P, G, ..) -> (B, ..)
        t = t.flatten(0, 1)
        return t if self.grid is None else t[self.back]

    def look(self, steady):
        """Decoding, before each step: how many columns it looks at. steady: rounded up, to a multiple of 64 and, of many, by at most a
        quarter, so that steps are alike for long."""
        n, self.steady = self.filled + 1, steady
        block = max(64, 2 ** (n.bit_length() - 3)) if steady else 1
        reach = min(self.room, -(-n // block) * block)
        if reach != self.reach:
            self.reach, self.played = reach, None
        self.column.fill_(self.filled)

    def hide(self):
        """Decoding, in each step: the columns before a row began, and those that are not written yet."""
        self.mask = None
        if self.steady or self.late:
            column = torch.arange(self.reach, device=self.owner.device)
            self.mask = ((column < self.began[:, None]) | (column > self.column))[:, None, None, None]  # (B, 1, 1, 1, n)

    def change(self, rows, more=None):
        """Decoding, between two steps: only `rows` (n,) stay, and the prompts they need; behind them come the rows of `more`, a cache of
        prompts that have just been read. Columns that no row needs any more are dropped, which puts the clock back."""
        prompts, owner = self.owner[rows].unique(return_inverse=True)
        gone = int(self.began[rows].min()) if len(rows) else self.filled
        began, lengths, n = self.began[rows] - gone, self.lengths[prompts], self.filled - gone
        if more is not None:
            began = torch.cat([began, torch.full_like(more.owner, n)])
            owner, lengths = torch.cat([owner, more.owner + len(prompts)]), torch.cat([lengths, more.lengths])
        L = int(lengths.max())
        wide = lambda t: F.pad(t[:, :, :L], (0, 0, 0, max(0, L - t.shape[2])))  # (P, K, L, d)
        for i, (old, own) in enumerate(zip(self.prompt, self.own)):  # layer by layer, so that little is in memory twice
            if more is not None or len(prompts) < len(self.lengths):
                new = more.prompt[i] if more is not None else [t[:0] for t in old]
                self.prompt[i] = tuple(torch.cat([wide(t[prompts]), wide(m)]) for t, m in zip(old, new))
            if more is not None:
                more.prompt[i] = None
            self.own[i] = tuple(t.new_zeros(len(owner), *t.shape[1:]) for t in own)  # zeros: what is masked must at least be finite
            for t, m in zip(own, self.own[i]):
                m[: len(rows), :, :n] = t[:, :, gone : self.filled][rows]
        self.lengths, self.filled, self.began, self.late, self.played = lengths, n, began, bool(began.any()), None
        self.assign(owner)


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What transformers calls in every layer; with any other cache (its own generate, say) this is plain sdpa."""
    if isinstance(key, SharedCache):
        return key.attend(value, query, scaling, kwargs.get("sliding_window")), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("litereason", _attention)


AttentionMaskInterface.register("litereason", sdpa_mask)


def compute(model):
    """The context in which the base computes: bf16 matrix products on CUDA from fp32 weights (`model.bf16`; False on a CPU).

    fp32 master weights: an RL step of 5e-7 is far below bf16's spacing and would round away."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16)


def computes(function):
    """Runs function(model, ..) in that context: within one call each weight is cast once, however many forwards there are."""

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        with compute(model):
            return function(model, *args, **kwargs)

    return run


def forward(model, x, positions, cache):
    """Embeddings x (rows, S, D) at positions (rows, S) -> states after the final norm (rows, S, D), what the head reads."""
    dummy = x.new_empty(1, 1, 1, 1)  # a 4-D mask is passed through unread: the cache knows who attends to whom
    return model.model(inputs_embeds=x, position_ids=positions, attention_mask=dummy, past_key_values=cache,
                       use_cache=True).last_hidden_state


def checkpoint_layers(model):
    """From now on a layer's activations are not kept for the backward pass but computed again: far less memory, a third more time.

    transformers' own switch turns the cache off; ours hands each layer the cache as it stood, so running it twice is harmless."""
    for i, layer in enumerate(model.model.layers):
        layer.forward = functools.partial(_recomputed, layer.forward, i)


def _recomputed(layer, i, x, past_key_values=None, **kwargs):
    cache = past_key_values
    if not torch.is_grad_enabled() or not isinstance(cache, SharedCache):
        return layer(x, past_key_values=cache, **kwargs)
    field = "prompt" if cache.owner is None else "own"
    before = copy.copy(cache)
    before.prompt, before.own = list(cache.prompt), list(cache.own)

    def run(x):
        view = copy.copy(before)
        view.prompt, view.own = list(before.prompt), list(before.own)
        return layer(x, past_key_values=view, **kwargs), *getattr(view, field)[i]

    out, k, v = checkpoint(run, x, use_reentrant=False)
    getattr(cache, field)[i] = (k, v)
    return out


def prefill(model, prompts, slots=None):
    """Reads each prompt (a list of token ids) once -> (cache, last states (P, D), embeddings of slots, None or (B, S) ids, (B, S, D)).

    The slots are looked up together with the prompts: the gradient of a look-up is as large as the whole table."""
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)  # (P,)
    ids = torch.zeros(len(prompts), max(len(p) for p in prompts), dtype=torch.long)  # (P, L), padded on the right
    for row, p in zip(ids, prompts):
        row[: len(p)] = torch.tensor(p)
    ids, embed = ids.to(model.device), model.get_input_embeddings()
    cache = SharedCache(model.config.num_hidden_layers)
    cache.lengths = lengths
    if slots is None:
        x, own = embed(ids), None  # (P, L, D)
    else:
        x, own = embed(torch.cat([ids.flatten(), slots.flatten()])).split([ids.numel(), slots.numel()])
        x, own = x.view(*ids.shape, -1), own.view(*slots.shape, -1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)  # (P, L)
    h = forward(model, x, positions, cache)  # (P, L, D)
    return cache, h[torch.arange(len(prompts), device=ids.device), lengths - 1], own


def decode_slot(model, x, positions, cache):
    """One slot for every row: embeddings x (B, D) at positions (B,) -> states (B, D).

    With model.graphs, on CUDA: a step is a thousand short kernels, which Python starts more slowly than the card runs them. They are
    recorded once and then played, until rows leave or join or the columns that a step looks at are full. What cannot be recorded runs as ever.
    """
    def run(x, positions):
        cache.hide()
        return forward(model, x[:, None], positions[:, None], cache)[:, 0]

    cache.look(model.graphs)
    if model.graphs:
        try:
            cache.played = cache.played or record(run, x, positions)
            return cache.played(x, positions)
        except RuntimeError as e:
            model.graphs = False
            print(f"warning: the decoding step cannot be recorded as a CUDA graph ({str(e).partition(chr(10))[0]}); it runs without", file=sys.stderr)
            cache.look(False)
    return run(x, positions)


def record(step, *inputs):
    """step(*inputs) as a CUDA graph -> play(*inputs), for inputs of the same shapes; its result stands in the same memory each time."""
    if inputs[0].device.type != "cuda":
        raise RuntimeError("this is no CUDA device")
    device, inputs, graph = inputs[0].device, [t.clone() for t in inputs], torch.cuda.CUDAGraph()
    now = torch.cuda.current_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(now):  # also if the recording fails, this is the stream afterwards
        aside = torch.cuda.Stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):  # once as ever: what libraries allocate when they are first called must not be recorded
            step(*inputs)
        now.wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside):
            out = step(*inputs)

    def play(*new):
        for memory, t in zip(inputs, new):
            memory.copy_(t)
        graph.replay()
        return out

    return play


def pack(rollouts, budget):
    """Splits rollouts into runs of neighbours -> lists of indices; one forward pass over a run computes at most `budget`
    positions, each prompt once and padding included (or it is a single rollout). Budgets change memory and time, no result."""
    parts, prompts, L, S = [[]], set(), 0, 0
    for i, r in enumerate(rollouts):
        key = tuple(r.prompt_ids)
        prompts, L, S = prompts | {key}, max(L, len(key)), max(S, len(r.slots))
        if parts[-1] and len(prompts) * L + (len(parts[-1]) + 1) * S > budget:
            parts.append([])
            prompts, L, S = {key}, len(key), len(r.slots)
        parts[-1].append(i)
    return [p for p in parts if p]


class TokenLogprobs(torch.autograd.Function):
    """log softmax((h W^T + bias) / temperature)[target] of states h (M, D) -> (M,), and its gradient by hand: with p = softmax(..), one-hot e
    and the incoming g / temperature, d/dh = g (e - p) W and d/dW = (e - p)^T g h. Autograd would make five more (M, V) tensors on the way."""

    @staticmethod
    def logits(h, weight, bias, temperature):
        logits = F.linear(h.to(weight.dtype), weight, bias)  # (M, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if temperature == 1 else logits / temperature

    @staticmethod
    def forward(ctx, h, weight, bias, targets, temperature, keep):
        logits = TokenLogprobs.logits(h, weight, bias, temperature)
        total = torch.cat([part.logsumexp(-1) for part in logits.split(32)])  # (M,); in parts, since it copies what it reads
        ctx.save_for_backward(h, weight, bias, targets, total, logits if keep else None)
        ctx.temperature = temperature
        return logits.gather(-1, targets[:, None])[:, 0] - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, weight, bias, targets, total, logits = ctx.saved_tensors
        p = TokenLogprobs.logits(h, weight, bias, ctx.temperature) if logits is None else logits
        p = p.sub_(total[:, None]).exp_()  # (M, V), in place: a second backward pass through the same logits is an error
        p[torch.arange(len(targets), device=h.device), targets] -= 1
        p, g = p.to(weight.dtype), -g[:, None] / ctx.temperature  # (M, 1)
        needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return ((g * (p @ weight)).to(h.dtype) if needs_h else None, p.T @ (g * h).to(weight.dtype) if needs_weight else None,
                (p.T @ g.to(p.dtype))[:, 0] if needs_bias else None, None, None, None)


def token_logprobs(model, h, targets, temperature=1.0, chunk=None):
    """log p(target) for states h (M, D), targets (M,) -> (M,). The (chunk, V) logits, by default LOGITS numbers, exist one chunk at
    a time; in the backward pass they are computed again instead of being kept, unless one chunk is all."""
    head, chunk = model.lm_head, chunk or max(1, LOGITS // model.lm_head.out_features)
    weight = head.weight.to(torch.bfloat16) if model.bf16 else head.weight  # once, for all chunks and both directions
    parts = [(h[i : i + chunk], targets[i : i + chunk]) for i in range(0, len(h), chunk)]
    bias = None if head.bias is None else head.bias.to(weight.dtype)
    return torch.cat([TokenLogprobs.apply(x, weight, bias, y, temperature, len(parts) == 1) for x, y in parts] or [h[:, 0]])
