"""No rollout changes when rows leave, when waiting prompts take their place, or when steps are recorded once
and replayed.

What a CUDA graph does is played here by a tape: the same operations on the same memory, no Python between."""
import copy

import pytest
import torch
from conftest import LIMIT, random_qwen2, same, tag, with_projector, write
from torch.utils._python_dispatch import TorchDispatchMode

from lib import checkpoint, decoder, kv_cache
import litereason
from litereason import LATENT, generate

# What two rows per prompt write, in characters: early and late ends, whole groups that end together, rows
# that the limit cuts (60).
LENGTHS = [(1, 38), (2, 3), (30, 1), (1, 1), (60, 5), (4, 25), (9, 60), (2, 2), (20, 20), (1, 60), (7, 33),
           (60, 60), (0, 0), (3, 28)]


def fresh(tok, **config):
    return with_projector(random_qwen2(len(tok) + 3, tok.eos_token_id, **config))


def run(model, tok, rows, lengths=LENGTHS, **settings):
    """Prompts of up to 11 tokens whose rows write that many characters, a tag among those of longer ones."""
    prompts = ["p" * (1 + 5 * i % 11) for i in range(len(lengths))]
    texts = [(f"ab{tag(1 + i % 5)}" + "y" * (n - 13) if n > 16 else "y" * n) + "<eos>"
             for i, own in enumerate(lengths) for n in own]
    return write(model, tok, prompts, texts, LIMIT, len(lengths[0]), gen_batch_size=rows, **settings)


def equal(some, others):
    for a, b in zip(some, others, strict=True):
        same(a, b)
        assert a.prompt == b.prompt


@pytest.fixture(scope="module")
def made(tok):
    """(a model with a window in its second layer, its rollouts when all prompts begin at once)"""
    model = fresh(tok, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    together = run(model, tok, 512)
    assert sum(r.n_latents for r in together) > 20
    return model, together


@pytest.fixture
def model(made):
    return copy.deepcopy(made[0])


@pytest.fixture
def together(made):
    return made[1]


# ---------------------------------------------------------------- prompts that wait
@pytest.mark.parametrize("rows", [1, 8, 27])
def test_rows_that_begin_late_are_the_rows_that_begin_at_once_in_fewer_steps(
        model, tok, together, rows, forwards):
    equal(run(model, tok, rows), together)
    at_once = [n for n, width in forwards if width == 1 and n > 0]
    assert max(at_once) <= max(2, rows), "more rows at once than were allowed"
    if rows == 8:  # one batch of four prompts after the other would take so many steps
        in_turn = [max(min(n + 1, LIMIT) for own in LENGTHS[i : i + 4] for n in own) for i in range(0, 14, 4)]
        assert len(at_once) < 0.8 * sum(in_turn)


def test_each_prompt_is_read_once_few_are_kept_and_columns_are_used_again(tok, forwards, monkeypatch):
    model = fresh(tok)  # all positions in every layer
    kept, gone, change = [], [], kv_cache.DecodingCache.change

    def watch(self, *a):
        before = self.filled
        change(self, *a)
        gone.append(before - self.filled)
        kept.append(len(self.lengths))
        assert self.filled < self.room and (self.began >= 0).all()

    monkeypatch.setattr(kv_cache.DecodingCache, "change", watch)
    stats, lengths = {}, [(1, 1, 1, 39)] * 30  # of every group one row stays to the limit
    rollouts = run(model, tok, 12, lengths, stats=stats)
    assert len(kept) > 8 and max(kept) == 6, "prompts in memory: at most twice those of a full batch"
    assert sum(n for n, width in forwards if width == 11) <= 30
    decoded = sum(n for n, width in forwards if width == 1)
    assert stats["positions"] == decoded + sum(len(r.prompt_ids) for r in rollouts[::4])
    equal(rollouts, run(model, tok, 512, lengths))
    # Rows that begin three steps apart for ever share the columns of one rollout.
    gone.clear()
    lengths = [(n, n) for n in (39, 3, 39, 7, 39, 11, 39, 15, 39, 19) * 3]
    waited = run(model, tok, 8, lengths)
    assert sum(gone) > 3 * LIMIT and max(gone) < LIMIT
    equal(waited, run(model, tok, 512, lengths))


def test_a_row_that_breaks_does_not_break_the_one_that_takes_its_place(tok, monkeypatch):
    """A latent of NaN stays in the memory of the row that ran it; it may not be read by anybody else."""
    model = fresh(tok)
    broken = lambda h, u, k: torch.full_like(h, torch.nan)
    rows = run(model, tok, 2, [(20, 20), (5, 5), (9, 9)], latent=broken)
    assert rows[0].logprobs.isnan().any()
    assert all(r.logprobs.isfinite().all() for r in rows[2:])


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_step_is_run_for_rows_that_are_all_at_the_limit(model, tok, limit, monkeypatch):
    monkeypatch.setattr(checkpoint, "stop_tokens", lambda *_: [-7])
    stats, prompts = {}, [[5] * (1 + i) for i in range(6)]
    rollouts = generate(model, tok, prompts, 2, limit, gen_batch_size=4, stats=stats)
    assert [r.prompt for r in rollouts] == [i for i in range(6) for _ in (0, 1)]
    assert all(len(r.slots) == limit for r in rollouts)
    assert stats["positions"] == sum(map(len, prompts)) + 12 * (limit - 1)
    assert generate(model, tok, [], 2, limit) == []


# ------------------------------------------------ prompts read in chunks, and less at once if memory is short
@pytest.mark.parametrize("budget, rows", [(1, 512), (25, 6)])  # of 6 rows most prompts join later
def test_prompts_read_in_chunks_give_the_rollouts_of_prompts_read_at_once(
        model, tok, together, budget, rows, forwards, monkeypatch):
    monkeypatch.setattr(kv_cache, "PREFILL", budget)
    equal(run(model, tok, rows), together)
    reads = [n * width for n, width in forwards if width > 1]
    assert len(reads) > 4 and max(reads) <= max(11, budget)


def test_out_of_memory_while_sampling_halves_the_rows_until_they_fit_and_says_so(
        model, tok, together, monkeypatch, capsys):
    begin, fits = decoder.Decoder._begin, 1

    def begin_few(self, n):
        if self.max_prompts > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(self, n)

    monkeypatch.setattr(decoder.Decoder, "_begin", begin_few)
    for _ in range(2):  # the second time it is known
        equal(run(model, tok, 12), together)
    assert capsys.readouterr().out.splitlines() == ["out of memory with 12 rows at once; from here on 6",
                                                    "out of memory with 6 rows at once; from here on 3"]
    fits = 0  # not even one group
    with pytest.raises(torch.OutOfMemoryError):
        run(model, tok, 12)


# ---------------------------------------------------------------- steps that are recorded
class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default,
                                 torch.ops.aten.nonzero.default), "this waits for the device"
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def play(self):
        """The operations again, on the very tensors they worked on, as a CUDA graph does with addresses."""
        for operation, args, kwargs, out in self.calls:
            again = operation(*args, **kwargs)
            for old, t in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (out, again))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != t.data_ptr():
                    old.copy_(t)


