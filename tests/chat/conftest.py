"""A tokenizer of another family than Qwen's."""

import pytest

from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts

# What Llama 3.1 writes: other delimiters, nothing behind an end of turn, content stripped, the role
# of tools by another name.
LLAMA = (
  "{{- '<|begin_of_text|>' -}}{%- for m in messages -%}"
  "{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role)"
  " + '<|end_header_id|>\n\n' -}}"
  "{{- m.content | trim + '<|eot_id|>' -}}{%- endfor -%}"
  "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}"
)


@pytest.fixture(scope='session')
def llama():
  tokenizer = build_tokenizer(sample_texts(), 640)
  tokenizer.add_special_tokens(
    {
      'additional_special_tokens': [
        '<|begin_of_text|>',
        '<|start_header_id|>',
        '<|end_header_id|>',
        '<|eot_id|>',
      ]
    }
  )
  tokenizer.chat_template = LLAMA
  return tokenizer
