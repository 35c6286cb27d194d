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
import contextlib
import copy
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import types
import urllib.parse
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

LATENT = -1  # the slot value of a latent position
CAP = 5  # a tag's N is clamped to this; a checkpoint carries its own (config.litereason_max_reasoning_steps)
PROJECTOR_LAYERS = 3
LOGITS = 2**27  # most logits that scoring computes at once: 512 MiB in fp32, 883 tokens of Qwen's vocabulary
LOOK = 4  # while decoding, the device is looked at from outside once in so many steps
WAITS = ("cuda",)  # devices on which a shape that depends on numbers waits for them


class UserError(Exception):
    """Something the person at the keyboard can put right; scripts print it in one line and exit with code 2."""


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


# ============================================================================ load and save
TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "tiny", "base")


def load(name_or_path, device=None, dtype=None):
    """A causal LM with one more submodule, `reasoning_projector`, and its tokenizer.

    name_or_path: "tiny" (shipped), a directory, a hub id, or a short name (Qwen2.5-1.5B -> Qwen/Qwen2.5-1.5B).
    device: default cuda if there is one, else cpu. dtype: default float32, for weights and compute.
    A checkpoint without projector weights gets the warm start and the default cap. Files are data: safetensors only, no
    pickle, no code of the checkpoint's own; a directory is read without a network.
    Raises UserError, in one line, if there is no such model, it cannot be fetched, or its files do not fit together.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = TINY if name_or_path == "tiny" else str(name_or_path)
    if os.path.exists(os.path.join(path, "model", "config.json")):
        path = os.path.join(path, "model")  # a run's output directory
    if not os.path.isdir(path):
        if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"no model directory at {path!r} (a directory with config.json and *.safetensors)")
        path = f"Qwen/{path}" if "/" not in path and path.startswith("Qwen") else path
    elif not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path!r} has no config.json: it is not a saved model")
    local = os.path.isdir(path)
    only = {"local_files_only": local or not hub_answers()}  # without a network fail now, not after minutes of retries
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # the projector's keys are "unexpected" to transformers; we read them below
    try:
        tokenizer = _load_tokenizer(path, trust_remote_code=False, **only)
        weights = _projector_weights(path, **only)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **only)
        config._attn_implementation = "sdpa"  # whatever it says: attention code may be fetched from the hub by name
        model, read = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype or torch.float32, use_safetensors=True,
                                                           trust_remote_code=False, output_loading_info=True, **only)
        odd = sorted(read["missing_keys"]) + sorted(k for k in read["unexpected_keys"] if k.startswith("model.layers."))
        if odd:  # transformers would go on, with random weights for what is missing
            raise ValueError(f"its weights and its config.json do not fit: {odd[0]}")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    except Exception as e:  # a damaged file comes out of transformers as nearly any of them
        why = " ".join(str(e).split())[:200] or type(e).__name__
        if local:
            raise UserError(f"cannot load the model in {path!r}: {why}") from e
        if any(sign in str(e) for sign in ("gated repo", "401 Client Error", "403 Client Error")):
            raise UserError(f"{path!r} is gated on the hub: accept its terms on https://huggingface.co/{path}, then `hf auth login` "
                            f"(or set HF_TOKEN)") from e
        raise UserError(f"cannot fetch {path!r} from the hub ({why}). Without a network these work: 'tiny', or a directory; "
                        f"where there is one: `hf download {path} --local-dir DIR`, then pass DIR") from e
    finally:
        transformers.logging.set_verbosity(verbosity)
    model = attach(model.to(device), weights)
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise UserError(f"cannot load the model in {path!r}: {bad[0]} holds NaN or inf")
    return model, tokenizer


def hub_answers():
    """Whether the model hub can be reached; a proxy is taken at its word."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or os.environ.get("TRANSFORMERS_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
        return True
    except OSError:
        return False


def _load_tokenizer(path, **kwargs):
    """AutoTokenizer, but a Qwen2 checkpoint that says it brings its own tokenizer.json (the tiny world's words) gets that
    one: transformers 5 would replace it by Qwen's own class, whatever the checkpoint says."""
    try:
        with open(os.path.join(path, "tokenizer_config.json")) as f:
            own = json.load(f).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    except (OSError, ValueError):
        own = False
    return (transformers.PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(path, **kwargs)


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


def _projector_weights(path, **kwargs):
    """{"i.gate_proj.weight": tensor} from a checkpoint's safetensors files; {} if it has none."""
    weights, prefix = {}, "reasoning_projector."
    index = transformers.utils.cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **kwargs)
    names = sorted(set(json.load(open(index))["weight_map"].values())) if index else ["model.safetensors"]
    if not all(n.endswith(".safetensors") for n in names):
        raise ValueError(f"model.safetensors.index.json names {names}, not only safetensors files")  # transformers would unpickle it
    for file in [transformers.utils.cached_file(path, n, **kwargs) for n in names]:
        with safe_open(file, "pt") as f:
            weights.update({k[len(prefix):]: f.get_tensor(k) for k in f.keys() if k.startswith(prefix)})
    return weights


