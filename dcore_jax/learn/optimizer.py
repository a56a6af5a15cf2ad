"""Optimizers by name, through optax, and the state that every training step carries."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from dcore_jax.models.decoder import ParamSpec

# Which axes of a stacked projection Muon contracts and which it produces; what is not named, the
# layer axis, is a batch axis.
_MuonAxes = optax.contrib.MuonDimensionNumbers
_MUON_AXES = {
  'q': _MuonAxes((1,), (2, 3)),
  'k': _MuonAxes((1,), (2, 3)),
  'v': _MuonAxes((1,), (2, 3)),
  'o': _MuonAxes((1, 2), (3,)),
  'gate': _MuonAxes((1,), (2,)),
  'up': _MuonAxes((1,), (2,)),
  'down': _MuonAxes((1,), (2,)),
}

# jax's name for memory of the host that an accelerator can read and write without a copy by the
# host.
HOST = 'pinned_host'

_B1 = 0.9  # Adam's decay rate of the first moment; no run of ours has had a reason to move it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a step changes.

  Attributes:
    params: the parameter tree.
    opt_state: the optimizer's state, as optax makes it.
    step: int32 scalar, the number of calls, including those that a non-finite gradient made skip
      the update.
  """

  params: Any
  opt_state: Any
  step: jax.Array


def abstract_state(specs: Any, tx: optax.GradientTransformation) -> TrainState:
  """Describes the state as a tree of specs: a moment has its parameter's axes, a counter has none.

  `specs` is the tree of `models.decoder.abstract_params`.
  """

  # A counter is a scalar that every device holds.
  def unsplit(leaf: Any) -> ParamSpec:
    return ParamSpec(shape=leaf.shape, dtype=leaf.dtype, axes=(), init=None)

  # Shapes alone: the state of a model that no machine here could hold is described too.
  shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
  opt_state = _beside_parameters(tx, jax.eval_shape(tx.init, shapes), specs, unsplit)
  step = unsplit(jax.ShapeDtypeStruct((), jnp.int32))
  return TrainState(params=specs, opt_state=opt_state, step=step)


def init_state(
  params: Any, tx: optax.GradientTransformation, *, offload: bool = False
) -> TrainState:
  """Makes the state before the first step.

  Steps donate it: keep a copy of parameters that are needed afterwards.

  Under a mesh each moment is made in the shards of its parameter; `offload` puts the moments into
  host memory.

  Raises:
    ValueError: `offload` without a mesh, or on a backend without such memory.
  """
  params = jax.tree.map(jnp.asarray, params)
  step = jnp.zeros((), jnp.int32)
  if offload:
    check_offload()
  # Without a mesh there is one device. Arrays are tied to it, as those are that a step returns: jax
  # compiles the step once more for arrays that are not.
  if jax.sharding.get_abstract_mesh().empty:
    state = TrainState(params=params, opt_state=tx.init(params), step=step)
    first = jax.tree.leaves(params)[0]
    # Nothing that is being traced has a place.
    return state if isinstance(first, jax.core.Tracer) else jax.device_put(state, first.sharding)
  # Scalars are on every device, as steps read them everywhere.
  whole = NamedSharding(jax.sharding.get_mesh(), jax.P())
  memory = HOST if offload else None
  places = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(memory), params)
  # Made in their shards: Adam's moments are twice the size of the parameters, too much for one
  # device.
  placed = _beside_parameters(tx, jax.eval_shape(tx.init, params), places, lambda _: whole)
  opt_state = jax.jit(tx.init, out_shardings=placed)(params)
  return TrainState(params=params, opt_state=opt_state, step=jax.device_put(step, whole))


