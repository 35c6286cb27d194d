"""The CUDA paths of all scripts on a pretended CUDA device (tests/pretend): what a GPU would refuse, where
the host would wait for it, how much would be in its memory. The numbers are real, bf16 rounding included;
CUDA's kernels and speed are not.

Functions named on_the_card_.. run in a process of their own that has the device; the tests look at what
they return. They import what they need themselves: here, in pytest's process, torch has no such device."""
import collections
import json
import os
import shutil

import pytest

import pretend


@pytest.fixture(scope="module", autouse=True)
def the_device():
    if pretend.why_not():
        pytest.skip(pretend.why_not())


# ---------------------------------------------------------------- the device itself
def on_the_card_refusals():
    """-> {what is tried: the error it ends in, or None}"""
    import torch
    from pretend import device

    x = torch.ones(2, 3, device="cuda")
    ids = torch.arange(3, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def read_while_recording():
        with torch.cuda.graph(graph):
            x.sum().item()

    tried = {
        "a sum with a CPU tensor": lambda: x + torch.ones(2, 3),
        "a sum with a number": lambda: x + torch.tensor(1.0),
        "a CPU tensor indexed from the card": lambda: torch.ones(3)[ids],
        "a product of integers": lambda: ids[None] @ ids[:, None],
        "a product of two types": lambda: x @ x.T.bfloat16(),
        "draws from a CPU generator": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        "numpy": lambda: x.numpy(),
        "a number read while a graph is recorded": read_while_recording}
    ends = {}
    for name, action in tried.items():
        try:
            action()
            ends[name] = None
        except (RuntimeError, TypeError) as e:
            ends[name] = str(e)

    # A graph computes again, on what stands in its memory then.
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        doubled = (x * 2).T
    x.fill_(5.0)
    graph.replay()
    device.EVENTS.clear()
    return ends, doubled.tolist(), device.EVENTS


def test_the_device_refuses_what_cuda_refuses_and_sees_where_the_host_waits():
    (ends, doubled, events), _ = pretend.run(on_the_card_refusals)
    assert [name for name, error in ends.items() if error is None] == ["a sum with a number"], ends
    assert ("same device" in ends["a sum with a CPU tensor"]
            and "generator" in ends["draws from a CPU generator"])
    assert doubled == [[10.0, 10.0]] * 3
    assert [why for _, why in events] == ["copy from the card"]


def on_the_card_side_stream():
    """A copy to the card and back through pinned memory, on a stream of its own."""
    import torch
    from pretend import device

    device.EVENTS.clear()
    buffer = torch.empty(3, pin_memory=True)
    buffer.copy_(torch.arange(3.0).pin_memory())
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        x = buffer.to("cuda", non_blocking=True) * 2
        x.record_stream(aside)
        buffer.copy_(x, non_blocking=True)
        done = torch.cuda.Event()
        done.record(aside)
    torch.cuda.current_stream().wait_event(done)
    before = buffer.tolist(), len(device.EVENTS)
    done.synchronize()
    return before, buffer.tolist(), device.EVENTS


def test_streams_events_and_pinned_memory_have_stand_ins():
    (before, numbers, events), _ = pretend.run(on_the_card_side_stream)
    assert before == ([0.0, 1.0, 2.0], 0), "the copy back is read too early"
    assert numbers == [0.0, 2.0, 4.0] and [why for _, why in events] == ["synchronize"]


# ---------------------------------------------------------------- memory
def on_the_card_count_a_product():
    import torch
    from pretend import memory

    memory.without_numbers()
    weight = torch.zeros(2**15, 2**15, device="cuda", requires_grad=True)  # 4 GiB

    def forward_and_backward():
        x = torch.zeros(2**10, 2**15, device="cuda")  # 128 MiB, and so is the product
        (x @ weight).sum().backward()

    return memory.peak(forward_and_backward)


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    counted, _ = pretend.run(on_the_card_count_a_product)
    assert counted["before"] == 2**32
    above = counted["peak"] - counted["before"]
    assert 2**32 + 2**27 <= above <= 2**32 + 2**27 + 2**12, (
        "the weight's gradient and x; the product is gone by then")


def on_the_card_out_of_memory():
    """Sampling and the update on a card that has room for half of it -> what came of them,
    with room enough and without."""
    import torch
    import train_rl
    from pretend import memory
    from pretend.device import BYTES

    model, tokenizer, prompts = tiny_on_the_card()

    def sample(rows):
        return [r.slots for r in sampled(model, tokenizer, prompts, 8, rows=rows)]

    def update(tokens_per_forward):
        args = update_arguments(tokens_per_forward)
        train_rl.add_gradients_with_one_retry(args, 0, model, FakeState(rollouts), *what_to_score(rollouts))
        norm = torch.stack([p.grad.norm() for p in base]).norm().item()
        model.zero_grad(set_to_none=True)
        return args.tokens_per_forward, norm

    def with_room_for(run, all_at_once, half):
        """run(all_at_once) with room for half of it."""
        peaks = []
        for amount in (all_at_once, half):
            peaks.append(memory.peak(lambda: run(amount))["peak"])
        BYTES.total = sum(peaks) // 2
        out = run(all_at_once)
        BYTES.total = 2**40
        return out

    base = parameters_of_the_base(model)
    rollouts = sampled(model, tokenizer, prompts, 8)
    update(800)  # the first call of everything
    return sample(8), with_room_for(sample, 8, 4), update(800), with_room_for(update, 800, 400)


def test_out_of_memory_is_caught_once_and_changes_no_result():
    (slots, same_slots, (enough, norm), (less, same_norm)), printed = pretend.run(on_the_card_out_of_memory)
    assert "out of memory with 8 rows" in printed and slots == same_slots
    assert (enough, less) == (800, 400) and same_norm == pytest.approx(norm, rel=0.01)


# ---------------------------------------------------------------- what several of them need
def tiny_on_the_card():
    from data import tiny
    from litereason import load

    model, tokenizer = load("tiny")
    prompts = [tokenizer.encode(tiny.prompt(example, True)) for example in tiny.examples("test")[:4]]
    return model, tokenizer, prompts


def parameters_of_the_base(model):
    return [p for name, p in model.named_parameters() if not name.startswith("reasoning_projector.")]


def sampled(model, tokenizer, prompts, limit, **settings):
    """Two rollouts of each prompt, always the same."""
    import torch
    from litereason import generate

    return generate(model, tokenizer, prompts, 2, limit, generator=torch.Generator().manual_seed(0),
                    **settings)


def update_arguments(tokens_per_forward):
    import argparse

    return argparse.Namespace(tokens_per_forward=tokens_per_forward, recompute_latents=False,
                              method="litereason", clip=0.2)


class FakeState:
    """What an update needs of run.State."""

    def __init__(self, rollouts):
        self.rollouts = rollouts
        self.carried = {}


def what_to_score(rollouts):
    """All of them, every second one rewarded: (chosen, advantages, divisors)."""
    import torch

    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts) // 2)
    divisors = torch.tensor([float(r.n_tokens) for r in rollouts])
    return range(len(rollouts)), advantages, divisors


