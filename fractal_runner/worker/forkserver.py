"""Import what a task's script imports once; then fork a child per unit that runs the script.

Run by path in the task's own interpreter (Python 3.9 or newer, Linux), which need not have this package:

    PYTHON [its options] forkserver.py --directory=DIR --status=FD … -- the command's leading words

One file, because the task's environment has no other of ours; and of the standard library only what is
built in or what every interpreter has loaded when it starts. Whatever else is imported here is taken out
of `sys.modules` again, so that a `json.py` beside the script is found as in a cold start. There is no
`socket`, no `ast`, no `threading` of ours for a task to meet.

The server reads the script's syntax tree and executes its import statements, up to the first statement
that could change what an import does (`Hoist`). Then it says over the status pipe `ready` or `cold`
and why: an import fails, a thread was left running, a file is open. Per unit, on a unix socket:

    server: hello                                          (only now may the client send)
    client: LENGTH \\n run \\0 cwd \\0 log file \\0 number of words \\0 words … \\0 NAME=value …
    server: pid PID                                        or  cold WHY  |  gone WHY  |  error ERRNO WHAT
    server: ended WAIT-STATUS RUSAGE…                      (its sixteen figures, as wait4(2) gave them)

While it imports, the server is the child of the process that was started, whose end is its own; then it
is nobody's: the worker that happened to start it may be ended together with its children.

`gone` is the server's own end: a file of the task has changed. It takes no more units and leaves when
the running ones have ended. A client that leaves does not end its unit. The server ends when it has been
idle, with its owner, or when told (`end`, or a signal); units that still run are left to whoever looks
after their process groups. Told to `retire`, it goes as it does when a file has changed.

What is bounded: a request has at most 16 MiB, what imports print 64 KiB, there are at most 1000
connections, each learned module is kept once, and refused ones are named at most 10,000 times.

What a unit could still notice: `/proc/self/cmdline` is the server's, one frame lies below its
`<module>`, strings hash alike in all units of a server, modules were imported with no arguments in
`sys.argv`, what others were seen to import is in `sys.modules`, its parent and its session are the
server's, and what imported modules hold is flushed at its end, if it is a file, but not finalized.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
    del sys.path[0]  # the directory of this file
_BARE = frozenset(sys.modules) - {"__future__"}  # what every interpreter has when it starts

import _ast  # noqa: E402 - what stands above comes first
import _io  # noqa: E402
import _signal  # type: ignore[import-not-found]  # noqa: E402
import _socket  # noqa: E402
import _thread  # noqa: E402
import errno  # noqa: E402
import gc  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import select  # noqa: E402
import time  # noqa: E402
from atexit import register as _at_exit  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

_AST_ONLY = 0x400  # PyCF_ONLY_AST, as the module `ast` calls it
_MOST_REQUEST = 16 << 20
_MOST_PRINTED = 64 << 10
_MOST_CONNECTIONS = 1000
_MOST_REFUSED = 10_000
_MOST_PASSED = 100
_SLOW_LOOK_S = 1.0
_QUICK_LOOK_S = 0.005
_IMPORTS = (_ast.Import, _ast.ImportFrom)
_FUNCTIONS = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.Lambda)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Calls that neither import nor change what an import does. Read from the text, not resolved: who calls
# something else `Path` is in for a surprise.
_HARMLESS = _words(
    "bool bytes dict float frozenset int len list max min object range set slice sorted str tuple "
    "logging.getLogger getLogger typing.TypeVar TypeVar typing.ParamSpec ParamSpec typing.NewType NewType "
    "collections.namedtuple namedtuple pathlib.Path Path re.compile os.getenv os.environ.get os.path.join "
    "os.path.dirname os.path.abspath os.path.realpath os.path.basename functools.partial partial "
    "datetime.timedelta timedelta decimal.Decimal Decimal fractions.Fraction"
)
_HARMLESS_METHODS = _words(
    "absolute encode expanduser format join joinpath lower resolve split strip upper with_name with_suffix"
)
# What a function or a class may not touch without making it matter when a module is imported.
_CHANGING = _words(
    "putenv unsetenv meta_path path_hooks path_importer_cache chdir fchdir switch_backend filterwarnings "
    "simplefilter set_start_method dont_write_bytecode setdlopenflags addaudithook"
)
_OF_SYS = _words("path modules")
_READING = _words("copy get items keys values")


class Hoist:
    """The imports that a script does before anything could change what they do.

    Args:
        tree: the script's syntax tree.

    Attributes:
        statements: import statements, in order, to be executed as they stand.
        complete: whether they are all that it has outside its functions.
        learnable: whether modules that its functions import may be imported beforehand as well: nothing
            in it, functions included, touches the environment or the ways of imports.
    """

    def __init__(self, tree: _ast.Module) -> None:
        self.statements: list[_ast.stmt] = []
        self.complete = True
        self._stopped = False
        self._block(tree.body)
        self.learnable = self.complete and not any(_changes_imports(node) for node in tree.body)

    def _block(self, block: Iterable[_ast.stmt]) -> None:
        for statement in block:
            if self._stopped:
                self._leave_out(statement)
            elif not self._passes(statement):
                self._stopped = True
                self._leave_out(statement)

    def _passes(self, node: _ast.stmt) -> bool:
        """Whether what follows `node` is still certain to be as if it stood first."""
        if isinstance(node, _IMPORTS):
            if getattr(node, "module", None) != "__future__":
                self.statements.append(node)
            return True
        if isinstance(node, _ast.If):
            truth = _truth(node.test)
            if truth is not None:
                self._block(node.body if truth else node.orelse)
            return truth is not None
        if isinstance(node, _ast.Try):
            if only := _only_imports(node):
                self.statements.append(node)
            return only
        if isinstance(node, (_ast.FunctionDef, _ast.AsyncFunctionDef)):
            evaluated = (*node.decorator_list, node.args)
            return not any(_changes_imports(part) for part in evaluated)
        if isinstance(node, _ast.ClassDef):
            return not _changes_imports(node) and not any(isinstance(n, _IMPORTS) for n in _eager(node))
        return _is_harmless_statement(node)

    def _leave_out(self, node: _ast.AST) -> None:
        if isinstance(node, _ast.If) and _truth(node.test) is not None:
            for statement in node.body if _truth(node.test) else node.orelse:
                self._leave_out(statement)
        elif any(isinstance(inner, _IMPORTS) for inner in _eager(node)):
            self.complete = False


def _children(node: _ast.AST) -> Iterator[_ast.AST]:
    for name in node._fields:
        value = getattr(node, name, None)
        for child in value if isinstance(value, list) else (value,):
            if isinstance(child, _ast.AST):
                yield child


def _eager(node: _ast.AST) -> Iterator[_ast.AST]:
    """The node and what is in it, but for the bodies of functions."""
    yield node
    if not isinstance(node, _FUNCTIONS):
        for child in _children(node):
            yield from _eager(child)


def _dotted(node: _ast.AST) -> str:
    if isinstance(node, _ast.Name):
        return node.id
    if isinstance(node, _ast.Attribute) and (start := _dotted(node.value)):
        return f"{start}.{node.attr}"
    return ""


def _truth(test: _ast.expr) -> bool | None:
    """What a condition is in the script that is run, where that is certain."""
    if _dotted(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "t.TYPE_CHECKING"):
        return False
    if isinstance(test, _ast.Compare) and _dotted(test.left) == "__name__":
        right = test.comparators[0]
        is_main = isinstance(right, _ast.Constant) and right.value == "__main__"
        return True if is_main and isinstance(test.ops[0], _ast.Eq) and len(test.ops) == 1 else None
    for node in _eager(test):
        if isinstance(node, _ast.Name) and node.id not in ("sys", "os"):
            return None
        if isinstance(node, _ast.Attribute) and _dotted(node) not in (
            *("sys.version_info", "sys.version_info.major", "sys.version_info.minor"),
            *("sys.platform", "os.name"),
        ):
            return None
        if isinstance(node, (_ast.Call, *_FUNCTIONS, _ast.NamedExpr)):
            return None
    try:
        expression: Any = _ast.Expression(test)
        return bool(eval(compile(expression, "<condition>", "eval"), {"sys": sys, "os": os}))
    except Exception:  # whatever it is, the condition is not certain
        return None


def _only_imports(node: _ast.Try) -> bool:
    """Whether a try statement does nothing but import, and note what could not be."""
    blocks = [node.body, node.orelse, node.finalbody, *(handler.body for handler in node.handlers)]
    types = [handler.type for handler in node.handlers if handler.type is not None]
    names = [name for kind in types for name in (kind.elts if isinstance(kind, _ast.Tuple) else [kind])]
    return all(map(_dotted, names)) and all(
        isinstance(inner, (*_IMPORTS, _ast.Pass))
        or (
            isinstance(inner, _ast.Assign)
            and isinstance(inner.value, _ast.Constant)
            and _is_harmless_statement(inner)
        )
        for block in blocks
        for inner in block
    )


def _is_harmless_statement(node: _ast.stmt) -> bool:
    if isinstance(node, _ast.Pass):
        return True
    if isinstance(node, _ast.Expr):
        return isinstance(node.value, _ast.Constant)
    if isinstance(node, _ast.Assign):
        names = [
            name
            for target in node.targets
            for name in (target.elts if isinstance(target, _ast.Tuple) else [target])
        ]
    elif isinstance(node, _ast.AnnAssign):
        names = [node.target]
    else:
        return type(node).__name__ == "TypeAlias"  # Python 3.12
    plain = all(
        isinstance(n, _ast.Name) and not (n.id[:2] == n.id[-2:] == "__" and n.id != "__all__") for n in names
    )
    # Annotations are expressions that are evaluated too, but for names of types.
    return plain and (node.value is None or _is_harmless(node.value))


def _is_harmless(node: _ast.expr) -> bool:
    for inner in _eager(node):
        if isinstance(inner, (_ast.NamedExpr, _ast.Await, _ast.Yield, _ast.YieldFrom)):
            return False
        if isinstance(inner, _ast.Call) and _dotted(inner.func) not in _HARMLESS:
            method = isinstance(inner.func, _ast.Attribute) and inner.func.attr in _HARMLESS_METHODS
            if not method or _dotted(inner.func):
                return False  # a method of what another call or a constant gave is fine, of a name is not
    return not _changes_imports(node)


def _changes_imports(node: _ast.AST) -> bool:
    """Whether the environment, sys.path or their like are touched in it, other than to be read."""
    if isinstance(node, _ast.Subscript) and isinstance(node.ctx, _ast.Load) and _is_environ(node.value):
        return _changes_imports(node.slice)
    if isinstance(node, _ast.Attribute):
        if node.attr in _READING and _is_environ(node.value):
            return False
        if node.attr in _CHANGING or _is_environ(node):
            return True
        if node.attr in _OF_SYS and _dotted(node.value) == "sys":
            return True
        if node.attr == "use" and _dotted(node.value) in ("matplotlib", "mpl"):
            return True
    if isinstance(node, _ast.Name) and (node.id in _CHANGING or _is_environ(node)):
        return True
    return any(map(_changes_imports, _children(node)))


def _is_environ(node: _ast.AST) -> bool:
    name = node.attr if isinstance(node, _ast.Attribute) else getattr(node, "id", None)
    return name in ("environ", "environb")


class _Cold(Exception):
    """Why this task must not be started warm."""


class _Program:
    """The task's script or module: imported beforehand, and run again in each unit.

    Args:
        kind: "script" or "module".
        name: the script's path, as the interpreter is given it, or the module's name.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        self.main = type(sys)("__main__")
        self.printed = b""
        self.hoist = Hoist(_ast.Module(body=[], type_ignores=[]))
        self.code: Any = None
        self._own_name = ""
        self._files: dict[str, tuple[int, ...] | None] = {}
        self._directories: dict[str, tuple[tuple[int, ...] | None, set[str]]] = {}
        self._initial: dict[str, Any] = {}

    def load(self, capture: str) -> None:
        """Execute its imports, as `__main__` and from where a cold start would.

        Args:
            capture: a file to be, for what they print.

        Raises:
            _Cold: if it must be started cold.
        """
        own = globals()
        self._initial = {
            name: {} if name == "__annotations__" else None
            for name in own
            if name in ("__doc__", "__package__", "__spec__", "__annotations__", "__cached__")
        }
        self._initial.update(__name__="__main__", __builtins__=own["__builtins__"])
        sys.modules["__main__"] = self.main
        for name in list(sys.modules):
            # In Python 3.9 a second `atexit` would be another one, with no handlers.
            if name not in _BARE and (name != "atexit" or sys.version_info >= (3, 10)):
                _ours[name] = sys.modules.pop(name)
        try:
            with _Captured(capture) as captured:
                source, path = self._find_module() if self.kind == "module" else self._find_script()
                self._execute_imports(source, path)
        except _Cold:
            raise
        except BaseException as error:  # imports are anybody's code, and may exit as well
            what = f"{type(error).__name__}: {error}"
            raise _Cold(f"Its imports fail ({what[:300]}).") from None
        self.printed = captured.text
        if len(self.printed) >= _MOST_PRINTED:
            raise _Cold("Its imports print more than can be repeated for each unit.")
        self.main.__dict__.clear()
        self.main.__dict__.update(self._initial)
        if self._own_name in sys.modules:
            raise _Cold(f"Its imports import {self._own_name} once more, under its own name.")
        self.look()

    def _find_script(self) -> tuple[bytes, str]:
        path = os.path.realpath(self.name)
        if not os.path.isfile(path):
            raise _Cold(f"{self.name} is not a file.")
        if not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
            sys.path.insert(0, os.path.dirname(path))
        sys.argv = [self.name]
        full = self.name
        if not os.path.isabs(full):  # as the interpreter does it: made absolute, not made pretty
            full = os.path.join(os.getcwd(), full)
        self._files[path] = _signature(path)
        source = _read(path)
        # The loader's class is importlib's, as it stands in this very file's `__main__`.
        loader = type(globals()["__loader__"])("__main__", full)
        self._initial.update(__file__=full, __loader__=loader)
        self.code = compile(source, full, "exec", dont_inherit=True)
        return source, full

    def _find_module(self) -> tuple[bytes, str]:
        if not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
            sys.path.insert(0, os.getcwd())
        sys.argv = ["-m"]
        import runpy  # as the interpreter does it for -m

        find: Any = runpy._get_module_details  # type: ignore[attr-defined]
        _, spec, _ = find(self.name)
        if not spec.origin or not spec.origin.endswith(".py"):
            raise _Cold(f"The source of {self.name} is not a file.")
        sys.argv = [spec.origin]
        self._own_name = spec.name
        self._initial.update(
            __spec__=spec,
            __package__=spec.parent,
            __loader__=spec.loader,
            __file__=spec.origin,
            __cached__=spec.cached,
        )
        self._files[spec.origin] = _signature(spec.origin)
        return _read(spec.origin), spec.origin

    def _execute_imports(self, source: bytes, path: str) -> None:
        tree: Any = compile(source, path, "exec", _AST_ONLY, dont_inherit=True)
        self.hoist = Hoist(tree)
        self.main.__dict__.update(self._initial)
        for statement in self.hoist.statements:
            module: Any = _ast.Module(body=[statement], type_ignores=[])
            exec(compile(module, path, "exec", dont_inherit=True), self.main.__dict__)
        if self.kind == "module":  # where runpy finds what it leaves to its own units
            self._initial = {**self._initial, "__spec__": None, "__package__": None}

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A new `__main__`, and what to call with which arguments to run the program in it."""
        # A new one, because the old one is frozen: nothing in a circle with it would ever be finalized. An
        # imported module that holds the old one finds in it what is in the new one.
        main = type(sys)("__main__")
        main.__dict__.update(self._initial)
        self.main.__dict__.clear()
        self.main.__dict__["__getattr__"] = lambda name: getattr(sys.modules["__main__"], name)
        sys.modules["__main__"] = main
        if self.kind == "module":
            runpy = sys.modules["runpy"]
            return runpy._run_module_as_main, (self.name,)
        return exec, (self.code, main.__dict__)

    def look(self) -> None:
        """Note the state of the files that the imported modules came from, as far as they may change."""
        prefixes = tuple({os.path.join(p, "") for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)})
        beside = os.path.join(os.path.dirname(next(iter(self._files))), "")
        for module in list(sys.modules.values()):
            path = getattr(module, "__file__", None)
            if isinstance(path, str) and (path.startswith(beside) or not path.startswith(prefixes)):
                self._files.setdefault(path, _signature(path))
        for path in sys.path:  # what is installed, or removed, changes the directory
            if path.startswith(prefixes) and path + os.sep != beside:
                self._directories.setdefault(path, (_signature(path), _names_in(path)))

    def changed(self) -> str | None:
        """One of those files, if it is no longer what it was."""
        for path, signature in self._files.items():
            if _signature(path) != signature:
                return path
        for path, (signature, names) in self._directories.items():
            found = _signature(path)
            if found != signature:
                if _names_in(path) != names:
                    return path
                self._directories[path] = found, names  # a __pycache__, or something that has gone again
        return None


_own_fds: set[int] = set()  # descriptors that were put out of the way
_ours: dict[str, Any] = {}  # modules that this file imported and the task has not


class _Captured:
    """Descriptors 1 and 2 into a file, for a while.

    Attributes:
        text: what was written to them.
    """

    def __init__(self, path: str) -> None:
        self.text = b""
        self._path = path

    def __enter__(self) -> _Captured:
        self._saved = [_out_of_the_way(os.dup(1)), _out_of_the_way(os.dup(2))]
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._file = _out_of_the_way(os.open(self._path, flags, 0o600))
        os.dup2(self._file, 1)
        os.dup2(self._file, 2)
        return self

    def __exit__(self, *_: object) -> None:
        # What is still in a buffer of theirs remains there, for each unit to write when it would have.
        self.text = os.pread(self._file, _MOST_PRINTED, 0)
        for fd, saved in enumerate(self._saved, start=1):
            os.dup2(saved, fd)
            os.close(saved)
        os.close(self._file)
        os.unlink(self._path)


class _Draws:
    """Which random generators are made without a seed while modules are imported.

    In a cold start each process makes its own; forked, all units would draw the same from them. Those that
    were given a seed stay as they are. (Those of the modules `random` and `numpy.random` themselves are seen
    to elsewhere.)
    """

    def __init__(self) -> None:
        self._randoms: dict[int, Any] = {}
        self._entropies: set[int] = set()
        self._bits: list[Any] = []
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> _Draws:
        sys.meta_path.insert(0, self)
        for name in ("random", "numpy.random.bit_generator"):
            if name in sys.modules:
                self._listen_to(sys.modules[name])
        return self

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        for undo in self._undo:
            undo()
        self._undo.clear()
        kind = getattr(sys.modules.get("numpy.random"), "BitGenerator", None)
        if self._entropies and isinstance(kind, type):
            self._bits += [
                found
                for found in gc.get_objects()
                if isinstance(found, kind)
                and getattr(getattr(found, "seed_seq", None), "entropy", None) in self._entropies
            ]
        self._entropies.clear()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As a finder has it: what the others find, but for these two with an ear on it."""
        if name not in ("random", "numpy.random.bit_generator"):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        loader: Any = getattr(spec, "loader", None)
        if hasattr(loader, "exec_module") and hasattr(loader, "__dict__"):

            def exec_module(module: Any) -> None:
                del loader.exec_module
                loader.exec_module(module)
                self._listen_to(module)

            loader.exec_module = exec_module
        return spec

    def renew(self) -> None:
        """Give them what a process of its own would have had."""
        for random in self._randoms.values():
            random.seed()
        for bits in self._bits:
            bits.state = type(bits)().state

    def _listen_to(self, module: Any) -> None:
        kind, draw = getattr(module, "Random", None), getattr(module, "randbits", None)
        if isinstance(kind, type) and {"seed", "setstate"} <= vars(kind).keys():
            seed, setstate = kind.seed, kind.setstate  # type: ignore[attr-defined]

            def heard_seed(random: Any, a: Any = None, *more: Any, **named: Any) -> Any:
                self._randoms.pop(id(random), None)
                if a is None:
                    self._randoms[id(random)] = random
                return seed(random, a, *more, **named)

            def heard_setstate(random: Any, state: Any) -> Any:
                self._randoms.pop(id(random), None)
                return setstate(random, state)

            kind.seed, kind.setstate = heard_seed, heard_setstate  # type: ignore[attr-defined]
            self._undo += [lambda: setattr(kind, "seed", seed), lambda: setattr(kind, "setstate", setstate)]
        elif callable(draw):

            def heard_draw(count: int) -> int:
                drawn: int = draw(count)
                self._entropies.add(drawn)
                return drawn

            module.randbits = heard_draw
            self._undo.append(lambda: setattr(module, "randbits", draw))


