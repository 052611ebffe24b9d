// Sends requests to the endpoint. The key is kept in this module's memory only.

// For a person, in place of the endpoint's words about headers
const WRONG_KEY =
  "This endpoint does not know that key. See whether you have copied all of it, or ask whoever runs the endpoint for another one.";
let key = null;

export class ApiError extends Error {
  constructor(status, body, retryAfter) {
    super(body?.error?.message ?? `The endpoint answered ${status}.`);
    this.status = status;
    this.code = body?.error?.code ?? null;
    this.retryAfterMs = 1000 * Number(retryAfter ?? 1);
  }
}

export function useKey(value) {
  key = value;
}

export async function ask(path, { body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const text = await response.text();
  let parsed = null;
  try {
    parsed = JSON.parse(text);
  } catch { /* a proxy's refusal is plain text */ }
  const error = new ApiError(response.status, parsed, response.headers.get("Retry-After"));
  if (key && error.code === "invalid_api_key") error.message = WRONG_KEY;
  throw error;
}

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

// Returns the answer of /v1/xray and how long it took. The endpoint takes one request at a time: those of this page wait
// for each other, and are repeated while the endpoint answers somebody else's.
let last = Promise.resolve();
export function xray(body, signal) {
  const answer = last.then(() => askXray(body, signal));
  last = answer.catch(() => {});
  return answer;
}

async function askXray(body, signal) {
  for (let attempt = 1; ; attempt += 1) {
    const start = performance.now();
    try {
      const answer = await askJson("/v1/xray", { body, signal });
      return { ...answer, wall_ms: performance.now() - start };
    } catch (error) {
      if (error.status !== 429 || attempt === 8) throw error;
      await new Promise((resolve) => setTimeout(resolve, error.retryAfterMs));
    }
  }
}

// Yields the events of a streamed answer, until its `[DONE]`.
export async function* streamEvents(path, body, signal) {
  const response = await ask(path, { body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The stream ended too early.");
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ApiError(500, parsed);
      yield parsed;
    }
  }
}