def check_offload() -> None:
  """Checks that the devices of the mesh in context have host memory to keep arrays in.

  Raises:
    ValueError: no mesh, a CPU, whose own memory is the host's, or a device without such memory.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    raise ValueError(
      'execution.offload: keeping arrays in host memory needs a mesh of accelerators'
    )
  # All devices of a mesh are of one kind, so that the first one speaks for all.
  device = mesh.devices.flat[0]
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if device.platform == 'cpu' or HOST not in kinds:
    raise ValueError(
      f'execution.offload: {device.device_kind} devices have no {HOST} memory '
      f'apart from their own {kinds}'
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How a learning rate moves over the steps.

  Attributes:
    kind: 'constant' or 'cosine' (down to floor x peak at `total_steps`).
    warmup: share of `total_steps` with a linear rise; the first step already moves.
    floor: share of the peak that remains at the end of a cosine.
    total_steps: needed for a cosine or a warm-up.

  Raises:
    ValueError: unknown kind, shares outside 0..1, a floor where nothing falls, or `total_steps`
      missing.
  """

  kind: str = 'constant'
  warmup: float = 0.0
  floor: float = 0.0
  total_steps: int | None = None

  def __post_init__(self):
    if self.kind not in ('constant', 'cosine'):
      raise ValueError(f"unknown schedule {self.kind!r}; expected 'constant' or 'cosine'")
    if not (0 <= self.warmup <= 1 and 0 <= self.floor <= 1):
      raise ValueError(f'warmup = {self.warmup} and floor = {self.floor} are shares, 0..1')
    if self.kind == 'constant' and self.floor:
      raise ValueError(f'floor = {self.floor}: a constant schedule does not fall')
    # A constant rate needs no number of steps, and loops of unknown length can use it.
    moves = self.kind == 'cosine' or self.warmup
    if moves and (not self.total_steps or self.total_steps < 1):
      raise ValueError(
        f'total_steps = {self.total_steps}: a cosine or a warm-up needs their number'
      )

  def rate(self, peak: float) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning rate as a function of the step, `peak` at its highest."""
    if self.kind == 'constant' and not self.warmup:
      return optax.constant_schedule(peak)
    # A number of steps, so that the rise ends exactly where the rest begins.
    rise = round(self.warmup * self.total_steps)
    if self.kind == 'constant':
      rest = optax.constant_schedule(peak)
    else:
      rest = optax.cosine_decay_schedule(peak, max(1, self.total_steps - rise), alpha=self.floor)
    # The rise begins one part above 0: at 0 the first batch would be spent on nothing.
    ramp = optax.linear_schedule(peak / (rise + 1), peak, max(1, rise))
    return optax.join_schedules([ramp, rest], [rise])


_CONSTANT = Schedule()


def make_optimizer(
  name: str = 'adamw',
  learning_rate: float = 1e-5,
  schedule: Schedule = _CONSTANT,
  *,
  weight_decay: float = 0.0,
  clip: float = 1.0,
  b2: float = 0.999,
  adam_learning_rate: float | None = None,
) -> optax.GradientTransformation:
  """Makes an optimizer that clips the gradient by its global norm first.

  'adamw' is AdamW on everything; 'muon' is Muon (Jordan 2024) on the hidden matrices and Adam on
  embedding, head, norms and biases; 'muon_nadam' has Nesterov momentum in that Adam, whose first
  step then is 1.47 times as long.

  Args:
    name: 'adamw', 'muon' or 'muon_nadam'.
    learning_rate: the peak.
    schedule: how the rate moves.
    weight_decay: decoupled; never on norms and biases, and with Muon on the hidden matrices only.
    clip: largest global gradient norm; 0 leaves gradients as they are.
    b2: Adam's decay rate of the second moment; that of the first is 0.9.
    adam_learning_rate: peak of Muon's Adam part, same schedule; required there, since the two
      differ in scale.

  Raises:
    ValueError: unknown name, an argument that this optimizer would not use, or a number that is
      negative or not finite.
  """
  # NaN and infinity would pass optax and show as a loss that is NaN.
  _check_numbers(
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    clip=clip,
    adam_learning_rate=adam_learning_rate or 0.0,
  )
  rate = schedule.rate(learning_rate)
  if name == 'adamw':
    # An option that the optimizer ignores would look as if it had been tried.
    if adam_learning_rate is not None:
      raise ValueError('adam_learning_rate is for muon; adamw has learning_rate')
    update = optax.adamw(rate, b1=_B1, b2=b2, weight_decay=weight_decay, mask=_decayed)
  elif name in ('muon', 'muon_nadam'):
    if adam_learning_rate is None:
      raise ValueError(f'{name} needs adam_learning_rate for embedding and norms')
    # The same shape at another height: the two parts rise and fall together.
    adam_rate = schedule.rate(adam_learning_rate)
    # optax hands Muon's Nesterov momentum on to its Adam.
    update = optax.contrib.muon(
      rate,
      weight_decay=weight_decay,
      adam_b1=_B1,
      adam_b2=b2,
      muon_weight_dimension_numbers=_muon_axes,
      adam_learning_rate=adam_rate,
    )
    if name == 'muon':
      # Each gets its own parameters alone, so that optax's Adam has none.
      adam = optax.adamw(adam_rate, b1=_B1, b2=b2, weight_decay=0.0)
      update = optax.partition({'muon': update, 'adam': adam}, _muon_or_adam)
  else:
    raise ValueError(f"unknown optimizer {name!r}; expected 'adamw', 'muon' or 'muon_nadam'")
  # Clipped before the moments see the gradient, or one outlier would stay in them for many steps.
  clipped = optax.clip_by_global_norm(clip) if clip else optax.identity()
  return optax.chain(clipped, update)


def _check_numbers(**numbers: float) -> None:
  for name, value in numbers.items():
    # Written so that NaN fails it.
    if not 0 <= value < math.inf:
      raise ValueError(f'{name} = {value} must be finite and not negative')


def apply_gradients(
  tx: optax.GradientTransformation, state: TrainState, grads: Any, *, offload: bool = False
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Makes one update -> (state, {'grad_norm', 'skipped'}).

  A gradient whose norm is not finite leaves parameters and moments as they were and counts as
  skipped: one bad batch of a long run must not end it. With `offload` the moments come from host
  memory and go back there.
  """
  # The norm before clipping, which is what shows that a run becomes unstable.
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(norm)
  held = state.opt_state
  if offload:
    held = _moved(tx, state, held, jax.memory.Space.Device)
  updates, opt_state = tx.update(grads, held, state.params)
  params = optax.apply_updates(state.params, updates)

  # A select and no branch: both results have the same shapes and shards.
  def unless_skipped(new, old):
    return jnp.where(finite, new, old)

  params = jax.tree.map(unless_skipped, params, state.params)
  opt_state = jax.tree.map(unless_skipped, opt_state, held)
  if offload:
    opt_state = _moved(tx, state, opt_state, jax.memory.Space.Host)
  metrics = {'grad_norm': norm, 'skipped': 1 - finite.astype(jnp.int32)}
  return TrainState(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _moved(
  tx: optax.GradientTransformation, state: TrainState, opt_state: Any, space: jax.memory.Space
) -> Any:
  """Moves the moments to another memory; counters and Muon's coefficients, a few bytes, stay where
  they are.
  """

  def move(leaf, is_moment):
    return jax.device_put(leaf, space) if is_moment else leaf

  return jax.tree.map(move, opt_state, moments(tx, opt_state, state.params))


def moments(tx: optax.GradientTransformation, opt_state: Any, params: Any) -> Any:
  """Returns `opt_state` with True for each leaf that stands for a parameter, which `offload` moves,
  and False elsewhere.
  """
  # Found by optax itself, because the layout of a state differs by optimizer and version.
  return _beside_parameters(tx, opt_state, jax.tree.map(lambda _: True, params), lambda _: False)


def _beside_parameters(
  tx: optax.GradientTransformation,
  opt_state: Any,
  beside: Any,
  otherwise: Callable[[Any], Any],
) -> Any:
  """Replaces each leaf of `opt_state` that stands for a parameter by the leaf that `beside`, a tree
  like the parameters, has.

  Every other leaf becomes `otherwise(leaf)`.
  """

  def is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)

  def replace(leaf: Any, other: Any) -> Any:
    # Each half of Muon's state has a MaskedNode, a node without leaves, at the parameters of the
    # other half.
    return leaf if is_masked(leaf) else other

  return optax.tree_map_params(
    tx, replace, opt_state, beside, transform_non_params=otherwise, is_leaf=is_masked
  )


