"""How large an engine is."""

import dataclasses

from dcore_jax.models.config import DecoderConfig

CACHE_DTYPES = ('', 'int8')


@dataclasses.dataclass(frozen=True)
class EngineSizes:
  """How much an engine holds, and how much it does in one call.

  Attributes:
    lanes: rollouts in flight at once.
    max_len: tokens of a prompt and its completion together.
    max_new: tokens that a rollout can sample; 0: as many as `max_len` has room for.
    trunks: ended texts that are kept for prompts that begin as they do, and room for as many
      prompts beside what is sampled; 0: one for each lane. Fewer save memory where rollouts come in
      groups that share a prompt.
    steps_per_call: passes between two looks of the caller. A step ends early when a rollout does.
    guesses: tokens that are guessed ahead at once at most; 0: none.
    cache_dtype: of keys and values: 'int8', with a scale for each slot and key head, or '', as the
      parameters. int8 halves what a bfloat16 cache takes and what is read of it, and rounds each
      number by at most 0.4 % of the largest of its head.
  """

  lanes: int = 64
  max_len: int = 1024
  max_new: int = 0
  trunks: int = 0
  steps_per_call: int = 16
  guesses: int = 15
  cache_dtype: str = ''

  def resolved(self, config: DecoderConfig) -> 'EngineSizes':
    """Returns the sizes with every 0 replaced by the number that it stands for.

    This is the only place that derives them: the engine and the plan of a run both ask here.

    Args:
      config: the model's configuration.

    Raises:
      ValueError: a size below 1, `max_len` below 2 or beyond the model's positions, or an unknown
        `cache_dtype`.
    """
    # 0 stands for a default here because it does so in a run's config.
    max_new = self.max_new or self.max_len
    trunks = self.trunks or self.lanes
    smallest = min(self.lanes, self.steps_per_call, max_new, trunks)
    # One token of prompt and one to sample are the least.
    if smallest < 1 or not 2 <= self.max_len <= config.max_position_embeddings:
      raise ValueError(
        f'lanes={self.lanes}, steps_per_call={self.steps_per_call}, max_new={max_new}, '
        f'trunks={trunks} must be at least 1 and max_len={self.max_len} in '
        f'2..{config.max_position_embeddings}, the positions of the model'
      )
    if self.cache_dtype not in CACHE_DTYPES:
      raise ValueError(f'cache_dtype={self.cache_dtype!r} is not one of {CACHE_DTYPES}')
    if self.guesses < 0:
      raise ValueError(f'guesses={self.guesses} must be at least 0')
    return dataclasses.replace(self, max_new=min(max_new, self.max_len), trunks=trunks)

  def pages(self, slots: int) -> int:
    """Returns the pages of `slots` positions that the cache has; all sizes must be resolved.

    They hold `trunks` prompts of the greatest length, and what every lane samples, which begins and
    ends within pages.
    """
    prompts = self.trunks * -(-self.max_len // slots)
    return prompts + self.lanes * (-(-self.max_new // slots) + 1)
