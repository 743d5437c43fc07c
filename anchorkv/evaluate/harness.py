"""lm-eval's model "anchorkv": every request's context is read through anchors by a session.

    lm-eval run --model anchorkv --model_args pretrained=mine.gguf,policy=default:reduction=24 --tasks …

by itself where lm-eval finds plugins (group `lm_eval.models`), as `anchorkv lm-eval run …` where it does not yet.
lm-eval's `--model_args` are cut at commas, so several changes of a policy are joined by ";" or "|", in quotes for the
shell: "policy=default:reduction=24;recent_window=0".

Contexts and continuations become tokens by lm-eval's own code. Demonstrations that requests share are read once
(`demonstrations.py`), the choices of a question share the session that has read the question, and nothing is recalled:
what a model still knows is what its anchors carry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import starmap
from math import log
from typing import Any

import lm_eval.models  # noqa: F401  # lm-eval fills an empty register only, so its own models go first
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from anchorkv.decode import decode
from anchorkv.document import TextWriter
from anchorkv.engines.base import Floats
from anchorkv.errors import ConfigError
from anchorkv.evaluate.demonstrations import DELIMITER, Context, Demonstrations, context, shared
from anchorkv.evaluate.losses import answer_losses, choice_losses
from anchorkv.evaluate.ways import Way, way
from anchorkv.models import EngineName, Model, load
from anchorkv.prompt import Prompt
from anchorkv.sampling import Sampling
from anchorkv.session import Session, next_logits

MAX_TOKENS = 256
"""Of an answer whose task does not say."""
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
_UNDERSTOOD = frozenset({*_SAMPLING, "until", "max_gen_toks", "do_sample"})

Scored = tuple[float, bool]
"""log p of a continuation, and whether greedy decoding would write it."""


@dataclass(frozen=True)
class Spent:
    """What one request took, besides demonstrations that were read once for several."""

    task: str | None
    question: int | None
    seconds: float
    """Of reading its context and scoring; a context that several requests share counts in equal parts."""
    tokens: int
    """Context and continuation."""
    kept: int
    """Cells held when the context had been read, of `full`."""
    full: int


def policy_text(text: str) -> str:
    """A policy as `--model_args` can carry it, as `ways.way` reads it."""
    return text.replace(";", ",").replace("|", ",")


@register_model("anchorkv")
class AnchorLM(TemplateLM):  # type: ignore[misc]  # lm-eval is optional, and untyped where it is missing
    """Scores and writes for lm-eval. Not thread-safe; `close` frees the cells, and the model if it loaded it."""

    def __init__(
        self, pretrained: str = "", policy: str = "default", adapter: bool = True, engine: EngineName = "auto",
        threads: int | None = None, reread: bool = False, greedy: bool = True, quiet: bool = False,
        model: Model | None = None, batch_size: Any = None, max_batch_size: Any = None, device: Any = None,
    ) -> None:
        """pretrained: hub id, folder or GGUF file; "" is the built-in model. policy: as `ways.way` takes it, with ";"
            or "|" for ","; "default" is the model's own. adapter: whether the built-in model uses its adapter.
        reread: share no demonstrations between questions. greedy: find out whether greedy decoding would write a
            continuation; accuracies never ask. quiet: no progress bar.
        model: loaded already, read with its own policy, instead of all that says what to load.
        batch_size, max_batch_size, device: lm-eval gives them to every model; the engine decides them here.
        Raises ModelError when the model cannot be found or used, ConfigError for an unknown policy.
        """
        super().__init__()
        self._owns = model is None
        if model is None:
            asked = way(policy_text(str(policy)))
            model = load(str(pretrained) or None, engine=engine, threads=threads, adapter=adapter and asked.adapter)
            self.way = way(policy_text(str(policy)), model.policy)
        else:
            self.way = Way(policy, model.policy)
        self.model = model
        self.demonstrations = Demonstrations(model.engine, self.way.policy, reread=reread)
        self.spent: list[Spent] = []
        """One entry for every request to score, in the order of the requests."""
        self.longest = 0
        """Most tokens, context and answer, of any request."""
        self._greedy, self._quiet = greedy, quiet
        self._written = 0
        self._delimiters: tuple[str, ...] = (DELIMITER,)
        self._chat = False  # whether contexts come in the chat template, whose control tokens then are meant
        self._encode = lru_cache(maxsize=256)(self._tokens)

    def close(self) -> None:
        self.demonstrations.close()
        if self._owns:
            self.model.close()

    # --- what lm-eval asks of a model's tokenizer ----------------------------------------------------------------

    def _tokens(self, text: str, start: bool, special: bool) -> list[int]:
        tokenizer = self.model.engine.tokenizer
        return (tokenizer.start_ids() if start else []) + tokenizer.encode(text, special=special)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of `string`, after what the model wants before a text unless add_special_tokens is False. The list
        is shared: it must not be changed."""
        return self._encode(string, add_special_tokens is not False, self._chat)

    @property
    def eot_token_id(self) -> int:
        return min(self.model.engine.tokenizer.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return next(iter(self.model.engine.tokenizer.start_ids()), self.eot_token_id)

    @property
    def max_length(self) -> int:
        return self.model.engine.info.window

    @property
    def tokenizer_name(self) -> str:
        return self.model.engine.info.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt in the model's own template. Without add_generation_prompt the last message is one to go on with.

        Raises ModelError when the template refuses the messages.
        """
        tokenizer = self.model.engine.tokenizer
        if not self._chat:
            self._chat = True
            self._delimiters = (DELIMITER, Prompt.of(tokenizer).next_turn[0])
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return tokenizer.chat(chat_history, generate=add_generation_prompt)
        return tokenizer.chat(chat_history[:-1]) + chat_history[-1]["content"]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """How the model's template looks, for lm-eval's records. Raises ConfigError for a template by name."""
        if isinstance(chat_template, str):
            raise ConfigError("anchorkv uses the model's own chat template; give --apply_chat_template no name.")
        return self.model.engine.tokenizer.chat([{"role": "user", "content": "{message}"}]) if chat_template else ""

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results: the model, the policy, and what its demonstrations took."""
        info = self.model.engine.info
        return {
            "model_name": info.name, "model_fingerprint": info.fingerprint, "weights": info.weights,
            "engine": self.model.engine.name, "adapter": self.model.adapter, "policy": self.way.name,
            "policy_fields": self.way.policy.model_dump(mode="json"), "longest_request_tokens": self.longest,
            "seconds": round(sum(one.seconds for one in self.spent), 3),
            "demonstrations_read_once": [
                {"demonstrations": read.demonstrations, "seconds": round(read.seconds, 3), **read.accounting.as_dict()}
                for read in self.demonstrations.reads
            ],
        }

    # --- scoring ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Scored]:
        """(log p, greedy) of every request's continuation."""
        start = len(self.spent)
        found: list[Scored] = super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._quiet)
        asked = [(request.task_name, request.doc_id) for request in requests]
        self.spent[start:] = [
            Spent(task, question, one.seconds, one.tokens, one.kept, one.full)
            for (task, question), one in zip(asked, self.spent[start:], strict=True)
        ]
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[Scored]:
        """requests: ((context, continuation), tokens of the one, tokens of the other)."""
        contexts = [self._context(text, before) for (text, _), before, _ in requests]
        scored: list[Scored] = [(0.0, False)] * len(requests)
        spent: list[Spent] = [Spent(None, None, 0, 0, 0, 0)] * len(requests)
        for one, count, indices in self._ordered(contexts, disable_tqdm):
            answers = [requests[index][2] for index in indices]
            started = time.perf_counter()
            reading = self.demonstrations.seconds
            with self.demonstrations.after(one, count) as session:
                cells = session.accounting()
                found = self._score(session, answers)
            # What was read for others too is not this request's.
            seconds = time.perf_counter() - started - (self.demonstrations.seconds - reading)
            for index, answer, score in zip(indices, answers, found, strict=True):
                scored[index] = score
                length = len(one.tokens) + len(answer)
                self.longest = max(self.longest, length)
                spent[index] = Spent(None, None, seconds / len(indices), length, cells.kept_cells, cells.full_cells)
        self.spent += spent
        for (pair, _, _), score in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, score)
        return scored

    def _context(self, text: str, tokens: Sequence[int]) -> Context:
        return context(text, tokens or [self.prefix_token_id], self.tok_encode, self._delimiters)

    def _ordered(self, contexts: Sequence[Context], silent: bool) -> Iterator[tuple[Context, int, list[int]]]:
        """Each different context once, with how many of its demonstrations others share and the indices of its
        requests; those with the same demonstrations one after the other."""
        where: dict[Context, list[int]] = {}
        for index, one in enumerate(contexts):
            where.setdefault(one, []).append(index)
        different = list(where)
        counts = shared(different)
        order = sorted(range(len(different)), key=lambda at: different[at].first(counts[at]).tokens)
        for at in tqdm(order, desc="Reading contexts", disable=silent or self._quiet):
            yield different[at], counts[at], where[different[at]]

    def _score(self, session: Session, answers: Sequence[Sequence[int]]) -> list[Scored]:
        """`session` stays as it is."""
        losses = iter(choice_losses(session, [answer for answer in answers if answer]))
        return [self._scored(session, answer, next(losses)) if answer else (0.0, True) for answer in answers]

    def _scored(self, session: Session, answer: Sequence[int], losses: Floats) -> Scored:
        if len(answer) == 1:
            greedy = int(np.argmax(next_logits(session))) == answer[0]
        else:
            greedy = self._greedy and _is_greedy(session, answer, losses)
        return -float(losses.sum(dtype=np.float64)), greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the model's length as lm-eval cuts them, each read through anchors."""
        found = []
        for request in tqdm(requests, desc="Reading texts", disable=disable_tqdm or self._quiet):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )
            total = sum(starmap(self._predicted, map(utils.make_disjoint_window, windows)))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _predicted(self, before: Sequence[int], tokens: Sequence[int]) -> float:
        with Session(self.model.engine, self.way.policy) as session:
            session.read(before)
            return -float(answer_losses(session, tokens).sum(dtype=np.float64))

    # --- writing ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop of the task, its own end or the most tokens."""
        contexts = [self._context(text, self.tok_encode(text)) for text, _ in (request.args for request in requests)]
        written = [""] * len(requests)
        for one, count, indices in self._ordered(contexts, disable_tqdm):
            for index in indices:
                with self.demonstrations.after(one, count) as session:
                    written[index] = self._write(session, requests[index].args[1])
                    self.longest = max(self.longest, len(session.ledger))
                self.cache_hook.add_partial("generate_until", requests[index].args, written[index])
        return written

    def _write(self, session: Session, options: dict[str, Any]) -> str:
        """options: lm-eval's generation_kwargs."""
        given = normalize_gen_kwargs(options, MAX_TOKENS)
        if unknown := sorted(set(given) - _UNDERSTOOD):
            logging.getLogger(__name__).warning("anchorkv does not know the generation options %s", unknown)
        sampling = Sampling(**{name: given[name] for name in _SAMPLING if name in given}, seed=self._written)
        self._written += 1  # repeats of a question are to differ
        writer, text = TextWriter(session.engine.tokenizer), ""
        stops = [stop for stop in given["until"] if stop]
        for token in decode(session, given["max_gen_toks"], sampling):
            text += writer.write(token)
            if any(stop in text for stop in stops):
                break
        answer: str = postprocess_generated_text(text, stops, None)
        return answer


def _is_greedy(session: Session, answer: Sequence[int], losses: Floats) -> bool:
    """Whether greedy decoding would write `answer` after `session`. losses: -log p [n] of its tokens."""
    # What is likelier than all others together needs no second look.
    unsure = [at for at, loss in enumerate(losses) if loss >= log(2)]
    with session.fork() as fork:
        read = 0
        for at in unsure:
            if at > read:
                fork.read(answer[read:at])
                read = at
            if int(np.argmax(next_logits(fork))) != answer[at]:
                return False
    return True
