"""Who is decoded, and where tags end. Without this file the method is the same; a first reading can skip it.

    once_more_in_halves   what to do when memory runs out
    Decoder               which rows are decoded: ended ones leave, waiting prompts join
    record                a step as a CUDA graph
    TagFSM                the grammar of the tag as a table over token ids

Letters in the shape comments are those of litereason.py.
"""
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F

from lib import kv_cache

LOOK = 4  # while decoding, the host looks at the device once in so many steps
WAITS = ("cuda",)  # devices where data-dependent shapes force a sync


def once_more_in_halves(model, run, n, unit="rows", least=1):
    """run(n); out of memory: again with half as many rows (or positions), and so on. From then on this model
    never gets more, whatever calls it. Changes no result.

    Raises torch.OutOfMemoryError if `least` are too many, the fewest that make a difference."""
    most = f"most_{unit}"
    n = min(n, getattr(model, most, n))
    while True:
        try:
            return run(n)
        except torch.OutOfMemoryError:
            if n <= least:
                raise
        if model.device.type == "cuda":  # here the exception, and what it held, is gone
            torch.cuda.empty_cache()
        print(f"out of memory with {n} {unit} at once; from here on {n // 2}", flush=True)
        n = n // 2
        setattr(model, most, n)


# ============================================================ decoding: who is decoded
class Decoder:
    """The rows that are being decoded, and the prompts that wait for rows to end.

    `rows` has one tensor per field, (B, ..) each; new_rows(numbers, h, prompt_lengths) -> dict of them makes
    those of rows that begin. Looking at the device costs a sync, so who has ended is asked once in LOOK steps
    only; until then an ended row is decoded on, to no effect."""

    def __init__(self, model, prompts, samples, limit, max_prompts, new_rows, watch):
        """prompts: lists of token ids, `samples` rows each; limit: slots per row; max_prompts: prompts
        decoded at once; watch: a TagFSM."""
        self.model = model
        self.prompts = prompts
        self.samples = samples
        self.limit = limit
        self.max_prompts = min(max_prompts, len(prompts))
        self.new_rows = new_rows
        self.watch = watch
        self.n_positions = sum(map(len, prompts))  # that go through the model
        self.n_begun = 0  # prompts that have begun
        self.step = self.last_join = 0  # now, and when prompts joined last
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

    def schedule(self, finish):
        """Before each step: rows that have ended leave, prompts that wait join. finish(indices of rows that
        leave) is called before they do. -> False when everything is decoded"""
        is_full = self.cache.filled == self.limit
        if self.step % LOOK and not is_full and not self.all_at_limit:
            return True
        live = self.rows.live.nonzero()[:, 0]  # (n,) the sync
        n_join = self._how_many_join(live)
        if not len(live) and not n_join:
            finish(torch.arange(len(self.rows.live), device=live.device))
            return False
        few = 0.5 if self.model.graphs else 0.75  # of the rows; each change needs a new recording
        if n_join or len(live) <= few * len(self.rows.live) or is_full:
            finish((~self.rows.live).nonzero()[:, 0])
            self._exchange(live, n_join)
        # Until the next look: room for so many latents, with a scratch column behind them; and the rows that
        # may be inside a block.
        missing = int(self.rows.latents_run.max()) + LOOK + 1 - self.rows.latents.shape[1]
        if missing > 0:
            self.rows.latents = F.pad(self.rows.latents, (0, 0, 0, missing + 8))
        may_project = (self.rows.latents_left > 0) | self.watch.soon[self.rows.tag_state]
        self.may_project = may_project.nonzero()[:, 0]  # (n,)
        return True

    def _how_many_join(self, live):
        """Prompts that begin now; 0 if they are too few to be worth moving the memory for."""
        groups_live = -(-len(live) // self.samples)
        # A prompt stays in memory while any row of its group lives: at most twice max_prompts do.
        room = 2 * self.max_prompts - len(self.cache.owner[live].unique())
        n = max(0, min(len(self.prompts) - self.n_begun, self.max_prompts - groups_live, room))
        is_worth_it = n * self.samples >= 0.25 * len(self.rows.live) or not len(live)
        return n if is_worth_it else 0

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

    def who(self, inside, everyone=False):
        """-> (rows that sample a token, rows that run the projector), indices.

        On CUDA choosing them would force a sync: there all rows sample, and the projector runs on those that
        may be inside a block before the next look. everyone: all rows do both."""
        rows = torch.arange(len(inside), device=inside.device)
        if everyone:
            return rows, rows
        if self.model.device.type in WAITS:
            return rows, self.may_project
        return rows[~inside], rows[inside]

    def forward(self, x, positions):
        """One slot for every row: embeddings x (B, D) at positions (B,) -> states (B, D)."""
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
        """The same from a CUDA graph: a step is a thousand short kernels, which Python starts more slowly
        than the card runs them. It is recorded again when rows change or its columns are full.

        -> None, from then on, where a step cannot be recorded."""
        if self.cache.set_reach(rounded=True):
            self.recorded = None
        try:
            if self.recorded is None:
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


# ============================================================ CUDA graphs
ASIDE = {}  # device -> the stream on which steps are recorded


def record(step, *inputs):
    """step(*inputs) as a CUDA graph -> replay(*inputs), for inputs of the same shapes; its result stands in
    the same memory each time."""
    device = inputs[0].device
    if device.type != "cuda":
        raise RuntimeError("this is no CUDA device")
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


# ============================================================ where tags end
class TagFSM:
    """An automaton that reads characters, as a table over token ids: rows of sampled tokens are followed
    without decoding any text.

    The table turns (state, token) into (next state, n): n > 0 where a tag ends with this token and has n
    latents. Tokens that act alike share a class; most send every state back to the start."""

    def __init__(self, read_char, start, alphabet, has_begun, only_resets, texts, vocab_size, device):
        """The automaton is run over the text of every vocabulary entry once, from every state: a few seconds
        for the real Qwen2 vocabulary, once per tokenizer.

        texts: of the vocabulary's entries. read_char(state, char) -> (state, n). alphabet: every character
        that it tells apart. has_begun(state): so much of a tag is written that it can be nothing else.
        only_resets: a pattern of texts that lead to `start` from every state."""
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
            at, n = np.arange(len(queue)), nothing
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
        next_state, fires = np.stack(pairs, 1)  # (classes, states) each
        self.as_lists = classes.tolist(), next_state.tolist(), fires.tolist()  # for one row, on the host
        self.classes, self.next_state, self.fires = (
            torch.from_numpy(table).to(device) for table in (classes, next_state, fires))

        # (3) Which tokens start a tag, in which states; and the states from which one may end within LOOK - 1
        #     tokens, so that its latents begin before the next look.
        begun = torch.tensor([has_begun(state) for state in queue], device=device)
        self.starts = begun[self.next_state] | (self.fires > 0)  # (classes, states)
        self.soon = (self.fires > 0).any(0)  # (states,)
        for _ in range(LOOK - 2):
            self.soon = self.soon | self.soon[self.next_state].any(0)

    def step(self, state, token):
        """state (B,), sampled token (B,) -> (state (B,), n (B,)): n > 0 where this token ends a tag."""
        kind = self.classes[token]  # (B,)
        return self.next_state[kind, state], self.fires[kind, state]
