"""Begins a run from weights that exist: they become its checkpoint of step 0, from which it resumes
like from any."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from cluster.output.progress import say
from cluster.settings.code_folders import code_version
from cluster.settings.computing import require_computed
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, adapted, run_storage
from cluster.storage.bases import base_folder, find_base
from cluster.storage.registry import find_checkpoint
from cluster.storage.uris import Storage, open_storage
from jobs.exact.run_values import update_rule
from jobs.run.base import ALIGNMENT_BYTES, BASE_FILE, Base, recorded_base
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name
from jobs.run.history import CONFIG_FILE, recorded_config
from model.config import GPTConfig, Shape, shape_differences
from model.files.checkpoint import load_decoder, write_checkpoint
from model.files.checkpoint_folder import MANIFEST, Metadata
from model.files.durable_files import move_into_place
from model.files.hf_config import read_shape
from model.files.saved_parameters import saved_parameters
from model.files.stored_tokenizer import load_tokenizer
from model.shapes import hidden_matrices, parameter_shapes
from model.text.tokenizer import Tokenizer
from raymill.files.safetensors_file import parameter_hash
from raymill.rules.rules import matrices_of, vectors_of
from raymill.state.stored_state import stored_name


def like_its_source(config: RunConfig) -> RunConfig:
    """Returns the run with the exact place of the weights that it begins from, and with their
    tokenizer and shape where its settings name none. A run that has begun keeps what it began with.
    Raises `CheckpointError`."""
    if config.train.init_from is None:
        return config
    run = run_storage(config)
    if run.exists(CONFIG_FILE):
        before = recorded_config(run)
        # What it began from may be gone by now
        base = recorded_base(run)
        tokenizer = base.uri if base else run.child(f"checkpoints/{checkpoint_name(0)}").uri
        shape, train = before.model, config.train
    else:
        tokenizer, folder = _source(config)
        shape = _shape_from(folder, config)
        train = config.train.model_copy(update={"init_from": tokenizer})
    try:
        require_computed(shape, train)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    data = config.data.model_copy(update={"tokenizer": config.data.tokenizer or tokenizer})
    if train.lora_rank and config.model not in (GPTConfig(), shape):
        raise ConfigError(
            f"train.lora_rank={train.lora_rank} freezes the model of train.init_from, which brings its shape: leave "
            "out what is set of the model"
        )
    shape = shape if config.model == GPTConfig() else config.model
    return config.model_copy(update={"data": data, "model": shape, "train": train})


def _source(config: RunConfig) -> tuple[str, Path]:
    """Returns the URI of the weights to begin from, and a local folder with them."""
    storage = config.storage
    return find_checkpoint(str(config.train.init_from), storage.uri, signed_by=storage.signer)


def _shape_from(folder: Path, config: RunConfig) -> Shape:
    """Returns the shape of what is trained from the weights in a folder: theirs, or with an adapter,
    that of transformers' module for it."""
    folder = find_base(folder, config.storage.uri) or folder
    return adapted(read_shape(folder), config.train)