def save(model, tokenizer, path):
    """An ordinary checkpoint directory (safetensors); complete or absent, since it is renamed into place at the end."""
    path = os.path.abspath(path)
    new, old = f"{path}.writing-{os.getpid()}", f"{path}.replaced-{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    if os.path.isfile(path):
        raise UserError(f"cannot write {path}: it is a file, not a directory")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(new, path)
    except Exception as e:  # a full disk is an OSError, a SafetensorError, or, of a tokenizer, a plain Exception
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    shutil.rmtree(old, ignore_errors=True)


# ============================================================================ the cache: who attends to whom
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


def stop_tokens(model, tokenizer):
    """Every id that ends a turn: the tokenizer's and the checkpoint's (Qwen has two)."""
    return sorted({tokenizer.eos_token_id, *_stop_ids(model)} - {None})


def _stop_ids(model):
    ids = [model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
    return sorted({i for x in ids if x is not None for i in (x if isinstance(x, list) else [x])})


def chat_parts(model, tokenizer):
    """(before, after, end): the text around the user's words, and the id that ends an answer; ("", "", the eos) for a base model.

    A chat model is one that stops where its template ends a turn. So Qwen2.5-Instruct is one (<|im_end|> is among its stop tokens), and
    Qwen2.5, a base model that ships the same template but stops at <|endoftext|> only, gets its prompts plain.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", "", tokenizer.eos_token_id
    user, said = "THE-USERS-WORDS", "THE-ANSWER"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)  # Qwen3's switch; others ignore it
    try:
        tail = render(turns).rpartition(said)[2]
        before, _, after = render(turns[:1], add_generation_prompt=True).partition(user)
    except Exception as e:  # a template is a program of somebody else's: anything may come
        raise UserError(f"the tokenizer's chat template does not work for a user and an assistant turn: {str(e).splitlines()[0]}") from e
    at = {tail.find(str(tokenizer.convert_ids_to_tokens(i))): i for i in stop_tokens(model, tokenizer)}
    at.pop(-1, None)
    return (before, after, at[min(at)]) if at else ("", "", tokenizer.eos_token_id)


def encode_prompt(model, tokenizer, text, opening=""):
    """A prompt as token ids: one user turn and the answer's header for a chat model, the text alone for a base model.

    opening: the answer's first words, put into the model's mouth. A story is data: "<|im_end|>" in it becomes the tokens of those ten
    characters; only the template's own words become special tokens. Apart from that the ids are those of the whole text at once.
    """
    before, after, _ = chat_parts(model, tokenizer)
    if not after:
        return tokenizer.encode(f"{text} {opening}" if opening else text, split_special_tokens=True)
    special = "|".join(re.escape(t.content) for t in tokenizer.added_tokens_decoder.values())
    start = max([m.end() for m in re.finditer(special, before)], default=0)  # BPE may merge neighbours, but not across a special token
    end = min([m.start() for m in re.finditer(special, after)], default=len(after))
    parts = [(before[:start], False), (before[start:] + text + after[:end], True), (after[end:] + opening, False)]
    return [i for part, plain in parts for i in tokenizer.encode(part, add_special_tokens=False, split_special_tokens=plain)]


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


def check_lengths(model, prompts, max_new_tokens):
    """UserError unless every prompt (token ids) and its answer fit the model's positions."""
    limit = model.config.max_position_embeddings
    for i, p in enumerate(prompts):
        if not p:
            raise UserError(f"prompt {i} is empty")
        if len(p) + max_new_tokens > limit:
            raise UserError(f"prompt {i} has {len(p)} tokens; with {max_new_tokens} new ones that is more than the model's {limit} positions: "
                            f"lower --max-new-tokens, or prepare shorter texts")


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


# ============================================================================ stage 1: traces with tags (Sec. 3.3)
def split_answer(text, marker="\\boxed{"):
    """(reasoning, answer): the answer begins at the last marker; ("", "") if there is none."""
    at = text.rfind(marker)
    return (text[:at], text[at:]) if at >= 0 else ("", "")


SENTENCE = re.compile(r"\s*[^\n]*?(?:(?<![.!?])[.!?]+[\"')\]]*(?=\s)|\n|$)")  # the look-behind: a run of dots is tried once, not n times


def mask_sentences(rng, tokenizer, reasoning, ratio, cap=CAP):
    """Replaces max(1, int(ratio * n)) random sentences by tags, N = clamp(int(0.2 * tokens of the sentence), 1, cap).

    The sentence is deleted: there is no target for the latents themselves. Tags already there are kept and never
    replaced. One space on each side of a tag (Sec. 4 of method.md). rng: random.Random. None if there is no sentence.
    Ours: sentences end at [.!?] or a newline; the released code uses spaCy in stage 1, another splitter in stage 3.
    """
    pieces, start = [], 0  # [text, is a sentence]
    for a, b, _ in parse_tags(reasoning, cap) + [(len(reasoning), len(reasoning), 0)]:
        pieces += [[s, bool(s.strip())] for s in SENTENCE.findall(reasoning[start:a]) if s]
        pieces.append([reasoning[a:b], False])
        start = b
    sentences = [i for i, (_, is_sentence) in enumerate(pieces) if is_sentence]
    if not sentences:
        return None
    for i in rng.sample(sentences, max(1, int(ratio * len(sentences)))):
        n = max(1, min(cap, int(0.2 * len(tokenizer.encode(pieces[i][0].strip(), add_special_tokens=False)))))
        pieces[i][0] = f" {OPEN}{n}{CLOSE} "
    text = "".join(p for p, _ in pieces)
    return re.sub(rf"(?:(?<!\s)\s+|)({OPEN}[0-9 ]*{CLOSE})\s*", r" \1 ", text).replace(f"{CLOSE}  {OPEN}", f"{CLOSE} {OPEN}").strip()


# ============================================================================ rewards the paper's tasks share (Sec. 4)
def boxed(text):
    """The content of the last \\boxed{..}, braces balanced, \\text{..} unwrapped; None if there is none or it is cut."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    depth, start = 0, at + len("\\boxed")
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return re.sub(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}", r"\1", text[start + 1 : i]).strip()
    return None


@torch.no_grad()
def perplexity(model, tokenizer, contexts, continuations, rows=64):
    """Per-token perplexity of each continuation after its context, both texts -> list of floats. No tag fires here."""
    out = []
    for i in range(0, len(contexts), rows):
        pairs = zip(contexts[i : i + rows], continuations[i : i + rows])
        none = torch.zeros(0, model.config.hidden_size)
        encode = functools.partial(tokenizer.encode, split_special_tokens=True)  # both are text, whatever they contain
        batch = [Rollout(encode(c), encode(y, add_special_tokens=False), none) for c, y in pairs]
        if not all(r.prompt_ids and r.slots for r in batch):
            raise UserError("a perplexity needs a context and a continuation of at least one token each")
        logp, scored = logprobs(model, batch)
        out += torch.exp(-logp.sum(1) / scored.sum(1)).tolist()
    return out


def improvement(before, after):
    """VR-CLI (arXiv 2503.22828): by how many percent a plan lowers the perplexity of a text."""
    return 100.0 * (before - after) / before


# ============================================================================ stopping and going on
def lock(out):
    """Makes this process the only one that writes into the directory `out`, for as long as it lives: the kernel takes the lock
    back however the process ends. Keep the file that comes back. What a killed run left half written is removed."""
    try:
        file = open(os.path.join(out, "lock"), "a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another process is writing to {out}; wait for it, or choose another --out") from e
    except OSError as e:
        raise UserError(f"cannot lock {out}: {e.strerror}") from e
    for name in os.listdir(out):
        if name.startswith("model.replaced-") and not os.path.exists(os.path.join(out, "model")):
            os.rename(os.path.join(out, name), os.path.join(out, "model"))  # killed between the two renames of save()
        elif re.match(r"(model\.(writing|replaced)-|state-\d+\.writing$)", name):
            shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    return file


def saved_states(out):
    """The steps of which `out` holds a state, in order."""
    return sorted(int(m.group(1)) for m in map(re.compile(r"state-(\d+)").fullmatch, os.listdir(out)) if m) if os.path.isdir(out) else []


def write_state(out, step, tensors, rest, keep=2):
    """out/state-STEP: named tensors and whatever JSON can say. Complete or absent: written beside, brought to the disk, checksummed,
    then renamed. After that all but the last `keep` states go, and those of later steps, which were damaged when the run was resumed."""
    path = os.path.join(os.path.abspath(out), f"state-{step}")
    new = path + ".writing"
    shutil.rmtree(new, ignore_errors=True)
    try:
        os.makedirs(new)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, os.path.join(new, "tensors.safetensors"))
        with open(os.path.join(new, "rest.json"), "w") as f:
            json.dump(rest, f)
        with open(os.path.join(new, "crc32"), "w") as f:
            f.write(_checksum(new))
        for name in [*os.listdir(new), "."]:
            _sync(os.path.join(new, name))
        if os.path.exists(path):  # the same step again, after a resume from an older one: it was a damaged one
            shutil.rmtree(path)
        os.rename(new, path)
        _sync(os.path.dirname(path))
    except (OSError, SafetensorError) as e:
        shutil.rmtree(new, ignore_errors=True)
        last = [f"; state-{s}, written before, is still there" for s in saved_states(out)[-1:]]
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}{''.join(last)}") from e
    last = [s for s in saved_states(out) if s <= step][-keep:]
    for s in set(saved_states(out)) - set(last):
        shutil.rmtree(os.path.join(out, f"state-{s}"), ignore_errors=True)


def read_state(out):
    """(step, tensors, rest) of the newest whole state in `out`; a damaged one is passed over and named. None if there is none."""
    for step in reversed(saved_states(out)):
        path = os.path.join(out, f"state-{step}")
        try:
            with open(os.path.join(path, "crc32")) as f:
                if f.read() != _checksum(path):
                    raise ValueError("its checksum is wrong")
            with open(os.path.join(path, "rest.json")) as f:
                return step, load_file(os.path.join(path, "tensors.safetensors")), json.load(f)
        except (OSError, ValueError, SafetensorError) as e:
            print(f"{path} is damaged ({e}); looking for the one before", file=sys.stderr)
    return None


def optimizer_tensors(parameters, optimizer):
    """Weights and AdamW's moments, named, for write_state."""
    weights = {f"weight {i}": p for i, p in enumerate(parameters)}
    return weights | {f"adamw {i} {k}": v for i, own in optimizer.state_dict()["state"].items() for k, v in own.items()}


@torch.no_grad()
def restore_optimizer(parameters, optimizer, tensors):
    """The way back, from read_state's tensors into parameters and optimizer."""
    moments = {}
    for name, value in tensors.items():
        if name.startswith("adamw "):
            _, i, k = name.split()
            moments.setdefault(int(i), {})[k] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    for i, p in enumerate(parameters):
        p.copy_(tensors[f"weight {i}"])


def on_stop(save):
    """From now on Ctrl-C and SIGTERM end the run, once, by save() and what that says. -> hold: after hold(True) a signal is only noted,
    and obeyed at hold(False), so that what must not be cut in two is not."""
    caught, held = [], False

    def leave():
        nonlocal held
        held = True  # a second signal changes nothing any more
        raise KeyboardInterrupt(caught[0], save())

    def handler(number, _):
        caught.append(number)
        if not held:
            leave()

    def hold(on):
        nonlocal held
        held = on
        if caught and not on:
            leave()

    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, handler)
    return hold


