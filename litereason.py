"""LiteReason (arXiv 2512.02240): the whole method in one file, from its definition to its losses.

A policy LM may write <implicit_thought>N</implicit_thought>. The next N positions are then not sampled: the
Reasoning Projector P maps the last hidden state to the next input embedding, N times, and sampling continues
(paper Sec. 3):

    h_0 = LM(context)[-1]              the state that the LM head reads, at the last token of the closing tag
    z_1 = P(h_0),  z_{k+1} = P(h_k)    h_k = LM(context, z_1 .. z_k)[-1]
    next token ~ softmax(W_head h_N)   z_N is read by the model; the token after the block is predicted there

One representation, one rule. A trajectory is a prompt and a list of SLOTS, each a token id or LATENT, plus
the latent vectors. The output at slot t is scored iff slot t+1 is a token that the policy sampled:

    slots        a    <..>   3   </..>  LATENT LATENT LATENT   b    .   EOS
    fed as      E[a]  E[..] E[3] E[..]   z_1    z_2    z_3    E[b] E[.]
    predicted   the first token by the prompt's last output, each other one by the output of the slot before
                it, so `b` by that of z_3. Nothing predicts a LATENT: the outputs at </..>, z_1 and z_2 go to
                the projector, not to the LM head.

Letters in the shape comments (there P is a number):
    P prompts   B rows (rollouts)   G rows of one prompt   L prompt length   S own slots of a row
    D hidden size   V vocabulary   M scored positions   n any other count, named where it stands

The definition comes first, as slowly as possible; then the tag, the projector, decoding, scoring, the latent
roll-out and its loss, GRPO. lib/ serves speed, memory and files. "As released" means the authors' code.
"""
import copy
import dataclasses
import re

import torch
import transformers

from lib import UserError, checkpoint, decoder, kv_cache, memory, scoring
from lib.checkpoint import save  # noqa: F401  (model, tokenizer, path): belongs to this file's interface

LATENT = -1  # the slot value of a latent position
CAP, PROJECTOR_LAYERS = 5, 3  # the most latents of a tag, MLPs of a projector; a checkpoint carries its own


# ============================================================ the definition
# One row, no cache, no batch: for every slot the whole prefix goes through the model again. The tests hold
# all that follows against naive_generate and naive_score (tests/test_decode.py, tests/test_train.py).
@dataclasses.dataclass
class Rollout:
    """One trajectory. Scores, masks and losses are made from this record, never from its text."""
    prompt_ids: list  # token ids
    slots: list  # token ids and LATENTs, in order, the stop token included
    latents: torch.Tensor  # (n, D), one per LATENT slot, as fed
    logprobs: torch.Tensor = None  # (len(slots),) of the sampled tokens, before top-k and top-p; 0 at latents
    text: str = ""  # what the policy wrote, without the stop token
    finished: bool = True  # it ended with a stop token, not at the length limit
    prompt: int = 0  # which of generate's prompts

    @property
    def n_latents(self):
        return self.slots.count(LATENT)

    @property
    def n_tokens(self):
        return len(self.slots) - self.n_latents

    @property
    def n_tags(self):  # blocks of LATENTs
        return sum(slot == LATENT and last != LATENT for slot, last in zip(self.slots, [None] + self.slots))


@torch.no_grad()
def naive_generate(model, tokenizer, prompt_ids, draws, temperature=1.0, top_p=1.0, top_k=0):
    """Decodes one row (Sec. 3.1) -> Rollout.

    draws (limit,): a random number in [0, 1) for each slot; with the last one the row is cut."""
    embed = model.get_input_embeddings()
    fed = list(embed(torch.tensor(prompt_ids, device=model.device)))  # the inputs so far, (D,) each
    slots, logps, latents = [], [], []
    written = ""
    latents_left = 0
    finished = False
    for u in draws.to(model.device):
        h = _last_state(model, fed)  # (1, D)
        if latents_left > 0:  # inside a block: no token is sampled, the next input is z = P(h)
            z = model.reasoning_projector(h)
            slots.append(LATENT)
            logps.append(h.new_zeros(1))
            latents.append(z)
            fed.append(z[0])
            latents_left -= 1
            continue
        token, logp = sample(model.lm_head(h), u[None], temperature, top_k, top_p)
        slots.append(int(token))
        logps.append(logp)
        fed.append(embed(token)[0])
        finished = int(token) in checkpoint.stop_tokens(model, tokenizer)
        if finished:
            break
        n_tags = len(parse_tags(written))
        written = tokenizer.decode([s for s in slots if s != LATENT], clean_up_tokenization_spaces=False)
        tags = parse_tags(written, model.config.litereason_max_reasoning_steps)
        if len(tags) > n_tags:  # this token has ended one more tag: its N latents follow
            latents_left = tags[-1][2]
    latents = torch.cat(latents + [fed[0].new_zeros(0, len(fed[0]))]).cpu()
    return Rollout(list(prompt_ids), slots, latents, torch.cat(logps).cpu(), written, finished)


