"""HTML pages from Jinja templates that stand beside the code which fills them."""

import pathlib
from typing import Any

import jinja2


def render_page(template: pathlib.Path, **values: Any) -> str:
  """Fills a template with values.

  Values are escaped, since models write some of them: their text stays text, whatever it contains.

  Raises:
    jinja2.UndefinedError: the template names a value that is not given.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(template.parent),
    # Names end in .jinja, from which Jinja would not guess that they are HTML.
    autoescape=True,
    # A misspelled name is an error, not an empty place in a report.
    undefined=jinja2.StrictUndefined,
    # Lines that hold only a template's statement leave no blank line behind.
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(template.name).render(**values)
