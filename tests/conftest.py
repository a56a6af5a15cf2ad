"""What every test runs under: the CPU backend, silent broadcasting as an error, and third-party
data where there is any.
"""

import gc
import os
import pathlib
import shutil

# Before the first import of jax. Set it yourself to run the tests on another backend.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Most of a test's time is compiling; what one process has compiled serves the others and the next
# run (the engine's tests: 192 s of CPU time, 35 the second time; those of resuming: 112 s without,
# 76 from an empty cache). The cache has no bound: with one, jax reads a file of every entry before
# it writes a new one, and the other processes wait meanwhile.
COMPILED = REPOSITORY / '.pytest_cache' / 'compiled'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(COMPILED))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

# jax reads these variables when it is imported.
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from dcore_jax.models.config import DecoderConfig  # noqa: E402
from dcore_jax.organism.tokenizer import build_tokenizer  # noqa: E402
from dcore_jax.organism.vocabulary import sample_texts  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# A test runs what it compiles a few times: a quarter of the time of the tests of the engine and of
# losses is saved without LLVM's optimisations (122 s of CPU time, 90 without). Programs that tests
# start are compiled as users have them, and so is all of `make test-all`.
if 'JAX_DISABLE_MOST_OPTIMIZATIONS' not in os.environ:
  jax.config.update('jax_disable_most_optimizations', True)
# The same examples in every run, however slow the machine is: a test that fails here fails
# everywhere.
hypothesis.settings.register_profile(
  'deterministic',
  derandomize=True,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('deterministic')


_MOST_BYTES = 2 << 30


def pytest_sessionstart(session: pytest.Session) -> None:
  """Empties the cache of programs where earlier runs have filled it."""
  # Once, before the processes of xdist are started.
  if hasattr(session.config, 'workerinput') or not COMPILED.is_dir():
    return
  if sum(path.stat().st_size for path in COMPILED.iterdir()) > _MOST_BYTES:
    shutil.rmtree(COMPILED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The sweep behind the notebooks, minutes in one process, goes first: the other processes work on
  the rest meanwhile.
  """
  items.sort(key=lambda item: item.path.name != 'test_notebooks.py')


# Linux gives a process 65,530 mappings unless told otherwise. A program that a test compiles takes
# 100 to 900 of them, and behind the last one the compiler crashes.
_MOST_MAPPINGS = 20_000


def _mappings() -> int:
  listing = pathlib.Path('/proc/self/maps')
  return listing.read_bytes().count(b'\n') if listing.exists() else 0


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  """Lets compiled programs go behind a file of tests, where the process holds many."""
  yield
  if _mappings() > _MOST_MAPPINGS:
    jax.clear_caches()
    gc.collect()


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
