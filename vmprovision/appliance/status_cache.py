"""A cache of file status, so that the appliance is asked once for each file.

Without KVM the appliance takes about a millisecond for a question, four if the answer is
an error, and ten if its daemon starts a process. All paths here are free of links. Only
``ApplianceFilesystem`` writes to the guest, and it forgets here what it changes there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import FileStatus

CONTENT_LIMIT = 64 << 10  # larger files are read once or never
CONTENTS_LIMIT = 4 << 20


@dataclass(slots=True)
class StatusCache:
    """Statuses, names, link targets and contents by guest path.

    Attributes:
        statuses: None if the path does not exist.
        shared: files with several names: a change of one changes the others.
        names: the entries of directories.
        targets: the targets of symbolic links.
        labels: SELinux labels, None where there is none.
        contents: the complete contents of small files.
    """

    statuses: dict[PurePosixPath, FileStatus | None] = field(default_factory=dict)
    shared: set[PurePosixPath] = field(default_factory=set)
    names: dict[PurePosixPath, set[str]] = field(default_factory=dict)
    targets: dict[PurePosixPath, str] = field(default_factory=dict)
    labels: dict[PurePosixPath, str | None] = field(default_factory=dict)
    contents: dict[PurePosixPath, bytes] = field(default_factory=dict)

    def keep_content(self, path: PurePosixPath, content: bytes) -> None:
        """Keep the complete content of a file, if it is small."""
        kept = sum(map(len, self.contents.values()))
        if len(content) <= CONTENT_LIMIT and kept + len(content) <= CONTENTS_LIMIT:
            self.contents[path] = content

    def forget(self, path: PurePosixPath) -> None:
        """Forget a path that changes; forget everything if other paths may change with it."""
        status = self.statuses.pop(path, None)
        self.targets.pop(path, None)
        self.labels.pop(path, None)
        self.contents.pop(path, None)
        # chmod(2) follows a link
        if path in self.shared or (status is not None and status.kind == "symlink"):
            self.clear()

    def forget_below(self, path: PurePosixPath) -> None:
        """Forget a directory on which something was mounted, and all below it."""
        maps: Iterable[dict[PurePosixPath, object]] = (
            self.statuses,  # type: ignore[assignment]  # only keys are looked at
            self.names,
            self.targets,
            self.labels,
            self.contents,
        )
        for known in maps:
            for other in [key for key in known if key == path or path in key.parents]:
                del known[other]

    def clear(self) -> None:
        """Forget everything."""
        self.statuses.clear()
        self.shared.clear()
        self.names.clear()
        self.targets.clear()
        self.labels.clear()
        self.contents.clear()


def may_hold(names: set[str], name: str) -> bool:
    """Return whether a directory with these names may have this one.

    Some filesystems, such as FAT, ignore the case of letters.
    """
    return name in names or name.casefold() in {other.casefold() for other in names}
