"""card.py: its counts against a counter of live tensors at the shape of Qwen2.5-1.5B,
and its choices on cards of four sizes."""
import itertools
import os
import types

import pretend
import pytest
import torch

import train_rl
from lib import memory

QWEN = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 32_768, "eos_token_id": 151_643}
GIB = 2.0**30
WITHIN = 1.15


# ============================================================ in a process that has the device
def qwen():
    """A model of the real shape, without numbers."""
    import torch
    from pretend import memory as pretended
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import litereason
    pretended.without_numbers()
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN))
    return litereason.attach(model)


def rollouts_of(prompts, n, L, S, tags=0):
    """`n` rollouts for each of so many prompts of L tokens: S slots, the first of them `tags` times a word
    and a latent."""
    import torch

    from litereason import LATENT, Rollout
    made = []
    for p in range(prompts):
        ids = [10 + (7 * p + i) % 150_000 for i in range(L)]
        slots = [11, 12, 13, LATENT] * tags + [10 + i % 150_000 for i in range(S - 4 * tags)]
        made += [Rollout(ids, slots, torch.zeros(tags, QWEN["hidden_size"])) for _ in range(n)]
    return made


def in_all(prompts, n, L, S, pieces=1):
    """Positions as scoring.pack counts them: in all, and without the prompts'."""
    own = prompts * n * S + prompts * n * pieces * (L + S) // 16
    return prompts * L + own, own


def count_everything():
    """{what: (bytes counted, bytes by the formula)}, above the weights.
    One model for all: building it takes seconds."""
    import torch

    from lib import checkpoint, kv_cache
    from litereason import generate, logprobs, projector_loss
    import train_projector
    from pretend import memory as pretended
    model = qwen()
    s = memory.shape(model)
    tokenizer = checkpoint.read_checkpoint("tiny", torch.float32)[1]
    base = [p for name, p in model.named_parameters() if not name.startswith("reasoning_projector.")]
    found = {}

    def note(name, run, expected, held=0):
        """held: bytes of the formula that are there before."""
        counted = pretended.peak(run)
        model.zero_grad(set_to_none=True)
        found[name] = (held + counted["peak"] - counted["before"], memory.total(expected))

    def update(name, shape, **settings):
        """One micro-batch, while the gradients of others are there."""
        rollouts = rollouts_of(*shape)
        held = 0
        if not settings.get("offload"):
            held = 4 * s.base
            for p in base:
                p.grad = torch.zeros_like(p)
        note(f"update, {name}, {shape}", lambda: logprobs(model, rollouts)[0].sum().backward(),
             memory.update(s, in_all(*shape)[0], sum(shape[2:]), **settings), held)

    def sampling(n_prompts, samples, L):
        prompts = [rollout.prompt_ids for rollout in rollouts_of(n_prompts, 1, L, 8)]
        note(f"sampling, {n_prompts} x {samples}", lambda: generate(model, tokenizer, prompts, samples, 3),
             memory.sampling(s, n_prompts * samples, n_prompts, L, 3))

    def reader(shape):
        prompts, n, L, S = shape
        rollouts = rollouts_of(*shape)

        def score():
            with torch.no_grad(), kv_cache.autocast(model):
                logprobs(model, rollouts)

        own = prompts * n * S
        note(f"reader, {shape}", score, memory.while_scoring(s, prompts * L + own, L + S, own))

    def stage_2(shape, tags):
        rollouts = rollouts_of(*shape, tags)
        positions, own = in_all(*shape, pieces=1 + tags)
        expected = memory.latent_update(s, positions, sum(shape[2:]), checkpoint=True, own=own)
        expected["AdamW and gradients"] //= 3  # no optimiser here

        def step():
            with train_projector._base_frozen(model):
                projector_loss(model, rollouts)[0].backward()

        note(f"stage 2, {shape}", step, expected)

    sampling(64, 1, 1700)
    sampling(4, 16, 1024)
    update("all kept", (1, 7, 1700, 2048))
    memory.checkpoint_layers(model)
    update("layers checkpointed", (1, 7, 1700, 2048), checkpoint=True)
    update("layers checkpointed", (4, 16, 1700, 115), checkpoint=True)
    stage_2((2, 1, 1700, 1000), 1)
    masters = memory.offload(model, base)
    update("offload", (1, 7, 1700, 2048), checkpoint=True, offload=True)
    assert all(p.grad is None for p in base)
    del masters
    memory.freeze(model)
    reader((1, 8, 2200, 1500))
    reader((4, 1, 4000, 3000))
    return found


