"""The engine: continuous batching over a pool of KV cache slots. It knows token ids; text, HTTP and Ray are elsewhere.

Shapes: B sequences of a step, T prompt tokens, C model width, V vocabulary.
"""

import torch
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import KVCache
from model.sampling import SamplingRow, sample_batch
from serving.messages import Candidates, FinishReason, SequenceRequest, StepReport, TokenEvent
from serving.scheduler import Scheduler, Sequence

PREFILL_TOKENS_PER_STEP = 512
PROMPT_LOGPROBS_CHUNK_TOKENS = 128  # 128 x 50,257 logits are 26 MB


class Engine:
    """What it generates for a sequence is what `model.generate` does, whatever else shares its steps."""

    def __init__(self, model: GPT, *, num_slots: int, eos_id: int | None) -> None:
        self._model = model.eval()
        parameter = next(model.parameters())
        self._device = parameter.device
        self._kv_cache = KVCache(
            model.config,
            num_slots=num_slots,
            max_len=model.config.n_positions,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        self._scheduler = Scheduler(num_slots=num_slots, eos_id=eos_id, prefill_tokens_per_step=PREFILL_TOKENS_PER_STEP)

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    def submit(self, request: SequenceRequest) -> None:
        self._scheduler.add(request)

    def cancel(self, seq_id: int) -> None:
        self._scheduler.cancel(seq_id)

    @torch.inference_mode()
    def step(self) -> StepReport:
        """Admit, prefill, decode, emit."""
        plan = self._scheduler.plan()
        events = [self._prefill(sequence) for sequence in plan.prefill]
        if plan.decode:
            events += self._decode(plan.decode)
        return StepReport(events, self._scheduler.num_running, self._scheduler.num_waiting)

    def _prefill(self, sequence: Sequence) -> TokenEvent:
        """Reads one prompt; its last logits give the first token."""
        request = sequence.request
        token_ids = torch.tensor([request.prompt_ids], device=self._device)  # (1, T)
        hidden = self._model(
            token_ids,
            kv_cache=self._kv_cache,
            slots=torch.tensor([sequence.slot], device=self._device),
            positions=torch.arange(token_ids.shape[1], device=self._device)[None],  # (1, T)
        )[0]  # (T, C)
        prompt_logprobs = self._prompt_logprobs(hidden, request) if request.prompt_logprobs else None
        [event] = self._emit([sequence], self._model.logits(hidden[-1:]))
        return event._replace(prompt_logprobs=prompt_logprobs)

    def _decode(self, sequences: list[Sequence]) -> list[TokenEvent]:
        """One token for each; rows differ in length, so each has its own position."""
        token_ids = torch.tensor([[s.output_ids[-1]] for s in sequences], device=self._device)  # (B, 1)
        positions = [[len(s.request.prompt_ids) + len(s.output_ids) - 1] for s in sequences]
        hidden = self._model(
            token_ids,
            kv_cache=self._kv_cache,
            slots=torch.tensor([s.slot for s in sequences], device=self._device),
            positions=torch.tensor(positions, device=self._device),  # (B, 1)
        )  # (B, 1, C)
        return self._emit(sequences, self._model.logits(hidden[:, 0]))

    def _emit(self, sequences: list[Sequence], logits: Tensor) -> list[TokenEvent]:
        """Samples from logits (B, V). A row with NaN or infinity ends its own sequence and no other."""
        usable = logits.isfinite().all(dim=-1).tolist()
        drawing = [i for i, s in enumerate(sequences) if usable[i] and s.request.max_tokens > 0]
        tokens = dict(zip(drawing, self._sample([sequences[i] for i in drawing], logits[drawing]), strict=True))
        events = []
        for i, sequence in enumerate(sequences):
            request, token_id, logprobs = sequence.request, tokens.get(i), None
            if token_id is not None and request.num_logprobs is not None:
                [logprobs] = _candidates(logits[i : i + 1], [token_id], request.num_logprobs)
            finish_reason = self._scheduler.advance(sequence, token_id) if usable[i] else self._fail(sequence)
            events.append(TokenEvent(request.seq_id, token_id, finish_reason, logprobs, prompt_logprobs=None))
        return events

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        rows = [
            SamplingRow(
                s.request.sampling,
                s.request.prompt_ids,
                s.output_ids,
                position=len(s.request.prompt_ids) + len(s.output_ids),
            )
            for s in sequences
        ]
        return sample_batch(logits, rows) if rows else []

    def _fail(self, sequence: Sequence) -> FinishReason:
        # The slot's next owner masks what this one has left there, but 0 x NaN is NaN.
        self._kv_cache.keys[:, sequence.slot] = 0
        self._kv_cache.values[:, sequence.slot] = 0
        return self._scheduler.finish(sequence, FinishReason.ERROR)

    def _prompt_logprobs(self, hidden: Tensor, request: SequenceRequest) -> list[Candidates | None]:
        """Log-probability of each prompt token after the first, from hidden (T, C); the first has none."""
        candidates: list[Candidates | None] = [None]
        for start in range(0, len(hidden) - 1, PROMPT_LOGPROBS_CHUNK_TOKENS):
            targets = request.prompt_ids[1 + start : 1 + start + PROMPT_LOGPROBS_CHUNK_TOKENS]
            logits = self._model.logits(hidden[start : start + len(targets)])  # (chunk, V)
            candidates += _candidates(logits, targets, request.num_logprobs or 0)
        return candidates


def _candidates(logits: Tensor, token_ids: list[int], num_top: int) -> list[Candidates]:
    """Of logits (N, V): the log-probability of each row's own token, and the row's most likely tokens."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()  # (N,)
    top_values, top_ids = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)  # (N, num_top)
    return [
        Candidates(logprob, list(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(own, top_ids.tolist(), top_values.tolist(), strict=True)
    ]
