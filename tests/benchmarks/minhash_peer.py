"""datatrove's MinHash pipeline over a folder of JSON lines, between two lines of input, as
`tokenize_stage` does.

    python -m tests.benchmarks.minhash_peer CORPUS SCRATCH

All of its four steps: signatures, buckets, clusters, and a copy of what is left. Words end at
blanks, as its own ways to find them need models that are fetched, and take longer.
"""

import json
import re
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import WordTokenizer


class BlankWords(WordTokenizer):
    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [word.span() for word in re.finditer(r"\S+", text)]


def deduplicated(corpus: Path, scratch: Path) -> int:
    """Returns the number of documents that are left."""
    config = MinhashConfig()
    num_files = len([*corpus.iterdir()])
    signatures, pairs, removed, kept = (
        str(scratch / name) for name in ("signatures", "pairs", "removed", "kept")
    )

    def do(*steps: PipelineStep, tasks: int) -> None:
        LocalPipelineExecutor(
            [*steps], tasks=tasks, workers=1, logging_dir=str(scratch / "logs" / steps[-1].name)
        ).run()

    words = MinhashDedupSignature(signatures, config=config, language=BlankWords())
    do(JsonlReader(str(corpus)), words, tasks=num_files)
    do(MinhashDedupBuckets(signatures, pairs, config=config), tasks=config.num_buckets)
    do(MinhashDedupCluster(pairs, removed, config=config), tasks=1)
    writer = JsonlWriter(kept, compression=None)
    do(JsonlReader(str(corpus)), MinhashDedupFilter(removed), writer, tasks=num_files)
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in Path(kept).iterdir())


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"documents": deduplicated(Path(sys.argv[1]), Path(sys.argv[2]))}), flush=True)
    sys.stdin.readline()
