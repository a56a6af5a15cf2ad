"""Optimizers by name, through optax, and the state that every training step carries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from dcore_jax.models.decoder import ParamSpec

_MATRIX = optax.contrib.MuonDimensionNumbers
# Stacked matrices act on activations from the left axes to the right ones; the layer axis stays a batch axis.
_MUON_AXES = {
  'q': _MATRIX((1,), (2, 3)),
  'k': _MATRIX((1,), (2, 3)),
  'v': _MATRIX((1,), (2, 3)),
  'o': _MATRIX((1, 2), (3,)),
  'gate': _MATRIX((1,), (2,)),
  'up': _MATRIX((1,), (2,)),
  'down': _MATRIX((1,), (2,)),
}


HOST = 'pinned_host'  # what jax calls host memory that a device reads and writes by itself


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a step changes. `step` counts calls (int32 scalar), those skipped for a non-finite gradient included."""

  params: Any
  opt_state: Any
  step: jax.Array


def abstract_state(specs: Any, tx: optax.GradientTransformation) -> TrainState:
  """The state as a tree of specs (models.decoder.abstract_params): moments are split as their parameters, counters whole."""
  shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
  scalar = lambda leaf: ParamSpec(leaf.shape, leaf.dtype, (), None)
  opt_state = _beside_parameters(jax.eval_shape(tx.init, shapes), specs, scalar)
  return TrainState(specs, opt_state, scalar(jax.ShapeDtypeStruct((), jnp.int32)))


def init_state(
  params: Any, tx: optax.GradientTransformation, *, offload: bool = False
) -> TrainState:
  """The state before the first step. Steps donate it: keep a copy of parameters that are needed afterwards.

  Under a mesh each moment is made in the shards of its parameter; `offload` puts the moments into host memory.

  Raises:
    ValueError: `offload` without a mesh, or on a backend without such memory.
  """
  params = jax.tree.map(jnp.asarray, params)
  if offload:
    check_offload()
  if jax.sharding.get_abstract_mesh().empty:
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))
  mesh = jax.sharding.get_mesh()
  whole = NamedSharding(mesh, jax.P())
  places = jax.tree.map(
    lambda leaf: leaf.sharding.with_memory_kind(HOST if offload else None), params
  )
  placed = _beside_parameters(jax.eval_shape(tx.init, params), places, lambda _: whole)
  return TrainState(
    params,
    jax.jit(tx.init, out_shardings=placed)(params),
    jax.device_put(jnp.zeros((), jnp.int32), whole),
  )


