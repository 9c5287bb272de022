"""The embedded model is what its card says: small, lossless, a template that only extends a text, words."""

import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = Path(__file__).resolve().parents[1] / "models"
MODEL = MODELS / "airline-tiny"
sys.path.insert(0, str(MODELS))

import train  # noqa: E402

TOOLS = [
    {"type": "function", "function": f}
    for f in (
        {"name": "find", "description": "Finds <b> & 'c'.", "parameters": {"properties": {"b": {}, "a": {}}}},
        {"name": "stop"},
    )
]
CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"a":1}'}}
TALK = [
    {"role": "system", "content": "Be kind. "},
    {"role": "user", "content": [{"type": "text", "text": "Grüße "}, {"type": "text", "text": "🛫"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "find", "content": '{"x": "<&>"}'},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "Thanks"},
]
TEXT = (
    "<|system|>Be kind. <|end|><|user|>Grüße 🛫<|end|>"
    '<|assistant|><tool_call>{"name": "find", "arguments": {"a":1}}</tool_call><|end|>'
    '<|tool|>{"x": "<&>"}<|end|><|assistant|>Done.<|end|><|user|>Thanks<|end|>'
)


@pytest.fixture(scope="module")
def tok():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held():
    return train.read_sessions()[1]


def render(tok, messages, **kw):
    return tok.apply_chat_template(messages, tokenize=False, **kw)


def test_size_and_context(tok, model):
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 10_000_000
    assert model.config.max_position_embeddings >= 8192
    assert tok.model_max_length >= 8192
    assert len(tok) == model.config.vocab_size
    assert model.config.rope_parameters["rope_theta"] == 100000.0


def test_special_tokens(tok, model):
    assert tok.convert_tokens_to_ids([train.PAD, train.END, *train.ROLES]) == [0, 1, 2, 3, 4, 5]
    assert (tok.eos_token, tok.pad_token) == (train.END, train.PAD)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tok.eos_token_id
    assert model.generation_config.do_sample is False
    ids = tok(TEXT)["input_ids"]
    assert ids[0] == 2  # nothing is put before the text
    assert tok.decode(ids, skip_special_tokens=True).count("<tool_call>") == 1


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world",
        "  two  spaces\n\n\ttab \r\n end ",
        "don't , stop . it 's",
        "emoji 🛫🧑‍✈️👩🏽‍🚀 and flags 🇩🇪",
        "中文字符 日本語 한국어 العربية עברית",
        "e\u0301 is not \u00e9",
        "\u0000\u0007\ufeff\u200b\uffff",
        "".join(chr(c) for c in range(0x20, 0x250)),
        "1234567890 x1y22z333 $1,234.56",
        "",
    ],
)
def test_lossless(tok, text):
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.decode(ids, clean_up_tokenization_spaces=False) == text


def test_template(tok):
    assert render(tok, TALK) == TEXT
    assert render(tok, TALK, add_generation_prompt=True) == TEXT + "<|assistant|>"
    ids = tok.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert ids == tok(TEXT + "<|assistant|>")["input_ids"]


def test_template_lists_tools(tok):
    listing = "<|system|>Tools:\n- find(b, a): Finds <b> & 'c'.\n- stop()<|end|>"
    assert render(tok, TALK, tools=TOOLS) == listing + TEXT
    assert render(tok, TALK[1:2], tools=TOOLS) == listing + "<|user|>Grüße 🛫<|end|>"


def test_template_takes_the_forms_clients_send(tok):
    flat = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}]
    nested = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    want = '<|assistant|><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|end|>'
    assert render(tok, flat) == render(tok, nested) == want
    assert render(tok, [{"role": "developer", "content": "x"}]) == "<|system|>x<|end|>"
    assert render(tok, [{"role": "someone", "content": [{"type": "image_url"}]}]) == "<|user|><|end|>"


def test_a_longer_talk_extends_the_tokens_of_a_shorter_one(tok, held):
    messages = held[0]["messages"]
    whole = tok(render(tok, messages))["input_ids"]
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            part = tok(render(tok, messages[:i], add_generation_prompt=True))["input_ids"]
            assert whole[: len(part)] == part


def test_template_has_no_python_methods():
    source = re.sub(r"\{#.*?#\}", "", (MODEL / "chat_template.jinja").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"\.\w+\(", source)


def test_minijinja_renders_the_same(tok):
    minijinja = pytest.importorskip("minijinja")
    source = (MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    for trim in (False, True):
        env = minijinja.Environment(trim_blocks=trim, lstrip_blocks=trim)
        for kw in ({}, {"tools": TOOLS}, {"add_generation_prompt": True}):
            assert env.render_str(source, messages=TALK, **kw) == render(tok, TALK, **kw)


def test_writes_words(tok, model, held):
    """Greedy answers on talks it has never seen are made of the corpus's words, and most of them end."""
    words = set(re.findall(r"[a-z]+", "\n".join(train.corpus_text([*train.read_sessions()[0], *held])).lower()))
    ended = []
    for s in held:
        first = next(i for i, m in enumerate(s["messages"]) if m["role"] == "assistant")
        prompt = tok.apply_chat_template(s["messages"][:first], add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=120)[0, prompt["input_ids"].shape[1] :]
        ended.append(out[-1].item() == tok.eos_token_id)
        text = tok.decode(out, skip_special_tokens=True)
        found = re.findall(r"[a-z]+", text.lower())
        assert len(out) >= 8, text
        assert len(found) >= 5, text
        assert sum(w in words for w in found) >= 0.8 * len(found), text
    assert sum(ended) >= len(ended) / 2

    prompt = tok.apply_chat_template(held[0]["messages"][:2], add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**prompt, min_new_tokens=20, max_new_tokens=60)
    assert out.shape[1] - prompt["input_ids"].shape[1] >= 20


def test_whole_context(model):
    ids = torch.randint(6, model.config.vocab_size, (1, 8192), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, logits_to_keep=1).logits).all()
