"""Stage: makes the trace index of a token store, with the same bytes for any number of workers, kills
and restarts."""

import sys
from typing import Any

from cluster.settings.stages import IndexConfig
from cluster.stages.stage import stage_main
from jobs.corpus.ray_data_tasks import run_tasks
from jobs.run.find_run import token_uses
from jobs.tokens.inspect_store import find_store
from jobs.trace.build_index import index_store


def index(config: IndexConfig) -> dict[str, Any]:
    """Indexes the store that the settings name, by tasks of the cluster. Raises `UserError`."""
    store = find_store(config.store, config.storage.uri, uses_in=token_uses)
    return index_store(store, run=run_tasks)


if __name__ == "__main__":
    sys.exit(stage_main(index, IndexConfig))
