"""LiteReason (arXiv 2512.02240): everything the paper defines, in one file.

A policy LM may write <implicit_thought>N</implicit_thought>. The next N positions are then not sampled: the Reasoning
Projector P maps the last hidden state to the next input embedding, N times, and sampling goes on (paper Sec. 3):

    h_0 = LM(context)[-1]                  the state that the LM head reads, at the last token of the closing tag
    z_1 = P(h_0),  z_{k+1} = P(h_k)        h_k = LM(context, z_1 .. z_k)[-1]
    next token ~ softmax(W_head h_N)       z_N is read by the model; the token after the block is predicted there

One representation, one rule. A trajectory is a prompt and a list of SLOTS, each a token id or LATENT, plus the latent
vectors. The output at slot t is scored iff slot t+1 is a token that the policy sampled:

    slots        a    <..>   3   </..>  LATENT LATENT LATENT   b    .   EOS
    fed as      E[a]  E[..] E[3] E[..]   z_1    z_2    z_3    E[b] E[.]
    predicted   by the prompt's last output, then each token by the output of the slot before it; `b` by that of z_3.
                Nothing predicts a LATENT: the outputs at </..>, z_1 and z_2 go to the projector, not to the LM head.

Letters in the shape comments:
    P prompts   B rows (rollouts)   G rows of one prompt   L prompt length   S own slots of a row   T = L + S
    D hidden size   V vocabulary   H heads   K key/value heads   R = H / K   d head size   M scored positions

Read in this order: the tag, the projector, load and save, the cache, generate, logprobs, unroll, GRPO, traces, rewards.
"""
import dataclasses
import itertools
import re
import types

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import copy

from engine import (LOOK, WAITS, FewRows, computes, decode_slot, forward, prefill, pack, token_logprobs, checkpoint_layers, compute, SharedCache)
import engine
from runs import (UserError, _stop_ids, chat_parts, check_lengths, encode_prompt, read_checkpoint, save, stop_tokens)

LATENT = -1  # the slot value of a latent position
CAP = 5  # a tag's N is clamped to this; a checkpoint carries its own (config.litereason_max_reasoning_steps)
PROJECTOR_LAYERS = 3


# ============================================================================ the tag (paper Sec. 3.1)
# Plain text, no new vocabulary. N is written in ASCII digits, with ASCII spaces around it if the model likes, and is at
# least 1. Anything else between the tags is ordinary text, and so is a tag opened right inside another.
OPEN, CLOSE = "<implicit_thought>", "</implicit_thought>"
TAG = re.compile(rf"((?:{OPEN}\s*(?:[0-9]+\s*)?)*){OPEN}\s*([0-9]+)\s*{CLOSE}", re.ASCII)
SPACE, DIGITS = " \t\n\r\f\v", "0123456789"


def parse_tags(text, cap=CAP):
    """The valid tags of a text: [(start, end, n)] in characters, n in 1..cap. For text; decoding uses TagWatcher."""
    found = []
    for m in TAG.finditer(text):
        digits = m.group(2).lstrip("0")
        if digits and not m.group(1):  # N >= 1, and not nested in an open tag
            n = cap if len(digits) > 9 else min(int(digits), cap)  # int() refuses numbers of thousands of digits
            found.append((m.start(), m.end(), n))
    return found


def _read_char(state, char, cap):
    """One step of the automaton that `TAG` describes: (state, char) -> (state, N if a tag has just ended, else 0).

    States: ("open", j, nested)  j characters of OPEN have been read, inside an open tag or not
            ("number", n, part)  inside the tags; n = -1 for a nested one, part 0/1/2 = before/in/after the digits
            ("close", n, j)      j characters of CLOSE have been read
    """
    kind, a, b = state
    if kind == "open" and char == OPEN[a]:
        return (("open", a + 1, b), 0) if a + 1 < len(OPEN) else (("number", -1 if b else 0, 0), 0)
    if kind == "number":
        if char in DIGITS and b < 2:
            return ("number", a if a < 0 else min(10 * a + int(char), cap), 1), 0
        if char in SPACE:
            return ("number", a, 0 if b == 0 else 2), 0
        if char == "<":
            return ("close", a, 1), 0
    if kind == "close":
        if char == CLOSE[b]:
            return (("close", a, b + 1), 0) if b + 1 < len(CLOSE) else (("open", 0, False), max(a, 0))
        if b == 1 and char == OPEN[1]:
            return ("open", 2, True), 0
    return ("open", int(char == "<"), False), 0  # a mismatch; "<" stands only at the start of a tag, so no other fallback


