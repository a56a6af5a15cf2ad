"""LoRA (Hu et al. 2021): low-rank adapters are trained beside a base that stays as it is.

Adapters are a tree {matrix: {'a': [L, *in, rank], 'b': [L, rank, *out]}} of float32 arrays, and
`config.lora` says of which matrices. A training step differentiates with respect to them alone:
the base has no gradient, no moments, and may be in 16 bits. `attach` puts both together as the tree
of parameters that the decoder reads (`models.projections.Adapted`). Shape letters: config.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dcore_jax import sharding
from dcore_jax.config import LoraSection
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.projections import INPUTS, Adapted, adapter_specs, is_adapted, merged

Params = decoder.Params
Adapters = dict[str, dict[str, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
  """What the adapters of a run stand beside.

  Attributes:
    base: the tree of parameters, which no step changes.
    scale: of the adapters' products, alpha / rank; compiled in.
  """

  base: Params
  scale: float = dataclasses.field(metadata={'static': True})


def check_section(section: LoraSection) -> None:
  """Checks what section `lora` says by itself.

  Raises:
    ValueError: a target that is no matrix of a layer, or no target.
  """
  unknown = sorted(set(section.targets) - INPUTS.keys())
  if unknown or not section.targets:
    raise ValueError(f'lora.targets = {tuple(section.targets)!r}; expected some of {tuple(INPUTS)}')


def scale(section: LoraSection) -> float:
  """Returns the factor of the adapters' products, alpha / rank."""
  return section.alpha / section.rank


def abstract_adapters(config: DecoderConfig, section: LoraSection) -> Adapters:
  """Describes the adapters by specs, as `decoder.abstract_params` describes the parameters.

  Raises:
    ValueError: see `check_section`.
  """
  check_section(section)
  specs = decoder.abstract_params(config)['layers']
  adapters = {}
  for name, inputs in INPUTS.items():
    if name in section.targets:
      a, b = adapter_specs(specs[name], inputs, section.rank)
      adapters[name] = {'a': a, 'b': b}
  return adapters


def init_adapters(config: DecoderConfig, section: LoraSection, seed: int) -> Adapters:
  """Draws the adapters on the mesh in context: with them the model computes what the base does."""
  specs = abstract_adapters(config, section)
  mesh = jax.sharding.get_mesh()
  placed = None if mesh.empty else sharding.shardings(specs, mesh)
  make = jax.jit(functools.partial(decoder.draw, specs), out_shardings=placed)
  drawn = make(jax.random.key(seed))
  # Tied to their devices as what a step returns is, or the step would be compiled twice.
  return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), drawn)


def split(
  params: Params, config: DecoderConfig, section: LoraSection, seed: int
) -> tuple[Any, Frozen | None]:
  """Returns (what a stage trains, what stays as it is): new adapters and `params` as their base.

  Without a rank they are `params` and None.
  """
  if not section.rank:
    return params, None
  return init_adapters(config, section, seed), Frozen(params, scale(section))


def attach(frozen: Frozen | None, trained: Any) -> Params:
  """Returns the parameters that the decoder reads, of a base and the adapters beside it.

  Without a base `trained` is the whole tree of parameters already.
  """
  if frozen is None:
    return trained
  layers = dict(frozen.base['layers'])
  for name, factors in trained.items():
    layers[name] = Adapted(layers[name], factors['a'], factors['b'], frozen.scale)
  return {**frozen.base, 'layers': layers}


def merge(params: Params, dtype: Any = None) -> Params:
  """Returns plain parameters: weight + scale a b in place of each adapted matrix.

  Sums are formed in float32. The arrays are rounded to `dtype`; by default each keeps its own, and
  those that are not adapted are shared.
  """

  def plain(leaf: Any) -> jax.Array:
    """One parameter without adapters."""
    if is_adapted(leaf):
      return merge_stack(leaf, dtype)
    return leaf if dtype is None else leaf.astype(dtype)

  return jax.tree.map(plain, params, is_leaf=is_adapted)


@functools.partial(jax.jit, static_argnums=1)
def merge_stack(adapted: Adapted, dtype: Any = None) -> jax.Array:
  """Returns an adapted stack of layers [L, *in, *out] as one array, of the weight's dtype."""
  # Layer by layer: the float32 sums of a whole stack of Qwen3-8B would take 7.2 GB.
  return jax.lax.map(lambda layer: merged(layer, dtype), adapted)


def joined(first: Adapters, second: Adapters) -> Adapters:
  """Returns adapters whose products are the sums of those of two trees with one scale.

  Ranks add up: [a1 a2] [b1; b2] = a1 b1 + a2 b2.
  """

  def side_by_side(name: str) -> dict[str, jax.Array]:
    """The factors of one matrix."""
    one = first[name]
    other = second[name]
    return {
      'a': jnp.concatenate([one['a'], other['a']], axis=-1),
      'b': jnp.concatenate([one['b'], other['b']], axis=1),
    }

  return {name: side_by_side(name) for name in first}
