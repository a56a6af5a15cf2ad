"""Every published schema becomes our rows; what breaks a schema's promises is refused with a
reason.
"""

import json

import pytest

from dcore_jax.chat import tool_specs
from dcore_jax.chat.tool_calls import parse_calls
from dcore_jax.data import row_schemas
from dcore_jax.data.row_schemas import recognise, to_rows, toolrl_point

WEATHER = {
  'name': 'get_weather',
  'description': 'Weather of a city.',
  'parameters': {
    'type': 'dict',
    'required': ['city'],
    'properties': {'city': {'type': 'str', 'description': 'which'}, 'days': {'type': 'int'}},
  },
}
TRENDS = {
  'name': 'Market Trends API',
  'description': '',
  'parameters': {'type': 'dict', 'properties': {'country': {'type': 'string'}}, 'required': []},
  'required': None,
}


TAGGED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def hermes_answer(text):
  turns = [{'from': 'human', 'value': 'x'}, {'from': 'gpt', 'value': text}]
  return {'conversations': turns, 'tools': json.dumps([WEATHER])}


def toolace(answer='[Market Trends API(country="us"), get_weather(city="Rome, Paris (old)")]'):
  system = (
    'You are an expert in composing functions. Point out what is missing. '
    'Here is a list of functions in JSON format '
    f'that you can invoke:\n{json.dumps([WEATHER, TRENDS])}\n'
    'Should you decide to return the function call(s). Put it '
    'in the format of [func1(params_name=params_value)]\n NO other text MUST be included.'
  )
  return {
    'system': system,
    'conversations': [
      {'from': 'user', 'value': 'Trends?'},
      {'from': 'assistant', 'value': answer},
      {'from': 'tool', 'value': '[{"trend": 1}]'},
      {'from': 'tool', 'value': 'rain'},
      {'from': 'assistant', 'value': 'Up, and rain.'},
    ],
  }


def xlam():
  tools = [
    {
      'name': 'get_weather',
      'description': 'Weather.',
      'parameters': {
        'city': {'description': 'which', 'type': 'str', 'default': 'Rome'},
        'unit': {'description': 'C or F', 'type': 'str, optional'},
        'days': {'description': 'how many', 'type': 'int'},
      },
    }
  ]
  answers = [
    {'name': 'get_weather', 'arguments': arguments}
    for arguments in ({'city': 'Oslo', 'days': 2}, {'days': 1})
  ]
  return {'id': 7, 'query': 'Oslo?', 'tools': json.dumps(tools), 'answers': json.dumps(answers)}


