"""What macko raises at a user, or warns of: one sentence that says what is wrong and names the fix."""


class MackoError(Exception):
    """A job that failed for a reason the user can mend; the command line exits with `exit_code`."""

    exit_code = 1


class UsageError(MackoError):
    """A call that asks for something impossible: a sparsity of 2, a packed model where a dense one is needed."""

    exit_code = 2


class CheckpointError(MackoError):
    """A model folder that is missing, incomplete, corrupt, or of a kind that is not supported."""


class FormatError(CheckpointError):
    """A matrix that breaks an invariant of the MACKO format (docs/format.md)."""


class CalibrationError(MackoError):
    """Calibration or evaluation text that cannot serve: missing, unreadable, too short."""


class NonFiniteError(MackoError):
    """NaN or infinity in weights or activations, or values that overflow the requested dtype."""


class NativeError(MackoError):
    """The native library is missing, of another version, or refused its arguments."""


def add_note(error: BaseException, note: str) -> None:
    """Say more of an error, as `BaseException.add_note` does in Python 3.11; the command line says it too."""
    error.__notes__ = [*notes(error), note]  # type: ignore[attr-defined]


def notes(error: BaseException) -> list[str]:
    """What `add_note` said."""
    return getattr(error, "__notes__", [])


class MackoWarning(UserWarning):
    """Something works, but not as well as it should."""
