"""GGUF files of every architecture become directories that compute what transformers computes."""

import json
import pathlib
import subprocess
import sys

import gguf
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from gguf.quants import dequantize
from gguf_files import (
  file_name,
  model_fields,
  model_tensors,
  quantised,
  rope_factors,
  tokenizer_fields,
  write,
)
from safetensors.numpy import load_file
from torch_reference import make_model

from dcore_jax.config import ModelSection
from dcore_jax.models import decoder, hf_checkpoint, rotary
from dcore_jax.models.gguf import import_gguf, llama3_scaling
from dcore_jax.models.gguf_file import GgufFile
from dcore_jax.rollout.policy import load_policy

torch = pytest.importorskip('torch', reason='torch is not installed: no reference to compare with')
transformers = pytest.importorskip('transformers')

_ROWS = 288
_SIZES = {'vocab_size': _ROWS, 'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 2}
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
_LINEAR = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 100000.0}
MODELS = {
  'llama': {'model_type': 'llama'},
  'llama_tied': {'model_type': 'llama', 'tie_word_embeddings': True, 'num_key_value_heads': 1},
  'llama3_1': {'model_type': 'llama', 'rope_parameters': _LLAMA3},
  'deepseek_coder': {'model_type': 'llama', 'rope_parameters': _LINEAR, 'num_key_value_heads': 4},
  'qwen2': {'model_type': 'qwen2', 'rms_norm_eps': 1e-5},
  'qwen2_tied': {'model_type': 'qwen2', 'tie_word_embeddings': True},
  'qwen3': {'model_type': 'qwen3', 'head_dim': 32},
  # The size of all published models, and the one that transformers' own reading of such files has.
  'qwen3_heads_of_128': {'model_type': 'qwen3', 'head_dim': 128},
  'qwen3_tied': {'model_type': 'qwen3', 'head_dim': 8, 'tie_word_embeddings': True},
}
_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def tiny_tokenizer():
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=280,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(['the cat sat on the mat and the rat ran'] * 3, trainer)
  backend.add_tokens([tokenizers.AddedToken('<think>', normalized=False)])
  return backend


def fields_of(model):
  return {
    'general.architecture': model.config.model_type,
    **model_fields(model.config),
    **tokenizer_fields(tiny_tokenizer(), 'gpt-2', _ROWS),
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.padding_token_id': 0,
    'tokenizer.chat_template': _TEMPLATE,
  }


def save(path, name, kind='F32'):
  """Writes a model; returns it with its weights as they are rounded in the file."""
  model = make_model(**_SIZES, **MODELS[name])
  write(path, fields_of(model), model_tensors(model, kind))
  with torch.no_grad():
    for parameter in model.parameters():
      stored, chosen = quantised(parameter.float().numpy(), kind)
      parameter.copy_(torch.tensor(dequantize(stored, chosen)))
  return model


def our_logits(folder, tokens):
  config, params = hf_checkpoint.load_params(folder)
  row = jnp.asarray(tokens)[None]
  position = jnp.arange(len(tokens))[None]
  hidden = decoder.hidden_states(
    params,
    config,
    row,
    position,
    jnp.full_like(position, len(tokens)),
    decoder.Execution(unroll=False),
  )
  return np.asarray(jnp.einsum('btd,vd->btv', hidden, decoder.head_matrix(params))[0])


def torch_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens))[None]).logits[0].float().numpy()


@pytest.mark.parametrize('name', MODELS)
def test_logits_equal_those_of_a_model_with_these_weights(tmp_path, name):
  model = save(tmp_path / 'model.gguf', name)
  config = import_gguf(tmp_path / 'model.gguf', tmp_path / 'out')
  assert config == hf_checkpoint.load_config(tmp_path / 'out')
  assert config.rms_norm_eps == model.config.rms_norm_eps
  assert config.rope_theta == model.config.rope_parameters['rope_theta']
  assert config.tie_word_embeddings == model.config.tie_word_embeddings
  # Far enough for the scaled frequencies to tell.
  tokens = np.random.default_rng(0).integers(0, _ROWS, 200)
  want = torch_logits(model, tokens)
  got = our_logits(tmp_path / 'out', tokens)
  np.testing.assert_allclose(got, want, atol=1e-3)
  np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
  again, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(report.values()), report
  np.testing.assert_allclose(torch_logits(again, tokens), want, atol=1e-4)


