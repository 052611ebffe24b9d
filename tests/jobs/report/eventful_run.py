"""A made-up run with a kill and a resize, and a page of a report as a reader gets it."""

import html.parser
import json
import math
import random
from typing import Any

from cluster.settings.run import RunConfig, to_yaml
from cluster.storage.uris import Storage
from jobs.run.ledger import LEDGER

TOKENS_PER_STEP = 8 * 64


def eventful_lines() -> list[dict[str, Any]]:
    """300 steps: 2 workers, a kill at step 123, 1 worker from 120 on, 2 from 200 on, a kill at 265,
    2 from 260 on."""
    rng = random.Random(0)
    clock = 1_700_000_000.0
    lines: list[dict[str, Any]] = []

    def add(line: dict[str, Any], *, after_s: float) -> None:
        nonlocal clock
        clock += after_s
        lines.append({"time": round(clock, 3), **line})

    for attempt, (world_size, first, last) in enumerate(
        [(2, 1, 123), (1, 121, 200), (2, 201, 265), (2, 261, 300)], start=1
    ):
        workers = [{"pid": 100 + rank, "node": f"node-{rank + 1}"} for rank in range(world_size)]
        checkpoint = f"step-{first - 1:09d}" if first > 1 else None
        start = {"event": "start", "attempt": attempt, "world_size": world_size, "step": first - 1}
        add(
            {**start, "checkpoint": checkpoint, "workers": workers},
            after_s=5.0 if attempt > 1 else 0.0,
        )
        for step in range(first, last + 1):
            # Of the step before, in the line that follows it
            saving_s = 0.2 if step % 40 == 1 and step > 1 else 0.0
            wall_s = 1.0 / world_size + rng.uniform(0, 0.05) + saving_s
            add(
                {
                    "step": step,
                    "tokens_seen": step * TOKENS_PER_STEP,
                    "lr": 1e-3 * min(step / 20, 1) * (0.55 + 0.45 * math.cos(math.pi * step / 300)),
                    "loss": 2.3 + 3.5 * math.exp(-step / 60) + rng.gauss(0, 0.06),
                    "world_size": world_size,
                    "attempt": attempt,
                    "seconds": {
                        "load": 0.01,
                        "forward": 0.3 / world_size,
                        "backward": 0.6 / world_size,
                        "sync": 0.03 * (world_size - 1),
                        "update": 0.02,
                        "checkpoint": saving_s,
                        "stall": 0.01,
                    },
                    "wall_s": round(wall_s, 6),
                    "tokens_per_s": round(TOKENS_PER_STEP / wall_s, 1),
                    "mfu": None,
                },
                after_s=wall_s,
            )
            if step % 50 == 0:
                loss = 2.4 + 3.5 * math.exp(-step / 60)
                samples = [
                    {"prompt": "<script>alert(1)</script>", "text": f" & what step {step} says"}
                ]
                validation = {
                    "event": "validation",
                    "step": step,
                    "val_loss": loss,
                    "val_bits_per_byte": loss / 2,
                }
                add({**validation, "samples": samples}, after_s=0.1)
            if step % 40 == 0:
                saved = {
                    "event": "checkpoint",
                    "step": step,
                    "checkpoint": f"/mill/step-{step:09d}",
                }
                add({**saved, "parameter_hash": f"{step:064x}", "seconds": 0.9}, after_s=0.0)
    add({"event": "finish", "step": 300}, after_s=0.0)
    return lines


def write_run(run: Storage, lines: list[dict[str, Any]]) -> None:
    config = {
        "run_id": "eventful",
        "train": {"max_tokens": 300 * TOKENS_PER_STEP, "global_batch_size": 8},
    }
    settings = RunConfig.model_validate(
        config | {"model": {"preset": "tiny"}, "scaling": {"max_workers": 1}}
    )
    run.write_bytes("config.yaml", to_yaml(settings).encode())
    run.write_bytes(LEDGER, "".join(json.dumps(line) + "\n" for line in lines).encode())


class Page(html.parser.HTMLParser):
    """What a reader gets of a page: its texts, its images, and everything that names another
    resource."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.images: list[dict[str, str]] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.references += [
            value for name, value in values.items() if name in ("src", "srcset", "href")
        ]
        if tag == "img":
            self.images.append(values)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.cells.append(data.strip())

    def value_of(self, name: str) -> str:
        return self.cells[self.cells.index(name) + 1]
