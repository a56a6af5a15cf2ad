"""A task of inspect_ai: items of the file that ITEMS names, {question, answer} a line."""

import os

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def items() -> Task:
  fields = FieldSpec(input='question', target='answer')
  dataset = json_dataset(os.environ['ITEMS'], fields)
  return Task(dataset=dataset, solver=generate(), scorer=includes())
