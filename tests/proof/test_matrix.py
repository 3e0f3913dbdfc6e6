"""The support matrix says which guests were tried and which were not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.inspection.real_trees import REAL_TREES
from tests.proof.matrix import (
    REFUSED_TREES,
    as_test,
    check_refusal,
    main,
    try_recipe,
    untried,
)
from tests.proof.page import (
    FAILED,
    PAGE,
    README,
    REFUSED,
    Row,
    rows_on_page,
    sources_of,
    summarise,
)
from tests.recipe.test_recipe import with_tarball
from tests.trees import DATA_VARIABLE
from vmprovision.initsystem import DEFINITIONS
from vmprovision.progress import Control
from vmprovision.recipe import list_recipes, parse_recipe

if TYPE_CHECKING:
    from pathlib import Path


def test_the_page_speaks_of_every_recipe_and_real_tree() -> None:
    """The page has every recipe and real tree: run the matrix after adding one."""
    page = PAGE.read_text(encoding="utf-8")
    assert [r.name for r in list_recipes() if f"`{r.name}`" not in page] == []
    rows = rows_on_page()
    assert sum(row.result == "files checked" for row in rows) == len(REAL_TREES)
    assert FAILED not in {row.result for row in rows}
    assert all(summarise(rows) in text for text in (page, README.read_text(encoding="utf-8")))
    assert sources_of(rows) in page


def test_a_refused_guest_has_its_reason_on_the_page() -> None:
    """Its row says what inject says; a plan that succeeds would be a failed row."""
    rows = [check_refusal(name) for name in REFUSED_TREES]
    assert [row.result for row in rows] == [REFUSED] * len(REFUSED_TREES)
    assert all("changes of the image are lost" in row.how for row in rows)
    assert [row for row in rows if row not in rows_on_page()] == []


def test_the_page_does_not_claim_one_commit_for_boots_of_several() -> None:
    """Only boots count: to check files takes the sources of today."""
    rows = [
        Row(result="booted", commit="abc1234", how=""),
        Row(result="files checked", how=""),
    ]
    assert "commit abc1234" in sources_of(rows)
    assert "several commits" in sources_of([*rows, Row(result="booted", commit="def5678", how="")])


def test_a_summary_names_only_what_was_booted_as_booted() -> None:
    """The column of boots has no guest whose files were checked, that was refused or not tried."""
    rows = [
        Row(guest="A", arch="x86_64", system="systemd", result="booted", how=""),
        Row(guest="A", arch="x86_64", system="runit", result="files checked", how=""),
        Row(guest="A", arch="x86_64", system="systemd", result="files checked", how=""),
        Row(guest="B", arch="aarch64", system="openrc", result="files checked", how=""),
        Row(guest="C", result="not tried", how="no image"),
        Row(guest="D", arch="x86_64", pid1="shepherd", result=REFUSED, how="printed"),
    ]
    assert summarise(rows).splitlines()[2:] == [
        "| A | x86_64 | systemd | runit |",
        "| B | aarch64 | \N{EN DASH} | openrc |",
    ]


def test_the_junit_file_tells_failed_from_untried() -> None:
    """A failed boot is a failure with its reason, and a guest that was not tried is skipped."""
    recipe = list_recipes()[0]
    failed, untried_, booted = (
        as_test(recipe, Row(result=result, how="why"), 1.0)
        for result in (FAILED, "not tried", "booted")
    )
    assert str(failed.error) == "why"
    assert untried_.skipped == "why"
    assert not booted.error
    assert not booted.skipped


def test_a_guest_that_cannot_be_made_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row gives the reason, and the next run tries again."""
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    folder, tarball = with_tarball(tmp_path, {"etc": None})
    recipe = parse_recipe(folder)
    assert recipe.tarball is not None
    tarball.write_bytes(b"something else")
    row = try_recipe(recipe, Control(), tmp_path)
    assert row.result == FAILED
    assert "its SHA-256 is" in row.how
    assert not (tmp_path / "cache/matrix").exists()
    tarball.unlink()
    assert try_recipe(recipe, Control(), tmp_path).result == "not tried"


def test_rows_are_not_lost_on_a_host_without_test_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--kept`` has no older result of a root filesystem, so it needs each of them."""
    page = tmp_path / "page.md"
    page.write_bytes(PAGE.read_bytes())
    monkeypatch.setattr("tests.proof.page.PAGE", page)
    monkeypatch.setattr("tests.proof.page.README", tmp_path / "README.md")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit):
        main(["--kept"])
    assert "alpine-minirootfs-3.20.3-aarch64.tar.gz" in capsys.readouterr().err
    assert page.read_bytes() == PAGE.read_bytes()


def test_an_init_system_without_a_guest_is_said_to_be_untried() -> None:
    """The page names every init system for which we have a service."""
    rows = [Row(system="systemd", result="booted", how="")]
    assert {row.system for row in untried(rows)} == {each.name for each in DEFINITIONS} - {
        "systemd"
    }
