"""Models and data sets of the Hugging Face hub, by the name `owner/name[@revision]`.

A revision is a branch, a tag or a commit; without one it is the hub's `main`. What is here goes
before the hub: a path, or `owner/name` below the data folder. Downloads go into the hub's own cache
(HF_HOME), which also serves without a network (HF_HUB_OFFLINE=1). Every file that the cache holds
by its hash is compared with it. Weights, configuration, tokenizers and rows are downloaded, and
never Python: a repository's own code is not run.
"""

import hashlib
import pathlib
import re

import huggingface_hub

from dcore_jax.files import data_path

KINDS = ('model', 'dataset')
_NAME = re.compile(r'(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?')
_COMMIT = re.compile(r'[0-9a-f]{40}')
_BLOB = re.compile(r'[0-9a-f]{40}|[0-9a-f]{64}')
_FILES = {
  'model': ('*.safetensors', '*.json', '*.jinja', 'merges.txt', 'tokenizer.model'),
  # A card says which files belong to which configuration and split.
  'dataset': tuple(
    f'*{ending}'
    for plain in ('.json', '.jsonl', '.ndjson', '.csv')
    for ending in (plain, plain + '.gz', plain + '.zst')
  )
  + ('*.parquet', 'README.md'),
}
# Subfolders of a model hold other formats of the same weights; those of a data set hold its parts.
_LEFT_OUT = {'model': ['*/*'], 'dataset': []}
_CHUNK = 1 << 22  # bytes that are hashed at once
# (path, size, time of change) of files whose hash this process has compared.
_verified: set[tuple[str, int, int]] = set()


def is_name(text: str) -> bool:
  """Whether a text can be the name of a model or data set on the hub."""
  return bool(_NAME.fullmatch(text))


def find(name: str, kind: str) -> pathlib.Path:
  """Finds a model or a data set here, or downloads it where only the hub has it.

  Args:
    name: a path, also below the data folder, or `owner/name[@revision]`.
    kind: one of KINDS.

  Raises:
    ValueError: it is nowhere, the hub cannot be reached, or a file differs from its hash.
  """
  # A directory goes before the hub: what was downloaded or trained here is asked for by its path.
  try:
    return data_path(name)
  except ValueError:
    # What cannot be a hub name keeps the error about the directory, which is what was meant.
    if not is_name(name):
      raise
  match = _NAME.fullmatch(name)
  try:
    # It takes what is in the cache where the hub does not answer.
    folder = huggingface_hub.snapshot_download(
      match[1],
      repo_type=kind,
      revision=match[2],
      allow_patterns=list(_FILES[kind]),
      ignore_patterns=_LEFT_OUT[kind],
    )
  except Exception as error:  # whatever the network, the hub or a proxy raises
    reason = ' '.join(str(error).split()).rstrip('.')
    raise ValueError(
      f'{name!r} is no directory here, and it cannot be downloaded from the Hugging Face hub: '
      f'{reason}. Where the hub can be reached, `{command(name, kind)}` puts it into the cache '
      'that HF_HOME names'
    ) from error
  _verify(pathlib.Path(folder), name)
  return pathlib.Path(folder)


def pinned(name: str, kind: str, commits: dict[str, str]) -> str:
  """Returns the name with its commit, `owner/name@commit`; what is here keeps its name.

  Args:
    name: see `find`.
    kind: one of KINDS.
    commits: the commit of each name that was asked for before. A name that it lacks is looked up on
      the hub, downloaded, and added.

  Raises:
    ValueError: see `find`.
  """
  try:
    data_path(name)
    return name
  except ValueError:
    if not is_name(name):
      raise
  if name not in commits:
    # The cache keeps a snapshot in a folder that is named by its commit.
    commits[name] = find(name, kind).name
  elif not _COMMIT.fullmatch(commits[name]):
    raise ValueError(f'{commits[name]!r} is no commit of {name!r}')
  return f'{_NAME.fullmatch(name)[1]}@{commits[name]}'


def without_revision(name: str) -> str:
  """Returns `owner/name` of `owner/name@revision`, and any other name as it is."""
  match = _NAME.fullmatch(name)
  return match[1] if match and match[2] else name


def command(name: str, kind: str) -> str:
  """Returns the command that downloads a model or a data set of the hub into the cache."""
  match = _NAME.fullmatch(name)
  words = ['hf', 'download', match[1]]
  if kind == 'dataset':
    words += ['--repo-type', 'dataset']
  if match[2]:
    words += ['--revision', match[2]]
  return ' '.join(words)


def _verify(folder: pathlib.Path, name: str) -> None:
  """Compares the files of a snapshot with their hashes.

  The cache names a file by what the hub says of it: the SHA-256 of a large file, or Git's SHA-1 of
  a small one. Where the system has no links, a snapshot holds the files themselves, whose hashes
  are not known.

  Raises:
    ValueError: names the file that differs.
  """
  for path in sorted(folder.rglob('*')):
    blob = path.resolve()
    if not path.is_symlink() or not _BLOB.fullmatch(blob.name):
      continue
    status = blob.stat()
    mark = (str(blob), status.st_size, status.st_mtime_ns)
    if mark in _verified:
      continue
    if len(blob.name) == 64:
      digest = hashlib.sha256()
    else:
      digest = hashlib.sha1(b'blob %d\0' % status.st_size, usedforsecurity=False)
    with blob.open('rb') as file:
      while chunk := file.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != blob.name:
      raise ValueError(
        f'{path.relative_to(folder)} of {name!r} is damaged: its hash is {digest.hexdigest()}, and '
        f'the hub has {blob.name}; remove {str(blob)!r}, which downloads it again'
      )
    _verified.add(mark)
