"""A student's own modeling file: one source file that needs torch and transformers alone."""

from __future__ import annotations

import ast
import functools

from xlstm_distill.export.bundle import Bundle, Place, names_used, read_module
from xlstm_distill.models.families import family_of

STUDENT, FAMILIES = "xlstm_distill.models.student", "xlstm_distill.models.families"
STANDALONE = "xlstm_distill.export.standalone"
# Elsewhere these need the recipe's sections, or import Triton.
REPLACED: dict[Place, Place] = {
    ("xlstm_distill.recipe", "MixerConfig"): (STANDALONE, "MixerConfig"),
    **{
        ("xlstm_kernels.api", name): (STANDALONE, name)
        for name in (
            "mlstm",
            "mlstm_state",
            "mlstm_step",
            "window_step",
            "hybrid_step",
            "sliding_window_attention",
        )
    },
}
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}

HEADER = '''# Copyright of the authors of xlstm-distill. Licence: Apache-2.0.
#
# Written by `xlstm-distill export` (version {version}) out of the package's own sources. Changes
# belong there.
"""Hybrid xLSTM student of a {prefix} teacher: sliding-window attention with sinks, and an mLSTM.

It needs torch and transformers alone, and trains and decodes in plain torch on any device. Where
the package xlstm-distill is installed and imported, transformers takes the package's classes.
"""

from __future__ import annotations

{imports}

# Operators are registered under a name that no other copy of this file has.
NAMESPACE = f"xlstm_{{zlib.crc32(__name__.encode()):08x}}"


'''
CLASSES = '''

# The family, and its classes.


FAMILY = {row}


class {name}Config({prefix}Config):
    """Configuration of a hybrid xLSTM student of a {prefix} teacher."""

    model_type = "xlstm_{model_type}"
    mixer: dict | None = None


class {name}Model(StudentBody, {body}):
    """Student without a head."""

    config_class = {name}Config
    family = FAMILY


class {name}ForCausalLM(StudentMixin, {causal}):
    """Student with its language model's head."""

    config_class = {name}Config
    family = FAMILY
    body_class = {name}Model
'''
HEAD_CLASS = '''

class {name}{head}(MixerInit, {prefix}{head}):
    """Student with another head."""

    config_class = {name}Config
    family = FAMILY
'''
REGISTRATION = """

# Heads find the body by its configuration.
AutoModel.register({name}Config, {name}Model, exist_ok=True)
"""


def modeling_file(model_type: str) -> str:
    """Name the modeling file of a family's students, whose teachers have this `model_type`."""
    return f"modeling_xlstm_{model_type}.py"


def auto_map(model_type: str) -> dict[str, str]:
    """Map transformers' Auto classes to those of the modeling file, for `config.json`."""
    module = modeling_file(model_type).removesuffix(".py")
    name = f"Xlstm{family_of(model_type).class_prefix}"
    found = {"AutoConfig": f"{module}.{name}Config", "AutoModel": f"{module}.{name}Model"}
    for head in _heads(model_type):
        found[AUTO_CLASSES[head]] = f"{module}.{name}{head}"
    return found


@functools.cache
def modeling_source(model_type: str, version: str) -> str:
    """Write the modeling file of a family's students.

    version: of this package, for the file's head.

    Raises:
        UserError: the family is not supported.
    """
    family = family_of(model_type)
    bundle = Bundle(REPLACED)
    for name in ("StudentBody", "StudentMixin", "MixerInit"):
        bundle.add((STUDENT, name))
    row = _family_row(model_type, bundle)
    classes = [family.class_name(end) for end in ("Config", "Model", *_heads(model_type))]
    imports = {
        *bundle.imports.values(),
        "import zlib",
        "from transformers import AutoModel",
        *(f"from transformers import {name}" for name in classes),
    }
    words = {
        "prefix": family.class_prefix,
        "name": f"Xlstm{family.class_prefix}",
        "body": family.body_name,
        "causal": family.class_name("ForCausalLM"),
        "model_type": model_type,
        "row": row,
    }
    parts = [
        HEADER.format(version=version, imports=_import_block(imports), **words),
        bundle.text().replace('"xlstm_kernels::', 'NAMESPACE + "::'),
        CLASSES.format(**words),
        *(HEAD_CLASS.format(head=head, **words) for head in _heads(model_type)[1:]),
        REGISTRATION.format(**words),
    ]
    return "".join(parts)


def _heads(model_type: str) -> list[str]:
    """Return the heads that the family has, the language model's first."""
    family = family_of(model_type)
    return [h for h in AUTO_CLASSES if hasattr(family.modeling, family.class_name(h))]


def _family_row(model_type: str, bundle: Bundle) -> str:
    """Return the family's row of the table as it is written there, and take what it needs."""
    module = read_module(FAMILIES)
    (table,) = module.statements["FAMILIES"]
    for node in ast.walk(table):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if node.args[0].value != model_type:
                continue
            for name in names_used(module, node):
                if name not in module.others:
                    bundle.add((FAMILIES, name))
            row = ast.get_source_segment(module.source, node)
            assert row is not None
            # A row of several lines is indented in its table.
            return row.replace("\n        ", "\n")
    raise AssertionError(f"{model_type} has no row in {FAMILIES}")


def _import_block(statements: set[str]) -> str:
    """Sort import statements, and join those from one module, as the project's style has them."""
    plain = sorted(s for s in statements if s.startswith("import "))
    names: dict[str, set[str]] = {}
    for statement in statements - set(plain):
        module, _, what = statement.removeprefix("from ").partition(" import ")
        names.setdefault(module, set()).add(what)
    lines = []
    for module in sorted(names):
        line = f"from {module} import {', '.join(sorted(names[module]))}"
        if len(line) > 100:
            listed = "".join(f"    {name},\n" for name in sorted(names[module]))
            line = f"from {module} import (\n{listed})"
        lines.append(line)
    return "\n".join([*plain, *lines])
