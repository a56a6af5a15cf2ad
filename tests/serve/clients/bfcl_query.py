"""BFCL's handler of a model behind an endpoint asks the server at argv[1]; argv[2]: a tokenizer."""

import importlib.abc
import importlib.machinery
import sys
from unittest import mock

# The package imports the SDK of every vendor, none of which is asked here.
VENDORS = ('anthropic', 'boto3', 'botocore', 'cohere', 'google', 'mistralai', 'qwen_agent')
OTHERS = ('writerai', 'datamodel_code_generator', 'rank_bm25', 'faiss', 'sentence_transformers')


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in (*VENDORS, *OTHERS):
      return importlib.machinery.ModuleSpec(name, self, is_package=True)
    return None

  def create_module(self, spec):
    module = mock.MagicMock(name=spec.name)
    module.__path__ = []
    module.__spec__ = spec
    return module

  def exec_module(self, module):
    pass


sys.meta_path.insert(0, Absent())

import openai  # noqa: E402
import transformers  # noqa: E402
from bfcl_eval.model_handler.local_inference.qwen import QwenHandler  # noqa: E402
from bfcl_eval.model_handler.local_inference.qwen_fc import QwenFCHandler  # noqa: E402

url, folder = sys.argv[1:3]
FUNCTIONS = [{'name': 'get_weather', 'description': 'weather', 'parameters': {'type': 'dict'}}]
MESSAGES = [
  {'role': 'user', 'content': 'what is the weather in Paris?'},
  {'role': 'assistant', 'content': 'a', 'reasoning_content': 'hm'},
  {'role': 'user', 'content': 'and now?'},
]
for kind in (QwenHandler, QwenFCHandler):
  handler = kind.__new__(kind)
  handler.client = openai.OpenAI(base_url=url, api_key='none', max_retries=0)
  handler.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  handler.model_path_or_id = folder
  handler.max_context_length = 2048
  handler.temperature = 0.001
  # What handlers of other models set; the server ends answers there anyway.
  handler.stop_token_ids = [handler.tokenizer.eos_token_id]
  handler.skip_special_tokens = True
  data = {'message': MESSAGES, 'function': FUNCTIONS}
  answer, _ = handler._query_prompting(data)
  parsed = handler._parse_query_response_prompting(answer)
  assert parsed['input_token'] > 0 and parsed['output_token'] > 0, parsed
print('done')