def _decayed(params: Any) -> Any:
  def decays(path: tuple, _: Any) -> bool:
    # Decay pulls to 0, and a norm's scale of 0 would silence its layer.
    return not path[-1].key.endswith(('norm', 'bias'))

  return jax.tree_util.tree_map_with_path(decays, params)


def _muon_or_adam(params: Any) -> Any:
  """Which of the two updates a parameter."""

  def name(path: tuple, leaf: Any) -> str:
    # Embedding and head are matrices too, but Muon is meant for hidden layers (Jordan 2024).
    return 'muon' if _muon_axes_of(path, leaf) else 'adam'

  return jax.tree_util.tree_map_with_path(name, params)


def _muon_axes(params: Any) -> Any:
  # None leaves a parameter to Adam.
  return jax.tree_util.tree_map_with_path(_muon_axes_of, params)


def _muon_axes_of(path: tuple, leaf: Any) -> _MuonAxes | None:
  # The two factors of LoRA, [L, *in, rank] and [L, rank, *out].
  if path[-1].key == 'a':
    return _MuonAxes(tuple(range(1, leaf.ndim - 1)), (leaf.ndim - 1,))
  if path[-1].key == 'b':
    return _MuonAxes((1,), tuple(range(2, leaf.ndim)))
  return _MUON_AXES.get(path[-1].key)
