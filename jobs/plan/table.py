"""Formats a plan as text: warnings first, then aligned figures with their units, then the assumptions."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.settings.plan import PlanConfig
from jobs.plan.formulas import TEXT_BYTES_PER_TOKEN
from jobs.run.history import duration

_WIDTH = 110
_LABEL = 26
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))

_PARTS = {
    "weights": "weights, fp32",
    "bf16_weights": "weights rounded to bf16",
    "gradients": "gradients, fp32",
    "lane_sums": "sums of lanes",
    "optimizer": "AdamW's moments",
    "activations": "activations",
    "logits_chunk": "logits, a chunk",
    "exchange": "received sums",
    "total": "in all",
    "snapshots": "snapshots, two slots",
    "copies_of_another_node": "copies of another node's",
    "checkpoints": "checkpoints (rank 0)",
}


def table(plan: Mapping[str, Any], options: PlanConfig) -> str:
    lines: list[str] = []
    for text in plan["warnings"]:
        lines += textwrap.wrap(f"warning: {text}", _WIDTH, subsequent_indent=" " * 9)
    for title, rows in [*_calibrated(plan), *_sections(plan, options)]:
        lines += ["", title, *(f"  {name:<{_LABEL}}{value}" for name, value in rows)]
    lines += ["", "Assumed"]
    for text in _assumptions(plan, options):
        lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines).lstrip("\n")


def size(num_bytes: float, per: str = "") -> str:
    """Formats bytes with four digits and a decimal prefix: `2.095 TB`."""
    factor, prefix = next(((f, p) for f, p in _PREFIXES if num_bytes >= f), (1, ""))
    return f"{num_bytes / factor:.4g} {prefix}B{per}"


def _calibrated(plan: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields the section of what a rehearsal measured on this machine, if there was one."""
    if (found := plan.get("calibration")) is None:
        return
    stages = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in found["stage_s"].items())
    steps = ", ".join(f"{seconds:.3g} s with {size}" for size, seconds in found["step_s"].items())
    yield (
        f"On this machine, from a rehearsal of {found['took_s']:,.0f} s",
        [
            ("wall time", duration(found["wall_s"])),
            ("by stage", stages),
            ("a step", f"{steps} workers; {found['tokens_per_s']:,.0f} tokens/s in {found['precision']}"),
            ("a validation", f"{found['validation_s']:.3g} s"),
            ("a restart", ", ".join(f"{seconds:.1f} s" for seconds in found["recovery_s"]) or "none rehearsed"),
        ],
    )


def _sections(plan: Mapping[str, Any], options: PlanConfig) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    yield (
        "Work",
        [
            ("parameters", f"{plan['parameters']:,}"),
            ("tokens", f"{plan['tokens']:,}, {plan['tokens_per_parameter']:.3g} for each parameter"),
            ("steps", f"{plan['steps']:,} of {plan['step_tokens']:,} tokens"),
            ("precision", plan["precision"]),
            ("operations, 6 N D", f"{plan['total_flops']:.3g} FLOPs = {plan['petaflop_s_days']:,.4g} petaflop/s-days"),
            ("with attention's scores", f"{plan['model_flops']:.3g} FLOPs"),
        ],
    )
    yield (
        f"Time and cost on {plan['count']:,} x {plan['gpu']}",
        [
            ("each GPU sustains", f"{plan['flops_per_s_per_gpu'] / 1e12:,.4g} TFLOP/s, an MFU of {plan['mfu']:.1%}"),
            ("GPU-days", f"{plan['gpu_days']:,.4g}"),
            ("wall time", f"{duration(plan['days'] * 86_400)}, {plan['days']:,.3g} days; failures come on top"),
            ("cost", f"${plan['cost']:,.0f} at ${plan['price_per_gpu_hour']:,.2f} for a GPU-hour"),
            ("a step", f"{plan['step_s']:,.3g} s, {plan['tokens_per_s']:,.4g} tokens/s in all"),
        ],
    )
    yield "Memory of each GPU", _memory(plan["memory_bytes"], plan["memory_bytes_sharded"], plan["gpu_memory_bytes"])
    yield "Memory of each node", [(_PARTS[k], size(v)) for k, v in plan["host_memory_bytes"].items() if v]
    checkpoint, moved, data = plan["checkpoint"], plan["exchange"], plan["data"]
    yield (
        "Checkpoints and failures",
        [
            ("a checkpoint", f"{size(checkpoint['bytes'])}, {size(checkpoint['kept_bytes'])} of all kept"),
            ("training waits", f"{checkpoint['copy_s']:,.3g} s; storing one takes {checkpoint['store_s']:,.3g} s"),
            ("a failure every", duration(checkpoint["mtbf_s"])),
            (
                "best interval",
                f"{duration(checkpoint['interval_s'])}, {checkpoint['interval_steps']:,} steps (Young, Daly; "
                "checkpoint.save_every_steps)",
            ),
            ("goodput", f"{checkpoint['goodput']:.2%} with checkpoints alone; snapshots lose less (--simulate)"),
        ],
    )
    yield (
        "Exchange of gradients, by each GPU",
        [
            ("sends a step", f"{size(moved['bytes_per_step'])} in {moved['messages_per_step']:,} messages"),
            ("takes", f"{moved['seconds_per_step']:,.3g} s, most of it during the last lane's backward"),
        ],
    )
    yield (
        "Data",
        [
            ("token store", f"{size(data['store_bytes'])}, read at {size(data['read_bytes_per_s'], '/s')}"),
            (
                "text",
                f"about {size(data['text_bytes'])}; tokenizing while training has to bring "
                f"{size(data['text_bytes_per_s'], '/s')}",
            ),
        ],
    )


def _memory(parts: Mapping[str, float], sharded: Mapping[str, float], has: float) -> list[tuple[str, str]]:
    rows = [(_PARTS[name], f"{size(v):>12}{size(sharded[name]):>14}") for name, v in parts.items() if v]
    return [("", f"{'as set':>12}{'with ZeRO-1':>14}"), *rows, ("of", f"{size(has):>12}{size(has):>14}")]


def _assumptions(plan: Mapping[str, Any], options: PlanConfig) -> Iterator[str]:
    if options.sustained_tflops is None:
        yield (
            f"MFU {options.mfu:.0%} of the bf16 peak (--mfu). Published for well-tuned runs: Llama 3 405B on H100 38 "
            "to 43%, PaLM on TPU v4 46%, GPT-3 on V100 21%. Not measured with raymill."
        )
    if options.price is None:
        yield f"${plan['price_per_gpu_hour']:,.2f} for a GPU-hour (--price): a round number, not an offer."
    yield (
        f"Links: {size(options.hardware.link_bytes_per_s, '/s')} within a node of {options.gpus_per_node}, "
        f"{size(options.network_bytes_per_s, '/s')} for each GPU between nodes (--network-gbit-per-s)."
    )
    yield (
        f"A GPU fails once in {options.mtbf_gpu_hours:,.0f} hours (--mtbf-gpu-hours; Llama 3: 50,700), storage takes "
        f"{size(options.storage_bytes_per_s, '/s')} (--storage-bytes-per-s), a restart {options.restart_s:,.0f} s "
        "(--restart-s), a message between GPUs 5 µs besides its bytes."
    )
    yield f"{TEXT_BYTES_PER_TOKEN:g} bytes of text for each token, about as in English web text."
