"""Who is decoded, and where tags end; without this file the method is the same, so a first reading can skip it.

    Decoder      which rows are decoded: ended ones leave, waiting prompts join; CUDA graphs
    TagTable     the grammar of the tag as a table over token ids

Letters in the shape comments are those of litereason.py, and:
    H heads   K key/value heads   R = H / K   d head size   n columns of own slots, or rows
"""
import contextlib
import signal
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F

from lib import kv_cache

LOOK = 4  # while decoding, the host looks at the device once in so many steps
WAITS = ("cuda",)  # devices where data-dependent shapes force a sync


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
        grows = model.device.type in kv_cache.GROWS and not model.graphs
        self.cache = kv_cache.DecodingCache(prompts_read, owner, limit, grows)
        self.rows = types.SimpleNamespace(**fields)

    def _begin(self, n):
        """Reads the next n prompts -> (their PromptCache, owner (B,), the fields of their rows)."""
        first, end = self.n_begun, self.n_begun + n
        self.n_begun = end
        prompts_read, h = kv_cache.prefill_in_chunks(self.model, self.prompts[first:end])
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
        return kv_cache.forward(self.model, x[:, None], positions[:, None], self.cache)[:, 0]

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
