"""The DA-GRPO step: what shared prompts save, against our own flat form and trl's GRPOTrainer; the whole step on the organism.

    python -m benchmarks.grpo_step --trl_python=ENV/bin/python                     # every case, about 40 minutes on 2 cores
    python -m benchmarks.grpo_step --cases=update --vocabularies=4096 --rounds=3

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.16.0           # the environment of the peer

One JSON line a case: ours, peer, ratio (> 1: ours is better), bound. A peer whose environment is not named gives a line that says
so. `update` takes the same rollouts (4 prompts of 1,024 tokens, 8 responses of 128 each) and the same random weights everywhere:
the pass over the old policy, which also gives the entropies, and one optimizer step; losses must agree to 1e-4. `whole` is a step
from sampling to update with the packaged organism. Bounds are the multiply-adds at the rate of one large matrix product.
"""
import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags
import jax
import numpy as np

from benchmarks import measure
from benchmarks.measure import line, say
from configs import nano
from dcore_jax import tokentree
from dcore_jax.chat.template import render_prompt
from dcore_jax.distill.seeds import decision_points
from dcore_jax.learn import grpo, objectives, optimizer
from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.engine import Engine
from dcore_jax.run.grpo_loop import GrpoLoop
from dcore_jax.run.rollout_batch import Questions, encode_prompts
from dcore_jax.run.sources import ORGANISM, load_policy
from dcore_jax.run.throughput import forward_flops
from dcore_jax.worlds.toolworld.seeds import task_seeds
from dcore_jax.worlds.toolworld.tasks import KINDS
from dcore_jax.worlds.toolworld.world import ToolWorld

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS, LEARNING_RATE = 4, 8, 1024, 128, 1e-6
CASES = ('update', 'whole')
_CASES = flags.DEFINE_list('cases', list(CASES), f'Which of {", ".join(CASES)} to run.')
_VOCABULARIES = flags.DEFINE_list('vocabularies', ['4096', '151936'], 'Vocabulary sizes of the case update.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Interleaved rounds; medians are printed.')
_TRL = flags.DEFINE_string('trl_python', '', "Python of an environment with trl; '' skips it.")


def model(vocabulary: int) -> DecoderConfig:
  return DecoderConfig(vocab_size=vocabulary, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                       num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True)


