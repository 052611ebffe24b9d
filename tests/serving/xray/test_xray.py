"""Looking inside a query over HTTP, with a real engine and a real process for it beside."""

import asyncio
import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from cluster.settings.serve import EngineConfig, ServeConfig
from model.files.checkpoint_folder import read_metadata
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.api.access import AccessRules
from serving.api.keys import ApiKey
from serving.delivery.promotion import PromotionOutcome, version_of
from serving.delivery.versions import Versions
from serving.engine.kv_cache_size import Memory
from serving.pages.chat_page import CHAT_FILES, SHARED_FILES
from serving.protocol.served_model import read_served_model
from serving.xray import xray as xray_module
from serving.xray.routes import INSIDE_FILES, xray_of
from serving.xray.xray import run_checkpoints
from tests.checkpoints import save_model
from tests.serving.endpoint_parts import Run, replica_client, shared_replica
from tests.waiting import wait_in_loop_until

pytestmark = pytest.mark.more

KEY = "sk-xray"
PROMPT = "the quick naïve fox"
Body = dict[str, Any]
PHASES = ["queue", "tokenize", "prefill", "sample", "decode", "detokenize", "inspect"]


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    with shared_replica(folder) as run:
        yield run


async def look(http: httpx.AsyncClient, **fields: Any) -> Body:
    answer = await http.post("/v1/xray", json={"model": "tiny", "prompt": PROMPT} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def processes() -> list[psutil.Process]:
    living = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in living if "serving.xray.run_xray" in p.cmdline()]


