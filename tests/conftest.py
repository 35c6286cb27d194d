"""What the tests share: a small tokenizer, a tiny random Qwen2 in float64, and a scripted policy.

Read test_decode.py, test_train.py, test_data.py in this order: together they say what litereason.py must do.
Everything here runs on a CPU without a network. Numbers are float64, so "equal" means equal up to rounding,
1e-10.
"""
import contextlib
import functools
import io
import os
import sys
import types

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import litereason
import train_rl
from data import tiny
from lib import kv_cache
from litereason import CLOSE, OPEN

torch.set_num_threads(1)
REAL_TOKENIZER = os.path.join(ROOT, "..", "shared", "qwen2-tokenizer")


def tag(n):
    return f"{OPEN}{n}{CLOSE}"


def close(a, b, tol=1e-10):
    """Equal up to rounding: within tol of the largest entry (or of 1)."""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape, (a.shape, b.shape)
    if a.numel():
        gap = (a - b).abs().max()
        assert gap <= tol * max(1.0, float(b.abs().max())), f"off by {gap:.3g}"


def same(a, b):
    """Two rollouts are the same: slots, latents, log-probs and all."""
    assert (a.prompt_ids, a.slots, a.text, a.finished) == (b.prompt_ids, b.slots, b.text, b.finished)
    close(a.latents, b.latents)
    close(a.logprobs, b.logprobs)


# ---------------------------------------------------------------- tokenizers
# the rest is one token per character; tag(3) has 9 tokens
MERGED = [".<", ">\n", "><", "</", "implicit_", "thought"]


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    chars = [chr(c) for c in range(32, 127)] + ["\n", "\t", "é", "٣", "²"]
    vocab = {w: i for i, w in enumerate(["<eos>", "<unk>"] + MERGED + chars)}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = "|".join(m.replace(".", r"\.") for m in MERGED) + r"|[\s\S]"
    t.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    t.decoder = decoders.Fuse()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<eos>", pad_token="<eos>",
                            unk_token="<unk>").save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def real_tok():
    if not os.path.isdir(REAL_TOKENIZER):
        pytest.skip(f"the real Qwen2 tokenizer is not at {os.path.normpath(REAL_TOKENIZER)}")
    return AutoTokenizer.from_pretrained(REAL_TOKENIZER)


def reader(tok, cap=litereason.CAP):
    """What the watcher, which is made once per tokenizer and cap, asks a model for."""
    size = 151936 if len(tok) > 1000 else len(tok) + 3  # Qwen's own; as in `model`
    config = types.SimpleNamespace(litereason_max_reasoning_steps=cap, vocab_size=size)
    return types.SimpleNamespace(config=config, device="cpu")


# ---------------------------------------------------------------- models
def exact_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


# transformers' own rounds to float32 inside a float64 model: gradients would agree to 1e-7 only
Qwen2RMSNorm.forward = exact_norm