def apigen_mt():
  return {
    'system': '# Policy\nBe kind.',
    'tools': json.dumps([WEATHER]),
    'conversations': [
      {'from': 'human', 'value': 'Oslo?'},
      {'from': 'function_call', 'value': '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
      {'from': 'observation', 'value': '"snow"'},
      {'from': 'gpt', 'value': 'Snow.'},
      {'from': 'human', 'value': 'Bye.'},
    ],
  }


def hermes(**changes):
  system = (
    'You are a function calling AI model. '
    'You are provided with function signatures within <tools></tools> XML tags.\n'
    f"<tools>\n[{{'type': 'function', 'function': {WEATHER}}}]\n</tools>\n"
    'For each function call return a json object.'
  )
  return {
    'id': 'a-b',
    'conversations': [
      {'from': 'system', 'value': system},
      {'from': 'human', 'value': 'Oslo?'},
      {
        'from': 'gpt',
        'value': 'I look.\n<tool_call>\n'
        "{'arguments': {'city': 'Oslo'}, 'name': 'get_weather'}\n</tool_call>",
      },
      {'from': 'tool', 'value': '<tool_response>\n{"is": "snow"}\n</tool_response>'},
      {'from': 'gpt', 'value': 'Snow.'},
    ],
    'tools': json.dumps([{'type': 'function', 'function': WEATHER}]),
    'category': 'weather',
    **changes,
  }


def toolrl_row(output):
  return {
    'instruction': 'Tools:\n1. Name: Get Top/Apps\nDescription: x\n\n'
    '**Steps for Each Turn**\nformat',
    'input': '<user> hi </user>',
    'output': output,
  }


def plain():
  return {
    'id': 3,
    'conversations': [
      {'role': 'user', 'content': 'hi'},
      {'role': 'assistant', 'content': '<think>\nx\n</think>\n\nho'},
    ],
  }


def packed():
  messages = [
    {'role': role, 'content': f'{role} {i}'}
    for i, role in enumerate(
      ('system', 'user', 'assistant', 'system', 'user', 'assistant', 'user', 'assistant')
    )
  ]
  return {'id': '9', 'conversations': messages, 'single_conv_last_idx': [2, 7]}


def test_schemas_are_recognised_by_their_fields():
  cases = dict(
    rows=plain(),
    completion={'prompt': 'hi', 'completion': 'ho'},
    preference={'prompt': 'hi', 'chosen': 'ho', 'rejected': 'no'},
    packed=packed(),
    toolrl=toolrl_row(''),
    xlam=xlam(),
    toolace=toolace(),
    apigen_mt=apigen_mt(),
    hermes=hermes(),
  )
  assert set(cases) == set(row_schemas.SCHEMAS)
  for name, record in cases.items():
    assert recognise(record) == name
  assert recognise(hermes(system=None)) == 'hermes'  # a column that other records fill
  for record in ({}, {'text': 'x'}, {'query': 'x'}, {'prompt': 'x'}, {'conversations': None}):
    assert recognise(record) is None
  # The reader of messages says what is wrong with these.
  for messages in ([], 'x', [['user', 'x']], {}, 3):
    assert recognise({'conversations': messages}) == 'rows'
    with pytest.raises(ValueError, match="'conversations'|message 0|conversations is not JSON"):
      to_rows({'conversations': messages}, 'rows', 'r')


def roles(row):
  return [message['role'] for message in row['conversations']]


def test_python_style_shows_specs_in_the_system_turn_and_wraps_tool_responses():
  (row,) = to_rows(toolace(), 'toolace', 'data-0')
  assert (
    row['id'] == 'data-0'
    and roles(row) == ['system', 'user', 'assistant', 'user', 'assistant']
    and 'tools' not in row
  )
  system, _, call, response, _ = [message['content'] for message in row['conversations']]
  assert system.startswith(
    'You are an expert in composing functions. Point out what is missing.\n\nYou may call'
  )
  assert (
    system.endswith(tool_specs.CALL_FORMAT)
    and 'invoke:' not in system
    and 'NO other text' not in system
  )
  listed = [
    json.loads(line) for line in system.split('<tools>\n')[1].split('\n</tools>')[0].split('\n')
  ]
  assert [spec['name'] for spec in listed] == ['get_weather', 'Market_Trends_API']
  assert listed[0]['parameters'] == {
    'type': 'object',
    'required': ['city'],
    'properties': {'city': {'type': 'string', 'description': 'which'}, 'days': {'type': 'integer'}},
  }
  assert (
    call == "[Market_Trends_API(country='us'), get_weather(city='Rome, Paris (old)')]"
    and len(parse_calls(call)) == 2
  )
  assert (
    response
    == '<tool_response>\n[{"trend": 1}]\n</tool_response>\n<tool_response>\nrain\n</tool_response>'
  )


def test_hermes_style_leaves_specs_and_tool_turns_to_the_template():
  (row,) = to_rows(toolace(), 'toolace', 'r', 'hermes')
  assert roles(row) == ['system', 'user', 'assistant', 'tool', 'tool', 'assistant']
  assert [tool['function']['name'] for tool in row['tools']] == ['get_weather', 'Market Trends API']
  assert [call.name for call in parse_calls(row['conversations'][2]['content'])] == [
    'Market Trends API',
    'get_weather',
  ]
  assert '<tools>' not in row['conversations'][0]['content']


def test_xlam():
  (row,) = to_rows(xlam(), 'xlam', 'r')
  assert row['id'] == '7' and roles(row) == ['system', 'user', 'assistant']
  assert (
    row['conversations'][2]['content'] == "[get_weather(city='Oslo', days=2), get_weather(days=1)]"
  )
  (row,) = to_rows(xlam(), 'xlam', 'r', 'hermes')
  parameters = row['tools'][0]['function']['parameters']
  assert (
    parameters['type'] == 'object'
    and parameters['required'] == ['days']
    and roles(row) == ['user', 'assistant']
  )
  types = {name: spec['type'] for name, spec in parameters['properties'].items()}
  assert types == {'city': 'string', 'unit': 'string', 'days': 'integer'}


def test_apigen_mt_ends_with_the_assistants_last_words():
  (row,) = to_rows(apigen_mt(), 'apigen_mt', 'r')
  assert roles(row) == ['system', 'user', 'assistant', 'user', 'assistant']
  assert row['conversations'][0]['content'].startswith('# Policy\nBe kind.\n\nYou may call')
  assert [m['content'] for m in row['conversations'][2:]] == [
    "[get_weather(city='Oslo')]",
    '<tool_response>\n"snow"\n</tool_response>',
    'Snow.',
  ]


@pytest.mark.parametrize('tools', [hermes()['tools'], None, ''])
def test_hermes_reads_python_literals_and_specs_from_either_place(tools):
  (row,) = to_rows(hermes(tools=tools), 'hermes', 'r')
  assert roles(row) == ['system', 'user', 'assistant', 'user', 'assistant'] and row['id'] == 'a-b'
  contents = [m['content'] for m in row['conversations']]
  assert (
    contents[0].startswith('You may call') and '"get_weather"' in contents[0]
  )  # what the stock text says is said once
  assert (
    # Calls stand alone in this style: the words before them end the thoughts.
    contents[2] == "<think>\nI look.\n</think>\n\n[get_weather(city='Oslo')]"
    and contents[3] == '<tool_response>\n{"is": "snow"}\n</tool_response>'
  )
  (answer,) = to_rows(
    {
      'conversations': [
        {'from': 'system', 'value': 'Answer in JSON.'},
        {'from': 'human', 'value': 'x'},
        {'from': 'gpt', 'value': '[1]'},
      ]
    },
    'hermes',
    'json-4',
  )
  assert [m['content'] for m in answer['conversations']] == [
    'Answer in JSON.',
    'x',
    '[1]',
  ] and answer['id'] == 'json-4'


def test_a_thought_before_a_call_is_kept():
  call = '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>'
  turns = [
    {'from': 'human', 'value': 'Oslo?'},
    {'from': 'gpt', 'value': f'<think>\nwhere?\n</think>\n{call}'},
  ]
  (row,) = to_rows(hermes(conversations=turns), 'hermes', 'r')
  assert (
    row['conversations'][-1]['content'] == "<think>\nwhere?\n</think>\n\n[get_weather(city='Oslo')]"
  )


@pytest.mark.parametrize(
  'answer',
  [
    '<tool_call>\n{"name": "f", "parameters": {"from": "a</tool_call>\nb"}}\n</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"from": "a</tool_call>\\nb"}}',
    "<tool_call>{'name': 'f', 'arguments': {'from': 'a\\x3c/tool_call>\\nb'}}</tool_call>",
    '<tool_call>[{"name": "f", "parameters": '
    '"{\\"from\\": \\"a</tool_call>\\\\nb\\"}"}]</tool_call>',
  ],
)
def test_spellings_of_a_call_in_a_row(answer):
  turns = [{'from': 'human', 'value': 'x'}, {'from': 'gpt', 'value': answer}]
  (row,) = to_rows(hermes(conversations=turns), 'hermes', 'r')
  assert row['conversations'][-1]['content'] == "[f(from='a</tool_call>\\nb')]"


def test_words_about_a_tag_are_no_call():
  turns = [{'from': 'human', 'value': 'x'}, {'from': 'gpt', 'value': 'I write <tool_call> first.'}]
  (row,) = to_rows(hermes(conversations=turns), 'hermes', 'r')
  assert row['conversations'][-1]['content'] == 'I write <tool_call> first.'


def test_calls_of_a_column_that_others_fill():
  call = {'name': 'f', 'arguments': None, 'parameters': {'a': 1}, 'result': None}
  (row,) = to_rows(xlam() | {'answers': [call]}, 'xlam', 'r')
  assert row['conversations'][-1]['content'] == '[f(a=1)]'


@pytest.mark.parametrize(
  'name, python',
  [
    ('import', 'import_'),
    ('None.class', 'None_.class_'),
    ('x²', 'x2'),
    ('ﬁnd', 'find'),
    ('৹.3d', '_._3d'),
    ('get-it', 'get_it'),
  ],
)
def test_tools_of_any_name_can_be_called_in_the_python_style(name, python):
  record = toolace(f'[{name}(country="us")]')
  record['system'] = record['system'].replace('Market Trends API', name)
  (row,) = to_rows(record, 'toolace', 'r')
  assert row['conversations'][2]['content'] == f"[{python}(country='us')]"
  assert parse_calls(row['conversations'][2]['content'])[0].name == python
  assert f'"name": "{python}"' in row['conversations'][0]['content']


@pytest.mark.parametrize(
  'system',
  [
    'You are a function calling AI model. You are provided with function signatures within <tools> '
    '</tools> XML tags. {0}You may call one or more functions to assist with the user query. '
    "Don't make assumptions about what values to plug into functions.\n<tools>\n[{1}]\n</tools>\n"
    'For each function call return a JSON object, with the following pydantic model json schema:\n'
    "{{'title': 'FunctionCall'}}\nEach function call should be enclosed within <tool_call> "
    "</tool_call> XML tags.\n<tool_call>\n{{'arguments': <args-dict>}}\n</tool_call>",
    'You are a function calling AI model. Here are the available tools: <tools> {1} </tools> {0}'
    'Use the following pydantic model json schema for each tool call: {{"title": "FunctionCall"}} '
    'For each function call return a json object within <tool_call></tool_call> tags as follows:',
  ],
)
def test_hermes_prompts_keep_what_they_say_beside_the_tools(system):
  turns = [{'from': 'human', 'value': 'x'}, {'from': 'gpt', 'value': TAGGED}]
  for policy in ('', 'Never call a refund tool before the user agrees. '):
    text = system.format(policy, json.dumps(WEATHER))
    record = hermes(conversations=[{'from': 'system', 'value': text}, *turns])
    (row,) = to_rows(record | {'tools': None}, 'hermes', 'r', 'hermes')
    first = row['conversations'][0]
    assert first['content'] == (policy.strip() or 'x')


def test_tools_among_the_notes_of_a_row_are_not_lost():
  record = {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}
  for notes in ({'tools': [WEATHER]}, json.dumps({'tools': [WEATHER]})):
    with pytest.raises(ValueError, match="'metadata' holds tools"):
      to_rows(record | {'metadata': notes}, 'rows', 'r')
    assert to_rows(record | {'metadata': notes, 'tools': [WEATHER]}, 'rows', 'r')
  assert to_rows(record | {'metadata': 'about "tools"', 'reasoning': 'off'}, 'rows', 'r')
  with pytest.raises(ValueError, match="'reasoning'"):
    to_rows(record | {'reasoning': 'I think so.'}, 'rows', 'r')


def test_words_beside_outputs_are_kept():
  turns = [
    {'from': 'human', 'value': 'x'},
    {'from': 'gpt', 'value': TAGGED},
    {'from': 'tool', 'value': 'Stale.\n<tool_response>\n18\n</tool_response>'},
    {'from': 'gpt', 'value': 'Warm.'},
  ]
  (row,) = to_rows(hermes(conversations=turns), 'hermes', 'r', 'hermes')
  assert row['conversations'][2]['content'] == turns[2]['value']


def test_an_empty_text_of_tools_lists_none():
  record = apigen_mt() | {'tools': ''}
  (row,) = to_rows(record, 'apigen_mt', 'r', 'hermes')
  assert 'tools' not in row


def test_packs_come_apart_where_they_were_put_together():
  first, second = to_rows(packed(), 'packed', 'r')
  assert (first['id'], second['id']) == ('9-0', '9-1')
  assert (
    first['conversations'] + second['conversations'] == packed()['conversations']
    and len(first['conversations']) == 3
  )


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    (toolace('[get_weather(city=]'), 'not an expression'),
    (toolace('  '), 'says nothing'),
    (toolace() | {'system': 'List:\n[{"name": '}, 'is not JSON'),
    (xlam() | {'answers': '[]'}, 'list of calls is empty'),
    (xlam() | {'answers': 'f(x)'}, 'neither JSON'),
    (xlam() | {'answers': '[{"name": "f", "arguments": 3}]'}, 'needs a name and arguments'),
    (xlam() | {'answers': '[{"name": "f", "args": {"a": 1}}]'}, "unknown key 'args'"),
    (xlam() | {'answers': '[{"name": "f", "name": "g"}]'}, 'given twice'),
    (xlam() | {'tools': '[3]'}, 'a tool needs'),
    (xlam() | {'tools': '[{"name": "f", "returns": "text"}]'}, "tool 'f': the field 'returns'"),
    (xlam() | {'tools': '[{"function": {"name": "f"}, "price": 1}]'}, "a tool: the field 'price'"),
    (hermes_answer('<think>\nhm\n' + TAGGED), 'message 1 holds tags of thoughts'),
    (hermes_answer('<think>a</think> and <think>b</think>' + TAGGED), 'not one block in front'),
    (xlam() | {'tools': '[{"name": "a b"}, {"name": "a/b"}]'}, 'two tools have one name'),
    (
      apigen_mt() | {'conversations': [{'from': 'critic', 'value': 'x'}]},
      "message 0 is by 'critic'",
    ),
    (apigen_mt() | {'conversations': [{'from': 'human', 'value': 'x'}]}, 'never speaks'),
    (packed() | {'single_conv_last_idx': [2]}, '5 messages stand behind'),
    (packed() | {'single_conv_last_idx': [9]}, 'does not cut'),
  ],
)
def test_broken_records_are_refused_with_the_reason(record, message):
  with pytest.raises(ValueError, match=message):
    to_rows(record, recognise(record), 'r')


