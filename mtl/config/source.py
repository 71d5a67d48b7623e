"""A user's own code: which files it consists of, where they are, and which of its lines raised an error.

Own code is every Python file outside this package, the standard library and the installed packages. It is neither
imported nor run here. Files are found on `sys.path`, and their import statements are read from the syntax tree.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import site
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from mtl.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
BUILT_IN = ("mtl", "torch", "torchvision")


def _installed_folders() -> tuple[str, ...]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages(), str(PACKAGE)]
    return tuple({os.path.realpath(path) + os.sep for path in paths if path})


_INSTALLED, _SCRIPT = _installed_folders(), str(PACKAGE.parent / "train.py")
# Own modules as this process has imported them: like `sys.modules`, and so the process's, not a run's.
_loaded: dict[str, tuple[ModuleType, str]] = {}  # {name: (own module, sha256 of its file when it was first seen)}


def is_own(file: str | Path) -> bool:
    """Whether `file` is the user's own code. Files of mtl, the standard library and installed packages are not."""
    path = os.path.realpath(file)
    installed = path.startswith(_INSTALLED) or {"site-packages", "dist-packages"} & set(Path(path).parts)
    return os.path.isfile(path) and not installed and path != _SCRIPT


def digests(targets: list[str], files: list[Path]) -> dict[str, str]:
    """Hashes of a user's own code.

    Args:
        targets: dotted paths of classes and functions, from `_target_`.
        files: Python files that are loaded by their path.

    Returns:
        {module: sha256 of its file}, for all own modules that contain a target, and for all own modules that these or
        `files` import, directly or not. `files` themselves are left out. The result does not depend on the folder of
        the code.
    """
    found: dict[str, str] = {}
    waiting: list[tuple[str, Path, Path | None]]
    waiting = [(module, path, None) for t in targets for module, path in _modules(t, None)]
    waiting += [edge for file in files for edge in _imports("", file, file.parent)]
    while waiting:
        module, path, beside = waiting.pop()
        if module not in found:
            found[module] = hashlib.sha256(path.read_bytes()).hexdigest()
            waiting += _imports(module, path, beside)
    return dict(sorted(found.items()))


def changed(own: dict[str, str]) -> str:
    """The first module in `own` whose file was changed after this process had imported it; empty if none was.

    Such a process would train with the old code and record the hash of the new one.
    """
    for name, digest in own.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        # First sight of this module object, or it was imported anew: its file is taken as it is now.
        if name not in _loaded or _loaded[name][0] is not module:
            _loaded[name] = module, digest
        elif _loaded[name][1] != digest:
            return name
    return ""


def _imports(module: str, file: Path, beside: Path | None) -> Iterator[tuple[str, Path, Path | None]]:
    """The own modules that `file` imports.

    Args:
        module: dotted name of `file`, to resolve relative imports; empty for a file that is loaded by its path.
        file: the Python file.
        beside: a folder that is searched before sys.path, such as the folder of a file that is loaded by its path.

    Yields:
        (module, file, beside) of each import.
    """
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # it cannot be imported either; the error is reported when the object is built
        return
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import: one dot is the package itself, each further dot its parent.
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *(node.module.split(".") if node.module else [])])
            names = [f"{origin}.{alias.name}" if origin else alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield from ((m, path, beside) for m, path in _modules(name, beside))


def _modules(name: str, beside: Path | None) -> Iterator[tuple[str, Path]]:
    """The own files that `import name` runs, packages first. `name` may end with a class, as in `a.b.Net`."""
    top, *rest = name.split(".")
    if top in BUILT_IN or top in sys.builtin_module_names:
        return
    file, folders = _top(top, beside)
    for i in range(len(rest) + 1):
        if file is not None:
            if not is_own(file):
                return
            yield ".".join([top, *rest[:i]]), file
        if i == len(rest):
            return
        file, folders = _below(folders, rest[i])
        if file is None and not folders:
            return


def _top(name: str, beside: Path | None) -> tuple[Path | None, list[Path]]:
    """The file of the top-level module `name`, and its folders if it is a package."""
    if beside is not None:
        file, folders = _below([beside], name)
        if file is not None:
            return file, folders
    try:
        spec = importlib.util.find_spec(name)  # a name without dots: this imports nothing
    except (ImportError, ValueError):
        return None, []
    if spec is None:
        return None, []
    file = Path(spec.origin) if spec.origin and spec.has_location else None
    return file, [Path(folder) for folder in spec.submodule_search_locations or ()]


def _below(folders: list[Path], name: str) -> tuple[Path | None, list[Path]]:
    """The file of the module `name` in the folders of a package, and its own folders if it is a package too."""
    for folder in folders:
        if (file := folder / name / "__init__.py").is_file():
            return file, [folder / name]
        if (file := folder / f"{name}.py").is_file():
            return file, []
    return None, [folder / name for folder in folders if (folder / name).is_dir()]


def blame(error: BaseException) -> str:
    """The end of an error message: the line of the user's own code that raised `error`, and the traceback's file.

    Returns:
        for example " (my_net.py:14 in forward; traceback in /home/me/.cache/mtl/traceback-1a2b3c4d.txt)". It is empty
        in three cases: no line of own code was involved; own code raised a UserError on purpose; the message has the
        place already.
    """
    found = place(error)
    return f" ({found}{_told(keep(error))})" if found and found not in str(error) else ""


def place(error: BaseException) -> str:
    """The innermost line of own code in the traceback of `error`, such as "my_net.py:14 in forward"; empty if none."""
    return next(filter(None, map(_place, _chain(error))), "")


def definition(thing: Any) -> str:
    """The place where a class or function is defined, such as "my_net.py:12"; its name if there is no source."""
    thing = inspect.unwrap(thing) if callable(thing) else thing  # a decorator such as `on_host` is in another file
    try:
        return f"{_short(inspect.getsourcefile(thing))}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", repr(thing))


def keep(error: BaseException) -> Path | None:
    """Write the whole traceback of `error` to a file; return the file, or None if no folder can be written."""
    text = "".join(traceback.format_exception(error))
    name = f"traceback-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # The name is a hash of the text, so that the same error does not fill the folder with copies.
    for folder in (cache / "mtl", Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            return folder / name
    return None


def _told(file: Path | None) -> str:
    return f"; traceback in {file}" if file else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and its causes, without UserErrors: these are messages, not faults of own code."""
    while error is not None:
        if not isinstance(error, UserError):
            yield error
        # As Python prints them: the cause first, else the error during whose handling this one was raised.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _place(error: BaseException) -> str:
    # A file with a syntax error has not run, so it has no frame in the traceback.
    if isinstance(error, SyntaxError) and error.filename and is_own(error.filename):
        return f"{_short(error.filename)}:{error.lineno}"
    frames = [f for f in _frames(error.__traceback__) if is_own(f[0])]
    return "{}:{} in {}".format(_short(frames[-1][0]), *frames[-1][1:]) if frames else ""


def _frames(trace: TracebackType | None) -> list[tuple[str, int, str]]:
    return [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(trace)]


def _short(file: str) -> str:
    """The path of a file, relative to the current folder if the file lies below it."""
    path, here = Path(os.path.realpath(file)), Path(os.path.realpath("."))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
