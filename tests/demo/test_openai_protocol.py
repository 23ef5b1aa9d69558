"""What a request to the server asks for, line by line, and that what it cannot do is refused instead of passed over."""

import base64
import io
import json

import pytest
from PIL import Image

from demo.openai_protocol import Limits, ProtocolError, chunk, completion, read_request, usage
from demo.sent_pictures import open_sent_picture
from vlm.engine import Answer

HELLO = [{"role": "user", "content": "hello"}]


def data_url(image, kind="PNG"):
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def read(limits=None, **body):
    return read_request(json.dumps({"model": "m", "messages": HELLO, **body}).encode(), "m", limits or Limits())


def refused(**body):
    with pytest.raises(ProtocolError) as caught:
        read(**body)
    return caught.value


def test_what_is_not_said_is_openais_default():
    (request,) = read(limits=Limits(most_new_tokens=77)).requests
    assert (request.temperature, request.top_p, request.seed, request.stop, request.max_new_tokens) == (1.0, 1.0, None, (), 77)
    assert read(stop=None, seed=None, temperature=None, stream=None).requests[0].temperature == 1.0


def test_settings_reach_the_engine():
    asked = read(max_completion_tokens=5, temperature=0.5, top_p=0.25, stop=["a", "", "b"], seed=9, n=3, stream=True,
                 stream_options={"include_usage": True}, chat_template_kwargs={"enable_thinking": False})  # fmt: skip
    assert [request.seed for request in asked.requests] == [9, 10, 11]  # or three times the same answer
    request = asked.requests[0]
    assert (request.max_new_tokens, request.temperature, request.top_p, request.stop) == (5, 0.5, 0.25, ("a", "b"))
    assert request.thinking is False and asked.stream and asked.include_usage
    assert read(stop="x", max_tokens=3).requests[0].stop == ("x",)
    assert read(top_p=0).requests[0].temperature == 0.0


@pytest.mark.parametrize(
    ("body", "expected"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 5}, 5),
     ({"logprobs": False, "top_logprobs": 0}, None)],
)  # fmt: skip
def test_log_probabilities_are_told_when_they_are_asked_for(body, expected):
    assert read(**body).requests[0].logprobs == expected


def test_messages_become_the_engines(tmp_path):
    picture = Image.new("RGB", (3, 2), (255, 0, 0))
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture), "detail": "high"}}, {"type": "text", "text": "what?"}]
    messages = [{"role": "developer", "content": "be short"}, {"role": "user", "content": parts, "name": "me"},
                {"role": "assistant", "content": None, "refusal": None}, {"role": "user", "content": parts[1:]}]  # fmt: skip
    found = read(messages=messages).requests[0].messages
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"] and found[2]["content"] == ""
    assert found[1]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0) and found[1]["content"][0]["image"].size == (3, 2)


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function"}]}, {"top_logprobs": 2}, {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5}, {"logit_bias": {"5": 1}}, {"audio": {}}, {"top_k": 3}, {"max_token": 5}, {"logprobs": 1},
    ],
)  # fmt: skip
def test_what_is_not_supported_or_not_known_is_refused_by_name(body):
    """An answer in which a misspelt or unsupported setting was passed over looks right and is not."""
    (key,) = body
    error = refused(**body)
    assert error.status == 400 and error.body["error"]["param"] == key and key in str(error)