def naive_score(model, prompt_ids, slots):
    """Scores given slots (Sec. 3.4), their latents made again; differentiable.

    -> (h (S, D), the states that predict each slot, latents (n, D), log-probs (S,), 0 at latents)"""
    embed = model.get_input_embeddings()
    fed = list(embed(torch.tensor(prompt_ids, device=model.device)))  # not embed.weight: Gemma scales it
    hs, logps = [], []
    latents = [fed[0].new_zeros(0, len(fed[0]))]
    for slot in slots:
        h = _last_state(model, fed)  # (1, D)
        hs.append(h)
        if slot == LATENT:
            z = model.reasoning_projector(h)
            latents.append(z)
            logps.append(h.new_zeros(()))
            fed.append(z[0])
        else:
            logps.append(model.lm_head(h[0]).log_softmax(-1)[slot])
            fed.append(embed(torch.tensor(slot, device=model.device)))
    return torch.cat(hs), torch.cat(latents), torch.stack(logps)


def _last_state(model, fed):
    """h (1, D): what the LM head reads after the inputs `fed`, (D,) each."""
    out = model.model(inputs_embeds=torch.stack(fed)[None], use_cache=False)
    return out.last_hidden_state[:, -1]


# ============================================================ the tag (paper Sec. 3.1)
# Plain text, no new vocabulary. N is a number of ASCII digits, 1 or more, with ASCII whitespace around it or
# not. Anything else between the tags is ordinary text, and so is a tag opened right inside another. Ours:
# only tags in the policy's own output run. As released, training also runs tags that stand in the prompt.
OPEN, CLOSE = "<implicit_thought>", "</implicit_thought>"
TAG = re.compile(rf"((?:{OPEN}\s*(?:[0-9]+\s*)?)*){OPEN}\s*([0-9]+)\s*{CLOSE}", re.ASCII)
SPACE, DIGITS = " \t\n\r\f\v", "0123456789"


def parse_tags(text, cap=CAP):
    """The valid tags of a text -> [(start, end, n)] in characters, n in 1..cap. Decoding uses `watcher`."""
    tags = []
    for match in TAG.finditer(text):
        is_nested = match.group(1) != ""
        digits = match.group(2).lstrip("0")[:9]  # nine are above any cap; int() refuses thousands
        if digits and not is_nested:  # N >= 1
            tags.append((match.start(), match.end(), min(int(digits), cap)))
    return tags


def _read_char(state, char, cap):
    """TAG as an automaton: one step -> (state, N if a tag has just ended, else 0).

    States: ("open", j, nested)  j characters of OPEN have been read; nested: inside another tag
            ("number", n, part)  after OPEN; n = -1 if nested; part 0, 1, 2: before, in, after the digits
            ("close", n, j)      j characters of CLOSE have been read"""
    kind, a, b = state
    if kind == "open" and char == OPEN[a]:
        is_read = a + 1 == len(OPEN)
        return ("number", -1 if b else 0, 0) if is_read else ("open", a + 1, b), 0
    if kind == "number":
        if char in DIGITS and b < 2:
            return ("number", a if a < 0 else min(10 * a + int(char), cap), 1), 0
        if char in SPACE:
            return ("number", a, 0 if b == 0 else 2), 0
        if char == "<":
            return ("close", a, 1), 0
    if kind == "close":
        if char == CLOSE[b]:
            is_read = b + 1 == len(CLOSE)
            return (("open", 0, False), max(a, 0)) if is_read else (("close", a, b + 1), 0)
        if b == 1 and char == OPEN[1]:
            return ("open", 2, True), 0
    # No match. "<" stands only at the start of OPEN and CLOSE, so only it can begin a new tag.
    return ("open", int(char == "<"), False), 0


