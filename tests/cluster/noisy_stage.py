"""Stands in for a stage in tests: does what the words in `noisy.txt` beside its settings say."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.time_limits import limit_s


def main() -> int:
    code = 0
    for words in Path(sys.argv[1]).with_name("noisy.txt").read_text().splitlines():
        what, _, rest = words.partition(" ")
        match what:
            case "say":
                print(rest, flush=True)
            case "complain":
                sys.stderr.write(f"{rest}\n")
            case "result":
                print(f"raymill-result: {json.dumps({'value': rest})}", flush=True)
            case "wait-for-sigterm":
                wait_for_sigterm()
            case "leave-behind":  # a process that keeps the output open
                subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({limit_s(30)})"])
            case "exit":
                code = int(rest)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
    return code


def wait_for_sigterm() -> None:
    asked: list[int] = []  # an event's lock may be held when a handler wants it
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    print("waiting", flush=True)
    while not asked:
        time.sleep(0.05)
    print("asked to stop", flush=True)


if __name__ == "__main__":
    sys.exit(main())
