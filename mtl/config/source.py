"""A user's own code: where it lies, which files it consists of, and which line of it raised an error.

Own code is every Python file outside this package, the standard library and the installed packages. Nothing here
imports or runs it: files are found on `sys.path` and their import statements are read from the syntax tree.
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
_loaded: dict[str, tuple[ModuleType, str]] = {}


def is_own(file: str | Path) -> bool:
    """Whether `file` is the user's, not ours, the standard library's or an installed package's."""
    path = os.path.realpath(file)
    installed = path.startswith(_INSTALLED) or {"site-packages", "dist-packages"} & set(Path(path).parts)
    return os.path.isfile(path) and not installed and path != _SCRIPT


def digests(targets: list[str], files: list[Path]) -> dict[str, str]:
    """The content of a user's own code.

    Args:
        targets: dotted paths of classes and functions, from `_target_`.
        files: Python files that are loaded by their path.

    Returns:
        {module: sha256 of its file} for all own modules that the targets lie in, and for all own modules that these
        and `files` import. The files themselves are not in it. It does not depend on the folder in which they lie.
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
    """The first module in `own` whose file was changed after this process had imported it; empty if there is none."""
    for name, digest in own.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        if name not in _loaded or _loaded[name][0] is not module:
            _loaded[name] = module, digest
        elif _loaded[name][1] != digest:
            return name
    return ""


def _imports(module: str, file: Path, beside: Path | None) -> Iterator[tuple[str, Path, Path | None]]:
    """The own modules that `file` imports, their files, and the folder beside sys.path that their imports may be in."""
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # it cannot be imported either, which whoever builds the object will say
        return
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *(node.module.split(".") if node.module else [])])
            names = [f"{origin}.{alias.name}" if origin else alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield from ((m, path, beside) for m, path in _modules(name, beside))


def _modules(name: str, beside: Path | None) -> Iterator[tuple[str, Path]]:
    """The files that `import name` runs, its packages' first; what follows the last module in `name` is ignored."""
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
    if beside is not None:
        file, folders = _below([beside], name)
        if file is not None:
            return file, folders
    try:
        spec = importlib.util.find_spec(name)  # of a name without dots: imports nothing
    except (ImportError, ValueError):
        return None, []
    if spec is None:
        return None, []
    file = Path(spec.origin) if spec.origin and spec.has_location else None
    return file, [Path(folder) for folder in spec.submodule_search_locations or ()]


def _below(folders: list[Path], name: str) -> tuple[Path | None, list[Path]]:
    """The file of the module `name` in a package, and its own folders where it is a package."""
    for folder in folders:
        if (file := folder / name / "__init__.py").is_file():
            return file, [folder / name]
        if (file := folder / f"{name}.py").is_file():
            return file, []
    return None, [folder / name for folder in folders if (folder / name).is_dir()]


def blame(error: BaseException) -> str:
    """Where a user's own code raised `error`, and the file that has the whole traceback.

    Returns:
        such as " (my_net.py:14 in forward; traceback in /home/me/.cache/mtl/traceback-1a2b3c4d.txt)"; empty for an
        error that our own checks or a library raised without any line of the user's in between, for a UserError that
        own code raised on purpose, and where the message has the place already.
    """
    found = place(error)
    return f" ({found}{_told(keep(error))})" if found and found not in str(error) else ""


def place(error: BaseException) -> str:
    """The innermost line of a user's own code that `error` has passed, as "my_net.py:14 in forward"; empty for none."""
    return next(filter(None, map(_place, _chain(error))), "")


def definition(thing: Any) -> str:
    """ "my_net.py:12", where a class or function is defined; its name if there is no source."""
    try:
        return f"{_short(inspect.getsourcefile(thing))}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", repr(thing))


def keep(error: BaseException) -> Path | None:
    """Write the whole traceback of `error` to a file; None where there is no place for one."""
    text = "".join(traceback.format_exception(error))
    name = f"traceback-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (cache / "mtl", Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            return folder / name
    return None


def _told(file: Path | None) -> str:
    return f"; traceback in {file}" if file else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what caused it, without the errors that are messages to the user."""
    while error is not None:
        if not isinstance(error, UserError):
            yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename and is_own(error.filename):
        return f"{_short(error.filename)}:{error.lineno}"
    frames = [f for f in _frames(error.__traceback__) if is_own(f[0])]
    return "{}:{} in {}".format(_short(frames[-1][0]), *frames[-1][1:]) if frames else ""


def _frames(trace: TracebackType | None) -> list[tuple[str, int, str]]:
    return [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(trace)]


def _short(file: str) -> str:
    """Relative where it lies below the current folder."""
    path, here = Path(os.path.realpath(file)), Path(os.path.realpath("."))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
