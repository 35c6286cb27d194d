"""Traces get their tags as in the paper, checkpoints come back whole, tasks reward the right answer."""
import json
import os
import random

import pytest
import torch
from conftest import PROMPTS, close, random_qwen2, tag
from safetensors import safe_open
from test_real_tasks import one_line
from transformers import AutoModelForCausalLM

from data import SPLITS, has_verdict, load_task
from litereason import CAP, generate, load, parse_tags, save
from train_projector import mask_sentences, sentences_of, split_answer

STORY = "One fine day it rained. Was it cold? It was!\nNobody \"knew.\" It was 3.5 degrees. The end came late"
SENTENCES = ["One fine day it rained.", "Was it cold?", "It was!", "Nobody \"knew.\"", "It was 3.5 degrees.",
             "The end came late"]


def mask(tok, text, ratio, seed=0, cap=CAP):
    return mask_sentences(random.Random(seed), tok, text, ratio, cap)


# ---------------------------------------------------------------- sentences become tags
def test_a_share_of_the_sentences_is_replaced_but_at_least_one_and_no_tag_that_is_there(tok):
    for ratio, expected in ((0.0, 1), (0.25, 1), (0.34, 2), (0.5, 3), (0.99, 5), (1.0, 6)):
        masked = mask(tok, STORY, ratio)
        assert len(parse_tags(masked)) == expected
        assert sum(s in masked for s in SENTENCES) == len(SENTENCES) - expected  # only whole sentences
    for nothing in ("", "\n\n", tag(3), f" {tag(3)}\n{tag(1)} "):
        assert mask(tok, nothing, 0.5) is None
    text = f"First this one. {tag(4)} Then that one. {tag(5)}"  # sentences of 15 and 14 tokens
    assert {mask(tok, text, 0.5, seed) for seed in range(10)} == {
        f"{tag(3)} {tag(4)} Then that one. {tag(5)}", f"First this one. {tag(4)} {tag(2)} {tag(5)}"}


def test_n_is_a_fifth_of_the_sentences_tokens_within_1_and_the_cap(tok):
    for length, n in ((2, 1), (9, 1), (10, 2), (14, 2), (15, 3), (25, 5), (100, 5)):
        sentence = "a" * (length - 1) + "."
        assert len(tok.encode(sentence)) == length
        assert mask(tok, sentence, 1.0) == mask(tok, f"  {sentence}\n", 1.0) == tag(n)
    assert mask(tok, "a" * 99 + ".", 1.0, cap=9) == tag(9)


def test_the_seed_decides_which_sentences_and_one_space_stands_on_each_side_of_a_tag(tok):
    masked = [mask(tok, STORY, 0.34, seed) for seed in range(20)]
    assert masked == [mask(tok, STORY, 0.34, seed) for seed in range(20)] and len(set(masked)) > 5
    for text in masked:
        for a, b, _ in parse_tags(text):
            assert a == 0 or text[a - 1] == " " and text[a - 2] not in " \n"
            assert b == len(text) or text[b] == " " and text[b + 1] not in " \n"
    assert mask(tok, "It was. It is.", 1.0) == f"{tag(1)} {tag(1)}"
    results = {mask(tok, "He ran. It ended. He ran.", 0.34, seed) for seed in range(30)}
    assert {f"{tag(1)} It ended. He ran.", f"He ran. It ended. {tag(1)}"} < results  # of two equal ones


@pytest.mark.parametrize("text, sentences", [
    ("“Wait.” She left. ‘No!’ Then", ["“Wait.”", "She left.", "‘No!’", "Then"]),
    ('"Wait." She left. "Why?" he asked.', ['"Wait."', "She left.", '"Why?"', "he asked."]),
    ("Then… he ran... away. «Oui.» Fin", ["Then…", "he ran...", "away.", "«Oui.»", "Fin"]),
    ("我去。「好！」她说。他来？", ["我去。", "「好！」", "她说。", "他来？"]),
    ("**No.** He is _here._ It (the 3.5.) ends", ["**No.**", "He is _here._", "It (the 3.5.)", "ends"])])
def test_a_sentence_ends_with_what_closes_it(text, sentences):
    assert sentences_of(text) == sentences


def test_the_answer_begins_at_the_last_marker():
    assert (split_answer("So \\boxed{No} or, no: \\boxed{Yes}.")
            == ("So \\boxed{No} or, no: ", "\\boxed{Yes}."))
    assert split_answer("Hm. In summary: go.", "In summary:") == ("Hm. ", "In summary: go.")
    assert split_answer("Hm. **In Summary**: go.", "In summary:") == ("Hm. ", "**In Summary**: go.")
    assert split_answer("In summary, no. Hm. in summary: go", "In summary:")[1] == "in summary: go"
    assert split_answer("no answer at all") == split_answer("\\Boxed{No}") == ("", "")
    assert split_answer("*" * 100_000 + "in summary" + "*" * 100_000, "In summary:") == ("", "")  # at once


