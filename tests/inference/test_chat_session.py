"""A conversation over one cache says what it would say if each turn were read anew."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

import plmtune.inference.chat_session
from plmtune.inference.chat_session import ChatSession
from plmtune.inference.sampling import PrefixCache, complete
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import byte

SHAPE = {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "init_std": 0.2}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '!' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
)


@cache
def tokenizer() -> Tokenizer:
    return byte()


def small_plm(max_seq_len: int = 256) -> Decoder:
    torch.manual_seed(0)
    mla = component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    ffn = component("ffn", "squared_relu", hidden_dim=48)
    return plm(tokenizer().vocab_size, attention=mla, ffn=ffn, max_seq_len=max_seq_len, **SHAPE).eval()


def small_llama(max_seq_len: int = 256) -> Decoder:
    torch.manual_seed(0)
    gqa = component("attention", "gqa", num_kv_heads=1)
    ffn = component("ffn", "swiglu", hidden_dim=48)
    return llama(tokenizer().vocab_size, attention=gqa, ffn=ffn, max_seq_len=max_seq_len, **SHAPE).eval()


def begin(model: Decoder | None = None) -> ChatSession:
    return ChatSession(model or small_plm(), tokenizer(), ChatTemplate(TEMPLATE, tokenizer(), "the test's template"))


def ask(talk: ChatSession, text: str, n: int = 8, **options: float) -> str:
    return "".join(talk.ask(text, max_new_tokens=n, **({"temperature": 0} | options)))


def says(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[list[int]]:
    """Let the model say these, one after another; return the prompts that it reads."""
    prompts: list[list[int]] = []
    waiting = list(answers)

    def pretend(model: Decoder, tokenizer: Tokenizer, prompt: list[int], **options: object) -> Iterator[str]:
        prompts.append(prompt)
        prefix_cache = options["prefix_cache"]
        assert isinstance(prefix_cache, PrefixCache)
        prefix_cache.ids = list(prompt)
        for letter in waiting.pop(0):
            prefix_cache.ids.append(ord(letter))
            yield letter

    monkeypatch.setattr(plmtune.inference.chat_session, "complete", pretend)
    return prompts


class TestMemory:
    @pytest.mark.parametrize("make", [small_plm, small_llama])
    def test_answers_are_those_of_a_model_that_reads_all_anew(self, make) -> None:
        model, options = make(), {"max_new_tokens": 12, "temperature": 0}
        prefix_cache = PrefixCache(model)
        prompts = ["How are you", "How are you? And", "How", "", "Something else, much longer than before" * 2, "How"]
        for prompt in prompts:
            anew = "".join(complete(model, tokenizer(), prompt, **options))
            assert "".join(complete(model, tokenizer(), prompt, prefix_cache=prefix_cache, **options)) == anew

    def test_only_what_is_new_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, read = small_plm(), []
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda t, **how: read.append(t.shape[1]) or forward(t, **how))
        prefix_cache = PrefixCache(model)
        list(complete(model, tokenizer(), "a" * 50, max_new_tokens=3, temperature=0, prefix_cache=prefix_cache))
        assert read == [50, 1, 1]
        read.clear()
        list(complete(model, tokenizer(), [*prefix_cache.ids, *b"bcd"], max_new_tokens=1, prefix_cache=prefix_cache))
        assert read == [1 + 3]  # the last token that was written, which nothing followed, and the new ones
        read.clear()
        list(complete(model, tokenizer(), "a" * 50, max_new_tokens=1, prefix_cache=prefix_cache))
        assert read == [1]

    def test_survives_an_interrupt_in_the_middle_of_a_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small_plm()
        prefix_cache = PrefixCache(model)
        layer, calls = model.layers[1].forward, []

        def interrupted(*args, **options):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return layer(*args, **options)

        options = {"max_new_tokens": 8, "temperature": 0}
        monkeypatch.setattr(model.layers[1], "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(complete(model, tokenizer(), "What is", prefix_cache=prefix_cache, **options))
        again = "".join(complete(model, tokenizer(), "What is it", prefix_cache=prefix_cache, **options))
        assert again == "".join(complete(model, tokenizer(), "What is it", **options))


class TestConversation:
    def test_each_turn_goes_on_from_what_was_said(self) -> None:
        talk, model = begin(), small_plm()
        talk.instruct("be kind")
        first = ask(talk, "one")
        second = ask(talk, "two")
        assert talk.messages == [
            Message("user", "one"), Message("assistant", first), Message("user", "two"), Message("assistant", second),
        ]  # fmt: skip
        prompt = talk.template.encode_prompt([Message("system", "be kind"), *talk.messages[:3]]).tolist()
        anew = complete(model, tokenizer(), prompt, max_new_tokens=8, temperature=0)
        assert second == "".join(anew)

    def test_the_seed_decides(self) -> None:
        answers = [ask(begin(), "one", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        assert answers[0] == answers[1] != answers[2]

    def test_says_whether_an_answer_was_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        talk = begin()
        says(monkeypatch, "12345", "1234")
        ask(talk, "one", n=5)
        assert talk.cut
        ask(talk, "two", n=5)
        assert not talk.cut

    def test_an_interrupted_answer_is_kept_as_far_as_it_came(self, monkeypatch: pytest.MonkeyPatch) -> None:
        talk = begin()
        says(monkeypatch, "first", "second")
        pieces = talk.ask("one", max_new_tokens=8)
        assert [next(pieces), next(pieces)] == ["f", "i"]
        pieces.close()
        assert talk.messages == [Message("user", "one"), Message("assistant", "fi")]
        pieces = talk.ask("two", max_new_tokens=8)
        pieces.close()  # before anything came
        assert len(talk.messages) == 2

    def test_a_question_without_an_answer_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        talk = begin()
        says(monkeypatch, " \n", "yes")
        assert ask(talk, "one") == " \n"
        assert talk.messages == []
        ask(talk, "two")
        assert talk.messages == [Message("user", "two"), Message("assistant", "yes")]

    def test_a_special_token_spelled_out_by_the_model_does_not_end_the_conversation(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        talk = begin()
        says(monkeypatch, f"yes{tokenizer().eos}no", "good")
        ask(talk, "one")
        assert talk.messages[-1] == Message("assistant", "yes")
        assert ask(talk, "two") == "good"

    def test_special_tokens_in_a_message_are_refused_and_the_conversation_goes_on(self) -> None:
        talk = begin()
        first = ask(talk, "one")
        with pytest.raises(BadRow, match="holds the text of the special token"):
            ask(talk, f"two {tokenizer().eos}")
        assert talk.messages == [Message("user", "one"), Message("assistant", first)]
        with pytest.raises(BadRow, match="holds the text of the special token"):
            talk.instruct(tokenizer().eos)
        assert talk.system is None

    def test_undo_and_reset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        talk = begin()
        prompts = says(monkeypatch, "A", "B", "C", "D")
        ask(talk, "one"), ask(talk, "two")
        assert talk.undo() == Message("user", "two")
        ask(talk, "three")
        assert bytes(prompts[-1][:4]) == b"uone" and b"two" not in bytes(i for i in prompts[-1] if i < 256)
        talk.instruct("be kind")
        talk.reset()
        assert talk.undo() is None
        ask(talk, "four")
        assert bytes(prompts[-1]) == b"sbe kind!ufour!a"


class TestRoom:
    def test_the_oldest_messages_are_forgotten_and_the_system_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        talk = begin(small_plm(max_seq_len=64))
        talk.instruct("S")
        prompts = says(monkeypatch, *["yes"] * 10)
        forgotten = []
        for number in range(10):
            ask(talk, f"q{number}", n=16)
            forgotten.append(talk.forgotten)
            assert len(prompts[-1]) <= 64 - 16
            assert bytes(prompts[-1][:2]) == b"sS"
        assert forgotten[:3] == [0, 0, 0] and forgotten[-1] > 0
        assert len(set(forgotten)) < 5  # several at a time, so that most turns find their beginning in the cache
        assert len(talk.messages) == 20  # all are there to be saved

    def test_a_message_longer_than_the_model_is_refused_with_both_numbers(self) -> None:
        talk = begin(small_plm(max_seq_len=64))
        first = ask(talk, "one")
        with pytest.raises(ValueError, match="the message has 103 tokens, the model's max_seq_len is 64"):
            ask(talk, "x" * 100)
        assert talk.messages[-1].content == first and talk.forgotten == 0

    def test_a_message_that_all_but_fills_the_model_gets_what_is_left(self) -> None:
        talk = begin(small_plm(max_seq_len=64))
        ask(talk, "x" * 58, n=16)
        assert talk.context == 64 and talk.cut

    def test_very_many_turns_are_not_all_put_through_the_template(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plmtune.inference.chat_session, "_MOST_MESSAGES", 4)
        talk = begin()
        says(monkeypatch, *["yes"] * 5)
        for _ in range(5):
            ask(talk, "q")
        assert talk.forgotten == 4


class TestTranscript:
    def test_is_gone_on_from(self) -> None:
        talk = begin()
        talk.instruct("be kind")
        ask(talk, "one")
        other = begin()
        other.restore(talk.transcript)
        assert (other.system, other.messages) == ("be kind", talk.messages)
        assert ask(other, "two") == ask(talk, "two")

    def test_one_that_the_template_refuses_changes_nothing(self) -> None:
        talk = begin()
        first = ask(talk, "one")
        with pytest.raises(BadRow):
            talk.restore([Message("user", tokenizer().eos), Message("assistant", "a")])
        for roles in (["user"], ["assistant"], ["user", "assistant", "tool", "assistant"], ["system", "system"]):
            with pytest.raises(BadRow, match="does not alternate user and assistant"):
                talk.restore([Message(role, "x") for role in roles])
        assert talk.messages[-1].content == first