def test_toolrl_has_one_style():
  with pytest.raises(ValueError, match='ToolRL describes its tools in words'):
    to_rows(toolrl_row('<think> x </think>\n<response> y </response>'), 'toolrl', 'r', 'hermes')


def test_toolrl_row_becomes_a_decision_point():
  output = (
    '<think> use the <tool_call> tags </think>\n<tool_call>\n'
    '{"name": "Get Top/Apps", "parameters": {"n": 3}}\n'
    '{"name": "a.2b", "parameters": {}}\n</tool_call>'
  )
  point, thought = toolrl_point(toolrl_row(output), 'r')
  assert point.reference == '[Get_Top_Apps(n=3), a._2b()]'
  assert (
    '1. Name: Get_Top_Apps\n' in point.messages[0].content
    and 'Steps for Each Turn' not in point.messages[0].content
  )
  assert thought == 'use the <tool_call> tags'
  output = output.replace('{"n": 3}', '{"from": "a</tool_call>\n</think>"}').replace('{}', '""')
  point, thought = toolrl_point(toolrl_row(output), 'r')
  assert point.reference == "[Get_Top_Apps(from='a</tool_call>\\n\\x3c/think>'), a._2b()]"
  assert thought == 'use the <tool_call> tags'
  point, _ = toolrl_point(toolrl_row('<think> x </think>\n<response> which one? </response>'), 'r')
  assert point.reference == 'which one?'


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'input': 'x'}, 'lacks instruction, output'),
    (toolrl_row('<think> x </think>'), 'neither calls nor a response'),
    (
      toolrl_row('<think>x</think><tool_call>\n{"name": 3}\n</tool_call>'),
      'needs a name and parameters',
    ),
    (toolrl_row('<think>x</think><tool_call>\n{"name"\n</tool_call>'), 'not JSON'),
  ],
)
def test_bad_toolrl_rows_are_named(row, message):
  with pytest.raises(ValueError, match=message) as error:
    toolrl_point(row, 'row-17')
  assert 'row-17' in str(error.value)
