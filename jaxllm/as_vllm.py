"""Lets a script that imports vllm run on jaxllm: ``import jaxllm.as_vllm`` before it imports anything of vllm.

Afterwards ``vllm`` and the submodules in `jaxllm.aliases.MODULES` are jaxllm's classes under vLLM's names, in this
process only.

    python -m jaxllm.as_vllm script.py [arguments]
    python -m jaxllm.as_vllm -m module [arguments]

run a script, or a module such as ``lm_eval``, that way without changing it.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

from jaxllm.aliases import AliasFinder, AliasModule

#: modules of vLLM's that are commands -> jaxllm's
_COMMANDS = {
    "vllm": "jaxllm",
    "vllm.entrypoints.cli.main": "jaxllm",
    "vllm.entrypoints.openai.api_server": "jaxllm.entrypoints.openai.api_server",
}


def install() -> None:
    """Make ``import vllm`` mean jaxllm. Raises ImportError when vllm itself has been imported already."""
    loaded = sys.modules.get("vllm")
    if loaded is not None and not isinstance(loaded, AliasModule):
        raise ImportError("vllm itself has been imported already; import jaxllm.as_vllm before it")
    if not any(isinstance(finder, AliasFinder) and finder.package == "vllm" for finder in sys.meta_path):
        # before Python's own finders: vllm itself may be installed
        sys.meta_path.insert(0, AliasFinder("vllm"))


def main() -> None:
    """Run the script or the module that the command line names, with its arguments."""
    usage = "usage: python -m jaxllm.as_vllm {script.py | -m module} [arguments]"
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(sys.argv) < 2:
        raise SystemExit(usage)
    if sys.argv[1] == "-m":
        if len(sys.argv) < 3:
            raise SystemExit(usage)
        del sys.argv[:2]
        name = sys.argv[0]
        runpy.run_module(_COMMANDS.get(name, name), run_name="__main__", alter_sys=True)
        return
    script = Path(sys.argv[1])
    if not script.exists():
        raise SystemExit(f"{usage}\nthere is no {script}")
    del sys.argv[0]
    if not sys.flags.safe_path:
        # as `python script.py` does: the modules beside the script are found
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    # The script's imports must find the same module, so it is imported under its own name.
    importlib.import_module("jaxllm.as_vllm")
    main()
else:
    install()