@pytest.mark.parametrize('name', ['llama_tied', 'qwen2', 'qwen3'])
@pytest.mark.parametrize('kind', ['Q4_1', 'Q8_0', 'Q5_0', 'F16', 'BF16'])
def test_rounded_weights_are_those_of_the_package(tmp_path, name, kind):
  model = save(tmp_path / 'model.gguf', name, kind)
  import_gguf(tmp_path / 'model.gguf', tmp_path / 'out')
  stored = load_file(tmp_path / 'out' / 'model.safetensors')
  want = {key: value.numpy() for key, value in model.state_dict().items()}
  if model.config.tie_word_embeddings:
    del want['lm_head.weight']
  assert stored.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_array_equal(stored[key], value, err_msg=key)


@pytest.mark.parametrize('name', ['llama_tied', 'qwen2', 'qwen3_heads_of_128'])
def test_transformers_reads_the_same_from_the_file_itself(tmp_path, name):
  pytest.importorskip('accelerate', reason='transformers reads GGUF files with accelerate')
  save(tmp_path / 'model.gguf', name, 'Q8_0')
  import_gguf(tmp_path / 'model.gguf', tmp_path / 'out')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file='model.gguf', dtype=torch.float32
  )
  tokens = np.random.default_rng(1).integers(0, _ROWS, 60)
  want = torch_logits(theirs, tokens)
  np.testing.assert_allclose(our_logits(tmp_path / 'out', tokens), want, atol=1e-3)


@pytest.mark.parametrize('kind', ['Q4_K', 'Q6_K', 'IQ4_NL'])
def test_types_that_only_llama_cpp_writes(tmp_path, kind):
  chosen = gguf.GGMLQuantizationType[kind]
  per_block, size = gguf.GGML_QUANT_SIZES[chosen]
  # Bytes below 0x3c: as float16 scales they are finite.
  data = np.random.default_rng(0).integers(0, 0x3C, (3, 2 * size), np.uint8)
  path = write(tmp_path / 'a.gguf', {'general.architecture': 'llama'}, {'x': (data, chosen)})
  got = GgufFile(path).dequantized('x')
  assert got.shape == (3, 2 * per_block) and got.dtype == np.float32
  np.testing.assert_array_equal(got, dequantize(data, chosen))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_other_dtypes_round_once(tmp_path, dtype):
  model = save(tmp_path / 'model.gguf', 'qwen2')
  import_gguf(tmp_path / 'model.gguf', tmp_path / 'out', dtype=dtype)
  stored = load_file(tmp_path / 'out' / 'model.safetensors')
  wanted = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}[dtype]
  for key, value in model.state_dict().items():
    assert stored[key].dtype == wanted
    np.testing.assert_array_equal(stored[key], value.numpy().astype(wanted), err_msg=key)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == dtype
  hf_checkpoint.load_params(tmp_path / 'out')


@hypothesis.settings(max_examples=60)
@hypothesis.given(
  head_dim=st.sampled_from([32, 64, 128]),
  theta=st.sampled_from([10000.0, 500000.0, 1e6]),
  factor=st.sampled_from([2.0, 8.0, 32.0]),
  high=st.sampled_from([2.0, 4.0, 8.0]),
  context=st.sampled_from([2048, 4096, 8192]),
)
def test_the_scaling_of_llama_3_1_is_found_from_its_factors(head_dim, theta, factor, high, context):
  rope = dict(_LLAMA3, rope_theta=theta, factor=factor, high_freq_factor=high)
  rope['original_max_position_embeddings'] = context
  config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=rope)
  factors = rope_factors(config)
  found = llama3_scaling(factors, head_dim, theta)
  np.testing.assert_allclose(
    rotary.frequencies(head_dim, theta, found),
    rotary.frequencies(head_dim, theta) / factors,
    rtol=1e-5,
  )
  assert (found.factor, found.low_freq_factor) == (factor, 1.0)
  # One pair between the bands fits more than one scaling, all with the same frequencies.
  if ((factors > 1) & (factors < factor)).sum() > 1:
    assert (found.high_freq_factor, found.original_max_position_embeddings) == (high, context)


