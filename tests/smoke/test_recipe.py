"""What a smoke run makes of a recipe."""

from pathlib import Path

import pytest

from ftkit.errors import UserError
from ftkit.smoke.recipe import check_output


def test_the_output_is_looked_for_where_the_next_run_would_be(tmp_path: Path) -> None:
    pattern = str(tmp_path / "runs" / "{name}-{n}")
    assert check_output(pattern, name="r", method="lora") == tmp_path
    # A run that is there already is not where the next one writes; a file of that name is passed over likewise.
    (tmp_path / "runs" / "r-1").mkdir(parents=True)
    (tmp_path / "runs" / "r-2").write_text("mine")
    assert check_output(pattern, name="r", method="lora") == tmp_path / "runs"
    with pytest.raises(UserError, match="r-2 is a file"):
        check_output(str(tmp_path / "runs" / "r-2"), name="r", method="lora")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["r-1", "r-2"]
