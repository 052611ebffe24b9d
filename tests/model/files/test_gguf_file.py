"""Models as GGUF files: transformers' own reader of them computes the same logits from the same
ids, and what llama.cpp would compute otherwise is refused by name."""

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from model.config import GPTConfig, Shape
from model.decoders.make import new_decoder
from model.files.gguf_file import GgufError, write_gguf
from model.text.tokenizer import Tokenizer, train_bpe
from tests.foreign_models import small
from tests.tokenizer_kinds import tokenizer_json

TEXT = "the quick brown fox jumps over the lazy dog, and over the fence in 2024"
VOCAB = 320  # the tokenizer has 300 ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 4, vocab_size=300)


SHAPES: dict[str, Shape] = {
    "gpt2": GPTConfig(vocab_size=VOCAB, n_positions=64, n_layer=2, n_head=2, n_embd=32),
    "llama": GPTConfig(
        vocab_size=VOCAB,
        n_positions=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        n_inner=64,
        rope_theta=5e4,
        activation_function="swiglu",
        tie_word_embeddings=False,
        architecture="llama",
    ),
    "qwen2": small("qwen2", vocab_size=VOCAB),
    "qwen3": small("qwen3", vocab_size=VOCAB),
}


def written(folder: Path, shape: Shape, tokenizer: Tokenizer) -> tuple[Path, Any]:
    model = new_decoder(shape)
    if isinstance(shape, GPTConfig):
        model = model.to_empty(device="cpu")
    model.init_weights(3)
    path = folder / "model.gguf"
    weights = dict(model.named_parameters())
    write_gguf(path, name="m", shape=shape, weights=weights, tokenizer=tokenizer)
    return path, model.eval()


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_gguf__of_a_family__is_read_by_transformers_with_the_same_logits(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shape = SHAPES[family]
    path, model = written(tmp_path, shape, tokenizer)
    # It does not read a GPT-2's context, nor how wide a Qwen3's heads are
    values = {"gpt2": {"n_positions": 64}, "qwen3": {"head_dim": 16}}.get(family, {})
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name, **values)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, dtype=torch.float32
    ).eval()
    token_ids = torch.arange(2 * 40).view(2, 40) % 300
    torch.testing.assert_close(
        model.logits(model(token_ids)), theirs(token_ids).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("family", SHAPES)
def test_gguf__of_a_family__has_its_sizes(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shape = SHAPES[family]
    path, _ = written(tmp_path, shape, tokenizer)
    reader = gguf.GGUFReader(path)

    def said(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    assert said("general.architecture") == family
    assert said(f"{family}.context_length") == shape.n_positions == 64
    assert said(f"{family}.block_count") == shape.n_layer
    assert said(f"{family}.feed_forward_length") == shape.ffn_width
    if family != "gpt2":
        assert said(f"{family}.attention.key_length") == shape.head_dim
        assert said(f"{family}.attention.head_count_kv") == shape.num_kv_heads
        expected = 5e4 if family == "llama" else 1e4
        assert said(f"{family}.rope.freq_base") == pytest.approx(expected)
    assert len(said("tokenizer.ggml.tokens")) == VOCAB
    assert said("tokenizer.ggml.tokens")[-1] == f"[PAD{VOCAB - 1}]"
    has_head = "output.weight" in {tensor.name for tensor in reader.tensors}
    assert has_head == (not shape.tie_word_embeddings)


def test_gguf__of_a_tokenizer__gives_its_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, _ = written(tmp_path, SHAPES["qwen3"], tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)
    assert theirs.eos_token_id == tokenizer.eot_id


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (small("mixtral", vocab_size=VOCAB), "type 'mixtral' is not written"),
        (
            small("llama", vocab_size=VOCAB),
            "type 'llama' is not written as GGUF where transformers computes it",
        ),
        (
            GPTConfig(
                vocab_size=VOCAB,
                n_positions=64,
                n_layer=1,
                n_head=2,
                n_embd=32,
                activation_function="relu",
            ),
            "activation_function is relu",
        ),
    ],
    ids=["mixtral", "llama", "relu"],
)
def test_gguf__of_what_llama_cpp_computes_otherwise__is_refused(
    shape: Shape, problem: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(GgufError, match=problem):
        write_gguf(tmp_path / "m.gguf", name="m", shape=shape, weights={}, tokenizer=tokenizer)


def test_gguf__of_another_kind_of_tokenizer__is_refused(tmp_path: Path) -> None:
    other = Tokenizer.from_json(tokenizer_json("gemma"))
    with pytest.raises(GgufError, match="not byte-level BPE"):
        write_gguf(
            tmp_path / "m.gguf", name="m", shape=SHAPES["llama"], weights={}, tokenizer=other
        )


def test_gguf__without_the_library__says_how_to_get_it(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GgufError, match=r"pip install 'gguf>="):
        write_gguf(
            tmp_path / "m.gguf", name="m", shape=SHAPES["llama"], weights={}, tokenizer=tokenizer
        )