# ---------------------------------------------------------------- checkpoints
def load64(path):
    return load(str(path), device="cpu", dtype=torch.float64)


def test_a_checkpoint_is_the_same_model_under_the_released_names_and_an_ordinary_one(model, tok, tmp_path):
    model.config.litereason_max_reasoning_steps = 7
    reference = generate(model, tok, PROMPTS, max_new_tokens=10, temperature=0)
    for _ in range(2):  # the second time over the first
        save(model, tok, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]  # nothing temporary is left
    half = load(str(tmp_path / "out"), device="cpu", dtype=torch.bfloat16)[0]
    assert half.dtype == torch.bfloat16 and half.reasoning_projector[0].up_proj.weight.dtype == torch.float32
    again, again_tok = load64(tmp_path / "out")
    weights = model.state_dict()
    assert weights.keys() == again.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in again.state_dict().items())
    assert again.config.litereason_max_reasoning_steps == 7 and not again.training
    assert again_tok.get_vocab() == tok.get_vocab()
    for a, b in zip(generate(again, again_tok, PROMPTS, max_new_tokens=10, temperature=0), reference):
        assert a.slots == b.slots and torch.equal(a.logprobs, b.logprobs)

    config = json.load(open(tmp_path / "out" / "config.json"))
    assert config["is_litereason_model"] is True and config["litereason_num_reasoning_layers"] == 3
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        names = {k for k in f.keys() if k.startswith("reasoning_projector")}
    assert names == {f"reasoning_projector.{i}.{part}_proj.weight" for i in range(3)
                     for part in ("gate", "up", "down")}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = torch.tensor([tok.encode("abc")])
    close(plain(ids).logits, model(ids).logits)


def test_a_model_without_a_projector_starts_from_three_copies_of_its_last_mlp(tok, tmp_path):
    base = random_qwen2(len(tok), tok.eos_token_id)
    base.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    model, _ = load64(tmp_path / "base")
    last = model.model.layers[-1].mlp.state_dict()
    assert len(model.reasoning_projector) == 3 and model.config.litereason_max_reasoning_steps == CAP
    storage = {p.data_ptr() for p in model.parameters()}
    assert len(storage) == len(list(model.parameters()))  # independent: no two share memory
    for mlp in model.reasoning_projector:
        assert all(torch.equal(last[k], v) for k, v in mlp.state_dict().items())
    h = torch.randn(4, 32).double()
    mlp = model.model.layers[-1].mlp
    close(model.reasoning_projector(h), mlp(mlp(mlp(h))))  # no residual, no norm


def test_what_is_no_whole_checkpoint_is_refused_in_one_line(model, tok, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    for name in (tmp_path / "nothing", "./nothing", tmp_path, tmp_path / "file"):
        one_line("no model directory", load, str(name))
    for name, message in ((tmp_path / "bad", ""), ("nobody/nothing", " 'nobody/nothing' from the hub"),
                          ("Qwen9-1B", " 'Qwen/Qwen9-1B' from the hub")):
        one_line(f"cannot load{message}", load, str(name))
    save(model, tok, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    one_line("cannot load", load64, tmp_path / "out")
    one_line("cannot write", save, model, tok, weights / "out")
    os.remove(weights)
    one_line("cannot load", load64, tmp_path / "out")


# ---------------------------------------------------------------- the shipped tasks: examples, prompt, reward
@pytest.mark.parametrize("name", ["tiny", "tiny.next_chapter"])
def test_splits_are_disjoint_and_the_same_every_time_and_prompts_offer_a_tag_only_where_it_is_wanted(name):
    task = load_task(name)
    splits = {s: task.examples(s) for s in SPLITS}
    assert all(rows and rows == task.examples(s) for s, rows in splits.items())
    stories = [row["story"] for rows in splits.values() for row in rows]
    assert len(set(stories)) == len(stories)
    for row in splits["val"][:20]:
        with_tag, without = task.prompt(row, True), task.prompt(row, False)
        assert "implicit_thought" in with_tag and "implicit_thought" not in without
        assert row["story"] in with_tag and row["story"] in without
        assert not parse_tags(with_tag)  # what is offered is no valid tag


@pytest.mark.parametrize("name, read, unread", [
    ("tiny", ["so \\boxed{ Yes }"], ["Yes"]),
    ("tiny.next_chapter", ["In summary : Mara ."], ["In summary :", "Mara .", "In summary : plan :"]),
    ("flawed_fictions", ["\\boxed{yes}", "\\boxed{No.}"],
     ["No", "\\boxed{}", "\\boxed{maybe}", "<contradicted_lines>\\boxed{Yes}</contradicted_lines>"]),
    ("next_chapter", ["In summary: she leaves."], ["In summary:", "She leaves.", "In summary: ---"])])
def test_a_verdict_is_what_the_reward_can_read(name, read, unread):
    task = load_task(name)
    assert [has_verdict(task, text) for text in read + unread] == [True] * len(read) + [False] * len(unread)
