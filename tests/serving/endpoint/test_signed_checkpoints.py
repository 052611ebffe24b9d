"""An endpoint that asks for signatures serves and promotes what the key's holder has signed, and
nothing else."""

import shutil
from pathlib import Path

import pytest

from cluster.settings.run import StorageConfig
from cluster.settings.serve import DeliveryConfig, EngineConfig, ReplicaConfig, ServeConfig
from jobs.proof.sign_checkpoint import sign_checkpoint
from model.gpt import GPT
from model.signing.signature import SigningKey
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from tests.serving.delivery_parts import Admin, version
from tests.serving.endpoint_parts import Endpoints
from tests.serving.tiny_models import write_model
from tests.signing_keys import made_keys

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ADMIN_KEY = "sk-admin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the keys `ours` and `theirs`, and copies of a checkpoint: signed, unsigned, and signed
    with another key."""
    return tmp_path_factory.mktemp("signed")


@pytest.fixture(scope="module")
def checkpoints(
    folder: Path, checkpoint: Path, model: GPT, tokenizer: Tokenizer
) -> dict[str, Path]:
    other = GPT(model.config)
    other.init_weights(2)
    newer = write_model(folder / "step-8", other.eval(), tokenizer, step=8)
    keys = {name: made_keys(folder, name)[0] for name in ("ours", "theirs")}
    made: dict[str, Path] = {}
    for name, source, key in (
        ("first", checkpoint, "ours"),
        ("signed", newer, "ours"),
        ("unsigned", newer, None),
        ("foreign", newer, "theirs"),
    ):
        made[name] = folder / name / source.name
        shutil.copytree(source, made[name])
        if key:
            sign_checkpoint(str(made[name]), SigningKey(keys[key]), storage_uri=str(folder))
    return made


def config_of(folder: Path, checkpoint: Path) -> ServeConfig:
    (folder / "admin").write_text(ADMIN_KEY)
    return ServeConfig(
        checkpoint=str(checkpoint),
        model_name="tiny",
        admin_key_file=str(folder / "admin"),
        storage=StorageConfig(uri=str(folder / "storage"), signed_by=str(folder / "ours.pub")),
        replicas=ReplicaConfig(min_replicas=1, max_replicas=1),
        engine=EngineConfig(max_num_seqs=4),
        delivery=DeliveryConfig(watch_s=0, max_latency_ratio=None),
    )


def test_an_endpoint_takes_signed_checkpoints_alone(
    endpoints: Endpoints, folder: Path, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=r"is not signed: expected model\.sig"):
        endpoints.deployed(config_of(folder, checkpoints["unsigned"]))
    url = str(endpoints.deployed(config_of(folder, checkpoints["first"]))["url"])
    admin = Admin(url, ADMIN_KEY)
    for name, message in (
        ("unsigned", "is not signed: expected model.sig"),
        ("foreign", "was signed with another key"),
    ):
        refused = admin.promote(checkpoints[name])
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    assert admin.delivery["live"]["version"] == version(checkpoints["first"])
    admin.promoted(checkpoints["signed"])
    assert admin.delivery["live"]["version"] == version(checkpoints["signed"])
    card = admin.http.get("/v1/models").json()["data"][0]
    assert card["statement"]["metadata"]["step"] == "8"
    assert "tokenizer.json" in [material["name"] for material in card["statement"]["materials"]]
    admin.http.close()
