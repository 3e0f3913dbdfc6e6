"""Every error that vmprovision raises to a caller.

All have one root, so ``except VmprovisionError`` is enough. Each cause that a caller
may want to treat differently has its own class. Each class has the exit code that
``docs/exit-codes.md`` lists.
"""

from __future__ import annotations

import contextlib
import unicodedata
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


def printable(text: str) -> str:
    """Return text that is safe for a terminal or a log: no control or format characters.

    Guests are hostile: their file names, release files and consoles may contain escape
    sequences. Line breaks are escaped as well.
    """
    return "".join(
        char if unicodedata.category(char)[0] not in "CZ" or char == " " else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii") if char != "\xa0" else " "


class VmprovisionError(Exception):
    """The root of all errors: a sentence about what is wrong, and the next step.

    Attributes:
        sentence: what is wrong, without the image and without control characters.
        hint: the next step, or an empty string.
        image: the image or directory, once it is known.
        exit_code: the exit code of the command line; docs/exit-codes.md.
        names_file: whether this class's sentence itself names the file at fault.
    """

    exit_code: ClassVar[int] = 1
    names_file: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Keep the message and the hint in a form that is safe to print."""
        self.sentence = printable(message)
        self.hint = printable(hint)
        self.image: Path | None = None
        super().__init__(self.sentence)

    @property
    def message(self) -> str:
        """The sentence, prefixed with the image unless it names the image itself."""
        if self.image is None or self.names_file:
            return self.sentence
        return printable(f"{self.image}: ") + self.sentence

    def __str__(self) -> str:
        """Return the message followed by the hint."""
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Callable[..., VmprovisionError], tuple[Any, ...], dict[str, Any]]:
        """Let an error survive pickling with all its attributes, whatever its class."""
        return _revived, (type(self), self.args), self.__dict__

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it; its kind is one of docs/exit-codes.md."""
        kind = next(each for each in type(self).__mro__ if each.__module__ == __name__)
        return {
            "kind": kind.__name__,
            "image": str(self.image) if self.image is not None else None,
            "message": self.message,
            "hint": self.hint,
        }


@contextlib.contextmanager
def about_image(path: Path) -> Iterator[None]:
    """Set the image of the errors that are raised in the block."""
    try:
        yield
    except VmprovisionError as exc:
        if exc.image is None:
            exc.image = path
        raise


def _revived(kind: type[VmprovisionError], arguments: tuple[Any, ...]) -> VmprovisionError:
    return kind.__new__(kind, *arguments)


def unexpected_error(exc: Exception) -> VmprovisionError:
    """Return the error to show for an exception that vmprovision should have handled."""
    return VmprovisionError(
        f"unexpected {type(exc).__name__}: {exc}",
        hint="this is a fault of vmprovision: please report it with the output of -vv",
    )


class ImageError(VmprovisionError):
    """The image file cannot be used.

    The sentence names the file at fault: the image, another disk of the guest, or a
    file that one of them refers to.
    """

    exit_code: ClassVar[int] = 10
    names_file: ClassVar[bool] = True


class ImageNotFoundError(ImageError):
    """There is no such file, or it is not a disk image (a device, a socket, an empty file)."""

    exit_code: ClassVar[int] = 11


class ImageFormatError(ImageError):
    """The disk format is unknown, or the file's header and name disagree."""

    exit_code: ClassVar[int] = 12


class ImageLockedError(ImageError):
    """Another program, most often a running virtual machine, holds the image."""

    exit_code: ClassVar[int] = 13


class ImageCorruptError(ImageError):
    """The image is truncated or its metadata is damaged."""

    exit_code: ClassVar[int] = 14


class ImageReadOnlyError(ImageError):
    """The image, or the directory for its redo log, cannot be written to."""

    exit_code: ClassVar[int] = 15


class ImageSpaceError(ImageError):
    """The host's filesystem has too little free space for the redo log or its merge."""

    exit_code: ClassVar[int] = 16


class ImageReferenceError(ImageError):
    """The image refers to another file (backing or data file) that must not be followed."""

    exit_code: ClassVar[int] = 17


class ImageRecoveryError(ImageError):
    """An interrupted injection left a redo log that cannot be merged now."""

    exit_code: ClassVar[int] = 18


class ApplianceError(VmprovisionError):
    """The libguestfs appliance did not start, or one of its calls failed."""

    exit_code: ClassVar[int] = 20


class ApplianceTimeoutError(ApplianceError):
    """A call into the appliance took longer than its time limit."""

    exit_code: ClassVar[int] = 21


class ApplianceEndedError(ApplianceError):
    """The appliance was killed, or its QEMU crashed."""

    exit_code: ClassVar[int] = 23


class CommandError(VmprovisionError):
    """A host program is missing, failed or timed out.

    Attributes:
        stderr: all that the program printed on its standard error.
        is_missing: whether the program is not installed.
    """

    exit_code: ClassVar[int] = 22

    def __init__(
        self, message: str, *, stderr: str = "", hint: str = "", is_missing: bool = False
    ) -> None:
        """Keep the program's error output beside the message."""
        super().__init__(message, hint=hint)
        self.stderr = stderr
        self.is_missing = is_missing


class InspectionError(VmprovisionError):
    """The guest could not be inspected."""

    exit_code: ClassVar[int] = 30


class NoOperatingSystemError(InspectionError):
    """No filesystem of the image has an operating system."""

    exit_code: ClassVar[int] = 31


class SeveralOperatingSystemsError(InspectionError):
    """The image has several operating systems, and none was chosen."""

    exit_code: ClassVar[int] = 32


class AmbiguousInitError(InspectionError):
    """The guest's init system is unknown, or there is evidence for two."""

    exit_code: ClassVar[int] = 33


class WrongKeyError(InspectionError):
    """A key for an encrypted volume does not open it."""

    exit_code: ClassVar[int] = 35


class UnsupportedGuestError(VmprovisionError):
    """The guest was recognised, but is not supported.

    Attributes:
        configuration: the text to add to the guest's own configuration instead, if the
            guest is built from one; else empty.
    """

    exit_code: ClassVar[int] = 34

    def __init__(self, message: str, *, hint: str = "", configuration: str = "") -> None:
        """Keep the configuration unescaped: it comes from vmprovision, not from the guest."""
        super().__init__(message, hint=hint)
        self.configuration = configuration

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it, with the configuration if there is one."""
        more = {"configuration": self.configuration} if self.configuration else {}
        return {**super().as_json(), **more}


class PlanError(VmprovisionError):
    """The injection cannot be planned from these facts and options."""

    exit_code: ClassVar[int] = 40


class ApplyError(VmprovisionError):
    """An operation failed inside the guest; the image is unchanged."""

    exit_code: ClassVar[int] = 50


class GuestSpaceError(ApplyError):
    """The guest's filesystem is full or read-only; the image is unchanged."""

    exit_code: ClassVar[int] = 51


class VerificationError(VmprovisionError):
    """The guest differs from what it should be.

    Attributes:
        mismatches: one sentence for each difference, guest path first.
    """

    exit_code: ClassVar[int] = 60

    def __init__(self, message: str, *, mismatches: Sequence[str], hint: str = "") -> None:
        """Keep every mismatch beside the message."""
        super().__init__(message, hint=hint)
        self.mismatches = tuple(printable(mismatch) for mismatch in mismatches)

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it, with every mismatch."""
        return {**super().as_json(), "mismatches": list(self.mismatches)}


class ProofError(VmprovisionError):
    """The guest was booted, but did not behave as an injected guest must.

    Attributes:
        console: the last lines of the guest's console, without control characters.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, console: Sequence[str] = (), hint: str = "") -> None:
        """Keep the console's tail beside the message."""
        super().__init__(message, hint=hint)
        self.console = tuple(printable(line) for line in console)

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it, with the console's tail."""
        return {**super().as_json(), "console": list(self.console)}


class BundledRuntimeError(VmprovisionError):
    """A runtime for guests without Python cannot be built, or is damaged."""

    exit_code: ClassVar[int] = 81


class RecipeError(VmprovisionError):
    """The recipe of a guest image is invalid, or cannot be built on this host."""

    exit_code: ClassVar[int] = 80


class BakeFileError(VmprovisionError):
    """A bake file cannot be read, or is invalid.

    Attributes:
        problems: every fault of the file, each with its line.
    """

    exit_code: ClassVar[int] = 82

    def __init__(
        self, message: str, *, problems: Sequence[tuple[int, str]] = (), hint: str = ""
    ) -> None:
        """Keep every fault beside the message."""
        super().__init__(message, hint=hint)
        self.problems = tuple((line, printable(fault)) for line, fault in problems)

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it, with every fault of the file."""
        problems = [{"line": line, "message": fault} for line, fault in self.problems]
        return {**super().as_json(), "problems": problems}


class SourceError(VmprovisionError):
    """The source of a bake cannot be fetched, or is not the file that the bake file names."""

    exit_code: ClassVar[int] = 83


class FleetError(VmprovisionError):
    """The scheduler or its workers cannot be reached, or lost the work."""

    exit_code: ClassVar[int] = 90


class HypervisorError(VmprovisionError):
    """libvirt cannot be reached, or refused a request."""

    exit_code: ClassVar[int] = 91


class CancelledError(VmprovisionError):
    """The caller cancelled; the image is unchanged."""

    exit_code: ClassVar[int] = 130
