"""Every model family of the README decodes and scores as the definition says, from the right prompt ids.

Tiny random configs in float64; then what a model, a template and a story do to a prompt."""
import copy
import itertools
import types

import pytest
import torch
import transformers
from conftest import LIMIT, PROMPTS, TEXTS, close, naive, with_projector, write
from test_real_tasks import one_line
from tokenizers.processors import TemplateProcessing

import litereason
from lib import checkpoint
from data import next_chapter as nc
from lib.memory import checkpoint_layers
from litereason import load, logprobs, projector_loss, save, unroll
from lib.checkpoint import encode_prompt, stop_tokens

# head_dim is not 32 / 4: Qwen3 and Gemma do that
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": None}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2, tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, window": (transformers.Qwen2Config,
                      {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "llama, all heads": (transformers.LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1}),
    "gemma3": (transformers.Gemma3TextConfig,
               {"num_hidden_layers": 3, "sliding_window": 9, "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}


def random_model(name, tok, eos):
    config, more = FAMILIES[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(
        vocab_size=len(tok) + 3, eos_token_id=eos, pad_token_id=tok.eos_token_id, **{**SMALL, **more}))


@pytest.fixture(params=FAMILIES)
def family(request, tok):
    """A random model of the family with a projector."""
    model = random_model(request.param, tok, [tok.eos_token_id, len(tok) + 1]).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and "gemma" not in request.param else 0.0, 0.15)
    return with_projector(model, tok)


@torch.no_grad()
def test_decoding_and_scoring_are_the_naive_definition_in_every_family(family, tok):
    """And embeddings are measured as they are fed: Gemma scales what its matrix holds."""
    assert stop_tokens(family, tok) == [0, len(tok) + 1] == family.generation_config.eos_token_id
    rollouts = write(family, tok, PROMPTS, TEXTS, LIMIT, samples=2)
    logp, _ = logprobs(family, rollouts)
    h, latents = unroll(family, rollouts)
    for i in (0, 2, 4, 7):  # several tags, tags in a row, a block cut by the limit, a late tag
        r = rollouts[i]
        n = len(r.slots)
        expected = naive(family, r.prompt_ids, r.slots)
        for found in ((h[i, :n], latents[i], logp[i, :n]), (h[i, :n], r.latents, r.logprobs)):
            for a, b in zip(found, expected, strict=True):
                close(a, b, 1e-5)  # transformers' norms round to float32, save conftest's
    words = litereason.word_embeddings(family)
    fed = family.get_input_embeddings()(torch.arange(len(words)))
    assert torch.equal(words, fed) and torch.equal(litereason.word_embeddings(family, 5), fed[:5])
    close(litereason.PauseToken.start(family).vector, fed.mean(0), 1e-12)


def test_gradients_with_and_without_kept_activations_are_equal_in_every_family(family, tok):
    rollouts = write(family, tok, PROMPTS, TEXTS, LIMIT, samples=2)[:4]

    def gradients():
        family.zero_grad()
        (logprobs(family, rollouts)[0].sum() + projector_loss(family, rollouts)[0]).backward()
        return [p.grad.clone() for p in family.parameters()]

    kept = gradients()
    assert all(g.abs().max() > 0 for g in kept)
    checkpoint_layers(family)
    for a, b in zip(kept, gradients()):
        close(a, b)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_family_survives_saving_and_a_stop_id_of_the_tokenizer_stops_plain_transformers_too(
        name, tok, tmp_path):
    model = with_projector(random_model(name, tok, eos=5), tok)
    assert checkpoint.stop_ids(model) == [5] and stop_tokens(model, tok) == [0, 5]
    save(model, tok, tmp_path / "m")
    again, _ = load(tmp_path / "m", "cpu")
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert stop_tokens(again, tok) == [0, 5]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():  # now it says nothing but the tokenizer's
        plain.lm_head.weight.zero_()
    out = plain.generate(torch.tensor([[7, 8]]), max_new_tokens=9, do_sample=False)
    assert out.tolist() == [[7, 8, 0]]


@pytest.mark.parametrize("config, message", [
    (transformers.Gemma2Config(vocab_size=50, **SMALL), "Gemma2ForCausalLM is none of the families"),
    (transformers.Gemma3TextConfig(vocab_size=50, final_logit_softcapping=30.0, **SMALL),
     "final_logit_softcapping is set"),
    (transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2),
     "GPT2LMHeadModel is none of the families"),
    (transformers.LlamaConfig(vocab_size=50, rope_parameters=DYNAMIC, **SMALL), "longrope or dynamic"),
])
def test_what_can_not_be_supported_is_refused_in_one_line(config, message):
    one_line(message, litereason.attach, transformers.AutoModelForCausalLM.from_config(config))


# ---------------------------------------------------------------- prompts as token ids
ENDS = "assistant\n' }}{% endif %}"  # of Qwen2.5's chat template
STORY = "He said <|im_end|>\n<|im_start|>assistant\n<|endoftext|> and left."


def chat(eos):
    """What encode_prompt asks a model for: its stop tokens."""
    return types.SimpleNamespace(config=types.SimpleNamespace(eos_token_id=eos), generation_config=None)


@pytest.mark.parametrize("text", ["A story.", "\n\n  a story\n", "Grüße, ٣ — 日本"])
def test_a_chat_models_prompt_is_what_its_template_makes_of_the_whole_text_and_a_base_models_the_plain_one(
        real_tok, text):
    """Qwen2.5's base checkpoints ship the chat template, but end at <|endoftext|> only."""
    instruct, base = chat([151645, 151643]), chat(151643)
    ids = encode_prompt(instruct, real_tok, text)
    whole = real_tok.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                         add_generation_prompt=True)
    assert ids == real_tok.encode(whole)
    opened = encode_prompt(instruct, real_tok, text, "In summary:")
    assert opened == ids + real_tok.encode("In summary:")  # after the header of the answer
    assert encode_prompt(base, real_tok, text) == real_tok.encode(text)
    assert encode_prompt(base, real_tok, "A story.", "So") == real_tok.encode("A story. So")
    # what their traces end in
    assert [checkpoint.chat_parts(model, real_tok)[2] for model in (instruct, base)] == [151645, 151643]


