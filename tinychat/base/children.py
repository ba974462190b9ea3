"""Starting Python programs that import nothing from the working directory.

A file `json.py` in the folder where somebody stands is a stranger's code. Python puts that folder first on
the import path for `-m` and `-c`, and `-P` is not known before 3.11.
"""

# Imported before the path is clean: only what Python itself has loaded, so no `__future__` either.
import os
import sys


def trusted_path() -> list[str]:
    """`sys.path` without the working directory and relative entries.

    A folder that packages were installed into stays, also for somebody who stands in it.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # the folder was removed
        here = ""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    installed = os.path.isdir(os.path.join(package, "models"))  # in the sources they lie beside it
    home = os.path.realpath(os.path.dirname(package)) if installed else None

    def trusted(entry: str) -> bool:
        real = os.path.realpath(entry)
        return os.path.isabs(entry) and (real != here or real == home)

    return [entry for entry in sys.path if trusted(entry)]


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as `python -m` does, with this process's import path and nothing from
    the working directory.

    The standard library goes first: a program that embeds tinychat may have a file of such a name beside it.
    """
    import sysconfig

    library = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    packages = ("site-packages", "dist-packages")

    def rank(entry: str) -> bool:
        return not entry.startswith(library) or any(p in entry for p in packages)

    path = sorted(trusted_path(), key=rank)
    # -I: neither the working directory nor PYTHON* variables say what is imported before the path is set.
    run = f"import runpy; runpy.run_module({module!r}, None, '__main__', True)"
    code = f"import sys; sys.path[:] = {path!r}; {run}"
    return [sys.executable, "-I", "-c", code, *arguments]
