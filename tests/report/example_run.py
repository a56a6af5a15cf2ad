"""An invented run: the shapes of a real one, with numbers and texts that nobody measured."""

import math
from typing import Any

KINDS = ('single', 'sequential', 'parallel', 'irrelevant', 'multi_turn')


def a_stage(accuracy: tuple, lazy: tuple, reflections: float, tokens: float) -> dict[str, Any]:
  return {
    'accuracy': dict(zip(KINDS, accuracy, strict=True)),
    'lazy_ratio': dict(zip(KINDS, lazy, strict=True)),
    'n': dict.fromkeys(KINDS, 128),
    'decomposition_rate': 0.906,
    'reflections_per_response': reflections,
    'reasoning_tokens_mean': tokens,
  }


def a_summary(steps: int = 40) -> dict[str, Any]:
  return {
    'run': {
      'config': 'configs/nano.py',
      'model': 'organism, 1.7 M parameters',
      'device': '2 CPU cores',
      'seed': 0,
    },
    'stages': {
      'base': a_stage(
        (0.945, 0.281, 0.227, 0.24, 0.914), (0.01, 0.609, 0.64, 0.08, 0.05), 6.4, 171.4
      ),
      'sft': a_stage((0.961, 0.633, 0.477, 0.828, 0.906), (0, 0.02, 0.03, 0.0, 0.0), 0.31, 48.2),
      'da_grpo': a_stage((0.969, 0.68, 0.531, 0.836, 0.922), (0, 0.01, 0.02, 0.0, 0.0), 0.52, 55.0),
    },
    'changes': [
      {
        'from': 'base',
        'to': 'sft',
        'accuracy': {
          'single': {'difference': 0.016, 'standard_error': 0.022, 'n': 128},
          'sequential': {'difference': 0.352, 'standard_error': 0.049, 'n': 128},
        },
      },
      {
        'from': 'sft',
        'to': 'da_grpo',
        'accuracy': {'sequential': {'difference': 0.047, 'standard_error': None, 'n': 1}},
      },
    ],
    'distill': {
      'seeds': 600,
      'kept': 431,
      'success_rate': 431 / 600,
      'dropped': {'subtask_count': 41, 'unparsable': 12, 'wrong_call': 104, 'too_long': 12},
    },
    'rl': {
      'zero_variance_fraction': [row['zero_variance_fraction'] for row in rl_rows(steps)],
      'reward': [row['reward'] for row in rl_rows(steps)],
      'entropy': [row['entropy'] for row in rl_rows(steps)],
      'validation': {
        'before': {'reward': 3.4},
        'after': {'reward': 3.46},
        'difference': {'reward': {'difference': 0.06, 'standard_error': 0.05, 'n': 32}},
      },
    },
    'export': 'runs/nano/export',
    'seconds': {
      'evaluate_base': 41.2,
      'distill': 143.0,
      'sft': 182.5,
      'evaluate_sft': 38.0,
      'rl': 255.1,
      'export': 1.3,
    },
  }


def rl_rows(steps: int = 40) -> list[dict[str, Any]]:
  rows = []
  for step in range(steps):
    wave = math.sin(step * 1.7) * 0.05
    right = 0.24 + step / 400 + wave / 2
    wrong = 0.21 - step / 500 - wave / 3
    rows.append(
      {
        'stage': 'rl',
        'step': step,
        'reward': 3.2 + step / 130 + wave,
        'entropy': 0.12 - step / 900 + wave / 5,
        'all_right_fraction': right,
        'all_wrong_fraction': wrong,
        'zero_variance_fraction': right + wrong,
        'reflections': 0.3 + step / 170 + wave,
        'grad_norm': 0.4 + wave * 3,
        'psi_grad_norm': 0.006 + wave / 30,
        'kl': step / 4000,
      }
    )
  return rows


def metric_rows(steps: int = 40) -> list[dict[str, Any]]:
  losses = [
    {
      'stage': 'sft',
      'step': step,
      'loss': 0.2 + math.exp(-step / 12) + 0.02 * math.sin(step * 2.3),
      'tokens_per_second': 9000.0,
    }
    for step in range(steps)
  ]
  return losses + rl_rows(steps)


LAZY = (
  '<think>\nThe user wants the order and then a message. '
  'Wait, maybe I should look at the flight first. But '
  'that is not asked. Alternatively I could refund it. However, the policy says nothing of it. '
  + 'Hmm, wait, let me think again about the order, but perhaps it is the other one. ' * 6
  + 'I will just send it.\n</think>\n\n[send_message(to="Bela", text="R54")]'
)
SHORT = (
  '<think>\nTask decomposition: 1. find the order 2. tell Bela its price.\n'
  'Subtask 1: I use find_order.\n</think>'
  '\n\n[find_order(order_id="R54")]'
)


def a_column(stage: str, text: str, correct: bool, lazy: bool, query: str) -> dict[str, Any]:
  messages = [
    {'role': 'system', 'content': 'Tools: ...'},
    {'role': 'user', 'content': query},
    {'role': 'assistant', 'content': text},
  ]
  if correct:
    messages += [
      {'role': 'tool', 'content': '{"order_id": "R54", "price": 310}'},
      {
        'role': 'assistant',
        'content': '<think>\nSubtask 2: the price is 310.\n</think>\n\n'
        '[send_message(to="Bela", text="310")]',
      },
    ]
  return {'stage': stage, 'correct': correct, 'lazy': lazy, 'messages': messages}


def some_traces() -> list[dict[str, Any]]:
  query = 'Find order R54 and tell Bela what that order costs.'
  other = (
    'Book the flight to Mokira, then move 310 to the savings of Tanu & send <b>her</b> a note.'
  )
  return [
    {
      'query': query,
      'kind': kind,
      'columns': [
        a_column('base', LAZY, False, True, query),
        a_column('sft', SHORT, True, False, query),
        a_column('da_grpo', SHORT, True, False, query),
      ],
    }
    for kind, query in (('sequential', query), ('parallel', other), ('irrelevant', query))
  ]
