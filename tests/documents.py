"""The commands that the documents show."""

import re
import shlex
from pathlib import Path


def shell_commands(document: Path) -> list[str]:
    """The commands of a document's shell blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", document.read_text(), re.M | re.S)
    lines = (line for block in blocks for line in block.splitlines())
    words = (shlex.split(line, comments=True) for line in lines)
    return [shlex.join(command) for command in words if command]
