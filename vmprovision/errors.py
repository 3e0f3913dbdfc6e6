"""Every error that a caller of vmprovision meets.

One root, so that ``except VmprovisionError`` is enough; one class for every
cause that a caller can treat in its own way.  Each class has the exit code that
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
    """Return text that a terminal or a log can show: no control or format characters.

    Guests are hostile: their file names, release files and consoles may hold
    escape sequences.  Line breaks are escaped as well.
    """
    return "".join(
        char if unicodedata.category(char)[0] not in "CZ" or char == " " else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii") if char != "\xa0" else " "


class VmprovisionError(Exception):
    """What went wrong, in one sentence that names the image or guest path, and the next step.

    Attributes:
        sentence: what is wrong, without the image and without control characters.
        hint: the next step, or an empty string.
        image: the image or directory that was worked on, once that is known.
        exit_code: the exit code of the command line; docs/exit-codes.md.
        names_file: whether the sentence of this class itself names the file at fault.
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
        """The sentence, behind the image where one is known and not named in it."""
        if self.image is None or self.names_file:
            return self.sentence
        return printable(f"{self.image}: ") + self.sentence

    def __str__(self) -> str:
        """Return the message, with the hint behind it."""
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Callable[..., VmprovisionError], tuple[Any, ...], dict[str, Any]]:
        """Let an error come back from another process as it is, whatever its class keeps in it."""
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
    """Give the errors that are raised in the block the image that they are about."""
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
    """The image file itself cannot be worked on.

    The sentence names the file at fault: the image, another disk of the guest, or a
    file that one of them refers to.
    """

    exit_code: ClassVar[int] = 10
    names_file: ClassVar[bool] = True


class ImageNotFoundError(ImageError):
    """There is no such file, or it is not a disk image (a device, a socket, an empty file)."""

    exit_code: ClassVar[int] = 11


class ImageFormatError(ImageError):
    """The disk format is unknown, or the file's header and its name do not agree."""

    exit_code: ClassVar[int] = 12


class ImageLockedError(ImageError):
    """Another program, most often a running virtual machine, holds the image."""

    exit_code: ClassVar[int] = 13


class ImageCorruptError(ImageError):
    """The image is truncated or its metadata is damaged."""

    exit_code: ClassVar[int] = 14


class ImageReadOnlyError(ImageError):
    """The image, or the directory beside which its redo log must stand, cannot be written."""

    exit_code: ClassVar[int] = 15


class ImageSpaceError(ImageError):
    """The host's filesystem has no room for the redo log or for merging it."""

    exit_code: ClassVar[int] = 16


class ImageReferenceError(ImageError):
    """The image refers to another file (backing or data file) that may not be followed."""

    exit_code: ClassVar[int] = 17


class ImageRecoveryError(ImageError):
    """An interrupted injection left a redo log that cannot be merged as things stand."""

    exit_code: ClassVar[int] = 18


class ApplianceError(VmprovisionError):
    """The libguestfs appliance did not start, or one of its calls failed."""

    exit_code: ClassVar[int] = 20


class ApplianceTimeoutError(ApplianceError):
    """A call into the appliance took longer than its time limit."""

    exit_code: ClassVar[int] = 21


class ApplianceEndedError(ApplianceError):
    """The appliance was ended from outside, or its QEMU crashed."""

    exit_code: ClassVar[int] = 23


class CommandError(VmprovisionError):
    """A host program is missing, failed or ran out of time.

    Attributes:
        stderr: all that the program printed on its standard error.
        is_missing: whether the program is not installed.
    """

    exit_code: ClassVar[int] = 22

    def __init__(
        self, message: str, *, stderr: str = "", hint: str = "", is_missing: bool = False
    ) -> None:
        """Keep the program's own words beside the message."""
        super().__init__(message, hint=hint)
        self.stderr = stderr
        self.is_missing = is_missing


class InspectionError(VmprovisionError):
    """What the guest is could not be found out."""

    exit_code: ClassVar[int] = 30


class NoOperatingSystemError(InspectionError):
    """No filesystem of the image holds an operating system."""

    exit_code: ClassVar[int] = 31


class SeveralOperatingSystemsError(InspectionError):
    """The image holds more than one operating system and none was chosen."""

    exit_code: ClassVar[int] = 32


class AmbiguousInitError(InspectionError):
    """The evidence does not say which program runs services, or names two."""

    exit_code: ClassVar[int] = 33


class WrongKeyError(InspectionError):
    """A key was given for an encrypted volume and does not open it."""

    exit_code: ClassVar[int] = 35


class UnsupportedGuestError(VmprovisionError):
    """The guest is known, and this version has nothing right to put into it.

    Attributes:
        configuration: what to add to the guest's own configuration instead, where it is
            built from one; else empty.
    """

    exit_code: ClassVar[int] = 34

    def __init__(self, message: str, *, hint: str = "", configuration: str = "") -> None:
        """Keep the configuration, which is ours and not the guest's, as it is."""
        super().__init__(message, hint=hint)
        self.configuration = configuration

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it, with the configuration where there is one."""
        more = {"configuration": self.configuration} if self.configuration else {}
        return {**super().as_json(), **more}


class PlanError(VmprovisionError):
    """The wanted injection cannot be planned from these facts and options."""

    exit_code: ClassVar[int] = 40


class ApplyError(VmprovisionError):
    """An operation failed inside the guest; the image is as it was."""

    exit_code: ClassVar[int] = 50


class GuestSpaceError(ApplyError):
    """The guest's filesystem is full or cannot be written; the image is as it was."""

    exit_code: ClassVar[int] = 51


class VerificationError(VmprovisionError):
    """The guest does not hold what it should.

    Attributes:
        mismatches: one sentence for each difference, guest path first.
    """

    exit_code: ClassVar[int] = 60

    def __init__(self, message: str, *, mismatches: Sequence[str], hint: str = "") -> None:
        """Keep every mismatch beside the message."""
        super().__init__(message, hint=hint)
        self.mismatches = tuple(printable(mismatch) for mismatch in mismatches)

    def as_json(self) -> dict[str, Any]:
        """Return the error as ``--json`` prints it, every mismatch in it."""
        return {**super().as_json(), "mismatches": list(self.mismatches)}


class ProofError(VmprovisionError):
    """The guest was booted and did not do what an injected guest does.

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
    """A runtime for guests without Python cannot be built, or is not what it should be."""

    exit_code: ClassVar[int] = 81


class RecipeError(VmprovisionError):
    """The recipe of a guest image is wrong, or cannot be built on this host."""

    exit_code: ClassVar[int] = 80


class BakeFileError(VmprovisionError):
    """A bake file cannot be read, or says what no bake file can say.

    Attributes:
        problems: every fault of the file, each with the line that it is on.
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
    """What was to do the work elsewhere cannot be reached, or lost it."""

    exit_code: ClassVar[int] = 90


class HypervisorError(VmprovisionError):
    """libvirt cannot be reached, or refused what was asked of it."""

    exit_code: ClassVar[int] = 91


class CancelledError(VmprovisionError):
    """The caller cancelled; the image is as it was."""

    exit_code: ClassVar[int] = 130
