"""Turn a bake file into the options of ``inject`` and ``prove``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.errors import PlanError
from vmprovision.planning.injection import InjectOptions, check_options
from vmprovision.proof.prove import ProofOptions
from vmprovision.runtime.choice import NAMES

if TYPE_CHECKING:
    from vmprovision.bake.loading import LoadedBakeFile

TOKEN_LIMIT = 4096


def proof_options(loaded: LoadedBakeFile) -> ProofOptions:
    """Return the options of the proof, or ``prove``'s defaults if the file has none."""
    said = loaded.bake.prove
    if said is None:
        return ProofOptions()
    return ProofOptions(
        kernel=loaded.beside(said.kernel) if said.kernel else None,
        initrd=loaded.beside(said.initrd) if said.initrd else None,
        timeout=said.timeout,
    )


def inject_options(loaded: LoadedBakeFile) -> InjectOptions:
    """Return the options of the injection, checked.

    Raises:
        PlanError: a token file cannot be read, or a setting has an invalid value.
    """
    said = loaded.bake.agent
    options = InjectOptions(
        manager_url=said.manager_url,
        port=said.port,
        token=_read_token(loaded, said.token_file),
        read_token=_read_token(loaded, said.read_token_file),
        listen=said.listen,
        allow=said.allow,
        allow_configure=said.allow_configure,
        init=said.init,
        runtime=NAMES.get(said.runtime) or loaded.beside(said.runtime),
    )
    check_options(options)
    return options


def _read_token(loaded: LoadedBakeFile, name: str | None) -> str | None:
    if name is None:
        return None
    path = loaded.beside(name)
    try:
        with path.open(encoding="ascii") as file:
            return file.read(TOKEN_LIMIT).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise PlanError(
            f"the token file {path} cannot be read: {exc}",
            hint="in CI, write the secret into the file before the bake",
        ) from exc
