// The page to talk to the model: which conversation is open, who answers, and what is going on.

import { useKey } from "/page/api.js";
import { byId, offerFocus } from "/page/elements.js";
import { Announcer } from "/chat/announcer.js";
import { getAnswer, newAnswer, wordsOfEnding } from "/chat/answer.js";
import { isOfConversation, isStored, load, newConversation, remove, save, storedConversations, titleOf } from "/chat/conversations.js";
import { closeInside, openInside } from "/chat/inside.js";
import { fillChoices, readModels } from "/chat/models.js";
import { DEFAULTS, readSettings, showKind, showSettings } from "/chat/settings.js";
import { drawList } from "/chat/sidebar.js";
import { Transcript } from "/chat/transcript.js";

const NOBODY = { model: "", label: "nobody" };
const UNKNOWN = { choices: [], steps: new Map(), mayLookInside: false }; // until the endpoint has said what it serves
const state = { conversation: newConversation(DEFAULTS), models: UNKNOWN, abort: null, place: [] };
const announcer = new Announcer(byId("chat-announcer"));
const transcript = new Transcript(byId("chat-log"), {
  onAgain: again,
  onCopied: (words) => announcer.say(words),
  about: () => state.models,
});

async function connect() {
  try {
    state.models = await readModels();
  } catch (error) {
    if (error.status === 401) askForKey(error);
    else showError(error);
    return;
  }
  byId("chat-key-form").hidden = true;
  showError(null);
  showChoices();
  transcript.show(state.conversation);
  await route();
}

function askForKey(error) {
  const form = byId("chat-key-form");
  byId("chat-key-error").textContent = form.hidden ? "" : error.message;
  form.hidden = false;
  byId("chat-key").focus();
}

function choice() {
  return state.models.choices.find(({ model }) => model === byId("chat-answered-by").value);
}

function kind() {
  return state.conversation.kind ?? (choice()?.isChatTuned === false ? "text" : "chat");
}

function showChoices() {
  const { choices } = state.models;
  if (!choices.length) return;
  const [first, beside] = state.conversation.models;
  fillChoices(byId("chat-answered-by"), choices, first);
  fillChoices(byId("chat-beside"), [NOBODY, ...choices], beside ?? "");
  showModel();
}

// Says what answers, and what that means for a model that was never taught to chat.
function showModel() {
  const chosen = choice();
  if (!chosen) return;
  const isText = kind() === "text";
  byId("chat-model").textContent = `${chosen.label}, version ${chosen.version}, context ${chosen.context}`;
  byId("chat-note").hidden = chosen.isChatTuned;
  byId("chat-note").textContent = isText
    ? `${chosen.label} is not chat-tuned: it was never taught to answer. It continues the text that you give it.`
    : `${chosen.label} is not chat-tuned: it gets the conversation as plain text, and continues that.`;
  byId("chat-message-label").textContent = isText ? "Text to continue" : "Message";
  byId("chat-send").textContent = isText ? "Continue" : "Send";
  showKind(kind());
}

function show(conversation) {
  state.conversation = conversation;
  showSettings(conversation.settings);
  showChoices();
  showError(null);
  transcript.show(conversation);
  byId("chat-title").textContent = titleOf(conversation);
  showList();
}

function showList() {
  drawList(byId("chat-list"), storedConversations(), { current: state.conversation.id, onRemove: removed });
}

function keep(conversation) {
  try {
    save(conversation);
  } catch (error) {
    showError(error);
  }
  showList();
}

function removed(id) {
  remove(id);
  if (id === state.conversation.id) beginAnew();
  showList();
  byId("chat-new").focus();
}

function beginAnew() {
  history.pushState(null, "", "/");
  begin();
}

function begin() {
  state.abort?.abort();
  closeInside(byId("chat-inside"));
  byId("chat-room").hidden = false;
  show(newConversation(readSettings()));
  byId("chat-message").focus();
}

// Shows what the address names: a conversation, or the inside of one of its answers.
async function route() {
  const words = location.hash.slice(1).split("/");
  const place = words[0] === "inside" ? words.slice(1) : words;
  const conversation = place[0] === state.conversation.id ? state.conversation : load(place[0]);
  if (conversation === null) {
    if (place[0]) showError(new Error("This browser has no such conversation; it was deleted, or it is another browser's."));
    return offerFocus(byId("chat-form"), byId("chat-message"));
  }
  if (conversation !== state.conversation) {
    state.abort?.abort();
    show(conversation);
  }
  const isInside = words[0] === "inside";
  byId("chat-room").hidden = isInside;
  if (!isInside) return comeBack();
  return lookInside(place);
}