class Rollouts:
  """The same for all: random tokens, rewards that differ in each group, and old log-probabilities that are `shift` off, so that
  the loss is not the zero of a step on the policy that sampled."""

  def __init__(self, vocabulary: int):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(1, vocabulary, shape).astype(np.int32)
    self.prompts_PT, self.completions_NT = draw(PROMPTS, PROMPT_TOKENS), draw(PROMPTS * GROUP, RESPONSE_TOKENS)
    self.rewards_PG = rng.integers(-3, 5, (PROMPTS, GROUP)).astype(np.float32)
    self.shift_NT = rng.normal(0, 0.3, self.completions_NT.shape).astype(np.float32)

  def sequences(self) -> list[tokentree.Sequence]:
    weights = np.repeat(np.float32([0, 1]), [PROMPT_TOKENS, RESPONSE_TOKENS])
    return [tokentree.Sequence(np.concatenate([self.prompts_PT[n // GROUP], completion]), weights, PROMPT_TOKENS)
            for n, completion in enumerate(self.completions_NT)]


class Ours:
  """Our update phase on rows of a tree, or on flat padded ones, `rows` at a time; a call returns the loss."""

  def __init__(self, config: DecoderConfig, params: decoder.Params, rollouts: Rollouts, *, merge: bool, rows: int):
    self.tree = tokentree.pack(rollouts.sequences(), PROMPT_TOKENS + RESPONSE_TOKENS * (GROUP if merge else 1), rows, merge=merge)
    self._rollouts, self._rows = rollouts, rows
    tx = optimizer.make_optimizer('adamw', LEARNING_RATE, weight_decay=0.01)
    self._score, self._step = grpo.make_score_pass(config), grpo.make_grpo_step(config, tx)
    self._state = optimizer.init_state(jax.tree.map(lambda leaf: leaf.copy(), params), tx)
    shift = np.pad(rollouts.shift_NT, ((0, 0), (PROMPT_TOKENS, 0)))
    self._shift_RT = self.tree.scatter(list(shift))

  def __call__(self) -> float:
    tree = self.tree
    logp, entropy = grpo.score_rows(self._score, self._state.params, tree, self._rows)
    advantage, _ = grpo.advantage_rows(tree, self._rollouts.rewards_PG, entropy, objectives.ADVANTAGES['grpo'])
    tree = tree.with_extras(old_logp=logp + self._shift_RT, advantage=advantage)
    self._state, metrics = self._step(self._state, tree.batch(accumulate=tree.rows // self._rows))
    return float(metrics['loss'])


class Trl:
  """A worker process; a call asks it for a step and returns its answer."""

  def __init__(self, folder: str, **job: Any):
    self._process = subprocess.Popen(
        [_TRL.value, str(ROOT / 'benchmarks' / 'trl_worker.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'})
    self._send(json.dumps({'folder': f'{folder}/trl', **job}))

  def _send(self, text: str) -> None:
    self._process.stdin.write(text + '\n')
    self._process.stdin.flush()

  def __call__(self) -> dict[str, float]:
    self._send('step')
    for text in self._process.stdout:  # the trainer prints, too
      if text.startswith('answer '):
        return json.loads(text.removeprefix('answer '))
    raise RuntimeError(f'the trl worker ended with status {self._process.wait()}')

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


@contextlib.contextmanager
def trl_peer(config: DecoderConfig, params: decoder.Params, **job: Any) -> Iterator[Trl]:
  with tempfile.TemporaryDirectory() as folder:
    stops = load_stops()
    hf_checkpoint.save_checkpoint(f'{folder}/model', config, params, dtype='float32', tokenizer_dir=ORGANISM,
                                  generation_config={'eos_token_id': stops, 'pad_token_id': json.loads(
                                      (ORGANISM / 'config.json').read_text())['pad_token_id']})
    worker = Trl(folder, model=f'{folder}/model', tokenizer=str(ORGANISM), **job)
    try:
      yield worker
    finally:
      worker.close()


def load_stops() -> list[int]:
  return load_policy(nano.get_config().model, seed=0).stop_ids


def rounds(runs: dict[str, Callable[[], float]]) -> dict[str, float]:
  """Median seconds of interleaved rounds; each run tells its own seconds."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for number in range(_ROUNDS.value):
    for name, run in runs.items():
      seconds[name].append(run())
      say(f'round {number}: {name} {seconds[name][-1]:.2f} s')
  return {name: float(np.median(values)) for name, values in seconds.items()}


def timed(run: Callable[[], Any]) -> Callable[[], float]:
  def call() -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
  return call


# --- cases -----------------------------------------------------------------------------------------------------------------


def update(vocabulary: int) -> None:
  """The update phase on given rollouts."""
  case, config, rollouts = f'update phase, vocabulary {vocabulary}', model(vocabulary), Rollouts(vocabulary)
  params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
  ours = {'tree': Ours(config, params, rollouts, merge=True, rows=1), 'flat': Ours(config, params, rollouts, merge=False, rows=4)}
  rate = measure.matmul_rate()
  facts = {name: dict(tokens=run.tree.live, bound=4 * forward_flops(config, run.tree) / rate) for name, run in ours.items()}
  with contextlib.ExitStack() as stack:
    losses = {name: run() for name, run in ours.items()}
    runs = {name: timed(run) for name, run in ours.items()}
    if _TRL.value:
      given = {'prompts': rollouts.prompts_PT.repeat(GROUP, axis=0).tolist(), 'completions': rollouts.completions_NT.tolist(),
               'rewards': rollouts.rewards_PG.tolist(), 'shift': rollouts.shift_NT.tolist()}
      peer = stack.enter_context(trl_peer(
          config, params, rollouts=given, prompts=['-'] * PROMPTS, references=[''] * PROMPTS, group=GROUP, micro=4,
          rollouts_per_update=PROMPTS * GROUP, updates=1, max_tokens=RESPONSE_TOKENS, kl_coefficient=0.0,
          learning_rate=LEARNING_RATE))
      losses['trl'] = peer()['loss']
      runs['trl'] = lambda: peer()['seconds']
    else:
      measure.skipped(case, 'trl GRPOTrainer', 'name its environment by --trl_python')
    say(f'{case}: losses {losses}')
    for name, loss in losses.items():
      if abs(loss - losses['tree']) > 1e-4:
        raise AssertionError(f'{case}: {name} has loss {loss}, the tree {losses["tree"]}')
    seconds = rounds(runs)
  for name, peer_name in (('flat', 'our flat padded form'), ('trl', 'trl GRPOTrainer')):
    if name in seconds:
      line(case, peer_name, seconds['tree'], seconds[name], 's', wanted=4, **facts['tree'], loss=losses['tree'],
           peer_loss=losses[name], flat_tokens=facts['flat']['tokens'], flat_bound=facts['flat']['bound'])


def whole() -> None:
  """A step from sampling to update: the geometry of configs/nano.py, 32 prompts x 8, 4 updates, KL against the reference."""
  case, c = 'whole step, organism', nano.get_config()
  policy = load_policy(c.model, seed=0)
  tasks = [task for kind in KINDS for task in ToolWorld().tasks(kind, 16, seed=5, split='train')]
  points = [point for task in tasks for seed in task_seeds(task) for point in decision_points(seed)]
  prompts, _ = encode_prompts(policy.tokenizer, points, c.rl.max_prompt_tokens)
  engine = Engine(policy.params, policy.config, stop_ids=policy.stop_ids, lanes=c.engine.lanes, max_len=c.engine.max_len)
  loop = GrpoLoop(policy.config, policy.tokenizer, engine, Questions(policy.tokenizer, prompts, c.rl.reward), range(len(prompts)),
                  c.rl, seed=0)
  copy = lambda: jax.tree.map(lambda leaf: leaf.copy(), policy.params)
  state, reference, lengths = optimizer.init_state(copy(), loop.tx), copy(), []
  engine.update(state.params)

  def step() -> None:
    nonlocal state
    number = len(lengths)
    batch = loop.source.judge(loop.chosen(number), loop.rollouts(number))
    state, under_way = loop.update(state, reference, batch)
    under_way.numbers(engine)
    lengths.append(float(np.mean([len(completion.tokens) for r in batch.rollouts for _, completion in r.exchanges])))

  with contextlib.ExitStack() as stack:
    runs, peer_lengths = {'ours': timed(step)}, []
    if _TRL.value:
      asked = [(render_prompt(policy.tokenizer, list(p.point.messages)), p.point.reference) for p in prompts]
      peer = stack.enter_context(trl_peer(
          policy.config, policy.params, rollouts=None, prompts=[text for text, _ in asked], references=[r for _, r in asked],
          group=c.rl.group, micro=16, rollouts_per_update=c.rl.prompts * c.rl.group // c.rl.updates, updates=c.rl.updates,
          max_tokens=c.rl.max_tokens, kl_coefficient=c.rl.kl_coefficient, learning_rate=c.rl.learning_rate))

      def peer_step() -> float:
        answer = peer()
        peer_lengths.append(answer['completions/mean_length'])
        return answer['seconds']
      runs['trl'] = peer_step
    else:
      measure.skipped(case, 'trl GRPOTrainer', 'name its environment by --trl_python')
    for run in runs.values():
      run()  # compiles; of ours the lengths of a later step may compile once more
    seconds = rounds(runs)
  line(case, 'trl GRPOTrainer', seconds['ours'], seconds.get('trl'), 's', wanted=4, response_tokens=float(np.mean(lengths[1:])),
       peer_response_tokens=float(np.mean(peer_lengths[1:])) if peer_lengths else None)


def main(_) -> None:
  unknown = sorted(set(_CASES.value) - set(CASES))
  if unknown:
    raise app.UsageError(f'unknown cases {unknown}; known are {CASES}')
  if 'update' in _CASES.value:
    for vocabulary in map(int, _VOCABULARIES.value):
      update(vocabulary)
  if 'whole' in _CASES.value:
    whole()


if __name__ == '__main__':
  app.run(main)
