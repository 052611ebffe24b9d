"""Loads a model from a folder that Hugging Face's transformers saved."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.config import GPTConfig, Shape
from model.decoder import Decoder
from model.decoders.make import new_decoder
from model.files.hf_config import UnsupportedModelError, shape_from_hf
from model.foreign_config import ForeignConfig, ForeignModelError, imported, module_options


def load_hf(folder: Path) -> Decoder:
    """Returns the model of a folder that `save_pretrained` wrote, in evaluation mode and in the
    stored dtype; transformers' own modules in fp32.

    Raises `UnsupportedModelError` or `ForeignModelError` for what is no causal language model,
    pickled weights, missing or unexpected parameters.
    """
    try:
        config = shape_from_hf(json.loads((folder / "config.json").read_bytes()))
        if isinstance(config, ForeignConfig):
            weight_files(folder)  # refuses pickles
            return build_model(config, _saved_weights(config, folder), source=folder)
        weights = {
            name: tensor
            for file in weight_files(folder)
            for name, tensor in load_file(file).items()
        }
    except (ValueError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"{folder}: config.json or the weights are damaged: {error}"
        ) from error
    return build_model(config, normalize_names(weights, config), source=folder)


def weight_files(folder: Path) -> list[Path]:
    """Returns model.safetensors, or the shards that its index names."""
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        return [
            folder / name
            for name in sorted({*json.loads(index.read_bytes())["weight_map"].values()})
        ]
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise UnsupportedModelError(
            f"{folder}: {pickled[0]} is a pickle, which can run code when it is loaded; "
            "save the model with transformers' save_pretrained(…, safe_serialization=True) and use that folder"
        )
    raise UnsupportedModelError(
        f"{folder}: has neither model.safetensors nor model.safetensors.index.json"
    )


def normalize_names(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Returns the weights under `GPT`'s names: older files lack the prefix, store the causal mask
    or the rotary frequencies as a buffer, and repeat a tied head."""
    network = config.network
    prefix = f"{network.parameters.prefix}."
    tokens = f"{prefix}{network.parameters.tied}"
    named = {
        name if name.startswith((prefix, "lm_head.")) else f"{prefix}{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith(network.hf.buffers)
    }
    if config.tie_word_embeddings:
        head = named.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, named[tokens]):
            raise UnsupportedModelError(
                f"lm_head.weight differs from {tokens}, but config.json says tie_word_embeddings: true; set it to false"
            )
    return named


def build_model(config: Shape, weights: dict[str, Tensor], *, source: Path) -> Decoder:
    """Returns a model that adopts the tensors themselves, so that they are in memory only once."""
    with torch.device("meta"):
        model = new_decoder(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UnsupportedModelError(
                f"{source}: parameter {name} has shape {found.get(name, 'none (it is missing)')}, "
                f"config.json makes it {expected.get(name, 'none (it is unknown)')}"
            )
    model.adopt(weights)
    # Adopted tensors require no gradient; a parameter of the model does.
    return model.requires_grad_(True).eval()


def _saved_weights(config: ForeignConfig, folder: Path) -> dict[str, Tensor]:
    """Returns the parameters in a folder that transformers saved, in fp32 and by the names of its
    modules, which the files of older versions do not have. Raises `ForeignModelError`."""
    transformers = imported()
    transformers.logging.disable_progress_bar()
    try:
        module, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **module_options(config),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ForeignModelError(
            f"{folder}: transformers cannot load it: {' '.join(str(error).split())}"
        ) from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, found[problem])):
            raise ForeignModelError(
                f"{folder}: {problem.replace('_', ' ')} in the weights: {', '.join(names[:3])}; expected those that "
                "config.json makes"
            )
    return {name: weights.detach() for name, weights in module.named_parameters()}