def tag_table(tokenizer, cap, vocab_size, device):
    """The automaton as a decoder.TagFSM over the ids of a vocabulary.

    BPE may merge neighbours into the tag's ends (`.<`, `>\\n`): the merged token ends the tag."""
    alphabet = sorted(set(OPEN + CLOSE + SPACE + DIGITS))
    return decoder.TagFSM(
        read_char=lambda state, char: _read_char(state, char, cap),
        start=("open", 0, False),
        alphabet=alphabet,
        has_begun=lambda state: state[0] != "open" or state[1] > 2,  # "<i" is in any text: <i> is italics
        only_resets=re.compile("[^" + re.escape("".join(alphabet)) + "][^<>]*"),
        texts=checkpoint.token_texts(tokenizer)[:vocab_size],
        vocab_size=vocab_size,
        device=device)


def watcher(model, tokenizer):
    """The model's tag table, built once per tokenizer, cap and device."""
    key = (model.config.litereason_max_reasoning_steps, model.config.vocab_size, str(model.device))
    made = tokenizer.__dict__.setdefault("_litereason_watchers", {})
    if key not in made:
        made[key] = tag_table(tokenizer, *key)
    return made[key]


def insert_latents(model, tokenizer, ids):
    """Token ids of a finished trace -> slots: after each tag its LATENTs, as in decoding."""
    classes, next_state, fires = watcher(model, tokenizer).as_lists
    state, slots = 0, []
    for token in ids:
        kind = classes[token]
        slots += [token] + [LATENT] * fires[kind][state]
        state = next_state[kind][state]
    return slots


# ============================================================ the Reasoning Projector (paper Sec. 3.2)
# To add a latent step of your own, write a class like these and name it in PROJECTORS: start(model, layers)
# makes the module that stage 2 begins with, forward(h) -> z.
class ReasoningProjector(torch.nn.ModuleList):
    """P(h) = MLP_3(MLP_2(MLP_1(h))): last hidden state (.., D) -> next input embedding (.., D).

    No residual and no norm between the layers; its output is inserted raw as an input embedding. Kept in fp32
    whatever the base's dtype (ours: the released code trains it in bf16, where steps of 1e-4 round away)."""

    @classmethod
    def start(cls, model, layers=PROJECTOR_LAYERS):
        """The warm start: `layers` independent copies of the last block's MLP."""
        mlp = model.model.layers[-1].mlp
        copies = [copy.deepcopy(mlp) for _ in range(layers)]
        return cls(copies).to(model.device, projector_dtype(model))

    def forward(self, h):
        z = h.to(next(self.parameters()).dtype)
        for mlp in self:
            z = mlp(z)
        return z.to(h.dtype)


