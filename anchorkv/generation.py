"""Anchored generation inside transformers: `model.generate(..., custom_generate=anchored(policy, tokenizer))`.

Sampling, stopping and everything else that `generate` prepares stay the library's own; only the cache is ours: every
row of the batch is read by a `Session`, which frees what its policy lets go.

    from anchorkv.generation import anchored

    method = anchored("default", tokenizer)
    ids = model.generate(**inputs, custom_generate=method, do_sample=True, temperature=0.7, max_new_tokens=200)
    print(method.accounting[0].reduction)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from anchorkv.config import AnchorConfig, preset
from anchorkv.decode import step_together
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_model import CACHE_ARGUMENTS
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.errors import ConfigError
from anchorkv.ledger import Accounting
from anchorkv.session import Session, next_logits

SUPPORTED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def anchored(policy: str | AnchorConfig, tokenizer: Any, streamer: Any = None) -> AnchoredGeneration:
    """What `generate` takes as `custom_generate`; it can be used again for the same or another model.

    policy: a preset's name or a configuration.
    tokenizer: the model's own transformers tokenizer; it tells where sentences end.
    streamer: a transformers streamer; transformers 5 does not hand the one given to `generate` to a callable. It gets
        the prompt first, as it would there.
    Raises ConfigError for an unknown preset.
    """
    return AnchoredGeneration(preset(policy) if isinstance(policy, str) else policy, tokenizer, streamer)


class AnchoredGeneration:
    """A `custom_generate` callable. `accounting`: of the last call, one for each row of its batch."""

    def __init__(self, policy: AnchorConfig, tokenizer: Any, streamer: Any = None) -> None:
        self.policy = policy
        self.tokenizer = TorchTokenizer(tokenizer)
        self.streamer = streamer
        self.accounting: list[Accounting] = []
        self._engine: TorchEngine | None = None

    @torch.no_grad()
    def __call__(
        self, model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, synced_gpus: bool = False, streamer: Any = None, **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Continue input_ids [rows, length], left-padded where model_kwargs["attention_mask"] [rows, length] is 0.

        Returns ids [rows, length + new], or a GenerateDecoderOnlyOutput when the configuration says so (without a
        cache: rows hold different cells). Raises ConfigError for what cannot be anchored: beams, assistants, a cache
        or embeddings given by the caller, attentions or hidden states asked for, several processes in step.
        """
        # What generate hands on as model_kwargs must not be named above, or it would hand it on twice.
        _check(generation_config, synced_gpus, model_kwargs)
        streamer = streamer or self.streamer
        if streamer is not None and streamer is self.streamer:
            streamer.put(input_ids.cpu())
        sessions = self._read(self._engine_for(model), input_ids, model_kwargs.get("attention_mask"))
        try:
            return self._write(sessions, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        finally:
            self.accounting = [session.accounting() for session in sessions]
            for session in sessions:
                session.close()

    def _engine_for(self, model: Any) -> TorchEngine:
        if self._engine is None or self._engine.model is not model or self._engine.device != model.device:
            self._engine = TorchEngine(model, self.tokenizer)
        model.eval()
        return self._engine

    def _read(
        self, engine: TorchEngine, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> list[Session]:
        """A session for each row that has read its prompt; equal prompts (num_return_sequences) are read once."""
        sessions: list[Session] = []
        first: dict[tuple[int, ...], Session] = {}
        for r, row in enumerate(input_ids):
            prompt = tuple((row if attention_mask is None else row[attention_mask[r].bool()]).tolist())
            if prompt in first:
                sessions.append(first[prompt].fork())
                continue
            first[prompt] = session = Session(engine, self.policy)
            sessions.append(session)
            session.read(prompt)
        return sessions

    def _write(
        self, sessions: Sequence[Session], ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
        config: Any, streamer: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """The loop of transformers' own `_sample`, with sessions in place of its cache."""
        stops = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        kept_scores: list[torch.Tensor] = []
        kept_logits: list[torch.Tensor] = []
        writing = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        while True:
            logits = torch.from_numpy(np.stack([next_logits(session) for session in sessions])).to(ids.device)
            scores = logits_processor(ids, logits.clone())
            kept_scores.append(scores)
            kept_logits.append(logits)
            if config.do_sample:
                tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(dim=-1)
            if stops:
                tokens = torch.where(writing, tokens, config._pad_token_tensor)
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            writing &= ~stopping_criteria(ids, tuple(kept_scores) if config.output_scores else None)
            active = writing.nonzero().flatten().tolist()
            if not active:
                break
            step_together([sessions[r] for r in active], [int(tokens[r]) for r in active])
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids, scores=tuple(kept_scores) if config.output_scores else None,
            logits=tuple(kept_logits) if config.output_logits else None,
        )


def _check(config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in SUPPORTED:
        raise ConfigError(
            f"Anchored generation samples or takes the best token; {mode.value.replace('_', ' ')} is not supported."
        )
    cache = next((model_kwargs[name] for name in CACHE_ARGUMENTS if model_kwargs.get(name) is not None), None)
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError("Anchored generation keeps its own cells; give it the whole prompt, not a cache.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ConfigError("Anchored generation needs input_ids: sentences cannot be found in inputs_embeds.")
    if config.output_attentions or config.output_hidden_states:
        raise ConfigError("Anchored generation does not return attentions or hidden states.")
    if synced_gpus:
        raise ConfigError("Anchored generation runs in one process; synced_gpus is not supported.")
