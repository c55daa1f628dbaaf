"""The embedded teacher: its split, its conversations, its tokenizer, its committed files and its checkpoint."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded import DOMAINS, documents
from xlstm_distill.embedded.items import files
from xlstm_distill.embedded.packing import PROMPT_WEIGHT, take
from xlstm_distill.embedded.scoring import accuracies, answers
from xlstm_distill.embedded.tasks import FACTS, TASKS, draw, held_out_items, is_held_out
from xlstm_distill.embedded.tokenizer import VOCABULARY, render, train_tokenizer
from xlstm_distill.embedded.train import Settings, build, learning_rate, loss_of, main
from xlstm_distill.errors import UserError

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart"
TEACHER = QUICKSTART / "teacher"
RECALL = tuple(name for name, task in TASKS.items() if task.table)
SMALL = Settings(tokens=2048, rows=2, context=256, layers=2, hidden=64, intermediate=64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True)


def questions(document: dict) -> list[tuple[str, str]]:
    """Return the conversation's (question, answer) pairs as evaluation would ask them, the table before each."""
    texts = [message["content"] for message in document["messages"]]
    table = texts[0][: texts[0].rfind("\n") + 1] if document["task"] in RECALL else ""
    return [
        (table + q.removeprefix(table), a) for q, a in zip(texts[::2], texts[1::2], strict=True)
    ]