def check_offload() -> None:
  """ValueError where the devices of the mesh in context have no host memory to keep arrays in."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    raise ValueError(
      'execution.offload: keeping arrays in host memory needs a mesh of accelerators'
    )
  device = mesh.devices.flat[0]
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if device.platform == 'cpu' or HOST not in kinds:
    raise ValueError(
      f'execution.offload: {device.device_kind} devices have no {HOST} memory apart from their own {kinds}'
    )


def make_schedule(
  learning_rate: float,
  schedule: str = 'constant',
  *,
  warmup: float = 0.0,
  floor: float = 0.0,
  total_steps: int | None = None,
) -> Callable[[jax.Array], jax.Array]:
  """Learning rate by step.

  Args:
    learning_rate: peak.
    schedule: 'constant' or 'cosine' (down to floor x peak at `total_steps`).
    warmup: share of `total_steps` with a linear rise; the first step already moves.
    floor: share of the peak that remains at the end.
    total_steps: needed for a cosine or a warm-up.

  Raises:
    ValueError: unknown schedule, shares outside 0..1, a floor where nothing falls, or `total_steps` missing.
  """
  if schedule not in ('constant', 'cosine'):
    raise ValueError(f"unknown schedule {schedule!r}; expected 'constant' or 'cosine'")
  if not (0 <= warmup <= 1 and 0 <= floor <= 1):
    raise ValueError(f'warmup = {warmup} and floor = {floor} are shares, 0..1')
  if schedule == 'constant' and floor:
    raise ValueError(f'floor = {floor}: a constant schedule does not fall')
  if schedule == 'constant' and not warmup:
    return optax.constant_schedule(learning_rate)
  if not total_steps or total_steps < 1:
    raise ValueError(f'total_steps = {total_steps}: a cosine or a warm-up needs their number')
  rise = round(warmup * total_steps)
  rest = (
    optax.constant_schedule(learning_rate)
    if schedule == 'constant'
    else optax.cosine_decay_schedule(learning_rate, max(1, total_steps - rise), alpha=floor)
  )
  ramp = optax.linear_schedule(learning_rate / (rise + 1), learning_rate, max(1, rise))
  return optax.join_schedules([ramp, rest], [rise])


def make_optimizer(
  name: str = 'adamw',
  learning_rate: float = 1e-5,
  schedule: str = 'constant',
  *,
  warmup: float = 0.0,
  floor: float = 0.0,
  total_steps: int | None = None,
  weight_decay: float = 0.0,
  clip: float = 1.0,
  b1: float = 0.9,
  b2: float = 0.999,
  adam_learning_rate: float | None = None,
) -> optax.GradientTransformation:
  """'adamw', or 'muon': Muon (Jordan 2024) on the hidden matrices, Adam on embedding, head, norms and biases.

  Args:
    name: 'adamw' or 'muon'.
    learning_rate, schedule, warmup, floor, total_steps: see `make_schedule`.
    weight_decay: decoupled; never on norms and biases, and with Muon on the hidden matrices only.
    clip: largest global gradient norm.
    b1, b2: Adam's decay rates.
    adam_learning_rate: peak of Muon's Adam part, same schedule; required there, since the two differ in scale.

  Raises:
    ValueError: unknown name, or an argument that this optimizer would not use.
  """
  shape = dict(schedule=schedule, warmup=warmup, floor=floor, total_steps=total_steps)
  rate = make_schedule(learning_rate, **shape)
  if name == 'adamw':
    if adam_learning_rate is not None:
      raise ValueError('adam_learning_rate is for muon; adamw has learning_rate')
    update = optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=_decayed)
  elif name == 'muon':
    if adam_learning_rate is None:
      raise ValueError('muon needs adam_learning_rate for embedding and norms')
    update = optax.contrib.muon(
      rate,
      weight_decay=weight_decay,
      adam_b1=b1,
      adam_b2=b2,
      muon_weight_dimension_numbers=_muon_axes,
      adam_learning_rate=make_schedule(adam_learning_rate, **shape),
    )
  else:
    raise ValueError(f"unknown optimizer {name!r}; expected 'adamw' or 'muon'")
  return optax.chain(optax.clip_by_global_norm(clip), update)


def apply_gradients(
  tx: optax.GradientTransformation, state: TrainState, grads: Any, *, offload: bool = False
) -> tuple[TrainState, dict]:
  """One update -> (state, {'grad_norm', 'skipped'}); a non-finite norm leaves parameters and moments as they were.

  With `offload` the moments come from host memory and go back there.
  """
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(norm)
  held = _moved(state, state.opt_state, jax.memory.Space.Device) if offload else state.opt_state
  updates, opt_state = tx.update(grads, held, state.params)
  params = optax.apply_updates(state.params, updates)
  keep = lambda new, old: jnp.where(finite, new, old)
  params = jax.tree.map(keep, params, state.params)
  opt_state = jax.tree.map(keep, opt_state, held)
  if offload:
    opt_state = _moved(state, opt_state, jax.memory.Space.Host)
  return TrainState(params, opt_state, state.step + 1), {
    'grad_norm': norm,
    'skipped': 1 - finite.astype(jnp.int32),
  }


def _moved(state: TrainState, opt_state: Any, space: jax.memory.Space) -> Any:
  """Moments in another memory; what else an optimizer has (counters, Muon's coefficients) stays."""
  move = lambda leaf, moment: jax.device_put(leaf, space) if moment else leaf
  return jax.tree.map(move, opt_state, moments(opt_state, state.params))


def moments(opt_state: Any, params: Any) -> Any:
  """`opt_state` with True for each leaf that stands for a parameter: what `offload` moves."""
  return _beside_parameters(opt_state, jax.tree.map(lambda _: True, params), lambda _: False)


def _beside_parameters(opt_state: Any, beside: Any, otherwise: Callable[[Any], Any]) -> Any:
  """`opt_state` with each leaf that stands for a parameter replaced by what `beside`, a tree like the parameters, has for it.

  Moments hang in trees like the parameters', below whatever an optimizer wraps them in: their path ends with the parameter's.
  """
  names = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
  known = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(beside)}

  def of(path, leaf):
    found = [name for name in known if leaf.ndim and names(path)[-len(name) :] == name]
    return known[found[0]] if found else otherwise(leaf)

  return jax.tree_util.tree_map_with_path(of, opt_state)


def _decayed(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not path[-1].key.endswith(('norm', 'bias')), params
  )


def _muon_axes(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: _MUON_AXES.get(path[-1].key), params)
