"""The engine's own process: loads the checkpoint, then steps while there is work; it ends when its replica does."""

import argparse
import contextlib
import select
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from model.checkpoint import load_model
from model.errors import UserError
from serving.engine import Engine
from serving.messages import FrameBuffer, encode_frame, parse_request

RECEIVE_BYTES = 1 << 16


class Channel:
    """The blocking end of the socket between the replica and its engine process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = FrameBuffer()

    def send(self, message: Any) -> None:
        self._connection.sendall(encode_frame(message))

    def receive(self, *, wait: bool) -> Iterator[Any]:
        """The messages that have arrived; `wait` blocks until some bytes have. Raises `EOFError` once the replica
        has closed its end or died: this is how the process learns that nobody needs it."""
        while select.select([self._connection], [], [], None if wait else 0)[0]:
            data = self._connection.recv(RECEIVE_BYTES)
            if not data:
                raise EOFError
            yield from self._frames.feed(data)
            wait = False


def run_engine(engine: Engine, channel: Channel) -> NoReturn:
    """Commands in, one report per step out, until the replica is gone."""
    while True:
        for message in channel.receive(wait=not engine.has_work):
            if "submit" in message:
                engine.submit(parse_request(message["submit"]))
            else:
                engine.cancel(message["cancel"])
        channel.send(engine.step())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of the connection to the replica")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--num-slots", type=int, required=True, help="sequences decoded together")
    parser.add_argument("--eos-id", type=int, help="token that ends a text; none for a checkpoint without tokenizer")
    parser.add_argument("--threads", type=int, required=True, help="compute threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    channel = Channel(socket.socket(fileno=args.socket))
    try:
        # The replica has the folder from `resolve_checkpoint`, which verified it.
        model = load_model(args.checkpoint, dtype=getattr(torch, args.dtype), verify=False)
    except UserError as error:
        channel.send({"error": str(error)})
        return 1
    engine = Engine(model, num_slots=args.num_slots, eos_id=args.eos_id)
    channel.send({"ready": True})
    with contextlib.suppress(EOFError, ConnectionError):
        run_engine(engine, channel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
