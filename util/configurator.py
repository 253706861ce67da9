"""Typed settings: `python train.py config/nano.py --learning_rate=1e-3 --compile=false`.

A script's settings are plain variables. A config file is Python that assigns some of them, and
`--key=value` assigns one; later wins. The name must exist, and the value be of the default's type,
where an int may be written 1e3, a float 1, and a bool true/false/1/0.

`guarded` around a script's main turns whatever goes wrong into one line and an exit code.
"""

import difflib
import functools
import importlib
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType


class SettingsError(Exception):
    """A user's mistake in a setting; the message is one line with the remedy."""


def first_line(error):
    """What an exception says first, at most 200 characters of it; its type where it is silent."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def optional(package, what):
    """The module of a package that `what` alone needs; without it SettingsError names the cure."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise SettingsError(f"{what} needs {name}: pip install {name}") from None


@contextmanager
def writing(path, *errors):
    """What the disk refuses in here, by OSError or one of `errors`, is a SettingsError."""
    try:
        yield
    except (OSError, *errors) as e:
        raise SettingsError(f"cannot write {path} ({getattr(e, 'strerror', 0) or first_line(e)}): "
                            "free some space or choose another --out_dir") from None


def fail(error):
    """Print an exception as one line and leave, by exit code 2 for what the user can mend, else 1.
    Control characters are spelt out: no name out of a file may command the terminal."""
    line, code = first_line(error), 1
    if isinstance(error, (SettingsError, ValueError)):
        line, code = str(error) or line, 2
    elif isinstance(error, OSError):
        line = f"{error.filename or 'a stream or the network'}: {error.strerror or line}"
        code = 2
    elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory", line):
        line = f"out of memory ({line}): take a smaller batch, sequence or model"
    else:
        line = f"{type(error).__name__}: {line} (--traceback=true shows where)"
    said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may stand there
    with suppress(OSError):
        print(f"{clear}error: {said}", file=sys.stderr)
    sys.exit(code)


def guarded(main):
    """Decorator of a script's main(argv): an error ends in one line, a Ctrl-C in exit code 130, a
    reader of the output who has gone, as in `| head`, without a word. --traceback=true raises."""
    @functools.wraps(main)
    def wrapped(argv):
        whole = "--traceback=true" in argv
        argv[:] = [a for a in argv if a != "--traceback=true"]
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name) or open(os.devnull, "w")  # None: closed by who started us
            setattr(sys, name, stream)
            if hasattr(stream, "reconfigure"):  # for characters that the terminal does not have
                stream.reconfigure(errors="backslashreplace")
        try:
            code = main(argv) or 0
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return 130
        except Exception as e:
            if whole:
                raise
            try:
                sys.stdout.flush()
            except OSError:  # at exit it would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1 if isinstance(e, BrokenPipeError) else fail(e)

    return wrapped


def _hook(kind, *rest):
    """Ctrl-C while the modules load: no traceback, and Python ends by the signal."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, *rest)


sys.excepthook = _hook


def public(namespace):
    """The settings in a namespace: bool, int, float and str values of names without leading _."""
    return {key: value for key, value in namespace.items()
            if not key.startswith("_") and isinstance(value, (bool, int, float, str))}


def _set(settings, key, value, where):
    """Assign `value` as the type that the setting has. Text is parsed, other values are checked;
    SettingsError for a wrong one, and for a name that is no setting."""
    if key not in settings:
        near = difflib.get_close_matches(key, settings, n=1)
        hint = f", did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(settings))}"
        raise SettingsError(f"{where}: unknown setting {key!r}{hint}")
    default, kind = settings[key], type(settings[key])
    written = str if kind is str else (int, float, str)
    try:
        if kind is bool:
            value = {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        elif isinstance(value, bool) or not isinstance(value, written):
            raise TypeError
        elif isinstance(value, str) and kind is not str:
            # int("4") first: float() would round a 17-digit seed
            value = int(value) if value.lstrip("+-").isdigit() else float(value)
        if kind is int and value != int(value):
            raise ValueError
        settings[key] = kind(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SettingsError(f"{where}: {key} must be {kind.__name__} like {default!r}, not "
                            f"{value!r}") from None


def _config(name):
    """(path, {name: value}) of what a config file assigns, but for what it imports, defines or
    hides by _. Its path is as given, or relative to the repository, so that any folder will do."""
    for path in (Path(name), Path(__file__).resolve().parents[1] / name):
        if path.is_file():
            break
    else:
        raise SettingsError(f"no config file {name!r}; settings are written --key=value")
    if path.suffix != ".py":
        raise SettingsError(f"{path}: a config file is Python, with a name that ends in .py")
    found = {"__name__": "config", "__file__": str(path)}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), found)
    except (Exception, SystemExit) as e:  # the user's Python: what it raises is theirs to mend
        raise SettingsError(f"{path}: {type(e).__name__}: {first_line(e)}") from None
    return path, {key: value for key, value in found.items() if not (
        key.startswith("_") or callable(value) or isinstance(value, ModuleType))}


def override(defaults, argv, given=None):
    """`defaults` (name -> value) with the config files and --key=value of argv applied in order, a
    new dict. SettingsError for an unknown name, a wrong type, a missing file or another argument.
    The set `given` is filled with the names that argv assigns.
    """
    settings = dict(defaults)
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and not equals:
            raise SettingsError(f"{arg}: settings are written --key=value, for example --seed=1")
        where, found = (arg, {key: value}) if arg.startswith("--") else _config(arg)
        for key, value in found.items():
            _set(settings, key, value, where)
            if given is not None:
                given.add(key)
    return settings


def check_settings(s, choices, ranges):
    """SettingsError unless each setting is one of its `choices` or within its range (low, high)."""
    for name, allowed in choices.items():
        if getattr(s, name) not in allowed:
            words = ", ".join(map(str, allowed))
            raise SettingsError(f"--{name} must be one of {words}, not {getattr(s, name)!r}")
    for name, (low, high) in ranges.items():
        if not low <= getattr(s, name) <= high:
            within = f"{low} or more" if high == math.inf else f"between {low:g} and {high:.10g}"
            raise SettingsError(f"--{name} must be {within}, not {getattr(s, name)}")