def dlogp():
    """How far sampler and scorer may differ in bf16."""
    from lib.display import DLOGP

    return DLOGP[True]


# ---------------------------------------------------------------- host syncs
VARIANTS = {
    "prompts that wait": {"rows": 4},
    "greedy, every tag runs 3": {"temperature": 0, "tag": 3},
    "cut, no tags": {"top_p": 0.8, "top_k": 20, "tag": "forbidden"},
    "another latent": {"latent": "zeros"}}


def on_the_card_decode(variants, limit):
    """-> for each variant of generate's arguments: how many latents ran, and of each step after the first
    where the host waited since the step before, [(place, why)]."""
    from pretend import device

    model, tokenizer, prompts = tiny_on_the_card()
    waited = []

    def a_step_begins(*_):
        waited.append(list(device.EVENTS))
        device.EVENTS.clear()

    model.lm_head.register_forward_pre_hook(a_step_begins)  # on CUDA it runs once in each step, for all rows
    found = {}
    for name, settings in variants.items():
        waited.clear()
        rollouts = sampled(model, tokenizer, prompts, limit, **settings)
        found[name] = sum(r.n_latents for r in rollouts), waited[1:]
    return found


def test_between_two_looks_the_host_waits_for_nothing():
    from lib.decoder import LOOK

    found, _ = pretend.run(on_the_card_decode, VARIANTS, 24)
    for name, (n_latents, waited) in found.items():
        assert len(waited) >= 2 * LOOK and (n_latents > 0 or name == "cut, no tags"), name
        for step, events in enumerate(waited, start=1):
            is_look = step % LOOK == 0
            assert is_look or not events, f"{name}: in step {step} the host waits at {events}"
        looks = [len(events) for events in waited[LOOK - 1 :: LOOK]]
        assert sorted(looks)[len(looks) // 2] <= 4, f"{name}: one look waits so often: {looks}"


def on_the_card_micro_batch():
    """An update of one micro-batch, without and with offloaded masters -> where the host waited in each,
    [(place, why)], and how far sampler and scorer differ."""
    from lib import memory
    import train_rl
    from pretend import device

    model, tokenizer, prompts = tiny_on_the_card()
    base = parameters_of_the_base(model)
    rollouts = sampled(model, tokenizer, prompts, 16)

    def update():
        device.EVENTS.clear()
        gap, _ = train_rl.add_gradients(update_arguments(4000), model, rollouts, *what_to_score(rollouts))
        return list(device.EVENTS), gap

    plain = update()
    memory.offload(model, base)
    return plain, update()


# Where the host may wait in a micro-batch, and how often: (file, function, why).
IN_A_MICRO_BATCH = {
    ("engine.py", "prefill", "copy to the card"): 2,  # prompts and their lengths
    ("engine.py", "slot_table", "copy to the card"): 2,
    ("engine.py", "__init__", "copy to the card"): 2,  # Batch: whose row, and the way back
    ("engine.py", "__init__", "bincount"): 1,  # Groups: how many rows a prompt has
    ("engine.py", "__init__", "copy from the card"): 1,
    ("engine.py", "pad_mask", "_local_scalar_dense"): 1,  # are all prompts as long?
    ("litereason.py", "states", "copy to the card"): 1,  # the latents
    ("litereason.py", "logprobs", "index by a mask"): 2,  # states and tokens that are scored
    ("backward", "index by a mask"): 1,
    ("engine.py", "wait_for_gradients", "synchronize"): 1,  # only with offload
    ("train_rl.py", "add_gradients", "copy to the card"): 3,  # old log-probs, advantages, divisors
    # the gap: is it larger, how large, whose is it
    ("train_rl.py", "add_gradients", "_local_scalar_dense"): 3}


def test_a_micro_batch_waits_only_where_it_must():
    updates, _ = pretend.run(on_the_card_micro_batch)
    for events, gap in updates:
        assert 0 < gap < dlogp()
        waited = collections.Counter()
        for place, why in events:
            file, _, function = place.partition(" in ")
            waited[(file.split(":")[0], function, why) if function else (place, why)] += 1
        for place, times in waited.items():
            assert times <= IN_A_MICRO_BATCH.get(place, 0), f"{place}: the host waits {times} times: {events}"


# ---------------------------------------------------------------- graphs, and a latent step of one's own
def on_the_card_graphs():
    from pretend import device

    model, tokenizer, prompts = tiny_on_the_card()
    plain = sampled(model, tokenizer, prompts, 16, tag=3, rows=4)
    model.graphs = True
    played = sampled(model, tokenizer, prompts, 16, tag=3, rows=4)
    gap = max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(plain, played))
    return [[r.slots for r in some] for some in (plain, played)], gap, model.graphs, device.Graph.replays


