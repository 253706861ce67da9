"""Typed settings, and how a user's mistake ends: in one line.

A script's settings are plain variables. `python train.py config/nano.py --seed=1` takes what the
config file assigns, then what --key=value assigns; the last one wins. A config file is Python that
assigns settings; it may import, and use names that begin with _. Values have the type of the
default: an int may be written 1e3, a float 1, a bool true, false, 1 or 0 in any case, a text such
as "auto" also 7 or True, and ~/ at the beginning of a text is the home folder.
"""

import difflib
import functools
import importlib
import math
import os
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
BOOL = {"true": True, "1": True, "false": False, "0": False}


class UserError(ValueError):
    """A user's mistake: one line with what is wrong, and the remedy. Whatever else is raised is a
    bug, and keeps its traceback."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def public(namespace):
    """The settings in a namespace: plain values under lower-case names without _ in front."""
    return {name: value for name, value in namespace.items()
            if name.islower() and name[0] != "_" and type(value) in (bool, int, float, str)}


def typed(name, value, default, where):
    """`value`, text or not, in the type of `default`; UserError if it cannot be converted."""
    kind, text = type(default), str(value)
    if kind is str and isinstance(value, (str, int)):  # drafts = 7 or compile = True
        return os.path.expanduser(text) if text.startswith("~/") else text
    if kind is bool and text.lower() in BOOL:
        return BOOL[text.lower()]
    if kind is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)  # not by float: a seed may have 17 digits
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if (kind is float and math.isfinite(number)) or (kind is int and number.is_integer()):
        return kind(number)
    raise UserError(f"{where}: {name} must be {kind.__name__} like {default!r}, not {value!r}")


def read_config(name):
    """{name: value} that a config file assigns. Its path is as given, or below the repository."""
    found = (p for p in (Path(name), ROOT / name) if p.is_file() and p.suffix == ".py")
    path = next(found, None)
    require(path, f"no config file {name}; settings are written --key=value")
    try:
        found = runpy.run_path(str(path))
    except Exception as e:  # the user's Python may raise anything
        raise UserError(f"{path}: {type(e).__name__}: {e}") from None
    return {key: value for key, value in found.items() if not (
        key.startswith("_") or callable(value) or isinstance(value, ModuleType))}


def settings(defaults, argv):
    """(settings, given): `defaults` with the config files and --key=value of argv applied in order,
    and the set of names that these assigned. UserError for an unknown name or a wrong type."""
    s, given = dict(defaults), set()
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            require(equals, f"{arg}: settings are written --key=value, such as --seed=1")
            found = {key: text}
        else:
            found = read_config(arg)
        for name, value in found.items():
            if name not in s:
                near = difflib.get_close_matches(name, s, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(s)}"
                raise UserError(f"{arg}: unknown setting {name}; {hint}")
            s[name] = typed(name, value, defaults[name], arg)
            given.add(name)
    return SimpleNamespace(**s), given


def check(s, choices=(), least=(), most=()):
    """UserError unless settings are among their `choices`, which are taken in any case, at least
    `least`, or 0, and at most `most`: {name: value or values} each."""
    numbers = {name: 0 for name, value in vars(s).items() if type(value) in (int, float)}
    for name, allowed in dict(choices).items():
        setattr(s, name, getattr(s, name).lower())
        require(getattr(s, name) in allowed,
                f"--{name} must be {' or '.join(allowed)}, not {getattr(s, name)!r}")
    for name, low in (numbers | dict(least)).items():
        require(getattr(s, name) >= low, f"--{name} must be {low} or more, not {getattr(s, name)}")
    for name, top in dict(most).items():
        require(getattr(s, name) <= top, f"--{name} must be {top} or less, not {getattr(s, name)}")


def optional(package):
    """The module of a package that one setting needs."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"this needs {name}: pip install {name}") from None


def guarded(main):
    """Decorator of a script's main(argv) -> exit code, or None for 0. The code is 2 after a user's
    mistake, which rank 0 says in one line, and 130 after Ctrl-C."""

    @functools.wraps(main)
    def wrapped(argv):
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader has gone, as in `| head`: nothing to say at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except UserError as e:
            if os.environ.get("RANK", "0") == "0":  # all processes have the same to say
                print("error:", e, file=sys.stderr)
            return 2
        except RuntimeError as e:  # torch's words for it
            if not re.search("(out of|allocate) memory", str(e)):
                raise
            print("error: out of memory: take a smaller batch or model", file=sys.stderr)
            return 2

    return wrapped
