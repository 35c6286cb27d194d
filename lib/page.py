"""The page of answers that eval.py --show N --html FILE writes; a reader of the paper may skip it.

    section     a model's answers, the wrong ones first
    whole       the sections as one file of HTML

The page needs nothing else: no network and no script. Its Content-Security-Policy forbids both, so that a
story cannot bring a script even if an escape were forgotten. Every text of a story or a model goes through
html.escape."""
import html
import math
import re

from data import boxed
from lib import display
from litereason import CLOSE, OPEN, TAG, parse_tags

HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Answers with their latents</title><style>
:root { color-scheme: light dark;
  --back: #fdfdfb; --text: #1c1c1c; --soft: #5c5c5c; --line: #d4d4ce; --box: #f1f1ec; --latent: #6a3fb0;
  --ok: #1d6b34; --no: #a8271c }
@media (prefers-color-scheme: dark) { :root {
  --back: #17181a; --text: #e8e6e1; --soft: #a5a39d; --line: #3d3f43; --box: #222428; --latent: #c0a2f5;
  --ok: #77cf91; --no: #ff9385 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: .75rem; max-width: 84rem;
  background: var(--back); color: var(--text); font: 1rem/1.55 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .25rem 0 .5rem }
h2 { font-size: 1.2rem; margin: 2rem 0 .25rem; overflow-wrap: anywhere }
h3 { font-size: .875rem; margin: 0 0 .35rem }
p { margin: .35rem 0; max-width: 46rem }
.count { font-size: 1.1rem }
.soft { color: var(--soft); font-weight: normal }
.right { color: var(--ok); font-weight: 600 }
.wrong { color: var(--no); font-weight: 600 }

/* An answer: a line, and what it unfolds to. */
summary { cursor: pointer }
summary:focus-visible, .text:focus-visible { outline: 2px solid var(--latent); outline-offset: -2px }
article { border-top: 1px solid var(--line) }
article:last-of-type { border-bottom: 1px solid var(--line) }
.answer > summary { display: flex; flex-wrap: wrap; gap: 0 .7rem; padding: .5rem .25rem; list-style: none;
  font-size: .875rem }
.answer > summary::-webkit-details-marker { display: none }
.answer > summary::before { content: "\\25b8"; color: var(--soft); width: .75rem }
.answer[open] > summary::before { content: "\\25be" }
.answer > summary:hover { background: var(--box) }
.answer > summary > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  font-variant-numeric: tabular-nums; min-width: 0; max-width: 100% }
.answer > summary > .first { flex-basis: 100%; color: var(--soft) }
.sides { display: grid; gap: 1.25rem; padding: .5rem .25rem 1.5rem }
.sides > section { min-width: 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.asked .text { max-height: 24rem; overflow: auto; padding: .6rem .75rem; background: var(--box);
  border-radius: .35rem }
.tag { font-size: .8rem; color: var(--soft) }
@media (min-width: 700px) {
  .answer > summary { display: grid; gap: 0 .75rem; font-size: 1rem;
    grid-template-columns: .75rem 2.5rem 6rem 7.5rem 5.75rem 3.75rem 5.5rem 4rem minmax(0, 1fr) }
  .number, .amount { text-align: right }
}
@media (min-width: 1000px) {
  .sides { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 2rem }
  .asked { position: sticky; top: .75rem; align-self: start }
  .asked .text { max-height: calc(100vh - 4rem) }
}

/* A block of latents, and its table. */
.latents { display: inline-block; white-space: normal; margin: 0 .2rem }
.latents[open] { display: block; margin: .5rem 0 }
.latents > summary { display: inline-block; color: var(--latent);
  border: 1px solid; border-radius: 1rem; padding: 0 .7rem; line-height: 1.4 }
.latents > summary::-webkit-details-marker { display: none }
.latents > summary::before { content: "\\25b8  " }
.latents[open] > summary::before { content: "\\25be  " }
table { border-collapse: collapse; width: 100%; font-size: .875rem; margin-top: .5rem; \
background: var(--box) }
th, td { text-align: left; vertical-align: top; padding: .35rem .4rem; border-top: 1px solid var(--line) }
th:last-child, td:last-child { text-align: right }
td div { display: flex; align-items: baseline; justify-content: space-between; gap: .5rem; max-width: 13rem }
code { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; line-height: 1.4 }
small, .length { white-space: nowrap; font-variant-numeric: tabular-nums; color: var(--soft) }
</style></head><body><h1>Answers with their latents</h1><details><summary>How to read this page</summary>
<p>Each line is an answer; its number is the example's place in the split, and its tokens count the latents
too. It unfolds to what the model was asked and what it wrote. Where the model stopped writing and ran latent
steps stands a button such as <b>4 latents</b>, which unfolds to one line for each.</p>
<p><b>Read by the LM head</b>: the words that the model would say if the latent were its last state, with
their probabilities. <b>Nearest words</b>: those whose embeddings point its way, with the cosine of the angle
between them (1: the same way; 0: no relation). <b>Length</b>: in units of an embedding's mean length. The
words near a latent do not prove what it does; eval.py --controls tests that.</p></details>
"""


def whole(sections):
    """[section] -> the page"""
    return HEAD + "\n".join(sections) + "</body></html>\n"


# ============================================================ the answers of a model
def section(said, row, model, tokenizer, task, examples, rollouts, rewards, n):
    """The n answers that earned least, the wrong ones first and else in the order of the split, under what is
    to be said of all of them.

    said: display.what_was_asked; row: of the table; rollouts and rewards: one for each example."""
    worst_first = sorted(range(len(rewards)), key=rewards.__getitem__)
    shown = worst_first[:n]
    answers = [answer(model, tokenizer, task, examples[i], rollouts[i], rewards[i], i + 1) for i in shown]
    name = html.escape(row.get("name", row["model"]))
    has_verdicts = hasattr(task, "answer")
    count = (_count_of_verdicts(rewards, len(shown)) if has_verdicts else
             _count_of_rewards(rewards, len(shown)))
    only_first = " Of several answers to an example this page has the first." if row["samples"] > 1 else ""
    return (f'<section><h2>{name}</h2>\n<p class="count">{count}{only_first}</p>\n'
            f'<p class="soft">{html.escape(said)}: {_about(row, has_verdicts)}</p>\n'
            f"{''.join(answers)}</section>")


def _count_of_verdicts(rewards, n_shown):
    wrong = sum(not is_right(reward) for reward in rewards)
    right = len(rewards) - wrong
    return (f'<span class="wrong">✗ {wrong:,} wrong</span>, <span class="right">✓ {right:,} right</span> '
            f"of {len(rewards):,} answers. " + _what_is_below(n_shown, len(rewards), "wrong ones first"))


def _count_of_rewards(rewards, n_shown):
    return f"{len(rewards):,} answers. " + _what_is_below(n_shown, len(rewards), "the lowest rewards first")


def _what_is_below(n_shown, n, order):
    if n_shown == n:
        return f"All of them are below, {order}."
    return f"Below are {n_shown:,} of them, {order}: they are no fair sample."


def _about(row, has_verdicts):
    """What the table says of all answers, in words."""
    score = f"mean reward {plainly(row['accuracy'])}"
    interval = " to ".join(plainly(end) for end in row["accuracy_ci95"])
    if has_verdicts:
        score = f"{100 * row['accuracy']:.1f} % right"
        interval = " to ".join(f"{100 * end:.1f}" for end in row["accuracy_ci95"]) + " %"
    return (f"{score} (95 % interval {interval}); {row['tokens']:,.1f} tokens per answer, "
            f"{row['text_tokens']:,.1f} of text and {row['latent_steps']:,.1f} latents.")


# ============================================================ an answer
def is_right(reward):
    """Of tasks that have a right answer."""
    return reward > 0


def answer(model, tokenizer, task, example, rollout, reward, number):
    """One answer: a line which unfolds to the question beside what the model wrote."""
    line = _line_of_answer(task, example, rollout, reward, number)
    asked = html.escape(tokenizer.decode(rollout.prompt_ids))
    cut_off = "" if rollout.finished else ", cut off at the length limit"
    return (f'<article><details class="answer"><summary>{line}</summary><div class="sides">'
            f'<section class="asked"><h3>Asked <span class="soft">({_n(len(rollout.prompt_ids), "token")})'
            f'</span></h3><div class="text" tabindex="0">{asked}</div></section>'
            f'<section><h3>Answered <span class="soft">({_n(len(rollout.slots), "token")}, '
            f"{rollout.n_latents:,} of them latent{cut_off})</span></h3>"
            f'<div class="text">{_body(model, tokenizer, rollout)}</div></section>'
            f"</div></details></article>\n")


def _line_of_answer(task, example, rollout, reward, number):
    """Number, verdict, gold, tokens, tags, latents, whether it was cut off, and the first words."""
    verdict = f"<span>reward {plainly(reward)}</span>"
    gold = ""
    if hasattr(task, "answer"):
        verdict = '<span class="wrong">✗ wrong</span>'
        if is_right(reward):
            verdict = '<span class="right">✓ right</span>'
        right_answer = task.answer(example)
        gold = f"gold: {boxed(right_answer) or right_answer}"
    first = " ".join(TAG.sub(" ", rollout.text).split())[:200] or "(no words)"
    return (f'<span class="number soft">{number:,}</span>{verdict}<span>{html.escape(gold)}</span>'
            f'<span class="amount">{_n(len(rollout.slots), "token")}</span>'
            f'<span class="amount">{_n(len(parse_tags(rollout.text)), "tag")}</span>'
            f'<span class="amount">{_n(rollout.n_latents, "latent")}</span>'
            f'<span>{"" if rollout.finished else "cut off"}</span>'
            f'<span class="first">{html.escape(first)}</span>')


def _n(number, what):
    """1 tag, 2 tags"""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _body(model, tokenizer, rollout):
    """What the model wrote, its blocks of latents to be unfolded."""
    latents = display.read_out(model, tokenizer, rollout.latents)
    lines = [_line_of_latent(i + 1, *latent) for i, latent in enumerate(latents)]
    body = ""
    n_shown = 0
    for piece in display.pieces(tokenizer, rollout):
        if isinstance(piece, str):
            body += _text(piece)
        else:
            body += _block(lines[n_shown : n_shown + piece])
            n_shown += piece
    return body


def _text(text):
    """Escaped; the ends of tags are made small."""
    tag_ends = f"({html.escape(OPEN)}|{html.escape(CLOSE)})"
    return re.sub(tag_ends, r'<span class="tag">\1</span>', html.escape(text))


def _block(lines):
    """A block of latents. lines: of its table."""
    return (f'<details class="latents"><summary>{_n(len(lines), "latent")}</summary><table><thead><tr>'
            f"<th>#</th><th>Read by the LM head</th><th>Nearest words</th><th>Length</th></tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></details>")


def _line_of_latent(number, near, length, head):
    """A line of a block's table, from what display.read_out says of the latent."""
    said = _words([(word, percent(probability)) for word, probability in head])
    nearest = _words([(word, f"{cosine:.2f}") for word, cosine in near])
    return (f"<tr><td>{number}</td><td>{said}</td><td>{nearest}</td>"
            f'<td class="length">{plainly(length)} times</td></tr>')


def _words(words):
    """words: [(word, its number as text)]"""
    cells = ""
    for word, number in words:
        shown = html.escape(word).replace("\n", "⏎")
        cells += f"<div><code>{shown}</code> <small>{html.escape(number)}</small></div>"
    return cells


# ============================================================ numbers for readers
def plainly(number):
    """Three digits at most that say something, thousands apart, no exponent: 7,290; 36.4; 0.012."""
    if not math.isfinite(number) or number == 0:
        return f"{number:.0f}"
    if abs(number) < 0.001:
        return "below 0.001" if number > 0 else "above -0.001"
    after_the_point = 2 - math.floor(math.log10(abs(number)))
    return f"{round(number, after_the_point):,.{min(3, max(0, after_the_point))}f}"


def percent(share):
    """A probability; 0 % and 100 % are only what is exactly that."""
    if 0 < share < 0.01:
        return "<1 %"
    if 0.99 < share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"
