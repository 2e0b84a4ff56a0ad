"""The schema: described, frozen, strict; and no field that nothing reads."""

import ast
from pathlib import Path
from typing import Any

import pytest

import ftkit
from ftkit.recipe.schema import (
    METHOD_DEFAULTS,
    METHOD_SECTIONS,
    ColumnsSection,
    DataSection,
    DatasetSection,
    MixingSection,
    ModelSection,
    Recipe,
    TrainingSection,
)
from ftkit.recipe.section import Section

PACKAGE = Path(ftkit.__path__[0])
SECTIONS: tuple[type[Section], ...] = (
    Recipe,
    ModelSection,
    DataSection,
    DatasetSection,
    MixingSection,
    TrainingSection,
    *METHOD_SECTIONS.values(),
)


def test_the_list_of_sections_is_whole() -> None:
    assert {*SECTIONS, ColumnsSection} == {
        section for section in Section.__subclasses__() if section.__module__.startswith("ftkit.recipe.")
    }


def test_every_field_is_read_somewhere() -> None:
    """A key that no code reads would be accepted and ignored."""
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "recipe"]
    assert len(files) > 20
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    unread = [f"{section.__name__}.{name}" for section in SECTIONS for name in section.model_fields if name not in read]
    # A format names its columns in a table, as text.
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    unread += [f"ColumnsSection.{name}" for name in ColumnsSection.model_fields if name not in texts | read]
    assert unread == []


def _properties(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    objects = {"Recipe": schema, **schema["$defs"]}
    return [
        (f"{name}.{key}", value) for name, section in objects.items() for key, value in section["properties"].items()
    ]


def test_every_property_of_the_json_schema_is_described() -> None:
    properties = _properties(Recipe.model_json_schema())
    assert len(properties) > 60
    assert [name for name, value in properties if not value.get("description", "").endswith(".")] == []


def test_methods() -> None:
    assert METHOD_SECTIONS.keys() == METHOD_DEFAULTS.keys()
    for name, section in METHOD_SECTIONS.items():
        assert section.model_fields["type"].annotation.__args__ == (name,)  # type: ignore[union-attr]
        assert METHOD_DEFAULTS[name].keys() <= TrainingSection.model_fields.keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_frozen_and_closed(section: type[Section]) -> None:
    assert section.model_config["frozen"]
    assert section.model_config["strict"]
    assert section.model_config["extra"] == "forbid"