def test_what_clients_send_as_a_matter_of_form_is_accepted():
    read(logprobs=False, top_logprobs=0, presence_penalty=0, frequency_penalty=0.0, tools=[], tool_choice="auto",
         response_format={"type": "text"}, user="u", metadata={"a": "b"}, store=False, logit_bias={}, functions=None)  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number from 1 to 1024"), ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 10**9}, "from 1 to 1024"), ({"max_tokens": 5, "max_completion_tokens": 5}, "expected one of them"),
        ({"temperature": 2.5}, "a number from 0 to 2"), ({"temperature": float("nan")}, "is nan"), ({"top_p": -1}, "top_p is -1"),
        ({"n": 0}, "n is 0"), ({"n": 17}, "from 1 to 16"), ({"seed": 1.5}, "seed is 1.5"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"), ({"top_logprobs": 1}, "without logprobs: true"),
        ({"stop": list("abcde")}, "at most 4"),
        ({"stop": [1]}, "stop is"), ({"stream": "yes"}, "expected true or false"), ({"n": "1"}, "n is '1'"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "without stream"), ({"chat_template_kwargs": {"x": 1}}, "enable_thinking"),
        ({"messages": []}, "missing or empty"), ({"messages": ["x"]}, "messages[0] has the role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0] has the role"), ({"messages": [{"role": "tool"}]}, "'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is a NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_shape_clients_read(body, message):
    error = refused(**body)
    assert error.status == 400 and message in str(error)
    assert error.body["error"].keys() == {"message", "type", "param", "code"} and error.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"3"])
def test_what_is_no_json_object_is_refused(content):
    with pytest.raises(ProtocolError) as caught:
        read_request(content, "m", Limits())
    assert caught.value.status == 400


def test_another_model_is_not_found():
    error = refused(model="gpt-4")
    assert error.status == 404 and error.body["error"]["code"] == "model_not_found"


def test_half_a_character_in_a_request_can_be_told():
    """JSON may carry half of a pair of surrogates, and the reply must still be UTF-8."""
    error = refused(**{"\ud800": 1})
    json.dumps(error.body, ensure_ascii=False).encode()


@pytest.mark.parametrize("url", ["https://x.y/z.png", "/etc/passwd", "file:///etc/passwd", "z.png", None, 5])
def test_the_server_reads_neither_the_web_nor_its_disk(url, tmp_path):
    """With the engine's own messages a client could have pictures of the server's disk described."""
    with pytest.raises(ValueError, match="this server fetches nothing"):
        open_sent_picture(url)
    for part in ({"type": "image", "image": "/etc/passwd"}, {"type": "image_url", "image_url": {"url": url}}):
        assert refused(messages=[{"role": "user", "content": [part]}]).status == 400


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_data_urls_are_opened_as_clients_write_them(kind):
    url = data_url(Image.new("RGB", (5, 4)), kind)
    for form in (url, url.rstrip("="), url[:40] + "\n" + url[40:], url.replace("data:", "DATA:")):
        assert open_sent_picture(form).size == (5, 4)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:image/png;base64,@@@", "data:image/png;base64,AAAA", "data:,x", "data:image/png;base64,é"]
)
def test_a_data_url_without_a_picture_is_named(url):
    with pytest.raises(ValueError, match="data:"):
        open_sent_picture(url)


def test_replies_have_openais_shape():
    answers = [
        Answer("red", "end", prompt_tokens=9, visual_tokens=4, generated_tokens=2, shared_tokens=3),
        Answer("blu", "length", 9, 4, 1),
    ]
    head = {"id": "chatcmpl-1", "created": 5, "model": "m"}
    reply = completion(head, answers)
    assert reply["object"] == "chat.completion" and [choice["finish_reason"] for choice in reply["choices"]] == ["stop", "length"]
    assert reply["choices"][1]["message"] == {"role": "assistant", "content": "blu", "refusal": None} and reply["choices"][1]["index"] == 1
    assert usage(answers) == {
        "prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3, "image_tokens": 4},
    }  # fmt: skip
    first, piece, last = chunk(head, 0, first=True), chunk(head, 0, piece="re"), chunk(head, 0, answer=answers[0])
    assert [event["choices"][0]["delta"] for event in (first, piece, last)] == [{"role": "assistant", "content": ""}, {"content": "re"}, {}]
    assert [event["choices"][0]["finish_reason"] for event in (first, piece, last)] == [None, None, "stop"]
    assert chunk(head, None)["choices"] == [] and piece["object"] == "chat.completion.chunk"
