"""Stage: turns the corpus into a token store, with the same bytes for any number of workers, kills
and restarts."""

import sys

from cluster.settings.run import RunConfig
from cluster.stages.stage import stage_main
from jobs.tokens.build_store import tokenize

if __name__ == "__main__":
    sys.exit(stage_main(tokenize, RunConfig))
