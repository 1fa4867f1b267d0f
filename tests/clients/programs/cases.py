"""What the programs of Python clients share: the server, its words, and a line of JSON at the end of what went well."""

import json
import sys
import traceback

URL, MODEL, FOLDER = sys.argv[1:4]  # with /v1; a folder with the tokenizer, and to write to
HELLO, DEGREES, CITY, COUNTRY = "Hello, world.", "It is 21 degrees in Paris.", "Paris", "France"
TOO_LONG = "word " * 6000
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
    "required": ["city", "country"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def user(text):
    return {"role": "user", "content": text}


def run(version, *cases):
    """Run all; the last line names the version, those that went well, and why others did not."""
    failed, passed = {}, []
    for case in cases:
        try:
            case()
            passed.append(case.__name__)
        except BaseException:
            failed[case.__name__] = traceback.format_exc()[-3000:]
    print(json.dumps({"version": version, "passed": passed, "failed": failed}))
