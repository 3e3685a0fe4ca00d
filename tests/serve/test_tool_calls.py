"""Tools: what the template shows, and calls in the model's text."""

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served_models import TOOL_TEMPLATE, serving, tokenizer, write_run

from lm.serve.router import Source
from lm.serve.tools import ToolReader

CALL = '{"name": "find", "arguments": {"what": "🙂 猫", "n": 2}}'
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": CITY}}]

# (text, content, calls)
TEXTS = [
    ("no call", "no call", 0),
    (f"<tool_call>{CALL}</tool_call>", "", 1),
    (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "\n", 2),
    (f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see. ", 1),
    (f"<tool_call>{CALL}", "", 1),
    (CALL, "", 1),
    (f"  {CALL}\n", "", 1),
    (f"[{CALL}, {CALL}]", "", 2),
    (CALL.replace("arguments", "parameters"), "", 1),
    (CALL.replace("find", "other"), CALL.replace("find", "other"), 0),
    ('{"a": 1}', '{"a": 1}', 0),
    ("{ no JSON", "{ no JSON", 0),
    ("<tool_call>no JSON</tool_call> x", "<tool_call>no JSON</tool_call> x", 0),
    ("a <tool_call", "a <tool_call", 0),
    ("a < b and [c]", "a < b and [c]", 0),
    (f"{CALL} and more", f"{CALL} and more", 0),
    ("", "", 0),
    (" \n", " \n", 0),
]


@pytest.mark.parametrize(("text", "content", "calls"), TEXTS)
@given(data=st.data())
def test_calls_do_not_depend_on_the_pieces(text, content, calls, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader, got, found = ToolReader({"find"}), "", []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        more, made = reader.read(text[start:end])
        got, found = got + more, found + made
    more, made = reader.finish()
    got, found = got + more, found + made
    assert (got, len(found), reader.found) == (content, calls, calls)
    assert [call["index"] for call in found] == list(range(calls))
    assert len({call["id"] for call in found}) == calls
    for call in found:
        assert call["function"]["name"] == "find"
        assert json.loads(call["function"]["arguments"]) == {"what": "🙂 猫", "n": 2}


def test_only_the_first_call():
    reader = ToolReader({"find"}, most=1)
    _, calls = reader.read(f"<tool_call>{CALL}</tool_call>" * 3)
    assert len(calls) == reader.found == 1


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("tools") / "one", tokenizer(TOOL_TEMPLATE), seed=1)
    with (
        serving(Source("one", str(folder))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made,
    ):
        yield made


# The model's weights are random; a grammar makes it write a call.
MARKED = r'<tool_call>\{"name": "time", "arguments": \{"city": "[a-z]{1,3}"\}\}</tool_call>'
FORMS = {
    "marked": MARKED,
    "bare": MARKED.removeprefix("<tool_call>").removesuffix("</tool_call>"),
    "two": f"(a cat )?{MARKED}{MARKED}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [False, True])
def test_chats_with_tools(client, form, stream):
    fields = {
        "model": "one",
        "messages": [{"role": "user", "content": "the cat"}],
        "tools": TOOLS,
        "seed": 1,
        "extra_body": {"structured_outputs": {"regex": FORMS[form]}},
    }
    if stream:
        content, calls, finish = "", [], None
        for chunk in client.chat.completions.create(stream=True, **fields):
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            calls += choice.delta.tool_calls or []
            finish = choice.finish_reason or finish
    else:
        choice = client.chat.completions.create(**fields).choices[0]
        content, calls = choice.message.content or "", choice.message.tool_calls
        finish = choice.finish_reason
    assert finish == "tool_calls" and "{" not in content and "<" not in content
    assert len(calls) == (2 if form == "two" else 1)
    for call in calls:
        assert call.function.name == "time" and call.type == "function" and call.id
        assert json.loads(call.function.arguments).keys() == {"city"}
    one = client.chat.completions.create(**fields, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1
    plain = client.chat.completions.create(**fields, tool_choice="none").choices[0]
    assert plain.finish_reason == "stop" and plain.message.tool_calls is None
    assert "time" in plain.message.content


def test_tools_and_their_results_reach_the_template(client):
    def tokens(messages, **fields):
        made = client.chat.completions.create(
            model="one", messages=messages, max_tokens=1, **fields
        )
        return made.usage.prompt_tokens

    ask = [{"role": "user", "content": "the cat"}]
    with_tools = tokens(ask, tools=TOOLS)
    assert with_tools > tokens(ask) == tokens(ask, tools=TOOLS, tool_choice="none")
    function = {"name": "time", "arguments": '{"city": "x"}'}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    history = [
        *ask,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    assert tokens(history, tools=TOOLS) > with_tools
    calls[0]["function"]["arguments"] = "no JSON"
    with pytest.raises(openai.BadRequestError, match="must be JSON"):
        tokens(history)
