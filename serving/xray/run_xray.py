"""The process that looks into queries: each line is a request and gets a line. It ends when its
replica does."""

import json
import sys
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson
import torch

from model.files.checkpoint import load_model
from model.files.line_server import LineServer, own_arguments, with_status
from model.gpt import GPT
from raymill.errors import UserError
from serving.engine.runner import LOADED_IN
from serving.protocol.errors import ApiError, error_of
from serving.protocol.served_model import ServedModel, read_served_model
from serving.xray.answer import xray_answer
from serving.xray.xray import XrayRequest, run_checkpoints, shown_checkpoints

LOW_PRIORITY = 10  # gets a tenth of a core that the engine wants too


class Models:
    """Loads the served checkpoint, and others of its run."""

    def __init__(self, folder: Path, *, name: str | None, dtype: torch.dtype) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._load = lru_cache(maxsize=2)(self._read)  # the served one, and the latest other one

    def get(self, step: int | None, *, withdrawn: Collection[str]) -> tuple[GPT, ServedModel]:
        """Returns a step's model. Raises `ApiError` if its checkpoint is missing or damaged, or its
        version is withdrawn."""
        if step is None:
            return self._load(self._folder)
        checkpoints = shown_checkpoints(self._folder, withdrawn)
        if step not in checkpoints:
            known = ", ".join(map(str, checkpoints)) or "none"
            if step in run_checkpoints(self._folder):
                raise error_of("step_withdrawn", param="step", step=step, known=known)
            raise error_of("step_not_found", param="step", step=step, known=known)
        try:
            return self._load(checkpoints[step])
        except UserError as error:
            raise ApiError(
                f"The checkpoint of step {step} cannot be used: {error}", param="step"
            ) from None

    def _read(self, folder: Path) -> tuple[GPT, ServedModel]:
        # The replica has verified the served one.
        model = load_model(folder, dtype=self._dtype, verify=folder != self._folder)
        return model, read_served_model(folder, name=self._name)


def answer_line(line: bytes, models: Models) -> tuple[int, bytes]:
    """Returns the status and JSON body for one request."""
    message: dict[str, Any] = json.loads(line)
    request = XrayRequest(
        **{name: value for name, value in message["request"].items() if value is not None}
    )
    try:
        model, served = models.get(request.step, withdrawn=message["withdrawn"])
        return 200, xray_answer(request, model=model, served=served, arrived_s=message["arrived_s"])
    except FloatingPointError:
        error = error_of("not_finite")
    except ApiError as refused:
        error = refused
    return error.status, orjson.dumps(error.body())


def main() -> int:
    args = own_arguments()  # see `Xray`
    server = LineServer(args["socket"], niceness=LOW_PRIORITY)
    torch.set_num_threads(args["threads"])
    models = Models(Path(args["checkpoint"]), name=args["name"], dtype=LOADED_IN[args["dtype"]])
    server.serve(lambda line: with_status(*answer_line(line, models)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
