"""Folders of results that belong to one description of what made them."""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.overrides import completed


def claim(
  path: pathlib.Path,
  mine: Mapping[str, Any],
  complaint: str,
  *,
  free: Collection[str] = (),
  defaults: Any = None,
) -> None:
  """Writes down what a folder's results are made from, or checks that it was begun with the same.

  A program that resumes must not mix results of two configs, so that every folder of results holds
  such a record. Fields that only the record in the folder has are ignored: a later version of the
  program may have dropped them.

  Args:
    path: the JSON file of the record, in the folder that is claimed; written anew at every claim.
    mine: what the results depend on, as JSON.
    complaint: what the error says of the folder, up to the names of the fields that differ.
    free: fields that may differ.
    defaults: a config of which the record is the JSON form. Fields that the record in the folder
      lacks take their values from here: the program had no such field when the folder was begun.

  Raises:
    ValueError: the folder belongs to another record; names the folder and every field that differs.
  """
  record = json.loads(json.dumps(mine))  # tuples as lists, as they come back from the file
  if path.exists():
    theirs = read_json(path)
    if defaults is not None:
      theirs = completed(defaults, theirs)
    different = [name for name in record if name not in free and record[name] != theirs.get(name)]
    if different:
      raise ValueError(
        f'{str(path.parent)!r} {complaint} {", ".join(different)}; name another --workdir'
      )
  write_json_atomic(path, record)
