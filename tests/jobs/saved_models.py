"""Models that transformers saved, with a tokenizer of a test's texts."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from model.text.tokenizer import Tokenizer
from tests.foreign_models import small

VOCAB = 300


def saved(folder: Path, tokenizer_json: bytes, family: str) -> Path:
    """Returns a folder with a random model that transformers saved."""
    torch.manual_seed(5)
    if family == "gpt2":
        shape = GPT2Config(vocab_size=VOCAB, n_positions=48, n_embd=32, n_layer=2, n_head=2)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(shape, name, 0.0)
        model = GPT2LMHeadModel(shape)
    else:
        model = AutoModelForCausalLM.from_config(small(family, vocab_size=VOCAB).hf)
    model.save_pretrained(folder)
    tokenizer = Tokenizer.from_json(tokenizer_json)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    return folder
