"""docs/upstream.md lists every name of other libraries that the source uses and that they don't promise to keep."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers


ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "peft", "accelerate", "trl", "vllm")
# Names without an underscore that were renamed, or that no document of Transformers promises.
WATCHED = {
    "activation_checkpointing_enable",
    "eager_attention_forward",
    "gradient_checkpointing_enable",
    "is_activation_checkpointing",
    "is_gradient_checkpointing",
}
# Attributes and methods that Transformers reads from, or calls on, this package's models.
SET_FOR_TRANSFORMERS = {"_can_record_outputs", "_init_weights", "_keep_in_fp32_modules_strict", "_no_split_modules"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("modeling_gated", "configuration", "conversion", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def defined_here() -> set[str]:
    """Private functions, classes, attributes and fields of this package."""
    names = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):  # a dataclass's field
                names.add(node.target.id)
    return names - SET_FOR_TRANSFORMERS


def attribute_name(node: ast.AST) -> str | None:
    """The name of the attribute that an expression reads or writes, `getattr` and `hasattr` included."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        return node.args[1].value if isinstance(node.args[1], ast.Constant) else None
    return None


def used() -> dict[str, dict[str, set[str]]]:
    """By section of the document: names, and the files that use them."""
    imports, attributes, hooks = defaultdict(set), defaultdict(set), defaultdict(set)
    own = defined_here()
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and "." in node.module:
                if node.module.split(".")[0] in LIBRARIES:
                    for alias in node.names:
                        imports[f"{node.module}.{alias.name}"].add(file)
            elif isinstance(node, ast.ImportFrom) and node.module == "transformers":
                for alias in node.names:
                    if alias.name not in transformers.__all__:
                        imports[f"transformers.{alias.name}"].add(file)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if "." in alias.name and alias.name.split(".")[0] in LIBRARIES:
                        imports[alias.name].add(file)
            elif (name := attribute_name(node)) is not None:
                if name in SET_FOR_TRANSFORMERS | WATCHED or (re.match(r"_[a-z]", name) and name not in own):
                    attributes[name].add(file)
            elif isinstance(node, ast.FunctionDef) and node.name in SET_FOR_TRANSFORMERS:
                attributes[node.name].add(file)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in SET_FOR_TRANSFORMERS:
                attributes[node.id].add(file)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_post_import_hook":
                hooks[ast.literal_eval(node.args[1])].add(file)
    return {
        "Imported from submodules": imports,
        "Attributes of Transformers, accelerate and torch": attributes,
        "Modules that are changed when they are imported": hooks,
    }


def rows(section: str) -> list[list[str]]:
    text = (ROOT / "docs" / "upstream.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.fast
@pytest.mark.parametrize("section", list(used()))
def test_every_name_has_a_row_and_every_row_a_name(section: str) -> None:
    listed = {name.strip("`"): set(re.findall(r"`([^`]+)`", files)) for name, files, _, _ in rows(section)}
    assert len(listed) == len(rows(section)) > 0
    assert listed == used()[section]


@pytest.mark.parametrize("section", list(used()))
def test_every_row_says_why_and_names_a_test_that_there_is(section: str) -> None:
    for name, _, why, test in rows(section):
        assert why, name
        file, _, function = test.strip("`").partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), flags=re.MULTILINE), test


@pytest.mark.fast
def test_no_call_writes_the_name_of_the_cache() -> None:
    """It is `past_key_values` before Transformers 5.24 and `cache` since: modeling_gated/kv_cache.py reads it."""
    for file, tree in sources():
        for node in ast.walk(tree):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                assert not {"cache", "past_key_values"} & {keyword.arg for keyword in node.keywords}, where
            if isinstance(node, ast.Attribute):
                # A class may call its own attribute so, as a benchmark's workload does.
                assert node.attr != "past_key_values" and (node.attr != "cache" or is_self(node.value)), where
