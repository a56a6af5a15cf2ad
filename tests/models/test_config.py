"""config.json in and out, what is refused, and the derived numbers against counts by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from published import DEEPSEEK_CODER, LLAMA3_1_8B, PUBLISHED, QWEN2_5_14B, QWEN3_8B
from torch_reference import TINY, make_model

from dcore_jax.models import rotary
from dcore_jax.models.config import DecoderConfig, RopeScaling
from dcore_jax.models.decoder import abstract_params


def test_qwen3_8b_numbers():
  config = DecoderConfig.from_hf(QWEN3_8B)
  assert config.param_count == 8_190_735_360
  assert config.param_count == sum(
    math.prod(spec.shape) for spec in jax.tree.leaves(abstract_params(config))
  )
  assert config.kv_bytes_per_token(jnp.bfloat16) == 147_456
  # 2 flops per matrix parameter (the embedding is a lookup, the norms are vectors), attention on
  # top.
  norms = 36 * (2 * 4096 + 2 * 128) + 4096
  assert config.flops_per_token(1) - 36 * 4 * 32 * 128 == 2 * (
    config.param_count - 151936 * 4096 - norms
  )
  assert config.flops_per_token(4097) - config.flops_per_token(1) == 36 * 4 * 32 * 128 * 2048


@pytest.mark.parametrize(
  'record, count',
  [(QWEN2_5_14B, 14_770_033_664), (LLAMA3_1_8B, 8_030_261_248), (DEEPSEEK_CODER, 6_740_512_768)],
)
def test_published_parameter_counts(record, count):
  config = DecoderConfig.from_hf(record)
  assert config.param_count == count
  assert config.param_count == sum(
    math.prod(spec.shape) for spec in jax.tree.leaves(abstract_params(config))
  )


def test_the_other_families_are_understood():
  qwen, llama, coder = (
    DecoderConfig.from_hf(record) for record in (QWEN2_5_14B, LLAMA3_1_8B, DEEPSEEK_CODER)
  )
  assert qwen.qkv_bias and not qwen.qk_norm and qwen.head_dim == 128 and qwen.rope_scaling is None
  assert not (llama.qkv_bias or llama.qk_norm) and llama.rms_norm_eps == 1e-5
  assert llama.stop_token_ids == (128001, 128008, 128009)
  assert (
    llama.rope_scaling == RopeScaling('llama3', 8.0, 1.0, 4.0, 8192) and llama.rope_theta == 5e5
  )
  assert coder.rope_scaling == RopeScaling('linear', 4.0) and coder.rope_theta == 1e5
  assert len({hash(config) for config in (qwen, llama, coder)}) == 3
  assert DecoderConfig.from_hf(QWEN2_5_14B | {'use_mrope': False}) == qwen  # so the base models say


@pytest.mark.parametrize('record', PUBLISHED.values(), ids=PUBLISHED)
def test_round_trip_of_every_family_here_and_in_transformers(record):
  """transformers 5 writes what it read in its own words, which must mean the same."""
  transformers = pytest.importorskip('transformers')
  config = DecoderConfig.from_hf(record)
  written = config.to_hf()
  assert DecoderConfig.from_hf(written) == config
  theirs = transformers.AutoConfig.for_model(
    **{name: value for name, value in written.items() if name != 'architectures'}
  )
  assert DecoderConfig.from_hf(theirs.to_dict()) == config
  assert written['architectures'] == record['architectures']


@pytest.mark.parametrize('family', ['qwen3', 'qwen2', 'llama'])
def test_defaults_are_those_of_the_config_class(family):
  """What a file leaves out is what transformers would take."""
  transformers = pytest.importorskip('transformers')
  sizes = {
    'vocab_size': 64,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 2,
    'num_attention_heads': 32,
  }
  theirs = transformers.AutoConfig.for_model(family, **sizes)
  config = DecoderConfig.from_hf({'model_type': family, **sizes})
  assert config == DecoderConfig.from_hf(theirs.to_dict())
  grouped = DecoderConfig.from_hf({'model_type': family, **sizes, 'num_key_value_heads': None})
  assert grouped.num_key_value_heads == 32


@pytest.mark.parametrize('name', ['llama3_1', 'deepseek_coder'])
def test_both_spellings_of_a_rope_scaling(name):
  record = PUBLISHED[name]
  config = DecoderConfig.from_hf(record)
  fields = dict(record['rope_scaling'])
  kind = fields.pop('type', None) or fields.pop('rope_type')
  without = {
    key: value for key, value in record.items() if key not in ('rope_scaling', 'rope_theta')
  }
  for spelling in (
    {'rope_parameters': fields | {'rope_type': kind, 'rope_theta': record['rope_theta']}},
    {'rope_theta': record['rope_theta'], 'rope_scaling': fields | {'type': kind}},
    {
      'rope_theta': record['rope_theta'],
      'rope_scaling': fields | {'type': kind, 'rope_type': kind},
    },
  ):
    assert DecoderConfig.from_hf(without | spelling) == config
  with pytest.raises(ValueError, match='disagree'):
    DecoderConfig.from_hf(
      record | {'rope_parameters': {'rope_type': 'default', 'rope_theta': record['rope_theta']}}
    )


@pytest.mark.parametrize('name', PUBLISHED)
def test_frequencies_equal_transformers(name):
  """At the published sizes, where the table has 64 pairs."""
  torch = pytest.importorskip('torch')
  modeling = pytest.importorskip('transformers.models.llama.modeling_llama')
  transformers = pytest.importorskip('transformers')
  config = DecoderConfig.from_hf(PUBLISHED[name])
  theirs = modeling.LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**PUBLISHED[name]))
  got = rotary.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
  torch.testing.assert_close(torch.tensor(got), theirs.inv_freq, rtol=2e-6, atol=0)


def test_the_tiny_scaled_models_use_every_band():
  """Of the pairs of the tiny Llama some are kept, some mixed and some divided: parity tests see all
  three.
  """
  config = DecoderConfig.from_hf(make_model(**TINY['llama3_1']).config.to_dict())
  ratio = rotary.frequencies(
    config.head_dim, config.rope_theta, config.rope_scaling
  ) / rotary.frequencies(config.head_dim, config.rope_theta)
  assert ratio[0] == 1 and any(0.13 < r < 0.99 for r in ratio) and abs(ratio[-1] - 1 / 8) < 1e-6


def test_round_trip_and_both_places_of_rope_theta():
  config = DecoderConfig.from_hf(QWEN3_8B)
  assert DecoderConfig.from_hf(config.to_hf()) == config
  new_style = {name: value for name, value in QWEN3_8B.items() if name != 'rope_theta'}
  new_style['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 1e6}
  assert DecoderConfig.from_hf(new_style) == config
  with pytest.raises(ValueError, match='disagree'):
    DecoderConfig.from_hf(QWEN3_8B | {'rope_parameters': {'rope_theta': 5.0}})
  several = DecoderConfig.from_hf(QWEN3_8B | {'eos_token_id': [1, 2]})
  assert several.stop_token_ids == (1, 2) and several.to_hf()['eos_token_id'] == [1, 2]
  assert hash(several) != hash(config) and config.stop_token_ids == (151645,)


def test_transformers_reads_what_we_write():
  transformers = pytest.importorskip('transformers')
  config = dataclasses.replace(
    DecoderConfig.from_hf(QWEN3_8B), rope_theta=4321.0, tie_word_embeddings=True
  )
  written = {
    name: value
    for name, value in config.to_hf().items()
    if name not in ('model_type', 'architectures')
  }
  assert DecoderConfig.from_hf(transformers.Qwen3Config(**written).to_dict()) == config


@pytest.mark.parametrize(
  'change, match',
  [
    ({'model_type': 'mistral'}, "'mistral'.*'llama', 'qwen2', 'qwen3'"),
    ({'use_sliding_window': True, 'sliding_window': 4096}, 'sliding_window=4096'),
    ({'attention_bias': True}, 'attention_bias'),
    ({'rope_scaling': {'type': 'yarn'}}, 'rope_scaling'),
    ({'hidden_act': 'gelu'}, 'hidden_act'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    (
      {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 4.0}},
      'rope_parameters',
    ),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types'),
    ({'num_experts': 8}, 'num_experts'),
    ({'attention_dropout': 0.1}, 'attention_dropout'),
    ({'num_key_value_heads': 5}, 'num_key_value_heads'),
    ({'head_dim': 7}, 'head_dim'),
    ({'hidden_size': 0}, 'hidden_size'),
    ({'vocab_size': '61'}, 'vocab_size'),
    ({'num_hidden_layers': 2.0}, 'layers must be a positive integer'),
    ({'tie_word_embeddings': 'false'}, 'tie_word'),
  ],
)
def test_what_would_be_ignored_is_refused(change, match):
  with pytest.raises(ValueError, match=match):
    DecoderConfig.from_hf(QWEN3_8B | change)


@pytest.mark.parametrize(
  'name, change, match',
  [
    ('llama3_1', {'attention_bias': True}, 'attention_bias=True'),
    ('llama3_1', {'mlp_bias': True}, 'mlp_bias=True'),
    ('llama3_1', {'pretraining_tp': 2}, 'pretraining_tp=2'),
    ('llama3_1', {'partial_rotary_factor': 0.5}, 'partial_rotary'),
    ('llama3_1', {'sliding_window': 4096}, 'sliding_window=4096'),
    ('llama3_1', {'clip_qkv': 8.0}, 'clip_qkv'),
    ('llama3_1', {'hidden_size': 4100, 'head_dim': None}, 'hidden_size=4100 is not a multiple'),
    ('llama3_1', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'low_freq_factor'),
    (
      'llama3_1',
      {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}},
      "'dynamic' is not supported",
    ),
    ('llama3_1', {'rope_scaling': {'factor': 2.0}}, 'rope_type is missing'),
    (
      'llama3_1',
      {'rope_scaling': LLAMA3_1_8B['rope_scaling'] | {'high_freq_factor': 1.0}},
      'is not below',
    ),
    ('llama3_1', {'rope_scaling': LLAMA3_1_8B['rope_scaling'] | {'type': 'linear'}}, 'disagree'),
    (
      'llama3_1',
      {
        'rope_scaling': None,
        'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5},
      },
      'partial',
    ),
    (
      'deepseek_coder',
      {'rope_scaling': {'type': 'linear', 'factor': 4.0, 'beta_fast': 32}},
      'beta_fast',
    ),
    (
      'deepseek_coder',
      {'rope_scaling': {'type': 'linear', 'factor': 4.0, 'low_freq_factor': 1}},
      'does not read low_freq',
    ),
    ('deepseek_coder', {'rope_scaling': {'type': 'linear', 'factor': 0}}, 'factor of linear'),
    ('qwen2', {'use_sliding_window': True}, 'use_sliding_window=True and max_window_layers=70'),
    ('qwen2', {'attention_bias': False}, 'attention_bias=False'),
    ('qwen2', {'layer_types': ['sliding_attention']}, 'layer_types'),
    ('qwen2', {'use_mrope': True}, 'use_mrope=True'),
  ],
)
def test_what_the_other_families_would_ignore_is_refused(name, change, match):
  with pytest.raises(ValueError, match=match):
    DecoderConfig.from_hf(PUBLISHED[name] | change)


def test_all_problems_are_named_at_once():
  broken = {name: value for name, value in QWEN3_8B.items() if name != 'hidden_size'}
  with pytest.raises(ValueError, match='(?s)attention_bias.*mystery.*hidden_size is missing'):
    DecoderConfig.from_hf(broken | {'attention_bias': True, 'mystery': 1})


@pytest.mark.parametrize(
  'more',
  [
    {'unsloth_fixed': True},
    {'unsloth_version': '2025.6.2', 'model_name': 'unsloth/Qwen3-8B'},
    {'_attn_implementation': 'sdpa', '_commit_hash': 'abc', '_flash_attn_2_enabled': True},
    {'tokenizer_class': 'Qwen2Tokenizer', 'unk_token_id': 3, 'sep_token_id': 4},
    {'model_name_or_path': '/models/qwen', '_model_name_or_path': 'x'},
    {'is_decoder': True, 'add_cross_attention': False, 'pruned_heads': {}, 'torchscript': False},
    # Sampling settings, which version 4 of transformers kept in config.json.
    {'temperature': 0.7, 'do_sample': True, 'max_length': 20, 'bad_words_ids': [[1]]},
    {'tie_encoder_decoder': False, 'use_bfloat16': False, 'task_specific_params': {'a': 1}},
    # SmolLM2's, and what other programs than transformers write.
    {'is_llama_config': True, 'rope_interleaved': False, 'transformers.js_config': {'dtype': 'q4'}},
    {'hidden_act': 'swish', 'pad_token_id': None, 'quantization_config': None},
  ],
)
@pytest.mark.parametrize('name', PUBLISHED)
def test_fields_about_the_file_are_read_past(name, more):
  plain = DecoderConfig.from_hf(PUBLISHED[name])
  assert DecoderConfig.from_hf(PUBLISHED[name] | more) == plain


def test_fields_of_the_base_class_are_read_past():
  """Whatever the installed transformers declares for every model, at values that it would write."""
  transformers = pytest.importorskip('transformers')
  base = transformers.PretrainedConfig().to_dict()
  told = {
    name: value if value is not None else 'said' for name, value in base.items() if name != 'dtype'
  }
  assert DecoderConfig.from_hf(told | QWEN3_8B) == DecoderConfig.from_hf(QWEN3_8B)


@pytest.mark.parametrize(
  'change',
  [
    {'add_cross_attention': True},
    {'tie_encoder_decoder': True},
    {'pruned_heads': {'0': [1]}},
    {'is_encoder_decoder': True},
    {'quantization': {'bits': 4}},
    {'auto_map': {'AutoModelForCausalLM': 'modeling.Mine'}},
    {'final_logit_softcapping': 30.0},
  ],
)
def test_fields_that_change_the_function_stay_errors(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    DecoderConfig.from_hf(QWEN3_8B | change)


@pytest.mark.parametrize(
  'given',
  [
    {'rope_type': 'default', 'factor': 1.0},
    {'type': 'default', 'rope_type': 'default', 'factor': None},
    {'rope_type': 'default', 'original_max_position_embeddings': 8192},
  ],
)
def test_a_default_rope_scaling_scales_nothing_whatever_is_beside_it(given):
  assert DecoderConfig.from_hf(QWEN3_8B | {'rope_scaling': given}).rope_scaling is None
  with pytest.raises(ValueError, match="'default' is not supported"):
    DecoderConfig.from_hf(QWEN3_8B | {'rope_scaling': given | {'factor': 2.0}})


@pytest.mark.parametrize(
  'change, method',
  [
    ({'quantization_config': {'quant_method': 'bitsandbytes', 'load_in_4bit': True}}, 'bitsandb'),
    ({'quantization_config': {'quant_method': 'awq', 'bits': 4}}, 'awq'),
    ({'quantization_config': {'quant_method': 'fp8', 'fmt': 'e4m3'}}, 'fp8'),
    ({'quantization': {'group_size': 64, 'bits': 4}}, ''),
    ({'compression_config': {'format': 'pack-quantized'}}, ''),
  ],
)
def test_rounded_weights_are_refused_with_what_to_do(change, method):
  with pytest.raises(ValueError, match=f'{next(iter(change))}.*few bits.*{method}.*dequantize'):
    DecoderConfig.from_hf(QWEN3_8B | change)


_ODD = (math.nan, math.inf, -math.inf, -2, True, '8', [[]], {}, ['a'], 'linear', [1, 'x'])


@pytest.mark.parametrize('value', _ODD, ids=repr)
@pytest.mark.parametrize(
  'name',
  [
    'vocab_size',
    'num_hidden_layers',
    'rope_theta',
    'rms_norm_eps',
    'initializer_range',
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
    'model_type',
    'layer_types',
    'rope_scaling',
    'rope_parameters',
  ],
)
def test_a_value_of_another_kind_is_an_error_that_names_the_field(name, value):
  record = {key: held for key, held in QWEN3_8B.items() if key != 'rope_scaling'}
  if not value and name in ('rope_scaling', 'rope_parameters', 'layer_types'):
    pytest.skip('nothing is said')
  with pytest.raises(ValueError, match=name):
    DecoderConfig.from_hf(record | {name: value})


@pytest.mark.parametrize('factor', [math.nan, math.inf, -1, 0, True, '4', None, [4]])
def test_a_factor_is_a_positive_finite_number(factor):
  with pytest.raises(ValueError, match='factor of linear'):
    DecoderConfig.from_hf(QWEN3_8B | {'rope_scaling': {'type': 'linear', 'factor': factor}})


@pytest.mark.parametrize('record', [[], 'qwen3', 3, None])
def test_a_file_that_holds_no_object_is_an_error(record):
  with pytest.raises(ValueError, match='expected a JSON object'):
    DecoderConfig.from_hf(record)


def test_a_token_that_there_is_not_ends_no_answer():
  config = DecoderConfig.from_hf(QWEN3_8B | {'eos_token_id': [5, -1], 'pad_token_id': -1})
  assert config.stop_token_ids == (5,)
  assert DecoderConfig.from_hf(QWEN3_8B | {'eos_token_id': -1}).stop_token_ids == ()
