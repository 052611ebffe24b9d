"""The engine: continuous batching over a pool of KV cache blocks. It knows token ids, but no text,
HTTP or Ray.

Shapes: N tokens that a step reads, C model width, M rows for which a token is drawn, V vocabulary.
"""

import base64
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model.generation.sampling import SamplingRow, sample_batch
from serving.engine.grammar_rows import GrammarRows, masked
from serving.engine.messages import (
    Admission,
    Candidates,
    FinishReason,
    SequenceRequest,
    StepReport,
    TokenEvent,
)
from serving.engine.runner import Reading, Runner
from serving.engine.scheduler import Chunk, Scheduler, Sequence
from serving.structured.grammar_cache import GrammarCache

PROMPT_LOGPROBS_CHUNK_TOKENS = 128  # 128 x 50,257 logits are 26 MB


class Engine:
    """Generates the same tokens for a sequence as `model.generation.generate`, beside any other
    sequences in its steps."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, *, grammars: GrammarCache | None = None
    ) -> None:
        """The runner's cache has the blocks of the scheduler's pool. Without `grammars` no sequence
        may have one."""
        self._runner = runner
        self._scheduler = scheduler
        self._grammars = None if grammars is None else GrammarRows(grammars)

    @property
    def is_portable(self) -> bool:
        """Whether a sequence has the same tokens and log-probabilities on every processor."""
        return self._runner.is_portable

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_running + self._num_waiting > 0

    @property
    def _num_waiting(self) -> int:
        return self._scheduler.num_waiting + len(self._grammars or ())

    def submit(self, request: SequenceRequest) -> None:
        request = replace(request, sampling=request.sampling.with_seed())
        if request.grammar is None:
            self._scheduler.add(request)
        else:
            assert self._grammars is not None, "this engine was built without grammars"
            self._grammars.hold(request)

    def cancel(self, seq_id: int) -> None:
        self._scheduler.cancel(seq_id)
        if self._grammars is not None:
            self._grammars.cancel(seq_id)

    @torch.inference_mode()
    def step(self, on_admission: Callable[[Admission], None] | None = None) -> StepReport:
        """Plans, reads, finishes and reports. Calls `on_admission` with the sequences that it
        starts before it computes."""
        began_s = time.perf_counter()
        events = self._take_ready()
        chunks = self._planned(on_admission)
        if chunks:
            hidden = self._runner.forward([_reading(chunk) for chunk in chunks])  # (N, C)
            self._scheduler.learn_speed(chunks, seconds=time.perf_counter() - began_s)
            events += self._finish(chunks, hidden)
        return self._report(events, chunks, began_s=began_s)

    def _planned(self, on_admission: Callable[[Admission], None] | None) -> list[Chunk]:
        """Returns what the step reads."""
        scheduler = self._scheduler
        chunks = scheduler.plan()
        if on_admission is not None and scheduler.admitted:
            figures = (scheduler.num_running, self._num_waiting, scheduler.found)
            on_admission(Admission(scheduler.admitted, *figures))
        return chunks

    def _finish(self, chunks: list[Chunk], hidden: Tensor) -> list[TokenEvent]:
        """Keeps of hidden states (N, C) what is asked for, and draws a token for each chunk that ends
        a prompt or is a token's own."""
        drawing: list[Chunk] = []
        last_rows: list[Tensor] = []
        by_chunk = hidden.split([chunk.last - chunk.first for chunk in chunks])
        for chunk, rows in zip(chunks, by_chunk, strict=True):
            self._keep_prompt_logprobs(chunk, rows)
            _keep_hidden_states(chunk, rows)
            if chunk.draws:
                drawing.append(chunk)
                last_rows.append(rows[-1])
            else:
                self._scheduler.advance(chunk, None)
        if not drawing:
            return []
        return self._emit(drawing, self._runner.logits(torch.stack(last_rows)))

    def _report(
        self, events: list[TokenEvent], chunks: list[Chunk], *, began_s: float
    ) -> StepReport:
        scheduler = self._scheduler
        return StepReport(
            events,
            num_running=scheduler.num_running,
            num_waiting=self._num_waiting,
            kv_cache_usage=round(scheduler.pool.usage, 4),
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_tokens=sum(chunk.last - chunk.first for chunk in chunks),
            num_looked_up=scheduler.num_looked_up,
            num_found=scheduler.num_found,
            steps_s=(round(time.perf_counter() - began_s, 6),),
        )

    def _take_ready(self) -> list[TokenEvent]:
        """Hands the scheduler the sequences whose grammar is compiled. Returns the ends of those
        whose grammar cannot be."""
        if not self._grammars:
            return []
        if self._scheduler.num_running + self._scheduler.num_waiting == 0:
            self._grammars.wait()
        events = []
        for request, compiled in self._grammars.take_ready():
            if compiled is None:
                events.append(TokenEvent(request.seq_id, None, FinishReason.GRAMMAR, None, None))
            else:
                self._scheduler.add(request).compiled_grammar = compiled
        return events

    def _emit(self, chunks: list[Chunk], logits: Tensor) -> list[TokenEvent]:
        """Samples from logits (M, V). A row with NaN or infinity ends its own sequence and no
        other, as does one whose grammar leaves no token."""
        best, finite = self._runner.survey(logits)
        is_usable = finite.tolist()
        has_token = masked([chunk.sequence for chunk in chunks], logits, best)
        drawing = []
        for row, chunk in enumerate(chunks):
            draws = is_usable[row] and has_token[row]
            if draws and chunk.sequence.request.max_tokens > 0:
                drawing.append(row)
        drawn_logits = logits if len(drawing) == len(chunks) else logits[drawing]
        sequences = [chunks[row].sequence for row in drawing]
        drawn = self._sample(sequences, drawn_logits, best[drawing])
        tokens = dict(zip(drawing, drawn, strict=True))
        events = []
        for row, chunk in enumerate(chunks):
            sequence, request = chunk.sequence, chunk.sequence.request
            token_id, logprobs = tokens.get(row), None
            if token_id is not None and request.num_logprobs is not None:
                [logprobs] = self._candidates(
                    logits[row : row + 1], [token_id], request.num_logprobs
                )
            finish_reason: FinishReason | None
            if not is_usable[row]:
                finish_reason = self._scheduler.fail(sequence)
            elif not has_token[row]:
                self._scheduler.end(chunk)
                finish_reason = FinishReason.GRAMMAR
            else:
                finish_reason = self._scheduler.advance(chunk, token_id)
                if sequence.mask is not None and token_id is not None:
                    sequence.mask.advance(token_id)
            prompt_logprobs = sequence.prompt_logprobs or None
            embedding = _embedding(sequence.hidden_states)
            events.append(
                TokenEvent(
                    request.seq_id, token_id, finish_reason, logprobs, prompt_logprobs, embedding
                )
            )
            sequence.prompt_logprobs = []
            sequence.hidden_states = []
        return events

    def _keep_prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> None:
        """Keeps the log-probabilities of the prompt tokens that follow a chunk's, from hidden
        (chunk, C)."""
        request = chunk.sequence.request
        if request.num_prompt_logprobs is None or chunk.sequence.output_ids:
            return
        candidates = chunk.sequence.prompt_logprobs
        if chunk.first == 0:
            candidates.append(None)  # nothing predicts the first token
        targets = request.prompt_ids[chunk.first + 1 : chunk.last + 1]
        for start in range(0, len(targets), PROMPT_LOGPROBS_CHUNK_TOKENS):
            some = targets[start : start + PROMPT_LOGPROBS_CHUNK_TOKENS]
            logits = self._runner.logits(hidden[start : start + len(some)])  # (some, V)
            candidates += self._candidates(logits, some, request.num_prompt_logprobs)

    def _sample(self, sequences: list[Sequence], logits: Tensor, best: Tensor) -> list[int]:
        if not sequences:
            return []
        rows = []
        for sequence in sequences:
            row = SamplingRow(
                sequence.request.sampling,
                sequence.request.prompt_ids,
                sequence.output_ids,
                position=sequence.num_tokens,
                forbidden_ids=sequence.forbidden_ids,
            )
            rows.append(row)
        return sample_batch(logits, rows, best=best, exponentials=self._runner.exponentials)

    def _candidates(self, logits: Tensor, token_ids: list[int], num_top: int) -> list[Candidates]:
        """Returns the log-probability of each row's token and the row's most likely tokens, from
        logits (N, V)."""
        logprobs = self._runner.log_probabilities(logits)
        of_tokens = logprobs.gather(1, torch.tensor(token_ids)[:, None])  # (N, 1)
        ranks = 1 + torch.count_nonzero(logprobs > of_tokens, dim=-1)  # (N,)
        num_top = min(num_top, logits.shape[-1])
        top_logprobs, top_ids = logprobs.topk(num_top, dim=-1)  # (N, num_top)
        columns = zip(
            of_tokens[:, 0].tolist(),
            top_ids.tolist(),
            top_logprobs.tolist(),
            ranks.tolist(),
            strict=True,
        )
        candidates = []
        for logprob, ids, values, rank in columns:
            pairs = zip(ids, values, strict=True)
            # A grammar's others have none
            top = [(token, value) for token, value in pairs if value > -math.inf]
            candidates.append(Candidates(logprob, top, rank))
        return candidates


def _reading(chunk: Chunk) -> Reading:
    sequence = chunk.sequence
    token_ids = sequence.output_ids[-1:] or sequence.request.prompt_ids[chunk.first : chunk.last]
    return Reading(token_ids, chunk.first, sequence.blocks)


def _keep_hidden_states(chunk: Chunk, rows: Tensor) -> None:
    if chunk.sequence.request.embed:
        chunk.sequence.hidden_states.append(rows.clone())


def _embedding(hidden_states: list[Tensor]) -> str | None:
    """Returns the mean over all tokens of the chunks' hidden states (chunk, C), None without
    chunks. Sums of each chunk would have other bits wherever a prompt is cut."""
    if not hidden_states:
        return None
    mean = torch.cat(hidden_states).float().mean(dim=0)
    return base64.b64encode(mean.numpy().astype("<f4").tobytes()).decode()
