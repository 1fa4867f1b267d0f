// The Vercel AI SDK by its openai-compatible provider: text, streams, objects, tools in two steps, an overflow, a cancel.
import { DEGREES, HELLO, MODEL, TOO_LONG, URL_V1, check, load, run, version } from "./cases.mjs";

const { APICallError, Output, generateText, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");

const provider = createOpenAICompatible({
  name: "stagemesh",
  baseURL: URL_V1,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(MODEL);
const place = z.object({ city: z.string(), country: z.string() });

await run(`${version("ai")} (openai-compatible ${version("@ai-sdk/openai-compatible")})`, {
  async chat() {
    const answer = await generateText({ model, prompt: "hello" });
    check([answer.text, answer.finishReason], [HELLO, "stop"]);
  },
  async stream() {
    const answer = streamText({ model, prompt: "hello" });
    let said = "";
    for await (const piece of answer.textStream) said += piece;
    check(said, HELLO);
    const usage = await answer.totalUsage;
    check(usage.totalTokens, usage.inputTokens + usage.outputTokens);
  },
  async thinking() {
    const answer = await generateText({ model, prompt: "think" });
    check([answer.reasoningText.trim(), answer.text], ["Is it? It is.", "Yes."]);
  },
  async tools() {
    const inputSchema = z.object({ city: z.string() });
    const weather = tool({ description: "the weather in a city", inputSchema, execute: async () => 21 });
    const answer = streamText({ model, prompt: "weather", tools: { weather }, stopWhen: stepCountIs(3) });
    const kinds = [];
    for await (const part of answer.fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type === "tool-call" || part.type === "tool-result") kinds.push([part.type, part.input.city]);
    }
    check(kinds, [["tool-call", "Paris"], ["tool-result", "Paris"]]);
    check([await answer.text, (await answer.steps).length], [DEGREES, 2]);
  },
  async schema() {
    const answer = await generateText({ model, prompt: "where?", output: Output.object({ schema: place }) });
    check(answer.output, { city: "Paris", country: "France" });
  },
  async overflow() {
    try {
      await generateText({ model, prompt: TOO_LONG, maxRetries: 0 });
      throw new Error("it was taken");
    } catch (error) {
      check(APICallError.isInstance(error), true);
      check([error.statusCode, error.data.error.code, error.isRetryable], [400, "context_length_exceeded", false]);
    }
    check((await generateText({ model, prompt: TOO_LONG.slice(0, 500) })).text, HELLO);
  },
  async cancel() {
    const controller = new AbortController();
    const answer = streamText({ model, prompt: "count", abortSignal: controller.signal });
    const types = [];
    let num = 0;
    for await (const part of answer.fullStream) {
      types.push(part.type);
      if (part.type === "text-delta" && ++num === 6) controller.abort();
    }
    check(types.at(-1), "abort");
  },
});