class TagWatcher:
    """Reads sampled token ids row by row and says when a tag has ended, without decoding anything.

    The automaton above is run over the text of every vocabulary entry once, from every state: a table then turns
    (state, token) into (next state, N). BPE may merge neighbours into the tag's ends (`.<`, `>\\n`): the merged token
    ends the tag. Only what is passed to `step` is seen, so a tag in the prompt (a story, say) never fires.

    Most tokens send every state back to the start; tokens that act alike share a class:
    classes (V,), next_state and fires (classes, states). Real Qwen2 vocabulary, cap 5: a few seconds, once per tokenizer.
    """

    def __init__(self, tokenizer, cap, vocab_size, device):
        # 1. every state that some text can reach, as small integers; 0 is the start
        start, alphabet = ("open", 0, False), sorted(set(OPEN + CLOSE + SPACE + DIGITS)) + ["\0"]
        states, queue = {start: 0}, [start]
        for s in queue:
            for c in alphabet:
                nxt, _ = _read_char(s, c, cap)
                if nxt not in states:
                    states[nxt] = len(states)
                    queue.append(nxt)
        step = {c: [_read_char(s, c, cap) for s in queue] for c in alphabet}
        move = {c: np.array([states[nxt] for nxt, _ in row]) for c, row in step.items()}
        fire = {c: np.array([n for _, n in row]) for c, row in step.items()}
        # 2. the same for every token of the vocabulary, read character by character
        reset = np.zeros(len(queue), dtype=np.int64)
        columns, classes = {(reset.tobytes(), reset.tobytes()): 0}, np.zeros(vocab_size, dtype=np.int64)
        plain = re.compile("[^" + re.escape("".join(alphabet[:-1])) + "][^<>]*")  # such a text only resets
        for token, text in enumerate(token_texts(tokenizer)[:vocab_size]):
            if plain.fullmatch(text):
                continue
            at, n = np.arange(len(queue)), reset
            for c in text:
                c = c if c in move else "\0"
                n = np.where(fire[c][at] > 0, fire[c][at], n)
                at = move[c][at]
            classes[token] = self._column(columns, at, n)
        table = np.array([[np.frombuffer(a, dtype=np.int64), np.frombuffer(b, dtype=np.int64)] for a, b in columns])
        self.classes = torch.from_numpy(classes).to(device)  # (V,)
        self.next_state, self.fires = torch.from_numpy(table).to(device).unbind(1)  # (classes, states) each
        # what starts a tag, (classes, states): beyond its "<i", which may stand in any text (<i> is italics), or all of it in one token
        begun = torch.tensor([s[0] != "open" or s[1] > 2 for s in queue], device=device)
        self.starts = begun[self.next_state] | (self.fires > 0)
        # states from which a tag may end so soon, within LOOK - 1 tokens, that its latents begin before the device is looked at again
        self.soon = (self.fires > 0).any(0)  # (states,)
        for _ in range(LOOK - 2):
            self.soon = self.soon | self.soon[self.next_state].any(0)
        self.as_lists = classes.tolist(), table[:, 0].tolist(), table[:, 1].tolist()  # for one row, on the host

    @staticmethod
    def _column(columns, at, n):
        return columns.setdefault((at.tobytes(), n.tobytes()), len(columns))

    def step(self, state, token):
        """state (B,), sampled token (B,) -> (state (B,), n (B,)): n > 0 where this token ends a tag."""
        kind = self.classes[token]  # (B,)
        return self.next_state[kind, state], self.fires[kind, state]


