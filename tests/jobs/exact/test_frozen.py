"""Frozen weights on a CPU are the base's own file in memory, which the workers of a node share."""

import re
from pathlib import Path

import torch

from cluster.settings.run import RunConfig
from jobs.exact.frozen import freeze
from jobs.training.warm_start import store_base
from model.adapters.lora import Adapter
from model.decoders.adapted import AdaptedModel
from model.decoders.make import initial_weights
from model.files.checkpoint_folder import WEIGHTS
from model.text.tokenizer import train_bpe
from raymill.state.sharding import Sharding
from raymill.state.train_state import ALONE
from tests.foreign_models import small


def mappings(file: Path) -> list[range]:
    """Returns the addresses at which this process has a file in memory."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if line.endswith(str(file)):
            match = re.match(r"(\w+)-(\w+) ", line)
            assert match is not None
            found.append(range(int(match[1], 16), int(match[2], 16)))
    return found


def test_frozen_weights__lie_in_the_base_s_file(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog\n"] * 9, vocab_size=300)
    shape = small("qwen3", vocab_size=304)
    config = RunConfig.model_validate({"run_id": "one", "storage": {"uri": str(tmp_path)}})
    weights = dict(initial_weights(shape, 1))
    base = store_base(config, shape, weights, tokenizer, source="somewhere")
    model = AdaptedModel(shape.with_adapter(Adapter(4, 8, ())))
    folder = base.folder(str(tmp_path))
    freeze(model, folder, device=torch.device("cpu"), sharding=Sharding(), group=ALONE)
    places = mappings(folder / WEIGHTS)
    assert places, "the file is mapped"
    for name, values in model.frozen.items():
        assert torch.equal(values, weights[name]), name
        assert any(values.data_ptr() in place for place in places), name