def test_decoding_steps_played_from_a_graph_give_the_same_rollouts():
    ((plain, played), gap, still_on, replays), printed = pretend.run(on_the_card_graphs)
    assert still_on and "cannot be recorded" not in printed and replays >= 20
    assert plain == played and gap < 0.1


def on_the_card_recurrent():
    """A projector with a memory, in the README's place for it."""
    import torch
    import litereason

    class Recurrent(torch.nn.Module):
        memory_size = 24

        def __init__(self, width):
            super().__init__()
            self.read = torch.nn.Linear(width + self.memory_size, self.memory_size)
            self.write = torch.nn.Linear(self.memory_size, width)

        @classmethod
        def start(cls, model, layers):
            return cls(model.config.hidden_size).to(model.device, litereason.projector_dtype(model))

        def forward(self, h, memory=None):
            precise = h.to(self.read.weight.dtype)
            memory = precise.new_zeros(len(h), self.memory_size) if memory is None else memory
            memory = self.read(torch.cat([precise, memory], 1)).tanh()
            return self.write(memory).to(h.dtype), memory

    model, tokenizer, prompts = tiny_on_the_card()
    litereason.PROJECTORS["recurrent"] = Recurrent
    torch.manual_seed(0)
    litereason.start_projector(model, "recurrent")
    rollouts = [r for r in sampled(model, tokenizer, prompts, 28) if r.n_latents]
    again = litereason.recompute_latents(model, rollouts)
    gaps = sorted(float((a.latents - b.latents.cpu()).norm() / a.latents.norm())
                  for a, b in zip(rollouts, again))
    litereason.projector_loss(model, rollouts)[0].backward()
    gradients = [p.grad for p in model.reasoning_projector.parameters()]
    return len(rollouts), gaps, [str(g.dtype) for g in gradients], all(bool(g.any()) for g in gradients)