def token_texts(tokenizer):
    """The text of every vocabulary entry as it reads inside a text (leading spaces kept): a list of V strings."""
    anchor = (tokenizer.encode("a", add_special_tokens=False) or [0])[-1:]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    pairs = [anchor + [i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    return [t[len(before):] if t.startswith(before) else t for t in texts]


def watcher(model, tokenizer):
    """The model's TagWatcher, built once per tokenizer, cap and device."""
    key = (model.config.litereason_max_reasoning_steps, model.config.vocab_size, str(model.device))
    made = tokenizer.__dict__.setdefault("_litereason_watchers", {})
    if key not in made:
        made[key] = TagWatcher(tokenizer, *key)
    return made[key]


def insert_latents(model, tokenizer, ids):
    """Token ids of a finished trace -> slots: after each tag its LATENTs, where decoding would have put them."""
    classes, next_state, fires = watcher(model, tokenizer).as_lists
    state, slots = 0, []
    for i in ids:
        n = fires[classes[i]][state]
        state = next_state[classes[i]][state]
        slots += [i] + [LATENT] * n
    return slots


# ============================================================================ the Reasoning Projector (paper Sec. 3.2)
class ReasoningProjector(torch.nn.ModuleList):
    """P(h) = MLP_3(MLP_2(MLP_1(h))): last hidden state (.., D) -> next input embedding (.., D).

    No residual and no norm between the layers; its output is inserted raw as an input embedding. Kept in fp32 whatever
    the base's dtype (ours: the released code trains it in bf16, where steps of 1e-4 round away).
    """

    @classmethod
    def warm_start(cls, model, layers=PROJECTOR_LAYERS):
        """`layers` independent copies of the last block's MLP (the paper's start)."""
        mlp = model.model.layers[-1].mlp
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        return cls(copy.deepcopy(mlp) for _ in range(layers)).to(model.device, dtype)

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            z = h.to(next(self.parameters()).dtype)
            for mlp in self:
                z = mlp(z)
        return z.to(h.dtype)


class PauseToken(ReasoningProjector):
    """A control in the projector's place: one learned vector (D,), fed at every latent, whatever the state is."""

    def __init__(self, vector):
        super().__init__()
        self.vector = torch.nn.Parameter(vector)

    def forward(self, h):
        return self.vector.to(h.dtype).expand_as(h)


def control_projector(model, kind):
    """What the projector is compared with: "random" (the same layers with random weights) or "pause" (a PauseToken, at the mean embedding)."""
    if kind == "pause":
        return PauseToken(model.get_input_embeddings().weight.detach().to(next(model.reasoning_projector.parameters()).dtype).mean(0))
    for layer in model.reasoning_projector.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    return model.reasoning_projector


def latent_step(model, h, latent="projector", *place):
    """The next input embedding (.., D) from the last hidden state h (.., D).

    latent: "projector" (the method), "zeros" (a control), or any function h, *place -> z. While decoding, place is (u, k), each (B,):
    a number in [0, 1) of the row's own, the same in any batch, and how many latents the row has run before.
    """
    if callable(latent):
        return latent(h, *place)
    return model.reasoning_projector(h) if latent == "projector" else torch.zeros_like(h)


def load(name_or_path, device=None, dtype=None):
    """A causal LM with one more submodule, `reasoning_projector`, and its tokenizer.

    name_or_path: "tiny" (shipped), a directory, a hub id, or a short name (Qwen2.5-1.5B -> Qwen/Qwen2.5-1.5B).
    device: default cuda if there is one, else cpu. dtype: default float32, for weights and compute.
    A checkpoint without projector weights gets the warm start and the default cap. Files are data: safetensors only, no
    pickle, no code of the checkpoint's own; a directory is read without a network.
    Raises UserError, in one line, if there is no such model, it cannot be fetched, or its files do not fit together.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, weights = read_checkpoint(name_or_path, dtype)
    model = attach(model.to(device), weights)
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise UserError(f"cannot load the model in {name_or_path!r}: {bad[0]} holds NaN or inf")
    return model, tokenizer


def attach(model, weights=None):
    """Adds the projector (from `weights`, else the warm start), its config entries and our attention to a causal LM."""
    config = model.config
    if not hasattr(getattr(model, "model", None), "layers") or not hasattr(model.model.layers[-1], "mlp"):
        raise UserError(f"{type(model).__name__} is not a plain causal LM (model.layers, each with an mlp); Qwen2, Qwen3, Llama, Gemma 1 and 3 are")
    if any(getattr(config, k, None) for k in ("attn_logit_softcapping", "final_logit_softcapping")):
        raise UserError(f"{type(model).__name__} caps its logits by a tanh (as Gemma 2 does), which LiteReason does not support")
    cap = getattr(config, "litereason_max_reasoning_steps", CAP)
    if not isinstance(cap, int) or isinstance(cap, bool) or not 1 <= cap <= 64:
        raise UserError(f"config.json: litereason_max_reasoning_steps is {cap!r}, expected a whole number from 1 to 64")
    layers = getattr(config, "litereason_num_reasoning_layers", PROJECTOR_LAYERS)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= 64:
        raise UserError(f"config.json: litereason_num_reasoning_layers is {layers!r}, expected a whole number from 1 to 64")
    model.reasoning_projector = ReasoningProjector.warm_start(model, layers)
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = FewRows
    model.projector_trained = bool(weights)
    model.bf16 = model.device.type == "cuda" and model.dtype == torch.float32  # see compute()
    model.graphs = False  # see decode_slot()
    if weights:
        if set(weights) == {"vector"}:
            model.reasoning_projector = control_projector(model, "pause")
        try:
            model.reasoning_projector.load_state_dict(weights)
        except RuntimeError as e:
            raise UserError(f"the checkpoint's reasoning_projector does not fit: {str(e).splitlines()[1].strip()}") from e
    config.is_litereason_model = True  # the released code reads and writes the same three entries
    config.litereason_num_reasoning_layers, config.litereason_max_reasoning_steps = layers, cap
    model.generation_config = transformers.GenerationConfig(eos_token_id=_stop_ids(model), pad_token_id=model.config.pad_token_id)
    model.set_attn_implementation("litereason")  # see SharedCache; anything else still goes through sdpa
    return model.eval()  # no dropout anywhere: sampling and scoring must see the same network


# ============================================================================ the mixed decoding loop (paper Sec. 3.1)
@dataclasses.dataclass
class Rollout:
    """One trajectory. Everything later (scoring, masks, loss) is derived from these records, never from token values."""

    prompt_ids: list  # token ids
    slots: list  # token ids and LATENTs, in order, the stop token included
    latents: torch.Tensor  # (n, D), one per LATENT slot, as fed
    logprobs: torch.Tensor = None  # (len(slots),), of the sampled tokens under the untruncated distribution; 0 at latents
    text: str = ""  # what the policy wrote, without the stop token
    finished: bool = True  # it ended by itself, not by the length limit
    prompt: int = 0  # which of generate's prompts

    @property
    def n_latents(self):
        return sum(s == LATENT for s in self.slots)

    @property
    def n_tokens(self):
        return len(self.slots) - self.n_latents

    @property
    def n_tags(self):
        """Tags that ran: blocks of LATENTs."""
        return sum(s == LATENT and (i == 0 or self.slots[i - 1] != LATENT) for i, s in enumerate(self.slots))


def sample(logits, u, temperature, top_k, top_p):
    """One token per row by inverting the cumulative distribution at u: a row's draw does not depend on the other rows.

    logits (B, V), u (B,) uniform in [0, 1) -> tokens (B,), log-probs (B,) under softmax(logits / temperature). top-k and
    top-p cut the distribution that is drawn from, not the log-prob: train with them off, or the two differ.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    logp = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        p = logp.exp()
        if 0 < top_k < p.shape[-1]:
            p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0)
        if top_p < 1:
            ranked, order = p.sort(descending=True)
            ranked = ranked / ranked.sum(-1, keepdim=True)
            beyond = ranked.cumsum(-1) - ranked >= top_p  # the mass before this token already suffices
            p = p.masked_fill(beyond.scatter(-1, order, beyond), 0)
        cdf = p.cumsum(-1)  # (B, V)
        u = u.to(cdf.dtype).clamp(max=1 - torch.finfo(cdf.dtype).eps / 2)  # rounding must not make a 1 of it
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]  # never one with p = 0
        token = token.clamp(max=cdf.shape[-1] - 1)  # only non-finite logits get here
    return token, logp.gather(-1, token[:, None])[:, 0]


