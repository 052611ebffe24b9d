"""Writes the model card of a checkpoint: README.md on the Hugging Face Hub, from its lineage."""

import math
from dataclasses import dataclass

import yaml

from model.config import Shape
from model.files.checkpoint_folder import Metadata
from model.text.tokenizer import Tokenizer

_NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Origin:
    """The repositories of the Hub that a run began from."""

    base_model: str | None = None  # owner/name
    datasets: tuple[str, ...] = ()


def model_card(
    name: str,
    *,
    shape: Shape,
    tokenizer: Tokenizer,
    metadata: Metadata,
    origin: Origin,
    license_id: str,
) -> str:
    """Returns the card, with the front matter that the Hub reads. `name` is the repository's."""
    adapter = shape.adapter
    kind = "An adapter of a" if adapter else "A"
    front: dict[str, object] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": license_id,
        "tags": ["raymill"],
    }
    if origin.base_model:
        front["base_model"] = origin.base_model
        if adapter:
            front["base_model_relation"] = "adapter"
    if origin.datasets:
        front["datasets"] = [*origin.datasets]
    rows = _lineage(shape, tokenizer, metadata, origin)
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip("\n"),
            "---",
            "",
            f"# {name.rpartition('/')[2]}",
            "",
            f"{kind} causal language model ({shape.model_type}), trained with raymill.",
            "",
            "| lineage | |",
            "| --- | --- |",
            table,
            "",
            _LICENSE_NOTE if license_id == "unknown" else f"The license is {license_id}.",
            "",
            "## Use",
            "",
            *(_use_of_adapter(name, origin) if adapter else _use(name)),
            "",
            "## Check",
            "",
            _CHECK,
            "",
        ]
    )


def _use(name: str) -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        f"vLLM serves it with `vllm serve {name}`, raymill with `raymill serve hf://{name}`.",
    ]


def _use_of_adapter(name: str, origin: Origin) -> list[str]:
    base = origin.base_model or "BASE"
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        f"vLLM serves it with `vllm serve {base} --enable-lora --lora-modules {name.rpartition('/')[2]}={name}`.",
    ]


_LICENSE_NOTE = "The license of these weights is not known: ask their owner before you use them."

_CHECK = (
    "The SHA-256 of the weights is over all parameters in the order of their names: name, number type and shape, each "
    "followed by a zero byte, and then the values, little-endian. manifest.json has the SHA-256 of each other file. "
    "Whoever has the run's storage can take its steps again with `raymill replay`, which ends with the same hash."
)


def _lineage(
    shape: Shape, tokenizer: Tokenizer, metadata: Metadata, origin: Origin
) -> dict[str, str]:
    active, total = shape.num_active_parameters, shape.num_parameters
    parameters = f"{total:,}" if active == total else f"{total:,}, {active:,} for each token"
    if adapter := shape.adapter:
        num_frozen = sum(map(math.prod, shape.frozen_shapes.values()))
        parameters = f"{total:,}, of rank {adapter.rank}, beside {num_frozen:,} that are frozen"
    rows = {
        "run": f"`{metadata.run_id}`, step {metadata.step:,}",
        "tokens seen": f"{metadata.tokens_seen:,}",
        "parameters": parameters,
        "context": f"{shape.n_positions:,} tokens",
        "validation": _validation(metadata),
        "computed in": metadata.precision or _NOT_RECORDED,
        "SHA-256 of the weights": _code(metadata.parameter_hash),
        "SHA-256 of the data's manifest": _code(metadata.data_manifest_hash),
        "tokenizer": f"{tokenizer.vocab_size:,} ids, SHA-256 {_code(tokenizer.hash)}",
        "version of the code": _code(metadata.code_version),
    }
    if metadata.base_hash:
        rows["SHA-256 of the frozen weights"] = _code(metadata.base_hash)
    if origin.base_model:
        rows["began from"] = f"[{origin.base_model}](https://huggingface.co/{origin.base_model})"
    return rows


def _validation(metadata: Metadata) -> str:
    if metadata.val_loss is None:
        return "none"
    bits = metadata.val_bits_per_byte
    loss = f"{metadata.val_loss:.4f} nats per token"
    return loss if bits is None else f"{loss}, {bits:.4f} bits per byte"


def _code(value: str | None) -> str:
    return _NOT_RECORDED if value is None else f"`{value}`"