def random_qwen2(vocab_size, eos, **config):
    """A Qwen2 of 2 layers, all of it random, norms and biases too; no projector yet."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=eos, pad_token_id=eos, **config))
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    return model


def with_projector(model, tok=None):
    """Attached, and the layers made different, at a size where latents matter (TEXTS has a test of that)
    without chaos: a random projector that is much larger multiplies rounding errors by ten per latent."""
    model = litereason.attach(model, tokenizer=tok)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.reasoning_projector.parameters():
            p.normal_(0.0, 0.17, generator=generator)
    return model


@pytest.fixture
def model(tok):
    # + 3: as in Qwen, ids that no text has
    return with_projector(random_qwen2(len(tok) + 3, tok.eos_token_id), tok)


# ---------------------------------------------------------------- a policy that writes what a test wants
def write(model, tok, prompts, texts, limit=40, samples=1, seed=0, **settings):
    """generate(), but row i samples the tokens of texts[i] one after the other (then "x"),
    with their true log-probs.

    generate draws one random number per row and step up front, so the number that `sample` gets tells
    whose turn it is.
    """
    with scripted(tok, texts, limit, seed):
        return litereason.generate(model, tok, prompts, samples=samples, max_new_tokens=limit,
                                   generator=torch.Generator().manual_seed(seed), **settings)


@contextlib.contextmanager
def scripted(tok, texts, limit, seed=0):
    """While this lasts `sample` gives row i the tokens of texts[i]; -> the random numbers (rows, limit)
    that say who a row is."""
    draws = torch.rand(len(texts), limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row_of = {u: row for row, line in enumerate(draws.tolist()) for u in line}
    scripts = [iter(tok.encode(t) if isinstance(t, str) else t) for t in texts]  # texts, or token ids
    after = tok.encode("x")[-1]

    def sample(logits, u, temperature, top_k, top_p):
        token = torch.tensor([next(scripts[row_of[x]], after) for x in u.tolist()])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return token, (logits / temperature).log_softmax(-1).gather(-1, token[:, None])[:, 0]

    original, litereason.sample = litereason.sample, sample
    try:
        yield draws
    finally:
        litereason.sample = original


LIMIT = 40
PROMPTS = ["the story of Karl", "abc", f"a tag in a story: {tag(3)} is text", "x y"]
TEXTS = [
    f"ab{tag(3)}cd{tag(2)}.<eos>",             # two tags
    f"a long way to the first tag{tag(1)}q",   # one later than the others'; cut by the limit
    f"b.{tag(4)}{tag(5)}\n{tag(1)}<eos>",      # three in a row, with merged ends; a tag is the last text
    "no tag.<eos>",                            # ends early, without one
    "z" * (LIMIT - 11) + tag(5),               # the limit cuts the block after 2 latents
    "z" * (LIMIT - 9) + tag(5),                # the limit is at the tag's last token: no latent
    f"{tag(99)}ok<eos>",                       # above the cap; ends early
    f"{tag(0)}<implicit_thought>ab{tag(2)}c",  # only the last one is a tag
]  # two for each prompt
LATENTS = [5, 1, 10, 0, 2, 0, 5, 2]
TAGS = [2, 1, 3, 0, 1, 0, 1, 1]


@pytest.fixture
def rollouts(model, tok):
    return write(model, tok, PROMPTS, TEXTS, LIMIT, samples=2)


@pytest.fixture
def forwards(monkeypatch):
    """A list that fills with (rows, columns) of each forward pass but those of scoring."""
    shapes, forward = [], kv_cache.forward
    monkeypatch.setattr(kv_cache, "forward",
                        lambda m, x, *rest: shapes.append(tuple(x.shape[:2])) or forward(m, x, *rest))
    return shapes


# ---------------------------------------------------------------- runs of the tiny model
STORIES = functools.cache(tiny.examples)  # every run makes the same; they take a second


@pytest.fixture(scope="module", autouse=True)
def stories_made_once(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_data":  # which asks whether they are the same again
            patch.setattr(tiny, "examples", STORIES)
        yield


SIZES = ("--device", "cpu", "--n", 1, "--steps", 4, "--train-prompts", 8, "--prompts", 4,
         "--num-generations", 4, "--minibatches", 2, "--max-new-tokens", 60, "--save-every", 1,
         "--show-every", 0, "--projector-steps", 2, "--trace-prompts", 24, "--targets", "none", "--val", 2)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of all three stages, from the base to the table: four steps in two batches, an epoch and its
    refresh. Beside it is what it said. Tests read it or copy it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["train_rl.py", *map(str, SIZES), "--out", str(out)])
        patch.setattr(tiny, "examples", STORIES)
        train_rl.main()
    (out.parent / "said").write_text(said.getvalue())
    return out


# ---------------------------------------------------------------- the projector, spelt out
# The reference for everything else is the definition that litereason.py opens with: naive_generate, and
# naive_score (here: naive).
naive = litereason.naive_score


def project(model, h):
    for mlp in model.reasoning_projector:
        h = mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h))
    return h
