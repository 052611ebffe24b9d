"""What an engine answers, with weights made of whole numbers, as one JSON object: the tokens and
log-probabilities of greedy and drawn sequences. test_portable_kernels.py runs it for several
processors.

    python -m tests.serving.engine.portable_answers THREADS
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from serving.engine.messages import SequenceRequest
from serving.engine_process.run_engine import build_engine

_SHAPE = {"vocab_size": 700, "n_positions": 96, "n_layer": 2, "n_head": 4, "n_embd": 72}
MODELS = {
    "gpt2": GPTConfig(**_SHAPE, activation_function="gelu_exact"),
    "llama": GPTConfig(
        **_SHAPE,
        architecture="llama",
        activation_function="swiglu",
        n_kv_head=2,
        rope_theta=500_000.0,
        rope_factor=8.0,
        rope_original_positions=32,
    ),
}
_SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.2, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=2),
    SamplingParams(temperature=1.0, top_k=20, presence_penalty=0.5, seed=3),
]


def model_of(config: GPTConfig) -> GPT:
    """Returns a model whose weights are multiples of 2⁻¹⁶: PyTorch's normal numbers differ between
    processors."""
    model = GPT(config)
    numbers = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            whole = torch.randint(-(2**14), 2**14, parameter.shape, generator=numbers)
            parameter.copy_(whole.float() / 2**16 + (parameter.dim() == 1))
    return model.eval()


def answers(config: GPTConfig, dtype: str, threads: int) -> list[Any]:
    engine = build_engine(
        model_of(config),
        EngineConfig(kernels="native", dtype=dtype, kv_cache_tokens=2048),
        eos_id=None,
        threads=threads,
    )
    for number, sampling in enumerate(_SAMPLINGS):
        prompt = [(31 * number + 17 * i * i) % 700 for i in range(11 + number)]
        engine.submit(
            SequenceRequest(number, prompt, 40, sampling, num_logprobs=3, num_prompt_logprobs=2)
        )
    events = []
    while engine.has_work:
        events += [event._asdict() for event in engine.step().events]
    return [engine.is_portable, events]


if __name__ == "__main__":
    threads = int(sys.argv[1])
    print(
        json.dumps(
            {
                f"{name} {dtype}": answers(config, dtype, threads)
                for name, config in MODELS.items()
                for dtype in ("float32", "int8", "bfloat16")
            },
            default=asdict,
        )
    )
