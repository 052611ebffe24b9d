"""The text of a rehearsal: a small corpus as it is, else the front of each of its sources, as documents in one folder.

python -m jobs.rehearsal_corpus RUN.yaml FOLDER
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.flags import read_config
from cluster.parser import ConfigError, Parser
from cluster.stage_module import print_result
from jobs.corpus_chunks import whole_file
from jobs.corpus_listing import list_corpus
from jobs.train_tokenizer import kept_texts

MAX_BYTES = 8 << 20


def rehearsal_corpus(config: RunConfig, folder: Path) -> dict[str, Any]:
    """`source`, with the bytes of the corpus and those of its part. Raises `CorpusError`."""
    data = config.data
    listing = list_corpus(data.source)
    if listing.token_stores:
        raise ConfigError("--calibrate measures tokenizing too: name texts with --data.source, not token stores")
    total = sum(file.size for file in listing.files)
    if total <= MAX_BYTES:
        return {"source": data.source, "source_bytes": total, "rehearsed_bytes": total}
    folder.mkdir()
    groups = [list(group) for _, group in groupby(listing.files, key=lambda file: file.source)]
    written = 0
    for number, files in enumerate(groups):
        with (folder / f"source-{number}.jsonl").open("w", encoding="utf-8") as file:
            left = MAX_BYTES // len(groups)
            for text in kept_texts(map(whole_file, range(len(files)), files), data):
                written += file.write(json.dumps({data.text_field: text}, ensure_ascii=False) + "\n")
                left -= len(text)
                if left <= 0:
                    break
    return {"source": [str(folder)], "source_bytes": total, "rehearsed_bytes": written}


def main() -> int:
    def run() -> dict[str, Any]:
        parser = Parser(prog="python -m jobs.rehearsal_corpus", description=__doc__)
        parser.add_argument("config", type=Path, help="YAML file with the run's settings")
        parser.add_argument("folder", type=Path, help="where the text is written")
        arguments = parser.parse_args()
        return rehearsal_corpus(read_config(arguments.config, RunConfig), arguments.folder)

    return print_result(run)


if __name__ == "__main__":
    sys.exit(main())
