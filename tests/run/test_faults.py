"""What a person sees when the machine fails: one line that names the file or the setting.

Each program runs in a process of its own, on a file system of a few kilobytes where the system
lets one be mounted, and elsewhere under a limit on the size of files, which fails in the same
places.
"""

import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import pytest

from dcore_jax.files import write_json_atomic
from dcore_jax.rollout.backends import Reply
from dcore_jax.rollout.reply_journal import ReplyJournal
from dcore_jax.run import memory
from dcore_jax.train.metrics import Metrics, read_metrics

ROOT = pathlib.Path(__file__).parents[2]
HEAD = """
import pathlib, sys
import numpy as np
from dcore_jax.run import program
folder = pathlib.Path(sys.argv[1])
def main():
"""
WRITERS = {
  'json': """
  from dcore_jax.files import write_json_atomic
  write_json_atomic(folder / 'out.json', {'a': 'x' * 10**6})
""",
  'metrics': """
  from dcore_jax.train.metrics import Metrics
  with Metrics(folder) as metrics:
    for step in range(10**5):
      metrics.write('out', step, loss=0.5)
""",
  'replies': """
  from dcore_jax.rollout.backends import Reply
  from dcore_jax.rollout.reply_journal import ReplyJournal
  journal = ReplyJournal(folder / 'out.jsonl')
  for number in range(10**5):
    journal.append({'n': number}, Reply('x' * 1000, True, 1, 1))
""",
  'rollouts': """
  from dcore_jax.train.journal import JournaledWave
  from dcore_jax.rollout.requests import Completion
  long = np.arange(10**5, dtype=np.float32)
  made = Completion(long, long, long, long, True, None, 3)
  JournaledWave(folder / 'out.npz', 1).write({(0, 0): made})
""",
  'weights': """
  from dcore_jax.models.tensor_files import FileWriter
  writer = FileWriter(folder / 'out.safetensors', {'a': (10**3, 10**3)}, np.float32)
  writer.write('a', np.ones((10**3, 10**3), np.float32))
""",
  'checkpoint': """
  from dcore_jax.train.checkpoint import Checkpoints
  numbers = np.random.default_rng(0)
  with Checkpoints(folder / 'out') as saved:
    saved.save(1, {'a': numbers.random(10)}, {})
    saved.save(2, {'a': numbers.random(10**6)}, {})
""",
}
LIMIT = 400_000  # bytes


