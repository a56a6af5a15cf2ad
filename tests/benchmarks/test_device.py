"""`benchmarks.device`: what is chosen for a machine, how figures are judged, and every part on a
CPU, where sizes are tiny and nothing is said of speed.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device import kernels, machine, parts, reinforcement, rows, sizes, training, worker
from benchmarks.device.rows import Row
from benchmarks.device.setting import Machine, Setting, make_setting
from dcore_jax.plan import programs, roofline
from dcore_jax.run.config import read_config
from tests.waiting import running, until

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30
# Peaks that make no claim.
CPU = Machine(
  platform='cpu',
  kind='cpu',
  count=1,
  memory=8 * GIB,
  flops=5e10,
  memory_rate=1e10,
  link_rate=0.0,
  source='measured',
)


@pytest.fixture
def setting(tmp_path) -> Setting:
  return make_setting(vars(CPU), '', tmp_path)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'gib,devices,trained,served',
  [
    # A v5e chip, a consumer's GPU, an A100, an H200, eight A100, and a slice of four v5p.
    (16, 1, 'smollm2_135m', 'qwen3_4b'),
    (23.6, 1, 'qwen3_0_6b', 'qwen3_4b'),
    (79, 1, 'qwen3_1_7b', 'qwen3_8b'),
    (141, 1, 'qwen3_4b', 'qwen3_8b'),
    (79, 8, 'qwen3_8b', 'qwen3_8b'),
    (95, 4, 'qwen3_8b', 'qwen3_8b'),
  ],
)
def test_the_largest_models_that_fit_are_chosen(gib, devices, trained, served):
  chosen = sizes.choose('gpu', int(gib * GIB), devices)
  assert (chosen.trained_name, chosen.served_name) == (trained, served)
  assert 8 <= chosen.lanes <= 64 and chosen.lanes % 8 == 0


@given(gib=st.floats(13, 300), devices=st.sampled_from([1, 2, 4, 8, 16]))
def test_more_memory_never_gives_a_smaller_model(gib, devices):
  chosen = sizes.choose('gpu', int(gib * GIB), devices)
  for more in (
    sizes.choose('gpu', int(2 * gib * GIB), devices),
    sizes.choose('gpu', int(gib * GIB), 2 * devices),
  ):
    assert more.trained.param_count >= chosen.trained.param_count
    assert more.served.param_count >= chosen.served.param_count
  # Parameters, moments, gradients: sixteen bytes each, of all devices together.
  assert 16 * chosen.trained.param_count / devices < gib * GIB
  caches = chosen.lanes * 1280 * chosen.served.kv_bytes_per_token('bfloat16')
  assert 2 * chosen.served.param_count + caches < gib * GIB * devices


def test_a_cpu_has_tiny_sizes_and_what_does_not_fit_is_named():
  assert sizes.choose('cpu', 8 * GIB, 1).trained_name == 'tiny'
  assert sizes.choose('gpu', 8 * GIB, 1, 'tiny').trained_name == 'tiny'
  assert sizes.choose('gpu', 79 * GIB, 1, 'qwen3_0_6b').served_name == 'qwen3_0_6b'
  with pytest.raises(ValueError, match='no model fits 4.0 GiB: the smallest, smollm2_135m, takes'):
    sizes.choose('gpu', 4 * GIB, 1)
  with pytest.raises(ValueError, match='--size=gpt: known are qwen3_8b'):
    sizes.choose('gpu', 79 * GIB, 1, 'gpt')


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('name', sizes.NAMES)
def test_every_size_is_a_config(name, devices):
  chosen = sizes.choose('gpu', 190 * GIB, devices, name)
  config = read_config(chosen.config())
  # A row holds a whole group, and every device has rows.
  assert config.rl.capacity == chosen.prompt + chosen.group * chosen.answer
  assert config.rl.capacity <= chosen.trained.max_position_embeddings
  assert config.sft.rows % devices == config.rl.rows % devices == 0
  assert config.rl.prompts % config.rl.rows == 0


# --- rows -----------------------------------------------------------------------------------------


def seconds(value):
  return rows.fact('p', 'c', value, 's')


def rate(value):
  return rows.fact('p', 'c', value, 'tokens/s')


@pytest.mark.parametrize(
  'row,bound,least,share,verdict',
  [
    (seconds(2.0), 1.0, 0.4, 0.5, rows.AGREES),
    (seconds(4.0), 1.0, 0.4, 0.25, rows.DISAGREES),
    # Faster than possible: the plan is wrong.
    (seconds(0.5), 1.0, 0.4, 2.0, rows.DISAGREES),
    (seconds(0.98), 1.0, 0.4, 1 / 0.98, rows.AGREES),
    (rate(50.0), 100.0, 0.4, 0.5, rows.AGREES),
    (rate(30.0), 100.0, 0.4, 0.3, rows.DISAGREES),
    (rate(200.0), 100.0, 0.4, 2.0, rows.DISAGREES),
    # Without a data sheet nothing is said.
    (rate(1.0), 100.0, None, 0.01, rows.FACT),
  ],
)
def test_shares_of_bounds_are_judged(row, bound, least, share, verdict):
  judged = rows.against_bound(row, bound, least)
  assert judged.share == pytest.approx(share) and judged.verdict == verdict
  assert bool(judged.note) == (verdict == rows.DISAGREES)


def test_errors_memory_and_claims_are_judged():
  assert rows.within(rate(0.5), 1.0).verdict == rows.AGREES
  assert rows.within(rate(1.5), 1.0).verdict == rows.DISAGREES
  assert rows.within(rate(float('nan')), 1.0).verdict == rows.DISAGREES
  assert rows.against_memory(rate(10.0), 10.0).verdict == rows.AGREES
  assert rows.against_memory(rate(11.0), 10.0).verdict == rows.DISAGREES
  assert rows.claim('p', 'c', True, 'why').note == ''
  assert rows.claim('p', 'c', False, 'why').note == 'why'


@given(
  value=st.none() | st.floats(allow_nan=False, allow_infinity=False, width=16),
  note=st.text(),
  more=st.dictionaries(st.sampled_from(['mfu', 'losses']), st.integers()),
)
def test_a_line_of_json_gives_the_row_back(value, note, more):
  row = Row('sft', 'a step', value, 's', verdict=rows.AGREES, note=note, more=more)
  back = Row.from_json(json.loads(json.dumps(row.to_json(), allow_nan=False)))
  if value is not None:
    assert back.value == pytest.approx(value, rel=1e-3)
  assert dataclasses.replace(back, value=value) == row


def test_what_is_no_number_is_told_in_json():
  line = json.dumps(rate(float('nan')).to_json(), allow_nan=False)
  assert json.loads(line)['value'] == 'nan'


def test_the_table_says_what_disagrees():
  found = [
    rows.against_bound(seconds(4.0), 1.0, 0.4),
    rows.skipped('offload', 'a step', 'no such memory'),
    rows.failed('grpo', 'error', 'ValueError: no'),
    rows.fact('sft', 'compiling', 12.5, 's'),
    rows.within(rate(0.5), 1.0),
  ]
  text = rows.table(found)
  assert '3 of 5 figures were judged, 2 disagree or failed' in text
  assert 'p, c: DISAGREES: 25% of what is possible, where at least 40% was expected' in text
  assert 'grpo, error: FAILED: ValueError: no' in text
  assert 'skipped: no such memory' in text and '12.5' in text
  assert rows.wrong(found) == [found[0], found[2]]
  assert rows.table([]).endswith('0 of 0 figures were judged, 0 disagree or failed')


# --- the program ----------------------------------------------------------------------------------

TOLD = {'machine': vars(CPU), 'size': ''}


def test_a_run_goes_on_where_it_ended(tmp_path):
  path = tmp_path / 'day' / 'rows.jsonl'
  log = parts.open_log(path, TOLD)
  assert parts.wanted([], log) == list(worker.PARTS)
  log.write(seconds(2.0).to_json() | {'part': 'sft'})
  log.write({'part': 'sft', 'seconds': 3.0})
  log.write(rows.failed('grpo', 'error', 'no').to_json())
  log.write({'part': 'grpo', 'seconds': 1.0})
  log.write(seconds(2.0).to_json() | {'part': 'engine'})
  with path.open('a') as file:
    file.write('{"part": "eng')  # killed here
  log = parts.open_log(path, TOLD)
  assert [row.part for row in log.rows] == ['sft', 'grpo']
  missing = [name for name in worker.PARTS if name != 'sft']
  assert parts.wanted([], log) == missing
  assert parts.wanted(['sft', 'machine'], log) == ['machine', 'sft']
  # What is measured again takes the place of what was there.
  log.write(seconds(1.0).to_json() | {'part': 'sft'})
  log.write({'part': 'sft', 'seconds': 3.0})
  [row] = parts.open_log(path, TOLD).ended['sft']
  assert row.value == 1.0


def test_rows_of_another_machine_are_not_mixed(tmp_path):
  path = tmp_path / 'rows.jsonl'
  parts.open_log(path, TOLD)
  # Peaks that are measured differ each time.
  parts.open_log(path, {'machine': vars(CPU) | {'flops': 6e10}, 'size': ''})
  other = {'machine': vars(CPU) | {'kind': 'NVIDIA H200'}, 'size': ''}
  with pytest.raises(ValueError, match="is of 1 x cpu, --size='', not of 1 x NVIDIA H200"):
    parts.open_log(path, other)
  with pytest.raises(ValueError, match="not of 1 x cpu, --size='qwen3_4b'"):
    parts.open_log(path, TOLD | {'size': 'qwen3_4b'})
  path.write_text('no JSON\n')
  with pytest.raises(ValueError, match='line 1 cannot be read'):
    parts.open_log(path, TOLD)
  with pytest.raises(ValueError, match=r"unknown parts \['sfd'\]"):
    parts.wanted(['sfd'], parts.Log(path, {}, {}))


def test_the_parts_share_the_minutes():
  chosen = list(worker.PARTS)
  limits = [parts.limit_of(name, 20.0, chosen) for name in chosen]
  assert sum(limits) == pytest.approx(20 * 60)
  alone = parts.limit_of('sft', 20.0, ['sft'])
  assert alone == 2 * parts.limit_of('sft', 20.0, chosen)


@pytest.mark.parametrize(
  'name,limit,case,note',
  [
    # Long enough for a loaded machine to start it.
    ('hangs', 12, 'time', 'stopped after 12 s'),
    ('crashes', 60, 'process', 'ended by SIGSEGV'),
    ('exits', 60, 'process', 'ended with status 3'),
  ],
)
def test_a_part_that_goes_wrong_is_a_row(name, limit, case, note, monkeypatch):
  monkeypatch.setattr(parts, '_WORKER', 'tests.benchmarks.fake_worker')
  first, *rest, last = parts.run_part(name, TOLD, limit)
  assert first == Row(name, 'first', 2.0, 's', more={'count': 1})
  assert (last.case, last.verdict) == (case, rows.FAILED) and note in last.note
  for row in rest:
    # What it had started ends, too.
    until(lambda pid=int(row.value): not running(pid))


def test_each_part_has_an_empty_folder(monkeypatch):
  monkeypatch.setattr(parts, '_WORKER', 'tests.benchmarks.fake_worker')
  _, last = parts.run_part('sees', TOLD, 60)
  assert last.value == 0 and not pathlib.Path(last.case).exists()


def test_an_error_of_a_part_is_its_last_row(setting, monkeypatch):
  def broken(setting):
    yield rows.fact('sft', 'one', 1.0, 's')
    raise RuntimeError('RESOURCE_EXHAUSTED: too much\nand more')

  monkeypatch.setattr(training, 'sft', broken)
  first, last = worker.measured('sft', setting)
  assert first.value == 1.0 and last.verdict == rows.FAILED
  assert last.note == (
    'RuntimeError: RESOURCE_EXHAUSTED: too much; --size=NAME takes a smaller model'
  )


# --- parts ----------------------------------------------------------------------------------------


def check(found):
  """All rows of a part: nothing failed or disagrees, and numbers are numbers."""
  found = list(found)
  assert found and not rows.wrong(found), rows.table(found)
  for row in found:
    assert row.value is None or np.isfinite(row.value), row
    json.dumps(row.to_json(), allow_nan=False)
  return {row.case: row for row in found}


def test_the_machine_of_this_process(monkeypatch):
  monkeypatch.setitem(machine._SIZES, 'cpu', (64, 2**16))
  found = machine.examine()
  assert (found.platform, found.count, found.source) == ('cpu', jax.device_count(), 'measured')
  assert found.flops > 0 and found.memory_rate > 0 and not found.published


def test_a_known_device_has_the_peaks_of_its_data_sheet(monkeypatch):
  @dataclasses.dataclass
  class Gpu:
    platform: str = 'gpu'
    device_kind: str = 'NVIDIA H200'

  monkeypatch.setattr(jax, 'devices', lambda: [Gpu()] * 8)
  monkeypatch.setattr(machine.sharding, 'platform', lambda: 'gpu')
  found = machine.examine()
  assert (found.source, found.count) == ('h200', 8) and found.published
  assert found.accelerator == roofline.ACCELERATORS['h200']
  assert 140 < found.memory / GIB < 142
  setting = make_setting(vars(found), '', ROOT)
  assert setting.dtype == 'bfloat16' and setting.least('sft') == rows.LEAST_SHARES['sft']


def test_kernels_agree_with_plain_forms(setting):
  found = check(kernels.measure(setting))
  judged = [case for case, row in found.items() if row.verdict == rows.AGREES]
  for name in ('tree attention', 'page attention', 'fused head'):
    assert any(case.startswith(name) for case in judged)


def test_a_wrong_kernel_disagrees(setting, monkeypatch):
  attend = kernels.tree_attention.attend
  # Traced anew, with what stands in for the kernel.
  monkeypatch.setattr(kernels, '_gradients', kernels._gradients.__wrapped__)
  monkeypatch.setattr(
    kernels.tree_attention,
    'attend',
    # What a kernel that misses a block would do to a few numbers.
    lambda q, k, v, end, name: attend(q, k, v, end, name) * (1 + 1e-3 * (name == 'auto')),
  )
  found = {row.case: row.verdict for row in kernels._tree_errors(setting, 'float32')}
  assert found['tree attention (blockwise), float32, out'] == rows.DISAGREES


def test_forests_are_trees():
  [end] = kernels.forest(16, 4, 3)
  assert end.tolist() == [16] * 4 + [8] * 4 + [12] * 4 + [16] * 4


def test_the_sft_step_is_that_of_the_plan(setting):
  found = check(training.sft(setting))
  [losses] = [row.more['losses'] for row in found.values() if 'losses' in row.more]
  # Random weights know nothing of random targets, which have one chance in V each.
  assert losses[0] == pytest.approx(np.log(setting.sizes.trained.vocab_size), abs=0.2)
  [step] = [row for case, row in found.items() if 'step of 256 tokens' in case]
  assert step.more['mfu'] == pytest.approx(step.more['highest_mfu'] * step.share)


def test_offloading_is_skipped_on_a_cpu(setting):
  [row] = training.offload(setting)
  assert row.verdict == rows.SKIPPED


def test_no_program_of_a_step_is_left_out_of_its_bound(setting):
  config = read_config(setting.sizes.config())
  run = reinforcement.RunShapes(config, setting.sizes.trained, jax.devices()[:1])
  peaks = roofline.ACCELERATORS['h100']
  least = reinforcement.bounds(run, peaks)
  whole = 0.0
  for program in programs.of_run(run):
    if program.per == 'DA-GRPO step':
      whole += program.calls * roofline.bound(program.work, peaks).seconds
  assert least['whole'] == pytest.approx(whole)


# The engine's programs take some 20 s of a core to compile.
@pytest.mark.slow
@pytest.mark.parametrize('part', ['engine', 'grpo', 'bf16'])
def test_parts_run_on_a_cpu(part, setting):
  found = check(worker.measured(part, setting))
  if part == 'engine':
    [decode] = [row for case, row in found.items() if 'decode of 8 lanes' in case]
    # Every lane draws each of its tokens in a pass of its own.
    assert decode.more['passes'] <= setting.sizes.answer
  if part == 'bf16':
    gaps = {row.case: row.value for row in found.values()}
    assert gaps['engine and trainer, both float32, mean gap'] < 1e-4
    assert gaps['engine in bfloat16, trainer in float32, mean gap'] > 1e-4


@pytest.mark.slow
def test_the_whole_program_on_a_cpu(tmp_path):
  """All parts as processes, twice: the second time nothing is left to be measured."""
  command = [sys.executable, '-m', 'benchmarks.device', f'--workdir={tmp_path}', '--minutes=60']
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert list(dict.fromkeys(line['part'] for line in lines)) == list(worker.PARTS)
  assert '0 disagree or failed' in done.stderr
  assert (tmp_path / 'table.txt').read_text().strip() in done.stderr
  again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert again.returncode == 0 and not again.stdout
  assert (tmp_path / 'table.txt').read_text().strip() in again.stderr


def test_mistakes_are_one_line(tmp_path):
  command = [sys.executable, '-m', 'benchmarks.device', f'--workdir={tmp_path}', '--parts=sfd']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert done.stderr.strip().startswith("error: unknown parts ['sfd']")