@pytest.fixture(scope="module")
def folder(
    checkpoint: Path, model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The served checkpoint, an earlier one of its run in two attempts, and one of another run."""
    run_folder = tmp_path_factory.mktemp("run")
    served = run_folder / "step-7"
    shutil.copytree(checkpoint, served)
    metadata = read_metadata(checkpoint)
    for seed, name, changes in (
        (1, "step-3-1", {"step": 3}),
        (2, "step-3-2", {"step": 3, "generation": 2}),
        (3, "other", {"step": 5, "run_id": "another"}),
    ):
        save_model(
            run_folder / name,
            model=early(model, seed),
            tokenizer=tokenizer,
            metadata=replace(metadata, **changes),
        )
    (run_folder / "step-9").mkdir()  # torn
    return served


def early(model: GPT, seed: int) -> GPT:
    other = GPT(model.config)
    other.init_weights(seed + 40)
    return other.eval()


def test_an_answer_shows_the_models_own_numbers(run: Run, model: GPT, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    expected = generate(
        model, ids, max_tokens=12, params=SamplingParams(temperature=0.0), eos_id=tokenizer.eot_id
    )
    assert len(expected) == 12
    sequence = ids + expected
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([sequence]))[0])
    probabilities = logits.softmax(-1)

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await look(http, max_tokens=12, layers=[0, 1], top=4)
        tokens = answer["tokens"]
        assert [t["id"] for t in tokens] == sequence and answer["num_prompt_tokens"] == len(ids)
        assert answer["text"] == tokenizer.decode(expected) and answer["finish_reason"] == "length"
        assert [t["generated"] for t in tokens] == [False] * len(ids) + [True] * 12
        data = b"".join(map(tokenizer.token_bytes, sequence))
        assert [data[slice(*t["bytes"])] for t in tokens] == [
            tokenizer.token_bytes(i) for i in sequence
        ]
        assert tokens[0]["probability"] is None
        for position, token in enumerate(tokens[1:]):
            assert token["logit"] == pytest.approx(logits[position, token["id"]].item(), abs=1e-5)
            assert token["probability"] == pytest.approx(
                probabilities[position, token["id"]].item(), abs=1e-5
            )
            assert token["rank"] == 1 + int(
                (logits[position] > logits[position, token["id"]]).sum()
            )
        table = model.transformer.wte.weight.detach()
        assert [t["embedding_norm"] for t in tokens] == pytest.approx(
            table[sequence].norm(dim=-1).tolist(), rel=1e-5
        )
        assert all(
            len(t["nearest"]) == 5 and t["id"] not in [n["id"] for n in t["nearest"]]
            for t in tokens
        )

        num_read = len(sequence) - 1
        assert len(answer["predictions"]) == num_read
        for position, prediction in enumerate(answer["predictions"]):
            assert [c["id"] for c in prediction["top"]] == logits[position].topk(4).indices.tolist()
            entropy = -(probabilities[position] * probabilities[position].log()).sum().item()
            assert prediction["entropy_nats"] == pytest.approx(entropy, abs=1e-4)

        assert [(m["layer"], m["head"]) for m in answer["attention"]] == [
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 1),
        ]
        for attention in answer["attention"]:
            assert [len(row) for row in attention["rows"]] == list(range(1, num_read + 1))
            assert all(abs(sum(row) - 1) <= 1e-5 and min(row) >= 0 for row in attention["rows"])

        shapes = {(s["name"], s["layer"]): s["shape"] for s in answer["stages"]}
        length = len(ids)
        assert list(shapes)[:4] == [
            (n, None) for n in ("normalize", "tokenize", "token embedding", "position embedding")
        ]
        assert shapes["tokenize", None] == [1, length] and shapes["token embedding", None] == [
            1,
            length,
            32,
        ]
        assert shapes["attention", 1] == [1, 2, length, length] and shapes["logits", None] == [
            1,
            length,
            300,
        ]
        assert list(shapes)[-1] == ("sampling", None) and len(shapes) == 12

    run(check)


def test_times_sum_to_the_whole(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for _again in range(2):  # with the start of the process, and without
            start_s = time.monotonic()
            timeline = (await look(http, max_tokens=20))["timeline"]
            wall_ms = (time.monotonic() - start_s) * 1e3
            spans = timeline["spans"]
            assert {s["name"] for s in spans} == set(PHASES)
            assert sum(s["ms"] for s in spans) == pytest.approx(timeline["total_ms"], rel=0.05)
            assert timeline["total_ms"] <= wall_ms
            ends = [(s["start_ms"], s["start_ms"] + s["ms"]) for s in spans]
            assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(ends))
            assert sum(s["name"] == "decode" for s in spans) == 19 and spans[0]["name"] == "queue"

    run(check)


def test_a_seed_gives_the_tokens_of_a_completion(run: Run) -> None:
    sampling = {"max_tokens": 16, "temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 12}

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        completion = (
            await http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT} | sampling)
        ).json()
        answer = await look(http, **sampling)
        assert answer["text"] == completion["choices"][0]["text"] and answer["seed"] == 12
        assert all(0 < t["drawn_probability"] <= 1 for t in answer["tokens"] if t["generated"])
        assert any(
            t["drawn_probability"] > t["probability"] for t in answer["tokens"] if t["generated"]
        )

    run(check)


def test_one_layer_of_a_sequence_as_ids_equals_that_of_the_whole(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        whole = await look(http, max_tokens=8, layers=[1], heads=[1])
        ids = [t["id"] for t in whole["tokens"]][:-1]
        alone = await look(http, prompt=ids, max_tokens=0, layers=[1], heads=[1])
        assert alone["text"] == "" and len(alone["attention"]) == 1
        [only] = (await look(http, prompt="", max_tokens=0))["tokens"]  # the end-of-text token
        assert only["probability"] is None and only["rank"] is None
        for a, b in zip(alone["attention"][0]["rows"], whole["attention"][0]["rows"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)

    run(check)


def test_a_checkpoint_of_the_run_can_be_asked(
    run: Run, folder: Path, model: GPT, tokenizer: Tokenizer
) -> None:
    assert {step: path.name for step, path in run_checkpoints(folder).items()} == {
        3: "step-3-2",
        7: "step-7",
    }
    ids = tokenizer.encode(PROMPT)
    greedy = SamplingParams(temperature=0.0)
    expected = generate(early(model, 2), ids, max_tokens=10, params=greedy, eos_id=tokenizer.eot_id)

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        assert (await http.get("/v1/xray")).json()["steps"] == [3, 7]
        answer = await look(http, max_tokens=10, step=3)
        assert answer["step"] == 3 and answer["text"] == tokenizer.decode(expected)
        assert (await look(http, max_tokens=10))["step"] == 7
        for step in (5, 9):
            refused = await http.post(
                "/v1/xray", json={"model": "tiny", "prompt": "x", "step": step}
            )
            assert refused.status_code == 404 and "3, 7" in refused.json()["error"]["message"]

    run(check)


@pytest.mark.parametrize("ended", ["refused", "rolled_back", "promoted"])
def test_a_checkpoint_that_was_refused_or_rolled_back_is_not_shown(
    run: Run, folder: Path, ended: str
) -> None:
    version = version_of(
        read_served_model(folder.with_name("step-3-2"), name=None), checkpoint="elsewhere"
    )
    ends = [
        PromotionOutcome(version=version, result=result, reason="why")
        for result in ("refused", ended)
    ]

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        serving = versions.delivery
        versions.delivery = serving.having(history=tuple(ends))
        shown = (await http.get("/v1/xray")).json()["steps"]
        answer = await http.post("/v1/xray", json={"model": "tiny", "prompt": "x", "step": 3})
        served = await http.post("/v1/xray", json={"model": "tiny", "prompt": "x", "step": 7})
        versions.delivery = serving
        assert served.status_code == 200
        if ended == "promoted":
            assert (shown, answer.status_code) == ([3, 7], 200)
        else:
            error = answer.json()["error"]
            assert (shown, answer.status_code, error["code"], error["param"]) == (
                [7],
                403,
                "step_withdrawn",
                "step",
            )

    run(check)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"max_tokens": 33}, 400, "max_tokens"),
        ({"prompt": [1] * 127, "max_tokens": 2}, 400, "max_tokens"),
        ({"prompt": [300]}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"layers": [2]}, 400, "layers"),
        ({"layers": [-1]}, 400, "layers.0"),
        ({"layers": []}, 400, "layers"),
        ({"heads": [0, 9]}, 400, "heads"),
        ({"layers": [0] * 128, "prompt": [1] * 100}, 400, "layers"),
        ({"top": 21}, 400, "top"),
        ({"n": 2}, 400, "n"),
        ({"model": "gpt-4"}, 404, "model"),
    ],
)
def test_a_request_over_a_limit_is_refused_by_name(
    run: Run, fields: Body, status: int, param: str
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await http.post("/v1/xray", json={"model": "tiny", "prompt": PROMPT} | fields)
        assert answer.status_code == status and answer.json()["error"]["param"] == param, (
            answer.text
        )

    run(check)


def test_one_at_a_time_and_beside_the_engine(run: Run) -> None:
    """While an x-ray waits for its process, a second one is refused at once and completions go
    on."""

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        await look(http)
        [process] = processes()
        process.suspend()
        slow = asyncio.create_task(look(http, max_tokens=4))
        await wait_in_loop_until(lambda: xray_of(versions.live)._is_busy)
        second = await http.post("/v1/xray", json={"model": "tiny", "prompt": "x"})
        assert second.status_code == 429 and int(second.headers["Retry-After"]) >= 1
        fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5}
        assert (await http.post("/v1/completions", json=fields)).status_code == 200
        assert not slow.done()
        process.resume()
        assert len((await slow)["tokens"]) > 4
        assert process.nice() > psutil.Process().nice() and [p.pid for p in processes()] == [
            process.pid
        ]

    run(check)


def test_a_killed_process_is_an_error_of_one_request(run: Run) -> None:
    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        await look(http)
        [process] = processes()
        process.suspend()
        slow = asyncio.create_task(http.post("/v1/xray", json={"model": "tiny", "prompt": "x"}))
        await wait_in_loop_until(lambda: xray_of(versions.live)._is_busy)
        os.kill(process.pid, signal.SIGKILL)
        answer = await slow
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "xray_unavailable"
        assert (await look(http))["tokens"]
        xray_of(versions.live).close()
        assert not processes()

    run(check)


def test_one_that_is_given_up_does_not_answer_the_next(run: Run) -> None:
    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        await look(http)
        [process] = processes()
        process.suspend()
        slow = asyncio.create_task(look(http, prompt="another one"))
        await wait_in_loop_until(lambda: xray_of(versions.live)._is_busy)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert not psutil.pid_exists(process.pid)
        assert (
            "".join(t["text"] for t in (await look(http, prompt="fox", max_tokens=0))["tokens"])
            == "fox"
        )

    run(check)


def test_the_pages_are_open_and_what_they_show_is_not(folder: Path) -> None:
    async def check(http: httpx.AsyncClient) -> None:
        for path in CHAT_FILES | SHARED_FILES | INSIDE_FILES:
            answer = await http.get(path)
            assert answer.status_code == 200 and len(answer.text) > 500
            policy = answer.headers["content-security-policy"]
            assert policy.startswith(
                "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
            )
            assert "unsafe" not in policy and answer.headers["x-content-type-options"] == "nosniff"
        assert (await http.get("/page/../xray.py")).status_code in {401, 404}
        assert (await http.get("/page/index.html")).status_code == 401
        assert (await http.get("/chat/index.html")).status_code == 401
        assert (await http.get("/v1/xray")).status_code == 401
        fields = {"model": "tiny", "prompt": PROMPT}
        assert (await http.post("/v1/xray", json=fields)).status_code == 401
        authorized = {"Authorization": f"Bearer {KEY}"}
        assert (await http.post("/v1/xray", json=fields, headers=authorized)).status_code == 200

    async def main() -> None:
        access = AccessRules((ApiKey.read(KEY),))
        async with replica_client(folder, access=access) as (http, _):
            await check(http)

    asyncio.run(main())


def test_an_int8_endpoint_is_looked_into_as_well(folder: Path) -> None:
    """In float32: the x-ray computes with PyTorch, which has no such products."""

    async def main() -> None:
        config = ServeConfig(engine=EngineConfig(dtype="int8"))
        async with replica_client(folder, config=config) as (http, _):
            fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
            assert (await http.post("/v1/completions", json=fields)).json()["usage"][
                "completion_tokens"
            ] == 3
            assert len((await look(http))["tokens"]) > 4

    asyncio.run(main())


def test_weights_of_its_own_are_refused_where_memory_is_scarce(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy in another type than the file's is private memory, beside the engine's, in the same
    pod."""
    monkeypatch.setattr(
        xray_module, "memory", lambda: Memory(free_bytes=1 << 10, total_bytes=1 << 20)
    )
    before = processes()

    async def main() -> None:
        fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
        config = ServeConfig(engine=EngineConfig(dtype="bfloat16", kv_cache_tokens=512))
        async with replica_client(folder, config=config) as (http, _):
            answer = await http.post("/v1/xray", json=fields)
            assert answer.status_code == 503 and "GiB are free for it" in answer.text
            assert processes() == before
        async with replica_client(folder) as (http, _):  # the file's own type
            assert (await http.post("/v1/xray", json=fields)).status_code == 200

    asyncio.run(main())
