"""Typed settings: `python train.py config/nano.py --learning_rate=1e-3 --compile=false`.

A script keeps its settings as plain variables with defaults. A config file is Python that assigns
some of them; `--key=value` assigns one. Both are held to the same rules: the name must exist (a
misspelt one is refused with the nearest), and the value must be of the default's type, where an
int may be written 1e3, a float may be written 1, and a bool true/false/1/0. Later wins.
"""

import difflib
import math
import runpy
import sys
from pathlib import Path


class SettingsError(Exception):
    """A user's mistake in a setting; the message is one line with the remedy."""


def fail(message):
    """Print one line and leave with exit code 2: what every script does with a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def public(namespace):
    """The settings in a namespace: bool, int, float and str values of names without leading _."""
    return {
        key: value
        for key, value in namespace.items()
        if not key.startswith("_") and isinstance(value, (bool, int, float, str))
    }


def _typed(key, value, default, where):
    """`value` as the default's type, or SettingsError. Text is parsed; other values are checked."""
    kind = type(default)
    wrong = SettingsError(f"{where}: {key} must be {kind.__name__} like {default!r}, not {value!r}")
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool):
            return value
        if not isinstance(value, (str, int)) or str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if isinstance(value, bool):
        raise wrong
    try:
        # int("4") first: float() would round a 17-digit seed
        number = value
        if isinstance(value, str):
            number = int(value) if value.lstrip("+-").isdigit() else float(value)
        if kind is int and number != int(number):
            raise wrong
        return kind(number)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def _set(settings, defaults, key, value, where):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1)
        hint = f", did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(defaults))}"
        raise SettingsError(f"{where}: unknown setting {key!r}{hint}")
    settings[key] = _typed(key, value, defaults[key], where)


def _config_file(name):
    """A config file's path: as given, or relative to the repository, so any folder will do."""
    for path in (Path(name), Path(__file__).resolve().parents[1] / name):
        if path.is_file():
            return path
    raise SettingsError(f"no config file {name!r}; settings are written --key=value")


def _run_config(path):
    try:
        return public(runpy.run_path(str(path)))
    except Exception as e:  # a config is the user's Python: whatever it raises is theirs to mend
        raise SettingsError(f"{path}: {type(e).__name__}: {e}") from None


def override(defaults, argv):
    """`defaults` (name -> value) with the config files and --key=value of argv applied in order.

    Returns a new dict. Raises SettingsError, one line, for an unknown name, a wrong type, a
    missing file, or an argument that is neither.
    """
    settings = dict(defaults)
    for arg in argv:
        if not arg.startswith("--"):
            path = _config_file(arg)
            for key, value in _run_config(path).items():
                _set(settings, defaults, key, value, str(path))
            continue
        key, equals, value = arg[2:].partition("=")
        if not equals:
            raise SettingsError(f"{arg}: settings are written --key=value, for example --seed=1")
        _set(settings, defaults, key, value, arg)
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