def test_a_recurrent_projector_keeps_its_precision_and_gets_gradients():
    (n, gaps, types, all_move), _ = pretend.run(on_the_card_recurrent)
    assert n >= 2 and gaps[n // 2] < 0.02 and gaps[-1] < 0.1  # one of six rollouts is sensitive: 0.057
    assert set(types) == {"torch.float32"} and all_move


# ---------------------------------------------------------------- the scripts
TINY_RUN = ("--prompts", 2, "--group", 4, "--train-prompts", 2, "--minibatches", 2, "--steps", 2, "--val", 1,
            "--n", 0, "--max-new-tokens", 26, "--save-every", 1, "--show-every", 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny model, saved as if its projector were trained, and with traces for the anchor."""
    import litereason
    from data import tiny
    from lib import checkpoint
    from test_tiny import trace_of

    path = str(tmp_path_factory.mktemp("pretend") / "small")
    model, tokenizer = litereason.load("tiny", "cpu")
    model.projector_trained = True
    checkpoint.save(model, tokenizer, path)
    traces = [{"example": i, "prompt": tiny.prompt(example, True), "text": trace_of(example)[0]}
              for i, example in enumerate(tiny.examples("train", 40))]
    with open(os.path.join(path, "traces.jsonl"), "w") as f:
        f.write("{}\n" + json.dumps(traces) + "\n")
    return path


def train(out, *words):
    """train_rl.py on the card -> its metrics. Nothing is recorded:
    of a graph the products would be counted once."""
    done = pretend.script("train_rl.py", *TINY_RUN, "--no-graphs", *words, "--out", out)
    assert_bf16(done)
    steps = metrics(out)
    assert (all(step["max_dlogp"] < dlogp() for step in steps)
            and (out / "model" / "model.safetensors").exists())
    return steps


def assert_bf16(done):
    """The base's matrix products are in bf16, on the card."""
    assert done.products["torch.bfloat16"] > 1.5 * done.products.get("torch.float32", 0), done.products


def metrics(out):
    """Without what a clock says."""
    with open(out / "metrics.jsonl") as f:
        steps = [json.loads(line) for line in f]
    return [{name: value for name, value in step.items() if name not in ("seconds", "peak_memory_gib")}
            for step in steps]


def assert_continues_exactly(out, copy):
    """A copy of the run as it was after its first step, continued, ends with the same numbers."""
    from safetensors.torch import load_file

    shutil.copytree(out, copy)
    shutil.rmtree(copy / "state-2")
    assert "resumed from" in pretend.script("train_rl.py", "--resume", copy).printed
    assert metrics(copy) == metrics(out)
    ended, continued = (load_file(run / "state-2" / "tensors.safetensors") for run in (out, copy))
    assert ended.keys() == continued.keys() and all(ended[name].equal(continued[name]) for name in ended)


def results(out):
    with open(out / "results.json") as f:
        return json.load(f)


def test_stages_1_and_2(tmp_path):
    done = pretend.script("train_projector.py", "--prompts", 8, "--samples", 4, "--steps", 2, "--n", 1,
                          "--max-new-tokens", 120, "--no-graphs", "--out", tmp_path / "run")
    assert_bf16(done)
    found = results(tmp_path / "run")
    assert found["kept"] > 0 and found["losses"]["trained"] != found["losses"]["start"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """The directory of a run with latents, and its metrics."""
    out = tmp_path_factory.mktemp("pretend") / "run"
    return out, train(out, "--model", small)


def test_rl_with_latents_refresh_and_resume(trained, tmp_path):
    out, steps = trained
    assert steps[-1]["refresh_loss"] is not None and any(step["grad_norm"] > 0 for step in steps)
    assert any(step["latent_steps"] > 0 for step in steps)
    assert all(step["anchor_loss"] > 0 for step in steps)
    assert_continues_exactly(out, tmp_path / "copy")


def test_rl_with_offloaded_masters_and_layers_computed_again(trained, small, tmp_path):
    steps = train(tmp_path / "run", "--model", small, "--offload", "--checkpoint-layers")
    for step, plain in zip(steps, trained[1]):
        assert (step["reward"] == plain["reward"]
                and step["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.02))
    assert_continues_exactly(tmp_path / "run", tmp_path / "copy")


def test_rl_without_latents(tmp_path):
    # a rollout that stops early is the shorter one
    steps = train(tmp_path / "run", "--method", "grpo", "--steps", 1, "--minibatches", 1, "--val", 0,
                  "--group", 16, "--max-new-tokens", 64, "--overlong-buffer", 44)
    assert steps[0]["grad_norm"] > 0


def test_rl_with_tags_alone_and_the_table(tmp_path):
    train(tmp_path / "run", "--method", "tag", "--steps", 1, "--val", 0, "--n", 1)
    assert len(results(tmp_path / "run")) == 3


def test_rl_of_next_chapters_and_their_perplexity(small, tmp_path):
    steps = train(tmp_path / "run", "--model", small, "--task", "tiny.next_chapter", "--steps", 1, "--val", 0,
                  "--recompute-latents", "--no-refresh")
    assert steps[0]["accuracy"] == steps[0]["accuracy"]


def on_the_card_controls(small, out):
    """eval.py --controls, without most of those that differ in a number only."""
    import sys

    import eval
    from lib import run

    eval.CONTROLS = [(name, changed) for name, changed in eval.CONTROLS
                     if changed.get("tag") not in range(2, 8)]
    sys.argv = ["eval.py", "--model", small, "--controls", "--n", "4", "--max-new-tokens", "24", "--out", out]
    run.run_script(eval.main)
    return [name for name, _ in eval.CONTROLS]


def test_controls(small, tmp_path):
    names, _ = pretend.run(on_the_card_controls, small, str(tmp_path / "table"))
    assert len(names) > 8 and len(results(tmp_path / "table")) == len(names)


def test_answers_shown_and_next_chapters_written(small, tmp_path):
    done = pretend.script("eval.py", "--model", small, "--task", "tiny.next_chapter", "--show", 1,
                          "--write", 1, "--n", 1, "--max-new-tokens", 16, "--out", tmp_path / "table")
    assert_bf16(done)
    assert (tmp_path / "table" / "chapters.md").exists()


REASONING = ("from Mara Otto and from Karl Lena , so Rosa has none of the halves , "
             "go on with Otto and Lena . ") * 2


def on_the_card_baseline(method, out):
    """results/baselines.py with sizes that have no flags, and with traces that it need not sample."""
    import sys

    from lib import run
    from results import baselines

    def traces(model, tokenizer, task, examples, *_):
        prompts = [task.prompt(example, False) for example in examples]
        return [(prompt, REASONING, r"\boxed{ No }") for prompt in prompts], 0

    baselines.own_traces = traces
    baselines.SMALL.update(stories=4, batch=4, stages=1, per_stage=1, colar_epochs=1, rl_prompts=1)
    baselines.GROUP = 4
    baselines.CHECKED = 1
    sys.argv = ["results/baselines.py", "--method", method, "--n", "1", "--steps", "1", "--max-new-tokens", "12",
                "--out", out]
    run.run_script(baselines.main)


@pytest.mark.parametrize("method", ["soft-thinking", "moi", "coconut", "colar", "answer"])
def test_a_baseline(method, tmp_path):
    pretend.run(on_the_card_baseline, method, str(tmp_path / "run"))
    on_test = [row["model"] for row in results(tmp_path / "run") if row["split"] == "test"]
    assert on_test[-2] == method  # the last is at temperature 1
