// Has a model call a tool by the Vercel AI SDK, and prints what happened as JSON: URL MODEL.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, isStepCount, streamText, tool } from 'ai';
import { z } from 'zod';

const [url, name] = process.argv.slice(2);
const to = { name: 'raymill', baseURL: `${url}/v1`, apiKey: 'none needed' };
const calls = [];
const asked = {
  model: createOpenAICompatible(to)(name),
  prompt: 'the weather?',
  temperature: 0,
  maxOutputTokens: 200,
  maxRetries: 0,
  tools: {
    weather: tool({
      description: 'The weather of a city.',
      inputSchema: z.object({ city: z.enum(['Vienna', 'Graz']), days: z.number().int().min(1).max(7) }),
      execute: async (input) => {
        calls.push(input);
        return { sky: 'rain' };
      },
    }),
  },
  providerOptions: { raymill: { parallel_tool_calls: false } },
  stopWhen: isStepCount(2),
  // No random model would call by itself, nor end.
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'auto' }),
};

async function streamed() {
  const parts = [];
  const result = streamText(asked);
  for await (const part of result.fullStream) parts.push(part.type);
  return { parts, reasons: (await result.steps).map((step) => step.finishReason) };
}

const { steps } = await generateText(asked);
console.log(
  JSON.stringify({
    steps: steps.map((step) => ({
      reason: step.finishReason,
      inputs: step.toolCalls.map((call) => call.input),
      results: step.toolResults.map((result) => result.output),
      request: step.request.body,
    })),
    streamed: await streamed(),
    calls,
  }),
);
