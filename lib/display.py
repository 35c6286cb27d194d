"""What people see: tables, an answer as text; a first reading can skip it.
"""
import html
import itertools

import torch

from lib import checkpoint, kv_cache
from litereason import LATENT, generate


# ============================================================ tables
def what_was_asked(args, n, samplings):
    """The line above a table of eval.py: task, split, number of examples and the sampling (or samplings, by
    name)."""
    each = f", {args.samples} answers each" if args.samples > 1 else ""
    words = [sampling_in_words(sampling) for sampling in samplings.values()]
    if len(words) > 1:
        words = [f"{name}: {text}" for name, text in zip(samplings, words)]
    return f"{args.task}, {args.split} split, {n} examples{each}, {'; '.join(words)}, seed {args.seed}"


def sampling_in_words(sampling):
    """sampling: arguments of generate."""
    if sampling["temperature"] == 0:
        return "greedy"
    cut = f"top-p {sampling['top_p']:g}, top-k {sampling['top_k'] or 'off'}"
    return f"temperature {sampling['temperature']:g}, {cut}"


def table(rows, measure="accuracy"):
    """rows: [(name, result of eval.evaluate)] -> a table as text, which is Markdown as well, and under it
    what the task itself reports. measure: what the task's scores are called. The columns:

    accuracy    or `measure`: mean reward, and its 95 % interval over examples
    tokens      per answer: text + latent
    text        sampled tokens per answer, those of the tags included
    latent      latent steps per answer
    z size      median size of what latent steps fed, in sizes of an embedding
    tags        tags per answer that ran latents
    cut off     share of answers that reached the length limit
    positions   computed per answer, those of its prompt and those wasted on rows that had ended included
    seconds     for all answers together
    """
    lines = [f"| model | {measure} | 95 % interval | tokens | text | latent "
             "| z size | tags | cut off | positions | seconds |",
             f"|{'---|' * 11}"]
    width = max(len(name) for name, _ in rows)
    for name, row in rows:
        cells = [
            *_first_cells(name, width, row),
            f"{row['z_size']:.3g}" if row.get("z_size") else "",  # earlier tables have none
            f"{row['tags']:.2f}",
            f"{row['truncated']:.3f}",
            f"{row['forward_positions']:.1f}",
            f"{row['seconds']:.1f}"]
        lines.append(_table_line(cells))
    for name, row in rows:
        keys = list(row)
        own = keys[keys.index("seconds") + 1 :]  # the task's own figures come after the seconds
        if own:
            figures = [f"{key} {_number_or_interval(row[key])}" for key in own]
            lines.append(f"\n{name.strip()}: {', '.join(figures)}")
    return "\n".join(lines)


def controls_table(rows, measure="accuracy"):
    """rows: [(control, result)] of eval.run_controls -> a table as text. What is gained is gained over the
    plain run, which comes first; eval.judge says what differs. measure: what the task's scores are called."""
    lines = ["| control | accuracy | 95 % interval | tokens | text | latent "
             "| accuracy gained | 95 % interval | p | Holm's p "
             "| tokens gained | 95 % interval | p | Holm's p | differs in |",
             f"|{'---|' * 15}"]
    width = max(len(name) for name, _ in rows)
    for i, (name, row) in enumerate(rows):
        cells = _first_cells(name, width, row)
        if i == 0:
            lines.append(_table_line(cells + [""] * 9))
            continue
        gained = row["against_plain"]
        for what, digits in (("accuracy", "+.3f"), ("tokens", "+.1f")):
            cells += [
                f"{gained[what]:{digits}}",
                _interval(gained[f"{what}_ci95"], digits),
                f"{gained[f'{what}_p']:.2g}",
                f"{gained[f'{what}_holm']:.2g}"]
        lines.append(_table_line([*cells, what_differs(gained)]))
    text = "\n".join([*lines, "", HOW_IT_IS_TESTED.format(n=2 * (len(rows) - 1))])
    return text.replace("accuracy", measure)


HOW_IT_IS_TESTED = """p: McNemar's (accuracy) and that of sign flips (tokens), paired by example; Holm's p \
is corrected for all {n} tests of
this table. "differs in": Holm's p is below 0.05 and the 95 % interval (bootstrap) leaves 0 out."""


def what_differs(comparison):
    """In words, of a comparison that eval.judge has judged."""
    if comparison["accuracy_differs"]:
        return "accuracy and tokens" if comparison["tokens_differs"] else "accuracy, not tokens"
    return "tokens, not accuracy" if comparison["tokens_differs"] else "nothing"


def _first_cells(name, width, row):
    """Those that both tables have."""
    return [
        f"{name:{width}}",
        f"{row['accuracy']:.3f}",
        _interval(row["accuracy_ci95"]),
        f"{row['tokens']:.1f}",
        f"{row['text_tokens']:.1f}",
        f"{row['latent_steps']:.1f}"]


def _table_line(cells):
    return f"| {' | '.join(cells)} |"


