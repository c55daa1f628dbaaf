"""How a model was measured, as far as its scores depend on it: one protocol for all that compare.

A protocol is plain JSON. It holds lm-eval's version, seeds, dtype, context, chat template, batch
sizes, and for each of lm-eval's tasks its version, shots, and generation settings. Prompts are
compared by their hash (`results.require_same_requests`) or item by item (`stock`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from xlstm_eval.records import EvalError

MEASURED = ("halved", "answer_seconds", "tokens", "code_not_isolated_from")
"""What an evaluation measures of itself: it may differ between models."""
MOST_SHOWN = 5


def require_same_protocol(
    protocols: Mapping[str, Mapping[str, Any]], teacher: str = "teacher"
) -> None:
    """Raise EvalError unless all models were measured under the teacher's protocol.

    ``protocols`` maps each model's name, also the teacher's, to its protocol. The message names
    what differs. What an older evaluation did not record is not compared.
    """
    expected = flat(protocols[teacher])
    for name, protocol in protocols.items():
        found = flat(protocol)
        different = [key for key in expected if key in found and expected[key] != found[key]]
        if different:
            shown = ", ".join(
                f"{key} is {found[key]!r}, the teacher's {expected[key]!r}"
                for key in different[:MOST_SHOWN]
            )
            more = len(different) - MOST_SHOWN
            rest = f" (and {more} more differences)" if more > 0 else ""
            raise EvalError(
                f"{name}: {shown}{rest}. Evaluate both under one protocol; "
                "these results are not compared."
            )


def flat(protocol: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return a protocol's settings by dotted path ("tasks.gsm8k.shots"), without MEASURED."""
    found: dict[str, Any] = {}
    for key, value in protocol.items():
        if not above and key in MEASURED:
            continue
        path = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            found |= flat(value, path)
        else:
            found[path] = value
    return found


def task_protocols(output: Mapping[str, Any], multiturn: bool) -> dict[str, dict[str, Any]]:
    """Return what lm-eval's output says of each of its tasks: version, shots, generation."""
    found = {}
    for name, config in output["configs"].items():
        found[name] = {
            "version": output.get("versions", {}).get(name),
            "shots": output.get("n-shot", {}).get(name),
            "multiturn": multiturn,
            # As JSON has it, so that a protocol that was read equals one that was made.
            "generation": json.loads(json.dumps(config.get("generation_kwargs"), default=str)),
        }
    return found


def text_hash(text: object) -> str | None:
    """Return the hash of a chat template; None where there is none."""
    if not text:
        return None
    plain = text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode()).hexdigest()
