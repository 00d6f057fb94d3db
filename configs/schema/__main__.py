"""Print every setting as a Markdown table: `python -m configs.schema`."""

from configs.schema import Config
from configs.schema.documentation import markdown_table

print(markdown_table(Config))
