// What may be asked: the models of /v1/models, and during a promotion each of their versions.

import { askJson } from "/page/api.js";
import { element } from "/page/elements.js";

const SERVING = { canary: ["live", "candidate"], watching: ["live", "previous"] }; // by phase
const WORDS = { live: "live version", candidate: "canary", previous: "version before" };

// Returns {choices, steps, mayLookInside}. A choice is what a request names as its model; only who may look inside a query may
// ask for a version by its name.
export async function readModels() {
  const { data: cards } = await askJson("/v1/models");
  const mayLookInside = await askJson("/v1/xray").then(() => true, () => false);
  const choices = cards.flatMap((card) => [ofName(card), ...(mayLookInside ? ofVersions(card) : [])]);
  const steps = new Map();
  for (const card of cards) {
    for (const version of [card, ...Object.values(card.delivery ?? {})]) {
      if (version?.lineage) steps.set(version.version, version.lineage.step);
    }
  }
  return { choices, steps, mayLookInside };
}

function ofName(card) {
  return { model: card.id, label: card.id, isChatTuned: card.chat_tuned, context: card.max_model_len, version: card.version };
}

function ofVersions(card) {
  const roles = SERVING[card.delivery?.phase] ?? [];
  return roles.filter((role) => card.delivery[role]).map((role) => {
    const { version, lineage } = card.delivery[role];
    const step = lineage ? `, step ${lineage.step}` : "";
    return { ...ofName(card), model: `${card.id}@${version}`, label: `${card.id}: ${WORDS[role]}${step}`, version };
  });
}

// Fills a <select>, and keeps what is chosen there as long as it can be asked for.
export function fillChoices(select, choices, chosen) {
  const wanted = chosen ?? select.value;
  select.replaceChildren(...choices.map(({ model, label }) => element("option", { value: model }, label)));
  select.value = choices.some(({ model }) => model === wanted) ? wanted : choices[0].model;
}
