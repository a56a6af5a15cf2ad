"""Samples groups of rollouts as a step of reinforcement learning does, to be looked at.

Letters: P prompts, G rollouts of a prompt, T tokens of a rollout.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
import numpy as np

from dcore_jax import distributed
from dcore_jax.api.calls import as_policy, configured, refuse_two_sources
from dcore_jax.api.model import Model
from dcore_jax.config import RlSection, RunConfig
from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.data.show_rows import token_texts
from dcore_jax.learn import advantages, controls, grpo
from dcore_jax.progress import show_compiling
from dcore_jax.rollout.policy import make_engine
from dcore_jax.run.checks import check_fields
from dcore_jax.run.rl_source import rl_seed, rl_source
from dcore_jax.train.mini_batches import sampled_responses
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.rl_options import make_estimator
from dcore_jax.train.rollout_batch import RolloutBatch
from dcore_jax.train.sampler import Sampler
from dcore_jax.worlds.registry import make_world


@dataclasses.dataclass(frozen=True)
class Group:
  """The rollouts of one prompt, with what a step of RL would make of them.

  Attributes:
    kind: of the decision point.
    messages: the prompt, {'role', 'content'}.
    reference: the right answer.
    texts: G answers, thoughts included.
    tokens: of each rollout, the texts of its T tokens.
    rewards: G rewards.
    right: G verdicts, whether the answer is as good as the reference.
    entropies: of each rollout, nats [T]: how open the policy was where it drew the token.
    logprobs: of each rollout, nats [T]: of the token that was drawn.
    advantages: of each rollout, [T]: what the estimator gives its tokens.
    psi: of each rollout, [T]: the part of it that comes from entropies.
    uniform: whether all rewards are equal (zero variance), so that GRPO gives no gradient.
  """

  kind: str
  messages: tuple[dict[str, Any], ...]
  reference: str
  texts: tuple[str, ...]
  tokens: tuple[tuple[str, ...], ...]
  rewards: tuple[float, ...]
  right: tuple[bool, ...]
  entropies: tuple[np.ndarray, ...]
  logprobs: tuple[np.ndarray, ...]
  advantages: tuple[np.ndarray, ...]
  psi: tuple[np.ndarray, ...]
  uniform: bool

  @property
  def verdict(self) -> str:
    """'mixed', or for a uniform group 'all right', 'all wrong' or 'between'."""
    if not self.uniform:
      return 'mixed'
    if all(self.right):
      return 'all right'
    # Equal rewards may also lie between right and wrong, where parts of answers are paid.
    return 'between' if any(self.right) else 'all wrong'

  def to_traces(self, name: str) -> list[dict[str, Any]]:
    """Returns a record of each rollout, as pages of traces take them; `name` begins their ids."""
    traces = []
    query = next((m['content'] for m in reversed(self.messages) if m['role'] == 'user'), '')
    for g, text in enumerate(self.texts):
      values = {
        'text': list(self.tokens[g]),
        'entropy': self.entropies[g].tolist(),
        'logprob': self.logprobs[g].tolist(),
        'psi': self.psi[g].tolist(),
      }
      answer = {'role': 'assistant', 'content': text, 'tokens': values}
      traces.append(
        {
          'id': f'{name}/{g}',
          'kind': self.verdict,
          'query': query,
          'correct': self.right[g],
          'reason': f'reward {self.rewards[g]:.2f}; reference {self.reference}',
          'messages': [*self.messages, answer],
        }
      )
    return traces


def sample_groups(
  model: Model,
  points: Sequence[DecisionPoint] | None = None,
  *,
  config: ml_collections.ConfigDict | RunConfig | None = None,
  seed: int | None = None,
  **options: Any,
) -> list[Group]:
  """Samples a group of rollouts of each prompt, scores them, and gives them their advantages.

  Nothing is trained. It shows what a step of `da_grpo` would learn from: rewards, groups without
  variance, entropies, psi.

  Args:
    model: draws the rollouts.
    points: decision points with reference answers, as `decision_points` makes them of seeds; by
      default `rl.prompts` of those of the options `files` or `tasks`, drawn as for a step. A prompt
      of more than `rl.max_prompt_tokens` tokens is left out.
    config: what holds where no option says otherwise.
    seed: of everything that is drawn.
    **options: fields of section `rl`, such as group=8, alpha=0.4, estimator='grpo'.

  Returns:
    A `Group` for each prompt.

  Raises:
    ValueError: an unknown option, points both given and named by one, no prompt that is short
      enough, or an option that needs more than single answers (episodes, a teacher).
  """
  settings = configured('rl', options, config, seed)
  section = settings.rl
  check_fields(settings)
  refuse_two_sources('points', points, options, ('files', 'tasks'))
  _check_single(section)
  policy = as_policy(model)
  mesh = distributed.training_mesh(settings)
  source, _ = rl_source(settings, model.tokenizer, make_world(settings.world), points)
  items = list(range(len(source.kinds)))
  if not items:
    raise ValueError(f'no prompt has at most rl.max_prompt_tokens = {section.max_prompt_tokens}')
  asked = len(items) if points is not None else section.prompts
  order = PromptOrder(items=items, prompts=asked, seed=rl_seed(settings))
  # Points that a person gives keep their order.
  chosen = items if points is not None else order.chosen(0)
  engine = make_engine(settings, policy, policy.load(mesh), mesh, groups=True)
  show_compiling(engine.prepare)
  batch = Sampler(engine, source, order, section).measure(chosen)
  points = [source.points[item] for item in chosen]
  return _groups(model.tokenizer, section, points, batch, order.seed)


def group_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
  """Counts groups by verdict, with the mean of what their tokens have.

  Args:
    groups: from `sample_groups`.

  Returns:
    A row for each verdict that occurs, the commonest first: `verdict`, `groups`, `share` of all,
    `reward` (mean over rollouts), `tokens` (mean of a rollout), and means over tokens: `entropy`
    (nats), `psi`, and `advantage`, its size without the sign.
  """
  by_verdict: dict[str, list[Group]] = {}
  for group in groups:
    by_verdict.setdefault(group.verdict, []).append(group)
  rows = []
  for verdict, members in sorted(by_verdict.items(), key=lambda item: (-len(item[1]), item[0])):
    rewards = [reward for group in members for reward in group.rewards]
    lengths = [len(entropy_T) for group in members for entropy_T in group.entropies]
    rows.append(
      {
        'verdict': verdict,
        'groups': len(members),
        'share': len(members) / len(groups),
        'reward': float(np.mean(rewards)),
        'tokens': float(np.mean(lengths)),
        'entropy': _token_mean(group.entropies for group in members),
        'psi': _token_mean(group.psi for group in members),
        'advantage': _token_mean(map(np.abs, group.advantages) for group in members),
      }
    )
  return rows


def _token_mean(parts: Iterable[Iterable[np.ndarray]]) -> float:
  """The mean over all tokens of all rollouts; 0 where there are none."""
  arrays = [array_T for part in parts for array_T in part]
  tokens = sum(map(len, arrays))
  return float(sum(array_T.sum(dtype=np.float64) for array_T in arrays) / max(1, tokens))


def _check_single(section: RlSection) -> None:
  """ValueError where rollouts are more than one answer, or advantages need more than rewards."""
  if section.episodes:
    raise ValueError('rl.episodes acts whole tasks out; groups are of single prompts')
  if advantages.uses_teacher(section.estimator):
    raise ValueError(f'rl.estimator = {section.estimator!r} reads a teacher, which groups lack')


def _groups(
  tokenizer: Any,
  section: RlSection,
  points: Sequence[DecisionPoint],
  batch: RolloutBatch,
  seed: int,
) -> list[Group]:
  signs_P = controls.group_signs(seed, 0, range(len(points)))
  rollouts = [sampled_responses(rollout) for rollout in batch.rollouts]
  marks = None
  if section.psi_words:
    # A rollout of a single prompt has one response.
    responses = [response for [response] in rollouts]
    found = grpo.reflective_tokens(responses, tokenizer, section.psi_words)
    marks = [[mark] for mark in found]
  estimator = make_estimator(section, section.alpha, signs_P)
  learned = grpo.with_advantages(rollouts, batch.total_PG, estimator, marks)
  uniform_P = advantages.uniform_groups(batch.total_PG)[:, 0]
  G = batch.total_PG.shape[1]
  groups = []
  for p, point in enumerate(points):
    members = [response for [response] in learned[p * G : (p + 1) * G]]
    texts = [rollout.texts[0] for rollout in batch.of(p, p + 1)]
    groups.append(
      Group(
        kind=batch.kinds[p],
        messages=tuple(message.to_json() for message in point.messages),
        reference=point.reference,
        texts=tuple(texts),
        tokens=tuple(tuple(token_texts(tokenizer, m.tokens.tolist())) for m in members),
        rewards=tuple(batch.total_PG[p].tolist()),
        right=tuple(batch.right_PG[p].tolist()),
        entropies=tuple(member.entropy for member in members),
        logprobs=tuple(member.old_logp for member in members),
        advantages=tuple(member.advantage for member in members),
        psi=tuple(member.psi for member in members),
        uniform=bool(uniform_P[p]),
      )
    )
  return groups
