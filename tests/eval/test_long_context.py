"""Needle items, documents, and their measurement on tiny models, without a network."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from xlstm_eval.answering.coordinator import OneRank
from xlstm_eval.harness import Session
from xlstm_eval.long_context import words
from xlstm_eval.long_context.documents import make_documents, mean_losses, ranges
from xlstm_eval.long_context.files import Prepared, Source, prepare
from xlstm_eval.long_context.haystack import MOST_WORDS, Synthetic, TextFile
from xlstm_eval.long_context.items import Item, ItemMaker, range_of
from xlstm_eval.long_context.measure import help_to_measure, measure
from xlstm_eval.long_context.positions import token_losses
from xlstm_eval.long_context.prompts import Prompter, is_right
from xlstm_eval.long_context.settings import KINDS, make_settings, read_lengths
from xlstm_eval.records import EvalError
from xlstm_eval.results import read_long_context

LONGEST_SENTENCE = 60
"""Tokens; the embedded tokenizer has 512 words, so an English word takes two or three."""


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Any:
    return AutoTokenizer.from_pretrained(root / "recipes" / "quickstart" / "teacher")


@pytest.fixture(scope="module")
def items(tokenizer: Any) -> dict[tuple[str, bool], list[Item]]:
    found = {}
    for chat in (False, True):
        maker = ItemMaker(Prompter(tokenizer, chat), Synthetic(), seed=0)
        for kind in KINDS:
            found[kind, chat] = maker.make(kind, 1024, 8)
    return found


def model_of(tokens: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=tokens,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def test_every_needle_is_there_once_at_its_depth_and_answers_do_not_leak(
    items: dict[tuple[str, bool], list[Item]],
) -> None:
    for (kind, _), made in items.items():
        assert [item.depth for item in made] == [(index + 0.5) / 8 for index in range(8)]
        assert len({item.content for item in made}) == len(made)
        for item in made:
            assert item.content.count(item.needle) == 1
            assert len(item.answers) == (4 if kind in ("multi-value", "multi-query") else 1)
            # Each code is in the text once, and neither in the question nor before the answer.
            text, _, question = item.content.rpartition("\n\n")
            for code in item.answers:
                assert text.count(code) == 1
                assert code not in question + item.prefix
            haystack = text.partition("\n\n")[2]
            hidden = [
                part + "." for part in haystack.rstrip(".").split(". ") if " code of " in part
            ]
            assert len(hidden) == (1 if kind == "single" else 4)
            # The first needle that is asked for: others may be before it only in multi-key items.
            asked = [part for part in hidden if any(code in part for code in item.answers)]
            assert asked[0] == item.needle
            before = haystack[: haystack.index(item.needle)]
            after = haystack[haystack.index(item.needle) + len(item.needle) :]
            for part in hidden:
                before, after = before.replace(part, ""), after.replace(part, "")
            share = len(before) / (len(before) + len(after))
            longest = max(len(part) for part in haystack.split(". ")) + 10
            assert share == pytest.approx(item.depth, abs=longest / len(haystack))


def test_lengths_are_met_within_a_sentence_and_counted_as_lm_eval_asks(
    items: dict[tuple[str, bool], list[Item]], tokenizer: Any
) -> None:
    for (_, chat), made in items.items():
        for item in made:
            assert 1024 - LONGEST_SENTENCE <= item.tokens + item.budget <= 1024
            prompt = item.content + item.prefix
            if chat:
                start = f"<|bos|><|user|>{item.content}<|end|><|assistant|>"
                prompt = start + item.prefix
            ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
            assert len(ids) == item.tokens
            after = prompt.index(item.needle) + len(item.needle)
            assert item.distance == len(ids) - len(tokenizer(prompt[:after]).input_ids)
    depths = [(item.depth, item.distance) for item in items["single", False]]
    assert [distance for _, distance in depths] == sorted((d for _, d in depths), reverse=True)


def test_equal_seeds_make_equal_items_and_others_do_not(tokenizer: Any) -> None:
    def made(seed: int, before: int = 0) -> list[Item]:
        maker = ItemMaker(Prompter(tokenizer, False), Synthetic(), seed)
        if before:
            maker.make("single", before, 1)
        return maker.make("single", 512, 3)

    # Neither does it matter what was made before them.
    assert made(0) == made(0, before=2048)
    assert [item.answers for item in made(0)] != [item.answers for item in made(1)]


def test_keys_share_no_word_with_the_haystack() -> None:
    hay = " ".join(
        [
            *words.PEOPLE,
            *words.MANNERS,
            *words.ACTIONS,
            *words.THINGS,
            *words.PLACES,
            *words.TIMES,
        ]
    )
    assert not set(hay.split()) & set(" ".join(words.KEYS).split())
    assert len(set(words.KEYS)) == len(words.KEY_ADJECTIVES) * len(words.KEY_ANIMALS)
    assert not any(letter.isdigit() for letter in hay)


def test_answers_are_right_by_their_first_codes() -> None:
    assert is_right("single", ["123456"], " 123456. The code of")
    assert not is_right("single", ["123456"], " 1234567")
    assert not is_right("single", ["123456"], " 654321, no: 123456")
    assert is_right("multi-value", ["1", "2", "3"], "2, 3 and 1; 9")
    assert not is_right("multi-value", ["1", "2", "3"], "2, 2, 1")
    assert not is_right("multi-value", ["1", "2", "3"], "1, 2")
    assert is_right("multi-query", ["1", "2"], "1 and 2.")
    assert not is_right("multi-query", ["1", "2"], "2, 1")


def test_distances_fall_into_ranges_that_double() -> None:
    assert [range_of(d) for d in (1, 64, 65, 128, 129, 256, 65536)] == [
        64, 64, 128, 128, 256, 256, 65536,
    ]  # fmt: skip
    assert ranges(200) == [(0, 64), (64, 128), (128, 200)]


def test_a_length_without_room_and_a_context_without_lengths_are_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    maker = ItemMaker(Prompter(tokenizer, False), Synthetic(), 0)
    with pytest.raises(EvalError, match=r"lengths: 128 has no room for multi-query items"):
        maker.make("multi-query", 128, 1)
    shortest = maker.shortest("single")
    maker.make("single", shortest, 2)
    settings = make_settings(lengths=(512, 1024))
    with pytest.raises(EvalError, match=r"lengths: 512 is more than the model's context, 256"):
        prepare(settings, Source(tokenizer, "t", False, 256), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}"])
def test_a_chat_template_that_begins_no_answer_is_refused(tokenizer: Any, template: str) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(EvalError, match=r"kinds: the chat template cannot write an answer") as told:
        ItemMaker(Prompter(other, True), Synthetic(), 0).make("single", 512, 1)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lengths": (512, 256)}, "lengths: [512, 256] is not strictly ascending"),
        ({"kinds": ("singel",)}, "kinds[0]: 'singel'"),
        ({"kinds": ("single", "single")}, "kinds: ['single', 'single'] names a kind twice"),
        ({"items": 0}, "items: 0"),
        ({"kinds": (), "documents": 0}, "long context: kinds is empty and documents is 0"),
    ],
)
def test_bad_settings_are_one_line(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(EvalError) as caught:
        make_settings(**values)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_lengths_are_read_from_a_range_or_a_list() -> None:
    assert read_lengths("256..65536")[-1] == 65536
    assert read_lengths("300..1000") == (300, 600)
    assert read_lengths("256, 1000") == (256, 1000)
    for bad in ("", "256..", "a,b", "512..256", "0..4"):
        with pytest.raises(EvalError, match=r"^lengths: "):
            read_lengths(bad)


def test_items_are_made_once_and_refused_when_they_are_of_another_tokenizer(
    tokenizer: Any, tmp_path: Path
) -> None:
    settings = make_settings(lengths=(512,), kinds=("single",), items=2, documents=1)
    first = prepare(settings, Source(tokenizer, "one", False, 512), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(times) == 2
    longer = settings.model_copy(update={"lengths": (512, 1024)})
    both = prepare(longer, Source(tokenizer, "one", False, 1024), tmp_path)
    assert both.items[512] == first.items[512]
    assert both.identity != first.identity
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    # The documents are as long as the longest items.
    assert len(list(tmp_path.iterdir())) == 4
    # Another tokenizer has files of its own; what was put under their names is refused.
    other = Source(tokenizer, "two", False, 512)
    prepare(settings, other, tmp_path / "other")
    (file,) = (tmp_path / "other").glob("single-*")
    mine = next(path for path in times if path.name.startswith("single"))
    file.write_bytes(mine.read_bytes())
    with pytest.raises(EvalError, match=r"was made for another tokenizer"):
        prepare(settings, other, tmp_path / "other")
    content = mine.read_bytes()
    for damaged in (content[:-5], content.replace(b"The", b"Tha", 1), b"", b"[]\n"):
        mine.write_bytes(damaged)
        with pytest.raises(EvalError, match=r"damaged"):
            prepare(settings, Source(tokenizer, "one", False, 512), tmp_path)


def test_a_text_file_is_a_haystack_and_documents_that_do_not_overlap(
    tokenizer: Any, tmp_path: Path
) -> None:
    sentences = [f"Chapter {n} tells of river {n}." for n in range(400)]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(sentences) + " word" * 100)
    haystack = TextFile(file)
    prompter = Prompter(tokenizer, False)
    (item,) = ItemMaker(prompter, haystack, 0).make("single", 512, 1)
    parts = item.content.split(". ")
    assert sum(part.startswith("Chapter") for part in parts) > 5
    documents = make_documents(prompter, haystack, 0, 300, 3)
    told = [set(document.split(".")) for document in documents]
    assert not told[0] & told[1] - {""}
    assert not told[1] & told[2] - {""}
    assert all(prompter.count_part(document) >= 300 for document in documents)
    assert max(len(part.split()) for part in haystack._sentences) <= MOST_WORDS
    with pytest.raises(EvalError, match=r"haystack: too short"):
        make_documents(prompter, haystack, 0, 100_000, 3)
    with pytest.raises(EvalError, match=r"haystack: .*cannot be read"):
        TextFile(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(EvalError, match=r"has no words"):
        TextFile(tmp_path / "empty.txt")


def test_losses_of_chunks_are_those_of_one_pass() -> None:
    model = model_of(256)
    ids = torch.randint(3, 512, (101,), generator=torch.manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    for chunk in (7, 50, 100, 1000):
        assert torch.allclose(token_losses(model, ids, chunk), expected, atol=2e-5)
    sums = [[1.0, 2.0], [3.0, 4.0]]
    first, second = mean_losses(100, sums)
    assert (first.start, first.to, first.tokens, first.nll) == (0, 64, 126, 4 / 126)
    assert (second.start, second.to, second.tokens, second.nll) == (64, 100, 72, 6 / 72)


class Forgetful(LlamaForCausalLM):
    """A model that answers rightly if the needle is among its last tokens."""

    memory = 300
    tokenizer: Any
    widths: list[int]

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> SimpleNamespace:
        """Look the code up in the prompt's end, as the key in front of the answer asks."""
        rows = []
        self.widths += [int(row.ne(0).sum()) for row in input_ids]
        for ids in input_ids:
            key = self.tokenizer.decode(ids).rpartition("The code of ")[2]
            seen = self.tokenizer.decode(ids[-self.memory :])
            code = seen.partition(f"The code of {key} ")[2][:6]
            answer = self.tokenizer(f" {code}", add_special_tokens=False).input_ids
            rows.append(answer[:8] + [0] * (8 - len(answer)))
        whole = torch.cat([input_ids, torch.tensor(rows)], dim=1)
        return SimpleNamespace(sequences=whole, past_key_values=None)