async function lookInside([id, index, column]) {
  state.place = [id, index, column];
  const turn = state.conversation.turns[index];
  const answer = turn?.answers[column];
  if (!answer) return;
  try {
    await openInside(byId("chat-inside"), { answer, text: turn.text, back: `#${id}` });
  } catch (error) {
    byId("chat-inside-same").textContent = error.message;
  }
}

// Gives the focus to the link by which the inside was opened, else to the message.
function comeBack() {
  closeInside(byId("chat-inside"));
  const link = document.querySelector(`[href="#inside/${state.place.join("/")}"]`);
  state.place = [];
  if (link) link.focus();
  else offerFocus(byId("chat-form"), byId("chat-message"));
}

async function send() {
  const { conversation } = state;
  const text = byId("chat-message").value;
  if (state.abort || (kind() === "chat" && !text.trim())) return;
  if (!choice()) return void (await connect());
  conversation.kind = kind();
  conversation.settings = readSettings();
  conversation.models = [byId("chat-answered-by").value, byId("chat-beside").value || null];
  const asked = conversation.models.filter((model) => model !== null);
  conversation.turns.push({ text, answers: asked.map((model) => newAnswer(model, conversation.settings)) });
  byId("chat-message").value = "";
  byId("chat-title").textContent = titleOf(conversation);
  history.replaceState(null, "", `#${conversation.id}`);
  await askFor(conversation, conversation.turns.length - 1, [...asked.keys()]);
}

async function again(index, column) {
  const { conversation } = state;
  if (state.abort) return;
  const { answers } = conversation.turns[index];
  conversation.settings = readSettings();
  answers[column] = newAnswer(answers[column].model, conversation.settings);
  await askFor(conversation, index, [column], { focus: true });
}

// Gets answers to a turn, all at the same time.
async function askFor(conversation, index, columns, { focus = false } = {}) {
  const abort = (state.abort = new AbortController());
  setBusy(true);
  if (focus) byId("chat-stop").focus(); // the button that was pressed goes
  showError(null);
  keep(conversation);
  transcript.redraw(index);
  await Promise.all(columns.map((column) => askOne(conversation, index, column, abort.signal)));
  state.abort = null;
  setBusy(false);
}

async function askOne(conversation, index, column, signal) {
  const answer = conversation.turns[index].answers[column];
  const grow = transcript.grower(index, column);
  const onText = (piece) => {
    grow(piece);
    announcer.add(answer.model, piece);
  };
  await getAnswer(answer, { conversation, index, column, signal, onText });
  if (answer.version && !state.models.steps.has(answer.version)) await refresh();
  if (isStored(conversation.id)) keep(conversation); // or it was deleted meanwhile
  announcer.end(answer.model, answer.problem || wordsOfEnding(answer.ending) || "That is the whole answer.");
  if (conversation === state.conversation) transcript.redrawAnswer(index, column);
  if (answer.needsKey) askForKey(new Error(answer.problem));
}

// A promotion may have begun or ended since.
async function refresh() {
  try {
    state.models = await readModels();
    showChoices();
  } catch (error) {
    showError(error);
  }
}

function setBusy(isBusy) {
  byId("chat-send").setAttribute("aria-disabled", String(isBusy)); // a disabled button would lose the focus
  if (!isBusy && document.activeElement === byId("chat-stop")) byId("chat-message").focus();
  byId("chat-stop").disabled = !isBusy;
}

function showError(error) {
  byId("chat-error").textContent = error === null ? "" : error.message;
}

byId("chat-key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("chat-key").value.trim());
  byId("chat-key").value = "";
  connect();
});
byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("chat-message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("chat-form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") (state.abort ? byId("chat-stop") : byId("stop"))?.click();
});
byId("chat-stop").addEventListener("click", () => state.abort?.abort());
byId("chat-new").addEventListener("click", beginAnew);
byId("chat-settings").addEventListener("invalid", () => (byId("chat-settings").open = true), true);
byId("chat-skip").addEventListener("click", () => byId("chat-message").focus());
byId("chat-answered-by").addEventListener("change", () => {
  state.conversation.models[0] = byId("chat-answered-by").value;
  showModel();
});
byId("chat-beside").addEventListener("change", () => {
  state.conversation.models[1] = byId("chat-beside").value || null;
});
addEventListener("hashchange", () => {
  if (location.hash) route();
  else begin();
});
addEventListener("storage", (event) => {
  if (isOfConversation(event.key)) showList(); // another tab's
});
addEventListener("focus", () => state.models !== UNKNOWN && !state.abort && refresh());
if (location.search) location.replace(`/inside${location.search}${location.hash}`); // an address of the x-ray page
else {
  show(state.conversation);
  connect();
}
