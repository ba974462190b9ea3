// What the official JavaScript clients get from the server at BASE, as one JSON object. Each wish is made with
// the model NAME: whole and streamed, with a schema, with tools, and in ways that are refused.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const { BASE, NAME: model } = process.env;
const openai = new OpenAI({ baseURL: `${BASE}/v1`, apiKey: "none", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: BASE, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello." }];
const parameters = {
  type: "object",
  properties: { unit: { enum: ["C", "F"] } },
  required: ["unit"],
  additionalProperties: false,
};
const told = {};
const refused = async (wish) => {
  try {
    await wish();
  } catch (e) {
    return [e.constructor.name, e.status];
  }
};

told.models = (await openai.models.list()).data.map((m) => m.id);

const asked = { model, messages, temperature: 0, max_tokens: 12 };
const whole = await openai.chat.completions.create(asked);
told.chat = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens];
told.chatStream = "";
for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true }))
  told.chatStream += chunk.choices[0]?.delta?.content ?? "";
const held = await openai.chat.completions.create({
  ...asked,
  max_tokens: 100,
  response_format: { type: "json_schema", json_schema: { name: "x", strict: true, schema: parameters } },
});
told.schema = held.choices[0].message.content;
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const calling = { ...asked, max_tokens: 200, tools, tool_choice: "required", parallel_tool_calls: false };
const call = (await openai.chat.completions.create(calling)).choices[0];
told.call = [call.message.tool_calls[0].function, call.finish_reason];
const runner = openai.chat.completions.stream(calling);
told.callStream = (await runner.finalMessage()).tool_calls[0].function.arguments;

const request = { model, input: "Hello.", temperature: 0, max_output_tokens: 12 };
const response = await openai.responses.create(request);
told.response = [response.output_text, response.status];
told.responseStream = "";
let last;
for await (const event of await openai.responses.create({ ...request, stream: true })) {
  last = event.type;
  if (event.type === "response.output_text.delta") told.responseStream += event.delta;
}
told.responseEnd = last;
const more = { ...request, previous_response_id: response.id, input: "And?" };
told.responseAfter = (await openai.responses.create(more)).usage.input_tokens > response.usage.input_tokens;

const message = await anthropic.messages.create(asked);
told.message = [message.content[0].text, message.stop_reason, message.usage.output_tokens];
const stream = anthropic.messages.stream(asked);
told.messageStream = "";
stream.on("text", (text) => (told.messageStream += text));
told.messageEnd = (await stream.finalMessage()).stop_reason;
const used = await anthropic.messages.create({
  ...asked,
  max_tokens: 200,
  tools: [{ name: "weather", input_schema: parameters }],
  tool_choice: { type: "tool", name: "weather", disable_parallel_tool_use: true },
});
told.use = [used.content[0].type, used.content[0].name, used.content[0].input, used.stop_reason];
told.count = (await anthropic.messages.countTokens({ model, messages })).input_tokens;

told.refused = [
  await refused(() => openai.chat.completions.create({ ...asked, model: "nope" })),
  await refused(() => openai.chat.completions.create({ ...asked, top_p: 2 })),
  await refused(() => openai.embeddings.create({ model, input: "x" })),
  await refused(() => anthropic.messages.create({ ...asked, max_tokens: 0 })),
  await refused(() => anthropic.messages.create({ ...asked, model: "nope" })),
];
const leaving = await openai.chat.completions.create({ ...asked, max_tokens: 1500, stream: true });
for await (const _ of leaving) break; // a client that goes away
console.log(JSON.stringify(told));