class NormedProjector(ReasoningProjector):
    """Ours, what a real model begins with: the same copies, a norm behind each, an output as long as an
    embedding. The MLPs are quadratic in their input: with SmolLM2's weights three in a row make latents
    that are 0 or not finite (results/starts.py)."""

    def __init__(self, mlps=(), size=1.0):
        super().__init__(mlps)
        self.size = torch.nn.Parameter(torch.tensor(float(size)))  # of a latent, root mean square

    @classmethod
    def start(cls, model, layers=PROJECTOR_LAYERS):
        size = embedding_size(model) / model.config.hidden_size**0.5
        return cls(ReasoningProjector.start(model, layers), size).to(model.device, projector_dtype(model))

    def forward(self, h):
        z = h.to(self.size.dtype)
        for mlp in self:
            z = mlp(z)
            z = z * (z.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
        return (self.size * z).to(h.dtype)


class PauseToken(torch.nn.Module):
    """A control: one learned vector (D,), fed at every latent, whatever h is. It starts as the mean word."""

    def __init__(self, vector):
        super().__init__()
        self.vector = torch.nn.Parameter(vector)

    @classmethod
    def start(cls, model, layers=None):
        return cls(word_embeddings(model).to(projector_dtype(model)).mean(0))

    def forward(self, h):
        return self.vector.to(h.dtype).expand_as(h)


# A checkpoint names its own in config.litereason_projector.
PROJECTORS = {"mlp": ReasoningProjector, "normed": NormedProjector, "pause": PauseToken}


@torch.no_grad()
def word_embeddings(model, most=None):
    """The embeddings of all words, or of the first `most`, as they are fed (V, D): Gemma scales them."""
    embed = model.get_input_embeddings()
    return embed(torch.arange(embed.num_embeddings, device=model.device)[:most])


def embedding_size(model):
    """The median norm of an embedding."""
    return float(word_embeddings(model, 10_000).norm(dim=-1).median())


def z_size(model, latents):
    """The median norm of latents (n, D), in sizes of an embedding; nan if not finite, None without any."""
    if len(latents):
        return float((latents.float().norm(dim=-1).double() / embedding_size(model)).median())


def projector_dtype(model):
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def start_projector(model, name):
    """Replaces model.reasoning_projector by an untrained one.

    name: one of PROJECTORS, or "random": the present one's layers with random weights (a control)."""
    if name == "random":
        for module in model.reasoning_projector.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return
    layers = model.config.litereason_num_reasoning_layers
    model.reasoning_projector = PROJECTORS[name].start(model, layers).to(model.device)
    model.config.litereason_projector = name


def latent_step(model, h, latent="projector", *row_info):
    """The next input embedding z (n, D) from the last hidden state h (n, D).

    latent: "projector" (the method), another module in its place, "zeros" (a control), or any function
    h, *row_info -> z. row_info is given while decoding: u (n,), a random number in [0, 1) of each row's own,
    and k (n,), how many latents the row has run before; neither depends on the other rows."""
    if latent == "projector":
        latent = model.reasoning_projector
    if isinstance(latent, torch.nn.Module):
        with torch.autocast(h.device.type, enabled=False):  # in the projector's own precision
            return latent(h)
    if latent in ("zeros", "none"):  # "none" opens no block, but on CUDA other rows are computed too
        return torch.zeros_like(h)
    return latent(h, *row_info)


# ============================================================ load and attach
def load(name_or_path, device=None, dtype=torch.float32):
    """-> (a causal LM with one more submodule, `reasoning_projector`, its tokenizer).

    name_or_path: "tiny" (shipped), a directory, a hub id, or a short name (Qwen2.5-1.5B). device: by default
    cuda if there is one. dtype: of the weights; on CUDA fp32 weights compute in bf16 (kv_cache.autocast). A
    checkpoint without projector weights gets the start of its size and the default cap. Raises UserError, in
    one line, if the model is not there, cannot be fetched, or its files do not fit."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, weights = checkpoint.read_checkpoint(name_or_path, dtype)
    model = attach(model.to(device), weights, tokenizer)
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"cannot load the model in {name_or_path!r}: {name} holds NaN or inf")
        p.data = p.data.clone()  # in aligned memory: on a file's bytes, products round in another way
    return model, tokenizer


def attach(model, weights=None, tokenizer=None):
    """Adds the projector (from `weights`, else its start), its config entries and our attention to a causal
    LM. tokenizer: of its ids those that are no word are never sampled."""
    cap, layers = checkpoint.check_model(model, CAP, PROJECTOR_LAYERS)
    # The released code's checkpoints name none. Without weights it is the start of the model's size.
    unnamed = "mlp" if weights or checkpoint.is_small(model) else "normed"
    kind = getattr(model.config, "litereason_projector", unnamed)
    if kind not in list(PROJECTORS):
        raise UserError(f"config.json: litereason_projector is {kind!r}, not one of {', '.join(PROJECTORS)}")
    config = model.config
    config.is_litereason_model = True  # the released code reads and writes these three entries
    config.litereason_num_reasoning_layers = layers
    config.litereason_max_reasoning_steps = cap
    start_projector(model, kind)
    # Of our own checkpoints, one that stage 2 has not made says so (checkpoint.save).
    model.projector_trained = bool(weights) and getattr(config, "litereason_projector_trained", True)
    if weights:
        try:
            model.reasoning_projector.load_state_dict(weights)
        except RuntimeError as e:
            why = str(e).splitlines()[1].strip()
            raise UserError(f"the checkpoint's reasoning_projector does not fit: {why}") from e
    model.generation_config = transformers.GenerationConfig(eos_token_id=checkpoint.stop_ids(model),
                                                            pad_token_id=config.pad_token_id)
    model.bf16 = model.device.type == "cuda" and model.dtype == torch.float32  # see kv_cache.autocast
    model.graphs = False  # see decoder.Decoder
    kv_cache.mask_no_words(model, checkpoint.no_words(model, tokenizer) if tokenizer else [])
    model.set_attn_implementation("litereason")  # for our caches; all else goes through sdpa
    return model.eval()  # no dropout anywhere: sampling and scoring must see the same network


# ============================================================ the mixed decoding loop (paper Sec. 3.1)
def sample(logits, u, temperature, top_k, top_p):
    """One token per row, by inverting the cumulative distribution at u: independent of the other rows.

    logits (B, V), u (B,) in [0, 1) -> tokens (B,), log-probs (B,) under softmax(logits / temperature). top-k
    and top-p cut the distribution that is drawn from, not the log-prob: train with them off."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    scaled = logits if temperature in (0, 1) else logits / temperature
    logp = scaled.log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logp.gather(-1, token[:, None])[:, 0]
    p = logp.exp()
    cuts = 0 < top_k < p.shape[-1]
    if cuts or top_p < 1:
        ranked, order = p.topk(top_k) if cuts else p.sort(descending=True)  # top-k first: far less to sort
        if top_p < 1:
            share = ranked / ranked.sum(-1, keepdim=True)
            ranked = ranked.masked_fill(share.cumsum(-1) - share >= top_p, 0)  # by the mass before each
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    cdf = p.cumsum(-1)  # (B, V)
    u = u.to(cdf.dtype).clamp(max=1 - torch.finfo(cdf.dtype).eps / 2)  # rounding must not make it 1
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]  # never one with p = 0
    token = token.clamp(max=cdf.shape[-1] - 1)  # only non-finite logits get here
    return token, logp.gather(-1, token[:, None])[:, 0]