@pytest.fixture(scope='module')
def small_disk(tmp_path_factory):
  """(folder, what a process does before it begins) so that it can write some 400 kB."""
  folder = tmp_path_factory.mktemp('small')
  mounted = False
  if shutil.which('mount') and os.geteuid() == 0:
    command = ['mount', '-t', 'tmpfs', '-o', f'size={LIMIT}', 'tmpfs', str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
  if mounted:
    yield folder, None
    subprocess.run(['umount', str(folder)], check=True)
  else:
    yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def program(body, *arguments, before=None, **environment):
  text = HEAD + body + '\nsys.argv[1:] = []\nprogram.run(main)\n'
  return subprocess.run(
    [sys.executable, '-c', text, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
    preexec_fn=before,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


@pytest.mark.parametrize('kind', WRITERS)
def test_a_full_disk_is_one_line_with_the_file_and_nothing_half_written(kind, small_disk):
  folder, before = small_disk
  done = program(WRITERS[kind], folder, before=before)
  said = done.stderr.strip().splitlines()
  assert done.returncode == 1 and len(said) == 1, done.stderr[-3000:]
  assert said[0].startswith('error: [Errno ')
  assert 'No space left' in said[0] or 'File too large' in said[0]
  # Of the two files of metrics, either may meet the full disk first.
  expected = ('metrics.jsonl', 'tensorboard') if kind == 'metrics' else ('out',)
  assert any(f'{folder}/{name}' in said[0] for name in expected)
  if kind in ('json', 'rollouts'):
    assert not list(folder.iterdir())
  elif kind == 'checkpoint':
    # The older step is whole; what is left of the newer one has a name that nothing reads.
    assert [path.name for path in (folder / 'out').iterdir() if path.name.isdigit()] == ['1']
  elif kind == 'metrics':
    # A line that was cut short is no row.
    assert [row['step'] for row in read_metrics(folder)][:3] == [0, 1, 2]
  elif kind == 'replies':
    kept = (folder / 'out.jsonl').read_bytes().count(b'\n')
    # Room again: what was answered is known, and the journal goes on behind its last whole line.
    moved = folder.parent / 'out.jsonl'
    shutil.copy(folder / 'out.jsonl', moved)
    journal = ReplyJournal(moved)
    assert journal.find({'n': kept - 1}) and not journal.find({'n': kept})
    journal.append({'n': kept}, Reply('y', True, 1, 1))
    assert ReplyJournal(moved).find({'n': kept}).text == 'y'
  for path in list(folder.iterdir()):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


READ_ONLY = """
  import os
  from dcore_jax.claims import claim, hold
  if os.geteuid() == 0:  # root may write anywhere
    os.setgid(65534)
    os.setuid(65534)
  with hold(folder):
    claim(folder / 'config.json', {'a': 1}, 'differs')
"""


def test_a_work_directory_that_cannot_be_written_is_one_line(tmp_path):
  """As a user without rights."""
  folder = tmp_path / 'w'
  folder.mkdir()
  folder.chmod(0o555)
  if os.geteuid() == 0:
    # What leads to it belongs to pytest's user alone.
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
      parent.chmod(0o755)
  done = program(READ_ONLY, folder)
  assert done.returncode == 1, done.stderr
  [said] = done.stderr.strip().splitlines()
  assert 'Permission denied' in said and str(folder) in said
  assert not list(folder.iterdir())


def test_a_full_folder_for_temporary_files_is_one_line(small_disk):
  """A checker of a benchmark cannot start; what a run writes does not go through it."""
  folder, before = small_disk
  if before is not None:
    pytest.skip('needs a file system of its own, which only root may mount')
  (folder / 'filled').write_bytes(b'x' * (LIMIT - 4096 * (LIMIT % 4096 > 0)))
  body = """
  import os, tempfile
  from dcore_jax.files import write_json_atomic
  write_json_atomic(folder / 'out.json', {'a': 1})
  with tempfile.TemporaryDirectory() as made:
    write_json_atomic(pathlib.Path(made) / 'out.json', {'a': 'x' * 10**6})
"""
  elsewhere = folder.parent / 'elsewhere'
  done = program(body, elsewhere, TMPDIR=str(folder))
  (folder / 'filled').unlink()
  [said] = done.stderr.strip().splitlines()
  assert done.returncode == 1 and 'No space left' in said and str(folder) in said
  assert (elsewhere / 'out.json').exists()


@pytest.mark.parametrize(
  ('stage', 'names'),
  [
    ('sft', ('sft.accumulate', 'sft.rows', 'sft.capacity', 'execution.remat')),
    ('rl', ('rl.rows', 'rl.capacity', 'engine.lanes', 'mesh.fsdp')),
    ('evaluate_base', ('engine.lanes', 'engine.max_len')),
    ('distill', ('engine.lanes', 'engine.max_len')),
  ],
)
def test_out_of_memory_names_the_settings_of_the_stage(stage, names):
  text = 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore\nand more'
  with pytest.raises(ValueError, match=f'stage {stage}: out of memory') as found:
    with memory.explained(stage):
      raise jax.errors.JaxRuntimeError(text)
  said = str(found.value)
  assert 'allocate 9 bytes' in said and '\n' not in said
  assert all(name in said for name in names)
  with pytest.raises(ValueError, match='MemoryError'), memory.explained(stage):
    raise MemoryError
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), memory.explained(stage):
    raise jax.errors.JaxRuntimeError('INTERNAL: a fault of the program')


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
  """Rows, their order and what is read back of them do not depend on the time of day."""
  now = iter(range(2 * 10**9, 10**9, -(10**6)))
  monkeypatch.setattr('time.time', lambda: float(next(now)))
  with Metrics(tmp_path) as metrics:
    for step in range(20):
      metrics.write('sft', step, loss=float(step))
    assert len(metrics.rewind('sft', 10)) == 10
    metrics.write('sft', 10, loss=0.0)
  assert [row['step'] for row in read_metrics(tmp_path)] == list(range(11))
  # Files are told apart by their content and names, and not by when they were written.
  write_json_atomic(tmp_path / 'a.json', {'a': 1})
  os.utime(tmp_path / 'a.json', (0, 0))
  write_json_atomic(tmp_path / 'a.json', {'a': 2})
  assert '2' in (tmp_path / 'a.json').read_text()


def test_no_library_code_measures_time_by_a_clock_that_can_jump():
  """`time.time` may go backwards; spans and deadlines are of the monotonic clock.

  Three uses are no spans that anything depends on: the date in the server's answers, the one that
  TensorBoard shows, and the seconds that BFCL's own format asks for.
  """
  found = []
  for path in sorted((ROOT / 'dcore_jax').rglob('*.py')):
    if 'time.time()' in path.read_text(encoding='utf-8'):
      found.append(path.name)
  assert found == ['runner.py', 'openai_api.py', 'metrics.py']


def test_damaged_rows_and_journals_are_named(tmp_path):
  """A flipped bit in a journal of replies or in metrics shows where it breaks the text."""
  journal = ReplyJournal(tmp_path / 'replies.jsonl')
  for number in range(3):
    journal.append({'n': number}, Reply('text', True, 1, 1))
  content = bytearray((tmp_path / 'replies.jsonl').read_bytes())
  content[content.index(b'\n') + 1] ^= 4  # the second line's opening brace
  (tmp_path / 'replies.jsonl').write_bytes(content)
  with pytest.raises(ValueError, match=r'replies.jsonl, line 2 is no reply'):
    ReplyJournal(tmp_path / 'replies.jsonl')
  with Metrics(tmp_path) as metrics:
    for step in range(3):
      metrics.write('sft', step, loss=1.0)
  content = bytearray((tmp_path / 'metrics.jsonl').read_bytes())
  content[content.index(b'\n') + 1] ^= 4
  (tmp_path / 'metrics.jsonl').write_bytes(content)
  with pytest.raises(ValueError, match=r'metrics.jsonl, line 2 is not JSON'):
    read_metrics(tmp_path)