def test_the_counts_are_those_of_the_counter():
    if pretend.why_not():
        pytest.skip(pretend.why_not())
    found, _ = pretend.run(count_everything)
    assert len(found) == 9
    for what, (counted, expected) in found.items():
        assert counted / WITHIN < expected < counted * WITHIN, (what, counted / GIB, expected / GIB)


# ============================================================ the plan
def model_of(layers=28):
    """Shapes of the real model, without weights, on a card that says it is CUDA."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    with torch.device("meta"):
        whole = Qwen2ForCausalLM(Qwen2Config(**{**QWEN, "num_hidden_layers": layers}))
    layer = whole.model.layers[-1].mlp
    three = sum(p.numel() for p in layer.parameters()) * 3
    projector = types.SimpleNamespace(parameters=lambda: iter([torch.empty(three, device="meta")]))
    parameters = lambda: itertools.chain(whole.parameters(), projector.parameters())  # noqa: E731
    return types.SimpleNamespace(config=whole.config, model=whole.model, reasoning_projector=projector,
                                 bf16=True, parameters=parameters, device=torch.device("cuda"))


def arguments(**changes):
    usual = {name: value for name, value in train_rl.RELEASED.items() if name not in train_rl.PLANNED}
    none = dict.fromkeys(train_rl.PLANNED)
    return types.SimpleNamespace(**{**usual, **none, "method": "litereason", **changes})


@pytest.fixture(scope="module")
def real():
    return model_of()


@pytest.mark.parametrize("gib, offload, checkpoint", [(16, True, True), (24, True, True), (40, False, True),
                                                      (80, False, False)])
def test_on_each_card_the_plan_fits_and_is_the_fastest_that_does(real, gib, offload, checkpoint):
    args = arguments()
    text = memory.fit(args, real, 1700, room=gib * GIB)
    assert (args.offload, args.checkpoint_layers) == (offload, checkpoint)
    peaks = {phase: memory.total(sizes) for phase, sizes in memory.peaks(args, real, 1700).items()}
    assert set(peaks) == {"sampling", "update", "refresh"} and max(peaks.values()) <= memory.USABLE * gib * GIB
    assert args.rows >= 16 and args.rows % 16 == 0 and args.tokens_per_forward >= 1700 + 2048
    assert ("may not fit" not in text
            and f"--rows {args.rows} --tokens-per-forward {args.tokens_per_forward}" in text)
    # More would not fit, or is not there to be had.
    s = memory.shape(real)
    held = memory.resident(s, offload)
    more = memory.update(s, args.tokens_per_forward + 512, 3748, checkpoint, offload)
    assert args.tokens_per_forward == memory.MOST_POSITIONS or memory.total(held, more) > memory.USABLE * gib * GIB
    more = memory.sampling(s, args.rows + 16, min(48, 2 * (args.rows + 16) // 16), 1700, 2048, offload)
    assert args.rows == 48 * 16 or memory.total(held, more) > memory.USABLE * gib * GIB


def test_flags_override_the_plan(real):
    args = arguments(rows=32, tokens_per_forward=5000, offload=False, checkpoint_layers=True)
    memory.fit(args, real, 1700, room=80 * GIB)
    assert ((args.rows, args.tokens_per_forward, args.offload, args.checkpoint_layers)
            == (32, 5000, False, True))
    args = arguments(checkpoint_layers=True)
    memory.fit(args, real, 1700, room=80 * GIB)
    assert args.checkpoint_layers and not args.offload and args.tokens_per_forward == memory.MOST_POSITIONS


def test_a_card_that_is_too_small_is_said_with_what_to_change(real):
    args = arguments()
    text = memory.fit(args, real, 1700, room=5 * GIB)
    assert args.offload and args.checkpoint_layers and args.rows == 16
    assert "may not fit: shorten --max-new-tokens" in text
    args = arguments(rows=768, offload=False)
    text = memory.fit(args, real, 1700, room=24 * GIB)
    assert "may not fit: leave the memory flags away" in text


def test_a_reader_leaves_less_room(real):
    alone, beside = arguments(), arguments()
    memory.fit(alone, real, 1700, room=40 * GIB)
    memory.fit(beside, real, 1700, scorer=real, room=40 * GIB)
    assert (beside.offload, -beside.tokens_per_forward) > (alone.offload, -alone.tokens_per_forward)
    assert "reader 3.8" in memory.forecast(beside, real, 1700, real, 40 * GIB)


def test_the_largest_that_fits():
    for most in (0, 5, 6, 100):
        for step in (1, 4):
            for limit in (0, 1, 17, 1000):
                expected = max(n for n in range(0, most + 1, step) if n <= limit)
                assert memory.largest(lambda n: n <= limit, most, step) == expected  # noqa: B023


# ============================================================ a CPU
def test_a_small_model_on_a_cpu_has_fixed_numbers(model, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 0)
    assert memory.rows_that_fit(model, 100, 100, 4) == 512
    assert memory.positions_that_fit(model, 100) == 2**15
    assert memory.positions_that_fit(model, 100, memory.latent_update, otherwise=12_000) == 12_000


@pytest.fixture
def on_a_cpu(real):
    """The real shape there: fp32."""
    return types.SimpleNamespace(**{**vars(real), "device": torch.device("cpu"), "bf16": False})


def test_a_real_model_on_a_cpu_gets_a_plan_too_without_offload(on_a_cpu, monkeypatch):
    for gib, checkpoint in ((48, True), (200, False)):
        args = arguments()
        text = memory.fit(args, on_a_cpu, 1700, room=gib * GIB)
        highest = max(memory.total(sizes) for sizes in memory.peaks(args, on_a_cpu, 1700).values())
        assert "may not fit" not in text and highest <= memory.USABLE * gib * GIB
        assert (args.offload, args.checkpoint_layers) == (False, checkpoint)
        assert args.rows >= 16 and 3748 <= args.tokens_per_forward <= memory.FEW_POSITIONS
    args = arguments()
    text = memory.fit(args, on_a_cpu, 1700, room=24 * GIB)
    assert args.rows == 16 and text.endswith("this may not fit: shorten --max-new-tokens, or take a smaller "
                                             "--model")
    # and everything else, from what is free when it begins
    rows, positions = [], []
    for gib in (0.3, 8, 1000):
        monkeypatch.setattr(memory, "free", lambda device: gib * GIB)  # noqa: B023
        rows.append(memory.rows_that_fit(on_a_cpu, 1700, 2048, 4))
        positions.append(memory.positions_that_fit(on_a_cpu, 3748))
    assert rows[0] < rows[1] < rows[2] == 512 and positions == [3748, memory.FEW_POSITIONS, memory.FEW_POSITIONS]


def test_what_is_free_on_a_cpu_is_the_least_that_machine_and_control_groups_leave(tmp_path, monkeypatch):
    machine = memory.free(torch.device("cpu"))
    assert 0 < machine <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    own = tmp_path / "own"
    own.write_text("4:memory:/there\n0::/here\n")
    groups = {"here": ("memory.max", "memory.current"), ".": ("memory.max", "memory.current"),
              "memory/there": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    limits = {"here": ("1000", "700"), ".": ("max", "900"), "memory/there": ("5000", "2000")}
    for group, names in groups.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names, "memory.stat"), (*limits[group], "anon 1\ninactive_file 50\n")):
            (tmp_path / group / name).write_text(text + "\n")
    left = memory._left_in_control_groups(str(tmp_path), str(own))
    assert sorted(left) == [350, 3050]
    assert memory._left_in_control_groups(str(tmp_path), str(tmp_path / "absent")) == []
    monkeypatch.setattr(memory, "_left_in_control_groups", lambda: left)
    assert memory.free(torch.device("cpu")) == 350
