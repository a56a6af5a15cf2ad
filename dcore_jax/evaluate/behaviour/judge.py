"""Asks a model for the labels of thoughts, to see how far it agrees with the rules of `behaviours`.

The model sees one thought, what each label means, and answers with one word. Any other answer is
counted and left out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dcore_jax.chat.call_text import split_answer
from dcore_jax.chat.messages import Message
from dcore_jax.evaluate.behaviour.labels import LABELS
from dcore_jax.progress import progress
from dcore_jax.rollout.backends import Backend, ChatRequest
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.statistics import cohens_kappa, estimate_mean

_INSTRUCTIONS = """\
You label one thought from the reasoning of an assistant that works with tools. The labels are:

decomposition: splits the task into parts, or moves on to another part.
reflection: doubts, or turns back on what was thought before.
verification: tests a result, a value or an input against what is known.
deduction: draws a conclusion from what was said before.
other: none of these.

Answer with one of these five words and nothing else."""
_MAX_TOKENS = 2048  # a judge that thinks first needs room; the answer itself is one word


class Thought(NamedTuple):
  """A thought with the task that it belongs to."""

  unit: str
  text: str


def draw_thoughts(thoughts: Sequence[Thought], count: int, seed: int = 0) -> list[Thought]:
  """Draws up to `count` thoughts without replacement; equal seeds draw the same ones."""
  order = np.random.default_rng(seed).permutation(len(thoughts))[:count]
  return [thoughts[place] for place in sorted(order.tolist())]


def judge(backend: Backend, thoughts: Sequence[Thought]) -> list[str | None]:
  """Asks for the label of each thought; None where there is no answer in form.

  Raises:
    ConnectionError: the endpoint stays away. With a journal nothing that was answered is lost.
  """
  labels: list[str | None] = [None] * len(thoughts)
  waiting = iter(range(len(thoughts)))

  def source(free: int) -> list[tuple[int, ChatRequest]]:
    requests = []
    for _, place in zip(range(free), waiting, strict=False):
      messages = (Message('system', _INSTRUCTIONS), Message('user', thoughts[place].text))
      requests.append((place, ChatRequest(messages, (place,))))
    return requests

  # Greedy: the same question has the same answer.
  sampling = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
  with progress(total=len(thoughts), description='judge', unit='thought') as bar:
    for place, reply in backend.stream(source, sampling):
      if not reply.error and reply.finished:
        labels[place] = read_label(reply.text)
      bar.update()
  return labels


def read_label(text: str) -> str | None:
  """Returns the label that an answer is, behind its thoughts; None where it is anything else."""
  answer = split_answer(text)[1].strip()
  return answer if answer in LABELS else None


def agreement(
  rules: Sequence[str], judged: Sequence[str | None], units: Sequence[str]
) -> dict[str, Any]:
  """Compares the labels of the rules with those of a judge.

  Returns:
    {'asked', 'out_of_form': thoughts without a label of the judge, 'agreement': the share of equal
    labels, 'kappa': see `cohens_kappa`, 'table': {rules' label: {judge's label: count}}}. Without
    any label of the judge `agreement` and `kappa` are None.
  """
  both = [item for item in zip(rules, judged, units, strict=True) if item[1] is not None]
  table = {label: dict.fromkeys(LABELS, 0) for label in LABELS}
  for rule, label, _ in both:
    table[rule][label] += 1
  found = {'asked': len(rules), 'out_of_form': len(rules) - len(both), 'table': table}
  if not both:
    return found | {'agreement': None, 'kappa': None}
  first, second, owners = zip(*both, strict=True)
  equal = [one == other for one, other in zip(first, second, strict=True)]
  return found | {
    'agreement': estimate_mean(equal, clusters=owners, bounds=(0.0, 1.0)),
    'kappa': cohens_kappa(first, second, clusters=owners),
  }
