"""`ftkit schema`: the recipe's JSON Schema, which editors complete and check from."""

import json
import sys


def schema() -> None:
    """Print the JSON Schema of recipes."""
    from ftkit.recipe.schema import Recipe

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
