#!/usr/bin/env bash
# transformers 5.23.0, tokenizers as it pins: encode(text, split_special_tokens=True) takes apart the added tokens
# that are marked special, and leaves those that are not. Qwen's <tool_call> is of the second kind: in a story it
# stays one control token, although the flag was set so that a text's tokens are only text.
# Seen 2026-11-29: special <a> -> 3 tokens, added <b> -> 1 token, both with the flag.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("<>ab?")}, unk_token="?"))
letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")
tokenizer.add_tokens([AddedToken("<a>", special=True)], special_tokens=True)
tokenizer.add_tokens([AddedToken("<b>", special=False)])
found = {text: len(tokenizer.encode(text, split_special_tokens=True)) for text in ("<a>", "<b>")}
print(found)
assert found == {"<a>": 3, "<b>": 1}, "the behaviour has changed"
PY
