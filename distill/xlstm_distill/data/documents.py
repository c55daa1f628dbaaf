"""Check documents before they are tokenised: their columns must hold text or chat messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xlstm_distill.errors import UserError

Messages = list[dict[str, Any]]


def checked_document(document: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return a document as it is tokenised, or None if there is nothing to read or to learn.

    A null counts as empty. `where` names the document in messages.

    Raises:
        UserError: a column does not hold what its role needs.
    """
    found: dict[str, Any] = {}
    for role, value in document.items():
        if _is_empty(value):
            # A system message is optional; every other role is needed.
            if role == "system":
                continue
            return None
        if isinstance(value, str) and role != "messages":
            found[role] = value
        elif role in ("messages", "prompt"):
            messages = _checked_messages(value, f"{where}: its {role}")
            if messages is None:
                return None
            found[role] = messages
        else:
            raise UserError(f"{where}: its {role} is {type(value).__name__}; text is needed.")
    if "system" in found and _begins_with_system(found["prompt"]):
        raise UserError(
            f"{where}: its prompt begins with a system message; leave out the source's 'system' "
            "column."
        )
    return found


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _begins_with_system(prompt: str | Messages) -> bool:
    return isinstance(prompt, list) and prompt[0]["role"] == "system"


def _checked_messages(value: Any, where: str) -> Messages | None:
    """Return messages whose contents are text; None if one of them says nothing.

    A message says nothing if it calls no tool and has no content. An empty content says nothing
    where the assistant has it. Keys without a value are left out: a schema adds them to all
    messages, and templates ask whether a key is there.
    """
    malformed = UserError(f"{where} must be a list of messages with 'role' and 'content'.")
    if not isinstance(value, list):
        raise malformed
    found: Messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise malformed
        calls_tool = bool(message.get("tool_calls"))
        if "content" not in message and not calls_tool:
            raise malformed
        place = f"{where} has a content in message {len(found) + 1} that"
        content = _text_of(message.get("content"), place)
        by_assistant = message["role"] == "assistant"
        if not calls_tool and (content is None or (not content and by_assistant)):
            return None
        found.append(_without_empty({**message, "content": content}))
    return found


def _without_empty(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys whose value is null or an empty list."""
    return {key: value for key, value in message.items() if value is not None and value != []}


def _text_of(content: Any, where: str) -> str | None:
    """Return a content's text; a list of text parts is joined."""
    if content is None or isinstance(content, str):
        return content
    needed = "text, or a list of parts of type 'text', is needed."
    if not isinstance(content, list):
        raise UserError(f"{where} is {type(content).__name__}; {needed}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise UserError(f"{where} has a part of type {type(part).__name__}; {needed}")
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            raise UserError(f"{where} has a part of type {part.get('type')!r}; {needed}")
        texts.append(text)
    return "".join(texts)
