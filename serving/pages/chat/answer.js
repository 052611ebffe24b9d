// Gets one answer: what is sent, and what comes back event by event.

import { ApiError, streamEvents } from "/page/api.js";

const TEXT_TOKENS = 64; // of a text that is continued, where no limit is set
const ENDINGS = {
  stop: "",
  length: "ended at the limit of tokens",
  stopped: "stopped",
  interrupted: "interrupted when the page was closed",
  failed: "failed",
};

export function wordsOfEnding(ending) {
  if (ending === null) return "answering …";
  return ENDINGS[ending] ?? ending;
}

// Returns a column's answer of a turn. A turn from before there were two columns has one for both.
export function answerIn(turn, column) {
  return turn.answers[column] ?? turn.answers[0];
}

// Returns the messages that a column's answer to a turn continues. What got no answer is no part of them.
export function messagesOf(conversation, index, column) {
  const { system } = conversation.settings;
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of conversation.turns.slice(0, index)) {
    const answer = answerIn(turn, column);
    if (!answer?.text) continue;
    messages.push({ role: "user", content: turn.text }, { role: "assistant", content: answer.text });
  }
  return [...messages, { role: "user", content: conversation.turns[index].text }];
}

// Returns the text that a column's answer to a turn continues, where the model was never taught to chat.
export function textOf(conversation, index, column) {
  const before = conversation.turns.slice(0, index).map((turn) => turn.text + (answerIn(turn, column)?.text ?? ""));
  return before.join("") + conversation.turns[index].text;
}

export function newAnswer(model, settings) {
  const seed = settings.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const { temperature } = settings;
  return { model, version: null, text: "", ending: null, problem: "", seed, temperature, promptIds: [], tokenIds: [] };
}

// Streams an answer into `answer`, and calls `onText` with each new piece. It never fails: `answer.ending` says how it ended.
export async function getAnswer(answer, { conversation, index, column, signal, onText }) {
  try {
    for await (const event of streamEvents(...requestOf(answer, conversation, index, column), signal)) take(event, answer, onText);
    answer.ending ??= "stop";
  } catch (error) {
    answer.ending = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.ending === "failed") answer.problem = wordsOf(error);
    answer.needsKey = error.status === 401;
  }
}

function requestOf(answer, conversation, index, column) {
  const { maxTokens } = conversation.settings;
  const { model, temperature, seed } = answer;
  const asked = { model, temperature, seed, return_token_ids: true };
  if (conversation.kind === "text") {
    const prompt = textOf(conversation, index, column);
    return ["/v1/completions", { ...asked, prompt, max_tokens: maxTokens ?? TEXT_TOKENS }];
  }
  const limit = maxTokens === null ? {} : { max_completion_tokens: maxTokens };
  return ["/v1/chat/completions", { ...asked, messages: messagesOf(conversation, index, column), ...limit }];
}

function take(event, answer, onText) {
  answer.version ??= event.system_fingerprint;
  const choice = event.choices[0];
  if (!choice) return;
  const promptIds = event.prompt_token_ids ?? choice.prompt_token_ids;
  if (promptIds) answer.promptIds = promptIds;
  answer.tokenIds.push(...(choice.token_ids ?? []));
  answer.ending ??= choice.finish_reason;
  const piece = choice.text ?? choice.delta?.content ?? "";
  answer.text += piece;
  if (piece) onText(piece);
}

function wordsOf(error) {
  if (error instanceof ApiError) return error.message;
  return `The connection to the endpoint is gone (${error.message}).`;
}
