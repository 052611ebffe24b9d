// Asks an endpoint by the Vercel AI SDK's model of OpenAI, which is one of responses, and prints the
// answers as JSON: URL MODEL.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText, isStepCount, Output, streamText, tool } from 'ai';
import { z } from 'zod';

const [url, name] = process.argv.slice(2);
const model = createOpenAI({ baseURL: `${url}/v1`, apiKey: 'none needed' })(name);
const asked = { model, prompt: 'the weather?', temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
const Weather = z.object({ city: z.enum(['Vienna', 'Graz']), days: z.number().int().min(1).max(7) });
const calling = {
  ...asked,
  maxOutputTokens: 200,
  tools: { weather: tool({ inputSchema: Weather, execute: async () => ({ sky: 'rain' }) }) },
  providerOptions: { openai: { parallelToolCalls: false } },
  stopWhen: isStepCount(2),
  // No random model would call by itself, nor end.
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'auto' }),
};

async function streamed(asked) {
  const result = streamText(asked);
  const parts = [];
  for await (const part of result.fullStream) parts.push(part.type);
  return { parts, text: await result.text, usage: await result.usage };
}

const answer = await generateText({ ...asked, system: 'be brief' });
const output = Output.object({ schema: Weather });
const object = await generateText({ ...asked, maxOutputTokens: 200, output });
const { steps } = await generateText(calling);

async function goneOn(openai) {
  const first = { role: 'user', content: asked.prompt };
  const messages = [first, ...answer.response.messages, { role: 'user', content: 'and?' }];
  const next = { ...asked, prompt: undefined, messages, providerOptions: { openai } };
  return generateText(next).then(
    (result) => result.text,
    (error) => error.message,
  );
}

console.log(
  JSON.stringify({
    text: answer.text,
    reason: answer.finishReason,
    usage: answer.usage,
    streamed: await streamed({ ...asked, system: 'be brief' }),
    object: object.output,
    inputs: steps.map((step) => step.toolCalls.map((call) => call.input)),
    results: steps.map((step) => step.toolResults.map((result) => result.output)),
    calling_stream: (await streamed(calling)).parts,
    second_turn: await goneOn({ store: false }),
    // Which sends the id of the first answer in place of its text
    second_turn_by_default: await goneOn({}),
  }),
);
