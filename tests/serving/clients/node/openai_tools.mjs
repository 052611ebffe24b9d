// Has a model call a tool by openai-node, and prints what happened as JSON: URL MODEL.
import OpenAI from 'openai';
import { zodFunction } from 'openai/helpers/zod';
import { z } from 'zod';

const [url, model] = process.argv.slice(2);
const chat = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none needed', maxRetries: 0 }).chat
  .completions;
const given = [];
const weather = zodFunction({
  name: 'weather',
  description: 'The weather of a city.',
  parameters: z.object({ city: z.enum(['Vienna', 'Graz']), days: z.number().int().min(1).max(7) }),
  function: (input) => {
    given.push(input);
    return 'rain';
  },
});
const asked = {
  model,
  messages: [{ role: 'user', content: 'the weather?' }],
  temperature: 0,
  max_tokens: 200,
  tools: [weather],
  tool_choice: 'required', // no random model would call by itself
  parallel_tool_calls: false,
};
const runner = chat.runTools({ ...asked }, { maxChatCompletions: 2 });
await runner.done();
const streamed = await chat.stream({ ...asked }).finalChatCompletion();
console.log(
  JSON.stringify({
    given,
    roles: runner.messages.map((message) => message.role),
    streamed: streamed.choices[0].message.tool_calls[0].function.parsed_arguments,
  }),
);