@pytest.fixture
def recorded(monkeypatch):
    """decoder.record by a tape -> how often each recording was played."""
    times = []

    def record(step, *inputs):
        inputs, number = [t.clone() for t in inputs], len(times)
        times.append(0)
        with Tape() as tape:
            result = step(*inputs)
        result.fill_(torch.nan)  # a graph that has only been recorded has computed nothing

        def play(*new):
            torch._foreach_copy_(inputs, list(new))
            tape.play()
            times[number] += 1
            return result

        return play

    monkeypatch.setattr(decoder, "record", record)
    return times


@pytest.mark.parametrize("rows", [4, 512])
def test_a_recorded_step_gives_what_the_step_gives(model, tok, together, rows, recorded):
    model.graphs = True
    equal(run(model, tok, rows), together)
    assert model.graphs and max(recorded) >= 4
    assert len(recorded) < sum(recorded) / 2, "recorded again and again"


def test_a_recording_serves_many_columns_and_is_made_again_when_they_are_full(tok, recorded, monkeypatch):
    model = fresh(tok)
    monkeypatch.setattr(checkpoint, "stop_tokens", lambda *_: [-7])
    plain = generate(model, tok, ["abc"], 2, 400, generator=torch.Generator().manual_seed(0))
    model.graphs = True
    equal(generate(model, tok, ["abc"], 2, 400, generator=torch.Generator().manual_seed(0)), plain)
    assert recorded == [64] * 4 + [128, 15]  # up to 64, 128, 192, 256, 384, 400 columns


def test_where_nothing_can_be_recorded_it_runs_without_and_says_so_once(model, tok, together, capsys):
    model.graphs = True
    for _ in range(2):
        equal(run(model, tok, 512), together)
    assert not model.graphs
    assert capsys.readouterr().err == ("warning: the decoding step cannot be recorded as a CUDA graph "
                                       "(this is no CUDA device); it runs without\n")


# ---------------------------------------------------------------- devices on which choosing rows would wait
@pytest.mark.parametrize("latent", ["projector", "zeros", "none"])
def test_where_rows_cannot_be_chosen_the_projector_runs_on_those_that_may_be_in_a_block(
        model, tok, together, latent, monkeypatch):
    plain = together if latent == "projector" else run(model, tok, 512, latent=latent)
    # What a row wrote where it got this number (see conftest.write): all rows draw now, inside a block too.
    draws = torch.rand(len(plain), LIMIT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = {u: slot for r, line in zip(plain, draws.tolist())
             for u, slot in zip(line, r.slots + [LATENT] * LIMIT)}

    def sample(logits, u, *_):
        token = torch.tensor([max(0, place[x]) for x in u.tolist()])
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]

    monkeypatch.setattr(decoder, "WAITS", ("cpu",))
    seen, forward = [], litereason.ReasoningProjector.forward
    monkeypatch.setattr(litereason.ReasoningProjector, "forward",
                        lambda self, h: seen.append(len(h)) or forward(self, h))
    monkeypatch.setattr(litereason, "sample", sample)
    prompts, stats = [r.prompt_ids for r in plain[::2]], {}
    equal(generate(model, tok, prompts, 2, LIMIT, generator=torch.Generator().manual_seed(0),
                   gen_batch_size=10, stats=stats, latent=latent), plain)
    ran, decoded = sum(r.n_latents for r in plain), stats["positions"] - sum(map(len, prompts))
    assert ran <= sum(seen) < 0.7 * decoded if latent == "projector" else not seen
    assert (ran > 0) == (latent != "none")
