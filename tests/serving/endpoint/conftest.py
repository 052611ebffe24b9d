"""One Ray for the files of this folder, and an endpoint without keys for those that need nothing
else."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.settings.serve import EngineConfig, ServeConfig
from model.files.checkpoint_folder import read_metadata
from model.gpt import GPT
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from tests.checkpoints import save_model
from tests.serving.endpoint_parts import Endpoints, ray_cluster
from tests.serving.hostile_requests import MODEL
from tests.serving.tiny_models import lively_model, write_model
from tests.serving.tools.templates import HERMES_TEMPLATE


@pytest.fixture(scope="package")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    with contextlib.chdir(tmp_path_factory.mktemp("ray")), ray_cluster(num_cpus=3) as ray_logs:
        yield Endpoints(ray_logs)


@pytest.fixture(scope="session")
def run_checkpoint(
    checkpoint: Path, model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Step 7 of a run, in a folder beside step 3."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(checkpoint, folder / "step-7")
    early = GPT(model.config)
    early.init_weights(99)
    metadata = replace(read_metadata(checkpoint), step=3)
    save_model(folder / "step-3", model=early.eval(), tokenizer=tokenizer, metadata=metadata)
    return folder / "step-7"


@pytest.fixture(scope="module")
def open_config(run_checkpoint: Path) -> ServeConfig:
    return ServeConfig(
        checkpoint=str(run_checkpoint), model_name=MODEL, engine=EngineConfig(max_num_seqs=8)
    )


@pytest.fixture(scope="module")
def open_url(endpoints: Endpoints, open_config: ServeConfig) -> str:
    """An endpoint that asks for no key."""
    return str(endpoints.deployed(open_config)["url"])


@pytest.fixture(scope="session")
def roomy_model(tokenizer: Tokenizer) -> GPT:
    """It has room for what applications write around a question."""
    return lively_model(tokenizer, n_positions=4096)


@pytest.fixture(scope="session")
def roomy_checkpoint(
    roomy_model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_model(tmp_path_factory.mktemp("roomy") / "step-1", roomy_model, tokenizer)


@pytest.fixture(scope="session")
def tool_checkpoint(
    roomy_model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model, with a chat template that takes tools."""
    chat = ChatFormat(HERMES_TEMPLATE, "", tokenizer.end_of_text)
    talking = Tokenizer.from_json(tokenizer.to_json(), chat)
    return write_model(tmp_path_factory.mktemp("tools") / "step-1", roomy_model, talking)


def _open_endpoint(endpoints: Endpoints, checkpoint: Path) -> str:
    config = ServeConfig(
        checkpoint=str(checkpoint), model_name=MODEL, engine=EngineConfig(max_num_seqs=8)
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture(scope="module")
def roomy_url(endpoints: Endpoints, roomy_checkpoint: Path) -> str:
    """An endpoint of that model, which asks for no key."""
    return _open_endpoint(endpoints, roomy_checkpoint)


@pytest.fixture(scope="module")
def tool_url(endpoints: Endpoints, tool_checkpoint: Path) -> str:
    """An endpoint that takes tools, and asks for no key."""
    return _open_endpoint(endpoints, tool_checkpoint)