def test_other_factors_are_refused():
  with pytest.raises(ValueError, match='not those of Llama 3.1'):
    llama3_scaling(np.linspace(1, 9, 32, dtype=np.float32) ** 2, 64, 10000.0)


def test_the_directory_is_a_policy(tmp_path):
  save(tmp_path / 'model.gguf', 'qwen3')
  import_gguf(tmp_path / 'model.gguf', tmp_path / 'out')
  policy = load_policy(ModelSection(path=str(tmp_path / 'out')), seed=0)
  # End of turn, and end of text that no field names.
  assert policy.stop_ids == [0, 2]
  assert len(policy.tokenizer) == tiny_tokenizer().get_vocab_size() < _ROWS
  assert policy.tokenizer.pad_token_id == 0 and policy.tokenizer.bos_token == '<|im_start|>'
  text = policy.tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False)
  assert text == '<|im_start|>user\nhi<|im_end|>\n'
  written = {file.name for file in (tmp_path / 'out').iterdir()}
  assert written == {
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'special_tokens_map.json',
    'tokenizer.json',
    'tokenizer_config.json',
  }


def test_what_is_imported_is_exported_to_the_bit(tmp_path):
  save(tmp_path / 'model.gguf', 'llama3_1', 'Q4_1')
  import_gguf(tmp_path / 'model.gguf', tmp_path / 'out')
  config, params = hf_checkpoint.load_params(tmp_path / 'out')
  beside = hf_checkpoint.ModelFiles(tokenizer_dir=tmp_path / 'out')
  hf_checkpoint.save_checkpoint(tmp_path / 'again', config, params, beside, dtype='float32')
  for name in ('model.safetensors', 'tokenizer.json', 'tokenizer_config.json'):
    first, second = ((tmp_path / folder / name).read_bytes() for folder in ('out', 'again'))
    assert first == second


# --- what is refused ---

_REFUSED = {
  'architecture': ({'general.architecture': 'gemma2'}, "architecture is 'gemma2'; readable are"),
  'kind': ({'general.type': 'adapter'}, "general.type is 'adapter'"),
  'part': ({'split.count': 3}, 'one of 3 parts'),
  'no layers': ({'qwen2.block_count': None}, 'qwen2.block_count is missing'),
  'text for a number': ({'qwen2.block_count': 'two'}, "block_count is 'two'"),
  'sizes by layer': ({'qwen2.feed_forward_length': [96, 64]}, 'feed_forward_length is one for'),
  'more layers': ({'qwen2.block_count': 3}, 'blk.2.attn_norm.weight is missing.* and 7 more'),
  'fewer layers': ({'qwen2.block_count': 1}, 'blk.1.attn_k.bias is not a tensor of qwen2'),
  'sizes': ({'qwen2.feed_forward_length': 95}, r'ffn_gate.weight has shape \[96, 64\], expected'),
  'no heads': ({'qwen2.attention.head_count': 0}, 'head_count is 0'),
  'heads': ({'qwen2.attention.head_count': 3}, '64 numbers cannot be split into 3 heads'),
  'partial rotation': ({'qwen2.rope.dimension_count': 8}, 'rope.dimension_count is 8'),
  'scaling': ({'qwen2.rope.scaling.type': 'yarn'}, "rope scaling 'yarn' is not supported"),
  'window': ({'qwen2.attention.sliding_window': 64}, 'attention.sliding_window.*not supported'),
  'experts': ({'qwen2.expert_count': 4}, 'expert_count.*not supported'),
  'later tokens': ({'qwen2.attention.causal': False}, 'attention.causal is not true'),
  'billions of layers': ({'qwen2.block_count': 2**31}, 'block_count is 2147483648, and there are'),
  'list of rules': ({'tokenizer.ggml.pre': ['a']}, r"is \['a'\]; known are"),
  'type that is no list': ({'tokenizer.ggml.token_type': 3}, '1 entries for 288 tokens'),
  'norm': ({'qwen2.attention.layer_norm_rms_epsilon': float('nan')}, 'epsilon is nan'),
  'tokenizer': ({'tokenizer.ggml.model': 'bert'}, "of the kind 'bert'"),
  'split of words': ({'tokenizer.ggml.pre': 'mine'}, "'mine'; known are"),
  'no split of words': ({'tokenizer.ggml.pre': None}, 'is None; known are'),
  'tokens': (
    {'tokenizer.ggml.tokens': ['a', 'a'], 'tokenizer.ggml.token_type': [1, 1]},
    "both 'a'",
  ),
  'too many tokens': (
    {'tokenizer.ggml.tokens': [str(i) for i in range(300)], 'tokenizer.ggml.token_type': [1] * 300}
    | {'tokenizer.ggml.merges': ['1 2']},
    '300 tokens, token_embd.weight 288 rows',
  ),
  'token types': ({'tokenizer.ggml.token_type': [1, 2]}, '2 entries for 288 tokens'),
  'merges': ({'tokenizer.ggml.merges': ['t h e', 'q~ z']}, "merge 0 of .*'t h e'"),
  'no merges': ({'tokenizer.ggml.merges': None}, 'merges is missing'),
  'end': ({'tokenizer.ggml.eos_token_id': 999}, 'eos_token_id is 999, and there are 2.. tokens'),
  'template': ({'tokenizer.chat_template': 3}, 'chat_template is 3'),
  'flag': ({'tokenizer.ggml.add_bos_token': 'yes'}, "add_bos_token is 'yes'"),
}


