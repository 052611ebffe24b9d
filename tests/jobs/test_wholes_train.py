"""The whole settings files of docs/wholes that need no GPU and no cluster train."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig
from jobs import pretrain as stage
from jobs.training.train_loop import train
from model.files.checkpoint_folder import verify_checkpoint
from model.text.tokenizer import Tokenizer, train_bpe
from tests.foreign_models import small
from tests.jobs.corpora import number_texts
from tests.repository import REPOSITORY

pytestmark = pytest.mark.slow

NUM_STEPS = 3


def model_folder(folder: Path, kind: str) -> Path:
    """Returns a folder with a small random model of the file's kind, as transformers saves it, in
    place of the hub's."""
    words = [path.read_text() for path in number_texts(folder / "words").iterdir()]
    tokenizer = Tokenizer.from_json(train_bpe(words, vocab_size=300).to_json())
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}
    shape: Any = small("qwen3", **size).hf
    if kind == "assistant":
        shape = LlamaConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, **size
        )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    saved.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_bytes(tokenizer.to_json())
    return folder / "model"


def conversations(folder: Path) -> Path:
    (folder / "chats").mkdir()
    lines = []
    for number in range(400):
        turns = [("user", f"{number} and one?"), ("assistant", f"{number + 1}")]
        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats" / "a.jsonl").write_text("\n".join(lines))
    return folder / "chats" / "*.jsonl"


@pytest.mark.parametrize("name", ["laptop", "assistant", "adapter"])
def test_it_trains(
    name: str, ray_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps of the file's run: on this machine's CPUs and texts, and with a small model
    in place of the hub's."""
    values = yaml.safe_load((REPOSITORY / f"docs/wholes/{name}.yaml").read_text(encoding="utf-8"))
    values["storage"]["uri"] = str(tmp_path / "storage")
    values["scaling"] |= {"use_gpu": False, "max_workers": 1}
    if name == "laptop":
        values["data"]["source"] = str(number_texts(tmp_path / "texts") / "*.txt")
    else:
        values["data"]["source"] = str(conversations(tmp_path))
        values["train"]["init_from"] = str(model_folder(tmp_path, name))
    batch, length = values["train"]["global_batch_size"], values["train"]["seq_len"]
    values["train"]["max_tokens"] = NUM_STEPS * batch * length
    # In this process, in place of Ray Train's workers
    monkeypatch.setattr(stage, "_train", partial(train, rank=0, world_size=1))
    figures = stage.pretrain(validate_config(values, RunConfig))
    checkpoint = Path(figures["checkpoint"])
    assert checkpoint.name.startswith(f"step-{NUM_STEPS:09}")
    assert verify_checkpoint(checkpoint) == []
