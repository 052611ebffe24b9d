// The page: requests a completion, then looks inside it.

import { ApiError, askJson, streamEvents, useKey, xray } from "/page/api.js";
import { AttentionView } from "/page/attention.js";
import { byId, offerFocus, Tabs } from "/page/elements.js";
import { showStages, showTime } from "/page/timing.js";
import { shaded, streamedTokens, TokenRow, xrayTokens } from "/page/tokens.js";
import { TraceView } from "/page/trace.js";

const PAUSE_MS = 150; // a slider must rest this long before its value is requested
const state = { model: null, limits: null, answer: null, asked: null, abort: null, steps: new Map() };
const views = new Tabs(byId("views"), (_, chosen) => {
  for (const tab of views.tabs) byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  attention.draw();
  if (chosen.id === "tab-steps") showStep();
});
const attention = new AttentionView(loadLayer, showError);
const trace = new TraceView(showError);
const row = new TokenRow(byId("tokens"), byId("detail"), (index) => {
  if (state.answer && index < state.answer.predictions.length) attention.showRow(index);
});

async function connect() {
  try {
    state.model = (await askJson("/v1/models")).data[0];
    state.limits = await askJson("/v1/xray");
  } catch (error) {
    if (error.status !== 401) return showError(error);
    if (!byId("key-form").hidden) showError(error);
    byId("key-form").hidden = false;
    return byId("key").focus();
  }
  const { id, version, lineage, max_model_len: context } = state.model;
  byId("model").textContent = `${id}, ${lineage ? `step ${lineage.step}, ` : ""}version ${version}, context ${context}`;
  byId("key-form").hidden = true;
  byId("tab-steps").hidden = state.limits.steps.length < 2;
  byId("step").max = state.limits.steps.length - 1;
  byId("step").value = state.limits.steps.length - 1;
  showError(null);
  offerFocus(byId("query"), byId("prompt"));
}

async function run() {
  if (!state.model) return connect();
  const seed = byId("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : byId("seed").valueAsNumber;
  return inspect({
    model: state.model.id,
    prompt: byId("prompt").value,
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    top_p: byId("top-p").valueAsNumber,
    seed,
  });
}

// Streams a completion and looks inside it; serving/pages/chat has it look inside an answer by the tokens of its prompt.
// Returns the ids of the streamed tokens, or null.
export async function inspect(asked) {
  if (!state.model || state.abort) return null;
  const { signal } = (state.abort = new AbortController());
  let streamed = null;
  Object.assign(state, { answer: null, asked, steps: new Map() });
  setBusy(true, "Streaming …");
  showError(null);
  row.clear();
  trace.clear();
  byId("completion").hidden = false;
  byId("inside").hidden = true;
  try {
    streamed = await stream(asked, signal);
    setBusy(true, "Looking inside …");
    const answer = await look(asked, {}, signal);
    show(answer, streamed);
    setBusy(false, `${streamed.tokens.length} tokens, seed ${asked.seed}`);
  } catch (error) {
    setBusy(false, "");
    if (error.name === "AbortError") byId("status").textContent = "Stopped";
    else showError(error);
  }
  state.abort = null;
  return streamed?.ids ?? null;
}

async function stream(asked, signal) {
  const streamed = { start: performance.now(), times: [], tokens: [], ids: [] };
  for await (const event of streamEvents("/v1/completions", { ...asked, logprobs: 5, return_token_ids: true }, signal)) {
    streamed.ids.push(...(event.choices[0]?.token_ids ?? []));
    const logprobs = event.choices[0]?.logprobs;
    if (!logprobs) continue;
    const tokens = streamedTokens(logprobs);
    if (tokens.length) streamed.times.push(performance.now());
    streamed.tokens.push(...tokens);
    row.append(tokens);
  }
  return streamed;
}

// Requests the x-ray of the same query; the seed gives the same tokens.
function look(asked, changes, signal) {
  const { max_tokens: most, max_sequence_tokens: length } = state.limits;
  const room = Array.isArray(asked.prompt) ? Math.max(0, length - asked.prompt.length) : most;
  const maxTokens = Math.min(asked.max_tokens, most, room);
  return xray({ ...asked, max_tokens: maxTokens, ...changes }, signal);
}

function show(answer, streamed) {
  state.answer = answer;
  const numSeen = answer.tokens.length - answer.num_prompt_tokens;
  row.clear();
  row.append([...xrayTokens(answer), ...streamed.tokens.slice(numSeen)]);
  trace.show(state.model.id, answer.tokens, state.limits);
  byId("inside").hidden = false;
  views.choose(0);
  attention.show(answer.tokens.slice(0, answer.predictions.length), answer.num_layers, answer.num_heads);
  showStages(answer.stages);
  showTime(answer, streamed);
  row.choose(Math.min(answer.num_prompt_tokens, row.tokens.length - 1));
}

// Returns the maps of one layer by head. The first layer's came with the answer; others are requested by token ids.
async function loadLayer(layer) {
  const { attention: maps, tokens, predictions } = state.answer;
  if (layer === maps[0].layer) return maps.map((map) => map.rows);
  const prompt = tokens.slice(0, predictions.length).map((token) => token.id);
  const answer = await xray({ model: state.asked.model, prompt, max_tokens: 0, layers: [layer] });
  return answer.attention.map((map) => map.rows);
}

function nameStep() {
  const step = state.limits.steps[byId("step").valueAsNumber];
  byId("step-name").textContent = step;
  byId("step").setAttribute("aria-valuetext", `step ${step}`);
  return step;
}

async function showStep() {
  const step = nameStep();
  const { steps, asked } = state;
  if (!steps.has(step)) steps.set(step, look(asked, { step }));
  try {
    const answer = await steps.get(step);
    const isCurrent = steps === state.steps && step === state.limits.steps[byId("step").valueAsNumber];
    if (isCurrent) byId("step-text").replaceChildren(...answer.tokens.map(shaded));
  } catch (error) {
    steps.delete(step);
    showError(error);
  }
}

function setBusy(isBusy, status) {
  byId("run").setAttribute("aria-disabled", String(isBusy)); // a disabled button would lose the focus
  if (document.activeElement === byId("stop")) byId("run").focus();
  byId("stop").disabled = !isBusy;
  byId("status").textContent = status;
}

function showError(error) {
  byId("error").textContent = error === null ? "" : error instanceof ApiError ? error.message : `${error}`;
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("key").value = "";
  connect();
});
byId("query").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("query").requestSubmit();
});
byId("stop").addEventListener("click", () => state.abort?.abort());
byId("step").addEventListener("input", () => {
  nameStep();
  clearTimeout(state.pause);
  state.pause = setTimeout(showStep, PAUSE_MS);
});
export const connected = connect();
