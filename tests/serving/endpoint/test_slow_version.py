"""A version that is too slow: it passes the gate, goes live under load, and is rolled back by
itself on its latency."""

from pathlib import Path

import pytest

from cluster.settings.serve import DeliveryConfig, EngineConfig, ServeConfig
from model.config import GPTConfig
from model.files.checkpoint_folder import read_metadata
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.delivery_parts import Admin, Load, greedy_texts
from tests.serving.endpoint_parts import Endpoints
from tests.serving.tiny_models import write_model

ADMIN_KEY = "sk-admin"
MAX_LATENCY_RATIO = 4.0

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def large_model(model: GPT) -> GPT:
    """Of the same vocabulary and context, with a thousand times the weights."""
    shape = {"n_positions": model.config.n_positions, "n_layer": 10, "n_head": 10, "n_embd": 640}
    gpt = GPT(GPTConfig(vocab_size=model.config.vocab_size, **shape))
    gpt.init_weights(5)
    return gpt.eval()


def test_a_version_that_is_too_slow_returns_by_itself(
    endpoints: Endpoints,
    model: GPT,
    large_model: GPT,
    checkpoint: Path,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    large = write_model(tmp_path / "large", large_model, tokenizer)
    folders = {checkpoint: model, large: large_model}
    versions = [str(read_metadata(folder).parameter_hash)[:16] for folder in folders]
    found = [greedy_texts(gpt, tokenizer, prompts) for gpt in folders.values()]
    (tmp_path / "admin").write_text(ADMIN_KEY)
    config = ServeConfig(
        checkpoint=str(checkpoint),
        model_name="tiny",
        admin_key_file=str(tmp_path / "admin"),
        engine=EngineConfig(max_num_seqs=8),
        delivery=DeliveryConfig(watch_s=600, max_latency_ratio=MAX_LATENCY_RATIO),
    )
    url = str(endpoints.deployed(config)["url"])
    admin = Admin(url, ADMIN_KEY)
    load = Load(url, prompts, dict(zip(versions, found, strict=True)), num_connections=4)
    with load.running():
        load.wait_for_more(100)
        assert admin.promote(large).status_code == 202
        state = admin.wait_for("steady", timeout_s=180)
        load.wait_for_more(50)
    print(
        f"{state['outcome']['reason']}; {load.num_answers} answers, of which {len(load.wrong)} were wrong"
    )
    assert load.wrong == []
    answered = [version for answers in load.connections for version in answers.versions]
    print(f"the slow version gave {answered.count(versions[1])} answers")
    assert answered.count(versions[1]) >= 20
    assert (
        state["outcome"]["result"] == "rolled_back" and "ms a token" in state["outcome"]["reason"]
    )
    assert state["live"]["version"] == versions[0]
    assert all(answers.versions[-1] == versions[0] for answers in load.connections)
