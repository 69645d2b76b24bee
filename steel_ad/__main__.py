"""The command steel-ad, which starts the binaries; `python -m steel_ad` is the same."""

import ast
import os
import runpy
import sys
from pathlib import Path

from steel_ad import __version__, cli, recipes


def main() -> None:
    """Runs the binary that the command line names, or lists all."""
    binaries = {p.stem: p for p in sorted(recipes.folder("experiments").glob("*.py")) if p.stem != "__init__"}
    typed = [Path(sys.argv[0]).name] if __name__ != "__main__" else ["python", "-m", "steel_ad"]
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "-help", "--help"):
        print(f"{' '.join(typed)} NAME --help lists the flags of a binary:\n")
        for binary, path in binaries.items():
            what = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            print(f"  {binary:14}{what}")
    elif name == "--version":
        print(__version__)
    elif name not in binaries:
        cli.fail(f"there is no binary {name!r}: use one of {', '.join(binaries)}", 2)
    else:
        cli.program[:] = [*typed, name]
        del sys.argv[1]
        # As `python -m` does, for a user's own modules.
        sys.path.insert(0, os.getcwd())
        runpy.run_path(str(binaries[name]), run_name="__main__")


if __name__ == "__main__":
    main()