@torch.no_grad()
def generate(model, tokenizer, prompts, samples=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0,
             latent="projector", generator=None, gen_batch_size=None, stats=None, bar=None, tag=None,
             start=0, leave=None, feed=None):
    """The mixed decoding loop: in one batch every row samples a token or runs a latent step -> [Rollout].

    prompts         texts, or lists of token ids
    samples         rollouts per prompt; they come back grouped by prompt, in order
    max_new_tokens  slots per rollout, latents included
    temperature     0 is greedy. Of a generation_config only the stop ids are used
    latent          see latent_step; "none" leaves tags as plain text
    generator       a CPU torch.Generator
    gen_batch_size  most rows decoded at once, at least one whole group; changes no result. None: what fits
    stats           a dict to whose "positions" the number of positions computed is added
    bar             a tqdm bar, which moves by one for each rollout that ends
    tag             None: a tag runs as many latents as it says; K: every tag runs K; "forbidden": none begins
    For the other methods in results/baselines.py:
    start           latents that every row begins with
    leave           (h (n, D), tokens drawn (n,), latents run (n,)) -> (n,) tokens that end a row's block
                    here, or LATENT: continue
    feed            (h, token) -> (n, D), fed for a sampled token
    Raises UserError for an empty prompt or one that does not fit the model's positions."""
    ids = [checkpoint.encode_prompt(model, tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    checkpoint.check_lengths(model, ids, max_new_tokens)
    # All random numbers are drawn up front, one per row and slot: a rollout depends on its seed and prompt
    # only, not on which rows share its batch or when they end.
    draws = torch.rand(len(ids) * samples, max_new_tokens, generator=generator, dtype=torch.float64)
    if not ids:
        return []
    if gen_batch_size is None:
        gen_batch_size = memory.rows_that_fit(model, max(map(len, ids)), max_new_tokens, samples)

    def decode(rows):
        return _decode(model, tokenizer, ids, draws, samples, max(1, rows // samples),
                       (temperature, top_k, top_p), latent, bar, tag, start, leave, feed)

    rollouts, n_positions = decoder.once_more_in_halves(model, decode, max(1, gen_batch_size), least=samples)
    if stats is not None:
        stats["positions"] = stats.get("positions", 0) + n_positions
    return rollouts


@kv_cache.with_autocast
def _decode(model, tokenizer, prompts, draws, samples, max_prompts, sampling, latent, bar, tag, start, leave,
            feed):
    """generate, given token ids and random numbers (rollouts, limit) -> (rollouts, positions computed)."""
    watch = watcher(model, tokenizer)
    embed = model.get_input_embeddings()
    stop_ids = checkpoint.stop_tokens(model, tokenizer)
    stop = torch.tensor(stop_ids, device=model.device)
    limit = draws.shape[1]
    rollouts = [None] * len(draws)

    def new_rows(numbers, h, prompt_lengths):
        return _new_rows(draws[numbers], numbers, h, prompt_lengths, start)

    def finish(ended):
        for number, rollout in _recorded(decoding.rows, ended, prompts, samples, stop_ids, tokenizer):
            rollouts[number] = rollout
        if bar is not None:
            bar.update(len(ended))

    decoding = decoder.Decoder(model, prompts, samples, limit, max_prompts, new_rows, watch)
    while decoding.schedule(finish):  # rows that have ended leave, prompts that wait join
        r = decoding.rows  # one tensor per field, see _new_rows
        inside = r.latents_left > 0  # (B,) in a block: no token is sampled there
        # Rows (indices) for the LM head and for the projector; on CUDA some are computed for nothing.
        drawing, projecting = decoding.who(inside, everyone=leave is not None)

        # (1) Outside a block, sample a token.
        token = torch.full_like(r.latents_left, LATENT)  # (B,)
        logprob = torch.zeros_like(r.logprobs[:, 0])  # (B,)
        if len(drawing):
            logits = model.lm_head(r.h[drawing])  # (n, V)
            if tag == "forbidden":  # a control
                tag_state = r.tag_state[drawing, None]
                logits = logits.masked_fill(watch.starts[watch.classes, tag_state], -torch.inf)
            next_slot = r.n_slots.clamp(max=limit - 1)[:, None]
            u = r.u.gather(1, next_slot)[:, 0]  # (B,) each row's own random number
            token[drawing], logprob[drawing] = sample(logits, u[drawing], *sampling)
        if leave is not None:  # another method's rule for where a block ends
            ended_by = leave(r.h, token, r.latents_run)  # (B,) tokens, or LATENT: continue
            token = torch.where(inside, ended_by, token)
            inside = inside & (ended_by == LATENT)
        token = torch.where(inside, LATENT, token)
        logprob = torch.where(inside, 0.0, logprob)

        # (2) The next input: the token's embedding; inside a block z = P(h).
        token_or_0 = token.clamp(min=0)
        x = embed(token_or_0) if feed is None else feed(r.h, token_or_0)  # (B, D)
        if len(projecting):
            row_info = (r.own_number[projecting], r.latents_run[projecting])
            z = latent_step(model, r.h[projecting], latent, *row_info)
            x[projecting] = torch.where(inside[projecting, None], z, x[projecting])

        # (3) Record slot, log-prob and latent; the last column of each takes what is to be ignored.
        at = r.n_slots.clamp(max=limit)[:, None]
        r.slots.scatter_(1, at, token[:, None])
        r.logprobs.scatter_(1, at, logprob[:, None])
        if len(projecting):
            latent_at = torch.where(inside, r.latents_run, r.latents.shape[1] - 1)
            r.latents[projecting, latent_at[projecting]] = z

        # (4) A tag that ends with this token opens a block of n latents.
        tag_state, n = watch.step(r.tag_state, token_or_0)
        if isinstance(tag, int):
            n = (n > 0) * tag
        if latent == "none":
            n = torch.zeros_like(n)
        r.latents_left = torch.where(inside, r.latents_left - 1, n)
        r.latents_run = r.latents_run + inside
        r.tag_state = torch.where(inside, r.tag_state, tag_state)

        # (5) A stop token ends a row (it is its last slot); so does the length limit, inside a block too.
        stops = r.live & ~inside & torch.isin(token, stop)
        r.length = torch.where(stops, r.n_slots + 1, r.length)
        r.live = r.live & ~stops & (r.n_slots + 1 < limit)

        # (6) One forward pass, one slot per row.
        r.h = decoding.forward(x, r.prompt_length + r.n_slots)  # (B, D)
        r.n_slots = r.n_slots + 1
    return rollouts, decoding.n_positions


def _new_rows(u, numbers, h, prompt_lengths, start):
    """The fields of rows that begin: a dict of tensors with one entry per row.

    All but slots, logprobs and latents are replaced, not written into: several share one tensor of zeros."""
    device, limit = h.device, u.shape[1]
    rows = len(prompt_lengths)
    precise = torch.promote_types(h.dtype, torch.float32)
    zero = torch.zeros_like(prompt_lengths)  # (B,)
    u = u.to(device)
    return {
        "number": numbers.to(device),  # which rollout a row becomes
        "u": u,  # (B, limit) its random numbers, one per slot
        "own_number": u[:, 0] * 1e6 % 1,  # one more for latent_step, from later digits of the first
        "h": h,  # (B, D) the output at the last slot
        "tag_state": zero,  # where the tag's automaton stands
        "latents_left": zero + start,  # latent steps still to run: > 0 means inside a block
        "latents_run": zero,
        "n_slots": zero,  # slots so far
        "prompt_length": prompt_lengths,
        "live": zero == 0,
        "length": zero + limit,  # slots at its end
        # The record; the last column takes what is to be ignored. latents grows as needed.
        "slots": torch.full((rows, limit + 1), LATENT, device=device),
        "logprobs": torch.zeros(rows, limit + 1, dtype=precise, device=device),
        "latents": h.new_zeros(rows, 1, h.shape[1])}  # (B, most latents of a row + 1, D)


def _recorded(r, ended, prompts, samples, stop_ids, tokenizer):
    """The records of the rows `ended` (n,) -> [(number, Rollout)]."""
    numbers, lengths, all_slots = (t[ended].tolist() for t in (r.number, r.length, r.slots))
    logprobs, latents = r.logprobs[ended].cpu(), r.latents[ended].cpu()
    out = []
    for i, (number, length) in enumerate(zip(numbers, lengths)):
        slots = all_slots[i][:length]
        finished = slots[-1] in stop_ids
        tokens = [s for s in slots if s != LATENT]
        text = tokenizer.decode(tokens[:-1] if finished else tokens, clean_up_tokenization_spaces=False)
        own_latents = latents[i, : slots.count(LATENT)].clone()
        prompt = number // samples
        out.append((number, Rollout(prompts[prompt], slots, own_latents, logprobs[i, :length].clone(), text,
                                    finished, prompt)))
    return out


# ============================================================ scoring (paper Sec. 3.4)
@kv_cache.with_autocast
def states(model, rollouts):
    """The outputs h[b, s] that predict given slots s -> (h (B, S, D), slots (B, S), valid (B, S)).

    Latents are constants: gradients reach the base, also through its attention over the latents, never the
    projector."""
    batch = scoring.Batch(rollouts, model.device, padding=LATENT)
    x_prompts, x = kv_cache.embed(model, batch.prompts, batch.slots)  # (P, L, D), (B, S, D)
    latents = torch.cat([r.latents.detach() for r in batch.rows])  # (all latents, D), row by row
    is_latent = (batch.slots == LATENT) & batch.valid
    x = x.masked_scatter(is_latent[..., None], latents.to(model.device, x.dtype))
    # Each prompt is read once, with its graph: the gradients of its rows meet there.
    cache = kv_cache.WholeCache(model, batch)
    h_prompt, h = kv_cache.forward_whole(model, x_prompts, x, cache)  # (P, D), (B, S, D)
    h = torch.cat([h_prompt[batch.owner, None], h[:, :-1]], 1)  # the output at slot s - 1 predicts slot s
    return h[batch.back], batch.slots[batch.back], batch.valid[batch.back]


@kv_cache.with_autocast
def logprobs(model, rollouts, temperature=1.0):
    """The log-probs of sampled tokens -> (logp (B, S), 0 where there is none, scored (B, S)).

    Gradients as in `states`. Use the temperature that the rollouts were sampled with. Ours: gradients reach
    the input embeddings too; in the released code they do not, for rollouts with a tag."""
    h, slots, valid = states(model, rollouts)
    scored = valid & (slots != LATENT)
    logp = torch.zeros(slots.shape, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    of_tokens = scoring.token_logprobs(model, h[scored], slots[scored], temperature)  # (M,)
    return logp.masked_scatter(scored, of_tokens.to(logp.dtype)), scored


# ============================================================ the latent roll-out with gradient (Sec. 3.3)
@kv_cache.with_autocast
def unroll(model, rollouts, latent="projector"):
    """Runs the latent steps of given slots again -> (h as in `states`, [latents (n, D) of each row]).

    Gradients go back through all steps of all tags, and through the cache: nothing is detached. A latent
    costs one position; in the released code it costs a whole prefix."""
    batch = scoring.Batch(rollouts, model.device, padding=LATENT)
    plan, column = scoring.plan_rounds([[slot == LATENT for slot in r.slots] for r in batch.rows])
    prompts, h_prompt, embedded = kv_cache.prefill(model, batch.prompts, batch.slots)
    cache = kv_cache.ScoringCache(prompts, batch.owners)
    rows = torch.arange(len(batch.rows), device=model.device)
    last = h_prompt[batch.owner]  # (B, D): the output at each row's last slot so far
    z = last
    outputs = [last[:, None]]
    steps_made = []  # (z (B, D), which rows keep it)
    # The batch goes in rounds: a piece of text per row, then latent steps until the longest block is done. A
    # block's last latent is fed with the text after it ("carried"): no latent waits for its output.
    for piece in plan:
        starts = torch.tensor(piece.starts, device=model.device)[:, None]  # (B, 1)
        counts = torch.tensor(piece.counts, device=model.device)[:, None]  # (B, 1)
        offset = torch.arange(max(piece.counts), device=model.device)  # (n,)
        if piece.is_latent:
            # z_{k+1} = P(h_k). Of a row whose block is done, `last` has not moved: it makes its last z again.
            z = latent_step(model, last, latent)
            steps_made.append((z, piece.made))
            x = z[:, None]
        elif len(offset):
            index = (starts + offset).clamp(max=embedded.shape[1] - 1)[..., None]  # (B, n, 1)
            x = embedded.gather(1, index.expand(-1, -1, embedded.shape[2]))
            carried = torch.tensor(piece.carried, device=model.device)[:, None] > 0
            first = torch.where(carried, z, x[:, 0])
            x = torch.cat([first[:, None], x[:, 1:]], 1)  # (B, n, D)
        if not len(offset):
            continue
        cache.begin(piece.counts)
        h = kv_cache.forward(model, x, cache.start[:, None] + starts + offset, cache)  # (B, n, D)
        outputs.append(h)
        newest = h[rows, (counts[:, 0] - 1).clamp(min=0)]
        last = torch.where(counts > 0, newest, last)
    h = torch.cat(outputs, 1)  # (B, columns, D)
    index = column.to(model.device)[..., None].expand(-1, -1, h.shape[2])
    h = h.gather(1, index)  # (B, S, D)
    nothing = h.new_zeros(0, h.shape[2])
    latents = [torch.cat([nothing] + [z[row, None] for z, kept in steps_made if kept[row]])
               for row in batch.back.tolist()]
    return h[batch.back], latents


@torch.no_grad()
def recompute_latents(model, rollouts):
    """The rollouts with latents of the current weights; the released code does this before every scoring."""
    _, latents = unroll(model, rollouts)
    return [dataclasses.replace(r, latents=z) for r, z in zip(rollouts, latents)]


def without_latents(rollout):
    """The same text, its tags as text."""
    slots = [slot for slot in rollout.slots if slot != LATENT]
    return dataclasses.replace(rollout, slots=slots, latents=rollout.latents[:0])


def projector_loss(model, traces, latent="projector"):
    """Cross-entropy on the text after the FIRST tag, as released (Sec. 3.3): later tags, answer and stop
    token too. traces: Rollouts whose latents are made here -> (sum, number of scored tokens).

    latent="none" scores the same tokens without latents."""
    first = [r.slots.index(LATENT) if LATENT in r.slots else len(r.slots) for r in traces]
    if latent == "none":
        traces = [without_latents(r) for r in traces]
    h, _ = unroll(model, traces, latent)
    return text_loss(model, h, traces, first)


def text_loss(model, h, rollouts, first):
    """Cross-entropy on the text from slot first[b] on -> (sum, number of tokens). h: as in `states`."""
    slots, valid = scoring.slot_table(rollouts, model.device, padding=LATENT)
    number = torch.arange(slots.shape[1], device=model.device)
    scored = valid & (slots != LATENT) & (number >= torch.tensor(first, device=model.device)[:, None])
    logp = scoring.token_logprobs(model, h[scored], slots[scored])  # (M,)
    return -logp.sum(), len(logp)


# ============================================================ GRPO (paper Sec. 3.4; DeepSeekMath)
# An RL rule is a function and its name in RULES: (rewards (P, G), number of sampled tokens (P, G), length
# limit) -> (advantages (P, G), loss norm (P, G)): what the sum over a rollout's tokens is divided by.
def group_advantages(rewards, eps=1e-4):
    """rewards (P, G) -> (r - mean) / (std + eps) within each group, (P, G); 0 in a group of equal rewards.

    eps: ours; the released 1e-9 turns rounding noise between equal real-valued rewards into full-size
    advantages."""
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(1, rewards.shape[1] - 1)
    differ = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    return torch.where(differ, centred / (variance.sqrt() + eps), 0.0)


def grpo(rewards, tokens, limit):
    """As DeepSeekMath writes it: every rollout counts the same, however long it is."""
    return group_advantages(rewards), tokens.clamp(min=1)


RULES = {"grpo": grpo}


def policy_loss(logp, old_logp, advantages, scored, n_rollouts, clip=0.2, loss_norm=None):
    """DeepSeekMath Eq. 3 without KL: mean over rollouts of the mean over their sampled tokens of the clipped
    objective -> (loss, ratio (B, S), 1 where nothing was sampled).

    logp, old_logp, scored (B, S), advantages (B,). loss_norm (B,): what the sum over a rollout's tokens is
    divided by, by default its token count. n_rollouts: of the whole update, not of this micro-batch. So
    gradients summed over micro-batches of any size are the same (the released code takes the mean over the
    tokens of each micro-batch)."""
    ratio = torch.where(scored, logp - old_logp, 0.0).exp()  # (B, S)
    a = advantages[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)  # (B, S)
    if loss_norm is None:
        loss_norm = scored.sum(1).clamp(min=1)
    per_rollout = (gain * scored).sum(1) / loss_norm  # (B,)
    return -per_rollout.sum() / n_rollouts, ratio