def _interval(numbers, digits=".3f"):
    return " to ".join(f"{x:{digits}}" for x in numbers)


def _number_or_interval(value):
    return _interval(value) if isinstance(value, list) else f"{value:.3f}"
METHODS = {"litereason": "LiteReason", "grpo": "RL without latents", "tag": "RL with tags, no latents"}


# ============================================================ an answer as text
def pieces(tokenizer, rollout):
    """A rollout's slots as a list of texts and, where a block of latents stands, of their number."""
    out = []
    for is_latent, block in itertools.groupby(rollout.slots, LATENT.__eq__):
        slots = list(block)
        out.append(len(slots) if is_latent else tokenizer.decode(slots))
    return out


def readable(tokenizer, rollout):
    """A rollout's text with its latent blocks shown as such: .. </implicit_thought>[3 latents] .."""
    text = ""
    for piece in pieces(tokenizer, rollout):
        text += piece if isinstance(piece, str) else f"[{_n_latents(piece)}] "
    return text if rollout.finished else text + " [cut off]"


def _n_latents(n):
    return f"{n} latent{'s' * (n > 1)}"


@torch.no_grad()
def read_out(model, tokenizer, latents, n_words=3):
    """What the vocabulary says of latents (n, D) -> [(near, length, head)], one for each.

    near      the n_words words whose embeddings point its way: [(word, cosine)]
    length    its norm, in units of the mean norm of an embedding
    head      the n_words words that the LM head says if the latent goes through the final norm:
              [(word, probability)]
    """
    embed = model.get_input_embeddings()
    ids = torch.arange(embed.num_embeddings, device=model.device)
    vocabulary = embed(ids).float()  # (V, D); not embed.weight: Gemma scales
    z = latents.to(vocabulary.device).float()
    directions = torch.nn.functional.normalize(vocabulary, dim=-1)
    cosines = torch.nn.functional.normalize(z, dim=-1) @ directions.T  # (n, V)
    with kv_cache.autocast(model):
        logits = model.lm_head(model.model.norm(z.to(model.dtype)))
        probabilities = logits.float().softmax(-1)  # (n, V)
    lengths = z.norm(dim=-1) / vocabulary.norm(dim=-1).mean()  # (n,)
    near = _top_words(tokenizer, cosines, n_words)
    head = _top_words(tokenizer, probabilities, n_words)
    return list(zip(near, lengths.tolist(), head))


def _top_words(tokenizer, scores, n_words):
    """scores (n, V) -> for each row its best [(word, score)]."""
    top = scores.topk(n_words)
    return [[(tokenizer.decode([i]), value) for i, value in zip(ids, values)]
            for ids, values in zip(top.indices.tolist(), top.values.tolist())]


def nearest_words(model, tokenizer, latents, n_words=3):
    """The same with the words as text."""
    lines = read_out(model, tokenizer, latents, n_words)
    return [(_listed(near), length, _listed(head)) for near, length, head in lines]


def _listed(words):
    return ", ".join(f"{word!r} {value:.2f}" for word, value in words)


# ============================================================ chapters
def write_chapters(task, examples, plans, n, sampling, file):
    """For people to read: the frozen LM writes the next chapter of n examples with its plan, without one, and
    with the plan of the next example, in a table beside the true one.

    The random numbers are the same for all three, and none is longer than the true chapter. After each
    example the file is flushed, so that a stop loses nothing."""
    model, tokenizer = task.scorer()
    for i, example in enumerate(examples[:n]):
        own_plan = plans[i]
        other_plan = plans[(i + 1) % len(plans)]
        with kv_cache.autocast(model):
            chapters = [_write_chapter(model, tokenizer, task, example, plan, i, sampling)
                        for plan in (own_plan, "", other_plan)]
        cells = [_in_a_cell(text) for text in (*chapters, example["chapter"])]
        file.write(f"\n## {example.get('book', 'Story')}, {example.get('number', i + 1)}\n\n"
                   f"Its plan: {_in_a_cell(own_plan) or '(none)'}\n\n"
                   f"The other plan: {_in_a_cell(other_plan) or '(none)'}\n\n"
                   f"| with its plan | without a plan | with the other plan | the true chapter |\n"
                   f"|---|---|---|---|\n"
                   f"{_table_line(cells)}\n")
        file.flush()


def _write_chapter(model, tokenizer, task, example, plan, seed, sampling):
    prompt = checkpoint.encode_text(tokenizer, task.chapter_prompt(example, plan), begins=True)
    true_length = len(checkpoint.encode_text(tokenizer, example["chapter"], begins=True))
    room = model.config.max_position_embeddings - len(prompt)
    rollout, = generate(model, tokenizer, [prompt], 1, max(1, min(true_length, room)), latent="none",
                        generator=torch.Generator().manual_seed(seed), **sampling)
    return rollout.text


def _in_a_cell(text):
    """As the text of one cell of a Markdown table."""
    return html.escape(text.strip()).replace("|", "&#124;").replace("\n", "<br>")
