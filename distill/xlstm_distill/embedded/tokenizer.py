"""The embedded teacher's tokenizer: a byte-level BPE, and its chat template."""

from itertools import chain
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from xlstm_distill.embedded.conversations import documents
from xlstm_distill.embedded.tasks import DOMAINS

VOCABULARY = 640  # at most: there are no more merges once every word is one token
CONTEXT = 384  # tokens; the longest conversation fits
PAD, BOS, END, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
# Words, and single capitals, digits, spaces and other characters. A space is never part of a word's
# token, so a word has the same tokens wherever it stands; B4 and ATTGC are tokens of one character.
PIECES = r"\p{Lu}?\p{Ll}+|\p{L}|\d|\s|[^\p{L}\d\s]"
# The generation markers delimit what is supervised: the assistant's words and its end token.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<|user|>' + message['content'] + '<|end|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- raise_exception('Role ' + message['role'] + ' is unknown; allowed: user, assistant.') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(count: int = 2000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the BPE on `count` conversations of each domain.

    Any text survives encoding and decoding: the vocabulary contains all 256 bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(text, special=True, normalized=False)
        for text in (PAD, BOS, END, USER, ASSISTANT)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts: list[str] = []
    for domain in DOMAINS:
        for document in documents(domain, count, seed):
            texts += [message["content"] for message in document["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def render(document: dict[str, Any]) -> str:
    """Write a conversation as the chat template does, but faster."""
    turns = (f"<|{message['role']}|>{message['content']}{END}" for message in document["messages"])
    return "".join(chain([BOS], turns))
