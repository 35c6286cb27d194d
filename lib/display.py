"""What people see: tables, an answer as text; a first reading can skip it."""
import itertools

import numpy as np
import torch

from lib import kv_cache, stats

SHUFFLED = "  shuffled latents"  # the name of a run's last row


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
    first row, and what differs (stats.judge)."""
    are_tested = "against_plain" in rows[-1][1]
    headings = ["control" if are_tested else "model", measure, "95 % interval", "tokens", "text", "latent"]
    if are_tested:
        for what in (measure, "tokens"):
            headings += [f"{what} gained", "95 % interval", "p", "Holm's p"]
        headings += ["differs in"]
    else:
        headings += ["z size", "tags", "cut off", "positions", "seconds"]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    width = max(len(name) for name, _ in rows)
    for i, (name, row) in enumerate(rows):
        cells = [f"{name:{width}}", f"{row['accuracy']:.3f}", _interval(row["accuracy_ci95"])]
        cells += [f"{row[key]:.1f}" for key in ("tokens", "text_tokens", "latent_steps")]
        if are_tested and i == 0:
            cells += [""] * 9
        elif are_tested:
            gained = row["against_plain"]
            for what, digits in (("accuracy", "+.3f"), ("tokens", "+.1f")):
                cells += [f"{gained[what]:{digits}}", _interval(gained[f"{what}_ci95"], digits),
                          f"{gained[f'{what}_p']:.2g}", f"{gained[f'{what}_holm']:.2g}"]
            cells.append(what_differs(gained).replace("accuracy", measure))
        else:
            cells += [f"{row['z_size']:.3g}" if row.get("z_size") else "", f"{row['tags']:.2f}",
                      f"{row['truncated']:.3f}", f"{row['forward_positions']:.1f}", f"{row['seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if are_tested:
        lines += ["", "p: of sign flips, paired by example; Holm's p is corrected for all "
                      f"{2 * (len(rows) - 1)} tests of this table.",
                  '"differs in": Holm\'s p is below 0.05 and the 95 % interval (bootstrap) leaves 0 out.']
        return "\n".join(lines)
    for name, row in rows:
        own = list(row)[list(row).index("seconds") + 1 :]  # the task's own figures come after the seconds
        figures = [f"{key} {_interval(np.atleast_1d(row[key]))}" for key in own]
        lines += [f"\n{name.strip()}: {', '.join(figures)}"] if own else []
    return "\n".join(lines)


def show_table(rows, measure):
    """Prints the table of a run, if it has rows, and what the latents did: its own against shuffled ones."""
    if rows:
        print(f"\n{table([(row['model'], row) for row in rows], measure)}", flush=True)
    if rows and rows[-1]["model"] == SHUFFLED:
        gain = stats.against(rows[-1], rows[-3])
        low, high = gain["accuracy_ci95"]
        print(f"\nwhat the latents did: {gain['accuracy']:+.3f} with shuffled ones against its own (95 % "
              f"interval {low:+.3f} to {high:+.3f}, p {gain['accuracy_p']:.1g})")


def what_differs(comparison):
    """In words, of a comparison that stats.judge has judged."""
    if comparison["accuracy_differs"]:
        return "accuracy and tokens" if comparison["tokens_differs"] else "accuracy, not tokens"
    return "tokens, not accuracy" if comparison["tokens_differs"] else "nothing"


def _interval(numbers, digits=".3f"):
    return " to ".join(f"{x:{digits}}" for x in numbers)


# ============================================================ an answer as text
def pieces(tokenizer, rollout):
    """A rollout's slots as a list of texts and, where a block of latents stands, of their number."""
    out = []
    for is_latent, block in itertools.groupby(rollout.slots, lambda slot: slot < 0):
        slots = list(block)
        out.append(len(slots) if is_latent else tokenizer.decode(slots))
    return out


def readable(tokenizer, rollout):
    """A rollout's text with its latent blocks shown as such: .. </implicit_thought>[3 latents] .."""
    text = ""
    for piece in pieces(tokenizer, rollout):
        text += piece if isinstance(piece, str) else f"[{piece} latent{'s' * (piece > 1)}] "
    return text if rollout.finished else text + " [cut off]"


@torch.no_grad()
def read_out(model, tokenizer, latents, n_words=3):
    """What the vocabulary says of latents (n, D) -> [(near, length, head)], one for each.

    near      the n_words words whose embeddings point its way: [(word, cosine)]
    length    its norm, in units of the mean norm of an embedding
    head      the n_words words that the LM head says if the latent goes through the final norm:
              [(word, probability)]
    """
    embed = model.get_input_embeddings()
    vocabulary = embed(torch.arange(embed.num_embeddings, device=model.device)).float()  # (V, D), as fed
    z = latents.to(vocabulary.device).float()
    directions = torch.nn.functional.normalize(vocabulary, dim=-1)
    cosines = torch.nn.functional.normalize(z, dim=-1) @ directions.T  # (n, V)
    with kv_cache.autocast(model):
        logits = model.lm_head(model.model.norm(z.to(model.dtype)))
        probabilities = logits.float().softmax(-1)  # (n, V)
    lengths = z.norm(dim=-1) / vocabulary.norm(dim=-1).mean()  # (n,)

    def top(scores):  # (n, V) -> of each row the best [(word, score)]
        values, ids = (t.tolist() for t in scores.topk(n_words))
        return [[(tokenizer.decode([i]), value) for i, value in zip(*row)] for row in zip(ids, values)]

    return list(zip(top(cosines), lengths.tolist(), top(probabilities)))


def listed(words):  # [(word, number)] as text
    return ", ".join(f"{word!r} {value:.2f}" for word, value in words)
