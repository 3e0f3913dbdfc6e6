"""A cache of the tests' own, in which they may damage appliances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE
from vmprovision.errors import BundledRuntimeError
from vmprovision.host.cache import CACHE_VARIABLE, cache_directory
from vmprovision.runtime.store import (
    LIST,
    cached_folder,
    find_runtime,
    host_architecture,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This module's own cache, with the runtime and the results of KVM's trials."""
    try:
        runtime = find_runtime(host_architecture())
    except BundledRuntimeError as exc:
        require(condition=False, reason=exc.message)
    known = list(cache_directory().glob("accelerator-*.json"))
    cache = tmp_path_factory.mktemp("cache")
    for path in known:  # so that only one cache waits for a KVM that hangs
        (cache / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(cache))
        patch.delenv(STOCK_VARIABLE, raising=False)
        folder = cached_folder()
        folder.mkdir(mode=0o700, parents=True)
        for name in (runtime.path.name, LIST):
            (folder / name).write_bytes((runtime.path.parent / name).read_bytes())
        yield cache
