"""Run one benchmark, or list them: ``python -m tests.benchmarks partition``."""

import pathlib
import runpy
import sys

HERE = pathlib.Path(__file__).parent


def main() -> None:
    known = sorted(path.stem for path in HERE.glob("[!_]*.py") if "def main" in path.read_text("utf-8"))
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"usage: python -m tests.benchmarks NAME [OPTIONS]\n  known: {', '.join(known)}")
    script = HERE / f"{sys.argv.pop(1)}.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
