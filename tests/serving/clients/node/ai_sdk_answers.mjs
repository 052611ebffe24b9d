// Asks an endpoint by the Vercel AI SDK, and prints the answers as JSON: URL MODEL.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, Output, streamText } from 'ai';
import { z } from 'zod';

const [url, name] = process.argv.slice(2);
const to = { name: 'raymill', baseURL: `${url}/v1`, apiKey: 'none needed' };
const model = createOpenAICompatible({
  ...to,
  includeUsage: true,
  supportsStructuredOutputs: true,
})(name);
const plainModel = createOpenAICompatible(to)(name); // which asks for any JSON object
const asked = { model, prompt: 'the quick fox', temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
const Trip = z.object({
  city: z.enum(['Vienna', 'Graz']),
  days: z.number().int().min(1).max(7),
});

async function streamed() {
  const result = streamText(asked);
  const parts = [];
  for await (const part of result.textStream) parts.push(part);
  return { text: parts.join(''), usage: await result.usage, reason: await result.finishReason };
}

async function partsBeforeAbort() {
  const abort = new AbortController();
  const parts = [];
  const result = streamText({
    ...asked,
    maxOutputTokens: 1900,
    providerOptions: { raymill: { ignore_eos: true } },
    abortSignal: abort.signal,
    onError: () => {},
  });
  for await (const part of result.fullStream) {
    parts.push(part.type);
    if (part.type === 'text-delta') abort.abort();
  }
  return parts;
}

const answer = await generateText({ ...asked, system: 'be brief', seed: 7, topP: 0.9 });
const formatted = { ...asked, maxOutputTokens: 100 };
const output = await generateText({ ...formatted, output: Output.object({ schema: Trip }) });
const object = await generateObject({ ...formatted, schema: Trip });
const json = await generateText({ ...formatted, model: plainModel, output: Output.json() });
console.log(
  JSON.stringify({
    chat: answer.text,
    usage: answer.usage,
    streamed: await streamed(),
    output: output.output,
    object: object.object,
    json: json.output,
    before_abort: await partsBeforeAbort(),
  }),
);
