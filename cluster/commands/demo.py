"""The demo: from a real corpus to a served model on a 3-node local cluster, with a node killed and another added."""

import threading
import time
from pathlib import Path
from typing import Any

from cluster.commands.all_stages import river
from cluster.commands.demo_run import demo_config, demo_faults, demo_serving
from cluster.endpoint.endpoint import Endpoint, stream_completion
from cluster.output.progress import say

PROMPTS = ("ROMEO. But soft, what light", "To be, or not to be,")


def run_demo(storage_uri: str, *, preset: str, keep: bool) -> dict[str, Any]:
    """Runs every stage and returns their figures. With `keep` the endpoint stays up until a signal."""
    start = time.monotonic()
    config, source = demo_config(storage_uri, preset)
    say(f"corpus: {source}")
    with river(config, faults=demo_faults(config), serving=demo_serving(config)) as found:
        endpoint = found.endpoint
        assert endpoint is not None, "the demo serves"
        completions = [ask(endpoint, prompt) for prompt in PROMPTS]
        result = found.tokens | found.run | {"evaluation": found.evaluation, "completions": completions}
        result |= {"corpus": source, "stage_s": found.stage_s, "url": endpoint.url, "model": endpoint.model}
        result |= {"html": found.report["html"], "figures": found.report["figures"]}
        result["wall_s"] = round(time.monotonic() - start, 1)
        _print_figures(result)
        if keep:
            key = Path(str(endpoint.api_key_file)).read_text(encoding="utf-8").split()[0]
            say(
                f"\nThe endpoint stays up until Ctrl-C.  URL {endpoint.url}/v1  key {key}\n"
                f"curl {endpoint.url}/v1/completions -H 'Authorization: Bearer {key}'"
                " -H 'Content-Type: application/json'"
                f' -d \'{{"model": "{endpoint.model}", "prompt": "To be", "max_tokens": 40}}\''
            )
            threading.Event().wait()
    return result


def ask(endpoint: Endpoint, prompt: str) -> dict[str, Any]:
    """Returns one streamed completion, with its timing in seconds."""
    request = {"prompt": prompt, "max_tokens": 64, "temperature": 0.8, "seed": 7}
    return stream_completion(endpoint, request, on_text=lambda text: None)


def _print_figures(result: dict[str, Any]) -> None:
    """Prints what was done, in numbers."""
    facts = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n")
    reasons = ", ".join(f"{count} {reason}" for reason, count in result["dropped"].items() if count) or "none"
    say(facts.format(**result, reasons=reasons, workers=" -> ".join(map(str, result["world_sizes"]))))
    for completion in result["completions"]:
        say(f"\n{completion['prompt']}|{completion['text']}")
        say(f"   first token after {completion['ttft_s'] * 1e3:.0f} ms, all after {completion['total_s'] * 1e3:.0f} ms")