def _out_of_the_way(fd: int) -> int:
    """The same file under a number that leaves the lowest ones to what imports open, as they would get."""
    for high in range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1024) - 1, fd, -1):
        try:
            os.fstat(high)
        except OSError:
            os.dup2(fd, high, inheritable=False)
            os.close(fd)
            _own_fds.add(high)
            return high
    _own_fds.add(fd)
    return fd


def _signature(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _names_in(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory)) - {"__pycache__"}
    except OSError:
        return set()


def _read(path: str) -> bytes:
    with _io.open(path, "rb") as file:
        return file.read()


def _flush(*files: Any) -> None:
    for file in files:
        try:
            file.flush()
        except Exception:  # closed, detached, or not a file at all: a task may put anything there
            continue


def _must_be_cold(childless: bool = True, own: Iterable[int] = ()) -> str | None:
    """What the imports have left behind that a fork would break.

    Args:
        childless: whether this process should have no children.
        own: descriptors that are the server's.
    """
    time.sleep(_QUICK_LOOK_S)  # a thread that was started a moment ago is not counted before it runs
    if _thread._count() or len(sys._current_frames()) > 1:
        threading = sys.modules.get("threading")
        names = [t.name for t in threading.enumerate()[1:]] if threading else []
        return f"Its imports leave {_thread._count()} thread(s) running: {', '.join(names) or 'unnamed'}."
    torch = sys.modules.get("torch.cuda")
    if torch is not None and torch.is_initialized():
        return "Its imports have initialised CUDA (torch)."
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri/")):
            return f"Its imports have opened a device that no fork can share: {target}."
        is_own = int(fd) <= 2 or int(fd) in _own_fds or int(fd) in own
        if not is_own and not target.startswith("/dev/") and not os.path.isdir(target):
            # Units would share its place in the file, or its connection.
            return f"Its imports keep a file open: {target}."
    if childless and _has_children():
        return "Its imports have started a process."
    weakref = sys.modules.get("weakref")
    for info in list(weakref.finalize._registry.values()) if weakref else ():
        if getattr(info.func, "__module__", None) in ("tempfile", "shutil"):
            return "Its imports make a temporary directory, which the first unit to end would remove."
    return None


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class _Connection:
    """A client, from its connection to the end of its unit."""

    __slots__ = ("data", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.data = bytearray()

    def request(self) -> list[bytes] | None:
        """The fields of its request, once it is complete.

        Raises:
            ValueError: if that will never be.
        """
        head, separator, _ = bytes(self.data[:20]).partition(b"\n")
        if not separator:
            if len(head) == 20:
                raise ValueError
            return None
        length = int(head)
        if not 0 <= length <= _MOST_REQUEST:
            raise ValueError
        start = len(head) + 1
        if len(self.data) < start + length:
            return None
        return bytes(self.data[start : start + length]).split(b"\0")

    def say(self, text: str) -> bool:
        """Whether it is still there to be told; if not, its unit is looked after by others."""
        try:
            os.write(self.fd, text.replace("\n", " ").encode(errors="replace") + b"\n")
        except OSError:
            return False
        return True


class _Unit:
    """What the process of a unit is to do, and what it knows of itself."""

    def __init__(self, server: _Server) -> None:
        self.pid = os.getpid()
        self.call: Any = server.program.call()
        self.is_module = server.program.kind == "module"
        self.directory = server.directory
        self.learning = server.program.hoist.learnable and server.learns
        self.refused = server.refused
        self.code: int | None = None  # how it ends, once that is known
        self.frozen_files = server.frozen_files
        self.known = server.known
        self._before = self._ways()

    def failed(self, error: BaseException) -> None:
        """Its script has raised."""
        if isinstance(error, SystemExit):
            self.code = _exit_code(error)
            if self.is_module and self.code == 1 and not isinstance(error.code, int):
                # Now: at the end of a script, as which all this runs, buffers are emptied first.
                sys.stderr.write(f"{error.code}\n")
                error.code = 1
            return
        # A KeyboardInterrupt ends an interpreter by SIGINT itself, once all else is done.
        self.code = None if isinstance(error, KeyboardInterrupt) else 1
        theirs = getattr(sys, "excepthook", None)

        def hook(kind: type, value: BaseException, traceback: Any) -> object:
            """Theirs, without the frames of this file."""
            if theirs is None:
                del sys.excepthook
                sys.stderr.write("sys.excepthook is missing\n")
            else:
                sys.excepthook = theirs
            while traceback is not None and traceback.tb_frame.f_globals is globals():
                traceback = traceback.tb_next
            sys.last_traceback = value.__traceback__ = traceback
            try:
                return (theirs or sys.__excepthook__)(kind, value, traceback)
            except SystemExit as exit:
                self.code = _exit_code(exit)
                raise

        def already_told(*_: object) -> None:
            if theirs is None:
                del sys.excepthook
            else:
                sys.excepthook = theirs
            sys.last_traceback = error.__traceback__ = traceback

        sys.excepthook = hook
        if self.is_module:
            sys.last_type, sys.last_value = type(error), error
            hook(type(error), error, error.__traceback__)
            traceback = error.__traceback__
            sys.excepthook = already_told

    def report(self) -> None:
        """Leave a note of the modules that were imported in addition."""
        if not self.learning or os.getpid() != self.pid or self._ways() != self._before:
            return
        found = []
        for name in self._new_modules():
            if name in self.refused or name in ("__main__", "__mp_main__"):
                continue
            spec: Any = getattr(sys.modules[name], "__spec__", None)
            if getattr(spec, "name", None) == name:
                found.append(f"{name}\0{spec.origin or ''}")
        if not found:
            return
        path = f"{self.directory}/learned-{self.pid}"
        try:
            with _io.open(f"{path}~", "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write("\n".join(found))
            os.rename(f"{path}~", path)
        except OSError:
            return  # the server has gone

    def _ways(self) -> tuple[Any, ...]:
        """What the imports of a unit may depend on, if it changes it."""
        return dict(os.environ), list(sys.path), list(sys.meta_path), list(sys.path_hooks), os.getcwd()

    def end(self) -> None:
        """The last of the exit handlers: leave as the interpreter does, but for what costs too much.

        To take down all modules one by one takes longer than many a unit. What this process made itself is
        taken down here; what it has from the server ends with its memory. Left to the interpreter are those
        that end otherwise than by an exit code, that may have warnings for their end, or whose C libraries
        could not be told of it.
        """
        if os.getpid() != self.pid:
            return
        leave = self._way_out()
        if leave is None or self.code is None:
            _flush(*_open_files(), *self.frozen_files)  # nor does it finalize what is frozen
            self.frozen_files = []
            return
        try:
            for file in (getattr(sys, "stdout", None), getattr(sys, "stderr", None)):
                if file is not None:
                    file.flush()
        except Exception:  # of a stream that a task has put there: the interpreter has words for it
            return
        try:
            for name in ("last_type", "last_value", "last_traceback", "last_exc"):
                if hasattr(sys, name):
                    setattr(sys, name, None)
            for name in self._new_modules():
                del sys.modules[name]
            del sys.modules["__main__"]
            gc.collect()
        finally:
            _flush(*_open_files(), *self.frozen_files, sys.__stdout__, sys.__stderr__)
            leave(self.code)

    def _new_modules(self) -> list[str]:
        """The names of modules that the server has not, in the order of their imports.

        Found from the last one on, as long as there are any: to touch the name of each is to copy the pages
        that thousands of them share with the server. What lies behind that many which are known, because a
        task has taken a module out and put it back, is left where it is.
        """
        found: list[str] = []
        passed = 0
        for name in reversed(list(sys.modules) if type(sys.modules) is not dict else sys.modules):
            if name not in self.known:
                found.append(name)
                passed = 0
                continue
            passed += 1
            if passed == _MOST_PASSED:
                break
        return found[::-1]

    def _way_out(self) -> Callable[[int], object] | None:
        """How to end this process at once, with what C libraries do when it exits."""
        if sys.warnoptions or sys.flags.dev_mode:
            return None
        ctypes = sys.modules.get("ctypes")
        if ctypes is not None:
            return getattr(ctypes.pythonapi, "exit", None)  # holding the lock: no thread goes on meanwhile
        for module in list(sys.modules.values()):
            path = getattr(module, "__file__", None)
            if isinstance(path, str) and path.endswith(".so") and "lib-dynload" not in path:
                return None
        return os._exit  # nothing but the interpreter's own is loaded


def _pass_over_a_flush() -> None:
    """Leave buffers at the end of a module, which is run as part of a script here, as they are otherwise.

    At the end of a script the interpreter empties that of stderr first, then that of stdout; those of a
    module only when all else is done, and in the other order.
    """
    files: list[Any] = [getattr(sys, name, None) for name in ("stdout", "stderr")]
    main = _thread.get_ident()

    def passing_over(file: Any, times: int) -> Callable[[], object]:
        def flush() -> object:
            nonlocal times
            if _thread.get_ident() != main:
                return type(file).flush(file)
            times -= 1
            if times == 0:
                del file.flush
            return None

        return flush

    for file in files:
        if "flush" not in getattr(file, "__dict__", ("flush",)):  # a task may put anything there
            file.flush = passing_over(file, sum(other is file for other in files))


def _exit_code(error: SystemExit) -> int:
    """As the interpreter has it: nothing is 0, a number itself, all else is printed and 1."""
    code = error.code
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def _open_files() -> list[Any]:
    """Files that hold something to write, the outermost layers first. Frozen objects do not show."""
    files = [o for o in gc.get_objects() if issubclass(type(o), _io._IOBase)]
    return sorted(files, key=lambda file: not issubclass(type(file), _io._TextIOBase))


class _Running:
    """A process of ours: a unit, or a trial of modules."""

    __slots__ = ("connection", "fd", "pid")

    def __init__(self, pid: int, connection: _Connection | None) -> None:
        self.pid = pid
        self.connection = connection
        self.fd = -1
        if hasattr(os, "pidfd_open"):
            try:
                self.fd = os.pidfd_open(pid)
            except OSError:
                return  # an old kernel: it is looked at now and then


class _Server:
    """The loop. One thread, one process; everything in it belongs to that thread."""

    def __init__(self, options: dict[str, str], words: list[str]) -> None:
        self.directory = options["directory"]
        self.words = [os.fsencode(word) for word in words]
        self.cwd = os.fsencode(os.getcwd())
        self.environment = dict(os.environb)
        self.varying = frozenset(os.fsencode(options["varying"]).split(b","))
        self.idle_s = float(options["idle"])
        self.import_timeout_s = float(options["import-timeout"])
        self.learns = options["learn"] == "1"
        self.owner = int(options["owner"])
        self.owner_ticks = options["owner-ticks"]
        self.program = _Program(options["kind"], options["name"])
        self.orig_argv = _interpreter_words(options)
        self.refused: set[str] = set()
        self.draws = _Draws()
        self.frozen_files: list[Any] = []
        self.known: frozenset[str] = frozenset()
        self.socket = f"{self.directory}/socket"
        self._learned: list[str] = []
        self._wanted: dict[str, str] = {}
        self._trial: _Running | None = None
        self._running: dict[int, _Running] = {}
        self._by_fd: dict[int, _Running] = {}
        self._connections: dict[int, _Connection] = {}
        self._gone = ""
        self._forked = 0
        self._since = time.monotonic()

    def prepare(self) -> None:
        """Import.

        Raises:
            _Cold: if the task must be started cold.
        """
        if sys.platform != "linux":
            raise _Cold(f"Processes are forked on Linux only, not on {sys.platform}.")
        # A hanging import, with or without an owner to see it, ends with this process.
        _signal.setitimer(_signal.ITIMER_REAL, self.import_timeout_s)
        with self.draws:
            self.program.load(f"{self.directory}/printed")
        _signal.setitimer(_signal.ITIMER_REAL, 0)
        if why := _must_be_cold():
            raise _Cold(why)
        self._settle()

    def _settle(self) -> None:
        """What there is now is to be shared by all units for good."""
        sys.path_importer_cache.clear()  # a unit makes what it needs of it, and knows what it finds then
        gc.collect()
        self.frozen_files = _open_files()
        self.known = frozenset(sys.modules)
        gc.freeze()

    def listen(self) -> None:
        self.pid = os.getpid()
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self._listener.bind(self.socket)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._listener.fileno(), select.POLLIN)
        self._owner_fd = -1
        if hasattr(os, "pidfd_open"):
            try:
                self._owner_fd = os.pidfd_open(self.owner)
            except ProcessLookupError:
                self.leave("its owner has ended")
            except OSError as error:
                _log(f"The owner is looked at now and then: {error}.")
            else:
                self._poll.register(self._owner_fd, select.POLLIN)
        if not self._owner_lives():
            self.leave("its owner has ended")

    def serve(self) -> _Unit:
        """Serve. Returns only in the process of a unit; the server itself leaves."""
        while True:
            if not self._busy() and self._gone:
                self.leave(self._gone)
            left = self._since + self.idle_s - time.monotonic()
            if not self._busy() and not self._connections and left <= 0:
                self.leave(f"it was idle for {self.idle_s:g} s")
            for fd, _ in self._poll.poll(self._pause(left) * 1000):
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._owner_fd:
                    self.leave("its owner has ended")
                elif fd in self._by_fd:
                    self._reap(self._by_fd[fd])
                elif fd in self._connections:
                    unit = self._receive(self._connections[fd])
                    if unit is not None:
                        return unit
            if self._owner_fd < 0 and not self._owner_lives():
                self.leave("its owner has ended")
            for running in [one for one in self._running.values() if one.fd < 0]:
                self._reap(running)
            self._try_modules()

    def _busy(self) -> bool:
        return bool(self._running)

    def _pause(self, left: float) -> float:
        if any(running.fd < 0 for running in self._running.values()):
            return _QUICK_LOOK_S
        pause = max(0.0, left) if not self._busy() else 3600.0
        return pause if self._owner_fd >= 0 else min(pause, _SLOW_LOOK_S)

    def _owner_lives(self) -> bool:
        try:
            text = _read(f"/proc/{self.owner}/stat")
        except OSError:
            return False
        fields = text[text.rfind(b")") + 2 :].split()
        return fields[0] not in (b"Z", b"X") and fields[19].decode() == self.owner_ticks

    def _accept(self) -> None:
        try:
            fd: int = self._listener._accept()[0]  # type: ignore[attr-defined]
        except OSError:
            return  # it has gone already, or there are too many files: it will try again
        if len(self._connections) >= _MOST_CONNECTIONS:
            os.close(fd)
            return
        os.set_blocking(fd, False)
        self._connections[fd] = connection = _Connection(fd)
        self._poll.register(fd, select.POLLIN)
        connection.say("hello")

    def _receive(self, connection: _Connection) -> _Unit | None:
        try:
            data = os.read(connection.fd, 1 << 18)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        connection.data += data
        try:
            request = connection.request() if data else []
        except ValueError:
            request = []
        if request is None:
            return None
        idle = 0.0 if self._running else time.monotonic() - self._since
        if request != [b"status"]:  # to be asked is no work
            self._since = time.monotonic()
        self._poll.unregister(connection.fd)
        del self._connections[connection.fd]
        if request and request[0] == b"run":
            return self._start(connection, request)
        if request == [b"status"]:
            connection.say(
                f"forked={self._forked} running={len(self._running)} trial={self._trial is not None} "
                f"idle={idle:.3f} "
                f"hoisted={len(self.program.hoist.statements)} learnable={self.program.hoist.learnable} "
                f"learned={','.join(self._learned)} refused={','.join(sorted(self.refused))}"
            )
        os.close(connection.fd)
        if request == [b"end"]:
            self.leave("it was told to")
        if request == [b"retire"]:
            self._retire("It was told to take no more units.")
        return None

    def _start(self, connection: _Connection, request: list[bytes]) -> _Unit | None:
        """Fork a unit: itself in its process, None in the server's."""
        try:
            _, cwd, log, count, *rest = request
            words, entries = rest[: int(count)], rest[int(count) :]
            environment = dict(entry.split(b"=", 1) for entry in entries)
        except ValueError:
            os.close(connection.fd)
            return None
        refusal = self._refusal(cwd, words, environment)
        if refusal:
            connection.say(refusal)
            os.close(connection.fd)
            return None
        poll = select.poll()
        poll.register(connection.fd, 0)
        if poll.poll(0):  # POLLHUP: who asked has gone, and may have had it started elsewhere
            os.close(connection.fd)
            return None
        log_fd = -1
        try:
            # As spawn.py opens it.
            log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
            pid = os.fork()
        except OSError as error:
            if log_fd >= 0:
                os.close(log_fd)
            connection.say(f"error {error.errno or errno.EIO} {error}")
            os.close(connection.fd)
            return None
        if pid == 0:
            try:
                arguments = [os.fsdecode(word) for word in words[len(self.words) :]]
                return self._become(connection, log_fd, environment, arguments)
            except BaseException as error:  # this fork must not go on as a second server
                os.write(2, f"fractal_runner could not start this unit: {error!r}\n".encode())
                os._exit(1)
        os.close(log_fd)
        _set_group(pid)
        if not connection.say(f"pid {pid}"):
            os.killpg(pid, _signal.SIGKILL)  # who asked for it has gone, and nobody knows of it
        self._forked += 1
        self._watch(_Running(pid, connection))
        return None

    def _refusal(self, cwd: bytes, words: list[bytes], environment: dict[bytes, bytes]) -> str | None:
        if self._gone:
            return f"gone {self._gone}"
        if words[: len(self.words)] != self.words:
            return "cold The server is another command's."
        if cwd != self.cwd:
            return f"cold It is started in {os.fsdecode(cwd)}, its server was in {os.fsdecode(self.cwd)}."
        names = {*environment, *self.environment} - self.varying
        if other := sorted(n for n in names if environment.get(n) != self.environment.get(n)):
            listed = os.fsdecode(b", ".join(other[:5]))
            return f"cold Its environment differs from its server's in {len(other)} variable(s): {listed}."
        if path := self.program.changed():
            self._retire(f"{path} has changed.")
            return f"gone {self._gone}"
        return None

    def _retire(self, why: str) -> None:
        """Take no more units."""
        self._gone = why
        if self._listener.fileno() >= 0:
            self._poll.unregister(self._listener.fileno())
            os.unlink(self.socket)
            self._listener.close()
        for connection in self._connections.values():
            connection.say(f"gone {why}")
            self._poll.unregister(connection.fd)
            os.close(connection.fd)
        self._connections.clear()

    def _become(
        self, connection: _Connection, log_fd: int, environment: dict[bytes, bytes], arguments: list[str]
    ) -> _Unit:
        """In a new process: be as an interpreter that has just started."""
        _set_group(0)
        os.close(connection.fd)
        self._close_all()
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        for name in self.varying:
            value = environment.get(name)
            if value is None:
                os.environb.pop(name, None)
            elif os.environb.get(name) != value:
                os.environb[name] = value
                _show_in_proc(name, value)
        if os.getppid() != self.pid:
            os._exit(1)  # the server was killed before anybody could have found this unit by its mark
        sys.argv = [*(["-m"] if self.program.kind == "module" else [self.program.name]), *arguments]
        if hasattr(sys, "orig_argv"):
            sys.orig_argv = [*self.orig_argv, *arguments]
        _renew()
        self.draws.renew()
        printed = self.program.printed
        while printed:
            printed = printed[os.write(1, printed) :]
        return _Unit(self)

    def _descriptors(self) -> set[int]:
        connections = [one.connection.fd for one in self._running.values() if one.connection]
        fds = (self._listener.fileno(), self._owner_fd, *self._connections, *self._by_fd)
        return {*fds, *connections}

    def _close_all(self) -> None:
        """In a child: what belongs to the server alone."""
        self._listener.close()
        for fd in (*self._connections, *self._by_fd, self._owner_fd):
            if fd >= 0:
                os.close(fd)
        for running in self._running.values():
            if running.connection is not None:
                os.close(running.connection.fd)

    def _watch(self, running: _Running) -> None:
        self._running[running.pid] = running
        if running.fd >= 0:
            self._by_fd[running.fd] = running
            self._poll.register(running.fd, select.POLLIN)

    def _reap(self, running: _Running) -> None:
        # wait4 looks for the class of its third result in the module of this name: ours, not a task's.
        theirs = sys.modules.get("resource")
        sys.modules["resource"] = resource
        try:
            pid, status, usage = os.wait4(running.pid, os.WNOHANG)
        finally:
            if theirs is None:
                del sys.modules["resource"]
            else:
                sys.modules["resource"] = theirs
        if pid == 0:
            return
        self._since = time.monotonic()
        del self._running[pid]
        if running.fd >= 0:
            self._poll.unregister(running.fd)
            del self._by_fd[running.fd]
            os.close(running.fd)
        if running.connection is not None:
            running.connection.say(f"ended {status} {' '.join(map(repr, usage))}")
            os.close(running.connection.fd)
            self._note_learned(pid)
        else:
            self._end_trial(status)

    def _note_learned(self, pid: int) -> None:
        if not (self.learns and self.program.hoist.learnable):
            return
        path = f"{self.directory}/learned-{pid}"
        try:
            text = _read(path).decode("utf-8", "surrogateescape")
            os.unlink(path)
        except OSError:
            return
        for line in text.split("\n"):
            name, _, origin = line.partition("\0")
            if name not in sys.modules and name not in self.refused and self._may_learn(name, origin):
                self._wanted.setdefault(name, origin)

    def _may_learn(self, name: str, origin: str) -> bool:
        """Whether a module comes from where modules do not change while a task runs."""
        if self.program.kind == "module" and name == self.program.name:
            return False  # runpy warns of it
        prefixes = tuple({os.path.join(p, "") for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)})
        if origin in ("built-in", "frozen") or origin.startswith(prefixes):
            return True
        self._refuse(name)
        return False

    def _refuse(self, name: str) -> None:
        if len(self.refused) >= _MOST_REFUSED:
            self.learns = False
        self.refused.add(name)

    def _try_modules(self) -> None:
        """Import what was learned, first in a process that may come to grief over it."""
        if self._trial is not None or not self._wanted or self._gone:
            return
        try:
            pid = os.fork()
        except OSError:
            return
        if pid == 0:
            try:
                self._close_all()
                os._exit(self._trial_code())
            finally:
                os._exit(1)
        self._trial = _Running(pid, None)
        self._watch(self._trial)

    def _trial_code(self) -> int:
        _signal.signal(_signal.SIGALRM, _signal.SIG_DFL)
        _signal.setitimer(_signal.ITIMER_REAL, self.import_timeout_s)
        _flush(sys.stdout, sys.stderr)  # what is left of the first imports
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        now = _out_of_the_way(os.open(f"{self.directory}/trying", flags, 0o600))
        with _Captured(f"{self.directory}/trial-printed") as captured:
            for name, origin in self._wanted.items():
                os.ftruncate(now, 0)
                os.pwrite(now, os.fsencode(name), 0)
                environment = dict(os.environ)
                __import__(name)
                found = getattr(sys.modules[name], "__spec__", None)
                if (getattr(found, "origin", None) or "") != origin or _must_be_cold():
                    return 1
                _flush(sys.stdout, sys.stderr)
                if os.fstat(1).st_size or environment != dict(os.environ):
                    return 1
        return 1 if captured.text else 0

    def _end_trial(self, status: int) -> None:
        self._trial = None
        try:
            current = os.fsdecode(_read(f"{self.directory}/trying"))
            os.unlink(f"{self.directory}/trying")
        except OSError:
            current = ""
        if status != 0:
            guilty = current if current in self._wanted else next(iter(self._wanted))
            del self._wanted[guilty]
            self._refuse(guilty)
            _log(f"{guilty} is left to the units: imported beforehand, it fails, prints, or starts threads.")
            return
        # It went well in the trial; if it hangs now, the server ends as one that has crashed.
        _signal.setitimer(_signal.ITIMER_REAL, self.import_timeout_s)
        for name in self._wanted:
            try:
                with self.draws:
                    __import__(name)
            except BaseException as error:  # imports are anybody's code; the units have theirs without it
                _log(f"{name} cannot be imported after all: {error!r}")
                self._refuse(name)
            else:
                self._learned.append(name)
        _signal.setitimer(_signal.ITIMER_REAL, 0)
        self._wanted.clear()
        if why := _must_be_cold(childless=False, own=self._descriptors()):
            self._retire(why)
        self.program.look()
        self._settle()

    def leave(self, why: str) -> None:
        """End the server, but not what runs. No exit handler of the task's is the server's to call."""
        _log(f"The server ends: {why.rstrip('.')}.")
        if self._trial is not None:
            os.kill(self._trial.pid, _signal.SIGKILL)  # it is not reaped yet, and no other's
        for name in ("socket", "trying", "printed", "trial-printed"):
            try:
                os.unlink(f"{self.directory}/{name}")
            except OSError:
                continue
        try:
            os.rmdir(self.directory)
        finally:
            os._exit(0)  # whoever has put something there removes it