@pytest.fixture(scope='module')
def qwen2():
  model = make_model(**_SIZES, **MODELS['qwen2'])
  return fields_of(model), model_tensors(model)


def refused(path, match, **options):
  """Checks that a file is refused in one line, and that nothing is left of the attempt."""
  out = path.parent / 'out'
  before = sorted(path.parent.iterdir())
  with pytest.raises(ValueError, match=match) as caught:
    import_gguf(path, out, **options)
  assert str(path) in str(caught.value) and '\n' not in str(caught.value)
  assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize('name', _REFUSED)
def test_what_cannot_be_read_is_refused_whole(tmp_path, qwen2, name):
  changes, match = _REFUSED[name]
  refused(write(tmp_path / 'a.gguf', qwen2[0] | changes, qwen2[1]), match)


@pytest.mark.parametrize(
  'name, tensor, match',
  [
    ('blk.0.attn_q.bias', None, 'blk.0.attn_q.bias is missing'),
    ('token_embd.weight', None, 'no token_embd.weight'),
    ('blk.0.attn_output.bias', np.zeros(64, np.float32), 'attn_output.bias is not a tensor of'),
    ('output_norm.weight', np.full(64, np.nan, np.float32), 'output_norm.weight holds numbers'),
    ('output_norm.weight', np.zeros(64, np.int32), 'type I32, which the gguf package does not'),
  ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, qwen2, name, tensor, match):
  tensors = {key: value for key, value in qwen2[1].items() if key != name}
  tensors |= {} if tensor is None else {name: tensor}
  refused(write(tmp_path / 'a.gguf', qwen2[0], tensors), match)


def test_numbers_beyond_float16_are_refused_for_it_alone(tmp_path, qwen2):
  tensors = qwen2[1] | {'output_norm.weight': np.full(64, 1e5, np.float32)}
  path = write(tmp_path / 'a.gguf', qwen2[0], tensors)
  refused(path, 'output_norm.weight holds numbers that float16 cannot hold', dtype='float16')
  import_gguf(path, tmp_path / 'out', dtype='bfloat16')
  kept = load_file(tmp_path / 'out' / 'model.safetensors')['model.norm.weight']
  np.testing.assert_allclose(kept.astype(np.float32), 1e5, rtol=2**-8)


def test_a_file_is_not_replaced_by_its_own_import(tmp_path, qwen2):
  path = write(tmp_path / 'a.gguf', *qwen2)
  with pytest.raises(ValueError, match='would be replaced'):
    import_gguf(path, tmp_path, overwrite=True)
  assert path.is_file()


def test_a_full_directory_is_kept(tmp_path, qwen2):
  path = write(tmp_path / 'a.gguf', *qwen2)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').write_text('x')
  with pytest.raises(FileExistsError, match='not empty'):
    import_gguf(path, tmp_path / 'out')
  assert (tmp_path / 'out' / 'mine').read_text() == 'x'
  import_gguf(path, tmp_path / 'out', overwrite=True)
  assert not (tmp_path / 'out' / 'mine').exists()


@pytest.mark.parametrize(
  'data, match',
  [
    (b'', 'cannot be read as a GGUF file'),
    (b'PK\x03\x04', 'does not begin with GGUF'),
    (b'GGUF\x00\x00\x00\x03' + bytes(16), 'big-endian'),
    (b'GGUF\x01\x00\x00\x00' + bytes(16), 'its version is 1'),
    # 2^60 fields, and a list of 2^60 numbers.
    (b'GGUF\x03\x00\x00\x00' + bytes(8) + bytes(7) + b'\x10', 'name of a field at byte 24'),
    (
      b'GGUF\x03\x00\x00\x00' + bytes(8) + b'\x01' + bytes(7)
      + b'\x01' + bytes(7) + b'a\x09\x00\x00\x00\x04\x00\x00\x00' + bytes(7) + b'\x10',
      'a at byte .* has 4611686018427387904 bytes',
    ),
  ],
)  # fmt: skip
def test_what_is_no_file_of_this_format(tmp_path, data, match):
  (tmp_path / 'a.gguf').write_bytes(data)
  refused(tmp_path / 'a.gguf', match)


def test_a_file_that_is_cut_short_anywhere(tmp_path_factory, qwen2):
  folder = tmp_path_factory.mktemp('cut')
  whole = write(folder / 'a.gguf', *qwen2).read_bytes()
  # The last tensor is followed by what fills its block up.
  at = [*range(0, 400), *np.linspace(400, len(whole) - 64, 60).astype(int)]
  for length in at:
    (folder / 'a.gguf').write_bytes(whole[:length])
    refused(folder / 'a.gguf', 'cannot be read as a GGUF file')


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, qwen2, data):
  """No byte of it makes anything else happen than one error."""
  folder = tmp_path_factory.mktemp('damaged')
  content = bytearray(write(folder / 'a.gguf', *qwen2).read_bytes())
  for _ in range(data.draw(st.integers(1, 3))):
    # The header has some 10,000 bytes, and its lengths and types are what can be wrong.
    place = data.draw(st.integers(0, 16000))
    content[place] = data.draw(st.integers(0, 255))
  (folder / 'a.gguf').write_bytes(content)
  try:
    import_gguf(folder / 'a.gguf', folder / 'out')
  except ValueError as error:
    assert str(folder / 'a.gguf') in str(error)
    assert [file.name for file in folder.iterdir()] == ['a.gguf']
  else:
    hf_checkpoint.load_config(folder / 'out')


def test_the_program_says_in_one_line_what_is_wrong(tmp_path):
  (tmp_path / 'a.gguf').write_bytes(b'GGUF')
  command = [sys.executable, '-m', 'experiments.import_model']
  run = subprocess.run(
    [*command, f'--gguf={tmp_path / "a.gguf"}', f'--out={tmp_path / "out"}'],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    check=False,
  )
  assert run.returncode == 1 and run.stderr.count('\n') == 1
  assert run.stderr.startswith('error: ') and 'a.gguf cannot be read as a GGUF file' in run.stderr
  assert not (tmp_path / 'out').exists()


def test_names_are_those_of_the_package():
  """The tests' own table of names, against that of llama.cpp."""
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
  for name in make_model(**_SIZES, **MODELS['qwen3']).state_dict():
    stem, kind = name.rsplit('.', 1)
    assert file_name(name) == f'{names.get_name(stem)}.{kind}'