@contextlib.contextmanager
def signals_restored():
    """However what is inside ends (or the function that this decorates), Ctrl-C and SIGTERM do afterwards what they did before."""
    former = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in former.items():
            signal.signal(s, handler)


def _checksum(path):
    """Of a state's two files, as text."""
    crc = 0
    for name in ("tensors.safetensors", "rest.json"):
        with open(os.path.join(path, name), "rb") as f:
            while part := f.read(1 << 24):
                crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def _sync(path):
    """Brings a file, or a directory's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ============================================================================ what all scripts do at their ends
def run_script(main):
    """Runs a script's main: what the user can put right ends in one line and exit code 2, never in a traceback; Ctrl-C and SIGTERM
    end in one line and the shell's 130 and 143. A script may raise KeyboardInterrupt(signal, what to say)."""
    def stop(number, _):
        raise KeyboardInterrupt(number)

    name = os.path.basename(sys.argv[0])
    try:
        signal.signal(signal.SIGTERM, stop)
        main()
    except UserError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        print(f"{name}: error: {e}; what was written before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        number, said = (e.args + (signal.SIGINT, None)[len(e.args):])[:2]
        by = "the keyboard" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\nstopped by {by}; {said or 'what was written so far is kept'}", file=sys.stderr)
        sys.exit(128 + number)
