"""The errors that a user can cause or fix, each with its own exit code. Any other exception is a bug and shows its traceback.

| code | class             | meaning                                                              |
|------|-------------------|----------------------------------------------------------------------|
| 2    | (typer)           | wrong command line                                                   |
| 10   | ConfigError       | the YAML, an override, or the layout is not valid                    |
| 11   | DataError         | input text, .bin/.idx or tokenizer cannot be used                    |
| 12   | CheckpointError   | a checkpoint is missing, damaged or belongs to another model         |
| 13   | ConversionError   | a Hugging Face folder cannot be read or written, or does not match   |
| 14   | DivergedError     | the loss or the gradients are not finite, or a monitor stopped the run |
| 15   | PlatformError     | the machine, an installation or the launch is at fault               |
| 16   | HangError         | a rank made no progress for resilience.step_timeout_s                |
| 17   | PeerLostError     | another rank ended in the middle of a step; that rank's message gives the cause |
| 18   | RehearsalError    | a step cannot be rehearsed: an operator needs data, or values decide shapes |
| 19   | DoesNotFitError   | a rehearsed rank needs more memory than its device has               |
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Base class. The command line prints the message as one line (cause and fix) and exits with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    exit_code = 10


class DataError(UserError):
    exit_code = 11


class CheckpointError(UserError):
    exit_code = 12


class ConversionError(UserError):
    exit_code = 13


class DivergedError(UserError):
    exit_code = 14


class PlatformError(UserError):
    exit_code = 15


class HangError(UserError):
    exit_code = 16


class PeerLostError(UserError):
    exit_code = 17


class RehearsalError(UserError):
    exit_code = 18


class DoesNotFitError(UserError):
    exit_code = 19


def required(value: T | None, name: str) -> T:
    """`value`, where it cannot be missing.

    Raises:
        AssertionError: it is None, which is a bug of ours and no user's error.
    """
    if value is None:
        raise AssertionError(f"{name} is missing")
    return value
