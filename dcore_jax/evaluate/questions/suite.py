"""Suites whose task is one question: ask, keep the answers, judge them later.

FOLDER/replies.jsonl    the journal of replies: what was answered is not asked again
FOLDER/answers.jsonl    one answer a task, in the order of the tasks; there when all have one
"""

import abc
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dcore_jax.chat.call_text import OPEN_THOUGHTS, split_answer
from dcore_jax.chat.messages import Message
from dcore_jax.chat.thoughts import bare_thoughts
from dcore_jax.evaluate.behaviour.lazy_reasoning import is_lazy
from dcore_jax.evaluate.suites import Served, Suite, SuiteResult, SuiteSettings, accuracy
from dcore_jax.files import read_json_lines, replace_text
from dcore_jax.rollout.backends import ChatRequest, Reply
from dcore_jax.rollout.endpoint import EndpointLimits, OpenAIBackend
from dcore_jax.rollout.sampling import SamplingParams

ANSWERS_FILE = 'answers.jsonl'
REPLIES_FILE = 'replies.jsonl'
NO_ANSWER = 'no_answer'


@dataclasses.dataclass(frozen=True)
class Question:
  """A task of one question.

  Attributes:
    id: of the task.
    messages: the chat that asks it.
    task: what the judge needs, as JSON.
  """

  id: str
  messages: tuple[Message, ...]
  task: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a judge says; `reason` is '' where the answer is right."""

  correct: bool
  reason: str = ''


class ChatSuite(Suite):
  """A suite of single questions, asked without examples. A subclass reads and judges them."""

  # What the figures are of: data and checker.
  version = ''

  @abc.abstractmethod
  def questions(self) -> list[Question]:
    """Returns all tasks.

    Raises:
      ValueError: their file is not there, or not what it should be.
    """

  @abc.abstractmethod
  def judge(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Verdict]:
    """Judges answers, whose thoughts are left out; '' is no answer."""

  def prepare(self) -> None:
    """Reads the tasks, so that a file that is missing is named before a model is loaded."""
    self.questions()

  def answer(self, served: Served, folder: pathlib.Path, told: Callable[[int, int], None]) -> None:
    """Asks every question that has no answer in the journal."""
    asked = [(question.id, question.messages) for question in self._asked()]
    ask_all(served, self.settings, folder, asked, told)

  def score(self, folder: pathlib.Path) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Judges the answers; a request that was refused has no verdict."""
    replies = read_replies(folder, self.name)
    questions = self._asked()
    kept = []
    left_out = []
    for question in questions:
      if reply := replies.get(question.id):
        reason = reply.error
      else:
        reason = 'no answer in the file'
      if reason:
        left_out.append({'id': question.id, 'reason': reason})
      else:
        kept.append(question)
    if not kept:
      raise ValueError(f'suite {self.name!r}: no request was answered; {left_out[0]["reason"]}')
    verdicts = self.judge(kept, [said(replies[question.id].text) for question in kept])
    trajectories = []
    for question, verdict in zip(kept, verdicts, strict=True):
      trajectories.append(_trajectory(self.name, question, replies[question.id], verdict))
    score = accuracy('overall', [verdict.correct for verdict in verdicts], floor=0.0)
    notes = []
    if self.settings.limit:
      notes.append(f'The first {len(questions)} tasks alone, which are no random sample of all.')
    unfinished = sum(not replies[question.id].finished for question in kept)
    if unfinished:
      notes.append(
        f'{unfinished} of {len(kept)} answers were cut off at {self.settings.max_tokens} tokens.'
      )
    return SuiteResult(self.name, self.version, [score], notes, left_out), trajectories

  def _asked(self) -> list[Question]:
    questions = self.questions()
    return questions[: self.settings.limit] if self.settings.limit else questions


def ask_all(
  served: Served,
  settings: SuiteSettings,
  folder: pathlib.Path,
  asked: Sequence[tuple[str, tuple[Message, ...]]],
  told: Callable[[int, int], None],
) -> None:
  """Asks every task that has no answer in the journal, and writes FOLDER/answers.jsonl.

  Args:
    served, folder, told: see `Suite.answer`.
    settings: of the evaluation.
    asked: id and chat of each task.

  Raises:
    ConnectionError: the model stays away. Nothing that was answered is lost.
  """
  told(0, len(asked))
  if (folder / ANSWERS_FILE).exists():
    told(len(asked), len(asked))
    return
  folder.mkdir(parents=True, exist_ok=True)
  backend = OpenAIBackend(
    served.base_url,
    served.model,
    api_key=served.key,
    limits=EndpointLimits(settings.concurrency, settings.timeout),
    journal=folder / REPLIES_FILE,
  )
  sampling = SamplingParams(
    temperature=settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed
  )
  waiting = list(enumerate(asked))

  def source(free: int) -> list[tuple[int, ChatRequest]]:
    taken = waiting[:free]
    del waiting[:free]
    return [(place, ChatRequest(messages, (place,))) for place, (_, messages) in taken]

  replies: dict[int, Reply] = {}
  for place, reply in backend.stream(source, sampling):
    replies[place] = reply
    told(len(replies), len(asked))
  lines = []
  for place, (name, _) in enumerate(asked):
    lines.append(json.dumps({'id': name} | dataclasses.asdict(replies[place])) + '\n')
  replace_text(folder / ANSWERS_FILE, ''.join(lines))


def read_replies(folder: pathlib.Path, suite: str) -> dict[str, Reply]:
  """Returns what `ask_all` has written, by id.

  Raises:
    ValueError: there are no answers.
  """
  path = folder / ANSWERS_FILE
  if not path.exists():
    raise ValueError(f'suite {suite!r}: no answers in {str(folder)!r}')
  return {row.pop('id'): Reply(**row) for row in read_json_lines(path)}


def said(text: str) -> str:
  """Returns what a model said behind its thoughts; '' where they were cut off."""
  thoughts, answer = split_answer(text)
  # A number in thoughts that never ended is no answer.
  if not thoughts and text.lstrip().startswith(OPEN_THOUGHTS):
    return ''
  return answer.strip()


def thoughts_of(text: str, completion_tokens: int) -> tuple[str, int]:
  """Returns the thoughts of an answer, without their tags, and an estimate of their tokens.

  The endpoint counts all tokens of an answer; those of the thoughts are estimated by their share of
  its characters, since its tokenizer may not be here.
  """
  block, _ = split_answer(text)
  opened = not block and text.lstrip().startswith(OPEN_THOUGHTS)
  thoughts = bare_thoughts(text if opened else block)
  share = len(thoughts) / max(len(text), 1)
  return thoughts, round(share * completion_tokens)


def _trajectory(kind: str, question: Question, reply: Reply, verdict: Verdict) -> dict[str, Any]:
  """Returns a task in the form of `held_out`."""
  thoughts, tokens = thoughts_of(reply.text, reply.completion_tokens)
  messages = [message.to_json() for message in question.messages]
  messages.append({'role': 'assistant', 'content': reply.text})
  reason = verdict.reason
  if reason == NO_ANSWER and not reply.finished:
    reason = 'unfinished'
  return {
    'id': question.id,
    'kind': kind,
    'query': question.messages[-1].content,
    'correct': verdict.correct,
    'reason': reason,
    'lazy': is_lazy(thoughts, tokens, not verdict.correct),
    'reasoning_tokens': [tokens],
    'messages': messages,
  }