def begin(run: Storage, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Stores the weights that `train.init_from` names as the run's first checkpoint, with the
    vectors of an optimizer that has not begun; those that an adapter stands on, as its base. One
    tensor is in this process's memory at a time (`saved_parameters`). Raises `ConfigError` for
    another shape or vocabulary."""
    uri, folder = _source(config)
    base, own = find_base(folder, config.storage.uri), load_tokenizer(folder)
    shape = read_shape(base or folder)
    if config.train.lora_rank is not None:
        _freeze(config, shape, _weights_in(folder, base), tokenizer, own, uri=uri)
        return
    num_ids, num_rows = tokenizer.vocab_size, shape.vocab_size
    # padded: no setting helps
    is_padded = num_ids != num_rows and not shape.by_transformers
    if is_padded and (own is None or own.hash == tokenizer.hash):
        raise ConfigError(
            f"train.init_from={uri}: the tokenizer has {num_ids} ids and the embedding {num_rows} rows, expected equal "
            f"numbers. Store these weights with an embedding of {num_ids} rows first (in transformers, "
            f"model.resize_token_embeddings({num_ids}))"
        )
    problems = [
        f"model.{name} is {wanted}, there {saved}"
        for name, (wanted, saved) in shape_differences(config.model, shape).items()
        if name not in ("dropout", "initializer_range")
    ]
    if own is not None and own.hash != tokenizer.hash:
        problems.append("data.tokenizer is another one than there")
    if problems:
        raise ConfigError(
            f"train.init_from={uri}: {'; '.join(problems)}. Set these as there, or leave them out"
        )
    weights = _weights_in(folder, base)
    train_state = {"step": torch.tensor(0, dtype=torch.int64)}
    rule = update_rule(config.train)
    matrices = matrices_of(rule, hidden_matrices(config.model))
    zero = torch.zeros(())
    for name, sides in parameter_shapes(shape).items():
        for vector in vectors_of(rule, matrices.get(name)):
            train_state[stored_name(vector, name)] = zero.expand(sides)  # takes no memory
    checkpoints = RunCheckpoints(run)
    spooled = checkpoints.spool / checkpoint_name(0)
    metadata = Metadata(
        run_id=str(config.run_id),
        step=0,
        tokens_seen=0,
        data_manifest_hash=None,
        code_version=code_version(),
        precision=config.train.precision,
    )
    written = write_checkpoint(
        spooled,
        config=config.model,
        state=weights,
        tokenizer=tokenizer,
        metadata=metadata,
        train_state=train_state,
    )
    checkpoints.publish(spooled)
    say(f"begins from {uri}, whose parameters have the hash {written.parameter_hash}")


def _weights_in(folder: Path, base: Path | None) -> Mapping[str, Tensor]:
    """Returns the weights in a folder, one of which is in memory at a time, or those of an adapter
    with its base, all at once."""
    if base is None:
        return saved_parameters(folder)
    return dict(load_decoder(folder, base=base, verify=False).named_parameters())


def _freeze(
    config: RunConfig,
    shape: Shape,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    own: Tokenizer | None,
    *,
    uri: str,
) -> None:
    """Stores the weights as the base of the run's adapter. Raises `ConfigError` for another
    vocabulary."""
    if own is not None and own.hash != tokenizer.hash:
        raise ConfigError(
            f"train.init_from={uri}: data.tokenizer is another one than there. Set it as there, or leave it out"
        )
    base = store_base(config, shape, weights, tokenizer, source=uri)
    say(
        f"trains an adapter beside {uri}, frozen in {base.uri} with the parameter hash {base.parameter_hash}"
    )


def store_base(
    config: RunConfig,
    shape: Shape,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    source: str,
) -> Base:
    """Stores the weights that a run freezes, unless an earlier run has, and records them."""
    storage = open_storage(config.storage.uri)
    hashed = parameter_hash(weights)
    target = base_folder(storage, [str(shape), hashed, tokenizer.hash])
    if not target.exists(MANIFEST):
        _store(target, shape, weights, tokenizer)
    base = Base(target.uri, hashed, source)
    run_storage(config).write_bytes(BASE_FILE, json.dumps(asdict(base), indent=2).encode())
    return base


def _store(
    target: Storage, shape: Shape, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Two runs may store the same base at once: its bytes depend on no run."""
    metadata = Metadata(
        run_id="base", step=0, tokens_seen=0, data_manifest_hash=None, code_version=""
    )
    local = target.local_path("")
    beside = None if local is None else local.parent
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=beside) as scratch:
        folder = Path(scratch) / "base"
        write_checkpoint(
            folder,
            config=shape,
            state=weights,
            tokenizer=tokenizer,
            metadata=metadata,
            train_state=None,
            alignment=ALIGNMENT_BYTES,
        )
        if local is None:
            parent = open_storage(target.uri.rpartition("/")[0])
            parent.upload_folder(folder, target.uri.rpartition("/")[2], last=MANIFEST)
        elif not target.exists(MANIFEST):
            move_into_place(folder, local)
