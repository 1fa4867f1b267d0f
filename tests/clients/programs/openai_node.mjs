// openai-node: chat, streams, `.parse`, tools in two steps, an overflow, a cancel.
import { DEGREES, HELLO, MODEL, TOO_LONG, URL_V1, check, load, run, version } from "./cases.mjs";

const { default: OpenAI } = await load("openai");
const { zodResponseFormat } = await load("openai/helpers/zod");
const { z } = await load("zod");

const client = new OpenAI({ baseURL: URL_V1, apiKey: "none", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { name: "weather", description: "the weather in a city", parameters };

await run(version("openai"), {
  async chat() {
    const answer = await client.chat.completions.create({ model: MODEL, messages: user("hello") });
    check(answer.choices[0].message.content, HELLO);
    check(answer.choices[0].finish_reason, "stop");
  },
  async stream() {
    const options = { stream: true, stream_options: { include_usage: true } };
    let said = "";
    let usage = null;
    for await (const chunk of await client.chat.completions.create({ model: MODEL, messages: user("hello"), ...options })) {
      said += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    check(said, HELLO);
    check(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
  },
  async tools() {
    // The runner calls the function itself, and sends its result, until the model says something.
    const called = [];
    const run = async (given) => {
      called.push(given);
      return "21";
    };
    const tool = { type: "function", function: { ...weather, parse: JSON.parse, function: run } };
    const runner = client.chat.completions.runTools({ model: MODEL, messages: user("weather"), tools: [tool], stream: true });
    check(await runner.finalContent(), DEGREES);
    check(called, [{ city: "Paris" }]);
    check((await runner.finalChatCompletion()).choices[0].finish_reason, "stop");
  },
  async schema() {
    const place = z.object({ city: z.string(), country: z.string() });
    const response_format = zodResponseFormat(place, "place");
    const answer = await client.chat.completions.parse({ model: MODEL, messages: user("where?"), response_format });
    check(answer.choices[0].message.parsed, { city: "Paris", country: "France" });
  },
  async overflow() {
    try {
      await client.chat.completions.create({ model: MODEL, messages: user(TOO_LONG) });
      throw new Error("it was taken");
    } catch (error) {
      check([error.constructor.name, error.code], ["BadRequestError", "context_length_exceeded"]);
    }
    const answer = await client.chat.completions.create({ model: MODEL, messages: user(TOO_LONG.slice(0, 500)) });
    check(answer.choices[0].message.content, HELLO);
  },
  async cancel() {
    const stream = await client.chat.completions.create({ model: MODEL, messages: user("count"), stream: true });
    let num = 0;
    for await (const _ of stream) if (++num === 6) break;
    check(num, 6);
    check(stream.controller.signal.aborted, true);
  },
});
