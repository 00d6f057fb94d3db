"""Print every setting as a markdown table: `python -m configs.schema`."""

from configs.schema import Config
from configs.schema.documentation import documentation

print(documentation(Config))