@torch.no_grad()
def generate(model, tokenizer, prompts, samples=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0,
             latent="projector", generator=None, rows=512, stats=None, tag=None, start=0, leave=None, feed=None):
    """The mixed decoding loop: every row either samples a token or runs a latent step, all in one batch.

    prompts: texts or lists of token ids. samples: rollouts per prompt; they come back grouped by prompt, in order.
    max_new_tokens: slots per rollout, latents included. temperature 0 is greedy. Nothing is read from a generation_config
    but the stop ids. latent: see latent_step; "none" leaves tags as plain text. generator: a CPU torch.Generator.
    tag: None (a tag runs as many latents as it says), a number K (K latents, whatever it says), or "forbidden" (none can be started).
    rows: most rows decoded at once (but at least one whole group); a prompt that waits begins when so many rows have ended that its own find
    room. stats: a dict that receives `forwards`, the number of positions computed.
    What other methods do differently (baselines.py): every row begins with `start` latents; leave(h (n, D), drawn (n,), rows, taken) -> (n,)
    token that ends a row's block here, or LATENT: go on (drawn: what the LM head would say; rows: numbers of
    rollouts); feed(h, token) -> (n, D) fed for a sampled token.
    Raises UserError for an empty prompt or one that does not fit the model's positions.
    """
    if samples < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UserError("generate needs samples and max_new_tokens of 1 or more, temperature and top_k of 0 or more, 0 < top_p <= 1")
    ids = [encode_prompt(model, tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    check_lengths(model, ids, max_new_tokens)
    # One uniform number per row and step, drawn up front: a rollout's text depends on its seed and its own prompt only,
    # not on which rows share its batch or when they end.
    draws = torch.rand(len(ids) * samples, max_new_tokens, generator=generator, dtype=torch.float64)
    if not ids:
        return []
    return _decode(model, tokenizer, ids, samples, max_new_tokens, (temperature, top_k, top_p), latent, draws, max(1, rows // samples), stats, tag,
                   start, leave, feed)


@computes
def _decode(model, tokenizer, prompts, samples, steps, sampling, latent, draws, most, stats, tag, start, leave, feed):
    """generate for token ids. draws (all rollouts, steps); most: prompts decoded at once, each with all its rows."""
    device, embed = model.device, model.get_input_embeddings()
    feed = feed or (lambda h, token: embed(token))
    stop_ids, watch, most = stop_tokens(model, tokenizer), watcher(model, tokenizer), min(most, len(prompts))
    stop, rollouts = torch.tensor(stop_ids, device=device), [None] * len(draws)
    begun, joined, over, computed = 0, 0, False, 0  # prompts that have begun, the step in which the last of them did; positions computed

    def draw(h, u, state):
        logits = model.lm_head(h)
        if tag == "forbidden":  # a control: other tokens keep their odds among each other
            logits = logits.masked_fill(watch.starts[watch.classes, state[:, None]], -torch.inf)
        return sample(logits, u, *sampling)

    def begin(n, latents=0):
        """The next n prompts -> (a cache that has read them, all that is known of their rows, (B, ..) each)."""
        cache, h, _ = prefill(model, prompts[begun : begun + n])  # the prompt of a group is read once
        cache.owner = torch.arange(n, device=device).repeat_interleave(samples)  # (B,)
        number, zero = torch.arange(begun * samples, (begun + n) * samples), torch.zeros_like(cache.owner)  # (B,)
        return cache, types.SimpleNamespace(
            number=number.to(device),  # which rollout a row becomes
            u=draws[number].to(device),  # (B, steps)
            h=h[cache.owner],  # (B, D) the output at the last slot
            state=zero,  # where the tag watcher stands
            left=zero + start,  # latent steps still to run: > 0 means inside a block
            taken=zero,  # latent steps run so far
            age=zero,  # slots so far
            prompt=cache.lengths[cache.owner],  # tokens of the prompt
            live=zero == 0,
            # The record. The last column takes what is not meant: of rows beyond the limit; of vectors, those of rows outside a block.
            slots=torch.full((len(zero), steps + 1), LATENT, device=device),
            logps=torch.zeros(len(zero), steps + 1, dtype=torch.promote_types(h.dtype, torch.float32), device=device),
            length=zero + steps,  # the limit, unless the row stops before
            vectors=h.new_zeros(len(zero), latents + 1, h.shape[1]))  # (B, latents + 1, D), grows as needed

    def finish(rows):
        """What was recorded of rows (n,) becomes rollouts."""
        plain, tensors = (r.number, r.length, r.slots), (r.logps, r.vectors)
        for i, length, slots, logps, vectors in zip(*(t[rows].tolist() for t in plain), *(t[rows].cpu() for t in tensors)):
            slots, prompt = slots[:length], i // samples
            finished = slots[-1] in stop_ids
            words = [s for s in slots if s != LATENT][: -1 if finished else None]
            rollouts[i] = Rollout(prompts[prompt], slots, vectors[: slots.count(LATENT)].clone(), logps[:length].clone(),
                                  tokenizer.decode(words, clean_up_tokenization_spaces=False), finished, prompt)

    cache, r = begin(most)
    cache.assign(cache.owner, room=steps)
    begun = most
    for t in itertools.count():
        # (a) Every few steps, the one look at the device from outside: who has ended, who may run a latent before the next look?
        if t % LOOK == 0 or cache.filled == steps or over:
            live, rows = r.live.nonzero()[:, 0], len(r.live)  # (n,)
            busy, read = -(-len(live) // samples), len(cache.owner[live].unique())  # groups' worth of rows, and prompts, that are still needed
            free = min(len(prompts) - begun, most - busy, 2 * most - read)  # prompts that may begin; in memory are twice `most` at most
            join = free > 0 and (free * samples >= 0.25 * rows or not len(live))  # not for each row: memory is copied
            if not len(live) and not join:
                break
            if join or len(live) <= 0.75 * rows or cache.filled == steps:
                finish((~r.live).nonzero()[:, 0])
                known, more = {k: v[live] for k, v in vars(r).items()}, None
                if join:
                    more, new = begin(free, r.vectors.shape[1] - 1)
                    known = {k: torch.cat([v, vars(new)[k]]) for k, v in known.items()}
                    begun, joined = begun + free, t
                cache.change(live, more)
                r = types.SimpleNamespace(**known)
            short = int(r.taken.max()) + LOOK + 1 - r.vectors.shape[1]
            if short > 0:
                r.vectors = F.pad(r.vectors, (0, 0, 0, short + 8))
            near = ((r.left > 0) | watch.soon[r.state]).nonzero()[:, 0]  # (n,)
        # (b) A token for every row, and an embedding from the projector for those inside a block. On a CPU just the rows that need it; on
        #     CUDA choosing them would wait for the device, so all draw, and P runs on those that could be inside since the last look.
        inside, u = r.left > 0, r.u.gather(1, r.age.clamp(max=steps - 1)[:, None])[:, 0]  # (B,)
        outside = everyone = torch.arange(len(r.left), device=device)
        if leave is not None:
            near = everyone
        elif device.type not in WAITS:
            outside, near = (~inside).nonzero()[:, 0], inside.nonzero()[:, 0]
        token, logp = torch.full_like(r.left, LATENT), torch.zeros_like(r.logps[:, 0])  # (B,)
        if len(outside):
            token[outside], logp[outside] = draw(r.h[outside], u[outside], r.state[outside])
        if leave is not None:
            word = leave(r.h, token, r.number, r.taken)
            token = torch.where(inside, word, token)
            inside = inside & (word == LATENT)
        token, logp = torch.where(inside, LATENT, token), torch.where(inside, 0.0, logp)
        x = feed(r.h, token.clamp(min=0))  # (B, D)
        if len(near):
            own = r.u[near, 0] * 1e6 % 1  # tells the rows apart, see latent_step; scrambled, since u itself draws the first token
            z = latent_step(model, r.h[near], latent, own, r.taken[near])  # (n, D)
            x[near] = torch.where(inside[near, None], z, x[near])
            r.vectors[near, torch.where(inside[near], r.taken[near], r.vectors.shape[1] - 1)] = z
        # (c) Write it down. The watcher reads the sampled tokens: a tag that ends here opens a block of n latent steps.
        at = r.age.clamp(max=steps)[:, None]
        r.slots.scatter_(1, at, token[:, None])
        r.logps.scatter_(1, at, logp[:, None])
        state, n = watch.step(r.state, token.clamp(min=0))
        n = n if tag in (None, "forbidden") else (n > 0) * tag
        r.left = torch.where(inside, r.left - 1, n if latent != "none" else 0)
        r.taken, r.state = r.taken + inside, torch.where(inside, r.state, state)
        # (d) A stop token ends a row (it is its last slot); so does the length limit, inside a block too.
        stops = r.live & ~inside & torch.isin(token, stop)
        r.length = torch.where(stops, r.age + 1, r.length)
        r.live = r.live & ~stops & (r.age + 1 < steps)
        over = t + 1 == joined + steps  # those that began last are at the limit: no row is left
        if over:
            continue
        # (e) One forward of one slot for all rows.
        r.h = decode_slot(model, x, r.prompt + r.age, cache)  # (B, D)
        r.age = r.age + 1
        cache.filled += 1
        computed += len(r.left)
    finish(torch.arange(len(r.live), device=device))
    if stats is not None:
        stats["forwards"] = stats.get("forwards", 0) + computed + sum(len(p) for p in prompts)
    return rollouts


# ============================================================================ scoring (paper Sec. 3.4)
def _layout(rollouts):
    """Rollouts, each prompt once: (prompts, owner (B,), order), `order` listing the rollouts by prompt."""
    number, owner = {}, []
    for r in rollouts:
        owner.append(number.setdefault(tuple(r.prompt_ids), len(number)))
    order = sorted(range(len(rollouts)), key=owner.__getitem__)
    return [list(p) for p in number], torch.tensor(sorted(owner)), order


def _slot_table(rollouts, device):
    """slots (B, S) padded with LATENT, valid (B, S), scored (B, S): valid and sampled by the policy."""
    S = max(len(r.slots) for r in rollouts)
    slots = torch.tensor([r.slots + [LATENT] * (S - len(r.slots)) for r in rollouts], device=device)
    valid = torch.arange(S, device=device) < torch.tensor([[len(r.slots)] for r in rollouts], device=device)
    return slots, valid, valid & (slots != LATENT)


@computes
def states(model, rollouts):
    """The same slots, teacher-forced in one batched forward, latents as given constants (paper Sec. 3.4).

    -> (h (B, S, D), slots (B, S), valid (B, S)): h[b, s] is the output that predicts slot s. Gradients reach the base, also
    through its attention over the latents' keys and values; never the projector.
    """
    prompts, owner, order = _layout(rollouts)
    rows, device = [rollouts[i] for i in order], model.device
    slots, valid, _ = _slot_table(rows, device)
    cache, h_prompt, x = prefill(model, prompts, slots.clamp(min=0))  # each prompt once, with its graph: the rows' gradients meet in it
    cache.assign(owner.to(device))
    latents = torch.cat([r.latents.detach() for r in rows]).to(device, x.dtype)  # (all latents, D), row by row
    x = x.masked_scatter(((slots == LATENT) & valid)[..., None], latents)
    cache.begin(valid)
    h = forward(model, x, cache.lengths[cache.owner, None] + torch.arange(slots.shape[1], device=device), cache)
    h = torch.cat([h_prompt[cache.owner, None], h[:, :-1]], 1)  # (B, S, D)
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)
    return h[back], slots[back], valid[back]


@computes
def logprobs(model, rollouts, temperature=1.0):
    """-> (logp (B, S), scored (B, S)): log-probs of the sampled tokens, 0 where nothing was sampled; gradients as in `states`.

    Use the temperature that the rollouts were sampled with. Differs from the released code: that one has no gradient into
    the input embeddings.
    """
    h, slots, valid = states(model, rollouts)
    scored = valid & (slots != LATENT)
    logp = torch.zeros(slots.shape, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    return logp.masked_scatter(scored, token_logprobs(model, h[scored], slots[scored], temperature).to(logp.dtype)), scored


# ============================================================================ the latent roll-out with gradient (Sec. 3.3)
@computes
def unroll(model, rollouts, latent="projector"):
    """Runs the latent steps of given slots anew: full back-propagation through all steps of all tags, cached and exact.

    Rows have their tags at different places, so the batch advances in rounds: every row's text up to its next block in one
    forward, then the block's latents one position at a time (rows with fewer are padded and masked), but for each block's last:
    nothing waits for its output, so it goes with the text after it. A latent costs one position, not one prefix as in the
    released code, and gradients run through the cache: nothing is detached.

    -> (h (B, S, D), latents, a list of (n, D) per row): h[b, s] is the output that predicts slot s. With the base frozen
    the prompts' part carries no graph. Call under torch.no_grad() to only recompute the latents.
    """
    prompts, owner, order = _layout(rollouts)
    rows, device = [rollouts[i] for i in order], model.device
    slots, valid, _ = _slot_table(rows, device)
    B, S = slots.shape
    cache, h_prompt, embeddings = prefill(model, prompts, slots.clamp(min=0))
    cache.assign(owner.to(device))
    base = cache.lengths[cache.owner, None]  # (B, 1)
    h_last = h_prompt[cache.owner]  # (B, D): the output at each row's last slot so far
    at = [0] * B  # next slot of each row
    outputs, where = [h_last[:, None]], torch.zeros(B, S, dtype=torch.long)  # where[b, s]: column of the output for slot s
    columns, made = 1, []

    def piece(x, starts, counts):
        """Feeds x (B, n, D): counts[b] slots of row b from slot starts[b]; the rest of the row is padding."""
        nonlocal h_last, columns
        n = x.shape[1]
        steps = torch.arange(n, device=device)
        real = steps < torch.tensor(counts, device=device)[:, None]  # (B, n)
        cache.begin(real)
        h = forward(model, x, base + torch.tensor(starts, device=device)[:, None] + steps, cache)  # (B, n, D)
        for b, (s, c) in enumerate(zip(starts, counts)):
            where[b, s + 1 : s + c + 1] = torch.arange(columns, columns + c)[: max(0, S - s - 1)]
        outputs.append(h)
        columns += n
        last = h[torch.arange(B, device=device), (real.sum(1) - 1).clamp(min=0)]
        h_last = torch.where(real.any(1)[:, None], last, h_last)

    def run(start, row, latents):
        """How many of a row's slots from `start` on are latents (True), or are not (False)."""
        return next((i for i in range(start, len(row.slots)) if (row.slots[i] == LATENT) != latents), len(row.slots)) - start

    z, waiting = h_last, [0] * B  # waiting[b] = 1: z[b] is the last latent of the row's block, not fed yet
    while any(a < len(r.slots) for a, r in zip(at, rows)):
        # what waits, and the text up to the next block
        counts = [w + run(a + w, r, False) for a, w, r in zip(at, waiting, rows)]
        if max(counts):
            index = torch.tensor(at, device=device)[:, None] + torch.arange(max(counts), device=device)  # (B, n)
            x = embeddings.gather(1, index.clamp(max=S - 1)[..., None].expand(-1, -1, embeddings.shape[2]))  # (B, n, D)
            first = torch.where(torch.tensor(waiting, device=device)[:, None] > 0, z, x[:, 0])  # (B, D)
            piece(torch.cat([first[:, None], x[:, 1:]], 1), at, counts)
            at = [a + c for a, c in zip(at, counts)]
        # the block
        blocks = [run(a, r, True) for a, r in zip(at, rows)]
        for k in range(max(blocks)):
            z = latent_step(model, h_last, latent)  # z_{k+1} = P(h_k), for rows that are through, z_n again
            inside = [int(k < n - 1) for n in blocks]
            if k < max(blocks) - 1:
                made.append((z, inside))
                piece(z[:, None], at, inside)
                at = [a + i for a, i in zip(at, inside)]
        waiting = [int(n > 0) for n in blocks]
        made.append((z, waiting))
    h = torch.cat(outputs, 1)  # (B, columns, D)
    h = h.gather(1, where.to(device)[..., None].expand(-1, -1, h.shape[2]))  # (B, S, D)
    latents = [[z[b] for z, inside in made if inside[b]] for b in range(B)]
    latents = [torch.stack(zs) if zs else h.new_zeros(0, h.shape[2]) for zs in latents]
    back = sorted(range(B), key=order.__getitem__)
    return h[torch.tensor(back, device=device)], [latents[i] for i in back]


@torch.no_grad()
def recompute_latents(model, rollouts):
    """The rollouts with their latents made by the current weights (the released code does this before every scoring)."""
    return [dataclasses.replace(r, latents=z) for r, z in zip(rollouts, unroll(model, rollouts)[1])]


def projector_loss(model, traces, latent="projector"):
    """Paper Sec. 3.3: cross-entropy on the text after the FIRST tag, later tags, answer and stop token included.

    traces: Rollouts whose latents are made here. -> (sum of the losses, number of scored tokens); their quotient over
    several calls does not depend on how traces are batched. latent="none" scores the same tokens with no latents at all.
    """
    start = [r.slots.index(LATENT) if LATENT in r.slots else len(r.slots) for r in traces]
    if latent == "none":
        traces = [dataclasses.replace(r, slots=[s for s in r.slots if s != LATENT]) for r in traces]
    h, _ = unroll(model, traces, latent)
    slots, _, scored = _slot_table(traces, model.device)
    scored &= torch.arange(slots.shape[1], device=model.device) >= torch.tensor(start, device=model.device)[:, None]
    return -token_logprobs(model, h[scored], slots[scored]).sum(), int(scored.sum())


# ============================================================================ GRPO (paper Sec. 3.4; DeepSeekMath)
def group_advantages(rewards, eps=1e-4):
    """rewards (P, G) -> (r - mean) / (std + eps) within each group, (P, G); 0 where a group's rewards are all equal.

    eps: ours; the released 1e-9 turns rounding noise between equal real-valued rewards into full-size advantages.
    """
    mean = rewards.mean(1, keepdim=True)
    std = ((rewards - mean).square().sum(1, keepdim=True) / max(1, rewards.shape[1] - 1)).sqrt()
    return torch.where(rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True), (rewards - mean) / (std + eps), 0.0)


def policy_loss(logp, old_logp, advantages, scored, n_rollouts, clip=0.2):
    """DeepSeekMath Eq. 3 without KL: mean over rollouts of the mean over their sampled tokens of the clipped objective.

    logp, old_logp, scored (B, S), advantages (B,). n_rollouts: of the whole update, not of this micro-batch; each
    rollout is divided by its own token count. Both are known before the first micro-batch, so gradients summed over
    micro-batches of any size are the same. -> (loss, ratio (B, S), 1 where nothing was sampled).
    """
    ratio = torch.where(scored, logp - old_logp, 0.0).exp()  # (B, S)
    a = advantages[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)  # (B, S)
    per_rollout = (gain * scored).sum(1) / scored.sum(1).clamp(min=1)  # (B,)
    return -per_rollout.sum() / n_rollouts, ratio
