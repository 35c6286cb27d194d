"""What people see: tables, an answer as text; a first reading can skip it.
"""
import itertools

import torch

from lib import checkpoint, kv_cache
from litereason import LATENT, generate


# ============================================================ tables
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

    Of results of eval.run_controls, instead of the last five: what each has gained over the plain run, the
    first row, and what differs (eval.judge)."""
    are_tested = "against_plain" in rows[-1][1]
    headings = ["control" if are_tested else "model", measure, "95 % interval", "tokens", "text", "latent"]
    if are_tested:
        for what in (measure, "tokens"):
            headings += [f"{what} gained", "95 % interval", "p", "Holm's p"]
        headings += ["differs in"]
    else:
        headings += ["z size", "tags", "cut off", "positions", "seconds"]
    lines = [_line(headings), f"|{'---|' * len(headings)}"]
    width = max(len(name) for name, _ in rows)
    for i, (name, row) in enumerate(rows):
        cells = [f"{name:{width}}", f"{row['accuracy']:.3f}", _interval(row["accuracy_ci95"])]
        cells += [f"{row[key]:.1f}" for key in ("tokens", "text_tokens", "latent_steps")]
        if are_tested:
            cells += _cells_of_tests(row["against_plain"], measure) if i > 0 else [""] * 9
        else:
            cells += [
                f"{row['z_size']:.3g}" if row.get("z_size") else "",  # earlier results have none
                f"{row['tags']:.2f}",
                f"{row['truncated']:.3f}",
                f"{row['forward_positions']:.1f}",
                f"{row['seconds']:.1f}"]
        lines.append(_line(cells))
    if are_tested:
        lines += ["", HOW_IT_IS_TESTED.format(n=2 * (len(rows) - 1))]
    for name, row in rows if not are_tested else []:
        keys = list(row)
        own = keys[keys.index("seconds") + 1 :]  # the task's own figures come after the seconds
        if own:
            figures = [f"{key} {_number_or_interval(row[key])}" for key in own]
            lines.append(f"\n{name.strip()}: {', '.join(figures)}")
    return "\n".join(lines)


HOW_IT_IS_TESTED = """p: of sign flips, paired by example; Holm's p is corrected for all {n} tests of this table.
"differs in": Holm's p is below 0.05 and the 95 % interval (bootstrap) leaves 0 out."""


def _cells_of_tests(gained, measure):
    cells = []
    for what, digits in (("accuracy", "+.3f"), ("tokens", "+.1f")):
        cells += [f"{gained[what]:{digits}}", _interval(gained[f"{what}_ci95"], digits)]
        cells += [f"{gained[f'{what}_p']:.2g}", f"{gained[f'{what}_holm']:.2g}"]
    return [*cells, what_differs(gained).replace("accuracy", measure)]


def what_differs(comparison):
    """In words, of a comparison that eval.judge has judged."""
    if comparison["accuracy_differs"]:
        return "accuracy and tokens" if comparison["tokens_differs"] else "accuracy, not tokens"
    return "tokens, not accuracy" if comparison["tokens_differs"] else "nothing"


def sampling_in_words(sampling):
    """sampling: arguments of generate."""
    if sampling["temperature"] == 0:
        return "greedy"
    cut = f"top-p {sampling['top_p']:g}, top-k {sampling['top_k'] or 'off'}"
    return f"temperature {sampling['temperature']:g}, {cut}"


def _line(cells):
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
