"""Gives vLLM the weights of a checkpoint: at its start, and in place of others of the same shape
while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from model.files.checkpoint import shards_in
from model.files.checkpoint_folder import WEIGHTS
from model.files.durable_files import write_file
from model.files.hf import weight_files
from model.files.hf_config import read_shape
from model.shapes import parameter_shapes
from raymill.files.safetensors_file import safetensors_pieces


@contextmanager
def weights_alone(checkpoint: Path) -> Iterator[Path]:
    """Gives a folder with the weights as its only tensors, and these whole: vLLM would take a
    training state beside them for weights too. It is the checkpoint itself if that is so already,
    since vLLM's compiled graphs are kept by its name."""
    shards = shards_in(checkpoint)
    files = [] if shards else weight_files(checkpoint)
    if not shards and set(checkpoint.glob("*.safetensors")) == set(files):
        yield checkpoint
        return
    with TemporaryDirectory() as place:
        indexes = [] if shards else checkpoint.glob("*.index.json")
        for file in [checkpoint / "config.json", *indexes, *files]:
            (Path(place) / file.name).symlink_to(file.absolute())
        if shards:
            whole = shards.whole(parameter_shapes(read_shape(checkpoint)))
            write_file(Path(place) / WEIGHTS, safetensors_pieces(whole))
            del whole
        yield Path(place)


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that vLLM loads, by their names without the prefix that
    some files lack."""
    if shards_in(checkpoint):
        shapes = parameter_shapes(read_shape(checkpoint))
        return {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    shapes = {}
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                shapes[name.removeprefix("transformer.")] = tuple(
                    tensors.get_slice(name).get_shape()
                )
    if read_shape(checkpoint).tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return {
        name: shape
        for name, shape in shapes.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def replace_weights(worker: Any, checkpoint: str) -> None:
    """Runs in each worker, which takes its shard. vLLM loads layer by layer into the tensors that
    are in use, so CUDA graphs stay valid and one layer is in memory twice."""
    worker.reload_weights(weights_iterator=_tensors(Path(checkpoint)))
    for layer in worker.get_model().modules():
        if isinstance(layer, ParallelLMHead):
            # A tied head has nothing of its own to load, so vLLM would keep the old weights as
            # packed for a CPU.
            layer.quant_method.process_weights_after_loading(layer)


def clear_cache(worker: Any) -> None:
    """Runs in each worker: makes its blocks of keys and values zeros, as they were at its start."""
    for blocks in worker.model_runner.kv_caches:
        blocks.zero_()


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields one tensor after the other. A file that stayed open would stay in memory as far as it
    has been read."""
    if shards := shards_in(checkpoint):
        for name, shape in parameter_shapes(read_shape(checkpoint)).items():
            yield name, shards.whole({name: shape})[name]
        return
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(name).clone()
            yield name, tensor
