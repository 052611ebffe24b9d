"""Measures held-out text during training, with the same figures for any number of workers, and completes prompts."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from cluster.settings.run import RunConfig, seq_len
from jobs.exact.batch_gradient import autocast
from jobs.exact.train_state import TrainState
from jobs.run.run_plan import num_validation_rows
from jobs.run.storage_retry import patiently
from jobs.tokens.token_stream import TokenStream
from jobs.workers.worker_group import WorkerGroup
from model.generate import generate
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer

SAMPLE_TOKENS = 64


class Validation:
    """Measures the model on the validation rows and on those of further `sets`, by name."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        rows: TokenStream,
        group: WorkerGroup,
        *,
        eot_id: int | None,
        sets: Mapping[str, TokenStream],
    ) -> None:
        self._config, self._state, self._rows, self._group = config, state, rows, group
        self._eot_id, self._sets = eot_id, sets

    def measure(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Returns `val_loss` (nats per token) and `val_bits_per_byte` of the held-out split, and of each set."""
        return self._measured(self._rows), {name: self._measured(rows) for name, rows in self._sets.items()}

    @torch.no_grad()
    def _measured(self, rows: TokenStream) -> dict[str, float]:
        config, model, group = self._config, self._state.model, self._group
        num_rows = num_validation_rows(rows, config)
        size = config.train.micro_batch_size
        batches = [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
        # Each element has one contributor, so the all-reduce adds only zeros and rounds nothing.
        losses = torch.zeros(len(batches), dtype=torch.float64, device=self._state.device)
        model.eval()
        for index in range(group.rank, len(batches), group.world_size):
            batch = patiently(lambda: rows.rows(batches[index]), "tokens")  # noqa: B023 (called at once)
            inputs, targets = (part.to(self._state.device) for part in batch)
            with autocast(config, self._state.device):
                losses[index] = model.loss(inputs, targets, eot_id=self._eot_id).double()
        model.train()
        if group.world_size > 1:
            dist.all_reduce(losses)
        loss = float(losses.sum()) / (num_rows * seq_len(config))
        return {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) / rows.bytes_per_token(num_rows)}

    @torch.no_grad()
    def samples(self, tokenizer: Tokenizer) -> list[dict[str, str]]:
        """Returns each `prompt` and its continuation `text`, with a fixed seed."""
        train, model = self._config.train, self._state.model
        model.eval()
        samples = []
        for prompt in train.sample_prompts:
            prompt_ids = tokenizer.encode(prompt)
            room = self._config.model.n_positions - len(prompt_ids)
            new_ids = generate(
                model,
                prompt_ids,
                max_tokens=min(SAMPLE_TOKENS, room),
                params=SamplingParams(temperature=0.8, seed=train.seed),
                eos_id=tokenizer.eot_id,
            )
            samples.append({"prompt": prompt, "text": tokenizer.decode(new_ids)})
        model.train()
        return samples
