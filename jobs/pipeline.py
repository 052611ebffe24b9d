"""Stage: runs all stages in one job: corpus, tokens, trained and published checkpoint, evaluation,
report."""

import sys
from typing import Any

from cluster.settings.run import RunConfig
from cluster.settings.stages import EvaluateConfig
from cluster.stages.stage import stage_main
from cluster.storage.uris import open_storage
from jobs.evaluate import evaluate
from jobs.pretrain import prepare, train_on
from jobs.report.make_report import make_report


def pipeline(config: RunConfig) -> dict[str, Any]:
    """Returns the figures of every stage. A stage whose result exists already is not repeated."""
    text = prepare(config)
    run = train_on(text)
    evaluation = evaluate(
        EvaluateConfig(
            checkpoint=run["checkpoint"],
            max_tokens=config.train.eval_max_tokens,
            storage=config.storage,
        )
    )
    report = make_report(open_storage(run["run_dir"]))
    return text.figures | run | {"evaluation": evaluation} | report


if __name__ == "__main__":
    sys.exit(stage_main(pipeline, RunConfig))
