"""Run forkserver.py, beside this file, from its bytecode: to compile it takes longer than all else it does.

An interpreter keeps the bytecode of what is imported, and of no script. Still a script must be run: it
ends otherwise than `-c` and `-m` do, and the units of a fork server end as it does.
"""

# In every interpreter, under this name, before anything is imported: `importlib.machinery` would have to be.
from _frozen_importlib_external import SourceFileLoader

_path = __file__[: -len("forkboot.py")] + "forkserver.py"
exec(SourceFileLoader(__name__, _path).get_code(__name__))  # type: ignore[arg-type]  # a source has code
