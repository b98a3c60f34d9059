"""Text for the terminal: tables of what was planned, done and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmprune_eval.result import Part, Result
from llmprune_eval.terminal import number, table

from llmprune.blocks import Skipped
from llmprune.config import PruneConfig
from llmprune.planning import Plan
from llmprune.report import Report


def _axes(config: dict[str, Any]) -> str:
    """What a run does beside choosing a mask, in words; "" if nothing."""
    words = {
        "refine": f"refined by {config['refine']}",
        "compensation": f"compensated by {config['compensation']}",
        "sequential": "site after site",
        "target": "towards the dense model's output",
    }
    plain = {"refine": "none", "compensation": "none", "sequential": "block", "target": "own"}
    return "".join(f", {text}" for axis, text in words.items() if config[axis] != plain[axis])


def report_text(report: Report, output: Path) -> str:
    """The table at the end of a run and the sums below it."""
    rows = [
        (b.name, len(b.sites), f"{b.sparsity:.2%}", number(b.site_error, 3), number(b.relative_error, 3),
         f"{sum(b.seconds.values()):.1f}")
        for b in report.blocks
    ]  # fmt: skip
    share = "columns cut" if report.widths else "sparsity"  # of the output projections, not of all that goes with them
    method = f"{report.config['method']}, {report.pattern}; weights compete within a {report.group}"
    lines = [
        table(method + _axes(report.config), ("block", "sites", share, "site error", "block error", "seconds"), rows),
        "",
    ]
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items())
    lines += _pruned(report)
    if report.perplexity_before is not None:
        held = (report.calibration or {}).get("holdout")
        lines.append(
            f"perplexity  {number(report.perplexity_before)} before, {number(report.perplexity_after)} after "
            f"({held} held-out windows of the calibration text)"
        )
    else:
        lines.append("perplexity  not measured: no held-out windows; see `llmprune eval`")
    if report.bias_flags:
        lines.append(f"biases      added, announced in the config by {', '.join(report.bias_flags)}")
    lines += [
        f"seconds     {seconds}; peak memory {report.peak_memory / 1e9:.2f} GB; {report.processes} process(es)",
        f"size, speed {_gain(report)}",
        f"saved       {output} (reloaded in a fresh process: identical weights)",
    ]
    return "\n".join([*lines, *(f"WARNING     {warning}" for warning in report.warnings)])


def _pruned(report: Report) -> list[str]:
    share = f"{report.decoder_share:.2%} of the decoder, {report.model_share:.2%} of the model"
    if report.widths is None:
        return [f"pruned      {report.pruned:,} weights: {report.sparsity:.2%} of the sites, {share}"]
    return [f"cut out     {report.pruned:,} parameters: {share}", *widths_lines(report.widths)]


def _gain(report: Report) -> str:
    if report.widths is None:
        pack = "; `llmprune pack` stores them in fewer bytes" if report.pattern == "2:4" else ""
        return f"the file keeps its size and dense runtimes their speed: pruned weights are stored as zeros{pack}"
    before, after = report.model_parameters, report.model_parameters - report.pruned
    return f"a smaller plain model: {before:,} parameters before, {after:,} after ({after / before:.1%})"


def plan_text(plan: Plan, config: PruneConfig) -> str:
    """What a run would prune, skip, need."""
    pattern = config.make_pattern()
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for block in plan.blocks:
        for site in block.sites:
            key = (site.family, site.shape)
            kinds[key] = kinds.get(key, 0) + 1
    rows = [(name, count, f"{shape[0]} x {shape[1]}") for (name, shape), count in kinds.items()]
    lines = [
        table(
            f"{config.method}, {pattern}{_axes(config.as_dict())}: would prune", ("sites", "count", "out x in"), rows
        ),
        "",
    ]
    lines += [
        *skipped_lines(plan.skipped),
        *_removal(plan),
        f"passes      {plan.passes:.2f} forward passes of the decoder over {config.num_calibration_samples} windows "
        f"of {plan.seqlen} tokens",
    ]
    lines += [f"memory      {size / 1e9:9.3f} GB {what}" for what, size in plan.memory.items()]
    gain = "both change with the parameters" if plan.structure else "unchanged: zeros are stored densely"
    lines += [f"size, speed {gain}", "dry run     nothing was touched"]
    return "\n".join(lines)


def skipped_lines(skipped: Iterable[Skipped]) -> list[str]:
    """What is not pruned, and why: one line for all that bear the same last name for the same reason."""
    counts = Counter((one.name.split(".")[-1], one.reason) for one in skipped)
    return [
        *(f"skips       {count} x {name}: {reason}" for (name, reason), count in counts.items()),
        "skips       everything outside the blocks: embeddings, lm_head, final norm",
    ]


def _removal(plan: Plan) -> list[str]:
    """How much of the decoder goes, and with units, which."""
    decoder = f"of the decoder's {plan.decoder_parameters:,} parameters"
    if plan.structure is None:
        return [f"prunes      {plan.removed:.2%} {decoder} ({plan.share:.2%} of them lie at sites)"]
    return [f"cuts out    {plan.removed:.2%} {decoder}", *widths_lines(plan.structure.describe())]


def widths_lines(widths: dict[str, Any], pattern: str = "") -> list[str]:
    """What every block keeps of its units; `pattern` says of which pattern, where there are several."""
    kept = [f"{k['after']} of {k['before']} {k['units']} ({k['projection']})" for k in widths["kinds"]]
    lines = [f"widths      {pattern}every block keeps {', '.join(kept)}"]
    return [*lines, *(f"left alone  {pattern}{site}: {reason}" for site, reason in widths["fixed"].items())]


def inspection_text(folder: str, facts: dict[str, Any], manifest: dict[str, Any] | None) -> str:
    """Sparsity per site and what the manifest says."""
    rows = [
        (s["name"], f"{s['shape'][0]} x {s['shape'][1]}", f"{s['sparsity']:.2%}", s["pattern"]) for s in facts["sites"]
    ]
    lines = [table(folder, ("site", "out x in", "zeros", "pattern"), rows), ""]
    lines.append(
        f"zeros       {facts['sparsity']:.2%} of the weights at sites; patterns: {', '.join(facts['patterns'])}"
    )
    if facts["packed"] is not None:
        packed = facts["packed"]
        lines.append(
            f"packed      {packed['modules']} layers as {packed['format']}: {packed['packed_bytes']:,} bytes for "
            f"{packed['dense_bytes']:,} ({packed['packed_bytes'] / packed['dense_bytes']:.4f})"
        )
    if manifest is None:
        return "\n".join([*lines, "manifest    none: not written by llmprune"])
    config, calibration = manifest.get("config", {}), manifest.get("calibration") or {}
    lines += [
        f"manifest    {config.get('method')}, {manifest.get('pattern')} within a {manifest.get('group')}, seed "
        f"{config.get('seed')}, from {manifest.get('model')}",
        f"calibrated  {calibration.get('dataset')}: {calibration.get('windows_used')} windows of "
        f"{calibration.get('seqlen')} tokens, sha256 {str(calibration.get('sha256'))[:12]}",
        f"perplexity  {number(manifest.get('perplexity_before'))} before, "
        f"{number(manifest.get('perplexity_after'))} after (held-out calibration text)",
        f"versions    {', '.join(f'{k} {v}' for k, v in manifest.get('versions', {}).items())}",
    ]
    return "\n".join([*lines, *(widths_lines(manifest["widths"]) if manifest.get("widths") else ())])


def speed_text(result: Result, count: int) -> str:
    """The last `count` parts of a result, which are speeds: rates with their spread, speed-ups, memory."""
    parts = result.parts[-count:]
    protocol = parts[0].protocol
    against = protocol["against"]
    columns = ["", "batch", "tokens/s", "p10 to p90", "memory"]
    if against is not None:
        columns += ["dense tokens/s", "memory", "speed-up", "p10 to p90"]
    lines = [
        table(f"{result.model['name']} on {protocol['device']}", columns, map(_speed_row, parts)),
        "",
        f"protocol    prompt of {protocol['prompt']} tokens, {protocol['new_tokens']} new ones, medians of "
        f"{protocol['turns']} turns after one to warm up; {protocol['dtype']}, attention {protocol['attention']}",
        f"memory      {protocol['memory']}",
    ]
    if against is not None:
        lines.insert(2, f"dense       {against['name']}, timed in turn; ratios are taken within a turn")
    return "\n".join([*lines, *[f"saved       {result.path}"] * (result.path is not None)])


def _speed_row(part: Part) -> list[str]:
    values = part.values
    row = [part.name, str(part.protocol["batch_size"]), _rate(values["tokens_per_second"]),
           f"{_rate(values['p10'])} to {_rate(values['p90'])}", _megabytes(values["peak_memory"])]  # fmt: skip
    if "speedup" in values:
        row += [_rate(values["dense_tokens_per_second"]), _megabytes(values["dense_peak_memory"]),
                f"{values['speedup']:.2f}", f"{values['speedup_p10']:.2f} to {values['speedup_p90']:.2f}"]  # fmt: skip
    return row


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else number(value, 3)


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"
