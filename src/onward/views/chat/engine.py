"""Answers from a model in memory, piece by piece; one after another, with a possible change of state between two.

It knows nothing of terminals, pages or servers, which call it. `reply` and `go_on` return at once; the engine's only
thread computes answers in the order in which they were asked for.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from onward.data.row_types import Message
from onward.errors import ModelError, OnwardError, UsageError, first_line
from onward.layout import RunLayout
from onward.training.model.load import causal_lm, exchange_adapter
from onward.training.model.quiet import quiet
from onward.views.chat.pieces import Pieces
from onward.views.chat.prompts import Prompts
from onward.views.chat.sampling import Sampling
from onward.views.loaded import Loaded, exchanged, load
from onward.views.points import Point

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of an answer.

    Args:
        text: all of it.
        finish: why it ended: at a token or text that ends answers, at the most tokens allowed, or it was cancelled.
        prompt_tokens: tokens that the model was asked with.
        tokens: tokens of the answer, including the one that ended it.
        seconds: that it took.
        label, step: the state that answered.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int
    seconds: float
    label: str
    step: int | None


class Reply:
    """An answer while it is computed: iterate over it for its pieces of text; then `outcome` has the result.

    `cancel` ends it after the current token. An error of the model is raised by the iteration.
    """

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[str | Outcome | BaseException] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._outcome: Outcome | None = None

    def __iter__(self) -> Iterator[str]:
        while self._outcome is None:
            item = self._pieces.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Outcome):
                self._outcome = item
            elif item:
                yield item

    @property
    def outcome(self) -> Outcome:
        """The outcome; waits for the answer to end."""
        for _ in self:
            pass
        assert self._outcome is not None
        return self._outcome

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End it early; its pieces so far, and its outcome, can still be read."""
        self._cancelled.set()

    def put(self, item: str | Outcome | BaseException) -> None:
        """Add a piece, or the outcome; called by the engine."""
        self._pieces.put(item)