@pytest.mark.parametrize("chat", [False, True])
def test_recall_falls_where_the_memory_of_a_model_ends(
    chat: bool, tokenizer: Any, tmp_path: Path
) -> None:
    settings = make_settings(lengths=(1024,), kinds=("single", "multi-key"), items=12, documents=0)
    ready = prepare(settings, Source(tokenizer, "t", chat, 1024), tmp_path)
    model = Forgetful(model_of(1024).config)
    model.tokenizer, model.widths = tokenizer, []
    found = measure(model, tokenizer, ready, Session(batch_size=4), chat=chat)
    for answer in found.answers:
        assert answer["right"] == (answer["distance"] + 25 < model.memory), answer
    recall = {(row.kind, row.distance_tokens): row.right / row.n for row in found.results.recall}
    for kind in settings.kinds:
        assert recall[kind, 256] == 1
        assert recall[kind, 1024] == 0
    # What was counted is what was asked.
    counted = sorted(item.tokens for item in ready.items[1024])
    assert sorted(model.widths) == counted


SETTINGS = make_settings(lengths=(256, 512, 1024), kinds=("single",), items=4, documents=3)


@pytest.fixture(scope="module")
def prepared(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    source = Source(tokenizer, "t", True, 512)
    return prepare(SETTINGS, source, tmp_path_factory.mktemp("items"))


def test_a_model_is_measured_and_an_interrupted_measurement_gives_the_same(
    prepared: Prepared, tokenizer: Any, tmp_path: Path
) -> None:
    model = model_of(512)
    whole = measure(model, tokenizer, prepared, Session(batch_size=2), chat=True)
    found = whole.results
    assert found.skipped_lengths == (1024,)
    assert [(row.length_tokens, row.n) for row in found.recall_by_length] == [(256, 4), (512, 4)]
    assert sum(row.n for row in found.recall) == 8
    assert [(row.start, row.to, row.tokens) for row in found.loss_by_position] == [
        (0, 64, 3 * 63), (64, 128, 3 * 64), (128, 256, 3 * 128), (256, 512, 3 * 256),
    ]  # fmt: skip
    assert len(whole.answers) == 8
    assert whole.protocol["items"] == prepared.identity
    (tmp_path / "long_context.json").write_text(found.model_dump_json())
    assert read_long_context(tmp_path) == found
    assert read_long_context(tmp_path / "none") is None

    # A run that stops at any batch, then one that goes on.
    calls = 0

    class Stopped(Exception):
        pass

    def progress(_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stopped

    def show(_: str) -> Any:
        return contextlib.nullcontext(progress)

    for stop in (3, 12):
        calls = 0
        folder = tmp_path / str(stop)
        session = Session(batch_size=2, journal=folder, identity="me")
        with pytest.raises(Stopped):
            measure(model, tokenizer, prepared, session, chat=True, show=show)
        kept = sum(len(file.read_bytes().splitlines()) - 1 for file in folder.iterdir())
        assert kept > 0
        again = measure(model, tokenizer, prepared, session, chat=True)
        assert again == whole


def test_two_ranks_measure_what_one_does(prepared: Prepared, tokenizer: Any) -> None:
    import queue
    import threading

    class Rank(OneRank):
        count = 2

        def __init__(self, index: int, inboxes: list[Any], back: Any) -> None:
            self.index, self.inboxes, self.back = index, inboxes, back

        def scatter(self, values: Any) -> Any:
            if values is not None:
                self.inboxes[1].put(values[1])
                return values[0]
            return self.inboxes[1].get(timeout=60)

        def gather(self, value: Any) -> Any:
            if self.index == 0:
                return [value, self.back.get(timeout=60)]
            self.back.put(value)
            return None

    alone = measure(model_of(512), tokenizer, prepared, Session(batch_size=2), chat=True)
    inboxes, back = [queue.Queue(), queue.Queue()], queue.Queue()
    first, second = (Session(batch_size=2, ranks=Rank(index, inboxes, back)) for index in (0, 1))
    model = model_of(512)
    helper = threading.Thread(
        target=help_to_measure,
        # Of its own: padding is a state of the tokenizer.
        args=(model, copy.deepcopy(tokenizer), [256, 512], True, second),
        daemon=True,
    )
    helper.start()
    together = measure(model_of(512), tokenizer, prepared, first, chat=True)
    helper.join(timeout=60)
    assert not helper.is_alive()
    assert together == alone
