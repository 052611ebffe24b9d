"""Stage: runs all stages in one job: corpus, tokens, trained and published checkpoint, evaluation,
report."""

import sys
from typing import Any

from cluster.settings.run import RunConfig
from cluster.settings.stages import EvaluateConfig
from cluster.stages.stage import stage_main
from cluster.storage.uris import open_storage
from cluster.wings import added
from jobs.evaluate import evaluate
from jobs.pretrain import prepare, train_on


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
    figures = text.figures | run | {"evaluation": evaluation}
    for report in added(lambda wing: wing.run_report):
        figures |= report(open_storage(run["run_dir"]))
    return figures


if __name__ == "__main__":
    sys.exit(stage_main(pipeline, RunConfig))
