"""A Python function as a reward."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from flagscale_like.errors import ConfigError, DataError
from flagscale_like.rl.answers import Answer, Score
from flagscale_like.rl.rewards.checked import checked_values, show

RewardFunction = Callable[[Sequence[Answer]], Sequence[float]]


class Function:
    """A function that gets a list of answers and returns a number for each.

    Args:
        path: `package.module:function`, or `path/to/file.py:function`.

    Raises:
        ConfigError: there is no such function.
    """

    def __init__(self, path: str) -> None:
        self.path, self.function = path, load_function(path)

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """See RewardSource. A function that raises is asked again for one answer at a time, to find the sample.

        Raises:
            DataError: with the line of the function that raised, and the sample.
        """
        answers = list(answers)
        try:
            values = self.function(answers)
        except (Exception, SystemExit) as error:  # a function that ends the process would end this rank alone
            raise self._problem(answers, error) from error
        return [Score(value) for value in checked_values(answers, values, f"reward function {self.path}")]

    def _problem(self, answers: list[Answer], error: BaseException) -> DataError:
        at = next((number for number, answer in enumerate(answers) if self._raises(answer)), None)
        sample = show(answers, at) if at is not None else f"all {len(answers)} answers at once, and for none alone"
        return DataError(
            f"reward function {self.path}: {type(error).__name__}: {error} at {_line(error, self.function)}, for {sample}"
        )

    def _raises(self, answer: Answer) -> bool:
        try:
            self.function([answer])
        except (Exception, SystemExit):
            return True
        return False


def _line(error: BaseException, function: RewardFunction) -> str:
    """file:line of the innermost frame in the function's own file; of the innermost frame of all, where it has none there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(getattr(function, "__code__", None), "co_filename", "")
    frame = next((f for f in reversed(frames) if f.filename == own), frames[-1])
    return f"{frame.filename}:{frame.lineno}"


def load_function(path: str) -> RewardFunction:
    """The function that `package.module:function` or `file.py:function` names.

    Raises:
        ConfigError: the module cannot be imported (with the line at fault), or has no such function.
    """
    place, _, name = path.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
        where = f" at {inside[-1].filename}:{inside[-1].lineno}" if inside else ""
        missing = isinstance(error, ModuleNotFoundError) and error.name and place.startswith(error.name)
        way_out = ": put its folder on PYTHONPATH, or give path/to/file.py:function" if missing else ""
        raise ConfigError(
            f"reward function {path}: {place} cannot be imported: {type(error).__name__}: {error}{where}{way_out}"
        ) from None
    found = getattr(module, name, None)
    if not callable(found):
        functions = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError(
            f"reward function {path}: {place} has no function {name}; it has {', '.join(functions) or 'none'}"
        )
    return found


def _load_file(path: Path) -> ModuleType:
    """A module of a name of its own, so that two files of one name do not meet."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
