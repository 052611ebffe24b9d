"""Formats a plan as text: a few lines of the figures that matter most, and all of it: warnings, the
aligned figures of `work.txt` and `plan.txt`, and the assumptions."""

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
    "process": "Python, PyTorch, Ray",
    "total": "in all",
    "snapshots": "snapshots, two slots",
    "copies_of_another_node": "copies of another node's",
    "checkpoints": "checkpoints",
    "pieces": "pinned, for copies",
}


def few_lines(lines: Mapping[str, str]) -> str:
    """Returns a line for each thing that matters most, by its name."""
    width = max(map(len, lines))
    indent = " " * (width + 2)
    wrapped = [
        textwrap.fill(
            f"{name:{width}}  {text}", _WIDTH, subsequent_indent=indent, break_on_hyphens=False
        )
        for name, text in lines.items()
    ]
    return "\n".join(wrapped)


def warned(plan: Mapping[str, Any]) -> str:
    """Returns the warnings, a paragraph each."""
    wrapped = [
        textwrap.fill(f"warning: {text}", _WIDTH, subsequent_indent=" " * 9)
        for text in plan["warnings"]
    ]
    return "\n".join(wrapped)


def sections(*texts: str) -> str:
    """Returns those texts that are not empty, with an empty line between them."""
    return "\n\n".join(filter(None, texts))


def work_in_words(plan: Mapping[str, Any]) -> str:
    """Returns the shape of the model, and the operations of the run."""
    active, size = plan["active_parameters"], plan["parameters"]
    of_a_token = f", {active:,} of them for each token" if active < size else ""
    return Figures().format(template("work.txt"), of_a_token=of_a_token, **plan)


def what_matters(plan: Mapping[str, Any]) -> str:
    """Returns the time, the memory and the cost of a plan on GPUs, a line each."""
    gpus = f"{plan['count']:,} x {plan['gpu']}"
    lines = {
        "time": f"{plan['days']:,.3g} days on {gpus}, {plan['gpu_days']:,.4g} GPU-days at an MFU of {plan['mfu']:.0%}",
        "memory": f"{size(plan['memory_bytes']['total'])} of each GPU's {size(plan['gpu_memory_bytes'])}",
        "cost": f"${plan['cost']:,.0f} at ${plan['price_per_gpu_hour']:,.2f} for a GPU-hour",
    }
    return few_lines(lines)


def table(plan: Mapping[str, Any], options: PlanConfig) -> str:
    figures = Figures().format(
        template("plan.txt"),
        tflops=plan["flops_per_s_per_gpu"] / 1e12,
        wall_s=plan["days"] * 86_400,
        gpu_memory=_memory(plan["memory_bytes"], plan["advice"], plan["gpu_memory_bytes"]),
        node_memory=listed(plan["host_memory_bytes"]),
        **plan,
    )
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ")
    assumed = map(wrapper.fill, _assumptions(plan, options))
    assumptions = "\n".join(["Assumed", *assumed])
    return sections(warned(plan), work_in_words(plan), figures, assumptions)


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


def about(seconds: float) -> str:
    """Formats an estimate with two or three digits, in the unit that people say it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.1f} days"


def size(num_bytes: float, per: str = "", *, digits: int = 4) -> str:
    """Formats bytes with four digits and a decimal prefix: `2.095 TB`."""
    factor, prefix = next((row for row in _PREFIXES if num_bytes >= row[0]), _PREFIXES[-1])
    return f"{num_bytes / factor:.{digits}g} {prefix}B{per}"


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


def listed(parts: Mapping[str, float]) -> str:
    """Returns a line for each part of a memory that is not empty."""
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
    if not plan["priced"]:
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
