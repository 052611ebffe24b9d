"""Formats a plan as text: warnings first, then the aligned figures of `plan.txt`, then the
assumptions."""

import string
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
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
    "optimizer": "optimizer's moments",
    "activations": "activations",
    "logits_chunk": "logits, a chunk",
    "embeddings": "embeddings, gradient",
    "two_blocks": "weights of two blocks",
    "block_gradients": "gradients on their way",
    "exchange": "received sums",
    "frozen": "frozen weights, fp32",
    "total": "in all",
    "snapshots": "snapshots, two slots",
    "copies_of_another_node": "copies of another node's",
    "checkpoints": "checkpoints",
    "pieces": "pinned, for copies",
}


def table(plan: Mapping[str, Any], options: PlanConfig) -> str:
    warned = [
        textwrap.fill(f"warning: {text}", _WIDTH, subsequent_indent=" " * 9)
        for text in plan["warnings"]
    ]
    figures = Figures().format(
        template("plan.txt"),
        of_a_token=_of_a_token(plan),
        tflops=plan["flops_per_s_per_gpu"] / 1e12,
        wall_s=plan["days"] * 86_400,
        gpu_memory=_memory(plan["memory_bytes"], plan["advice"], plan["gpu_memory_bytes"]),
        node_memory=_node_memory(plan["host_memory_bytes"]),
        **plan,
    )
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ")
    assumed = map(wrapper.fill, _assumptions(plan, options))
    sections = ["\n".join(warned), figures, "\n".join(["Assumed", *assumed])]
    return "\n\n".join(filter(None, sections))


def _of_a_token(plan: Mapping[str, Any]) -> str:
    active, size = plan["active_parameters"], plan["parameters"]
    return f", {active:,} of them for each token" if active < size else ""


def template(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip("\n")


class Figures(string.Formatter):
    """Formats values as bytes (`:size`) and as long (`:time`) and short times (`:seconds`) too."""

    def format_field(self, value: Any, format_spec: str) -> str:
        match format_spec:
            case "size":
                return size(value)
            case "time":
                return duration(value)
            case "seconds":
                return f"{value:,.3g} s" if value >= 1 else f"{1000 * value:,.3g} ms"
        return format(value, format_spec)


def size(num_bytes: float, per: str = "") -> str:
    """Formats bytes with four digits and a decimal prefix: `2.095 TB`."""
    factor, prefix = next((row for row in _PREFIXES if num_bytes >= row[0]), _PREFIXES[-1])
    return f"{num_bytes / factor:.4g} {prefix}B{per}"


def _memory(parts: Mapping[str, float], advice: Mapping[str, Any] | None, has: float) -> str:
    columns = {"as set": parts}
    if advice:
        columns["as advised"] = advice["memory_bytes"]
    rows = [("", [*columns])]
    for name in parts:
        sizes = [column[name] for column in columns.values()]
        if any(sizes):
            rows.append((_PARTS[name], [size(num_bytes) for num_bytes in sizes]))
    rows.append(("of", [size(has)] * len(columns)))
    lines = []
    for label, values in rows:
        cells = "".join(f"{value:>13}" for value in values)
        lines.append(f"  {label:<{_LABEL}}{cells}")
    return "\n".join(lines)


def _node_memory(parts: Mapping[str, float]) -> str:
    lines = []
    for name, num_bytes in parts.items():
        if num_bytes:
            lines.append(f"  {_PARTS[name]:<{_LABEL}}{size(num_bytes)}")
    return "\n".join(lines)


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
        f"{size(options.storage_bytes_per_s, '/s')} from a node (--storage-bytes-per-s), a restart "
        f"{options.restart_s:,.0f} s (--restart-s), a message between GPUs 5 µs besides its bytes."
    )
    yield "Snapshots take up to half of a node's memory, unless checkpoint.snapshot_bytes says how much."
    yield f"{TEXT_BYTES_PER_TOKEN:g} bytes of text for each token, about as in English web text."
