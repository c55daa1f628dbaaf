"""The model card of an exported student: pure functions of facts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

import yaml

from xlstm_distill.recipe import MixerConfig, Recipe
from xlstm_distill.recipe.kept import KeptAttention
from xlstm_distill.recipe.shown import shown_recipe, teacher_name
from xlstm_distill.runtime.console import byte_size

TAGS = ["xlstm", "distillation", "linear-attention", "hybrid"]
PAPER = "arXiv 2603.15590"


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    model: the student's name in its run. report: the run's report, Markdown. state_bytes: what
    decoding holds for a sequence; bytes_per_token: what each token adds to that, where heads keep
    full attention. key_bytes: what the teacher's cache grows by with each token.
    """

    name: str
    model: str | None
    family: str
    recipe: Recipe | None
    report: str | None
    mixer: MixerConfig
    dtype: str
    weight_bytes: int
    state_bytes: int
    bytes_per_token: int
    key_bytes: int
    version: str
    licence: str | None
    has_chat: bool


def model_card(facts: CardFacts) -> str:
    """Write a model card in Markdown, with the hub's metadata at its head."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {_title(facts)}",
        _summary(facts),
        _usage(facts),
        _state(facts),
        _licence(facts),
    ]
    if facts.report:
        parts.append("## Evaluation\n\n" + _demoted(facts.report))
    if facts.recipe:
        parts.append(f"## Recipe\n\n```yaml\n{shown_recipe(facts.recipe).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _title(facts: CardFacts) -> str:
    return facts.name if facts.model is None else f"{facts.name} ({facts.model})"


def _metadata(facts: CardFacts) -> dict[str, object]:
    found: dict[str, object] = {
        "license": _licence_name(facts) or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
    }
    if facts.recipe and not PurePath(facts.recipe.teacher.path).is_absolute():
        found["base_model"] = facts.recipe.teacher.path
        found["base_model_relation"] = "finetune"
    return found


def _teacher(facts: CardFacts) -> str:
    if facts.recipe is None:
        return f"a {facts.family} model"
    name, revision = teacher_name(facts.recipe.teacher), facts.recipe.teacher.revision
    return f"`{name}`" + (f" (revision `{revision}`)" if revision else "")


def _summary(facts: CardFacts) -> str:
    mixer = facts.mixer
    parts = {
        "window": f"attention to the last {mixer.window} tokens and to the first {mixer.sinks}",
        "mlstm": f"an mLSTM over the whole document ({mixer.feature_map} feature map)",
    }
    branches = " and ".join(parts[branch] for branch in sorted(mixer.branches)[::-1])
    kept = f" {_kept(mixer.attention)}." if mixer.attention else ""
    return (
        f"A hybrid xLSTM student of {_teacher(facts)}: in place of the teacher's attention, every "
        f"layer has {branches}.{kept} "
        f"Distilled as in {PAPER} with xlstm-distill {facts.version}."
    )


def _kept(attention: KeptAttention) -> str:
    """Say which layers and heads keep full attention."""
    parts = []
    if attention.layers:
        parts.append(f"layers {', '.join(map(str, attention.layers))}")
    if attention.every is not None:
        first = attention.every - 1 if attention.offset is None else attention.offset
        parts.append(f"one layer in {attention.every}, from layer {first} on")
    parts += [
        f"heads {', '.join(map(str, heads))} of layer {layer}"
        for layer, heads in attention.heads.items()
    ]
    listed = "; ".join(parts)
    return f"{listed[0].upper()}{listed[1:]} (from 0) keep the teacher's full attention"


def _usage(facts: CardFacts) -> str:
    prompt = 'tokenizer("Once upon a time", return_tensors="pt")'
    if facts.has_chat:
        prompt = (
            'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Hello!"}],\n'
            '    add_generation_prompt=True,\n    return_tensors="pt",\n    return_dict=True,\n)'
        )
    return f"""## Use

With torch and transformers alone; the repository's modeling file is then run:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
inputs = {prompt}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

With the package (kernels for GPUs, training): `pip install xlstm-distill`, then `import
xlstm_distill` before `from_pretrained`, without `trust_remote_code`. On the command line:
`xlstm-distill chat PATH`.

Pad prompts on the left. A cache cannot give tokens back, so assisted decoding is refused."""


def _state(facts: CardFacts) -> str:
    # More than all keys of the teacher are not kept.
    equal = facts.state_bytes // max(1, facts.key_bytes - facts.bytes_per_token)
    what = "state of one sequence, of any length"
    if facts.bytes_per_token:
        what = f"state of one sequence, and {facts.bytes_per_token:,} bytes for each token"
    return f"""## Size

| what | bytes |
|---|---|
| weights ({facts.dtype}) | {byte_size(facts.weight_bytes)} |
| {what} | {byte_size(facts.state_bytes)} |
| the teacher's cache, for each token | {byte_size(facts.key_bytes)} |

From {equal + 1} tokens on the state is smaller than the teacher's cache."""


def _licence(facts: CardFacts) -> str:
    name = _licence_name(facts)
    words = f"`{name}`" if name else "that of the teacher, which this export does not know"
    return (
        f"## Licence and attribution\n\nThe weights derive from {_teacher(facts)}, whose "
        f"licence and terms apply to them: {words}. The modeling file is Apache-2.0."
    )


def _licence_name(facts: CardFacts) -> str | None:
    """Return the licence that was given, else the one that the teacher's own card names."""
    if facts.licence or facts.recipe is None:
        return facts.licence
    card = Path(facts.recipe.teacher.path) / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        content = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    found = content.get("license") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def _demoted(report: str) -> str:
    """Put a report's headings one level lower, and leave out its title."""
    lines = []
    inside_code = False
    for line in report.split("\n"):
        inside_code ^= line.startswith("```")
        if line.startswith("# ") and not inside_code:
            continue
        heading = line.startswith("#") and not inside_code
        lines.append(f"#{line}" if heading else line)
    return "\n".join(lines).strip()