def solve(prompt: str) -> str | None:
    """Answer a question from its words alone, written without the generators; None for memorised facts."""
    lines = prompt.split("\n")
    if found := re.fullmatch(r"Compute (\d+)\+(\d+)\.", prompt):
        return str(int(found[1]) + int(found[2]))
    if found := re.fullmatch(r"\w+ has (\d+) \w+, (\w+) (\d)\. How many\?", prompt):
        sign = {"gets": 1, "buys": 1, "finds": 1, "loses": -1, "sells": -1, "gives": -1}[found[2]]
        return str(int(found[1]) + sign * int(found[3]))
    if prompt.startswith("Largest of"):
        return max(re.findall(r"\d+", prompt), key=int)
    if found := re.fullmatch(r"Convert (\d+) (\w+) to (\w+)\.", prompt):
        size = {
            "km": 10**6,
            "hm": 10**5,
            "m": 1000,
            "dm": 100,
            "cm": 10,
            "mm": 1,
            "kg": 10**6,
            "g": 1000,
            "mg": 1,
        }
        return str(int(found[1]) * size[found[2]] // size[found[3]])
    if found := re.fullmatch(r"(?:How many |What is in |Gift for |echo \$)(\w+)[?;]", lines[-1]):
        return (
            next(line for line in lines if re.match(rf"{found[1]}\b", line))
            .replace("=", " ")
            .split()[-1]
        )
    if prompt.startswith("print(") or "=" in lines[0]:
        printed: list[str] = []
        exec(prompt, {"print": lambda *values: printed.append(" ".join(map(str, values)))})
        return printed[0]
    if prompt.startswith(("Repeat: ", "Sort: ", "First word of: ", "Last word of: ")):
        order, words = prompt.split(": ")[0], prompt.split(": ")[1].split()
        chosen = {
            "Repeat": words,
            "Sort": sorted(words),
            "First word of": words[:1],
            "Last word of": words[-1:],
        }
        return " ".join(chosen[order])
    return None


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_deterministic_short_and_alternate(
    domain: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, again, other = (list(documents(domain, 300, seed)) for seed in (3, 3, 4))
    assert first == again != other
    for document in first:
        assert document["domain"] == domain
        roles = [message["role"] for message in document["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(tokenizer(render(document))["input_ids"]) <= 256
    assert {len(document["messages"]) for document in first} >= {2, 4, 8}


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_training_conversation_asks_an_evaluated_item(domain: str) -> None:
    evaluated = {item.prompt for task in TASKS.values() for item in held_out_items(task, 100)}
    asked = {
        question for document in documents(domain, 1500, 0) for question, _ in questions(document)
    }
    assert asked
    assert not asked & evaluated


@pytest.mark.parametrize("name", TASKS)
def test_split_sides_share_no_problem(name: str) -> None:
    rng = random.Random(0)
    trained = {draw(TASKS[name], rng, held_out=False).key for _ in range(2000)}
    held = {item.key for item in held_out_items(TASKS[name], 100)}
    assert len(held) == 100
    assert not trained & held
    assert all(is_held_out(name, key) for key in held)


def test_order_of_operands_does_not_cross_the_split() -> None:
    rng = random.Random(1)
    trained = {draw(TASKS["add"], rng, held_out=False).prompt for _ in range(20_000)}
    for item in held_out_items(TASKS["add"], 100):
        a, b = re.findall(r"\d+", item.prompt)
        assert f"Compute {b}+{a}." not in trained


def test_every_fact_keeps_three_wordings_for_training() -> None:
    rng = random.Random(0)
    trained = {draw(TASKS["fact"], rng, held_out=False).prompt for _ in range(15_000)}
    for wordings, _ in FACTS:
        assert sum(wording in trained for wording in wordings) == 3


@pytest.mark.parametrize("name", [name for name in TASKS if name != "fact"])
def test_answers_are_right_by_an_independent_solver(name: str) -> None:
    for item in held_out_items(TASKS[name], 100):
        assert solve(item.prompt) == item.answer


@pytest.mark.parametrize("name", RECALL)
def test_recall_lies_beyond_the_window(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for item in held_out_items(TASKS[name], 100):
        table, _, question = item.prompt.rpartition("\n")
        key = re.findall(r"\w+", question)[-1]
        last = re.search(rf"^{key}\b.*$", table, flags=re.MULTILINE)
        assert last
        between = tokenizer(item.prompt[last.end() : item.prompt.rindex("\n") + 1])["input_ids"]
        assert len(between) >= 40


def test_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'mth'.*math, code, stem, chat.*Did you mean 'math'"):
        documents("mth", 1, 0)


def test_import_brings_no_torch() -> None:
    code = "import sys, xlstm_distill.embedded; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tokenizer_round_trips_and_splits_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == VOCABULARY
    for text in ("Größe 42 €\n\t x==y", "  two  spaces ", "日本語 🙂", "print((3+4)*12)"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_template_marks_answers_and_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "Compute 1+2."},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Compute 10+20."},
        {"role": "assistant", "content": "30"},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "3<|end|>30<|end|>"
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids == tokenizer(render({"messages": messages}))["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert asked == "<|bos|><|user|>Compute 1+2.<|end|><|assistant|>"


def test_packed_rows_equal_separate_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(SMALL, tokenizer).eval()
    batch = next(take(tokenizer, 1, rows=2, length=256, seed=0))
    with torch.no_grad():
        packed = model(
            batch.input_ids, attention_mask=batch.mask(), position_ids=batch.position_ids
        ).logits
        for number in range(int(batch.segment_ids[0].max()) + 1):
            at = batch.segment_ids[0] == number
            alone = model(batch.input_ids[:1, at]).logits
            torch.testing.assert_close(packed[:1, at], alone, rtol=1e-4, atol=1e-5)
    assert sorted(batch.weights.unique().tolist()) == pytest.approx([0.0, PROMPT_WEIGHT, 1.0])


def test_loss_weights_agree_with_the_template_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = next(take(tokenizer, 1, rows=1, length=256, seed=0))
    document = next(documents("math", 512, 0))
    mask = tokenizer.apply_chat_template(
        document["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    weights = batch.weights[0, : len(mask["input_ids"])]
    assert (weights == 1.0).long().tolist() == mask["assistant_masks"]


def test_induction_is_there_before_training(tokenizer: PreTrainedTokenizerFast) -> None:
    table = "Flasks:\nu Cr\nq Se\nj Be\np Fe\nf Mo\ng Mg\nWhat is in p?"
    ids = tokenizer(f"<|bos|><|user|>{table}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())

    def looks(induction: bool) -> tuple[float, float]:
        """Return layer 0's attention at the four offsets (the least) and layer 1's on the right value."""
        model = build(Settings(induction=induction), tokenizer)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            first, second, _ = model(ids, output_attentions=True).attentions
        offsets = min(float(first[0, head].diagonal(-head - 1).mean()) for head in range(4))
        return offsets, float(second[0, 0, -1, tokens.index("Fe")])

    assert max(looks(induction=False)) < 0.2
    assert min(looks(induction=True)) > 0.5


def test_training_is_deterministic_and_learns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def losses() -> list[float]:
        model, curve = build(SMALL, tokenizer), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in take(tokenizer, 8, rows=2, length=256, seed=0):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return curve

    first = losses()
    assert first == losses()
    assert first[-1] < first[0] - 0.3
    assert learning_rate(SMALL.steps - 1, SMALL) < learning_rate(SMALL.steps // 2, SMALL)
    assert main(["--out", str(tmp_path / "t"), "--tokens", "0"]) == 2
    assert not (tmp_path / "t").exists()


def test_committed_tasks_are_what_the_generators_write() -> None:
    written = files()
    found = {path.name: path.read_text() for path in (QUICKSTART / "tasks").iterdir()}
    assert found == written


def test_committed_checkpoint_has_the_right_shape(teacher: LlamaForCausalLM) -> None:
    size = sum(path.stat().st_size for path in TEACHER.iterdir())
    assert size <= 8 * 2**20
    assert isinstance(teacher, LlamaForCausalLM)
    parameters = sum(p.numel() for p in teacher.parameters())
    log = json.loads((TEACHER / "training.json").read_text())
    assert 500_000 <= parameters == log["parameters"] <= 3_000_000
    assert teacher.config.num_key_value_heads < teacher.config.num_attention_heads
    assert teacher.config.max_position_embeddings >= 256
    assert set(log["held_out_accuracy"]) == set(TASKS)


def test_teacher_answers_most_tasks(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = accuracies(teacher, tokenizer, count=25)
    assert sum(score >= 0.8 for score in scores.values()) >= 12, scores
    for domain in DOMAINS:
        assert sum(scores[n] >= 0.8 for n, task in TASKS.items() if task.domain == domain) >= 2, (
            scores
        )


def test_a_window_alone_fails_at_recall(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = accuracies(teacher, tokenizer, count=25, tasks=RECALL, window=32, sinks=4)
    assert max(scores.values()) <= 0.3, scores


def test_scoring_without_cache_equals_generate(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    items = [item for name in ("add", "copy", "stock") for item in held_out_items(TASKS[name], 2)]
    for item, mine in zip(items, answers(teacher, tokenizer, items), strict=True):
        message = [{"role": "user", "content": item.prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = teacher.generate(**encoded, max_new_tokens=10, do_sample=False)
        start = encoded["input_ids"].shape[1]
        assert tokenizer.decode(output[0, start:], skip_special_tokens=True) == mine
