"""Versions that take turns in one engine: each answer is whole and its own version's, and everybody
gets a turn."""

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.settings.serve import EngineConfig
from model.files.checkpoint import load_model
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from serving.engine.engine import Engine
from serving.engine.messages import Admission, FinishReason, SequenceRequest, StepReport
from serving.engine_process.run_engine import build_engine
from serving.engine_process.weight_turns import MIN_TURN_S, WeightTurns
from tests.serving.tiny_models import lively_model, write_model

GREEDY = SamplingParams(temperature=0.0)
STEP_S = 0.1  # of the clock, a step
MAX_TOKENS = 12


class OneSet:
    """raymill's engine with room for one model, which another one can replace."""

    def __init__(self, checkpoint: Path) -> None:
        self.replace_weights(checkpoint)
        self._unstarted: dict[int, SequenceRequest] = {}
        self.seen: list[int] = []  # the weights of each step's sequences

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def replace_weights(self, checkpoint: Path) -> None:
        model = load_model(checkpoint)
        self._engine: Engine = build_engine(
            model, EngineConfig(kernels="torch", max_num_seqs=3), eos_id=None, threads=1
        )

    def submit(self, request: SequenceRequest) -> None:
        self._unstarted[request.seq_id] = request
        self._engine.submit(request)

    def cancel(self, seq_id: int) -> None:
        self._unstarted.pop(seq_id, None)
        self._engine.cancel(seq_id)

    def take_back(self) -> list[SequenceRequest]:
        taken = list(self._unstarted.values())
        for request in taken:
            self.cancel(request.seq_id)
        return taken

    def step(self, on_admission: Callable[[Admission], None] | None = None) -> StepReport:
        def started(admission: Admission) -> None:
            for seq_id in admission.admitted:
                self._unstarted.pop(seq_id)
            if on_admission is not None:
                on_admission(admission)

        return self._engine.step(started)


