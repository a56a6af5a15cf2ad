"""Plans: what is compiled is what loops and engine call; steps that do not fit; real models."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax import sharding, tokentree
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.plan import compile_times, fit, programs, shapes
from dcore_jax.plan.compile_times import CompileTime, NamedProgram
from dcore_jax.plan.engine_calls import EngineCalls
from dcore_jax.rollout import device, mesh_programs
from dcore_jax.rollout import engine as engine_lib
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.run.config import default_config, read_config

ROOT = pathlib.Path(__file__).parents[2]
MODEL = DecoderConfig(
  vocab_size=64,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=1,
  head_dim=8,
  num_attention_heads=2,
  num_key_value_heads=1,
  max_position_embeddings=256,
)


def tiny_config():
  c = default_config()
  c.model.init.update({**MODEL.to_hf()})
  c.execution.update(dict(remat='full', unroll=False))
  c.sft.update(dict(capacity=64, rows=2))
  c.rl.update(
    dict(capacity=96, rows=1, prompts=4, group=4, updates=2, max_prompt_tokens=32, max_tokens=16)
  )
  c.engine.update(dict(lanes=4, max_len=48, max_new=16, steps_per_call=2))
  return c


def described(tree):
  return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)


def test_the_batch_is_what_a_tree_gives():
  rows = [
    tokentree.TokenSequence(
      np.arange(1, 30, dtype=np.int32), (np.arange(29) > 9).astype(np.float32), 10
    )
    for _ in range(4)
  ]
  tree = tokentree.pack(rows, 40, rows_multiple=2)
  tree = tree.with_extras(
    advantage=np.zeros(tree.tokens.shape, np.float32), sequence=np.zeros_like(tree.tokens)
  )
  batch = tree.batch(budget=80, accumulate=tree.rows // 2)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  planned = shapes.abstract_batch(mesh, tree.rows // 2, 2, 40, 80, ('advantage', 'sequence'))
  assert described(planned) == described(batch)


def test_the_calls_are_those_of_the_engine(monkeypatch):
  """All programs that a run of the engine calls are planned: the same shapes, compiled for the
  same."""
  params = jax.tree.map(
    lambda spec: jnp.ones(spec.shape, spec.dtype), decoder.abstract_params(MODEL)
  )
  names = ('forward', 'draw', 'copy_page')
  called = {name: [] for name in names}

  def recorded(name, function):
    def record(*args, **static):
      called[name].append((described(args), static))
      return function(*args, **static)

    return record

  for name in names:
    monkeypatch.setattr(mesh_programs, name, recorded(name, getattr(mesh_programs, name)))
  monkeypatch.setattr(
    engine_lib,
    'make_executor',
    lambda params, config, sizes, _: device.MeshExecutor(params, config, sizes, None),
  )
  sizes = EngineSizes(lanes=40, max_len=200, max_new=64, trunks=8)
  engine = Engine(params, MODEL, stop_ids=[], sizes=sizes)
  # Long and short prompts, and groups that part within a page.
  requests = [Request(np.full(length, 7), (length, g), 9) for length in (150, 3) for g in range(4)]
  engine.generate(requests, SamplingParams())
  # One alone: few draws.
  engine.generate(requests[:1], SamplingParams())
  # Many at once.
  many = [Request(np.full(20, 7), (g,), 9) for g in range(40)]
  engine.generate(many, SamplingParams())
  monkeypatch.undo()

  planned = {name: [] for name in names}

  class Recorder:
    def __init__(self, name):
      self.name = name

    def lower(self, *args, **static):
      planned[self.name].append((described(args), static))

  for name in names:
    monkeypatch.setattr(mesh_programs, name, Recorder(name))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  calls = EngineCalls(MODEL, mesh, engine.sizes, prompt=96, dtype=jnp.float32)
  calls.prefill()
  calls.decode()
  for other in calls.others():
    other.lower()
  assert [len(planned[name]) for name in names] == [3, 2, 1]
  for name in names:
    assert all(call in called[name] for call in planned[name])
    assert all(call in planned[name] for call in called[name])


def test_a_plan_of_one_device():
  config = tiny_config()
  config.rl.cosine_every = 4
  plans = {step.name: step for step in fit.plan(read_config(config), 'cpu:1')}
  assert plans['angle of psi to GRPO'].total > plans['gradient of psi'].total
  assert len(plans) == 8 and all(step.fits and not step.collectives for step in plans.values())
  state = 3 * 4 * MODEL.param_count
  assert (
    0 <= plans['SFT step'].arguments - state < 8000
    and plans['SFT step'].peak > plans['SFT step'].arguments
  )
  assert plans['prefill'].beside['train state'] == pytest.approx(state, abs=64)
  assert plans['reference log-probabilities'].beside['moments'] == pytest.approx(
    state * 2 / 3, abs=64
  )
  assert plans['DA-GRPO update'].beside['reference policy'] == 4 * MODEL.param_count
  assert (
    plans['gradient of psi'].total < plans['DA-GRPO update'].total
    and plans['gradient of psi'].calls == 1
  )
  # 4 rollouts of 16 tokens beside a prompt of 32 fit a row of 96: 2 prompts a mini-batch, 4 passes
  # of a row in all.
  assert plans['DA-GRPO update'].calls == 2 and plans['old log-probabilities'].calls == 4
  written = json.loads(json.dumps([step.to_json() for step in plans.values()]))
  assert [step['compile_time']['name'] for step in written] == list(plans)
  assert all(step['compile_time']['seconds'] > 0 for step in written)
  assert 'a DA-GRPO step, at least' in fit.table(list(plans.values()), 'cpu:1')


@pytest.mark.parametrize('rollouts', ['merged', 'unmerged'])
def test_a_plan_with_adapters(rollouts):
  """One base, no moments of it, no reference policy, and no gradient of its matrices."""
  c = tiny_config()
  steps = ('SFT step', 'reference log-probabilities', 'DA-GRPO update', 'decode')
  full = fit.plan(read_config(c), 'cpu:1', steps)
  c.lora.update(dict(rank=2, rollouts=rollouts))
  plans = {step.name: step for step in fit.plan(read_config(c), 'cpu:1', steps)}
  # q, k, v, o and three of the feed-forward layer, float32; and two moments.
  widths = 3 * (16 + 24) + (16 + 16) + 2 * (16 + 8) + (16 + 16)
  state = 3 * 4 * 2 * widths
  base = 4 * MODEL.param_count
  assert 0 <= plans['SFT step'].arguments - state - base < 8000
  assert plans['reference log-probabilities'].beside['parameters'] == state // 3
  update = plans['DA-GRPO update'].beside
  assert set(update) == {'engine weights', 'engine caches'}
  decode = plans['decode']
  assert decode.beside['train state'] == pytest.approx(state, abs=64)
  if rollouts == 'unmerged':
    # The base is the engine's.
    assert update['engine weights'] == state // 3 and 'base' not in decode.beside
  else:
    assert update['engine weights'] >= base and decode.beside['base'] == base
  for before in full:
    if before.name in ('SFT step', 'DA-GRPO update'):
      # Two products of three; attention, which has no matrices, keeps its three.
      assert 2 / 3 < plans[before.name].flops / before.flops < 0.8


def test_what_is_not_in_groups_is_planned_where_groups_have_trunks_of_their_own():
  """A trunk a lane, and no training state beside them."""
  config = tiny_config()
  config.engine.update(dict(trunks=config.engine.lanes // 4))
  steps = {
    step.name: step
    for step in fit.plan(read_config(config), 'cpu:1', ('decode', 'decode without groups'))
  }
  grouped = steps['decode']
  apart = steps['decode without groups']
  assert not apart.beside and grouped.beside and apart.arguments > grouped.arguments
  assert 'a call of the engine outside RL' in fit.table(list(steps.values()), 'cpu:1')
  config.stages = ('sft', 'rl')
  with pytest.raises(ValueError, match='unknown steps'):
    fit.plan(read_config(config), 'cpu:1', ('decode without groups',))


def test_programs_beside_the_steps_are_compiled_for_their_times(monkeypatch):
  traced = []

  def square(x):
    traced.append(x.shape)
    return x * x

  def program(size):
    return NamedProgram(f'square of {size}', lambda: jax.jit(square).lower(jnp.ones(size)))

  monkeypatch.setattr(programs, 'more_of_engine', lambda run: [program(2), program(3)])
  times = fit.more_compile_times(read_config(tiny_config()), 'cpu:1')
  assert [each.name for each in times] == ['square of 2', 'square of 3']
  assert traced == [(2,), (3,)] and all(each.seconds > 0 for each in times)
  known = [CompileTime('one', 1.5, 2.0), CompileTime('other', 2.0, 2.5)]
  last = compile_times.table(known).splitlines()[-1]
  assert last.startswith('all 2, one after the other') and last.split()[-2:] == ['3.5', '4.5']


def test_what_does_not_fit_is_named_with_what_would_help(monkeypatch):
  monkeypatch.setattr(fit, 'HEAD_ROOM', 1e-6)
  [step] = fit.plan(read_config(tiny_config()), 'cpu:1', ('DA-GRPO update',))
  assert not step.fits and step.total > step.limit
  names = [name for name, _ in step.largest]
  sizes = [size for _, size in step.largest]
  assert (
    sizes == sorted(sizes, reverse=True)
    and len(set(names)) == 6
    and any(name.startswith('f32[') for name in names)
  )
  assert 'too much' in step.remedies[0] and any('mesh.fsdp' in line for line in step.remedies)
  assert 'DA-GRPO update DOES NOT FIT' in fit.table([step], 'cpu:1')


def test_a_refusal_by_the_compiler_is_a_step_that_does_not_fit(monkeypatch):
  def refuse(lowered):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  message = (
    'RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (4000.00G) '
    'exceeds available HBM (15.75G).'
  )
  [step] = fit.plan(read_config(tiny_config()), 'cpu:1', ('SFT step',))
  assert (
    not step.fits
    and step.total == step.arguments + step.temporaries == 4000 << 30
    and step.error == message
  )
  assert step.largest[0] == ('temporaries, none of them listed by the compiler', step.temporaries)
  assert float(step.remedies[0].removesuffix(' GiB too much')) == pytest.approx(
    4000 - step.limit / 2**30, abs=0.1
  )
  message = 'INTERNAL: a fault of the compiler'
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    fit.plan(read_config(tiny_config()), 'cpu:1', ('SFT step',))


def test_sizes_that_do_not_fit_each_other_are_named():
  config = tiny_config()
  config.rl.capacity = 40
  with pytest.raises(
    ValueError, match='rl.capacity = 40 does not hold a prompt of 32 and a response of 16'
  ):
    fit.plan(read_config(config), 'cpu:1', ('DA-GRPO update',))
  with pytest.raises(ValueError, match="unknown steps .'nap'."):
    fit.plan(read_config(tiny_config()), 'cpu:1', ('nap',))
  config = tiny_config()
  config.execution.offload = ('optimizer',)
  with pytest.raises(ValueError, match='CPU devices have no memory apart'):
    fit.plan(read_config(config), 'cpu:1')


def run_program(config: str, topology: str, *flags: str) -> subprocess.CompletedProcess:
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  command = [
    sys.executable,
    '-m',
    'experiments.plan',
    f'--config={config}',
    f'--topology={topology}',
    '--json',
    *flags,
  ]
  return subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
  )


@pytest.mark.slow
def test_the_program_says_so_by_its_exit_status(tmp_path):
  """On eight fake devices; and a model that is far too large."""
  path = tmp_path / 'tiny.py'
  fields = tiny_config().to_dict()
  path.write_text(
    f'import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({fields!r})\n'
  )
  rows = ['--config.sft.rows=8', '--config.rl.rows=8']
  done = run_program(str(path), 'cpu:8', *rows, '--steps=SFT step')
  assert done.returncode == 0, done.stderr[-2000:]
  [step] = map(json.loads, done.stdout.splitlines())
  assert step['fits'] and step['collectives']['all-gather']['count'] >= 7
  done = run_program(str(path), 'cpu:8', '--config.rl.rows=8', '--config.sft.rows=3')
  assert (
    done.returncode == 1
    and 'sft.rows = 3 do not divide into 1 micro-batches over 8 devices' in done.stderr
  )
  long = ['--config.rl.capacity=1024', '--steps=old log-probabilities']
  least = {}
  for flags in (long, [*long, '--capacity=auto']):
    done = run_program(str(path), 'cpu:8', *rows, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    *capacities, step = map(json.loads, done.stdout.splitlines())
    least[len(capacities)] = step['flops']
  assert capacities[0]['best'] == 512 and capacities[0]['config'] == 1024
  # Rows of half as many tokens.
  assert least[1] < 0.6 * least[0]
  done = run_program(
    str(path), 'cpu:8', *rows, '--steps=SFT step', '--config.model.init.vocab_size=400000000'
  )
  assert done.returncode == 1 and not json.loads(done.stdout)['fits']


@pytest.mark.parametrize('name', ['qwen3_8b', 'qwen3_14b'])
def test_compiles_for_eight_a100_with_room(name):
  if importlib.util.find_spec('jax_cuda12_plugin') is None:
    pytest.skip('no compiler for a100:8: pip install -e .[aot]')
  done = run_program(f'configs/{name}.py', 'a100:8')
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  capacities, *lines, times = map(json.loads, done.stdout.splitlines())
  steps = {step['name']: step for step in lines}
  # Temporaries are estimated for the comparison, and known now.
  assert capacities['best'] == capacities['config']
  [chosen] = [c for c in capacities['capacities'] if c['capacity'] == capacities['best']]
  assert chosen['total'] == pytest.approx(steps['DA-GRPO update']['total'], rel=0.03)
  assert [each['name'] for each in times['compile_times']][: len(steps)] == list(steps)
  assert len(steps) == 8 and all(step['fits'] for step in steps.values())
  layers, head = weights(fit.presets.config(name))
  # Layers in bfloat16, forward and again in the backward pass, and the head: nothing in float32,
  # nothing twice.
  gathered = steps['SFT step']['collectives']['all-gather']['bytes']
  assert gathered == pytest.approx(2 * (2 * layers + head) * 7 / 8, rel=0.01)


def weights(model: DecoderConfig) -> tuple[int, int]:
  """Parameters of (all layers, the head)."""
  head = model.vocab_size * model.hidden_size
  return model.param_count - 2 * head, head


@pytest.mark.slow
def test_compiles_a_training_step_for_a_tpu_slice():
  """Qwen3-8B with all its layers, which are scanned: two take as long. Chunks of the head that are
  not whole tiles (test_head.py) cost 300 s more."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('no compiler for v5p:2x2x2: pip install -e .[aot]')
  done = run_program('configs/qwen3_8b.py', 'v5p:2x2x2', '--steps=SFT step')
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  [step] = map(json.loads, done.stdout.splitlines())
  model = fit.presets.config('qwen3_8b')
  layers, head = weights(model)
  assert step['fits'] and step['arguments'] == pytest.approx(
    3 * 4 * model.param_count / 8, rel=0.01
  )
  # Layers in bfloat16 twice and once their gradients. The compiler passes most of them around in a
  # ring, in parts, while it multiplies, and sends 9 parts where 7 are needed; a third gather would
  # make it 1.6 times as much.
  least = 2 * (3 * layers + head) * 7 / 8
  assert (
    least
    < step['collectives']['all-gather']['bytes']
    + step['collectives']['collective-permute']['bytes']
    < 1.4 * least
  )


def test_compiles_for_a_tpu_unless_its_compiler_refuses():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('no compiler for v5e:2x4: pip install -e .[aot]')
  done = run_program('configs/qwen3_8b.py', 'v5e:2x4', '--steps=SFT step')
  assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr[-3000:]
  [step] = map(json.loads, done.stdout.splitlines())
  assert (
    not step['fits']
    and 'exceeds available HBM' in step['error']
    and step['temporaries'] > step['arguments'] > 11 << 30
  )
