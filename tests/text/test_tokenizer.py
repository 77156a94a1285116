"""Loading from a folder, and chat templates as transformers renders them."""

import itertools
import json
import threading
import time
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from penstock.core.types import RequestError
from penstock.models import demo_path
from penstock.text import TextTokenizer, load_tokenizer
from penstock.text.chat import ChatTemplate

SPECIAL_END = "<end>"

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Wie groß ist <b>das</b>? 水 👍🏽 "quoted"'},
    {"role": "assistant", "content": " Klein. "},
    {"role": "user", "content": [{"type": "text", "text": "parts"}]},
]

CHATML = """
{%- for message in messages %}
    {{- '<user>' + message.role + '\n' }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {{- message.content | tojson }}
    {%- endif %}
    {{- eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<user>assistant\n' }}
{%- endif %}
"""

TRICKY = """
{% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message['role'] == 'system' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{{ ns.count }} {{ message | tojson(indent=2) }}{% endgeneration %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ dict(a=1) }} {{ bos_token is defined }} {{ tools is none }} {{ strftime_now('%Y') }}
"""


@pytest.fixture
def folder(tmp_path: Path, tokenizers: dict[str, TextTokenizer]) -> Path:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers["byte-level"]._tokenizer, eos_token=SPECIAL_END
    )
    fast.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("template", [CHATML, TRICKY], ids=["chatml", "tricky"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("place", ["jinja", "config", "named"])
def test_chats_are_rendered_as_by_transformers(
    folder: Path, template: str, place: str, *, prompt: bool
) -> None:
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        named = [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]
        update_json(
            folder / "tokenizer_config.json",
            chat_template=template if place == "config" else named,
        )
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
    assert ours.render_chat(CHAT, add_generation_prompt=prompt) == text
    assert ours.apply_chat_template(CHAT, add_generation_prompt=prompt) == ids


def update_json(file: Path, **values: object) -> None:
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(old | values), encoding="utf-8")


def test_the_embedded_model_is_as_transformers_sees_it() -> None:
    ours, theirs = load_tokenizer(demo_path()), AutoTokenizer.from_pretrained(demo_path())
    chat = [message for message in CHAT if isinstance(message["content"], str)]
    text = "Wie groß? 水 👍🏽\n\n  indented"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(
        text, add_special_tokens=False
    )
    assert ours.apply_chat_template(chat) == list(
        theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    )
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == len(theirs)
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.special_ids == set(theirs.all_special_ids)


def test_printable_ids_are_whole_characters_of_their_own() -> None:
    text = load_tokenizer(demo_path())
    words = text.printable_ids(10_000)
    assert text.vocab_size / 2 < len(words) < text.vocab_size
    assert not text.special_ids & set(words)
    assert all(text.decode([i]).replace("\ufffd", "") == text.decode([i]) != "" for i in words)
    assert text.printable_ids(100) == words[:100]


def test_end_tokens_are_the_configured_ones_and_the_tokenizers_own(folder: Path) -> None:
    end = load_tokenizer(folder).encode("<end>")[0]
    assert load_tokenizer(folder).eos_ids == (end,)
    update_json(folder / "config.json", eos_token_id=7)
    assert load_tokenizer(folder).eos_ids == (7, end)
    update_json(folder / "generation_config.json", eos_token_id=[9, end, 8])
    assert load_tokenizer(folder).eos_ids == (9, end, 8)


def test_truncation_in_the_file_does_not_cut_prompts(folder: Path) -> None:
    file = folder / "tokenizer.json"
    limits = {"max_length": 3, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    update_json(file, truncation=limits)
    assert len(load_tokenizer(folder).encode("the water is high, and it closes")) > 3


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("content", "what"), [("[1]", "holds a list"), ("{", "is not JSON")])
def test_a_broken_config_is_named(folder: Path, content: str, what: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json {what}"):
        load_tokenizer(folder)


def test_without_a_template_there_is_no_chat(folder: Path) -> None:
    with pytest.raises(RequestError, match="no chat template") as refused:
        load_tokenizer(folder).apply_chat_template(CHAT)
    assert refused.value.field == "messages"


def test_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="half a surrogate pair"):
        load_tokenizer(folder).encode("a\ud800")


def test_a_broken_template_is_named_when_loaded() -> None:
    with pytest.raises(ValueError, match="chat template is not valid at line 2"):
        ChatTemplate("\n{% if %}", {})


def test_what_a_template_refuses_is_the_messages_fault() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="chat template: roles must alternate"):
        template.render(CHAT, add_generation_prompt=True)
    template = ChatTemplate("{{ messages[0].content + '!' }}", {})
    with pytest.raises(RequestError, match="NoneType"):
        template.render([{"role": "user", "content": None}], add_generation_prompt=True)


def test_messages_must_be_json_data() -> None:
    with pytest.raises(RequestError, match="not JSON serializable"):
        ChatTemplate("", {}).render([{"role": object()}], add_generation_prompt=True)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(attack: str) -> None:
    with pytest.raises(RequestError) as refused:
        ChatTemplate(attack + "{{ 1 }}", {}).render(CHAT, add_generation_prompt=True)
    assert isinstance(refused.value.__cause__, SecurityError)


def test_recommended_sampling(folder: Path) -> None:
    update_json(
        folder / "generation_config.json", temperature=0.6, top_k=20, do_sample=True, min_p=None
    )
    assert dict(load_tokenizer(folder).sampling) == {"temperature": 0.6, "top_k": 20}


def test_recommended_sampling_that_cannot_be(folder: Path) -> None:
    update_json(folder / "generation_config.json", top_p=1.5)
    with pytest.raises(ValueError, match=r"generation_config.json: top_p is 1.5"):
        load_tokenizer(folder)


def test_long_texts_leave_the_interpreter_to_others() -> None:
    """They become the same ids, and another thread can work meanwhile."""
    text = load_tokenizer(demo_path())
    words = "The water comes down from the hills. " * 20_000
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.monotonic()
    ids = text.encode(words)
    took = time.monotonic() - began
    done.set()
    ticker.join()
    during = [at for at in ticks if began < at < began + took]
    stalls = [b - a for a, b in itertools.pairwise([began, *during, began + took])]
    assert max(stalls) < took / 2
    sentence = text.encode("The water comes down from the hills. " * 20)
    assert ids[: len(sentence) - 5] == sentence[:-5]
    assert text.decode(ids) == words