class Scene:
    """Turns of the models of `folders`, whose clock goes on with the steps."""

    def __init__(self, folders: list[Path]) -> None:
        self.now_s = 0.0
        self.turns = WeightTurns(OneSet(folders[0]), folders[0], clock=lambda: self.now_s)
        for number, folder in enumerate(folders[1:], start=1):
            self.turns.add_weights(number, folder)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}
        self.begun: set[int] = set()

    def submit(
        self, seq_id: int, prompt: list[int], weights: int, *, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.tokens[seq_id] = []
        self.turns.submit(SequenceRequest(seq_id, prompt, max_tokens, GREEDY, weights=weights))

    def step(self) -> StepReport:
        self.now_s += STEP_S
        report = self.turns.step(lambda admission: self.begun.update(admission.admitted))
        for event in report.events:
            if event.token_id is not None:
                self.tokens[event.seq_id].append(event.token_id)
            if event.finish_reason is not None:
                self.ends[event.seq_id] = event.finish_reason
        return report

    def finish(self, *, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if self.turns.has_work:
                self.step()
        assert not self.turns.has_work, f"after {max_steps} steps some have no answer"


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> list[GPT]:
    return [lively_model(tokenizer, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def folders(
    models: list[GPT], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    place = tmp_path_factory.mktemp("turns")
    return [
        write_model(place / f"step-{step}", model, tokenizer, step=step)
        for step, model in enumerate(models)
    ]


def answer(model: GPT, prompt: list[int], *, max_tokens: int = MAX_TOKENS) -> list[int]:
    return generate(model, prompt, max_tokens=max_tokens, params=GREEDY)


@pytest.mark.parametrize("seed", range(3))
def test_each_answer_is_that_of_one_version(
    seed: int, folders: list[Path], models: list[GPT], prompts: list[list[int]]
) -> None:
    """Whatever arrives when, and whoever leaves."""
    rng = random.Random(seed)
    scene = Scene(folders)
    asked: dict[int, tuple[int, int]] = {}
    left = set()
    for seq_id in range(60):
        asked[seq_id] = rng.randrange(3), rng.randrange(len(prompts))
        weights, prompt = asked[seq_id]
        scene.submit(seq_id, prompts[prompt], weights)
        if rng.random() < 0.1:
            left.add(leaver := rng.randrange(seq_id + 1))
            scene.turns.cancel(leaver)
        for _ in range(rng.randrange(6)):
            scene.step()
    scene.finish()
    for seq_id, (weights, prompt) in asked.items():
        expected = answer(models[weights], prompts[prompt])
        if seq_id in left and scene.tokens[seq_id] != expected:
            assert expected[: len(scene.tokens[seq_id])] == scene.tokens[seq_id]
        else:
            assert (scene.tokens[seq_id], scene.ends[seq_id]) == (expected, FinishReason.LENGTH)


def test_running_sequences_finish_with_their_weights_and_new_ones_wait(
    folders: list[Path], models: list[GPT], prompts: list[list[int]]
) -> None:
    scene = Scene(folders)
    for seq_id in range(5):  # of which three find a slot
        scene.submit(seq_id, prompts[seq_id], 0)
    scene.step()
    scene.submit(5, prompts[5], 1)
    scene.submit(6, prompts[6], 0)
    reports = [scene.step()]
    assert {3, 4, 5, 6} <= scene.begun, "nobody is refused for having waited for this"
    while scene.ends.keys() != {0, 1, 2}:
        reports.append(scene.step())
        assert not any(scene.tokens[seq_id] for seq_id in (3, 4, 5, 6))
    assert {report.num_running for report in reports} <= {0, 3} and reports[0].num_waiting == 4
    between = scene.step()
    assert (between.events, between.num_prompt_tokens) == ([], 0), (
        "no prompt took as long as the weights"
    )
    scene.finish()
    for seq_id, weights in enumerate([0, 0, 0, 0, 0, 1, 0]):
        assert scene.tokens[seq_id] == answer(models[weights], prompts[seq_id])


def test_under_load_of_two_versions_each_turn_has_its_time(
    folders: list[Path], prompts: list[list[int]]
) -> None:
    scene = Scene(folders)
    began = {0: [0.0], 1: []}  # when each version began to answer after the other one
    current = 0
    for number in range(600):  # more than fits, so that no turn ends for want of work
        for weights in (0, 1):
            scene.submit(2 * number + weights, prompts[number % 2], weights, max_tokens=2)
        for event in scene.step().events:
            if (weights := event.seq_id % 2) != current:
                began[weights].append(scene.now_s)
                current = weights
    turns = sorted([*began[0], *began[1]])
    lengths = [end - begin for begin, end in itertools.pairwise(turns)][1:]
    assert len(lengths) >= 20
    assert all(MIN_TURN_S <= length <= MIN_TURN_S + 1 for length in lengths), lengths


def test_a_turn_without_work_ends_at_once(
    folders: list[Path], models: list[GPT], prompts: list[list[int]]
) -> None:
    scene = Scene(folders)
    for seq_id, weights in enumerate([1, 0, 1, 0]):
        scene.submit(seq_id, prompts[1], weights, max_tokens=1)
        scene.finish(max_steps=2)
        assert scene.tokens[seq_id] == answer(models[weights], prompts[1], max_tokens=1)


def test_those_who_wait_for_nobody_go_on(
    folders: list[Path], models: list[GPT], prompts: list[list[int]]
) -> None:
    """The only sequence of the other version leaves."""
    scene = Scene(folders)
    scene.submit(0, prompts[1], 0)
    scene.step()
    scene.submit(1, prompts[1], 1)
    scene.submit(2, prompts[2], 0)
    scene.step()
    assert scene.tokens[2] == []
    scene.turns.cancel(1)
    scene.step()
    assert scene.tokens[2] and len(scene.tokens[0]) == 3


def test_weights_that_do_not_fit_end_their_own_sequences(
    folders: list[Path],
    models: list[GPT],
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    altered = write_model(tmp_path / "altered", models[1], tokenizer)
    scene = Scene([folders[0], folders[1], altered])
    os.utime(altered / "model.safetensors", ns=(1, 1))
    for seq_id, weights in enumerate([0, 2, 0, 1, 2]):
        scene.submit(seq_id, prompts[1], weights)
    scene.finish()
    assert {seq_id for seq_id, end in scene.ends.items() if end is FinishReason.ERROR} == {1, 4}
    assert scene.tokens[3] == answer(models[1], prompts[1]) and scene.tokens[2] == answer(
        models[0], prompts[1]
    )
    # Weights that have computed must be there: the process ends otherwise
    scene.turns.add_weights(1, altered)
    os.utime(altered / "model.safetensors", ns=(2, 2))
    scene.submit(5, prompts[1], 0)
    scene.finish()
    scene.submit(6, prompts[1], 1)
    with pytest.raises(UserError, match="has been written to"):
        scene.finish()