class Engine:
    """A model that answers. Close it when it is no longer needed.

    Args:
        loaded: the state that answers, until it is replaced by another.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._prompts = Prompts(loaded.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onward-answers")
        self._open = threading.Event()
        self._open.set()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def loaded(self) -> Loaded:
        """The state that answers."""
        return self._loaded

    @property
    def prompts(self) -> Prompts:
        """How to prompt the state."""
        return self._prompts

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        stops: Sequence[str] = (),
        tools: list[Any] | None = None,
    ) -> Reply:
        """Begin the next answer to messages.

        Args:
            stops: texts before which the answer ends.
            tools: schemas of tools, for templates that write them.

        Raises:
            UsageError: the messages are not acceptable, or leave no room for an answer.
        """
        return self._begin(self._prompts.of_messages(messages, tools), sampling, stops)

    def go_on(self, text: str, sampling: Sampling, *, stops: Sequence[str] = ()) -> Reply:
        """Begin the continuation of a text, for a model without a chat template; arguments as for `reply`."""
        return self._begin(self._prompts.of_text(text), sampling, stops)

    def move_to(self, layout: RunLayout, point: Point) -> None:
        """Switch to another state of the run, once the answers asked for before are given.

        If only the adapter differs, its weights are exchanged and the base stays in memory; otherwise the other model
        is loaded in addition to this one, which answers until then. If anything fails, this one stays in place.

        Raises:
            ModelError, Unreadable: as for `load`; ModelError also where memory runs out or the device is lost.
            OSError, sqlite3.Error: the machine fails.
        """
        try:
            self._move_to(layout, point)
        except (OnwardError, OSError, sqlite3.Error):
            raise
        except Exception as error:  # from the device: memory, a loss
            raise ModelError(f"the state cannot be loaded: {first_line(error)}", where=point.label) from None

    def _move_to(self, layout: RunLayout, point: Point) -> None:
        device = causal_lm(self._loaded.model).device
        other = exchanged(layout, point, self._loaded)
        if other is not None:
            self._thread.submit(self._exchange, other, point).result()
            return
        other = load(layout, point, device=device, known=self._loaded.base)
        self._thread.submit(self._put, other, Prompts(other.tokenizer)).result()

    def close(self) -> None:
        """End the current answer and those that wait; the model's memory is freed when nothing else holds it."""
        self._open.clear()
        self._thread.shutdown(wait=True, cancel_futures=False)

    def _exchange(self, other: Loaded, point: Point) -> None:
        exchange_adapter(other.model, point.folder)
        self._put(other, Prompts(other.tokenizer))

    def _put(self, loaded: Loaded, prompts: Prompts) -> None:
        self._loaded, self._prompts = loaded, prompts

    def _begin(self, ids: Sequence[int], sampling: Sampling, stops: Sequence[str]) -> Reply:
        most = self._room(ids, sampling)
        reply = Reply()
        self._thread.submit(self._answer, reply, ids, sampling, most, stops)
        return reply

    def _room(self, ids: Sequence[int], sampling: Sampling) -> int:
        """Return how many tokens the answer may have.

        Raises:
            UsageError: the prompt is empty, or leaves no room.
        """
        if not ids:
            raise UsageError("there is nothing to answer: the prompt has no tokens")
        length = getattr(causal_lm(self._loaded.model).config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(length, int):
            return sampling.max_tokens
        if len(ids) >= length:
            what = f"the prompt has {len(ids)} tokens, but the model takes only {length}, answer included"
            raise UsageError(what, hint="Begin a new conversation (/reset), or shorten the prompt.")
        return min(sampling.max_tokens, length - len(ids))

    def _answer(self, reply: Reply, ids: Sequence[int], sampling: Sampling, most: int, stops: Sequence[str]) -> None:
        """Compute an answer; every error is raised to its reader."""
        loaded, begun = self._loaded, time.monotonic()
        pieces = Pieces(loaded.tokenizer, stops)
        try:
            streamer = _Streamer(reply, pieces, len(ids), self._prompts.stop_ids)
            if not self._has_ended(reply):
                self._generate(ids, sampling, most, streamer, lambda: pieces.has_ended or self._has_ended(reply))
            reply.put(pieces.rest())
        except OnwardError as error:
            reply.put(error)
            return
        except Exception as error:  # from the model: memory, a lost device
            reply.put(ModelError(f"the model cannot answer: {first_line(error)}", where=loaded.label))
            return
        finish: Finish = "stop" if streamer.has_stopped or pieces.has_ended else "length"
        if finish == "length" and streamer.count < most:
            finish = "cancelled"
        seconds = time.monotonic() - begun
        reply.put(Outcome(pieces.text, finish, len(ids), streamer.count, seconds, loaded.label, loaded.step))

    def _has_ended(self, reply: Reply) -> bool:
        return reply.is_cancelled or not self._open.is_set()

    def _generate(self, ids: Sequence[int], sampling: Sampling, most: int, streamer: _Streamer, has_ended: Any) -> None:
        model: Any = self._loaded.model
        device = causal_lm(model).device
        stops = list(self._prompts.stop_ids)
        # complete, so that the base's own settings cannot change what the trained model would answer
        settings = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=most, max_length=None, use_cache=True,
            eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0,
            repetition_penalty=1.0, no_repeat_ngram_size=0, suppress_tokens=None, forced_bos_token_id=None,
        )  # fmt: skip
        prompt = torch.tensor([ids], device=device)
        with torch.inference_mode(), quiet():
            model.generate(
                inputs=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings,
                logits_processor=sampling.processors(device), streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Ends(has_ended)]),
            )  # fmt: skip


class _Streamer(BaseStreamer):
    """Passes on what the model generates; what comes first is the prompt."""

    def __init__(self, reply: Reply, pieces: Pieces, prompt: int, stop_ids: Sequence[int]) -> None:
        self._reply, self._pieces = reply, pieces
        self._left, self._stop_ids = prompt, stop_ids
        self.count = 0
        self.has_stopped = False

    def put(self, value: torch.Tensor) -> None:
        """Receive the next token ids, in any shape."""
        for token in value.flatten().tolist():
            if self._left:
                self._left -= 1
                continue
            self.count += 1
            self.has_stopped = token in self._stop_ids
            if not self.has_stopped:
                self._reply.put(self._pieces.add(token))

    def end(self) -> None:
        """Do nothing."""


class _Ends(StoppingCriteria):
    """Ends the generation when a function says so."""

    def __init__(self, has_ended: Any) -> None:
        self._has_ended = has_ended

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return for each row whether it ends, bool, shape (1,)."""
        del scores
        return torch.full((len(input_ids),), self._has_ended(), dtype=torch.bool, device=input_ids.device)