def _set_group(pid: int) -> None:
    try:
        os.setpgid(pid, 0)
    except (ProcessLookupError, PermissionError):
        return  # both sides do it; the other one was first, or it has ended


def _renew() -> None:
    """What is a process's own: `random` and most of `threading` see to themselves at each fork."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
    if "threading" in sys.modules:
        thread: Any = sys.modules["threading"].main_thread()
        if hasattr(thread, "_set_native_id"):
            thread._set_native_id()


def _show_in_proc(name: bytes, value: bytes) -> None:
    """Write a variable where /proc/PID/environ shows it, if the value it replaces was as long.

    The kernel shows the memory that the process was started with, whatever became of the variables since;
    and by it units are found whose coordinator has died.
    """
    try:
        text = _read("/proc/self/stat")
        fields = text[text.rfind(b")") + 2 :].split()
        start, end = int(fields[47]), int(fields[48])  # proc(5): env_start and env_end, fields 50 and 51
        memory = os.open("/proc/self/mem", os.O_RDWR)
    except (OSError, IndexError):
        return
    try:
        block = b"\0" + os.pread(memory, end - start, start)
        at = block.find(b"\0" + name + b"=") + len(name) + 2
        if at < len(name) + 2:
            return
        room = block.find(b"\0", at) - at
        if len(value) <= room:
            os.pwrite(memory, value.ljust(room, b"\0"), start + at - 1)
    except OSError:
        return  # a kernel that forbids it
    finally:
        os.close(memory)


def _log(text: str) -> None:
    os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode(errors="replace"))


def _interpreter_words(options: dict[str, str]) -> list[str]:
    before = []
    for word in getattr(sys, "orig_argv", ()):
        if word == sys.argv[0]:
            break
        before.append(word)
    return [*before, *(["-m"] if options["kind"] == "module" else []), options["name"]]


def _set_apart(told: int) -> int:
    """Go on in a child; the pid of this process, which ends as the child does, or when it is killed by it.

    Args:
        told: the status pipe. Once nobody is at its other end, the child is ended: what it imports is for
            nobody.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        return parent
    poll = select.poll()
    poll.register(told, 0)  # POLLERR comes unasked
    pause = _QUICK_LOOK_S * 1000
    if hasattr(os, "pidfd_open"):
        try:
            poll.register(os.pidfd_open(pid), select.POLLIN)
            pause = _SLOW_LOOK_S * 1000
        except OSError:
            pass  # an old kernel: it is looked at now and then
    ended = status = 0
    while not ended:
        found = dict(poll.poll(pause))
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended and told in found:
            os.kill(pid, _signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(1)
    if os.WIFSIGNALED(status):
        _signal.signal(os.WTERMSIG(status), _signal.SIG_DFL)
        os.kill(parent, os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _main() -> _Unit:
    """Prepare and serve; returns in the process of a unit."""
    split = sys.argv.index("--")
    options = dict(word[2:].split("=", 1) for word in sys.argv[1:split])
    parent = _set_apart(int(options["status"]))
    status = _out_of_the_way(int(options["status"]))
    # As spawn.py starts a command: these at the system's defaults, none blocked.
    for number in (_signal.SIGTERM, _signal.SIGHUP, _signal.SIGALRM):
        _signal.signal(number, _signal.SIG_DFL)
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    server = _Server(options, sys.argv[split + 1 :])
    try:
        server.prepare()
        server.listen()
    except _Cold as why:
        os.write(status, f"cold {why}".replace("\n", " ").encode(errors="replace") + b"\n")
        server.leave(f"{why}")
    os.setsid()
    os.kill(parent, _signal.SIGKILL)
    os.write(status, b"ready %d\n" % os.getpid())
    os.close(status)
    return server.serve()


if __name__ == "__main__":
    _unit: Any = None
    _at_exit(lambda: _unit and _unit.end())  # first in, last out
    _unit = _main()
    try:
        _unit.call[0](*_unit.call[1])  # the one frame of ours that lies below the script's
        _unit.code = 0
    except BaseException as error:  # the script's own: it is on its way to the interpreter
        _unit.failed(error)
        raise
    finally:
        _unit.call = None
        _unit.report()
        if _unit.is_module:
            _pass_over_a_flush()
