"""What was measured, for the terminal: a table for each kind, its protocol beneath."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from llmprune_eval.result import Part
from llmprune_eval.terminal import number, table

ACCURACIES = ("acc", "acc_norm")


def mean_acc(parts: Sequence[Part], names: Sequence[str]) -> float | None:
    """The mean that the papers average: acc, not acc_norm, over the tasks asked for; None for fewer than two."""
    found = [value for p in parts if p.kind == "task" and p.name in names if (value := p.values.get("acc")) is not None]
    return fmean(found) if len(found) > 1 else None


def evaluation_text(model: str, parts: Sequence[Part], names: Sequence[str]) -> str:
    """Tables of the parts; `names` are the tasks that were asked for, over which the mean goes."""
    by_kind = {kind: [part for part in parts if part.kind == kind] for kind in ("perplexity", "task", "generation")}
    texts = [_perplexity(model, part) for part in by_kind["perplexity"]]
    if by_kind["task"]:
        texts.append(_tasks(model, by_kind["task"], mean_acc(parts, names)))
    texts += [_generation(model, part) for part in by_kind["generation"]]
    return "\n\n".join(texts)


def _perplexity(model: str, part: Part) -> str:
    values, protocol = part.values, part.protocol
    lines = [f"perplexity        {_figure(values['perplexity'])}   {model}"]
    if protocol["against"]:
        lines += [
            f"dense perplexity  {_figure(values['dense_perplexity'])}   {protocol['against']}",
            f"KL to dense       {_figure(values['kl'], 5)} nats per token",
            f"same top-1 token  {values['top1_agreement']:.2%}",
        ]
    joined = "ready windows" if protocol["joiner"] is None else f"texts joined by {protocol['joiner']!r}"
    lines.append(
        f"protocol          {protocol['dataset']}, {joined}, {protocol['windows']} non-overlapping windows of "
        f"{protocol['seqlen']} tokens (start token: {protocol['bos']}), {protocol['tokens']} scored, "
        f"{protocol['dtype']}, revision {str(protocol['revision'])[:12]}"
    )
    return "\n".join(lines)


def _tasks(model: str, parts: Sequence[Part], mean: float | None) -> str:
    rows = [
        (p.name, *(_with_error(p, metric) for metric in ACCURACIES), _others(p), p.protocol["num_fewshot"],
         p.protocol["samples"] or "-")
        for p in parts
    ]  # fmt: skip
    if mean is not None:
        rows.append(("mean acc", f"{mean:.4f}", "", "", "", ""))
    title = f"{model}, by lm-eval"
    first = parts[0]
    seeds = ", ".join(f"{name} {seed}" for name, seed in first.protocol["seeds"].items())
    limits = [f"{limit:g}" for limit in {part.protocol["limit"] for part in parts} - {None}]
    versions = ", ".join(f"{p.name} {p.protocol['version']}" for p in parts)
    protocol = (
        f"protocol          lm-eval {first.versions.get('lm_eval')}, {first.protocol['dtype']}, seeds: {seeds}; "
        f"versions of the tasks: {versions}" + (f"; LIMITED to {', '.join(limits)}" if limits else "")
    )
    return f"{table(title, ('task', *ACCURACIES, 'others', 'shots', 'samples'), rows)}\n{protocol}"


def _others(part: Part) -> str:
    return "\n".join(f"{metric} {_with_error(part, metric)}" for metric in part.values if metric not in ACCURACIES)


def _with_error(part: Part, metric: str) -> str:
    if metric not in part.values:
        return "-"
    error = part.stderr.get(metric)
    return _figure(part.values[metric]) + (f" ± {_figure(error)}" if error is not None else "")


def _generation(model: str, part: Part) -> str:
    rows = [
        (" ".join(f"{s['prompt']} [...] {s['text']}".split()), number(s["repetition"], 2), s["tokens"])
        for s in part.samples
    ]
    drawn = table(f"{model} continues, greedily", ("text", "repetition", "tokens"), rows)
    protocol = part.protocol
    return (
        f"{drawn}\nrepetition        {number(part.values['repetition'], 3)} ({protocol['repetition']})\n"
        f"protocol          {protocol['decoding']}, at most {protocol['max_new_tokens']} new tokens, "
        f"{protocol['dtype']}"
    )


def _figure(value: float | None, digits: int = 4) -> str:
    """What JSON cannot hold was infinite."""
    return "inf" if value is None else f"{value:.{digits}f}"