@pytest.mark.parametrize("eos", [151643, [151645, 151643]])
def test_special_tokens_in_a_story_are_text(real_tok, eos):
    added = set(real_tok.added_tokens_decoder)
    ids = encode_prompt(chat(eos), real_tok, STORY)
    assert STORY in real_tok.decode(ids)
    assert sum(i in added for i in ids) == (5 if eos != 151643 else 0)  # those of the template
    assert real_tok.encode("<|im_end|>") == [151645]  # asking for text once does not change the tokenizer


def test_added_tokens_that_are_not_special_are_text_too_but_in_the_template(real_tok):
    """Qwen2.5 has <tool_call>, Qwen3 <think>; Gemma's blank ones are how it reads ordinary text."""
    tools = copy.deepcopy(real_tok)
    tools.add_tokens(["<tool_call>", "<think>", "\n\n\n\n"])
    call, think, blank = tools.convert_tokens_to_ids(["<tool_call>", "<think>", "\n\n\n\n"])
    for text, begins in itertools.product(("<tool_call>", "x<think>y", "a story"), (False, True)):
        assert checkpoint.encode_text(tools, text, begins=begins) == real_tok.encode(text)
    assert tools.encode("<tool_call>") == [call] and len(tools) == blank + 1  # the tokenizer is as it was
    assert blank in checkpoint.encode_text(tools, "\n\n\n\n") == tools.encode("\n\n\n\n")
    assert encode_prompt(chat(151643), tools, "x<think>y") == real_tok.encode("x<think>y")
    tools.chat_template = real_tok.chat_template.replace(ENDS, f"{ENDS[:10]}<think>{ENDS[10:]}")
    ids = encode_prompt(chat(151645), tools, "x<think>y<tool_call>")
    assert ids[-1] == think and ids.count(think) == 1 and call not in ids
    assert "user\nx<think>y<tool_call><|im_end|>" in tools.decode(ids)
    example = {"book": "b", "story": "x<think>y", "chapter": "<tool_call>"}
    scorer = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=500, hidden_size=4))
    row, own = nc.scoring_row(scorer, tools, example, "<think>", "<tool_call>")
    assert own == len(real_tok.encode("<tool_call>")) and not {call, think} & {*row.prompt_ids, *row.slots}


def test_a_template_may_take_enable_thinking_or_fail(real_tok):
    words = copy.deepcopy(real_tok)
    thinks = "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    words.chat_template = real_tok.chat_template.replace(ENDS, f"{ENDS[:14]}{thinks}{ENDS[14:]}")
    text = words.decode(encode_prompt(chat(151645), words, "x"))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    words.chat_template = "{{ raise_exception('no\nway') }}"
    one_line("chat template does not work .*: no$", encode_prompt, chat(151645), words, "x")


def test_a_prompt_has_one_bos_and_the_end_of_turn_may_be_the_checkpoints_alone(tok):
    """Llama and Gemma put a BOS before any text, and into their templates; Gemma's tokenizer says <eos>,
    its checkpoint <end_of_turn>."""
    words = copy.deepcopy(tok)
    words.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<turn>", "<end>"]})
    bos, turn, end = words.convert_tokens_to_ids(["<bos>", "<turn>", "<end>"])
    words._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    words.chat_template = ("{{ bos_token }}{% for m in messages %}<turn>{{ m['content'] | trim }}<end>\n"
                           "{% endfor %}<turn>")
    assert encode_prompt(chat(0), words, "ab<end>c") == [bos] + tok.encode("ab<end>c")
    assert (encode_prompt(chat([0, end]), words, "ab<end>c")
            == [bos, turn] + tok.encode("ab<end>c") + [end] + tok.encode("\n") + [turn])
    assert [checkpoint.chat_parts(chat(eos), words)[2] for eos in ([0, end], 0)] == [end, 0]
