"""The page of answers that eval.py --show N --html FILE writes; a reader of the paper may skip it.

The page needs nothing else: no network and no script. Its Content-Security-Policy forbids both, so that a
story cannot bring a script even if an escape were forgotten. Every text of a story or a model goes through
html.escape."""
import html
import re

from lib import display

HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Answers with their latents</title><style>
:root { color-scheme: light dark; --back: #fdfdfb; --text: #1c1c1c; --soft: #5c5c5c; --line: #d4d4ce;
  --box: #f1f1ec; --latent: #6a3fb0; --ok: #1d6b34; --no: #a8271c }
@media (prefers-color-scheme: dark) { :root { --back: #17181a; --text: #e8e6e1; --soft: #a5a39d;
  --line: #3d3f43; --box: #222428; --latent: #c0a2f5; --ok: #77cf91; --no: #ff9385 } }
body { margin: 0 auto; padding: .75rem; max-width: 52rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif }
h1 { font-size: 1.4rem }
h2 { font-size: 1.2rem; overflow-wrap: anywhere }
summary { cursor: pointer; padding: .4rem 0 }
article { border-top: 1px solid var(--line) }
.soft, .tag, small { color: var(--soft) }
.right { color: var(--ok); font-weight: 600 }
.wrong { color: var(--no); font-weight: 600 }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.asked { max-height: 20rem; overflow: auto; padding: .6rem; background: var(--box) }
.tag { font-size: .8rem }
.latents { display: inline-block; white-space: normal }
.latents[open] { display: block }
.latents > summary { display: inline-block; padding: 0 .7rem; border: 1px solid; border-radius: 1rem;
  color: var(--latent) }
table { border-collapse: collapse; width: 100%; font-size: .85rem; background: var(--box) }
th, td { text-align: left; vertical-align: top; padding: .3rem .4rem; border-top: 1px solid var(--line) }
code { white-space: pre-wrap; overflow-wrap: anywhere }
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
    return HEAD + "\n".join(sections) + "</body></html>\n"


def section(said, row, measure, model, tokenizer, task, examples, rollouts, rewards, n):
    """The n answers that earned least, the lowest reward first and else in the order of the split, under what
    is to be said of all of them.

    said: eval.what_was_asked; row: of the table; measure: what its accuracy is; rollouts and rewards: one for
    each example."""
    shown = sorted(range(len(rewards)), key=rewards.__getitem__)[:n]
    answers = [answer(model, tokenizer, task, examples[i], rollouts[i], rewards[i], i + 1) for i in shown]
    low, high = row["accuracy_ci95"]
    count = f"{len(rewards):,} answers"
    if hasattr(task, "answer"):
        right = sum(reward > 0 for reward in rewards)
        count = (f'<span class="wrong">✗ {len(rewards) - right:,} wrong</span>, '
                 f'<span class="right">✓ {right:,} right</span> of {count}')
    below = "all of them" if len(shown) == len(rewards) else f"{len(shown):,}, which are no fair sample"
    return (f"<section><h2>{html.escape(row['name'])}</h2>\n"
            f"<p>{count}. Below are {below}: the lowest rewards first.</p>\n"
            f'<p class="soft">{html.escape(said)}: {measure} {number(row["accuracy"])} '
            f"(95 % interval {number(low)} to {number(high)}); {number(row['tokens'])} tokens per answer, "
            f"{number(row['text_tokens'])} of text and {number(row['latent_steps'])} latents.</p>\n"
            f"{''.join(answers)}</section>")


def answer(model, tokenizer, task, example, rollout, reward, place):
    """One answer: a line which unfolds to the question and what the model wrote."""
    verdict = f"reward {number(reward)}"
    if hasattr(task, "answer"):
        said = '<span class="right">✓ right' if reward > 0 else '<span class="wrong">✗ wrong'
        verdict = f"{said}</span>, gold: {html.escape(task.answer(example))}"
    cut_off = "" if rollout.finished else ", cut off"
    first = html.escape(" ".join(rollout.text.split())[:150])
    asked = html.escape(tokenizer.decode(rollout.prompt_ids))
    costs = ", ".join([counted(len(rollout.slots), "token"), counted(rollout.n_tags, "tag"),
                       counted(rollout.n_latents, "latent")])
    return (f"<article><details><summary>{place:,} {verdict}, {costs}{cut_off} "
            f'<span class="soft">{first}</span></summary>\n'
            f'<h3>Asked</h3><div class="text asked" tabindex="0">{asked}</div>\n'
            f'<h3>Answered</h3><div class="text">{body(model, tokenizer, rollout)}</div>'
            f"</details></article>\n")


def body(model, tokenizer, rollout):
    """What the model wrote, its blocks of latents to be unfolded."""
    lines = []  # of tables: one for each latent
    for i, (near, length, head) in enumerate(display.read_out(model, tokenizer, rollout.latents)):
        said = words([(word, f"{100 * probability:.0f} %") for word, probability in head])
        nearest = words([(word, f"{cosine:.2f}") for word, cosine in near])
        lines.append(f"<tr><td>{i + 1}</td><td>{said}</td><td>{nearest}</td><td>{number(length)}</td></tr>")
    written = ""
    for piece in display.pieces(tokenizer, rollout):
        if isinstance(piece, str):
            tag = r'<span class="tag">\1</span>'
            written += re.sub("(&lt;/?implicit_thought&gt;)", tag, html.escape(piece))
            continue
        written += (f'<details class="latents"><summary>{counted(piece, "latent")}</summary><table>'
                    "<tr><th>#</th><th>Read by the LM head</th><th>Nearest words</th><th>Length</th></tr>"
                    f"{''.join(lines[:piece])}</table></details>")
        del lines[:piece]
    return written


def words(numbered):
    """numbered: [(word, its number as text)]"""
    shown = [(html.escape(word).replace("\n", "⏎"), text) for word, text in numbered]
    return "<br>".join(f"<code>{word}</code> <small>{text}</small>" for word, text in shown)


def counted(n, what):  # 1 tag, 2 tags
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
