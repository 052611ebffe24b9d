"""The quick demo on a local cluster with `scaling.use_gpu: auto`: a worker killed while it trains, the
steps around the kill again by one undisturbed worker, and an endpoint that answers.

    python -m tests.gpu.proof.demo FOLDER

Prints, last, one JSON object. It fails where a bit is another one without the kill.
"""

import json
import sys
import time
from pathlib import Path

from cluster.commands.demo import PROMPTS, ask, river, undisturbed
from cluster.commands.demo_run import QUICK, demo_config, demo_faults, demo_serving
from cluster.settings.run import RunConfig, ScalingConfig
from jobs.run.find_run import find_run
from model.hardware.processor import num_gpus_here

_PRESET = "demo-llama"


def config_of(storage_uri: str) -> RunConfig:
    """Returns the demo's run, with a worker for each GPU, or with two on CPUs."""
    config, _ = demo_config(storage_uri, _PRESET, QUICK)
    num_workers = num_gpus_here() or config.scaling.max_workers
    most = min(num_workers, config.train.global_batch_size // config.train.micro_batch_size)
    scaling = config.scaling.model_dump() | {"use_gpu": "auto", "max_workers": most}
    return config.model_copy(update={"scaling": ScalingConfig.model_validate(scaling)})


def show(folder: Path) -> dict[str, object]:
    storage_uri, start_s = str(folder / "store"), time.monotonic()
    config = config_of(storage_uri)
    faults, serving = demo_faults(config, QUICK), demo_serving(config, QUICK)
    with river(config, faults=faults, serving=serving, is_short=True) as flow:
        proof = undisturbed(find_run(flow.run["run_dir"], storage_uri))
        answer = ask(flow.endpoint, PROMPTS[0])
    return {
        "use_gpu": config.scaling.use_gpu,
        "world_sizes": flow.run["world_sizes"],
        "restarts": flow.run["restarts"],
        "first_loss": flow.run["first_loss"],
        "train_loss": flow.run["train_loss"],
        "tokens_per_s": flow.run["tokens_per_s"],
        "precision": flow.run["precision"],
        "parameter_hash": flow.run["parameter_hash"],
        "steps_again": proof["steps"],
        "answer": answer["text"],
        "wall_s": round(time.monotonic() - start_s, 1),
    }


if __name__ == "__main__":
    print(json.dumps(show(Path(sys.argv[1]))))
