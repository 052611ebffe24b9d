// Opens the inside of an answer in this page: the view at /inside, given the tokens of the answer's prompt, its seed and version.

import { ask } from "/page/api.js";
import { byId, element } from "/page/elements.js";

const FIELDS_OF_A_QUERY = ["label[for=prompt]", "#prompt", "#query .fields", "#run"];
let view = null; // the view's module, once it is here
let last = Promise.resolve();

// Shows an answer's inside in `place`. `back` is the address of its conversation.
export async function openInside(place, { answer, text, back }) {
  const title = element("h2", { tabIndex: -1 }, "Inside of an answer");
  const about = element("p", { className: "quiet" }, `${answer.model}, version ${answer.version}, answered: ${text.slice(0, 200)}`);
  const same = element("p", { className: "quiet", id: "chat-inside-same" });
  same.setAttribute("role", "status");
  const top = element("div", { id: "chat-inside-top" }, element("a", { href: back }, "Back to the conversation"), title, about, same);
  byId("chat-inside-top")?.remove();
  place.prepend(top);
  place.hidden = false;
  title.focus();
  view ??= await loadView(place);
  await last; // what was open before ends
  last = inspectAgain(answer, same);
  return last;
}

export function closeInside(place) {
  place.hidden = true;
  byId("stop")?.click();
}

async function loadView(place) {
  const page = new DOMParser().parseFromString(await (await ask("/inside")).text(), "text/html");
  place.append(page.getElementById("model"), ...page.querySelector("main").children);
  for (const selector of FIELDS_OF_A_QUERY) place.querySelector(selector).hidden = true;
  const module = await import("/page/page.js");
  await module.connected;
  return module;
}

// The same prompt, seed and version give the same tokens; says so, or that they did not.
async function inspectAgain(answer, same) {
  const { promptIds: prompt, tokenIds, temperature, seed } = answer;
  const model = nameOfVersion(answer);
  const ids = await view.inspect({ model, prompt, max_tokens: tokenIds.length, temperature, top_p: 1, seed });
  if (ids === null) return;
  const isSame = ids.every((id, index) => id === tokenIds[index]);
  same.textContent = isSame
    ? "These are the tokens of the answer: the same prompt, seed and version gave them again."
    : "These are not the tokens of the answer: this endpoint does not repeat them for the same prompt, seed and version.";
}

function nameOfVersion({ model, version }) {
  return model.endsWith(`@${version}`) ? model : `${model}@${version}`;
}
