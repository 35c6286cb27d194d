"""Where the released code's tags fire, for a model that is to be served or trained on with that code. Not
in the paper, so a first reading can skip it.

The paper's tag is text, and here it fires however a tokenizer cuts it (litereason.tag_table). The released
code looks for token ids: an opening, 1 to 3 tokens that say a number, a closing. Which openings and
closings there are it finds by trying a few neighbours that could merge with < and >; any other merged
neighbour is missed. With --tag-rule released (config entry litereason_tag_rule) rows here follow the same
rule: they fire where its vLLM plugin does.

Known from a description of that code (commit cf68f72), not copied from it. Left out, and why: a digit that
the tokenizer cuts into bytes (Arabic ones, by Qwen's) is no number here, since the table reads whole
tokens; neither is a superscript digit, which stops the released code with an error; a tag in the prompt is
text, as everywhere here, and so is one that begins in the prompt.
"""
import numpy as np

from lib import UserError, checkpoint, decoder

# The neighbours that are tried.
BEFORE = [" ", "\n", ".", ",", "!", "?", ":", ";", '"', "'", ")", "(", "[", "]", ">"]
AFTER = [" ", " </", "\n", "\n\n", "\n\n\n", ".", ",", "!", "?", "</", '"']
MOST_NUMBER = 3  # tokens between opening and closing
MOST = 15  # tokens of a whole tag; the plugin refuses a tokenizer with longer ones


def patterns(tokenizer, opening, closing):
    """-> (ways to write the opening tag, ways to write the closing tag), lists of tuples of token ids.

    A neighbour that stays a token of its own adds nothing; one that merges adds the whole
    encoding of both."""

    def encode(text):
        return tuple(checkpoint.encode_text(tokenizer, text))

    plain = encode(opening)
    starts = {plain}
    for neighbour in BEFORE:
        both = encode(neighbour + opening)
        if both[-len(plain):] != plain:
            starts.add(both)
    plain = encode(closing)
    ends = {plain}
    for neighbour in AFTER:
        both = encode(closing + neighbour)
        if both[: len(plain)] != plain:
            ends.add(both)
    return sorted(starts), sorted(ends)


# While a tag may be on its way, a set of these holds what the tokens so far can be:
#     ("start", ids, j)            j tokens of this opening have been read
#     ("number", k, n, part)       an opening, then k tokens; part 0, 1, 2: before, in, after the digits of n
#     ("end", n, ids, j)           an opening, the number n, and j tokens of this closing
def _read_number(text, n, part, cap):
    """A token's text as part of the number -> (n, part), or None if it is something else. int() reads the
    digits of every script, strip() all kinds of spaces."""
    for char in text:
        if char.isdecimal() and part < 2:
            n, part = min(10 * n + int(char), cap), 1
        elif char.isspace():
            part = 0 if part == 0 else 2
        else:
            return None
    return n, part


def _read_token(state, token, text, starts, ends, cap):
    """One token: (set of items, token) -> (set of items, N if a tag has just ended, else 0)."""
    found = set()
    for item in [*state, *(("start", ids, 0) for ids in starts)]:
        if item[0] == "start":
            _, ids, j = item
            if ids[j] == token:
                is_whole = j + 1 == len(ids)
                found.add(("number", 0, 0, 0) if is_whole else ("start", ids, j + 1))
        elif item[0] == "number":
            _, k, n, part = item
            number = _read_number(text, n, part, cap) if text and k < MOST_NUMBER else None
            if number is not None:
                found.add(("number", k + 1, *number))
            if n > 0:
                found |= {("end", n, ids, 1) for ids in ends if ids[0] == token}
        else:
            _, n, ids, j = item
            if ids[j] == token:
                found.add(("end", n, ids, j + 1))
    for item in found:
        if item[0] == "end" and item[3] == len(item[2]):
            return frozenset(), item[1]  # read to its end; tags do not overlap
    return frozenset(found), 0


def tag_table(tokenizer, opening, closing, cap, vocab_size, device):
    """The rule as an decoder.TagTable over the ids of a vocabulary."""
    starts, ends = patterns(tokenizer, opening, closing)
    longest = max(map(len, starts)) + MOST_NUMBER + max(map(len, ends))
    if longest > MOST:
        raise UserError(f"this tokenizer cuts a tag into up to {longest} tokens, and the released "
                             f"plugin takes no more than {MOST}: leave --tag-rule released out")
    in_patterns = {token for ids in starts + ends for token in ids}

    # (1) The tokens that are told apart: those of the patterns, and one for each text that
    # can be in a number.
    kinds = {}  # (token or None, text or None) -> the tokens that it stands for
    for token, text in enumerate(checkpoint.token_texts(tokenizer)[:vocab_size]):
        is_number = text != "" and all(char.isdecimal() or char.isspace() for char in text)
        text = (text if text.strip() else " ") if is_number else None
        token_itself = token if token in in_patterns else None
        if text or token in in_patterns:
            kinds.setdefault((token_itself, text), []).append(token)

    # (2) Every state that they can reach; 0 is the start, where nothing is on its way.
    states = {frozenset(): 0}
    queue = [frozenset()]
    columns = {kind: [] for kind in kinds}  # kind -> [(next state, n)], one for each state
    for state in queue:
        for kind, column in columns.items():
            reached, n = _read_token(state, *kind, starts, ends, cap)
            if reached not in states:
                states[reached] = len(states)
                queue.append(reached)
            column.append((states[reached], n))

    # (3) The table; class 0 are all other tokens.
    next_state = np.zeros((1 + len(kinds), len(queue)), dtype=np.int64)
    fires = np.zeros_like(next_state)
    classes = np.zeros(vocab_size, dtype=np.int64)
    for number, (kind, column) in enumerate(columns.items(), start=1):
        next_state[number], fires[number] = zip(*column)
        classes[kinds[kind]] = number
    begun = [any(_can_be_nothing_else(tokenizer, item, opening) for item in state) for state in queue]
    return decoder.TagTable(classes, next_state, fires, begun, device)


def _can_be_nothing_else(tokenizer, item, opening):
    """Whether more than "<i" of the tag is written: that may stand in any text."""
    return item[0] != "start" or opening[:3] in tokenizer.decode(list(item[1][: item[2]]))
