// Asks an endpoint by openai-node, and prints the answers as JSON: URL MODEL.
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none needed', maxRetries: 0 });
const chat = client.chat.completions;
const asked = {
  model,
  messages: [{ role: 'user', content: 'the quick fox' }],
  temperature: 0,
  max_tokens: 12,
};
const question = { model, input: 'the quick fox', temperature: 0 };
const Trip = z.object({
  city: z.enum(['Vienna', 'Graz']),
  days: z.number().int().min(1).max(7),
  stops: z.array(z.object({ by: z.union([z.literal('train'), z.literal('bus')]) })).max(2),
  guide: z.boolean().nullable(),
});
const formatted = { ...asked, max_tokens: 200, response_format: zodResponseFormat(Trip, 'trip') };

async function streamed() {
  const parts = [];
  let usage;
  const stream = await chat.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const part of stream) {
    parts.push(part.choices[0]?.delta.content ?? '');
    usage = part.usage ?? usage;
  }
  return { text: parts.join(''), usage };
}

async function textsBeforeAbort() {
  const texts = [];
  const stream = await chat.create({ ...asked, max_tokens: 1900, ignore_eos: true, stream: true });
  for await (const part of stream) {
    texts.push(part.choices[0]?.delta.content ?? '');
    if (texts.length === 3) stream.controller.abort();
  }
  return texts;
}

async function responded() {
  const text = { format: zodTextFormat(Trip, 'trip') };
  const parsed = await client.responses.parse({ ...question, max_output_tokens: 200, text });
  const stream = client.responses.stream({ ...question, max_output_tokens: 200, text });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  const plain = await client.responses.create({ ...question, max_output_tokens: 12 });
  return {
    text: plain.output_text,
    reason: plain.incomplete_details.reason,
    parsed: parsed.output_parsed,
    from_stream: (await stream.finalResponse()).output_parsed,
    last: kinds.at(-1),
  };
}

async function errorOf(promise) {
  const error = await promise.then(
    () => null,
    (reason) => reason,
  );
  return { name: error.constructor.name, status: error.status, message: error.message };
}

const answer = await chat.create({ ...asked, store: true, metadata: { team: 'a' }, user: 'u' });
const parsed = await chat.parse(formatted);
const parsedFromStream = await chat.stream(formatted).finalChatCompletion();
const models = [];
for await (const found of client.models.list()) models.push(found.id);
console.log(
  JSON.stringify({
    models,
    chat: answer.choices[0].message.content,
    streamed: await streamed(),
    parsed: parsed.choices[0].message.parsed,
    parsed_from_stream: parsedFromStream.choices[0].message.parsed,
    before_abort: await textsBeforeAbort(),
    responded: await responded(),
    no_such_response: await errorOf(client.responses.retrieve('resp_1')),
    no_such_field: await errorOf(chat.create({ ...asked, temprature: 1 })),
  }),
);
