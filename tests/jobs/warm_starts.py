"""Begins a run from a model that transformers saved, in a process of its own, and prints what that
takes.

    python -m tests.jobs.warm_starts made|begun|loaded FOLDER

`made` saves the model in the folder, in bf16. `begun` begins a run from it, and `loaded` loads it.
Both print the bytes that were resident at the peak beside those before, and those of the model's
parameters in fp32.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cluster.settings.run import RunConfig
from cluster.storage.uris import open_storage
from jobs.training.warm_start import begin, like_its_source
from model.files.checkpoint import load_decoder
from model.text.tokenizer import Tokenizer
from tests.benchmarks.worker_memory import give_back, peak_bytes, reset_peak, resident_bytes
from tests.foreign_models import small
from tests.jobs.runs import tiny_plan

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 300,
}
"""Its largest tensor is a fortieth of it."""


def make(folder: Path) -> None:
    plan = tiny_plan(str(folder / "storage"))
    (folder / "tokenizer.json").write_bytes(plan.tokenizer_json)
    model = AutoModelForCausalLM.from_config(small("qwen2", **SHAPE).hf, dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    tokenizer = Tokenizer.from_json(plan.tokenizer_json)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend).save_pretrained(folder / "source")
    (folder / "source/tokenizer.json").write_bytes(plan.tokenizer_json)


def begin_from(folder: Path) -> None:
    settings = {
        "run_id": "begun",
        "train": {"init_from": str(folder / "source"), "precision": "fp32", "seq_len": 32},
        "storage": {"uri": str(folder / "storage")},
        "scaling": {"max_workers": 1, "shard": "parameters"},
    }
    config = like_its_source(RunConfig.model_validate(settings))
    tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_bytes())
    begin(open_storage(str(folder / "begun")), config, tokenizer)


def main() -> None:
    way, folder = sys.argv[1], Path(sys.argv[2])
    if way == "made":
        make(folder)
        return
    num_values = small("qwen2", **SHAPE).num_parameters  # which imports transformers
    give_back()
    before = resident_bytes()
    reset_peak()
    if way == "begun":
        begin_from(folder)
    else:
        load_decoder(folder / "source")
    print(json.dumps({"peak": peak_bytes() - before, "parameters": 4 * num_values}))


if __name__ == "__main__":
    main()
