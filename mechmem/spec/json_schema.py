"""The JSON schema of experiments, for editors."""

from __future__ import annotations

import json
import re
from typing import Any

from mechmem.spec.registry import Component, load_all


def json_schema(root: type[Component]) -> dict[str, Any]:
    """The JSON schema of `root`, with a `oneOf` of the registered kinds wherever a component of a
    registry is expected."""
    definitions: dict[str, Any] = {}

    def collect(cls: type[Component]) -> dict[str, Any]:
        schema = cls.model_json_schema()
        definitions.update(schema.pop("$defs", {}))
        return schema

    schema = collect(root)
    load_all()
    for registry, members in Component.registries.items():
        definitions |= {f"{registry}.{kind}": collect(member) for kind, member in members.items()}
        kinds = [{"$ref": f"#/$defs/{registry}.{kind}"} for kind in members]
        definitions[registry] = {"oneOf": [*kinds, {"type": "string"}]}
    text = json.dumps(schema | {"$defs": definitions})
    return json.loads(re.sub(r'"x-registry": "(\w+)"', r'"$ref": "#/$defs/\1"', text))
