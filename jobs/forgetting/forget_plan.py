"""Says what it takes to forget: the first step concerned, the checkpoint to go on from, the steps to
take again, and what these cost."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.output.json_result import JsonResult
from cluster.output.result_text import counted, lines
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, max_steps
from cluster.storage.uris import Storage, open_storage
from jobs.forgetting.asked_documents import AskedDocuments, asked_documents
from jobs.proof.opened_run import OpenedRun
from jobs.proof.stored_documents import tokens_of
from jobs.proof.where_run import MappedRun, with_documents
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.costs.cost_rows import ASSUMED_PRICES
from jobs.run.costs.run_cost import devices
from jobs.run.find_run import holes_of
from jobs.run.ledger import Ledger
from jobs.tokens.holes import Hole, Holes
from jobs.training.guards import GuardState
from raymill.errors import UserError

_WITHOUT = "-without-"
_SHOWN_HASH = 8
_MOST_CHARS = 64  # of a run's id


@dataclass(frozen=True)
class ForgetRequest:
    """What a person asks to be forgotten."""

    documents: Sequence[str] = ()  # FILE or FILE:PLACE
    listed: Path | None = None  # a file with one on each line
    pattern: str | None = None

    def references(self) -> list[str]:
        """Returns all references. Raises `ConfigError` for a file that cannot be read."""
        if self.listed is None:
            return [*self.documents]
        try:
            text = self.listed.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--list {self.listed} cannot be read: {error}") from None
        named = [line.strip() for line in text.splitlines() if line.strip()]
        if not named:
            raise ConfigError(f"--list {self.listed} names nothing: expected FILE[:PLACE] lines")
        return [*self.documents, *named]


@dataclass(frozen=True)
class Price(JsonResult):
    """What the steps that are taken again cost, if they take as long as they did."""

    device: str  # `GPU` or `CPU`
    hours: float
    dollars: float
    dollars_per_hour: float
    is_assumed: bool  # the price, and not the run's


@dataclass(frozen=True)
class ForgetPlan(JsonResult):
    """What is to be done."""

    run: str  # URI of the former one
    new_run: str  # id
    documents: int
    tokens: int
    held_out_tokens: int  # of them, which only validate the run and stay
    first_step: int  # that read any of them
    checkpoint: str | None  # the newest one that knows nothing of them; None: from the first step
    steps_again: int
    of_steps: int
    price: Price
    stays: list[str]  # checkpoints of the former run that know nothing of them

    def text(self) -> str:
        """Returns it as people read it."""
        price = self.price
        note = ", an assumption (--price)" if price.is_assumed else ""
        shown: dict[str, Any] = {
            "to forget": f"{counted(self.documents, 'document')}, {counted(self.tokens, 'token')}",
            "first step concerned": f"{self.first_step:,}",
            "goes on from": self.checkpoint or "the first step: no checkpoint before is kept",
            "steps to take again": f"{self.steps_again:,} of {self.of_steps:,}",
            f"{price.device}-hours": f"{price.hours:,.4g}",
            "cost": f"${price.dollars:,.2g} at ${price.dollars_per_hour:g} for a {price.device}-hour{note}",
            "checkpoints that stay": ", ".join(self.stays) or "none",
            "new run": self.new_run,
        }
        if self.held_out_tokens:
            shown["held out"] = (
                f"{self.held_out_tokens:,} of the tokens, which only validate the run, and stay there"
            )
        return "".join(f"{line}\n" for line in lines(shown))


@dataclass(frozen=True)
class Forgetting:
    """A request, as it will be done."""

    opened: OpenedRun
    asked: AskedDocuments
    holes: Holes  # those of the former run too
    plan: ForgetPlan
    storage: Storage

    @property
    def former(self) -> Storage:
        return self.opened.run

    @property
    def new(self) -> Storage:
        return self.storage.child(f"runs/{self.plan.new_run}")

    @property
    def config(self) -> RunConfig:
        """The settings of the new run."""
        config = self.opened.config
        changed = {
            "run_id": self.plan.new_run,
            "data": config.data.model_copy(update={"forgotten": self.holes.hash}),
            "storage": config.storage.model_copy(update={"uri": self.storage.uri}),
        }
        return config.model_copy(update=changed)


def forgetting(run: Storage, request: ForgetRequest, *, price: float | None) -> Forgetting:
    """Returns what has to be done to forget. Raises `UserError` for documents that are unknown or
    that no step learned, and for a run that cannot be trained again bit for bit."""
    root, mark, _ = run.uri.rpartition("/runs/")
    if not mark:
        raise UserError(f"{run.uri} lies in no storage: expected a run under runs/ of one")
    opened = OpenedRun.open(run)
    _require_exact(opened)
    mapped = with_documents(opened)
    asked = asked_documents(mapped, request.references(), pattern=request.pattern)
    holes = Holes.of(
        mapped.mapped.manifest,
        [*holes_of(run, opened.config).holes, *_holes_of(mapped, asked)],
    )
    plan = _planned(opened, asked, holes, price)
    return Forgetting(opened, asked, holes, plan, open_storage(root))


def _require_exact(opened: OpenedRun) -> None:
    if not opened.config.train.exact:
        raise UserError(
            f"{opened.run.uri} has train.exact=false: no two trainings of it have the same bits, so nothing could be "
            "forgotten exactly; train it anew with train.exact and data.forgotten"
        )
    stores = {start.get("data_identity") for start in opened.ledger.events("start")}
    if len(stores) > 1:
        raise UserError(
            f"{opened.run.uri} was trained on {len(stores)} token stores, one after the other; only what was learned "
            "of a single one can be forgotten"
        )


def _holes_of(opened: MappedRun, asked: AskedDocuments) -> list[Hole]:
    holes: list[Hole] = []
    for document in asked.documents:
        digest = hashlib.sha256(tokens_of(opened.mapped, document).tobytes()).hexdigest()
        holes.append(Hole(document.shard.file, document.start, document.end, digest))
    return holes


def _planned(
    opened: OpenedRun, asked: AskedDocuments, holes: Holes, price: float | None
) -> ForgetPlan:
    is_left_out = GuardState(rollbacks=opened.ledger.rollbacks).leaves_out
    stays = [
        name
        for name in RunCheckpoints(opened.run).names
        if step_of(name) < asked.first_step and not is_left_out(step_of(name))
    ]
    start = step_of(stays[-1]) if stays else 0
    of_steps = max_steps(opened.config)
    return ForgetPlan(
        run=opened.run.uri,
        new_run=new_run_id(opened.run.uri.rpartition("/")[2], holes),
        documents=len(asked.documents),
        tokens=sum(document.tokens for document in asked.documents),
        held_out_tokens=asked.held_out_tokens,
        first_step=asked.first_step,
        checkpoint=stays[-1] if stays else None,
        steps_again=of_steps - start,
        of_steps=of_steps,
        price=_price(opened.ledger, opened.config, range(start + 1, of_steps + 1), price),
        stays=stays,
    )


def new_run_id(run_id: str, holes: Holes) -> str:
    """Returns the id of the run that forgets: the same for the same documents of the same run."""
    ending = f"{_WITHOUT}{holes.hash[:_SHOWN_HASH]}"
    first = run_id.partition(_WITHOUT)[0]
    return first[: _MOST_CHARS - len(ending)] + ending


def _price(ledger: Ledger, config: RunConfig, steps: range, price: float | None) -> Price:
    """Prices steps by the time that they took, and those that are still to come by the mean."""
    took = {line["step"]: line["world_size"] * line["wall_s"] for line in ledger.steps}
    mean_s = sum(took.values()) / len(took)
    worker_s = sum(took.get(step, mean_s) for step in steps)
    device = "GPU" if config.scaling.use_gpu else "CPU"
    hours = worker_s * devices(config.scaling) / 3600
    known = config.scaling.price_per_device_hour if price is None else price
    hourly = ASSUMED_PRICES[device] if known is None else known
    return Price(device, hours, hours * hourly, hourly, known is None)
