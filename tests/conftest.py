"""What every test runs under: the CPU backend, silent broadcasting as an error, and third-party
data where there is any.
"""

import os
import pathlib

# Before the first import of jax. Set it yourself to run the tests on another backend.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Most of a test's time is compiling; what one process has compiled serves the others and the next
# run (the engine's tests: 192 s of CPU time, 35 the second time; those of resuming: 112 s without,
# 76 from an empty cache). The bound also makes jax lock it.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(REPOSITORY / '.pytest_cache' / 'compiled'))
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(2 << 30))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

# jax reads these variables when it is imported.
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from dcore_jax.models.config import DecoderConfig  # noqa: E402
from dcore_jax.organism.tokenizer import build_tokenizer  # noqa: E402
from dcore_jax.organism.vocabulary import sample_texts  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# The same examples in every run, however slow the machine is: a test that fails here fails
# everywhere.
hypothesis.settings.register_profile(
  'deterministic',
  derandomize=True,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('deterministic')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The sweep behind the notebooks, minutes in one process, goes first: the other processes work on
  the rest meanwhile.
  """
  items.sort(key=lambda item: item.path.name != 'test_notebooks.py')


@pytest.fixture(scope='session')
def data_dir() -> pathlib.Path:
  """The folder of third-party data (`DCORE_DATA`, default ../shared/data); tests that need it skip
  where it is absent.
  """
  folder = pathlib.Path(os.environ.get('DCORE_DATA', REPOSITORY.parent / 'shared' / 'data'))
  if not folder.is_dir():
    pytest.skip(f'no third-party data at {folder} (set DCORE_DATA)')
  return folder


@pytest.fixture(scope='session')
def tokenizer():
  """Reads ToolWorld's words."""
  return build_tokenizer(sample_texts(), 640)


@pytest.fixture(scope='session')
def model(tokenizer):
  """The configuration of a decoder of a few thousand parameters that reads `tokenizer`'s tokens."""
  return DecoderConfig.from_hf(
    dict(
      model_type='qwen3',
      vocab_size=640,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=2,
      num_key_value_heads=1,
      head_dim=16,
      rope_theta=1e4,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      max_position_embeddings=256,
      eos_token_id=tokenizer.eos_token_id,
    )
  )
